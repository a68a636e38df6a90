"""Films of moving bars, a plan of them, and weights of an autoencoder: enough to train on, made in a second."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from support.drawn_videos import encode
from support.plan_folders import bucket, window
from trainer.models.autoencoders.build import build_autoencoder
from trainer.models.common.weights import save_weights
from trainer.planning.plan import WINDOWS, Part, write_plan

HEIGHT, WIDTH, FRAMES, FPS = 32, 48, 9, 24
SETTINGS = [
    "model={hidden_size: 48, num_heads: 2, depth: 1, depth_single_blocks: 1, axes_dim: [4, 10, 10], patch_size: 1, "
    "mlp_ratio: 2.5}",
    "text.options={length: 8}",
    "loader.workers=0",
    "write_back=false",
    "log={tensorboard: false, every: 1}",
    "preview.every=0",
    "plan.text_tokens=8",
    "watchdog_s=0",
    "validation.every=0",
    "optimizer={lr: 1.0e-2, warmup: 0}",
]
"""Over the preset `tiny`: a model that fits the plan, and nothing that takes time."""


def make_bars(folder: Path, clips: int = 4) -> Path:
    """`folder/plan`, whose steps have two micro-batches of two samples, and `folder/tiny.safetensors`; gives the
    folder."""
    rows = []
    for v in range(clips):
        pictures = [np.full((HEIGHT, WIDTH, 3), 30 + 40 * v, np.uint8) for _ in range(FRAMES)]
        for i, picture in enumerate(pictures):
            picture[:, 4 * i : 4 * i + 8] = 255 - 40 * v
        film = encode(folder / f"{v}.mp4", pictures, FPS)
        rows.append(
            window(
                0,
                f"video {v}",
                clip_id=f"clip{v}",
                uri=str(film),
                frames=FRAMES,
                fps=float(FPS),
                time_base="1/12288",
                end_pts=FRAMES * 512,
                crop_width=WIDTH,
                crop_height=HEIGHT,
                width=WIDTH,
                height=HEIGHT,
                caption=f"bar number {v}",
            )
        )
    resolved = {"compression": [4, 8, 8], "causal": True, "patch": 1}
    shape = bucket(2, frames=FRAMES, height=HEIGHT, width=WIDTH, tokens=3 * 24 + 8)
    write_plan(
        folder / "plan",
        [shape],
        [Part("all", 1.0, {"content_hash": "0"}, "")],
        resolved,
        2,
        {},
        [pa.RecordBatch.from_pylist(rows, schema=WINDOWS)],
        [],
    )
    torch.manual_seed(0)
    save_weights(build_autoencoder("tiny").state_dict(), folder / "tiny.safetensors")
    return folder
