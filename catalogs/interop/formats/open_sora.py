"""Open-Sora's data sets: a CSV or Parquet file with a row for each video or image file.

See `catalogs.interop.exchange.column_mapping` for the definition of the columns and its source. The loader
(opensora/datasets/utils.py, `read_file`) is `pandas.read_csv` or `pandas.read_parquet`.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from typing import Any

import polars as pl
import pyarrow.parquet as pq

from catalogs.interop.exchange.column_mapping import OPEN_SORA, SAME_SCORES, flat_columns, is_empty, scalar_columns
from catalogs.interop.exchange.export_job import Job
from catalogs.interop.exchange.source_row import Row, address
from datakit.errors import ConfigError

FIELD_BYTES = 1 << 27
"""Longest cell of a CSV file."""
PATHS = ("path", "video", "video_path", "file_name", "uri")
TEXTS = ("text", "caption")


def default_columns() -> list[str]:
    """Scores, and where a clip comes from; not the status and the facts of the source's coding."""
    without = {
        "path",
        "lost_start",
        "lost_end",
        "shard",
        "run_id",
        "status",
        "level",
        "mark",
        "comment",
        "loss",
        "container",
        "codec",
        "profile",
        "pix_fmt",
        "bit_depth",
        "color_space",
        "color_range",
        "color_transfer",
        "color_primaries",
        "rotation",
        "vfr",
        "bit_rate",
        "bits_per_pixel",
        "has_audio",
        "duplicate_group",
        "duplicate_of",
        "duplicate_kind",
        "duplicate_similarity",
    }
    return [name for name in scalar_columns() if name not in without]


def write_csv(job: Job) -> int:
    """Nulls are empty cells, text is quoted as pandas reads it (RFC 4180)."""
    rows = _table(job)
    if rows.height:
        flat_columns(rows).write_csv(job.place.file)
    return rows.height


def write_parquet(job: Job) -> int:
    rows = _table(job)
    rows.write_parquet(job.place.file)
    return rows.height


def read_csv(path: str, media_root: str | None, ours: bool) -> Iterator[Row]:
    """Raises:
    ConfigError: a line that cannot be read, or has more or fewer fields than the header; no column with paths.
    """
    before = csv.field_size_limit(FIELD_BYTES)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield from _csv_rows(file, path, media_root, ours)
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}") from e
    finally:
        csv.field_size_limit(before)


def read_parquet(path: str, media_root: str | None, ours: bool) -> Iterator[Row]:
    """Raises:
    ConfigError: it is no Parquet file, or has no column with paths.
    """
    try:
        number = 0
        for batch in pq.ParquetFile(path).iter_batches(2000):
            for columns in batch.to_pylist():
                number += 1
                yield as_row(columns, f"{path}, row {number}", path, media_root, ours)
    except (OSError, ValueError) as e:
        raise ConfigError(f"cannot read {path}: {str(e).splitlines()[0]}") from e


def as_row(columns: dict[str, Any], where: str, path: str, media_root: str | None, ours: bool) -> Row:
    """A row of a table that names a file in one of `PATHS`, and maybe says in `TEXTS` what it shows.

    Args:
        path: of the table; relative paths start from its folder, or from `media_root`.
    """
    named = next((name for name in PATHS if name in columns), None)
    if named is None:
        raise ConfigError(
            f"{where}: no column with paths: there are {', '.join(columns) or 'none'}; expected one of "
            f"{', '.join(PATHS)}"
        )
    given = columns[named]["path"] if isinstance(columns[named], dict) else columns[named]
    if is_empty(given):
        raise ConfigError(f"{where}: the column {named} is empty")
    text = next((name for name in TEXTS if name in columns), None)
    rest = {name: value for name, value in columns.items() if name not in (named, text)}
    base = media_root or os.path.dirname(os.path.abspath(path))
    return Row(
        address(str(given), base),
        where,
        None if text is None or is_empty(columns[text]) else str(columns[text]),
        rest,
        ours,
    )


def _table(job: Job) -> pl.DataFrame:
    """Open-Sora's columns first, in its order; then the chosen others."""
    chosen = [
        *(job.request.columns or default_columns()),
        "caption",
        *(c for c in OPEN_SORA if c not in ("path", "text")),
    ]
    rows = job.rows_with_media(chosen)
    rows = job.with_files(rows, job.stem(rows))
    paths = [job.place.final(path) if made else path for path, made in rows.select("file", "made").iter_rows()]
    names = {ours: theirs for theirs, ours in SAME_SCORES.items()}
    others = [name for name in dict.fromkeys(chosen) if name not in (*OPEN_SORA, "caption", "path", *names)]
    scores = [pl.col(ours).alias(theirs) for ours, theirs in names.items() if ours in chosen]
    rows = rows.with_columns(pl.Series("path", paths, pl.String), pl.col("caption").alias("text"))
    return rows.select(*OPEN_SORA, *scores, *others)


def _csv_rows(file, path: str, media_root: str | None, ours: bool) -> Iterator[Row]:
    reader = csv.reader(file, delimiter="\t" if path.lower().endswith(".tsv") else ",", strict=True)
    header: list[str] = []
    line = 1
    try:
        header = [name.strip() for name in next(reader, [])]
        if not header:
            raise ConfigError(f"{path} is empty")
        if len(set(header)) < len(header):
            raise ConfigError(f"{path}, line 1: a column name occurs twice")
        line = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                raise ConfigError(f"{path}, line {line}: {len(cells)} fields, the header has {len(header)}")
            if cells:
                yield as_row(
                    dict(zip(header, (cell or None for cell in cells))), f"{path}, line {line}", path, media_root, ours
                )
            line = reader.line_num + 1
    except (csv.Error, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}, line {line}: {e}") from e
