"""Merging rows into a table: which rows of it they match, and what happens to matched and to new ones.

The SQL of every merge is made here, from the key columns that the schema declares. Delta finds out whether two writers
conflict from the predicate: a partition must stand in it as a literal (`t.shard = '3'`), as joined on `t.shard =
s.shard` writers of different shards conflict. See `Catalog.upsert` for what the options mean.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import and_
from typing import Any, Literal

import polars as pl
from deltalake import CommitProperties, DeltaTable

from catalogs.tables import schema
from catalogs.tables.arrow_types import as_frame, as_source
from catalogs.tables.sql_text import quoted, sql_list
from datakit.errors import CatalogError

Only = Literal["insert", "update"]
Revise = Callable[[pl.DataFrame, pl.LazyFrame], pl.DataFrame]
"""Makes the rows to be merged from the rows of one commit and the table's rows in the same partitions, as they are in
the version that is merged into."""


@dataclass(frozen=True)
class Upsert:
    """How rows go into the table `name`; see `Catalog.upsert`."""

    name: str
    keys: Sequence[str] = ()
    only: Only | None = None
    when: Mapping[str, Sequence[str]] = field(default_factory=dict)
    change: Collection[str] | None = None
    fill: Collection[str] = ()
    revise: Revise | None = None

    def commits(self, rows: Sequence[dict[str, Any]] | pl.DataFrame, at_once: bool) -> list[pl.DataFrame]:
        """The rows of each commit: one for every partition, or one for all.

        Raises:
            CatalogError: rows of different columns (null would take the place of what they do not say), or that do not
                say to which partition they belong.
        """
        if not isinstance(rows, pl.DataFrame):
            every, common = (set[str]().union(*rows), set(rows[0]).intersection(*rows)) if rows else (set(), set())
            if every != common:
                some = ", ".join(sorted(every - common))
                raise CatalogError(f"rows for table {self.name} have different columns: {some} in some only")
            rows = as_frame(self.name, rows)
        if rows.is_empty():
            return []
        missing = [column for column in self._partition if column not in rows.columns]
        if missing:
            raise CatalogError(f"rows for table {self.name} must say their {', '.join(missing)}: the partition")
        if at_once or not self._partition:
            return [rows]
        return [part for _, part in rows.group_by(*self._partition, maintain_order=True)]

    def execute(self, handle: DeltaTable, rows: pl.DataFrame, signature: CommitProperties) -> int:
        """Merge the rows of one commit into the version that `handle` has read.

        Returns:
            rows changed or added.

        Raises:
            CommitFailedError: another writer was faster.
        """
        values = {column: sorted(rows[column].unique()) for column in self._partition}
        if self.revise is not None:
            rows = self.revise(rows, self._table(handle, values))
        if rows.is_empty():
            return 0
        merger = handle.merge(
            as_source(self.name, rows),
            self._matches(rows, values),
            source_alias="s",
            target_alias="t",
            commit_properties=signature,
        )
        changes = self._changes(rows)
        if self.only != "insert" and changes:
            merger = merger.when_matched_update(updates=changes, predicate=self._condition())
        if self.only != "update":
            merger = merger.when_not_matched_insert_all()
        done = merger.execute()
        return done["num_target_rows_updated"] + done["num_target_rows_inserted"]

    @property
    def _partition(self) -> list[str]:
        return schema.PARTITIONED.get(self.name, [])

    @property
    def _keys(self) -> Sequence[str]:
        return self.keys or schema.KEYS[self.name]

    def _table(self, handle: DeltaTable, values: Mapping[str, Sequence[str]]) -> pl.LazyFrame:
        """The table's rows in these partitions."""
        inside = [
            pl.col(column) == some[0] if len(some) == 1 else pl.col(column).is_in(some)
            for column, some in values.items()
        ]
        rows = pl.scan_delta(handle)
        return rows.filter(reduce(and_, inside)) if inside else rows

    def _matches(self, rows: pl.DataFrame, values: Mapping[str, Sequence[str]]) -> str:
        """When a row of the table is one of these: by partition and keys, as literals where all hold one value."""
        terms = []
        for column, some in values.items():
            terms.append(f"t.`{column}` = {quoted(some[0])}" if len(some) == 1 else f"t.`{column}` IN {sql_list(some)}")
            if len(some) > 1:
                terms.append(f"t.`{column}` = s.`{column}`")
        for column in self._keys:
            terms.append(f"t.`{column}` = s.`{column}`")
            if rows[column].n_unique() == 1:  # then Delta need not look at files that cannot hold it
                terms.append(f"t.`{column}` = {_literal(rows[column][0])}")
        return " AND ".join(terms)

    def _changes(self, rows: pl.DataFrame) -> dict[str, str]:
        return {
            f"`{name}`": f"coalesce(t.`{name}`, s.`{name}`)" if name in self.fill else f"s.`{name}`"
            for name in rows.columns
            if name not in (*self._keys, *self._partition) and (self.change is None or name in self.change)
        }

    def _condition(self) -> str | None:
        return " AND ".join(f"t.`{name}` IN {sql_list(values)}" for name, values in self.when.items()) or None


def _literal(value: str | int) -> str:
    return quoted(value) if isinstance(value, str) else str(value)
