"""The registry of videos and its commit protocol: which videos there are, where they were seen, and how finished ones
enter the catalog. Ingest, import and the sampler's results all go this way.

1. `register` adds videos as `pending`; a known content at a new address only gains the address.
2. `finish` (of registered videos) and `enter` (of any) append the clips of finished videos, and their embeddings; then
   they turn the `videos` rows `ok`, with the run that made the clips. That second commit is what counts: readers take a
   clip only if its `run_id` is its video's. So clips appended by a run that was killed in between, or that lost to
   another run on the same video, are never seen.
3. `sweep` deletes such clips, once their video was finished by another run. Clips of pending videos are left alone:
   their run may be alive.

What was forgotten does not come back: neither clips nor videos.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import polars as pl

from catalogs.records.captions import enter_captions
from catalogs.records.split import TEST, VAL, split_of
from catalogs.records.tombstones import Forgotten
from catalogs.tables.arrow_types import full_rows, polars_schema
from catalogs.tables.catalog import Catalog
from catalogs.tables.sql_text import quoted, sql_list
from catalogs.tables.upsert import Only
from datakit.errors import ErrorKind, MediaError
from datakit.identity import unreadable_id
from datakit.source import Source, identify

IMPORTED = "imported"
"""Stands for the settings that found an ingested video's shots (an ingest of it divides it anew), and for the model
that wrote a caption."""
ATTRIBUTES = ("license", "source_url", "attribution", "source_caption", "extra")
"""Columns of `videos` that come with a source, not from its content."""
TRANSIENT = frozenset({ErrorKind.CRASH, ErrorKind.TIMEOUT, ErrorKind.OUT_OF_MEMORY})
"""Failures that another run may not have."""
DELETE_AT_ONCE = 500
URIS = polars_schema("videos")["uris"]
FINISHED = tuple(name for name in polars_schema("videos") if name not in ("video_id", "uris", "shard", *ATTRIBUTES))
"""Columns of `videos` that the run fills which finishes the video."""


@dataclass
class Video:
    """A video to be registered, or one that is finished.

    Attributes:
        sources: where it was seen.
        columns: of `videos`, technical ones.
        attributes: of `videos`, those in `ATTRIBUTES`.
        clips: rows of `clips`, without what the registry knows.
        captions: by clip_id: shard, text, style, model, flags.
        embeddings: rows of `embeddings`.
        failure: why it has no clips.
    """

    video_id: str
    sources: list[Source] = field(default_factory=list)
    columns: Mapping[str, object] = field(default_factory=dict)
    attributes: dict[str, object] = field(default_factory=dict)
    clips: list[dict] = field(default_factory=list)
    captions: dict[str, dict] = field(default_factory=dict)
    embeddings: list[dict] = field(default_factory=list)
    failure: MediaError | None = None


@dataclass(frozen=True)
class VideoState:
    """What the catalog says of a video."""

    status: str
    error_kind: str | None
    fingerprint: str | None
    run_id: str | None

    @property
    def is_open(self) -> bool:
        """Whether there is more to be done: it is pending, or failed in a way that may pass."""
        return self.status == "pending" or self.error_kind in TRANSIENT


class VideoRegistry:
    """The videos of a catalog, as one run sees and changes them.

    Args:
        run_id: signs the rows.
        step: that a source which cannot be taken fails in, for `videos.error_stage`.
        fingerprint: of what decides which clips a video has.
        take_changed: whether an address that holds other content than before is taken as a new video.
        advice: ends the message about such an address where it is not.
        readers: threads that read heads and tails of files for their identity.
        holdout: shares of the splits val and test, of clips that come without a split.
    """

    def __init__(
        self,
        catalog: Catalog,
        run_id: str,
        *,
        step: str = "import",
        fingerprint: str = IMPORTED,
        take_changed: bool = False,
        advice: str = "",
        readers: int = 16,
        holdout: tuple[float, float] = (VAL, TEST),
    ):
        self.catalog = catalog
        self.run_id = run_id
        self.captions = 0  # entered or changed so far
        self._step, self._fingerprint, self._holdout = step, fingerprint, holdout
        self._take_changed, self._advice, self._readers = take_changed, advice, readers
        self._known = self._addresses()

    def identify(self, sources: Sequence[Source]) -> list[tuple[str, MediaError | None]]:
        """Identity of each source: remembered where address, size and etag are known, else by reading a part of it.

        An address that held another video before is a problem: the content has changed.
        """
        asked = pl.DataFrame(
            {"uri": [s.uri for s in sources], "size": [s.size for s in sources], "etag": [s.etag for s in sources]},
            schema={"uri": pl.String, "size": pl.Int64, "etag": pl.String},
        )
        unchanged = dict(asked.join(self._known, on=["uri", "size", "etag"]).select("uri", "video_id").iter_rows())
        at_address: dict[str, set[str]] = {}
        for uri, video_id in self._known.join(asked, on="uri", how="semi").select("uri", "video_id").iter_rows():
            at_address.setdefault(uri, set()).add(video_id)

        def look(source: Source) -> tuple[str, MediaError | None]:
            if source.problem is None and source.etag and source.uri in unchanged:
                return unchanged[source.uri], None
            identity, problem = identify(source)
            before = at_address.get(source.uri, set()) - {unreadable_id(source.uri)}
            if problem is None and before and identity not in before and not self._take_changed:
                problem = MediaError(
                    ErrorKind.SOURCE_CHANGED,
                    f"{source.uri} held video {min(before)} when it was entered and holds {identity} now{self._advice}",
                    self._step,
                )
            return identity, problem

        with ThreadPoolExecutor(self._readers) as pool:
            return list(pool.map(look, sources))

    def states(self, ids: Collection[str]) -> dict[str, VideoState]:
        """Of those videos that the catalog has."""
        rows = self._rows(ids, ("status", "error_kind", "fingerprint", "run_id"))
        return {video_id: VideoState(*state) for video_id, *state in rows.iter_rows()}

    def unfinished(self, videos: Iterable[Video]) -> list[Video]:
        """Those that are to be entered: the catalog has them not, or there is more to be done."""
        videos = list(videos)
        states = self.states({video.video_id for video in videos})
        return [v for v in videos if v.video_id not in states or states[v.video_id].is_open]

    def clips_of(self, ids: Collection[str]) -> pl.DataFrame:
        """Clips that count: clip_id, video_id, and whether it is `whole`, all frames of its video."""
        frames = self._rows(ids, ("num_frames",)).rename({"num_frames": "frames"})
        whole = (pl.col("start_frame") == 0) & (pl.col("num_frames") == pl.col("frames"))
        clips = self.catalog.finished_clips().filter(pl.col("video_id").is_in(list(ids)))
        return clips.join(frames.lazy(), on="video_id").select("clip_id", "video_id", whole.alias("whole")).collect()

    def register(self, videos: Sequence[Video]) -> None:
        """Add videos, as pending or with their failure; those that the catalog has gain addresses and attributes."""
        self._write_addresses(videos)
        self._drop_placeholders(videos)

    def note(self, videos: Sequence[Video]) -> None:
        """Videos that the catalog has gain addresses, attributes that they lack, and captions."""
        self._write_addresses(videos, only="update")
        self._write_captions(videos)

    def move_addresses(self, content: Mapping[str, str]) -> None:
        """Content that an address held before loses the address to the content it holds now (uri -> video_id)."""
        before = self._known.filter(pl.col("uri").is_in(list(content))).select("uri", "video_id").iter_rows()
        lost = {(video_id, uri) for uri, video_id in before if content[uri] != video_id}

        def without_lost(rows: pl.DataFrame, table: pl.LazyFrame) -> pl.DataFrame:
            old = self._rows(rows["video_id"].to_list(), ("uris",), table)
            kept = [[u for u in uris if (video_id, u["uri"]) not in lost] for video_id, uris in old.iter_rows()]
            return old.with_columns(pl.Series("uris", kept, URIS))

        rows = [{"video_id": video_id} for video_id in sorted({video_id for video_id, _ in lost})]
        self.catalog.upsert("videos", rows, only="update", revise=without_lost)

    def reopen(self, ids: Collection[str]) -> None:
        """Videos to be done again become pending: until they are done their old clips do not count."""
        cleared = dict.fromkeys(("error_stage", "error_kind", "error", "run_id"))
        rows = [{"video_id": video_id, "status": "pending", **cleared} for video_id in ids]
        self.catalog.upsert("videos", rows, only="update", when={"status": ("ok", "quarantined")})

    def finish(self, videos: Sequence[Video]) -> dict[str, int]:
        """Commit what became of registered videos.

        Returns:
            clips of each video that no other run has finished meanwhile.
        """
        if not videos:
            return {}
        videos = self._append_clips(videos)
        rows = full_rows("videos", [self._finished_row(video) for video in videos])
        self.catalog.upsert("videos", rows, only="update", when={"status": ("pending",)}, change=FINISHED)
        return self._finished_here(videos)

    def enter(self, videos: Sequence[Video]) -> dict[str, int]:
        """Commit finished videos, registered before or not, with their addresses, attributes, clips and captions.

        Returns:
            clips of each video that no other run has finished meanwhile.
        """
        if not videos:
            return {}
        videos = self._append_clips(videos)
        rows = full_rows("videos", [{**v.attributes, **self._finished_row(v), **self._place(v)} for v in videos])
        self.catalog.upsert("videos", rows, when={"status": ("pending", "quarantined")}, revise=self._with_addresses)
        self._drop_placeholders(videos)
        entered = self._finished_here(videos)
        self._write_captions([video for video in videos if video.video_id in entered])
        return entered

    def sweep(self) -> int:
        """Delete clips that can never count, and their embeddings; how many clips."""
        self._sweep("embeddings")
        return self._sweep("clips")

    # Every read of the table `videos` is one of these three.

    def _addresses(self) -> pl.DataFrame:
        """Every address in the catalog, with the content last seen there."""
        rows = self.catalog.scan("videos").select("video_id", "uris").explode("uris").unnest("uris")
        return rows.select("uri", "size", "etag", "video_id").collect()

    def _rows(self, ids: Collection[str], columns: Sequence[str], table: pl.LazyFrame | None = None) -> pl.DataFrame:
        """Columns of some videos, in the catalog as it is now or in a version that is merged into."""
        rows = self.catalog.scan("videos") if table is None else table
        return rows.filter(pl.col("video_id").is_in(list(ids))).select("video_id", *columns).collect()

    def _winners(self) -> pl.LazyFrame:
        """The run that finished each video."""
        done = self.catalog.scan("videos").filter(pl.col("status") != "pending")
        return done.select("video_id", pl.col("run_id").alias("winner"))

    # Writing.

    def _append_clips(self, videos: Sequence[Video]) -> list[Video]:
        """Append rows of clips, and of their embeddings; gives the videos without what was forgotten."""
        forgotten = Forgotten.read(self.catalog)
        left = []
        for video in videos:
            if video.video_id in forgotten.videos:
                continue
            clips = forgotten.without([self._clip_row(video, clip) for clip in video.clips])
            ids = {clip["clip_id"] for clip in clips}
            embeddings = [row for row in video.embeddings if row["clip_id"] in ids]
            captions = {clip: caption for clip, caption in video.captions.items() if clip in ids}
            left.append(replace(video, clips=clips, embeddings=embeddings, captions=captions))
        self.catalog.append("embeddings", [row for video in left for row in video.embeddings])
        self.catalog.append("clips", [clip for video in left for clip in video.clips])
        return left

    def _clip_row(self, video: Video, clip: dict) -> dict:
        lists = {name: clip.get(name) or [] for name in ("errors", "stage_versions")}
        split = clip.get("split") or split_of(video.video_id, *self._holdout)
        return {**clip, **self._key(video), **lists, "run_id": self.run_id, "split": split}

    def _finished_row(self, video: Video) -> dict:
        row = {
            **video.columns,
            "video_id": video.video_id,
            "fingerprint": self._fingerprint,
            "run_id": self.run_id,
            "finished_at": datetime.now(UTC),
            "clip_count": len(video.clips),
            "status": "ok",
        }
        return row if video.failure is None else {**row, **self._failure(video.failure)}

    def _registered_row(self, video: Video, addresses: list[dict]) -> dict:
        row = {**video.attributes, **self._key(video), "uris": _merged(addresses, _addresses(video.sources))}
        if video.failure is None:
            return {**row, "status": "pending"}
        return {**row, **self._failure(video.failure), "clip_count": 0}

    def _failure(self, failure: MediaError) -> dict:
        return {
            "status": "quarantined",
            "error_stage": failure.stage,
            "error_kind": str(failure.kind),
            "error": failure.message,
            "run_id": self.run_id,
            "finished_at": datetime.now(UTC),
        }

    def _key(self, video: Video) -> dict:
        return {"video_id": video.video_id, "shard": self.catalog.shard_of(video.video_id)}

    def _place(self, video: Video) -> dict:
        return {**self._key(video), "uris": _merged([], _addresses(video.sources))}

    def _write_addresses(self, videos: Sequence[Video], only: Only | None = None) -> None:
        def changed(_: pl.DataFrame, table: pl.LazyFrame) -> pl.DataFrame:
            rows = self._rows([v.video_id for v in videos], ("uris", *ATTRIBUTES), table)
            old = {row["video_id"]: row for row in rows.iter_rows(named=True)}
            new = [self._registered_row(v, old[v.video_id]["uris"] if v.video_id in old else []) for v in videos]
            new = [row for row in new if only != "update" or row["video_id"] in old]
            return full_rows("videos", [row for row in new if _is_news(row, old.get(row["video_id"]))])

        rows = [{"video_id": video.video_id} for video in videos]
        self.catalog.upsert("videos", rows, only=only, change=("uris", *ATTRIBUTES), fill=ATTRIBUTES, revise=changed)

    def _with_addresses(self, rows: pl.DataFrame, table: pl.LazyFrame) -> pl.DataFrame:
        """The rows, with the addresses that the table has of these videos too."""
        old = dict(self._rows(rows["video_id"].to_list(), ("uris",), table).iter_rows())
        merged = [
            _merged(old.get(video_id) or [], uris) for video_id, uris in rows.select("video_id", "uris").iter_rows()
        ]
        return rows.with_columns(pl.Series("uris", merged, URIS))

    def _drop_placeholders(self, videos: Sequence[Video]) -> None:
        """Delete rows that stood for addresses which could not be read once, and can now."""
        readable = {unreadable_id(s.uri) for v in videos for s in v.sources if v.video_id != unreadable_id(s.uri)}
        stale = sorted(readable & set(self._known["video_id"]))
        if stale:
            self.catalog.delete("videos", f"video_id IN {sql_list(stale)}")
            self._known = self._known.filter(~pl.col("video_id").is_in(stale))

    def _finished_here(self, videos: Sequence[Video]) -> dict[str, int]:
        runs = dict(self._rows([video.video_id for video in videos], ("run_id",)).iter_rows())
        return {v.video_id: len(v.clips) for v in videos if runs.get(v.video_id) == self.run_id}

    def _write_captions(self, videos: Sequence[Video]) -> None:
        captions = {clip: caption for video in reversed(videos) for clip, caption in video.captions.items()}
        self.captions += enter_captions(self.catalog, self.run_id, captions, IMPORTED)

    def _sweep(self, table: str) -> int:
        clips = self.catalog.scan(table).select("shard", "video_id", "run_id").unique()
        stray = clips.join(self._winners(), on="video_id").filter(pl.col("run_id") != pl.col("winner")).collect()
        deleted = 0
        for (shard, run_id), group in stray.group_by("shard", "run_id"):
            ids = group["video_id"].to_list()
            for start in range(0, len(ids), DELETE_AT_ONCE):
                some = sql_list(ids[start : start + DELETE_AT_ONCE])
                where = f"shard = {quoted(shard)} AND run_id = {quoted(run_id)} AND video_id IN {some}"
                deleted += self.catalog.delete(table, where)
        return deleted


def _addresses(sources: Sequence[Source]) -> list[dict]:
    return [{"uri": s.uri, "size": s.size, "etag": s.etag} for s in sources]


def _merged(old: Iterable[dict], new: Iterable[dict]) -> list[dict]:
    by_uri = {address["uri"]: address for address in [*old, *new]}
    return [by_uri[uri] for uri in sorted(by_uri)]


def _is_news(row: dict, old: dict | None) -> bool:
    """Whether a video is new, or has an address or an attribute that the catalog has not."""
    if old is None or row["uris"] != old["uris"]:
        return True
    return any(old[name] is None and row.get(name) is not None for name in ATTRIBUTES)
