"""`datakit catalog forget`: clips or whole sources leave every version of every table. Everything else stays readable
under the version numbers that it had, tags and recorded selections included.

What is to go is first recorded in the table `forgotten`, as spans of videos, and everything that follows is derived
from it: killed at any point, the same command (or one that names nothing) completes it, and no ingest brings it back.
Tables are rewritten one after the other (see `catalogs.maintenance.delta_rewrite`), `clips` and `videos` last, as they
say what belongs to a span.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property

import polars as pl

from catalogs.maintenance.delta_rewrite import Edit, check_rewritable, data_files, read_columns, rewrite
from catalogs.query.selection import Selection
from catalogs.query.snapshots import author, check_writable
from catalogs.query.where import columns_of, parse_where
from catalogs.records.runs import RunRecord
from catalogs.records.tombstones import SPAN, Forgotten, spans
from catalogs.tables.catalog import Catalog
from catalogs.tables.delta_log import Log
from catalogs.tables.object_store import Storage
from catalogs.tables.schema import PARTITIONED, TABLES
from datakit.errors import CatalogError, DatakitError

BY_CLIP = ("decisions", "captions", "embeddings", "marks", "losses")
CLIP = (
    "clip_id",
    "video_id",
    "run_id",
    "stream",
    "start_pts",
    "end_pts",
    "start_s",
    "end_s",
    "path",
    "duplicate_group",
    "duplicate_of",
)
PASSES = 4
"""Rounds until no version has the rows: more than one only when others wrote meanwhile."""
FILES = "clip_files"
REPLACED = "(forgotten)"


@dataclass
class Plan:
    """What a forget takes away.

    Attributes:
        videos: forgotten as a whole.
        clips: that any version has; `hours` of footage; `captions` about them.
        versions: table -> versions that have such rows; `files` that hold them, in all tables.
        sources: addresses of the videos; these files are not touched.
        selections: recorded selections that shrink: `tag NAME` or `run ID` -> clips it loses (None: it cannot be read
            any more).
        checkpoints: that runs wrote which trained on such clips.
        copies: other clips that are recorded as near-duplicates of these.
    """

    videos: list[str] = field(default_factory=list)
    clips: int = 0
    hours: float = 0.0
    captions: int = 0
    versions: dict[str, int] = field(default_factory=dict)
    files: int = 0
    clip_files: int = 0
    sources: list[str] = field(default_factory=list)
    selections: dict[str, int | None] = field(default_factory=dict)
    checkpoints: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)

    def as_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Request:
    """What somebody asks to be forgotten: clip ids, sources (addresses or video ids), a condition over the view
    `clips`."""

    clips: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    where: str | None = None


class Forgetting:
    """One forget: look, ask, do.

    Raises:
        CatalogError: nothing like that in any version; or the past of a table cannot be found out. Nothing was changed.
    """

    def __init__(self, catalog: Catalog, request: Request):
        check_writable(catalog)
        self.catalog, self.storage = catalog, Storage(catalog.root)
        for name in TABLES:
            check_rewritable(self.storage, name)
        self._before = Forgotten.read(catalog)
        rows = self._named(request)
        self._new = rows.join(self._before.rows, on=list(SPAN), how="anti", nulls_equal=True)
        self._all = self._before.with_rows(self._new)
        self._clips, self._ids = self._doomed()
        self._addresses = self._find_addresses()
        self.plan = self._plan()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing left to do."""
        return not (self._new.height or self.plan.files)

    def run(self, reason: str | None = None) -> int:
        """Do it; gives how many files wait for a later call, as they may belong to a writer at work."""
        record = RunRecord(
            self.catalog, "forget", {"videos": self.plan.videos, "clips": self.plan.clips, "reason": reason}
        )
        with record.running() as counts:
            self._record(reason)
            waiting = self._rewrite_all()
            counts.update(
                {
                    **self.plan.as_dict(),
                    "sources": len(self.plan.sources),
                    "copies": len(self.plan.copies),
                    "waiting": waiting,
                }
            )
        return waiting

    # what is meant

    def _named(self, request: Request) -> pl.DataFrame:
        """The spans (or whole videos) that were asked for."""
        found = [self._by_clip(request.clips), self._by_source(request.sources)]
        if request.where is not None:
            parse_where(request.where)
            chosen = self.catalog.clips(columns={"clip_id", *SPAN, *columns_of(request.where)}).filter(
                parse_where(request.where)
            )
            with self.catalog.reading():
                found.append(spans(chosen.select(SPAN).collect()))
        return pl.concat(found).unique().sort(SPAN)

    def _by_clip(self, ids: Sequence[str]) -> pl.DataFrame:
        if not ids:
            return spans()
        rows = self._read("clips", ("clip_id", *SPAN)).filter(pl.col("clip_id").is_in(list(ids)))
        missing = sorted(set(ids) - set(rows["clip_id"]) - self._before.clip_ids())
        if missing:
            raise CatalogError(f"no version of the catalog has clip {missing[0]}")
        return spans(rows)

    def _by_source(self, sources: Sequence[str]) -> pl.DataFrame:
        if not sources:
            return spans()
        known = (
            self._read("videos", ("video_id", "uris"))
            .explode("uris")
            .with_columns(uri=pl.col("uris").struct.field("uri"))
        )
        ids: list[str] = []
        for source in sources:
            address = source if "://" in source else os.path.abspath(source)
            here = (
                known.filter((pl.col("video_id") == source) | pl.col("uri").is_in([source, address]))["video_id"]
                .unique()
                .to_list()
            )
            if not here and source not in self._before.videos and not self._unfinished():
                raise CatalogError(
                    f"no version of the catalog has a video {source} (an address as `videos.uris` has it, or a "
                    f"video_id)"
                )
            ids += here
        return spans(pl.DataFrame({"video_id": ids}, schema={"video_id": pl.String}))

    def _unfinished(self) -> bool:
        """Whether a forget was killed: its addresses may be gone already."""
        runs = (
            self.catalog.scan("runs")
            .filter(pl.col("pipeline") == "forget")
            .select("status")
            .collect()["status"]
            .to_list()
        )
        return any(status != "finished" for status in runs)

    # what there is of it

    def _read(self, table: str, columns: tuple[str, ...], shards: frozenset[str] | None = None) -> pl.DataFrame:
        """Columns of every data file of a table, of all versions."""
        frames = [read_columns(self.storage, path, columns) for path in data_files(self.storage, table, shards)]
        empty = self.catalog.scan(table).select(columns).limit(0).collect()
        return pl.concat(
            [empty, *(f.cast({n: t for n, t in empty.schema.items() if f.schema[n] != t}) for f in frames if f.height)]
        )

    def _doomed(self) -> tuple[pl.DataFrame, set[str]]:
        """Rows of `clips`, of any version, that go, and the ids of all clips that are known to go."""
        rows = self._read("clips", CLIP, self._shards())
        rows = rows.filter(self._all.covers(rows))
        return rows, set(rows["clip_id"]) | self._all.clip_ids()

    def _find_addresses(self) -> list[str]:
        whole = self._read("videos", ("video_id", "uris")).filter(
            pl.col("video_id").is_in(list(self._all.videos | self._all.partly))
        )
        found = (
            whole.explode("uris")
            .select(pl.col("uris").struct.field("uri").alias("uri"), "video_id")
            .drop_nulls()
            .unique()
        )
        self._forgotten_uris = found.filter(pl.col("video_id").is_in(list(self._all.videos)))["uri"].to_list()
        new = set(self._new["video_id"]) | set(self._clips["video_id"])
        return sorted(set(found.filter(pl.col("video_id").is_in(list(new)))["uri"]))

    def _shards(self) -> frozenset[str]:
        return frozenset(self.catalog.shard_of(v) for v in self._all.videos | self._all.partly)

    def _plan(self) -> Plan:
        once = self._clips.unique("clip_id")
        captions = self._read("captions", ("caption_id", "clip_id"), self._shards()).filter(
            pl.col("clip_id").is_in(self._ids)
        )
        plan = Plan(
            videos=sorted(set(self._new.filter(pl.col("stream").is_null())["video_id"])),
            clips=once.height,
            hours=float((once["end_s"] - once["start_s"]).sum() or 0) / 3600,
            captions=captions["caption_id"].n_unique(),
            clip_files=once["path"].drop_nulls().n_unique(),
            sources=self._addresses,
        )
        for name, edit in self._edits().items():
            dirty = self._files_of(name, edit)
            plan.files += len(dirty)
            if dirty:
                plan.versions[name] = sum(
                    not dirty.isdisjoint(state.files) for state in Log(self.storage, name).states()
                )
        self._find_selections(plan)
        plan.copies = self._copies()
        return plan

    def _files_of(self, table: str, edit: Edit) -> set[str]:
        """Files of a table, below its folder, that an edit changes."""
        paths = data_files(self.storage, table, edit.shards)
        return {
            path[len(table) + 1 :]
            for path in paths
            if not _keeps_all(edit, read_columns(self.storage, path, edit.columns))
        }

    def _find_selections(self, plan: Plan) -> None:
        """Selections that were recorded by tags and runs and that had any of these clips."""
        tags = self.catalog.scan("tags").filter(pl.col("content_hash").is_not_null()).collect()
        runs = (
            self.catalog.scan("runs")
            .filter(pl.col("selection").is_not_null())
            .select("run_id", "selection", "checkpoints")
            .collect()
        )
        recorded = [
            (
                f"tag {t['name']}",
                {"versions": json.loads(t["versions"]), "where": t["where"], "columns": t["columns"]},
                [],
            )
            for t in tags.iter_rows(named=True)
        ]
        recorded += [
            (f"run {r['run_id']}", json.loads(r["selection"]), r["checkpoints"] or [])
            for r in runs.iter_rows(named=True)
        ]
        ids = pl.LazyFrame({"clip_id": list(self._ids)}, schema={"clip_id": pl.String})
        for name, selection, checkpoints in recorded:
            try:
                rows = Selection.from_dict(self.catalog, selection).rows(["clip_id"])
                with self.catalog.reading():
                    lost = rows.join(ids, on="clip_id", how="semi").select(pl.len()).collect().item()
            except DatakitError:
                lost = None
            if lost != 0:
                plan.selections[name] = lost
                plan.checkpoints += [c["path"] for c in checkpoints if c["path"] not in plan.checkpoints]

    def _copies(self) -> list[str]:
        """Clips that stay and that `run dedup` found to be near-duplicates of clips that go."""
        groups = self._clips["duplicate_group"].drop_nulls().unique().to_list()
        with self.catalog.reading():
            rows = (
                self.catalog.finished_clips()
                .filter(pl.col("duplicate_group").is_in(groups) | pl.col("duplicate_of").is_in(list(self._ids)))
                .select("clip_id")
                .collect()
            )
        return sorted(set(rows["clip_id"]) - self._ids)

    # doing it

    def _record(self, reason: str | None) -> None:
        now = datetime.now(UTC)
        self.catalog.append(
            "forgotten",
            [
                {**row, "seen_by": self.plan.checkpoints, "reason": reason, "author": author(), "created_at": now}
                for row in self._new.iter_rows(named=True)
            ],
        )

    def _rewrite_all(self) -> int:
        """Every table, until none has such a row."""
        clean: dict[str, set[str]] = {name: set() for name in TABLES}
        waiting = 0
        for _ in range(PASSES):
            changed = waiting = 0
            for name, edit in self._edits().items():
                if name == "clips":
                    self._delete_clip_files()
                done = rewrite(self.storage, name, edit, clean[name])
                changed, waiting = changed + done.files, waiting + done.waiting
            if not changed:
                break
            rows, ids = self._doomed()  # others may have written meanwhile
            self._clips, self._ids = rows, self._ids | ids
            self.__dict__.pop("_clips_left", None)
        return waiting

    def _edits(self) -> dict[str, Edit]:
        """What becomes of every table, in the order of doing. What says
        which clips and which addresses a video has goes after what has to be found by that."""
        shards = self._shards()
        edits = {
            name: Edit(self._keys(name), self._keep_others, shards if name in PARTITIONED else None) for name in BY_CLIP
        }
        edits["latents"] = Edit(("clip_id", *SPAN), self._keep_other_latents)
        edits["clips"] = Edit(SPAN, lambda rows: (~self._all.covers(rows), {}), shards)
        edits["runs"] = Edit(("config", "counts"), self._without_addresses)
        edits["videos"] = Edit(("video_id", "run_id", "status", "clip_count"), self._keep_other_videos)
        return edits

    def _keys(self, table: str) -> tuple[str, ...]:
        return ("clip_id", "video_id") if table == "embeddings" else ("clip_id",)

    def _keep_others(self, rows: pl.DataFrame) -> tuple[pl.Series, dict[str, pl.Series]]:
        goes = rows["clip_id"].is_in(self._id_series())
        if "video_id" in rows.columns:
            goes = goes | rows["video_id"].is_in(list(self._all.videos))
        return ~goes.fill_null(False), {}

    def _keep_other_latents(self, rows: pl.DataFrame) -> tuple[pl.Series, dict[str, pl.Series]]:
        """They know their spans: also those of clips that no version has any more go."""
        return ~(self._all.covers(rows) | rows["clip_id"].is_in(self._id_series())), {}

    def _id_series(self) -> pl.Series:
        return pl.Series(list(self._ids), dtype=pl.String).implode()

    def _keep_other_videos(self, rows: pl.DataFrame) -> tuple[pl.Series, dict[str, pl.Series]]:
        """Whole videos go; of others the number of clips becomes that of the clips that stay."""
        stays = ~rows["video_id"].is_in(list(self._all.videos))
        if rows["video_id"].is_in(list(self._all.partly)).any():
            joined = rows.join(self._clips_left, on=["video_id", "run_id"], how="left", maintain_order="left")
            partly = pl.col("video_id").is_in(list(self._all.partly)) & (pl.col("status") == "ok")
            fewer = pl.min_horizontal("clip_count", pl.col("left").fill_null(0))
            counts = joined.select(pl.when(partly).then(fewer).otherwise("clip_count")).to_series()
            if not counts.equals(rows["clip_count"], null_equal=True):
                return stays, {"clip_count": counts.cast(pl.Int32)}
        return stays, {}

    @cached_property
    def _clips_left(self) -> pl.DataFrame:
        """How many clips of partly forgotten videos stay, by the run that made them: `left`."""
        rows = self._read("clips", ("clip_id", "run_id", *SPAN), self._shards()).filter(
            pl.col("video_id").is_in(list(self._all.partly))
        )
        return (
            rows.filter(~self._all.covers(rows))
            .group_by("video_id", "run_id")
            .agg(pl.col("clip_id").n_unique().alias("left"))
        )

    def _without_addresses(self, rows: pl.DataFrame) -> tuple[pl.Series, dict[str, pl.Series]]:
        """Sources that a run was given by their very address."""
        changed = {}
        for name, change in (("config", _without_sources), ("counts", _without_text)):
            new = [text and change(text, self._forgotten_uris) for text in rows[name].to_list()]
            if new != rows[name].to_list():
                changed[name] = pl.Series(new, dtype=pl.String)
        return pl.Series([True]).new_from_index(0, rows.height), changed

    def _delete_clip_files(self) -> None:
        """Files of clips, and nothing that is not below the catalog's folder of such files."""
        for path in self._clips["path"].drop_nulls().unique():
            inside = os.path.normpath(path)
            if inside == path and path.startswith(f"{FILES}/") and self._lies_inside(path):
                self.storage.delete(path)

    def _lies_inside(self, path: str) -> bool:
        if not self.catalog.is_local:
            return True
        allowed, folder = (
            os.path.realpath(f"{self.catalog.root}/{FILES}"),
            os.path.realpath(f"{self.catalog.root}/{os.path.dirname(path)}"),
        )
        return os.path.commonpath([allowed, folder]) == allowed


def _keeps_all(edit: Edit, rows: pl.DataFrame) -> bool:
    stays, values = edit.judge(rows)
    return bool(stays.all()) and not values


def _without_sources(config: str, uris: list[str]) -> str:
    settings = json.loads(config)
    sources = settings.get("sources")
    if not isinstance(sources, list) or not any(_names(s, uris) for s in sources):
        return config
    return json.dumps({**settings, "sources": [REPLACED if _names(s, uris) else s for s in sources]}, sort_keys=True)


def _names(spec: object, uris: list[str]) -> bool:
    """Whether what a command line said is one of these addresses: relative paths count by their end."""
    text = str(spec)
    tail = "/" + os.path.normpath(text).lstrip("./")
    return any(
        uri == text or uri == text.removeprefix("file://") or ("://" not in text and uri.endswith(tail)) for uri in uris
    )


def _without_text(counts: str, uris: list[str]) -> str:
    for uri in uris:
        counts = counts.replace(json.dumps(uri)[1:-1], REPLACED)
    return counts
