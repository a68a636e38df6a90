"""Entering videos that are finished: their clips first, then their rows in `videos`, which make them count.

The protocol is that of ingest (pipelines/catalog_sync/video_ledger.py): readers take a clip only if its `run_id` is its
video's, so that what a killed import has appended is never seen; and a video that is finished already, whoever did it,
is left as it is.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime

import polars as pl

from catalogs.records.split import TEST, VAL, split_of
from catalogs.tables.arrow_types import as_frame, polars_schema
from catalogs.tables.catalog import Catalog
from catalogs.tables.sql_text import sql_list
from datakit.errors import ErrorKind, MediaError
from datakit.identity import caption_id, unreadable_id
from datakit.source import Source, identify

READERS = 16
"""Threads that read heads and tails of files for their identity."""
FINGERPRINT = "imported"
"""In place of the settings that found an ingested video's shots: an ingest of it divides it anew."""
MODEL = "imported"
ATTRIBUTES = ("license", "source_url", "attribution", "source_caption", "extra")
AGAIN = frozenset({ErrorKind.CRASH, ErrorKind.TIMEOUT, ErrorKind.OUT_OF_MEMORY})
"""Failures that another run may not have."""


@dataclass
class Entry:
    """A video to be entered.

    Attributes:
        sources: where it was seen.
        columns: of `videos`, technical ones.
        attributes: of `videos`, those in `ATTRIBUTES`.
        clips: rows of `clips`, without what the book knows.
        captions: by clip_id: shard, text, style, model, flags.
        failure: why it has no clips.
    """

    video_id: str
    sources: list[Source]
    columns: dict = field(default_factory=dict)
    attributes: dict = field(default_factory=dict)
    clips: list[dict] = field(default_factory=list)
    captions: dict[str, dict] = field(default_factory=dict)
    failure: MediaError | None = None


class Book:
    """What the catalog has, and entering what it has not.

    Args:
        run_id: that signs the rows.

    Attributes:
        captions: entered or changed so far.
    """

    def __init__(self, catalog: Catalog, run_id: str):
        self.catalog = catalog
        self.run_id = run_id
        self.captions = 0
        known = catalog.scan("videos").select("video_id", "uris").explode("uris").unnest("uris")
        self._known = known.select("uri", "size", "etag", "video_id").collect()

    def identify(self, sources: Sequence[Source]) -> list[tuple[str, MediaError | None]]:
        """Identity of each source: remembered where address, size and etag are known, else by reading a part of it.

        An address that held another video when it was entered is a problem: the content has changed.
        """
        asked = pl.DataFrame(
            {"uri": [s.uri for s in sources], "size": [s.size for s in sources], "etag": [s.etag for s in sources]},
            schema={"uri": pl.String, "size": pl.Int64, "etag": pl.String},
        )
        same = dict(asked.join(self._known, on=["uri", "size", "etag"]).select("uri", "video_id").iter_rows())
        before: dict[str, set[str]] = {}
        for uri, video in (
            asked.select("uri").unique().join(self._known, on="uri").select("uri", "video_id").iter_rows()
        ):
            before.setdefault(uri, set()).add(video)

        def look(source: Source) -> tuple[str, MediaError | None]:
            if source.problem is None and source.etag and source.uri in same:
                return same[source.uri], None
            found, problem = identify(source)
            others = before.get(source.uri, set()) - {unreadable_id(source.uri)}
            if problem is None and others and found not in others:
                problem = MediaError(
                    ErrorKind.SOURCE_CHANGED,
                    f"{source.uri} held video {min(others)} when it was entered and holds {found} now",
                    "import",
                )
            return found, problem

        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(look, sources))

    def states(self, videos: Iterable[str]) -> dict[str, str]:
        """Of videos that the catalog has: `ok`, `quarantined`, or `again` (pending, or failed in a way that may
        pass)."""
        rows = (
            self.catalog.scan("videos")
            .filter(pl.col("video_id").is_in(list(videos)))
            .select("video_id", "status", "error_kind")
        )
        return {
            video: "again" if status == "pending" or kind in AGAIN else status
            for video, status, kind in rows.collect().iter_rows()
        }

    def clips_of(self, videos: Iterable[str]) -> pl.DataFrame:
        """Clips that count: clip_id, video_id, and whether it is `whole`, all frames of its video."""
        frames = self.catalog.scan("videos").select("video_id", pl.col("num_frames").alias("frames"))
        whole = (pl.col("start_frame") == 0) & (pl.col("num_frames") == pl.col("frames"))
        clips = self.catalog.finished_clips().filter(pl.col("video_id").is_in(list(videos)))
        return clips.join(frames, on="video_id").select("clip_id", "video_id", whole.alias("whole")).collect()

    def enter(self, entries: Sequence[Entry]) -> set[str]:
        """Commit videos with their clips and captions; gives the videos that another run has finished meanwhile."""
        if not entries:
            return set()
        self.catalog.append("clips", [self._clip_row(entry, clip) for entry in entries for clip in entry.clips])
        rows = pl.DataFrame([self._video_row(entry) for entry in entries], schema=polars_schema("videos"))
        self.catalog.upsert("videos", rows, when={"status": ("pending", "quarantined")}, revise=self._with_addresses)
        self._forget_placeholders(entries)
        ids = [entry.video_id for entry in entries]
        videos = self.catalog.scan("videos").filter(pl.col("video_id").is_in(ids))
        mine = set(videos.filter(pl.col("run_id") == self.run_id).select("video_id").collect()["video_id"])
        self._write_captions([entry for entry in entries if entry.video_id in mine])
        return set(ids) - mine

    def note(self, entries: Sequence[Entry]) -> None:
        """Videos that the catalog has gain addresses, attributes that they lack, and captions."""

        def changed(_: pl.DataFrame, table: pl.LazyFrame) -> pl.DataFrame:
            ids = [entry.video_id for entry in entries]
            there = table.filter(pl.col("video_id").is_in(ids)).select("video_id", "uris", *ATTRIBUTES).collect()
            old = {row["video_id"]: row for row in there.to_dicts()}
            rows = [
                {
                    "video_id": e.video_id,
                    "uris": _addresses(e.sources, old[e.video_id]["uris"]),
                    **{name: _first(old[e.video_id][name], e.attributes.get(name)) for name in ATTRIBUTES},
                }
                for e in entries
                if e.video_id in old
            ]
            rows = [row for row in rows if row != {name: old[row["video_id"]][name] for name in row}]
            return as_frame("videos", rows)

        if entries:
            rows = pl.DataFrame({"video_id": [entry.video_id for entry in entries]})
            self.catalog.upsert("videos", rows, only="update", revise=changed)
            self._write_captions(entries)

    def _write_captions(self, entries: Sequence[Entry]) -> None:
        """Add captions, change those whose text is another now."""
        rows = [self._caption_row(clip, caption) for entry in entries for clip, caption in entry.captions.items()]
        if not rows:
            return
        frame = pl.DataFrame(rows, schema=polars_schema("captions")).unique(
            "caption_id", keep="first", maintain_order=True
        )
        self.captions += self.catalog.upsert("captions", frame, revise=_changed)

    def _clip_row(self, entry: Entry, clip: dict) -> dict:
        known = {"shard": self.catalog.shard_of(entry.video_id), "video_id": entry.video_id, "run_id": self.run_id}
        split = clip.get("split") or split_of(entry.video_id, VAL, TEST)
        lists = {name: clip.get(name) or [] for name in ("errors", "stage_versions")}
        return {**clip, **known, **lists, "split": split}

    def _video_row(self, entry: Entry) -> dict:
        row = {
            **entry.columns,
            **entry.attributes,
            "video_id": entry.video_id,
            "uris": _addresses(entry.sources, []),
            "shard": self.catalog.shard_of(entry.video_id),
            "fingerprint": FINGERPRINT,
            "run_id": self.run_id,
            "finished_at": datetime.now(UTC),
            "clip_count": len(entry.clips),
        }
        if entry.failure is None:
            return {**row, "status": "ok"}
        failed = entry.failure
        return {
            **row,
            "status": "quarantined",
            "error_stage": failed.stage,
            "error_kind": str(failed.kind),
            "error": failed.message[:500],
        }

    def _with_addresses(self, rows: pl.DataFrame, table: pl.LazyFrame) -> pl.DataFrame:
        """The rows, with the addresses that the table has of these videos too."""
        old = dict(
            table.filter(pl.col("video_id").is_in(rows["video_id"].to_list()))
            .select("video_id", "uris")
            .collect()
            .iter_rows()
        )
        merged = [_merged(uris, old.get(video) or []) for video, uris in rows.select("video_id", "uris").iter_rows()]
        return rows.with_columns(pl.Series("uris", merged, polars_schema("videos")["uris"]))

    def _forget_placeholders(self, entries: Sequence[Entry]) -> None:
        """Rows that stood for addresses which could not be read once, and can now."""
        readable = {unreadable_id(s.uri) for e in entries for s in e.sources if e.video_id != unreadable_id(s.uri)}
        stale = readable & set(self._known["video_id"])
        if stale:
            self.catalog.delete("videos", f"video_id IN {sql_list(sorted(stale))}")
            self._known = self._known.filter(~pl.col("video_id").is_in(list(stale)))

    def _caption_row(self, clip: str, caption: dict) -> dict:
        return {
            **caption,
            "caption_id": caption_id(clip, caption["style"], caption["model"]),
            "clip_id": clip,
            "backend": MODEL,
            "fingerprint": FINGERPRINT,
            "run_id": self.run_id,
            "created_at": datetime.now(UTC),
        }


def default_extract_folder(root: str) -> str:
    """Beside the catalog: its own folders belong to Delta."""
    return os.path.abspath(root).rstrip("/") + "-media"


def _changed(rows: pl.DataFrame, table: pl.LazyFrame) -> pl.DataFrame:
    """Captions that the table has not, or with another text."""
    there = table.filter(pl.col("caption_id").is_in(rows["caption_id"].to_list()))
    return rows.join(there.select("caption_id", "text").collect(), on=["caption_id", "text"], how="anti")


def _addresses(sources: Sequence[Source], old: list[dict]) -> list[dict]:
    return _merged([{"uri": s.uri, "size": s.size, "etag": s.etag} for s in sources], old)


def _merged(new: list[dict], old: list[dict]) -> list[dict]:
    by_uri = {address["uri"]: address for address in [*old, *new]}
    return [by_uri[uri] for uri in sorted(by_uri)]


def _first(*values: object) -> object:
    return next((value for value in values if value is not None), None)
