"""Hugging Face's VideoFolder: a folder for each split, in it the videos and `metadata.parquet` with their `file_name`.

The format: huggingface.co/docs/datasets/video_dataset. The metadata are Parquet, as `datasets` takes the types of JSON
lines from the first rows, and refuses splits whose types differ (a column that is all null in one of them).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import polars as pl

from catalogs.interop.exchange.export_job import Job
from catalogs.interop.exchange.source_row import Row, address
from catalogs.interop.formats import open_sora
from datakit.errors import ConfigError
from datakit.video.uri import VIDEO_SUFFIXES, is_remote, local_path, open_bytes

SPLITS = {"train": "train", "val": "validation", "test": "test"}
"""Ours -> the names that `datasets` looks for."""
METADATA = ("metadata.parquet", "metadata.jsonl", "metadata.csv")


def write(job: Job) -> int:
    columns = list(job.request.columns or job.selection.catalog.view_columns())
    rows = job.rows_with_media([*columns, "clip_id", "caption", "split", "aspect_ratio", "resolution"])
    folders = [SPLITS.get(split, "train") for split in rows["split"].to_list()]
    ids = rows["clip_id"].to_list()
    rows = job.with_files(rows, lambda number: f"{job.place.folder}/{folders[number]}/{ids[number][:2]}/{ids[number]}")
    rows = rows.with_columns(folder=pl.col("split").replace_strict(SPLITS, default="train", return_dtype=pl.String))
    told = [
        name
        for name in dict.fromkeys(["clip_id", *columns])
        if name not in ("caption", "path", "lost_start", "lost_end")
    ]
    for (folder,), part in rows.group_by("folder", maintain_order=True):
        names = [
            _placed(job, folder, clip, path, made)
            for clip, path, made in part.select("clip_id", "file", "made").iter_rows()
        ]
        part = part.with_columns(pl.Series("file_name", names, pl.String), pl.col("caption").alias("text"))
        part.select("file_name", "text", *told).write_parquet(job.place.folder / folder / "metadata.parquet")
    return rows.height


def read(folder: str, media_root: str | None, ours: bool) -> Iterator[Row]:
    """Rows of all metadata files; without any, all videos.

    Raises:
        ConfigError: a metadata file that cannot be read; no videos.
    """
    found = sorted(path for path in Path(folder).rglob("metadata.*") if path.name in METADATA)
    for path in found:
        yield from _metadata(str(path), media_root, ours)
    if found:
        return
    videos = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    if not videos:
        raise ConfigError(f"{folder} holds no metadata file ({', '.join(METADATA)}) and no video")
    for path in videos:
        inner = path.relative_to(folder)
        label = {"folder": str(inner.parent)} if len(inner.parts) > 1 else {}
        yield Row(address(str(path), folder), str(path), columns=label)


def _metadata(path: str, media_root: str | None, ours: bool) -> Iterator[Row]:
    if path.endswith(".parquet"):
        yield from open_sora.read_parquet(path, media_root, ours)
    elif path.endswith(".csv"):
        yield from open_sora.read_csv(path, media_root, ours)
    else:
        yield from read_jsonl(path, media_root, ours)


def read_jsonl(path: str, media_root: str | None, ours: bool) -> Iterator[Row]:
    """Raises:
    ConfigError: a line that is no JSON object, or names no file.
    """
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    columns = json.loads(line)
                except ValueError as e:
                    raise ConfigError(f"{path}, line {number}: no JSON: {e}") from e
                if not isinstance(columns, dict):
                    raise ConfigError(f"{path}, line {number}: a {type(columns).__name__}, not an object")
                yield open_sora.as_row(columns, f"{path}, line {number}", path, media_root, ours)
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"cannot read {path}: {e}") from e


def _placed(job: Job, folder: str, clip_id: str, path: str, made: bool) -> str:
    """Bring a clip's file into the folder of its split; its name from there. `datasets` takes no paths that lead
    out."""
    base = job.place.folder / folder
    if made:
        return str(Path(path).relative_to(base))
    name = f"{clip_id[:2]}/{clip_id}{os.path.splitext(path)[1].lower()}"
    target = base / name
    target.parent.mkdir(parents=True, exist_ok=True)
    if job.media == "link" and not is_remote(path):
        target.symlink_to(local_path(path))
    else:
        with open_bytes(path) as source, open(target, "wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
    return name
