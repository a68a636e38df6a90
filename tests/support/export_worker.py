"""Trains a few steps of a small DiT by several plugins, on as many processes as were started, and writes down what the
engine gives.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python export_worker.py PLAN WEIGHTS FOLDER NAME ...
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from support import bar_films
from trainer.dit.task import DiTTask, architecture_for, build_frozen, build_model
from trainer.dit.train import DiTTraining
from trainer.engine import Engine
from trainer.settings import DiTSettings, load_settings
from trainer.training.checkpoint import export
from trainer.training.loop import train
from trainer.training.setup import Request, fit_to, prepare

RUNS = {
    "ddp": ["engine={plugin: ddp, precision: fp32, ema: 0.9}"],
    "zero2": ["engine={plugin: zero2, precision: bf16, ema: 0.9}"],
    "tp": ["engine={plugin: hybrid, tp: 2, precision: fp32, ema: null}"],
    "gemini": ["engine={plugin: gemini, precision: bf16, ema: 0.9}"],
}
SETTINGS = [*bar_films.SETTINGS, "checkpoint={every: 1, keep: 3}", "steps=3"]
"""In the first step nothing moves that has a gate of zero before it; in three, everything does."""


def settings_for(weights: Path, *sets: str) -> DiTSettings:
    return load_settings(DiTSettings, "tiny", None, [f"autoencoder.weights={weights}", *SETTINGS, *sets])


def train_and_tell(plan: Path, folder: Path, settings: DiTSettings) -> None:
    """As `train_dit`; at the end the engine itself gathers and writes what it has."""
    autoencoder, encoder = build_frozen(settings)
    prepared = prepare(
        Request(folder, plan=plan, quiet=True), settings, fit_to(autoencoder, 1, encoder.length), "train dit"
    )
    architecture = architecture_for(settings.model, autoencoder, encoder)
    model = build_model(settings.model, architecture, settings.seed)
    engine = Engine(model, settings.engine, settings.optimizer, prepared.device, architecture)
    train(prepared, DiTTraining(prepared, DiTTask(settings, autoencoder, encoder, prepared.device), engine))
    told = folder.with_name(f"{folder.name}-told")
    export(engine, told / "weights.safetensors", dtype=torch.float32)
    if settings.engine.ema:
        export(engine, told / "ema.safetensors", ema=True, dtype=torch.float32)


if __name__ == "__main__":
    torch.set_num_threads(1)
    PLAN, WEIGHTS, FOLDER = (Path(argument) for argument in sys.argv[1:4])
    for name in sys.argv[4:]:
        train_and_tell(PLAN, FOLDER / name, settings_for(WEIGHTS, *RUNS[name]))
    dist.barrier()
    dist.destroy_process_group()
