"""A selection: a snapshot of the catalog, a condition, and columns. It is what a training run reads and records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property

import polars as pl

from catalogs.query.snapshots import resolve
from catalogs.query.where import parse_where
from catalogs.tables.catalog import Catalog
from datakit.column_hash import feed_nulls, feed_values

COLUMNS = (
    "clip_id",
    "video_id",
    "uri",
    "path",
    "stream",
    "start_pts",
    "end_pts",
    "time_base",
    "num_frames",
    "fps",
    "width",
    "height",
    "crop_x",
    "crop_y",
    "crop_width",
    "crop_height",
    "motion_vmaf",
    "split",
    "caption",
)
"""What reading a clip takes, and its caption."""
KEPT = "status = 'kept'"


class Selection:
    """Clips of one snapshot that match a condition.

    Args:
        catalog: to select from.
        snapshot: a name (see `catalogs.query.snapshots.resolve`), the version of every table, or None: now. Read again,
            a selection gives the same rows, whatever was written since.
        where: SQL condition over the view `clips`; None: every clip.
        columns: of the view; `clip_id` is always among them.

    Raises:
        ConfigError: the condition cannot be read.
        CatalogError: unknown column or snapshot.
    """

    def __init__(
        self,
        catalog: Catalog,
        snapshot: str | dict[str, int] | None = None,
        where: str | None = KEPT,
        columns: Sequence[str] = COLUMNS,
    ):
        self.versions = resolve(catalog, snapshot) if not isinstance(snapshot, dict) else snapshot
        self.catalog = catalog.at(self.versions)
        self.where = where
        self.columns = tuple(dict.fromkeys(["clip_id", *columns]))
        self._condition = parse_where(where)
        self.rows()  # unknown columns are told now

    def rows(self, columns: Sequence[str] | None = None) -> pl.LazyFrame:
        """The rows, in no particular order, of these columns or the selection's own."""
        chosen = list(columns or self.columns)
        needed = dict.fromkeys([*chosen, *self._condition.meta.root_names()])
        return self.catalog.clips(self.versions, needed).filter(self._condition).select(chosen)

    def read(self) -> pl.DataFrame:
        """The rows, by clip_id."""
        with self.catalog.reading():
            return self.rows().sort("clip_id").collect()

    @cached_property
    def size(self) -> tuple[int, float]:
        """Clips, and hours of footage."""
        with self.catalog.reading():
            seconds = self.rows(["start_s", "end_s"]).select(
                pl.len(), (pl.col("end_s") - pl.col("start_s")).sum().fill_null(0.0)
            )
            clips, total = seconds.collect(engine="streaming").row(0)
        return clips, total / 3600

    @cached_property
    def content_hash(self) -> str:
        """Hash of the rows: 32 hex digits. Equal rows have equal hashes, whichever snapshot they are read from."""
        digest = hashlib.blake2b(json.dumps(self.columns).encode(), digest_size=16, person=b"datakit-select")
        rows = self.read()
        for name in self.columns:
            _hash_column(digest, rows[name])
        return digest.hexdigest()

    def as_dict(self) -> dict:
        """What a run records, and `Selection.from_dict` reads."""
        return {
            "versions": self.versions,
            "where": self.where,
            "columns": list(self.columns),
            "content_hash": self.content_hash,
        }

    @classmethod
    def from_dict(cls, catalog: Catalog, recorded: dict) -> Selection:
        """A recorded selection; compare `content_hash` to be sure that nothing was forgotten from it since."""
        return cls(catalog, recorded["versions"], recorded["where"], recorded["columns"])


def _hash_column(digest: hashlib.blake2b, column: pl.Series) -> None:
    """Feed a column: its type, nulls, lengths of what has a length, then values."""
    digest.update(f"{column.dtype.base_type().__name__}".encode())
    values = column.to_physical().to_arrow(compat_level=pl.CompatLevel.oldest())
    feed_nulls(digest, values)
    if column.dtype == pl.Struct:
        for name in column.struct.fields:
            digest.update(name.encode())
            _hash_column(digest, column.struct.field(name))
    elif column.dtype == pl.List:
        digest.update(column.list.len().fill_null(0).to_numpy().astype("<u4").tobytes())
        _hash_column(digest, column.drop_nulls().list.explode(empty_as_null=False, keep_nulls=False))
    else:
        feed_values(digest, values)
