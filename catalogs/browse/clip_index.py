"""The rows that the app shows, in memory: one snapshot's scalar columns, filtered, counted and sorted in fractions of a
second.

    index = Index(Catalog("my-catalog"))
    result = index.query("motion > 3 and status = 'kept'", sort="aesthetic", descending=True, limit=60)

Numbers keep the catalog's types, so that a condition matches here exactly what it matches in `--where`; strings of few
values are categories. What the first conditions rarely ask for (captions, addresses …) is read when one mentions it.
Five million clips take about 1 GiB.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
from operator import attrgetter

import numpy as np
import polars as pl
from cachetools import LRUCache, cachedmethod

from catalogs.browse.snapshot_reader import QUARANTINED, SPREAD, STATUSES, read_clips, read_marks, read_videos
from catalogs.query.where import parse_where
from catalogs.records.marks import MARKS
from catalogs.tables.arrow_types import view_schema
from catalogs.tables.catalog import Catalog
from catalogs.tables.view import unknown_column
from datakit.errors import CatalogError, ConfigError

FROM_MARKS = ("status", "level", "mark", "comment")
"""Columns that a mark changes at once."""
FIRST_PAGES = 300
"""Rows that are found without putting all in order."""
IDLE_BYTES = 200 << 20
"""Columns that one condition asked for and the next does not may take this much memory."""
DURATION, SOURCE = "duration", "source"
"""Orders that are no columns: end_s − start_s; the video, then the start."""


@dataclass(frozen=True)
class Amount:
    """Clips, and hours of footage."""

    clips: int
    hours: float


@dataclass(frozen=True)
class Result:
    """What matches a condition.

    Attributes:
        total: all that matches; `statuses`: by status.
        rows: numbers of the rows of this page, in order; see `Index.take`.
        seconds: that it took.
    """

    total: Amount
    statuses: dict[str, Amount]
    rows: np.ndarray
    seconds: float


@dataclass(frozen=True)
class State:
    """One moment of the index; a query works on one, whatever is marked meanwhile.

    Attributes:
        frame: a row per clip; `row_of_video` indexes `videos`.
        status, mark: as positions in STATUSES; 0 or 1 + the position in MARKS.
    """

    frame: pl.DataFrame
    videos: pl.DataFrame
    versions: dict[str, int]
    status: np.ndarray
    mark: np.ndarray
    generation: int = 0


class Index:
    """Rows of one snapshot of a catalog.

    Attributes:
        read_only: whether it is a snapshot, which nobody can mark.
        load_s: seconds that reading took.
    """

    def __init__(self, catalog: Catalog):
        self.catalog = catalog
        self.read_only = catalog.is_snapshot
        self._lock = threading.RLock()
        self._caching = threading.Lock()
        self.reload()

    def reload(self) -> None:
        """Read the catalog as it is now. The rows in memory go first, so that there is room; queries wait.

        Raises:
            CatalogError: it cannot be read; nothing is shown then, until a reload succeeds.
        """
        with self._lock, self.catalog.reading():
            began = time.monotonic()
            self._loaded: State | None = None
            self._matches: LRUCache[tuple, np.ndarray] = LRUCache(6)
            self._orders: LRUCache[tuple, np.ndarray] = LRUCache(4)
            self._rows: LRUCache[str, int | None] = LRUCache(20_000)
            self._read_later: list[str] = []
            versions = self.catalog.versions()
            videos = read_videos(self.catalog, versions)
            frame = read_clips(self.catalog, versions, videos)
            self._recipe_status = frame["status"].to_physical().to_numpy().copy()
            self._recipe_level = frame["level"]
            self._source_order = _sorted(frame, SOURCE, False)
            self._seconds = frame.select((pl.col("end_s") - pl.col("start_s")).fill_null(0.0)).to_series().to_numpy()
            unmarked = State(
                frame.drop("status", "level"), videos, versions, self._recipe_status, np.zeros(frame.height, np.uint8)
            )
            marks, comments = read_marks(self.catalog, versions["marks"], frame["clip_id"])
            self._loaded = self._marked(unmarked, marks, comments, versions["marks"])
            self.load_s = time.monotonic() - began

    @property
    def _state(self) -> State:
        if self._loaded is None:
            with self._lock:  # until a reload is done
                if self._loaded is None:
                    raise CatalogError(f"the catalog at {self.catalog.root} could not be read: reload it")
        return self._loaded

    @property
    def size(self) -> int:
        return self._state.frame.height

    @property
    def versions(self) -> dict[str, int]:
        """Of the tables, as they are shown."""
        return self._state.versions

    def query(
        self,
        where: str | None = None,
        sort: str = SOURCE,
        descending: bool = False,
        offset: int = 0,
        limit: int = 60,
    ) -> Result:
        """Count what matches, and find one page of it.

        Args:
            where: SQL condition over the view `clips`.
            sort: a scalar column, `duration`, or `source` (videos in the catalog's order, by start). Nulls come last,
                equal values in the catalog's order.

        Raises:
            ConfigError: the condition or the column makes no sense.
        """
        began = time.monotonic()
        state = self._with([*_names(where), *self._sort_columns(sort)])
        mask = self._mask(state, where)
        clips = np.bincount(state.status[mask], minlength=len(STATUSES))
        hours = np.bincount(state.status[mask], self._seconds[mask], minlength=len(STATUSES)) / 3600
        rows = self._page(state, mask, sort, descending, offset, limit)
        statuses = {name: Amount(int(clips[i]), float(hours[i])) for i, name in enumerate(STATUSES)}
        return Result(Amount(int(clips.sum()), float(hours.sum())), statuses, rows, time.monotonic() - began)

    def rows(self, where: str | None) -> np.ndarray:
        """Numbers of all rows that match."""
        return np.flatnonzero(self._mask(self._with(_names(where)), where))

    def take(self, rows: np.ndarray, columns: list[str]) -> pl.DataFrame:
        """Columns of some rows, in their order; those of videos, `uri` and `duration` too."""
        apart = [name for name in columns if name in SPREAD]
        own = [name for name in columns if name != DURATION and name not in apart]
        state = self._with(own)
        needed = state.frame.select(list(dict.fromkeys(["start_s", "end_s", "row_of_video", *own])))
        picked = needed[pl.Series(rows, dtype=pl.UInt32)] if len(rows) else needed.clear()
        facts = [state.videos[name].gather(picked["row_of_video"]) for name in apart]
        return picked.with_columns((pl.col("end_s") - pl.col("start_s")).alias(DURATION), *facts).select(columns)

    @cachedmethod(attrgetter("_rows"), key=lambda self, clip_id: clip_id, lock=attrgetter("_caching"))
    def row_of(self, clip_id: str) -> int | None:
        """The row of a clip; None: the snapshot has no such clip."""
        hits = (self._state.frame["clip_id"] == clip_id).arg_true()
        return int(hits[0]) if len(hits) else None

    def rows_of(self, clip_ids: list[str]) -> np.ndarray:
        """The rows of some clips, in no particular order.

        Raises:
            CatalogError: there is no such clip.
        """
        ids = self._state.frame["clip_id"]
        rows = ids.is_in(pl.Series(clip_ids, dtype=pl.String).implode()).arg_true()
        if len(rows) != len(set(clip_ids)):
            raise CatalogError(
                f"{len(set(clip_ids)) - len(rows)} of these clips are not in the catalog as it is shown: reload it"
            )
        return rows.to_numpy()

    def remember(self, clip_ids: list[str], rows: np.ndarray) -> None:
        """Clips that will be asked for by id soon."""
        with self._caching:
            self._rows.update(zip(clip_ids, rows.tolist()))

    def video(self, video_id: str) -> dict | None:
        """Facts of an ok video; None: there is no such video."""
        found = self._state.videos.filter(pl.col("video_id") == video_id)
        return found.row(0, named=True) if found.height else None

    def video_at(self, row: int) -> dict:
        """Facts of the video of a row."""
        return self._state.videos.row(self._state.frame["row_of_video"][row], named=True)

    def siblings(self, row: int) -> np.ndarray:
        """Rows of all clips of the same video, by start."""
        numbers = self._state.frame["row_of_video"]
        rows = (numbers == numbers[row]).arg_true()
        return rows.gather(self._state.frame["start_s"].gather(rows).arg_sort()).to_numpy()

    def column(self, name: str) -> pl.Series:
        """A whole column. `duration` is in seconds."""
        if name == DURATION:
            return pl.Series(DURATION, self._seconds)
        return self._with([name]).frame[name]

    def has_path(self, row: int) -> bool:
        """Whether a clip has a file of its own."""
        return self._state.frame["has_path"][row]

    def marks_of(self, rows: np.ndarray) -> tuple[list[str | None], list[str | None]]:
        """Marks and comments of rows."""
        names = [None, *MARKS]
        state = self._state
        return [names[code] for code in state.mark[rows]], state.frame["comment"].gather(rows).to_list()

    def apply_marks(self, rows: np.ndarray, marks: list[str | None], comments: list[str | None], version: int) -> None:
        """Show marks that were written, `version` being the table's since then."""
        with self._lock:
            state = self._state
            codes = state.mark.copy()
            codes[rows] = [0 if mark is None else 1 + MARKS.index(mark) for mark in marks]
            told = state.frame["comment"].clone().scatter(rows, pl.Series(comments, dtype=pl.String))
            self._loaded = self._marked(state, codes, told, version)

    def reread_marks(self, version: int) -> None:
        """Take all marks from the catalog, at a version of its table `marks`."""
        with self._lock:
            state = self._state
            self._loaded = self._marked(state, *read_marks(self.catalog, version, state.frame["clip_id"]), version)

    def _marked(self, state: State, marks: np.ndarray, comments: pl.Series, version: int) -> State:
        """The state with these marks, by the rule of the view: people win over recipes, failures over both."""
        keep, reject = (marks == 1 + MARKS.index(name) for name in ("keep", "reject"))
        ruled = self._recipe_status
        status = np.where(ruled == QUARANTINED, ruled, np.where(keep, 0, np.where(reject, 1, ruled))).astype(np.uint8)
        free = ruled != QUARANTINED
        told = pl.DataFrame(
            {"level": self._recipe_level, "mark": marks, "free": free, "status": status, "comment": comments}
        )
        kept, rejected = (pl.col("free") & (pl.col("mark") == 1 + MARKS.index(name)) for name in ("keep", "reject"))
        level = pl.when(kept).then(pl.max_horizontal("level", pl.lit(1))).when(rejected).then(0).otherwise("level")
        shown = told.select(
            pl.col("status").cat.to(pl.Enum(STATUSES)),
            level.cast(pl.Int32).alias("level"),
            pl.when(pl.col("mark") > 0).then(pl.col("mark") - 1).cat.to(pl.Enum(MARKS)).alias("mark"),
            "comment",
        )
        frame = state.frame.drop("reasons", strict=False).with_columns(shown)
        return replace(
            state,
            frame=frame,
            versions={**state.versions, "marks": version},
            status=status,
            mark=marks,
            generation=state.generation + 1,
        )

    def _with(self, names: list[str]) -> State:
        """The state with these columns in its frame."""
        if all(name in self._state.frame.columns for name in names):
            return self._state
        with self._lock:
            state = self._state
            missing = [name for name in dict.fromkeys(names) if name not in state.frame.columns]
            spread = [n for n in missing if n in SPREAD]
            added = [state.videos[n].gather(state.frame["row_of_video"]) for n in spread]
            kept = state.frame
            if read := [n for n in missing if n not in spread]:
                kept = kept.drop(self._too_much(kept, names), strict=False)
                added += self._read(state, read)
                self._read_later += read
            self._loaded = replace(state, frame=kept.with_columns(added))
            return self._state

    def _too_much(self, frame: pl.DataFrame, needed: list[str]) -> list[str]:
        """Columns that were read for an earlier condition, once they take more memory than they may together."""
        idle = [name for name in self._read_later if name in frame.columns and name not in needed]
        gone = idle if frame.select(idle).estimated_size() > IDLE_BYTES else []
        self._read_later = [name for name in self._read_later if name not in gone]
        return gone

    def _read(self, state: State, names: list[str]) -> list[pl.Series]:
        """Columns of the view from the tables, in the order of the frame."""
        with self.catalog.reading():
            rows = self.catalog.clips(state.versions, ["clip_id", *names])
            rows = rows.filter(pl.any_horizontal(pl.col(names).is_not_null())).collect(engine="streaming")
        return (
            state.frame.select("clip_id")
            .join(rows, on="clip_id", how="left", maintain_order="left")
            .select(names)
            .get_columns()
        )

    @cachedmethod(
        attrgetter("_matches"), key=lambda self, state, where: (state.generation, where), lock=attrgetter("_caching")
    )
    def _mask(self, state: State, where: str | None) -> np.ndarray:
        return _evaluate(state.frame, where)

    def _page(self, state: State, mask: np.ndarray, sort: str, descending: bool, offset: int, limit: int) -> np.ndarray:
        """Rows of a page. All clips are put in order only for who looks further than the first pages."""
        if sort == SOURCE:
            order = self._source_order[::-1] if descending else self._source_order
        else:
            key = (state.generation if sort in FROM_MARKS else None, sort, descending)
            with self._caching:
                order = self._orders.get(key)
            if order is None and offset + limit <= FIRST_PAGES:
                return _first(state.frame, mask, sort, descending, offset + limit)[offset:]
            if order is None:
                order = _sorted(state.frame, sort, descending)
                with self._caching:
                    self._orders[key] = order
        return order[mask[order]][offset : offset + limit]

    def _sort_columns(self, sort: str) -> list[str]:
        if sort in (DURATION, SOURCE):
            return []
        kind = view_schema().get(sort)
        if kind is None:
            raise ConfigError(f"cannot sort: {unknown_column(sort, list(view_schema()))}")
        if kind.is_nested() or kind == pl.Binary:
            raise ConfigError(f"cannot sort by {sort}: it is no single value")
        return [sort]


def _names(where: str | None) -> list[str]:
    return parse_where(where or None).meta.root_names()


def _evaluate(frame: pl.DataFrame, where: str | None) -> np.ndarray:
    """A mask of the rows that match. Categories answer comparisons; what else is done with strings needs their text."""
    if not where:
        return np.ones(frame.height, bool)
    condition = parse_where(where)
    used = frame.lazy().select(list(dict.fromkeys(condition.meta.root_names())) or ["clip_id"])
    asked = condition.alias("matches")
    try:
        try:
            found = used.select(asked).collect().to_series()
        except pl.exceptions.PolarsError:
            found = (
                used.with_columns(pl.col(pl.Categorical, pl.Enum).cast(pl.String)).select(asked).collect().to_series()
            )
    except pl.exceptions.PolarsError as e:
        raise ConfigError(f"--where: cannot use {where!r}: {str(e).splitlines()[0]}") from e
    if len(found) != frame.height:  # a condition about all clips at once
        found = found.new_from_index(0, frame.height)
    return found.cast(pl.Boolean).fill_null(False).to_numpy()


def _sorted(frame: pl.DataFrame, sort: str, descending: bool) -> np.ndarray:
    """Numbers of all rows in an order; see `Index.query`."""
    keys = frame.lazy().select(_key(frame, sort).alias("key")).with_row_index()
    return (
        keys.sort("key", descending=descending, nulls_last=True, maintain_order=True)
        .select("index")
        .collect()
        .to_series()
        .to_numpy()
    )


def _first(frame: pl.DataFrame, mask: np.ndarray, sort: str, descending: bool, number: int) -> np.ndarray:
    """The first rows of `_sorted` that match, without sorting the others."""
    keys = frame.lazy().select(_key(frame, sort).alias("key")).with_row_index().filter(pl.Series(mask))
    best = keys.top_k(number, by=["key", "index"], reverse=[not descending, True])
    return (
        best.sort("key", "index", descending=[descending, False], nulls_last=True)
        .select("index")
        .collect()
        .to_series()
        .to_numpy()
    )


def _key(frame: pl.DataFrame, sort: str) -> pl.Expr:
    if sort == SOURCE:
        return pl.col("row_of_video").cast(pl.UInt64) * (1 << 32) + (pl.col("start_s").fill_null(0.0) * 1000).cast(
            pl.UInt64
        )
    if sort == DURATION:
        return pl.col("end_s") - pl.col("start_s")
    return pl.col(sort).cast(pl.String) if isinstance(frame.schema[sort], (pl.Categorical, pl.Enum)) else pl.col(sort)
