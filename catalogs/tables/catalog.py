"""A catalog on disk or in an object store: one Delta Lake table per sub-folder.

All writing goes through here: appends are blind, everything else is a merge or a delete through the handle
that was read, retried on conflict. Overwriting what another writer read loses its values in silence; a merge
fails loudly and is done again. See docs/design.md, "Writing to the catalog".
"""

from __future__ import annotations

import copy
import json
import os
import random
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import unquote

import polars as pl
import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Field, Schema, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError

from catalogs.tables import schema
from catalogs.tables.arrow_types import as_arrow, polars_schema, view_schema
from catalogs.tables.schema import RECORDS, TABLES
from catalogs.tables.upsert import Only, Revise, Upsert
from catalogs.tables.view import view
from datakit.errors import CatalogError

ATTEMPTS = 40
"""Tries of a conflicting write; each re-reads the table, waits are random and grow to two seconds."""

KEEP_HISTORY = {"delta.logRetentionDuration": "interval 36500 days", "delta.enableExpiredLogCleanup": "false"}
"""Properties of every table: Delta's default forgets versions after a month, and selections with them."""
UNREADABLE = "%=[]"
"""In a path: an escape, a partition, a host by its address."""
RESTORING = "(restoring)"
"""Tag under which the snapshot lies that readers see while another one is being restored."""

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
        self.signature: dict[str, str] = {}
        self._pinned: dict[str, int] | None = None
        try:
            description = json.loads(self.table("videos").metadata().description or "{}")
        except TableNotFoundError as e:
            raise CatalogError(
                f"no catalog at {self.root}: `datakit run ingest … --catalog {self.root}` makes one"
            ) from e
        if description.get("schema") != schema.VERSION:
            raise CatalogError(
                f"the catalog at {self.root} has schema version {description.get('schema')}, this datakit reads "
                f"{schema.VERSION}: `datakit catalog upgrade {self.root}`, or another datakit"
            )
        self.shard_digits: int = description["shard_digits"]

    @classmethod
    def create(cls, root: str | Path, shard_digits: int = 1) -> Catalog:
        """Open the catalog at `root`, making what is missing of it. Safe to call from several processes.

        Raises:
            CatalogError: a path that Delta's or polars' readers would take for something else, or that cannot be
                written.
        """
        root = str(root).rstrip("/")
        odd = set(root if "://" in root else os.path.abspath(root)) & set(UNREADABLE)
        if odd:
            raise CatalogError(f"a catalog's path can have no {' '.join(sorted(odd))}: {root}")
        for name in (*(t for t in TABLES if t != "videos"), "videos"):  # videos last: it says "complete"
            description = json.dumps({"schema": schema.VERSION, "shard_digits": shard_digits})
            _retry(partial(create_table, root, name, description))
        return cls(root)

    def at(self, versions: dict[str, int]) -> Catalog:
        """The catalog as it was at these versions, to read from only."""
        past = copy.copy(self)
        past._pinned = {name: version for name, version in versions.items() if name not in RECORDS}
        return past

    @staticmethod
    def view_columns() -> list[str]:
        """Names of the columns of the view `clips`."""
        return list(view_schema())

    @property
    def is_snapshot(self) -> bool:
        """Whether this is the catalog as it was, to read from only (see `at`)."""
        return self._pinned is not None

    @property
    def is_local(self) -> bool:
        return "://" not in self.root

    def table(self, name: str, version: int | None = None) -> DeltaTable:
        """A fresh handle on the newest (or a given, or the pinned) version.

        Raises:
            CatalogError: the folder or the object store cannot be read; the table's log is damaged, or has no such
                version.
        """
        from catalogs.tables.integrity import check_entries, unreadable_log

        if version is None and self._pinned:
            version = self._pinned.get(name)
        try:
            handle = _Table(f"{self.root}/{name}", version=version)
        except TableNotFoundError as e:
            if name == "videos":  # the last that is made: there is no catalog
                raise
            made = "the next `datakit run ingest` makes an empty one"
            raise CatalogError(f"the catalog at {self.root} has no table {name} any more; {made}") from e
        except OSError as e:
            raise CatalogError(f"cannot read the catalog at {self.root}: {_first_line(e)}") from e
        except DeltaError as e:
            raise unreadable_log(self.root, name, version, e) from e
        if self.is_local:
            check_entries(self.root, name, handle.version())
        return handle

    def shard_of(self, video_id: str) -> str:
        return video_id[: self.shard_digits]

    def versions(self, without: Iterable[str] = ()) -> dict[str, int]:
        """The version of every table that holds data: what "the catalog now" means.

        `videos` is read first: its rows say which clips count, and those are in any later version of `clips`.

        Args:
            without: tables whose version is known, and that may be damaged.
        """
        if self._pinned is not None:
            return self._pinned
        found: dict[str, int] = {}
        for _ in range(ATTEMPTS):
            tags = self.table("tags")
            tagged = self.scan("tags", tags.version()).filter(pl.col("name") == RESTORING).select("versions").collect()
            if tagged.height:
                return json.loads(tagged.item(0, 0))
            found = {name: self.table(name).version() for name in TABLES if name not in RECORDS and name not in without}
            if self.table("tags").version() == tags.version():  # no restore began or ended meanwhile
                break
        return found

    def scan(self, name: str, version: int | None = None) -> pl.LazyFrame:
        """A table as it is in the files, rows that do not count included. See `clips` for those that do.

        A version that is older than a column has nulls in it.
        """
        rows = pl.scan_delta(self._readable(self.table(name, version), name))
        have = set(rows.collect_schema().names())
        types = polars_schema(name)
        return rows.with_columns(pl.lit(None, types[c]).alias(c) for c in types if c not in have).select(
            *types, *(have - set(types))
        )

    def finished_clips(self, versions: dict[str, int] | None = None) -> pl.LazyFrame:
        """Rows of `clips` that count: made by the run that finished their video, and it finished well."""
        pick = versions or {}
        ok = self.scan("videos", pick.get("videos")).filter(pl.col("status") == "ok").select("video_id", "run_id")
        return self.scan("clips", pick.get("clips")).join(ok, on=["video_id", "run_id"], how="semi")

    def embeddings(self, versions: dict[str, int] | None = None) -> pl.LazyFrame:
        """Rows of `embeddings` that count: of clips that count."""
        clips = self.finished_clips(versions).select("clip_id", "run_id")
        return self.scan("embeddings", (versions or {}).get("embeddings")).join(
            clips, on=["clip_id", "run_id"], how="semi"
        )

    def captions(self, versions: dict[str, int] | None = None) -> pl.LazyFrame:
        """Rows of `captions` of clips that count. A caption belongs to the span, whichever run found it."""
        clips = self.finished_clips(versions).select("clip_id")
        return self.scan("captions", (versions or {}).get("captions")).join(clips, on="clip_id", how="semi")

    def marks(self, versions: dict[str, int] | None = None) -> pl.LazyFrame:
        """The mark that counts of every clip that was marked: the newest."""
        rows = self.scan("marks", (versions or {}).get("marks")).sort("created_at", "mark_id")
        return rows.group_by("clip_id").agg(pl.col("mark", "comment", "author", "created_at").last())

    def clips(self, versions: dict[str, int] | None = None, columns: Iterable[str] | None = None) -> pl.LazyFrame:
        """The view `clips`: every candidate clip with its video's facts, its status, its caption and marks.

        Args:
            versions: of the tables; None: one consistent set, now.
            columns: of the view, and no others are read; None: all. What is left out costs nothing.

        Raises:
            CatalogError: a column that the view does not have.
        """
        return view(self, versions or self.versions(), list(columns) if columns is not None else self.view_columns())

    def count(self) -> int:
        """How many clips count, by the commit markers of their videos."""
        ok = self.scan("videos").filter(pl.col("status") == "ok")
        return ok.select(pl.col("clip_count").sum()).collect().item() or 0

    def append(self, name: str, rows: Sequence[dict[str, Any]] | pl.DataFrame) -> None:
        """Add rows in one commit. Missing columns are null, unknown ones an error."""
        table = as_arrow(name, rows)
        if table.num_rows:
            _retry(lambda: self._write(name, table, "append"))

    def upsert(
        self,
        name: str,
        rows: Sequence[dict[str, Any]] | pl.DataFrame,
        *,
        keys: Sequence[str] = (),
        only: Only | None = None,
        when: Mapping[str, Sequence[str]] | None = None,
        change: Collection[str] | None = None,
        fill: Collection[str] = (),
        revise: Revise | None = None,
        at_once: bool = False,
    ) -> int:
        """Change rows of a table and add new ones, in one commit for each partition; a commit that conflicts with
        another writer's is done again on the newest version.

        Args:
            rows: all of the same columns of the table, keys and partition among them; the others stay as they are.
            keys: columns that tell rows apart; none: those that the schema declares.
            only: `update` adds no rows, `insert` changes none.
            when: rows of the table are changed only where these columns hold one of these values.
            change: columns that are changed in rows that the table has; None: all that `rows` have.
            fill: of those, the ones that are changed only where the table holds null.
            revise: makes the rows to be merged from these and from what the table holds (see `Revise`); it is asked
                again on conflict, so what it makes fits the version that is merged into.
            at_once: one commit for all partitions.

        Returns:
            rows changed or added.

        Raises:
            CatalogError: the catalog cannot be written; the table has no such column; the rows have different ones.
        """
        how = Upsert(name, keys, only, when or {}, change, fill, revise)

        def merge(part: pl.DataFrame) -> int:
            return how.execute(self._readable(self._complete(name), name), part, self._signed())

        return sum(_retry(partial(merge, part)) for part in how.commits(rows, at_once))

    def replace(self, name: str, rows: pl.DataFrame) -> None:
        """Put new rows in place of all of a table's."""
        table = as_arrow(name, rows)
        _retry(lambda: self._write(name, table, "overwrite"))

    def delete(self, name: str, predicate: str) -> int:
        """Remove rows by a SQL predicate; returns how many."""
        return _retry(
            lambda: self._readable(self._writable(name), name).delete(predicate, commit_properties=self._signed())[
                "num_deleted_rows"
            ]
        )

    def compact(self, name: str) -> None:
        """Join small files. Loses against a concurrent writer without harm: the next run tries again."""
        try:
            self._writable(name).optimize.compact(commit_properties=self._signed())
        except CommitFailedError:
            return

    def write(self, name: str, action: Callable[[DeltaTable], T]) -> T:
        """What an action on a fresh handle gives; it is done again on conflict, on another one."""
        return _retry(lambda: action(self._writable(name)))

    def restore_table(self, name: str, version: int) -> None:
        """Put the rows of an older version in place of those of the newest, as a new version."""
        _retry(lambda: self._writable(name).restore(version, commit_properties=self._signed()))

    def vacuum_table(
        self, name: str, keep_days: float, keep_versions: Sequence[int], dry_run: bool
    ) -> tuple[list[str], int]:
        """Delete files that neither the newest nor these versions need, and no version of the last days needed.

        Args:
            keep_days: from one day on, files that no version knows and that are older go too: what a writer that was
                killed left behind. Younger ones may belong to a writer at work.

        Returns:
            their paths, and their bytes (0 in object stores).
        """
        handle = self._writable(name)
        how: dict[str, Any] = {
            "retention_hours": round(keep_days * 24),
            "enforce_retention_duration": False,
            "keep_versions": list(keep_versions),
            "full": keep_days >= 1,
        }
        gone = handle.vacuum(dry_run=True, **how)
        if self.is_local:  # what an earlier vacuum deleted is listed again
            gone = [path for path in gone if os.path.exists(f"{self.root}/{name}/{path}")]
        size = sum(os.path.getsize(f"{self.root}/{name}/{path}") for path in gone) if self.is_local else 0
        if gone and not dry_run:
            handle.vacuum(dry_run=False, commit_properties=self._signed(), **how)
        return gone, size

    def reading(self) -> AbstractContextManager[None]:
        """Around what collects rows: files that are missing or torn become a CatalogError that names them."""
        from catalogs.tables.integrity import explained

        return explained(self)

    def _readable(self, table: DeltaTable, name: str) -> DeltaTable:
        """The table, if its files are there as they were written. In object stores that takes too long: see
        `reading`."""
        from catalogs.tables.integrity import check_files

        if self.is_local:
            check_files(self.root, name, table)
        return table

    def _writable(self, name: str) -> DeltaTable:
        if self._pinned is not None:
            raise CatalogError("this is a snapshot of the catalog, to read from: write to the catalog as it is now")
        return self.table(name)

    def _write(self, name: str, rows: pa.Table, mode: Literal["append", "overwrite"]) -> None:
        handle = self._complete(name)
        unknown = {field.name for field in handle.schema().fields} - set(rows.column_names)  # of a score that is gone
        how = "merge" if unknown else None
        write_deltalake(handle, rows, mode=mode, schema_mode=how, commit_properties=self._signed())

    def _complete(self, name: str) -> DeltaTable:
        """The table to write to, with the columns that have been declared since it was made: a new score's."""
        handle = self._writable(name)
        missing = missing_fields(handle, name)
        if not missing:
            return handle
        handle.alter.add_columns(missing, commit_properties=self._signed())
        return self._writable(name)

    def _signed(self) -> CommitProperties:
        """What `datakit catalog history` shows of who wrote."""
        return CommitProperties(custom_metadata=self.signature)


class _Table(DeltaTable):
    """Delta escapes what is special in names of folders (a space is enough); polars takes that for the names
    themselves."""

    @property
    def table_uri(self) -> str:
        address = super().table_uri
        return unquote(address) if address.startswith("file://") else address

    def file_uris(self, *arguments: Any, **options: Any) -> list[str]:
        paths = super().file_uris(*arguments, **options)
        return [unquote(path) for path in paths] if super().table_uri.startswith("file://") else paths


def create_table(root: str, name: str, description: str) -> None:
    """Make an empty table, unless it is there."""
    DeltaTable.create(
        f"{root}/{name}",
        schema=schema.arrow_schema(name),
        mode="ignore",
        name=name,
        partition_by=schema.PARTITIONED.get(name),
        description=description,
        configuration=KEEP_HISTORY,
    )


def missing_fields(table: DeltaTable, name: str) -> list[Field]:
    """Columns of the schema that a table does not have (yet)."""
    have = {field.name for field in table.schema().fields}
    return [field for field in Schema.from_arrow(schema.arrow_schema(name)).fields if field.name not in have]


def _first_line(error: Exception) -> str:
    """Of an object store's error, whose further lines are a chain of causes."""
    return str(error).strip().split("\n")[0]


def _retry(action: Callable[[], T]) -> T:
    last: Exception | None = None
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
