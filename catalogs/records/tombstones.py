"""What was forgotten (see `catalogs.maintenance.forget`): whole videos, and spans of videos. It stays forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import polars as pl

from datakit.identity import clip_id

if TYPE_CHECKING:
    from catalogs.tables.catalog import Catalog

SPAN = ("video_id", "stream", "start_pts", "end_pts")


KINDS = {"video_id": pl.String, "stream": pl.Int32, "start_pts": pl.Int64, "end_pts": pl.Int64}
SPAN = tuple(KINDS)


def spans(rows: pl.DataFrame | None = None) -> pl.DataFrame:
    """Rows as the table `forgotten` says what is: spans; whole videos where all but the video is null. None: no row."""
    if rows is None:
        return pl.DataFrame(schema=KINDS)
    return rows.select(*((pl.col(n) if n in rows.columns else pl.lit(None)).cast(t).alias(n) for n, t in KINDS.items()))


@dataclass(frozen=True)
class Forgotten:
    """Attributes:
    rows: video_id, stream, start_pts, end_pts; all but the first null: the whole video.
    """

    rows: pl.DataFrame

    @classmethod
    def read(cls, catalog: Catalog) -> Forgotten:
        """What a catalog has forgotten so far."""
        return cls(catalog.scan("forgotten").select(SPAN).unique().collect())

    def with_rows(self, more: pl.DataFrame) -> Forgotten:
        return Forgotten(pl.concat([self.rows, more]).unique())

    @cached_property
    def videos(self) -> set[str]:
        """Forgotten as a whole."""
        return set(self.rows.filter(pl.col("stream").is_null())["video_id"])

    @cached_property
    def spans(self) -> pl.DataFrame:
        """Forgotten parts of other videos."""
        return self.rows.filter(pl.col("stream").is_not_null() & ~pl.col("video_id").is_in(list(self.videos)))

    @cached_property
    def partly(self) -> set[str]:
        """Videos of which a part is forgotten."""
        return set(self.spans["video_id"])

    def clip_ids(self) -> set[str]:
        """Of the clips that were exactly such a span."""
        return {clip_id(*row) for row in self.rows.filter(pl.col("stream").is_not_null()).select(SPAN).iter_rows()}

    def covers(self, rows: pl.DataFrame) -> pl.Series:
        """Which of these clips (video_id, stream, start_pts, end_pts) show any of what is forgotten."""
        whole = rows["video_id"].is_in(list(self.videos))
        if not self.spans.height or not rows.height:
            return whole
        spans = self.spans.rename({"start_pts": "from", "end_pts": "to"})
        near = rows.select(SPAN).with_columns(stream=pl.col("stream").cast(pl.Int32)).with_row_index("place")
        near = near.join(spans, on=["video_id", "stream"])
        places = near.filter((pl.col("start_pts") < pl.col("to")) & (pl.col("end_pts") > pl.col("from")))[
            "place"
        ].unique()
        return whole | pl.int_range(rows.height, eager=True, dtype=pl.get_index_type()).is_in(places.implode())

    def without(self, rows: Sequence[dict]) -> list[dict]:
        """The clips that show nothing of what is forgotten."""
        if not rows or self.rows.is_empty() or rows[0]["video_id"] not in self.videos | self.partly:
            return list(rows)
        frame = pl.DataFrame([{name: row[name] for name in SPAN} for row in rows])
        return [row for row, gone in zip(rows, self.covers(frame), strict=True) if not gone]
