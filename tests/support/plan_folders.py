"""Plan folders made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from trainer.planning.plan import ROWS, WINDOWS, Bucket, Part, Plan, write_plan


def bucket(
    batch: int = 2, frames: int = 5, height: int = 32, width: int = 48, tokens: int = 100, weight: float = 1.0
) -> Bucket:
    return Bucket(f"{height}x{width}x{frames}", height, width, frames, batch, tokens, weight)


def window(of: int = 0, video: str = "a", **columns: Any) -> dict[str, Any]:
    """A row of `windows.arrow`, for what reads no file."""
    return {
        "clip_id": "c" * 32,
        "video_id": video,
        "part": 0,
        "uri": "/nowhere.mp4",
        "path": None,
        "stream": 0,
        "time_base": "1/25",
        "start_pts": 0,
        "end_pts": 100,
        "crop_x": 0,
        "crop_y": 0,
        "crop_width": 64,
        "crop_height": 48,
        "width": 64,
        "height": 48,
        "kind": "video",
        "bucket": of,
        "first": 0,
        "frames": 5,
        "stride": 1,
        "fps": 25.0,
        "caption": "a caption",
        "motion_vmaf": 1.5,
        "split": "train",
        "geometry": "0" * 16,
        **columns,
    }


def plan_of(
    folder: Path,
    rows: Sequence[dict[str, Any]],
    buckets: Sequence[Bucket],
    weights: Sequence[float] = (1.0,),
    global_batches: int = 1,
) -> Plan:
    rows = sorted(rows, key=lambda r: (r["bucket"], r["video_id"], r["start_pts"], r["first"], r["part"], r["clip_id"]))
    batches = [pa.RecordBatch.from_pylist(rows[i : i + ROWS], schema=WINDOWS) for i in range(0, len(rows), ROWS)]
    parts = [Part(f"part {i}", weight, {}, "") for i, weight in enumerate(weights)]
    return write_plan(folder, buckets, parts, {}, global_batches, {}, batches, [], overwrite=True)
