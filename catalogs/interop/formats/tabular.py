"""Whole rows of the view `clips` as one table: JSON lines, Parquet or Lance. What an import restores clips from.

JSON lines (jsonlines.org): one object a line; bytes are hex digits, NaN is null. Lance: lancedb.github.io/lance,
package pylance.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator

import polars as pl
import pyarrow.parquet as pq

from catalogs.interop.exchange.column_mapping import hex_columns
from catalogs.interop.exchange.export_job import Job
from catalogs.tables.arrow_types import polars_schema, view_schema
from datakit.dependencies import install_command
from datakit.errors import ConfigError, MissingDependency
from datakit.identity import clip_id

SOURCE = "source"
SOURCE_FACTS = ("start_pts", "num_frames", "duration_s", "fps", "width", "height")
"""Of the video, in the column `source`, with the size of its file: what the view does not have, and an import needs."""
SPAN = ("video_id", "stream", "start_pts", "end_pts", "time_base", "uri")
COUNTED = ("start_frame", "end_frame", "num_frames", "fps")
"""Without these no clip can be restored; `fps` may be null."""
LINES_A_FRAME = 20_000


def write_jsonl(job: Job) -> int:
    return _sink(job, lambda rows, path: hex_columns(rows).sink_ndjson(path))


def write_parquet(job: Job) -> int:
    return _sink(job, lambda rows, path: rows.sink_parquet(path))


def write_lance(job: Job) -> int:
    return _sink(job, _sink_lance)


def need_lance() -> None:
    """Raises:
    MissingDependency: the library is not there.
    """
    if importlib.util.find_spec("lance") is None:
        raise MissingDependency(f"lance needs the package pylance: `{install_command('lance')}` brings it")


def read(path: str, form: str, limit: int | None) -> pl.DataFrame:
    """An export of ours, in order of video and start, its columns typed as the view's.

    Raises:
        ConfigError: it cannot be read, lacks what a clip needs, or has a row that is none; which.
    """
    rows = {"jsonl": _read_jsonl, "parquet": _read_parquet, "lance": _read_lance}[form](path)
    rows = rows.head(limit) if limit else rows
    missing = [name for name in (*SPAN, *COUNTED) if name not in rows.columns]
    if missing:
        raise ConfigError(f"{path} has no column {', '.join(missing)}: clips cannot be restored from it")
    _check(rows, path)
    return rows.sort("video_id", "start_pts", maintain_order=True)


def _sink(job: Job, write) -> int:
    """Write the rows; streamed, where no files are to be made."""
    columns = list(dict.fromkeys(["clip_id", *(job.request.columns or job.selection.catalog.view_columns())]))
    whole = job.request.columns is None
    if job.media == "none":
        rows = _with_source(job, job.rows(columns)) if whole else job.rows(columns)
        with job.selection.catalog.reading():
            write(_absolute_paths(rows, job.selection.catalog.root), job.place.file)
        job.request.on_progress(job.total, job.total)
        return job.total
    rows = job.rows_with_media(columns)
    found = list(job.files(rows, job.stem(rows)))
    paths = [job.place.final(file.path) if file.made else file.path for _, file in found]
    rows = (
        rows[[number for number, _ in found]]
        .select(columns)
        .with_columns(
            pl.Series("file", paths, pl.String), pl.Series("file_frames", [file.frames for _, file in found], pl.Int64)
        )
    )
    if rows.height:
        lazy = _with_source(job, rows.lazy()) if whole else rows.lazy()
        write(_absolute_paths(lazy, job.selection.catalog.root), job.place.file)
    return rows.height


def _with_source(job: Job, rows: pl.LazyFrame) -> pl.LazyFrame:
    size = pl.col("uris").list.first().struct.field("size").alias("size")
    videos = job.selection.catalog.scan("videos", job.selection.versions.get("videos")).select(
        "video_id", pl.struct(size, *SOURCE_FACTS).alias(SOURCE)
    )
    return rows.join(videos, on="video_id", how="left", maintain_order="left")


def _absolute_paths(rows: pl.LazyFrame, root: str) -> pl.LazyFrame:
    """Clip files are known relative to the catalog, which a reader elsewhere does not know."""
    if "path" not in rows.collect_schema():
        return rows
    base = root if "://" in root else os.path.abspath(root)
    return rows.with_columns((pl.lit(f"{base}/") + pl.col("path")).alias("path"))


def _sink_lance(rows: pl.LazyFrame, path) -> None:
    import lance

    passing = f"{path}.parquet"
    rows.sink_parquet(passing)
    with pq.ParquetFile(passing) as file:
        lance.write_dataset(file.iter_batches(), path, schema=file.schema_arrow)
    os.unlink(passing)


def _read_parquet(path: str) -> pl.DataFrame:
    try:
        return _typed(pl.read_parquet(path), path)
    except (OSError, pl.exceptions.PolarsError) as e:
        raise ConfigError(f"cannot read {path}: {str(e).splitlines()[0]}") from e


def _read_lance(path: str) -> pl.DataFrame:
    need_lance()
    import lance

    try:
        return _typed(pl.DataFrame(lance.dataset(path).to_table()), path)
    except (OSError, ValueError) as e:
        raise ConfigError(f"cannot read {path}: {str(e).splitlines()[0]}") from e


def _read_jsonl(path: str) -> pl.DataFrame:
    frames, some = [], []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    some.append(_object(line, path, number))
                if len(some) >= LINES_A_FRAME:
                    frames.append(_frame(some, path))
                    some = []
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"cannot read {path}: {e}") from e
    frames.append(_frame(some, path))
    return pl.concat(frames, how="diagonal_relaxed")


def _object(line: str, path: str, number: int) -> dict:
    try:
        found = json.loads(line)
    except ValueError as e:
        raise ConfigError(f"{path}, line {number}: no JSON: {e}") from e
    if not isinstance(found, dict):
        raise ConfigError(f"{path}, line {number}: a {type(found).__name__}, not an object")
    return found


def _frame(rows: list[dict], path: str) -> pl.DataFrame:
    """Known columns only; bytes come as hex digits."""
    types = {**view_schema(), SOURCE: _source_type()}
    present = dict.fromkeys(name for row in rows for name in row if name in types)
    wire = {name: pl.String if types[name] == pl.Binary else types[name] for name in present}
    try:
        frame = pl.DataFrame([{name: row.get(name) for name in wire} for row in rows], schema=wire)
        return frame.with_columns(pl.col(name).str.decode("hex") for name in wire if types[name] == pl.Binary)
    except (TypeError, pl.exceptions.PolarsError) as e:
        raise ConfigError(f"cannot read {path}: {str(e).splitlines()[0]}") from e


def _typed(rows: pl.DataFrame, path: str) -> pl.DataFrame:
    types = {**view_schema(), SOURCE: _source_type()}
    try:
        return rows.select(pl.col(name).cast(types[name]) for name in rows.columns if name in types)
    except pl.exceptions.PolarsError as e:
        raise ConfigError(f"{path} has a column of another type than ours: {str(e).splitlines()[0]}") from e


def _source_type() -> pl.DataType:
    types = polars_schema("videos")
    return pl.Struct({"size": pl.Int64, **{name: types[name] for name in SOURCE_FACTS}})


def _check(rows: pl.DataFrame, path: str) -> None:
    """Spans that are spans, ids that are theirs."""
    ids = rows["clip_id"] if "clip_id" in rows.columns else [None] * rows.height
    for number, (given, span) in enumerate(zip(ids, rows.select(SPAN).iter_rows()), start=1):
        if None in span:
            raise ConfigError(f"{path}, row {number}: no {SPAN[span.index(None)]}")
        video, stream, start, end, _, _ = span
        if end <= start:
            raise ConfigError(f"{path}, row {number}: an empty span, from {start} to {end}")
        if given is not None and given != clip_id(video, stream, start, end):
            raise ConfigError(f"{path}, row {number}: clip_id {given} is not that of its span")


def looks_ours(columns: list[str]) -> bool:
    """Whether a table's columns are those of our exports of whole rows (those for Open-Sora say `text`, not
    `caption`)."""
    return set(SPAN) <= set(columns) and "text" not in columns


def first_columns(path: str) -> list[str]:
    """Names of the columns of a Parquet or JSON lines file.

    Raises:
        ConfigError: it cannot be read.
    """
    if path.lower().endswith(".jsonl"):
        try:
            with open(path, encoding="utf-8") as file:
                line = next((line for line in file if line.strip()), "{}")
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"cannot read {path}: {e}") from e
        return list(_object(line, path, 1))
    try:
        return list(pq.read_schema(path).names)
    except (OSError, ValueError) as e:
        raise ConfigError(f"cannot read {path}: {str(e).splitlines()[0]}") from e


def video_groups(rows: pl.DataFrame, clips: int) -> Iterator[pl.DataFrame]:
    """The rows in parts of about `clips`, each with whole videos. They are in order of video."""
    start = 0
    while start < rows.height:
        stop = min(start + clips, rows.height)
        last = rows["video_id"][stop - 1]
        while stop < rows.height and rows["video_id"][stop] == last:
            stop += 1
        yield rows[start:stop]
        start = stop
