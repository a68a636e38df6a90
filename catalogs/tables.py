"""A catalog on disk or in an object store: one Delta Lake table per sub-folder.

All writing goes through here: appends are blind, everything else is a merge or a delete through the handle
that was read, retried on conflict. See `facts` in the design: overwriting what another writer read loses
its values in silence; a merge fails loudly and is done again.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Callable, Sequence, TypeVar

import polars as pl
import pyarrow as pa
from deltalake import DeltaTable, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError

from catalogs import schema
from catalogs.schema import TABLES, VIEW_ADDED, VIEW_FROM_VIDEOS
from datakit.errors import CatalogError

ATTEMPTS = 40
"""Tries of a conflicting write; each re-reads the table, waits are random and grow to two seconds."""

T = TypeVar("T")


class Catalog:
    """The tables under one root.

    Args:
        root: folder, or `s3://`, `gs://`, `az://` URL (credentials as the AWS, Google, Azure tools take them).

    Raises:
        CatalogError: nothing there (use `Catalog.create`), or it was made by another schema version.
    """

    def __init__(self, root: str | Path):
        self.root = str(root).rstrip("/")
        try:
            description = json.loads(self.table("videos").metadata().description or "{}")
        except TableNotFoundError as e:
            raise CatalogError(f"no catalog at {self.root}: `datakit run ingest … --catalog {self.root}` makes one") from e
        if description.get("schema") != schema.VERSION:
            raise CatalogError(
                f"the catalog at {self.root} has schema version {description.get('schema')}, this datakit reads "
                f"{schema.VERSION}: `datakit catalog upgrade {self.root}`, or another datakit"
            )
        self.shard_digits: int = description["shard_digits"]

    @classmethod
    def create(cls, root: str | Path, shard_digits: int = 1) -> Catalog:
        """Open the catalog at `root`, making what is missing of it. Safe to call from several processes."""
        root = str(root).rstrip("/")
        for name in (*(t for t in TABLES if t != "videos"), "videos"):  # videos last: it says "complete"
            description = json.dumps({"schema": schema.VERSION, "shard_digits": shard_digits})
            _retry(lambda: create_table(root, name, description))
        return cls(root)

    @staticmethod
    def view_columns() -> list[str]:
        """Names of the columns of the view `clips`."""
        return [c.name for c in schema.CLIPS] + [*VIEW_FROM_VIDEOS] + [c.name for c in VIEW_ADDED]

    @property
    def is_local(self) -> bool:
        return "://" not in self.root

    def table(self, name: str, version: int | None = None) -> DeltaTable:
        """A fresh handle on the newest (or a given) version.

        Raises:
            CatalogError: the folder or the object store cannot be read.
        """
        try:
            return DeltaTable(f"{self.root}/{name}", version=version)
        except OSError as e:
            raise CatalogError(f"cannot read the catalog at {self.root}: {_first_line(e)}") from e

    def shard_of(self, video_id: str) -> str:
        return video_id[: self.shard_digits]

    def versions(self) -> dict[str, int]:
        """The version of every table: what "the catalog now" means."""
        return {name: self.table(name).version() for name in TABLES}

    def scan(self, name: str, version: int | None = None) -> pl.LazyFrame:
        """A table as it is in the files, rows that do not count included. See `clips` for those that do."""
        return pl.scan_delta(self.table(name, version))

    def finished_clips(self, versions: dict[str, int] | None = None) -> pl.LazyFrame:
        """Rows of `clips` that count: made by the run that finished their video, and it finished well."""
        pick = versions or {}
        ok = self.scan("videos", pick.get("videos")).filter(pl.col("status") == "ok").select("video_id", "run_id")
        return self.scan("clips", pick.get("clips")).join(ok, on=["video_id", "run_id"], how="semi")

    def embeddings(self, versions: dict[str, int] | None = None) -> pl.LazyFrame:
        """Rows of `embeddings` that count: of clips that count."""
        clips = self.finished_clips(versions).select("clip_id", "run_id")
        return self.scan("embeddings", (versions or {}).get("embeddings")).join(clips, on=["clip_id", "run_id"], how="semi")

    def captions(self, versions: dict[str, int] | None = None) -> pl.LazyFrame:
        """Rows of `captions` of clips that count. A caption belongs to the span, whichever run found it."""
        clips = self.finished_clips(versions).select("clip_id")
        return self.scan("captions", (versions or {}).get("captions")).join(clips, on="clip_id", how="semi")

    def clips(self, versions: dict[str, int] | None = None) -> pl.LazyFrame:
        """The view `clips`: every candidate clip with its video's facts and its status."""
        pick = versions or {}
        videos = self.scan("videos", pick.get("videos")).filter(pl.col("status") == "ok").select(
            "video_id", "run_id", pl.col("uris").list.first().struct.field("uri").alias("uri"), *VIEW_FROM_VIDEOS
        )
        decisions = self.scan("decisions", pick.get("decisions")).select("clip_id", "status", "reasons", "level", "caption_id")
        captions = self.scan("captions", pick.get("captions")).select(
            "caption_id", pl.col("text").alias("caption"), pl.col("style").alias("caption_style"),
            pl.col("model").alias("caption_model"), pl.col("flags").alias("caption_flags"),
        )
        view = self.scan("clips", pick.get("clips")).join(videos, on=["video_id", "run_id"], how="inner")
        view = view.join(decisions, on="clip_id", how="left").with_columns(pl.col("status").fill_null("pending"))
        view = view.join(captions, on="caption_id", how="left").drop("caption_id")
        have = set(view.collect_schema().names())
        later = [pl.lit(None, polars_type(c.type)).alias(c.name) for c in VIEW_ADDED if c.name not in have]
        return view.with_columns(later)

    def append(self, name: str, rows: Sequence[dict] | pl.DataFrame) -> None:
        """Add rows in one commit. Missing columns are null, unknown ones an error."""
        table = as_arrow(name, rows)
        if table.num_rows:
            _retry(lambda: write_deltalake(self.table(name), table, mode="append"))

    def update(self, name: str, make: Callable[[pl.LazyFrame], tuple[pl.DataFrame, dict]]) -> int:
        """Merge rows into a table, reading and writing the same version; done again on conflict.

        Args:
            make: given the table as read, returns the source rows and how to merge them: `on` (a SQL
                predicate over `t`, the table, and `s`, the source), `set` (column -> SQL expression),
                `where` (condition on matched rows), `insert` (whether unmatched rows are added).

        Returns:
            rows changed or added.
        """
        def attempt() -> int:
            handle = self.table(name)
            source, how = make(pl.scan_delta(handle))
            if source.is_empty():
                return 0
            merger = handle.merge(_as_arrow_like(name, source), how["on"], source_alias="s", target_alias="t")
            if how.get("set"):
                merger = merger.when_matched_update(updates=how["set"], predicate=how.get("where"))
            if how.get("insert"):
                merger = merger.when_not_matched_insert_all()
            done = merger.execute()
            return done["num_target_rows_updated"] + done["num_target_rows_inserted"]

        return _retry(attempt)

    def replace(self, name: str, rows: pl.DataFrame) -> None:
        """Put new rows in place of all of a table's."""
        _retry(lambda: write_deltalake(self.table(name), as_arrow(name, rows), mode="overwrite"))

    def delete(self, name: str, predicate: str) -> int:
        """Remove rows by a SQL predicate; returns how many."""
        return _retry(lambda: self.table(name).delete(predicate)["num_deleted_rows"])

    def compact(self, name: str) -> None:
        """Join small files. Loses against a concurrent writer without harm: the next run tries again."""
        try:
            self.table(name).optimize.compact()
        except CommitFailedError:
            return


def create_table(root: str, name: str, description: str) -> None:
    """Make an empty table, unless it is there."""
    DeltaTable.create(
        f"{root}/{name}", schema=schema.arrow_schema(name), mode="ignore", name=name,
        partition_by=schema.PARTITIONED.get(name), description=description,
    )


def as_arrow(name: str, rows: Sequence[dict] | pl.DataFrame) -> pa.Table:
    """Rows as an Arrow table of exactly the schema of table `name`.

    Raises:
        CatalogError: a column that the table does not have.
    """
    types = polars_schema(name)
    columns = rows.columns if isinstance(rows, pl.DataFrame) else {key for row in rows for key in row}
    unknown = sorted(set(columns) - set(types))
    if unknown:
        raise CatalogError(f"table {name} has no column {', '.join(unknown)}")
    if not isinstance(rows, pl.DataFrame):
        rows = pl.DataFrame(rows, schema=types)
    missing = [pl.lit(None, types[n]).alias(n) for n in types if n not in rows.columns]
    return rows.with_columns(missing).select(list(types)).to_arrow().cast(schema.arrow_schema(name))


def polars_type(arrow_type: pa.DataType) -> pl.DataType:
    """The polars type of a column (by name, as making an Arrow array to convert would import pandas)."""
    if pa.types.is_list(arrow_type):
        return pl.List(polars_type(arrow_type.value_type))
    if pa.types.is_struct(arrow_type):
        return pl.Struct({field.name: polars_type(field.type) for field in arrow_type})
    return {
        schema.S: pl.String, schema.I4: pl.Int32, schema.I8: pl.Int64, schema.F4: pl.Float32, schema.F8: pl.Float64,
        schema.B: pl.Boolean, schema.TIME: pl.Datetime("us", "UTC"), pa.binary(): pl.Binary,
    }[arrow_type]


def polars_schema(table: str) -> dict[str, pl.DataType]:
    """Column types of a table."""
    return {field.name: polars_type(field.type) for field in schema.arrow_schema(table)}


def sql_list(values: Sequence[str]) -> str:
    """`('a', 'b')` for a SQL IN; values are identifiers or already checked."""
    return "(" + ", ".join("'" + v.replace("'", "''") + "'" for v in values) + ")"


def _as_arrow_like(name: str, source: pl.DataFrame) -> pa.Table:
    """A merge source: its columns typed as the table's where they are the table's."""
    wanted = schema.arrow_schema(name)
    table = source.to_arrow()
    fields = [wanted.field(f.name) if f.name in wanted.names else pa.field(f.name, _plain(f.type)) for f in table.schema]
    return table.cast(pa.schema(fields))


def _plain(arrow_type: pa.DataType) -> pa.DataType:
    return pa.string() if pa.types.is_large_string(arrow_type) or pa.types.is_string_view(arrow_type) else arrow_type


def _first_line(error: Exception) -> str:
    """Of an object store's error, whose further lines are a chain of causes."""
    return str(error).strip().split("\n")[0]


def _retry(action: Callable[[], T]) -> T:
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except CommitFailedError as e:
            last = e
        except DeltaError as e:
            if "already exists" not in str(e) and "conflict" not in str(e).lower():
                raise CatalogError(f"the catalog cannot be written: {e}") from e
            last = e
        except OSError as e:
            raise CatalogError(f"the catalog cannot be written: {_first_line(e)}") from e
        time.sleep(random.uniform(0.0, min(2.0, 0.02 * 1.5**attempt)))
    raise CatalogError(f"gave up after {ATTEMPTS} conflicting writes: {last}") from last
