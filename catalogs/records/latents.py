"""The table `latents`: encoded windows, in files that suit training.

Rows lie as they are given, in the order of the plan, in row groups of a few MB: what a loader reads at once is what it
needs next. That is why files are written here: Delta's own writer puts rows in another order, and takes several times a
commit's memory.

A window that could be encoded has one row for an autoencoder: every commit looks at what others have added since, and
of two commits for one autoencoder at the same moment one fails and looks again. Rows with an error stand for windows
that could not be encoded; one of a window that has been encoded after all counts for nothing.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, Transaction
from deltalake.exceptions import CommitFailedError
from deltalake.transaction import AddAction

from catalogs.records.tombstones import SPAN, Forgotten
from catalogs.tables.catalog import Catalog
from catalogs.tables.file_statistics import statistics_of
from catalogs.tables.integrity import files_of
from catalogs.tables.object_store import Storage
from catalogs.tables.schema import PARTITIONED, arrow_schema
from catalogs.tables.sql_text import sql_list
from datakit.errors import CatalogError
from datakit.video.uri import is_remote

TABLE = "latents"
GROUP_BYTES = 4 << 20
"""Of a row group, if a row is not larger."""
NUMBERS = ("mean", "std")
FILE = pa.schema([field for field in arrow_schema(TABLE) if field.name not in PARTITIONED[TABLE]])
"""Columns of a file; those of the partition stand in its path."""
DELETE_AT_ONCE = 500

Row = Mapping[str, Any]


class Latents:
    """What a catalog has of an autoencoder's latents, and adding to it.

    Args:
        autoencoder: its hash.
        compression: of the files.

    Raises:
        MissingDependency: a catalog in an object store whose fsspec library is not installed.
    """

    def __init__(self, catalog: Catalog, autoencoder: str, compression: str = "snappy"):
        self.catalog, self.autoencoder, self.compression = catalog, autoencoder, compression
        self._storage = Storage(catalog.root)
        handle = catalog.table(TABLE)
        self._version, self._seen = handle.version(), set(paths(handle, autoencoder))
        self._added: dict[str, bool] = {}  # by others since: geometry -> whether it is encoded

    def windows(self) -> pl.DataFrame:
        """`geometry`, `error_kind` (null: encoded) and `dtype` of every row there was when this was made."""
        rows = self.catalog.scan(TABLE, self._version).filter(pl.col("autoencoder") == self.autoencoder)
        with self.catalog.reading():
            return rows.select("geometry", "error_kind", "dtype").collect()

    def added(self, geometry: str) -> bool:
        """Whether somebody else has encoded a window since, as far as the last commit saw."""
        return self._added.get(geometry, False)

    def add(self, rows: Sequence[Row], again: Sequence[str] = ()) -> int:
        """Enter rows, in one commit; how many. Left out are those of windows that have one by now, and of forgotten
        clips.

        Args:
            rows: of the table's columns; those of a bucket stay in order.
            again: geometries whose errors these rows replace.
        """
        for start in range(0, len(again), DELETE_AT_ONCE):
            some = sql_list(again[start : start + DELETE_AT_ONCE])
            self.catalog.delete(
                TABLE, f"autoencoder = '{self.autoencoder}' AND error_kind IS NOT NULL AND geometry IN {some}"
            )
        return self.catalog.write(TABLE, lambda handle: self._commit(handle, rows, set(again)))

    def _commit(self, handle: DeltaTable, rows: Sequence[Row], again: set[str]) -> int:
        rows = self._wanted(handle, rows, again)
        if not rows:
            return 0
        files = [self._write(*part) for part in _parts(rows)]
        app = f"{TABLE}/{self.autoencoder}"
        about = CommitProperties(
            custom_metadata={**self.catalog.signature, "num_added_rows": str(len(rows))},
            app_transactions=[Transaction(app, (handle.transaction_version(app) or 0) + 1)],
        )  # two of one number conflict
        try:
            handle.create_write_transaction(
                [*files], "append", arrow_schema(TABLE), PARTITIONED[TABLE], commit_properties=about
            )
        except CommitFailedError:  # another errors may come after the commit: such files stay until a vacuum
            for file in files:
                self._storage.delete(f"{TABLE}/{file.path}")
            raise
        self._seen.update(file.path for file in files)
        return len(rows)

    def _wanted(self, handle: DeltaTable, rows: Sequence[Row], again: set[str]) -> list[Row]:
        """Rows that nobody has entered since, of clips that may be there."""
        for path in paths(handle, self.autoencoder):
            if path not in self._seen:
                keys = windows_of(f"{self.catalog.root}/{TABLE}/{path}", ("geometry", "error_kind"))
                for geometry, kind in keys.select("geometry", "error_kind").iter_rows():
                    self._added[geometry] = kind is None or self.added(geometry)
                self._seen.add(path)
        spans = pl.DataFrame([[row[name] for name in SPAN] for row in rows], list(SPAN), orient="row")
        forgotten = Forgotten.read(self.catalog).covers(spans)
        # An error is news where nothing is known of a window, a latent also where there was an error.
        errors = self._added.keys() - again
        known = [
            self.added(row["geometry"]) or bool(row.get("error_kind") and row["geometry"] in errors) for row in rows
        ]
        return [row for row, gone, there in zip(rows, forgotten, known, strict=True) if not gone and not there]

    def _write(self, bucket: str, rows: list[Row]) -> AddAction:
        """A file that no version knows yet."""
        path = f"autoencoder={self.autoencoder}/bucket={bucket}/part-00000-{uuid.uuid4()}.{self.compression}.parquet"
        size = max(sum(len(row.get(name) or b"") for name in NUMBERS) for row in rows)
        step = max(1, GROUP_BYTES // size) if size else len(rows)
        small = [name for name in FILE.names if name not in NUMBERS]
        with self._storage.create(f"{TABLE}/{path}") as file:
            how = {
                "compression": self.compression,
                "use_dictionary": small,
                "write_statistics": small,
                "metadata_collector": (about := []),
            }
            with pq.ParquetWriter(file, FILE, **how) as writer:
                for start in range(0, len(rows), step):
                    group = [{name: row.get(name) for name in FILE.names} for row in rows[start : start + step]]
                    writer.write_table(pa.Table.from_pylist(group, FILE))
            length = file.tell()
            if self._storage.is_local:
                file.flush()
                os.fsync(file.fileno())
        partition = {"autoencoder": self.autoencoder, "bucket": bucket}
        return AddAction(
            path,
            length,
            partition,
            int(time.time() * 1000),
            True,
            json.dumps(statistics_of(about[0]), separators=(",", ":")),
        )


def paths(handle: DeltaTable, autoencoder: str) -> list[str]:
    """Files of an autoencoder, below the table's folder."""
    return sorted(path for path in files_of(handle) if path.startswith(f"autoencoder={autoencoder}/"))


def windows_of(address: str, columns: Sequence[str]) -> pl.DataFrame:
    """Columns of every row of a file, with its `row_group` and its `row` in there.

    Raises:
        CatalogError: the file cannot be read.
    """
    try:
        with _opened(address, columns) as source, pq.ParquetFile(source) as file:
            counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            frame = pl.from_arrow(file.read(list(columns)))
    except (OSError, pa.ArrowException) as e:
        raise CatalogError(f"{address} cannot be read (`datakit catalog validate` says what to do): {e}") from e
    assert isinstance(frame, pl.DataFrame)
    return frame.with_columns(
        row_group=pl.Series(np.repeat(np.arange(len(counts)), counts), dtype=pl.Int32),
        row=pl.Series(np.concatenate([np.arange(n) for n in counts] or [np.zeros(0)]), dtype=pl.Int32),
    )


@contextmanager
def _opened(address: str, columns: Sequence[str]) -> Iterator[Any]:
    """A Parquet file; of one in an object store only these columns are fetched."""
    if not is_remote(address):
        with open(address, "rb") as file:
            yield file
        return
    import fsspec
    from fsspec.parquet import open_parquet_file

    fs, path = fsspec.core.url_to_fs(address)
    with open_parquet_file(path, fs=fs, columns=list(columns), engine="pyarrow") as file:
        yield file


def _parts(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Rows that a file holds, by bucket: those with errors have files of their own, which are replaced when they are no
    more."""

    def file_of(row: Row) -> tuple[str, bool]:
        return row["bucket"], row.get("error_kind") is not None

    for (bucket, _), part in groupby(sorted(rows, key=file_of), file_of):
        yield bucket, list(part)
