"""Result catalogs as `datakit sample` leaves them, of videos that tests draw."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from catalogs.interop import import_dataset
from catalogs.tables.catalog import Catalog
from support.drawn_videos import encode, texture

FPS = 12
HEIGHT, WIDTH, FRAMES = 64, 96, 9


def drifting(seed: int, frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH) -> list[np.ndarray]:
    """A texture that drifts to the left."""
    picture = texture(height, width, seed)
    return [np.roll(picture, -2 * i, 1) for i in range(frames)]


def write(path: Path, frames: Sequence[np.ndarray], fps: float = FPS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return encode(path, frames, fps, pix_fmt="yuv420p", options={"crf": "16", "preset": "ultrafast"})


def import_all(files: Sequence[Path], root: Path) -> Catalog:
    """A catalog of whole files."""
    root.mkdir(parents=True, exist_ok=True)
    listing = root.with_name(f"{root.name}-files.csv")
    listing.write_text("path\n" + "".join(f"{file}\n" for file in files))
    import_dataset(str(listing), str(root), workers=1)
    return Catalog(root)


def result_catalog(
    root: Path,
    videos: dict[str, Any],
    checkpoint: str | None = "run/step-100",
    suffix: str = ".mp4",
    **columns,
) -> Catalog:
    """Finished samples, number 0 of seed 42.

    Args:
        videos: prompt -> frames; with `checkpoint` None, checkpoint -> prompt -> frames.
        columns: of the table `samples`, for all rows.
    """
    made = {checkpoint: videos} if checkpoint else videos
    wanted = [(name, prompt, frames) for name, prompts in made.items() for prompt, frames in prompts.items()]
    files = [write(root / "files" / f"{i:02d}{suffix}", frames) for i, (_, _, frames) in enumerate(wanted)]
    catalog = import_all(files, root)
    ids = {
        uri: (clip, video)
        for uri, clip, video in catalog.clips(columns=["uri", "clip_id", "video_id"]).collect().iter_rows()
    }
    catalog.append(
        "samples",
        [
            sample(
                prompt,
                name,
                path=f"files/{file.name}",
                clip_id=ids[str(file)][0],
                video_id=ids[str(file)][1],
                **columns,
            )
            for file, (name, prompt, _) in zip(files, wanted)
        ],
    )
    return catalog


def sample(prompt: str, checkpoint: str = "run/step-100", **columns) -> dict:
    """A row of the table `samples`."""
    row = {
        "prompt": prompt,
        "text": prompt,
        "seed": 42,
        "number": 0,
        "status": "done",
        "checkpoint": checkpoint,
        "checkpoint_hash": checkpoint.encode().hex()[:32],
        "mode": "t2v",
        "references": [],
        "negative": "",
        "created_at": datetime.now(UTC),
        **columns,
    }
    return {"sample_id": f"{checkpoint}/{prompt}/{row['seed']}/{row['number']}".encode().hex(), **row}


def with_split(catalog: Catalog, split: str) -> None:
    """Put all clips into one split."""
    clips = catalog.scan("clips").with_columns(pl.lit(split).alias("split")).collect()
    catalog.replace("clips", clips)
