"""Three videos of walls of different colours, and a catalog of them, for tests that caption."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl

from catalogs.tables.catalog import Catalog
from datakit import config
from pipelines.runs.ingest import ingest
from pipelines.settings import Settings
from support.drawn_videos import encode

CLIPS = 24
EVERYWHERE = "num_frames > 0"
QUICK = ("ocr.enabled=false", "recipe=technical", "shots.min_s=0.5", "caption.side=64", "runner.commit_s=0.3")


def make(folder: Path) -> Path:
    """Three videos of eight shots each, each of a colour of its own."""
    levels = (40, 120, 200)
    colours = [(r, g, b) for r in levels for g in levels for b in levels][:CLIPS]
    random.Random(1).shuffle(colours)
    checks = np.add.outer(np.arange(96) // 12, np.arange(128) // 12) % 2 * 0.3 + 0.85
    for number in range(3):
        frames = [
            np.clip(checks[..., None] * colour, 0, 255).astype(np.uint8)
            for colour in colours[number::3]
            for _ in range(12)
        ]
        encode(folder / f"w{number}.mp4", frames, 10, pix_fmt="yuv444p", options={"crf": "4", "preset": "ultrafast"})
    return folder


def ingested(folder: Path, root: Path, ray_address: str) -> Path:
    """Their catalog."""
    ingest([str(folder)], str(root), settings(), ray_address)
    assert Catalog(root).clips().collect().height == CLIPS
    return root


def settings(*sets: str) -> Settings:
    return config.load(Settings, None, [*QUICK, *sets])


def captions(root: str) -> pl.DataFrame:
    return Catalog(root).captions().sort("clip_id", "style", "model").collect()


def start(root: str, ray_address: str, *sets: str) -> subprocess.Popen:
    """`datakit run caption` through an endpoint, in a process of its own."""
    words = [word for line in (*QUICK, "caption.backend=openai", *sets) for word in ("--set", line)]
    command = ["run", "caption", "--catalog", root, "--where", EVERYWHERE, "--ray", ray_address, "--json", *words]
    return subprocess.Popen(
        [sys.executable, "-m", "datakit", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
