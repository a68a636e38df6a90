"""`datakit catalog import`: the way from somebody's data set to rows of a catalog."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

from catalogs.interop import reimport
from catalogs.interop.exchange.column_mapping import as_extra, discrepancies, sort_out
from catalogs.interop.exchange.export_job import SUMMARY
from catalogs.interop.exchange.import_request import Imported, Request
from catalogs.interop.exchange.source_row import Row
from catalogs.interop.formats import FORMATS, IMPORT_FORMATS, huggingface, open_sora, tabular, webdataset
from catalogs.interop.media.measure_worker import Measured, MeasureJob
from catalogs.records.runs import RunRecord
from catalogs.records.tombstones import Forgotten
from catalogs.records.video_registry import IMPORTED, Video, VideoRegistry
from catalogs.tables.catalog import Catalog
from catalogs.tables.schema import TABLES
from datakit.errors import CatalogError, ConfigError
from datakit.process.pool import End, Pool, Result
from datakit.source import Source, look_at
from datakit.video.uri import VIDEO_SUFFIXES

ROWS_A_COMMIT = 2000
SMALL = 3 * ROWS_A_COMMIT
"""An import of more rows than this joins the small files of its commits."""


def run(request: Request) -> Imported:
    """See `catalogs.interop.import_dataset`."""
    if request.form not in IMPORT_FORMATS:
        raise ConfigError(f"no form {request.form!r}: there are {', '.join(IMPORT_FORMATS)}")
    src, form = _found(request)
    extract_to = _extract_folder(request) if form == "webdataset" else ""
    result = Imported(form)
    if FORMATS[form].ours:
        clips = tabular.read(src, form, request.limit)
        total = clips.height
    else:
        total = _count(src, form, request)
    if not total:
        raise ConfigError(f"{src} holds nothing to import")
    catalog = Catalog.create(request.root)
    config = {"src": os.path.abspath(src), "form": form, "style": request.style, "limit": request.limit}
    record = RunRecord(catalog, "import", config)
    with record.running() as counts:
        registry = VideoRegistry(catalog, record.run_id)
        if FORMATS[form].ours:
            reimport.restore(registry, clips, src, request, result)
        else:
            rows = islice(_rows(src, form, request.media_root, extract_to), request.limit)
            _enter_files(registry, rows, total, request, result)
        if result.rows > SMALL:
            for name in ("videos", "clips", "captions"):
                catalog.compact(name)
        result.captions = registry.captions
        _check_accounts(result)
        counts.update(result.as_dict())
    return result


def _enter_files(registry: VideoRegistry, rows: Iterable[Row], total: int, request: Request, result: Imported) -> None:
    seen: set[str] = set()
    rows = iter(rows)
    with Pool("catalogs.interop.media.measure_worker:measure", request.workers) as pool:
        while batch := list(islice(rows, ROWS_A_COMMIT)):
            done = result.rows
            result.rows += len(batch)
            _Batch(registry, pool, request, result, seen).enter(batch, partial(_report, request, done, total))
            request.on_progress(result.rows, total)


def _check_accounts(result: Imported) -> None:
    parts = [
        result.entered,
        result.in_catalog,
        result.divided_otherwise,
        result.same_content,
        result.forgotten,
        result.quarantined,
    ]
    if sum(parts) != result.rows:
        counted = " + ".join(map(str, parts))
        what = "entered, there, divided otherwise, the same, forgotten, quarantined"
        raise CatalogError(f"accounting: {result.rows} rows, but {counted} {what}")


def _report(request: Request, before: int, total: int, measured: int) -> None:
    request.on_progress(before + measured, total)


class _Batch:
    """Rows that are committed together."""

    def __init__(self, registry: VideoRegistry, pool: Pool, request: Request, result: Imported, seen: set[str]):
        self._registry, self._pool, self._request, self._result, self._seen = registry, pool, request, result, seen

    def enter(self, batch: list[Row], on_progress: Callable[[int], None]) -> None:
        self._forgotten = Forgotten.read(self._registry.catalog)
        entries, rows = self._entries(batch)
        new = self._registry.unfinished(entries.values())
        self._measure([e for e in new if e.failure is None], rows, on_progress)
        entered = self._registry.enter(new)
        known = [entry for entry in entries.values() if entry.video_id not in entered]
        self._recognise(known, rows)
        self._registry.note(known)
        for entry in new:
            if entry.video_id in entered:
                self._count_new(entry, rows[entry.video_id])

    def _entries(self, batch: list[Row]) -> tuple[dict[str, Video], dict[str, Row]]:
        """One entry for each content, and the row that it is of: the first."""
        sources = [Source(row.address, problem=row.problem) if row.problem else look_at(row.address) for row in batch]
        entries: dict[str, Video] = {}
        rows: dict[str, Row] = {}
        for row, source, (identity, problem) in zip(batch, sources, self._registry.identify(sources), strict=True):
            if identity in self._seen:
                self._result.same_content += 1
                if identity in entries:
                    entries[identity].sources.append(source)
                continue
            self._seen.add(identity)
            if identity in self._forgotten.videos:
                self._result.forgotten += 1
                continue
            meaning = sort_out(row.columns, row.ours)
            attributes = {**meaning.attributes, "extra": as_extra(meaning.rest)}
            entries[identity] = Video(identity, [source], attributes=attributes, failure=problem)
            rows[identity] = row
        return entries, rows

    def _measure(self, entries: list[Video], rows: dict[str, Row], on_progress: Callable[[int], None]) -> None:
        """Decode files, each in a process that may die of it."""
        by_id = {entry.video_id: entry for entry in entries}
        shard = self._registry.catalog.shard_of
        jobs = (MeasureJob(e.sources[0].uri, e.sources[0].size, e.video_id, shard(e.video_id)) for e in entries)
        done = 0
        for event in self._pool.run(jobs):
            entry = by_id[event.task.video_id]
            if isinstance(event, Result):
                self._take(entry, rows[entry.video_id], event.value)
            elif isinstance(event, End):
                done += 1
                entry.failure = event.error
                on_progress(done)
        for entry in entries:
            if entry.failure is not None:
                entry.clips, entry.captions = [], {}

    def _take(self, entry: Video, row: Row, measured: Measured) -> None:
        meaning = sort_out(row.columns, row.ours)
        differ = discrepancies(meaning.stated, measured.clip)
        self._result.discrepancies += bool(differ)
        entry.columns = measured.columns
        entry.attributes["extra"] = as_extra({**meaning.rest, **({"stated": differ} if differ else {})})
        entry.clips = self._forgotten.without([{**measured.clip, **meaning.scores}])
        if entry.clips:
            self._caption(entry, row, measured.clip["clip_id"])

    def _caption(self, entry: Video, row: Row, clip_id: str) -> None:
        if row.text is None:
            return
        style, model, flags = self._request.style, IMPORTED, []
        if row.ours and row.columns.get("caption_style") and row.columns.get("caption_model"):
            style, model, flags = (
                row.columns["caption_style"],
                row.columns["caption_model"],
                row.columns.get("caption_flags") or [],
            )
        shard = self._registry.catalog.shard_of(entry.video_id)
        entry.captions = {clip_id: {"text": row.text, "style": style, "model": model, "flags": flags, "shard": shard}}

    def _recognise(self, known: list[Video], rows: dict[str, Row]) -> None:
        """Count videos that the catalog has, and find the clip that their caption is of."""
        clips = {
            video: clip
            for clip, video, whole in self._registry.clips_of([e.video_id for e in known]).iter_rows()
            if whole
        }
        states = self._registry.states([e.video_id for e in known])
        for entry in known:
            entry.captions, row = {}, rows[entry.video_id]
            if entry.video_id not in states:  # forgotten since this batch began
                self._result.forgotten += 1
            elif states[entry.video_id].status != "ok":
                self._result.quarantine(row.where, entry.failure)
            elif entry.video_id in clips:
                self._result.in_catalog += 1
                self._caption(entry, row, clips[entry.video_id])
            else:
                self._result.divided_otherwise += 1
                entry.attributes.setdefault("source_caption", row.text)

    def _count_new(self, entry: Video, row: Row) -> None:
        if entry.failure is not None:
            self._result.quarantine(row.where, entry.failure)
        elif entry.clips:
            self._result.entered += 1
        else:
            self._result.forgotten += 1


def _rows(src: str, form: str, media_root: str | None, extract_to: str) -> Iterator[Row]:
    ours = _is_ours(src)
    if form == "webdataset":
        return webdataset.read(src, extract_to)
    if form == "huggingface":
        return huggingface.read(src, media_root, ours)
    lowered = src.lower()
    if lowered.endswith(".parquet"):
        return open_sora.read_parquet(src, media_root, ours)
    return (huggingface.read_jsonl if lowered.endswith(".jsonl") else open_sora.read_csv)(src, media_root, ours)


def _count(src: str, form: str, request: Request) -> int:
    """How many rows there are; reads all of them, so that a malformed one is told before anything is written."""
    if form == "webdataset":
        count = webdataset.count(src) or len(webdataset.shards_of(src))  # shards that cannot be read are rows too
    else:
        count = sum(1 for _ in _rows(src, form, request.media_root, ""))
    return min(count, request.limit) if request.limit else count


def _found(request: Request) -> tuple[str, str]:
    """The file or folder to read, and its form.

    Raises:
        ConfigError: nothing there, or its form cannot be told.
    """
    src, form = request.src, request.form
    if "://" in src and not os.path.exists(src):
        raise ConfigError(f"{src}: bring the data set to a local folder; its paths may be URLs")
    if form == "webdataset" or (form == "auto" and webdataset.is_shard(src)):
        return src, "webdataset"
    if not os.path.exists(src):
        raise ConfigError(f"no such file or folder: {src}")
    if os.path.isdir(src) and not src.rstrip("/").endswith(".lance"):
        return _in_folder(src, form)
    return src, _form_of(src) if form == "auto" else form


def _in_folder(folder: str, form: str) -> tuple[str, str]:
    """Our own exports to folders are one file in them, or a layout of their own."""
    names = [form.file for form in FORMATS.values() if form.file]
    inner = [
        os.path.join(folder, name) for name in names if _is_ours(folder) and os.path.exists(os.path.join(folder, name))
    ]
    if inner and form in ("auto", _form_of(inner[0])):
        return inner[0], _form_of(inner[0])
    if form == "huggingface":
        return folder, form
    if form != "auto":
        raise ConfigError(f"{folder} is a folder: give the file to import as {form}")
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    if any(webdataset.is_shard(path.name) for path in files):
        return folder, "webdataset"
    if any(path.name in huggingface.METADATA or path.suffix.lower() in VIDEO_SUFFIXES for path in files):
        return folder, "huggingface"
    raise ConfigError(f"{folder}: no shards, no metadata file and no videos in it; say what it is with --format")


def _form_of(path: str) -> str:
    lowered = path.lower().rstrip("/")
    if lowered.endswith(".lance"):
        return "lance"
    if lowered.endswith((".csv", ".tsv")):
        return "open-sora"
    if lowered.endswith((".jsonl", ".parquet")):
        return lowered.rsplit(".", 1)[1] if tabular.looks_ours(tabular.first_columns(path)) else "open-sora"
    raise ConfigError(
        f"{path}: cannot tell what it is by its name; say so with --format {', '.join(IMPORT_FORMATS[1:])}"
    )


def _is_ours(src: str) -> bool:
    """Whether an export of datakit lies there, by the summary in or beside it."""
    folder = src if os.path.isdir(src) else os.path.dirname(os.path.abspath(src))
    for path in (os.path.join(folder, SUMMARY), f"{src.rstrip('/')}.{SUMMARY}"):
        try:
            with open(path, encoding="utf-8") as file:
                return str(json.load(file).get("made_by", "")).startswith("datakit")
        except (OSError, ValueError, AttributeError):
            continue
    return False


def _extract_folder(request: Request) -> str:
    """Raises:
    ConfigError: it lies in a folder of the catalog's tables, or the catalog is remote and no folder is given.
    """
    if request.extract_to is None and "://" in request.root:
        raise ConfigError("the catalog is not on this machine: --extract-to FOLDER for the videos of the shards")
    folder = os.path.realpath(request.extract_to or default_extract_folder(request.root))
    for name in TABLES:
        table = os.path.realpath(os.path.join(request.root, name))
        if folder == table or folder.startswith(table + os.sep):
            raise ConfigError(f"--extract-to {folder} lies in a table of the catalog: choose a folder outside")
    return folder


def default_extract_folder(root: str) -> str:
    """Beside the catalog: its own folders belong to Delta."""
    return os.path.abspath(root).rstrip("/") + "-media"
