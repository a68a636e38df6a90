"""Writing marks from the app: at once, and shown at once. Rows are only added, so writers beside this one lose
nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from catalogs.browse.clip_index import Index
from catalogs.query.snapshots import check_writable
from catalogs.records.marks import mark_each
from datakit.errors import CatalogError

MOST = 200_000
"""Clips marked in one go. For more a rule of a recipe is the better tool."""
COMPACT_FROM = 20
Said = tuple[str | None, str | None]


class Marker:
    """Writes marks of an index's clips."""

    def __init__(self, index: Index):
        self.index = index
        self.commits = 0
        self._lock = threading.Lock()

    def mark(self, rows: np.ndarray, value: str | None) -> int:
        """Keep, reject, or (None) leave to the recipe; comments stay."""
        return self._change(rows, lambda said: (value, said[1]))

    def comment(self, rows: np.ndarray, text: str | None) -> int:
        """Note something; marks stay."""
        return self._change(rows, lambda said: (said[0], text or None))

    def close(self) -> None:
        """Join the many small files of a long session."""
        if self.commits >= COMPACT_FROM:
            self.index.catalog.compact("marks")

    def _change(self, rows: np.ndarray, change: Callable[[Said], Said]) -> int:
        """Returns how many clips were marked.

        Raises:
            CatalogError: a snapshot, a restore under way, too many clips.
        """
        index, catalog = self.index, self.index.catalog
        if index.read_only:
            raise CatalogError(
                "this is a snapshot of the catalog, to look at only: browse the catalog as it is now to mark clips"
            )
        if len(rows) > MOST:
            raise CatalogError(
                f"{len(rows)} clips are too many to mark one by one ({MOST} at most): narrow the condition, or make "
                f"it a recipe's rule"
            )
        if not len(rows):
            return 0
        with self._lock:
            check_writable(catalog)
            before = catalog.table("marks").version()
            if before != index.versions["marks"]:  # somebody else marked meanwhile
                index.reread_marks(before)
            said = [change(pair) for pair in zip(*index.marks_of(rows))]
            ids = index.take(rows, ["clip_id"])["clip_id"]
            mark_each(catalog, [(clip, *pair) for clip, pair in zip(ids, said)])
            self.commits += 1
            after = catalog.table("marks").version()
            if after == before + 1:
                index.apply_marks(rows, [mark for mark, _ in said], [comment for _, comment in said], after)
            else:
                index.reread_marks(after)
        return len(rows)
