"""Catalogs of films that are planned."""

from __future__ import annotations

from pathlib import Path

from catalogs.query.selection import KEPT, Selection
from catalogs.tables.catalog import Catalog
from datakit.config import load
from support.catalog_rows import clip, video
from trainer.planning.build_plan import make_plan
from trainer.planning.plan import Plan
from trainer.planning.settings import PlanSettings

SMALL = ("resolutions=[256px]", "aspects=['16:9', '1:1', '9:16']", "frames=[1, 17, 33]", "tokens=9000")


def settings(*sets: str) -> PlanSettings:
    return load(PlanSettings, None, sets or SMALL)


def film(number: int, **columns) -> tuple[dict, dict]:
    """A video of one clip: 48 frames at 24 frames/s, 640 x 360, with a caption, unless told otherwise."""
    video_id = f"{number:032x}"
    own = {k: columns.pop(k) for k in ("kind", "vfr", "uris") if k in columns}
    rest = {
        "num_frames": 48,
        "fps": 24.0,
        "width": 640,
        "height": 360,
        "time_base": "1/24",
        "split": "train",
        **columns,
    }
    return video(video_id, **own), clip(video_id, **rest)


def catalog(
    root: Path, films: list[tuple[dict, dict]], captions: dict[int, str | None] = {}, statuses: dict[int, str] = {}
) -> Catalog:
    """Clips by number; all kept and captioned "clip N" unless told otherwise."""
    made = Catalog.create(root)
    made.append("videos", [v for v, _ in films])
    made.append("clips", [c for _, c in films])
    rows = [
        {
            "clip_id": c["clip_id"],
            "shard": c["shard"],
            "status": statuses.get(i, "kept"),
            "recipe": "r",
            "caption_id": c["clip_id"] if captions.get(i, "") is not None else None,
        }
        for i, (_, c) in enumerate(films)
    ]
    made.append("decisions", rows)
    made.append(
        "captions",
        [
            {
                "caption_id": c["clip_id"],
                "clip_id": c["clip_id"],
                "shard": c["shard"],
                "style": "dense",
                "model": "m",
                "text": captions.get(i, f"clip {i}"),
            }
            for i, (_, c) in enumerate(films)
            if captions.get(i, "") is not None
        ],
    )
    return made


def planned(root: Path, films: list[tuple[dict, dict]], *sets: str, where: str | None = KEPT, **options) -> Plan:
    return make_plan(
        Selection(catalog(root / "c", films, **options), where=where), settings(*SMALL, *sets), root / "plan"
    )
