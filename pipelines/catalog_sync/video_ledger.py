"""The commit protocol: which videos there are, which are to be done, and how finished ones enter the catalog.

1. `register` adds videos as `pending` (one commit a wave); a known content at a new address only gains the
   address.
2. `finish` appends the clips of finished videos (and their embeddings), then turns their `videos` rows `ok`, with the
   run that made the clips: that second commit is what counts. Readers take a clip only if its `run_id` is its
   video's; so clips appended by a run that was killed in between, or that lost to another run on the same
   video, are never seen.
3. `sweep` deletes such clips, once their video was finished by another run. Clips of pending videos are
   left alone: their run may be alive.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import polars as pl

from catalogs.records.split import split_of
from catalogs.records.tombstones import Forgotten
from catalogs.tables.arrow_types import full_rows, polars_schema
from catalogs.tables.catalog import Catalog
from catalogs.tables.sql_text import sql_list
from datakit.errors import ErrorKind, MediaError
from datakit.identity import unreadable_id
from datakit.source import Source, identify
from pipelines.catalog_sync.embeddings import derived, embedding_identity
from pipelines.catalog_sync.score_writer import embedding_rows
from pipelines.settings import Settings
from pipelines.stages.registry import STAGES, enabled_stages, fingerprint

ATTRIBUTES = ("license", "source_url", "attribution", "source_caption", "extra")
URI_TYPE = polars_schema("videos")["uris"]
DELETE_AT_ONCE = 500


@dataclass(frozen=True)
class VideoTask:
    """A pending video that this run is to process."""

    video_id: str
    uri: str
    size: int
    shard: str


@dataclass
class Counts:
    """What a run did, in videos; every source it saw is in exactly one of these."""

    sources: int = 0
    same_content: int = 0  # further addresses of a video already seen in this run
    registered: int = 0  # handed to the workers
    done_before: int = 0
    quarantined_before: int = 0
    quarantined_at_once: int = 0  # unreadable, empty, changed
    ok: int = 0
    quarantined: int = 0
    done_by_another: int = 0
    forgotten: int = 0  # by `datakit catalog forget`: not registered
    clips: int = 0


@dataclass(frozen=True)
class Finished:
    """A video that left the workers: its clip rows and its columns, or its failure."""

    video_id: str
    rows: list[dict]
    columns: dict[str, object]
    failure: MediaError | None = None


class Ledger:
    """Registers and finishes the videos of one run.

    Args:
        retry_failed: whether quarantined videos are done again, and changed sources taken as new ones.
    """

    def __init__(self, catalog: Catalog, run_id: str, settings: Settings, retry_failed: bool = False):
        self.catalog = catalog
        self.run_id = run_id
        self.counts = Counts()
        self.seen: set[str] = set()
        self._settings = settings
        self._retry_failed = retry_failed
        self._fingerprint = fingerprint("shots", settings)
        names = [name for name in enabled_stages(settings) if name not in derived(STAGES)]
        self._stage_versions = [{"stage": name, "fingerprint": fingerprint(name, settings)} for name in names]
        self._embedding = embedding_identity(settings) if "embed" in names else ("", "", "")
        self._pool = ThreadPoolExecutor(settings.runner.scan_threads)
        self._known = self._read_known()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def register(self, wave: Sequence[Source]) -> list[VideoTask]:
        """Enter a wave of sources; gives the videos to process."""
        self.counts.sources += len(wave)
        found: dict[str, list[Source]] = {}
        problems: dict[str, MediaError] = {}
        for source, (identity, problem) in zip(wave, self._identify(wave), strict=True):
            if identity in self.seen or identity in found:
                self.counts.same_content += 1
            found.setdefault(identity, []).append(source)
            if problem is not None:
                problems.setdefault(identity, problem)
        self._leave_out_forgotten(found)
        self._upsert(found, problems)
        if self._retry_failed:
            self._move_addresses({s.uri: identity for identity, sources in found.items() for s in sources})
        return self._choose(found, problems)

    def _leave_out_forgotten(self, found: dict[str, list[Source]]) -> None:
        """What was forgotten does not come back."""
        for identity in Forgotten.read(self.catalog).videos & set(found):
            del found[identity]
            if identity not in self.seen:
                self.seen.add(identity)
                self.counts.forgotten += 1

    def finish(self, finished: Sequence[Finished]) -> None:
        """The commits of the protocol."""
        forgotten = Forgotten.read(self.catalog)
        finished = [replace(video, rows=forgotten.without(video.rows)) for video in finished]
        rows = [self._clip_row(row) for video in finished if video.failure is None for row in video.rows]
        self.catalog.append("embeddings", embedding_rows(rows, *self._embedding))
        self.catalog.append("clips", rows)
        self._mark_finished(finished)

    def sweep(self) -> int:
        """Delete clips that can never count, and their embeddings; how many clips."""
        self._sweep("embeddings")
        return self._sweep("clips")

    def _sweep(self, table: str) -> int:
        clips = self.catalog.scan(table).select("shard", "video_id", "run_id").unique()
        done = (
            self.catalog.scan("videos")
            .filter(pl.col("status") != "pending")
            .select("video_id", pl.col("run_id").alias("winner"))
        )
        stray = clips.join(done, on="video_id").filter(pl.col("run_id") != pl.col("winner")).collect()
        deleted = 0
        for (shard, run_id), group in stray.group_by("shard", "run_id"):
            ids = group["video_id"].to_list()
            for start in range(0, len(ids), DELETE_AT_ONCE):
                some = sql_list(ids[start : start + DELETE_AT_ONCE])
                deleted += self.catalog.delete(
                    table,
                    f"shard = {sql_list([shard])[1:-1]} AND run_id = {sql_list([run_id])[1:-1]} AND video_id IN {some}",
                )
        return deleted

    def _read_known(self) -> pl.DataFrame:
        """Every address in the catalog, with the content last seen there."""
        return (
            self.catalog.scan("videos")
            .select("video_id", "uris")
            .explode("uris")
            .unnest("uris")
            .select("uri", "size", "etag", "video_id")
            .collect()
        )

    def _identify(self, wave: Sequence[Source]) -> list[tuple[str, MediaError | None]]:
        """Identity of each source: remembered where address, size and etag are known, else by reading."""
        asked = pl.DataFrame(
            {"uri": [s.uri for s in wave], "size": [s.size for s in wave], "etag": [s.etag for s in wave]},
            schema={"uri": pl.String, "size": pl.Int64, "etag": pl.String},
        )
        by_state = dict(asked.join(self._known, on=["uri", "size", "etag"]).select("uri", "video_id").iter_rows())
        at_address: dict[str, set[str]] = {}
        for uri, known in asked.join(self._known, on="uri", suffix="_k").select("uri", "video_id").iter_rows():
            at_address.setdefault(uri, set()).add(known)

        def look(source: Source) -> tuple[str, MediaError | None]:
            if source.problem is None and source.uri in by_state and source.etag:
                return by_state[source.uri], None
            identity, problem = identify(source)
            before = at_address.get(source.uri, set()) - {unreadable_id(source.uri)}
            if problem is None and before and identity not in before and not self._retry_failed:
                problem = MediaError(
                    ErrorKind.SOURCE_CHANGED,
                    f"{source.uri} held video {min(before)} when it was ingested and holds {identity} now: put the old "
                    "file back, `datakit catalog relink` it, or take the new one with --retry-failed",
                    "scan",
                )
            return identity, problem

        return list(self._pool.map(look, wave))

    def _upsert(self, found: dict[str, list[Source]], problems: dict[str, MediaError]) -> None:
        readable = [s.uri for identity, sources in found.items() if identity not in problems for s in sources]

        def changed(_: pl.DataFrame, table: pl.LazyFrame) -> pl.DataFrame:
            old = dict(
                table.filter(pl.col("video_id").is_in(list(found))).select("video_id", "uris").collect().iter_rows()
            )
            rows = [
                self._video_row(identity, sources, problems.get(identity), old.get(identity))
                for identity, sources in found.items()
            ]
            return full_rows("videos", [row for row in rows if row["uris"] != old.get(row["video_id"])])

        rows = pl.DataFrame({"video_id": list(found)})
        self.catalog.upsert("videos", rows, revise=changed, change=("uris", *ATTRIBUTES), fill=ATTRIBUTES)
        placeholders = [unreadable_id(uri) for uri in readable]
        stale = set(self._known["video_id"]) & set(placeholders)
        if stale:  # sources that could not be read once, and can now
            self.catalog.delete("videos", f"video_id IN {sql_list(sorted(stale))}")
            self._known = self._known.filter(~pl.col("video_id").is_in(list(stale)))

    def _move_addresses(self, now: dict[str, str]) -> None:
        """Content that a source held before loses the address to the content it holds now."""
        moved = self._known.filter(pl.col("uri").is_in(list(now))).select("uri", "video_id").iter_rows()
        lost = {(video_id, uri) for uri, video_id in moved if now[uri] != video_id}
        if not lost:
            return

        def without_lost(rows: pl.DataFrame, table: pl.LazyFrame) -> pl.DataFrame:
            old = (
                table.filter(pl.col("video_id").is_in(rows["video_id"].implode())).select("video_id", "uris").collect()
            )
            kept = [[u for u in uris if (v, u["uri"]) not in lost] for v, uris in old.iter_rows()]
            return old.with_columns(pl.Series("uris", kept, URI_TYPE))

        rows = pl.DataFrame({"video_id": sorted({v for v, _ in lost})})
        self.catalog.upsert("videos", rows, only="update", revise=without_lost)

    def _video_row(self, identity: str, sources: list[Source], problem: MediaError | None, old: list | None) -> dict:
        uris = {u["uri"]: u for u in old or []}
        uris.update({s.uri: {"uri": s.uri, "size": s.size, "etag": s.etag} for s in sources})
        row: dict[str, object] = {
            "video_id": identity,
            "uris": [uris[uri] for uri in sorted(uris)],
            "shard": self.catalog.shard_of(identity),
        }
        for source in reversed(sources):
            row.update(source.attributes)
        if problem is None:
            return {**row, "status": "pending"}
        return {**row, **self._failure_columns(problem), "clip_count": 0}

    def _choose(self, found: dict[str, list[Source]], problems: dict[str, MediaError]) -> list[VideoTask]:
        new = {identity: sources for identity, sources in found.items() if identity not in self.seen}
        self.seen.update(new)
        state = (
            self.catalog.scan("videos")
            .filter(pl.col("video_id").is_in(list(new)))
            .select("video_id", "status", "fingerprint", "run_id")
            .collect()
        )
        chosen, again = [], []
        for video_id, status, done_with, run_id in state.iter_rows():
            if status == "quarantined" and run_id == self.run_id:
                self.counts.quarantined_at_once += 1
            elif status == "quarantined" and (video_id in problems or not self._retry_failed):
                self.counts.quarantined_before += 1
            elif status == "ok" and done_with == self._fingerprint:
                self.counts.done_before += 1
            else:
                chosen.append(video_id)
                if status != "pending":
                    again.append(video_id)
        if again:
            self._reopen(again)
        self.counts.registered += len(chosen)
        first = {identity: sources[0] for identity, sources in new.items()}
        return [VideoTask(i, first[i].uri, first[i].size or 0, self.catalog.shard_of(i)) for i in chosen]

    def _reopen(self, ids: list[str]) -> None:
        """Videos to be done again become pending: until they are done their old clips do not count."""
        cleared = dict.fromkeys(("error_stage", "error_kind", "error", "run_id"))
        rows = [{"video_id": video_id, "status": "pending", **cleared} for video_id in ids]
        self.catalog.upsert("videos", rows, only="update", when={"status": ("ok", "quarantined")})

    def _clip_row(self, row: dict) -> dict:
        split = split_of(row["video_id"], self._settings.catalog.val, self._settings.catalog.test)
        return {**row, "split": split, "stage_versions": self._stage_versions, "run_id": self.run_id}

    def _mark_finished(self, finished: Sequence[Finished]) -> None:
        now = datetime.now(UTC)
        rows = []
        for video in finished:
            common = {
                "video_id": video.video_id,
                "run_id": self.run_id,
                "finished_at": now,
                "fingerprint": self._fingerprint,
            }
            if video.failure is None:
                rows.append({**common, **video.columns, "status": "ok", "clip_count": len(video.rows)})
            else:
                rows.append({**common, **self._failure_columns(video.failure), "clip_count": 0})
        types = polars_schema("videos")
        kept = ("uris", "shard", "license", "source_url", "attribution", "source_caption", "extra", "video_id")
        source = pl.DataFrame(rows, schema={n: t for n, t in types.items() if n not in kept or n == "video_id"})
        self.catalog.upsert("videos", source, only="update", when={"status": ("pending",)})
        ids = [video.video_id for video in finished]
        won = set(
            self.catalog.scan("videos")
            .filter(pl.col("video_id").is_in(ids) & (pl.col("run_id") == self.run_id))
            .select("video_id")
            .collect()["video_id"]
        )
        for video in finished:
            if video.video_id not in won:
                self.counts.done_by_another += 1
            elif video.failure is None:
                self.counts.ok += 1
                self.counts.clips += len(video.rows)
            else:
                self.counts.quarantined += 1

    def _failure_columns(self, failure: MediaError) -> dict[str, object]:
        return {
            "status": "quarantined",
            "error_stage": failure.stage,
            "error_kind": str(failure.kind),
            "error": failure.message,
            "run_id": self.run_id,
            "finished_at": datetime.now(UTC),
        }
