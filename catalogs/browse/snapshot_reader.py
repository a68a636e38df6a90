"""Reading one snapshot of a catalog into memory: a row per clip, a row per video, and the marks."""

from __future__ import annotations

import numpy as np
import polars as pl

from catalogs.records.marks import MARKS
from catalogs.tables.catalog import Catalog
from catalogs.tables.schema import SCORES

STATUSES = ("kept", "rejected", "pending", "quarantined")
QUARANTINED = STATUSES.index("quarantined")
CATEGORIES = (*(c.name for c in SCORES if c.is_text), "split", "shard", "time_base", "duplicate_kind")
NUMBERS = (
    "stream",
    "start_pts",
    "end_pts",
    "start_s",
    "end_s",
    "num_frames",
    "fps",
    "width",
    "height",
    "aspect_ratio",
    "resolution",
    *(c.name for c in SCORES if c.is_number and c.shown),
    "duplicate_similarity",
)
FACTS = {
    "kind": True,
    "container": True,
    "codec": True,
    "pix_fmt": True,
    "license": True,
    "bit_rate": False,
    "bits_per_pixel": False,
    "has_audio": False,
    "vfr": False,
}
"""Columns of a video that its clips have too, kept once a video; whether they are categories."""
SPREAD = (*FACTS, "uri", "video_id")
"""All that is kept once a video."""


def read_videos(catalog: Catalog, versions: dict[str, int]) -> pl.DataFrame:
    address = pl.col("uris").list.first().struct.field("uri").alias("uri")
    facts = [pl.col(name).cast(pl.Categorical) if few else pl.col(name) for name, few in FACTS.items()]
    rows = catalog.scan("videos", versions["videos"]).filter(pl.col("status") == "ok")
    return rows.select("video_id", address, "shard", "duration_s", *facts).collect()


def read_clips(catalog: Catalog, versions: dict[str, int], videos: pl.DataFrame) -> pl.DataFrame:
    """The scalar columns, as the recipe alone has it (no table has marks at its first version)."""
    wanted = [
        "clip_id",
        "video_id",
        "path",
        "status",
        "level",
        *NUMBERS,
        *CATEGORIES,
        *(["loss"] if versions["losses"] else []),
    ]
    numbers = videos.lazy().select("video_id").with_row_index("row_of_video")
    rows = catalog.clips({**versions, "marks": 0}, wanted).with_columns(
        pl.col(CATEGORIES).cast(pl.Categorical),
        pl.col("status").cast(pl.Enum(STATUSES)),
        pl.col("path").is_not_null().alias("has_path"),
    )
    return _in_one_piece(rows.join(numbers, on="video_id", how="left").drop("video_id", "path").collect())


def _in_one_piece(frame: pl.DataFrame) -> pl.DataFrame:
    """Each column in one piece of memory instead of a hundred, so that rows are picked in no time; one at a time, to
    need little."""
    pieces = []
    for name in frame.columns:
        pieces.append(frame[name].rechunk())
        frame = frame.drop(name)
    return pl.DataFrame(pieces)


def read_marks(catalog: Catalog, version: int, clip_ids: pl.Series) -> tuple[np.ndarray, pl.Series]:
    """Codes of marks (0: none) and comments, a value per clip."""
    codes, comments = (
        np.zeros(len(clip_ids), np.uint8),
        pl.Series("comment", [None], dtype=pl.String).new_from_index(0, len(clip_ids)),
    )
    if version == 0:
        return codes, comments
    newest = catalog.marks({"marks": version}).select("clip_id", "mark", "comment").collect()
    ids = (
        pl.DataFrame({"clip_id": clip_ids})
        .with_row_index()
        .filter(pl.col("clip_id").is_in(newest["clip_id"].implode()))
    )
    found = ids.join(newest, on="clip_id")
    known = {name: 1 + i for i, name in enumerate(MARKS)}
    codes[found["index"].to_numpy()] = (
        found["mark"].replace_strict(known, default=0, return_dtype=pl.UInt8).fill_null(0).to_numpy()
    )
    return codes, comments.scatter(found["index"], found["comment"])
