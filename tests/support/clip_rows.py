"""Clips with captions, entered into a catalog by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from catalogs.tables.catalog import Catalog
from datakit.identity import clip_id, video_id

TICKS = 512
"""Of a frame, in MP4 at 25 frames/s: 1/12800 s."""


def enter(
    catalog: Catalog,
    file: Path,
    spans: list[tuple[int, int, dict[str, Any]]],
    kind: str = "video",
    caption: str | None = "clip",
) -> list[str]:
    """Kept clips of a file of 128 x 96 at 25 frames/s; their ids.

    Args:
        spans: first frame, frame after the last, and further columns of `clips`.
        caption: the number of the first frame follows; None: none.
    """
    with file.open("rb") as opened:
        video = video_id(opened, file.stat().st_size)
    common = {"video_id": video, "shard": video[0], "run_id": "r"}
    catalog.append(
        "videos",
        [
            {
                **common,
                "status": "ok",
                "clip_count": len(spans),
                "kind": kind,
                "duration_s": 2.4,
                "vfr": False,
                "time_base": "1/12800",
                "uris": [{"uri": str(file), "size": file.stat().st_size, "etag": "e"}],
            }
        ],
    )
    ids = []
    for start, end, columns in spans:
        clip = clip_id(video, 0, start * TICKS, end * TICKS)
        ids.append(clip)
        catalog.append(
            "clips",
            [
                {
                    **common,
                    "clip_id": clip,
                    "stream": 0,
                    "start_pts": start * TICKS,
                    "end_pts": end * TICKS,
                    "time_base": "1/12800",
                    "start_s": start / 25,
                    "end_s": end / 25,
                    "num_frames": end - start,
                    "fps": None if kind == "image" else 25.0,
                    "width": 128,
                    "height": 96,
                    "split": "train",
                    "motion_vmaf": 3.4,
                    "errors": [],
                    "stage_versions": [],
                    **columns,
                }
            ],
        )
        told = {"caption_id": f"of {clip}", "clip_id": clip, "shard": video[0]}
        if caption is not None:
            catalog.append(
                "captions", [{**told, "style": "dense", "model": "m", "text": f"{caption} {start}", "flags": []}]
            )
        catalog.append(
            "decisions",
            [{**told, "status": "kept", "reasons": [], "caption_id": told["caption_id"] if caption else None}],
        )
    return ids
