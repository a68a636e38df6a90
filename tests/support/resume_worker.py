"""What the test processes of `test_resume.py` do: two of them, started once, train by the real loop, together and each
alone, are stopped, and go on. They write down what every step showed the model.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python resume_worker.py FOLDER
"""

from __future__ import annotations

import faulthandler
import gc
import json
import shutil
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from support.training_trace import Watch
from trainer.dit.train import train_dit
from trainer.settings import DiTSettings, load_settings
from trainer.training.setup import Request

STOP, STEPS = 3, 7
"""Steps before the signal, and in all. An epoch has four: of three micro-batches, which two processes cannot share
evenly, and of one."""
WORKERS = (0, 2, 4)
PATIENCE = timedelta(seconds=300)
SETTINGS = (
    "model={hidden_size: 48, num_heads: 2, depth: 1, depth_single_blocks: 1, axes_dim: [4, 10, 10], patch_size: 1}",
    "text.options={length: 8}",
    "plan.text_tokens=8",
    "optimizer.warmup=2",
    "dropout=0.3",
    "conditions={t2v: 1, i2v_head: 1, i2v_loop: 1}",
    f"steps={STEPS}",
    "seed=24",
    "checkpoint.every=2",
    "loader={augment: random, flip: true, prefetch_mb: 1, workers: 0}",
    "log={every: 1, tensorboard: false}",
    "validation.every=0",
    "preview.every=0",
    "write_back=false",
    "watchdog_s=0",
)
BF16 = "engine.precision=bf16"
PLUGINS = {
    "ddp": (),
    "zero2": ("engine.plugin=zero2", BF16, "write_back=true"),
    "tp": ("engine.plugin=hybrid", "engine.tp=2"),
    "sp": ("engine.plugin=hybrid", "engine.sp=2", "engine.zero=1", BF16),
}

CUT_OFF = "zero2"
"""Of this one the last checkpoint is not whole, so that it goes on from the one before."""


def main() -> None:
    alone()
    if RANK == 0:
        train("1 unbroken")
    else:
        train("1 stopped", "loader.workers=2", stop=True)
        for workers in WORKERS:
            copy("1 stopped", f"1 to 1, {workers} workers")
            copy("1 stopped", f"1 to 2, {workers} workers")
            train(f"1 to 1, {workers} workers", f"loader.workers={workers}", resume=True)
    together()
    for workers in WORKERS:
        train(f"1 to 2, {workers} workers", f"loader.workers={workers}", resume=True)
    for plugin, how in PLUGINS.items():
        train(f"2 unbroken, {plugin}", *how)
        train(f"2 stopped, {plugin}", *how, "loader.workers=2", stop=True)
        copy(f"2 stopped, {plugin}", f"2 to 2, {plugin}")
        if plugin == CUT_OFF:
            unmake_last(f"2 to 2, {plugin}")
        train(f"2 to 2, {plugin}", *how, resume=True)
    for workers in WORKERS:
        copy("2 stopped, ddp", f"2 to 1, {workers} workers")
    alone()
    for workers in WORKERS[RANK::2]:
        train(f"2 to 1, {workers} workers", f"loader.workers={workers}", resume=True)


def train(name: str, *sets: str, stop: bool = False, resume: bool = False) -> None:
    """A run from its start to a signal, or to its end; what it showed goes to `NAME.jsonl`, after what is there.

    Args:
        stop: one of the processes, the last, gets the signal.
    """
    (FOLDER / "alive").touch()
    started = time.process_time()

    def signalled(index: int) -> None:
        if stop and index + 1 == STOP and dist.get_rank() == dist.get_world_size() - 1:
            signal.raise_signal(signal.SIGTERM)

    settings = load_settings(DiTSettings, "tiny", None, [*SETTINGS, *sets])
    with Watch(signalled) as watch:
        ended = train_dit(
            Request(FOLDER / name, plan=None if resume else FOLDER / "plan", resume=resume, quiet=True), settings
        )
    mine = [
        {"step": s.step, "window": s.window, "clip": s.clip, "seed": s.seed, "draws": s.digest, "loss": s.loss}
        for s in watch.shown
    ]
    everywhere: list[list[dict[str, Any]]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everywhere, mine)
    if dist.get_rank() == 0:
        samples = sorted((sample for each in everywhere for sample in each), key=lambda s: (s["step"], s["seed"]))
        found = {
            "status": ended.status,
            "step": ended.step,
            "samples": samples,
            "cpu_s": round(time.process_time() - started, 2),
        }
        with (FOLDER / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(found) + "\n")


def copy(name: str, to: str) -> None:
    """A run's folder and notes, so that the run may go on in two ways."""
    if dist.get_rank() == 0:
        shutil.copytree(FOLDER / name, FOLDER / to, symlinks=True)
        shutil.copy(FOLDER / f"{name}.jsonl", FOLDER / f"{to}.jsonl")
    dist.barrier()


def unmake_last(name: str) -> None:
    """As if the processes had been killed while the last checkpoint was written."""
    if dist.get_rank() == 0:
        last = FOLDER / name / "checkpoints" / f"step-{STOP:06d}"
        (last / "checkpoint.json").unlink()
        last.rename(last.with_suffix(".partial"))
    dist.barrier()


def alone() -> None:
    """Leave the other process; this one is a world of its own."""
    leave()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def together() -> None:
    leave()
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(FOLDER / "meeting"), 2), rank=RANK, world_size=2, timeout=PATIENCE
    )


def leave() -> None:
    gc.collect()  # engines that are gone close their groups
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    faulthandler.enable()  # the test ends a process that hangs by SIGABRT
    FOLDER = Path(sys.argv[1])
    dist.init_process_group("gloo", timeout=PATIENCE)
    RANK = dist.get_rank()
    main()
