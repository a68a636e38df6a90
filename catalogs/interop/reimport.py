"""Our own tables of clips back into a catalog: virtual clips with their spans, scores, captions and marks."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import polars as pl

from catalogs.interop.formats import tabular
from catalogs.interop.media.measure_worker import MeasureJob
from catalogs.records.marks import MARKS, mark
from catalogs.records.tombstones import Forgotten
from catalogs.records.video_registry import IMPORTED, Video, VideoRegistry
from catalogs.tables.schema import CLIPS, VIEW_FROM_VIDEOS
from datakit.errors import ErrorKind, MediaError
from datakit.identity import clip_id, unreadable_id
from datakit.process.pool import Pool, Result
from datakit.source import look_at
from datakit.video.uri import is_remote, local_path

if TYPE_CHECKING:
    from catalogs.interop.exchange.import_request import Imported, Request

CLIPS_A_COMMIT = 20_000
NOT_RESTORED = ("path", "lost_start", "lost_end", "run_id", "shard")
"""Clip files stay where they are, with the catalog that made them."""
FACTS = tuple(
    name for name in VIEW_FROM_VIDEOS if name not in ("license", "source_url", "attribution", "source_caption", "extra")
)


def restore(registry: VideoRegistry, clips: pl.DataFrame, src: str, request: Request, result: Imported) -> None:
    """Enter the clips of a table (see `tables.read`). The sources are read in part, to see that they are what they
    were."""
    with Pool("catalogs.interop.media.measure_worker:measure", request.workers) as pool:
        for group in tabular.video_groups(clips, CLIPS_A_COMMIT):
            result.rows += group.height
            gone = Forgotten.read(registry.catalog).covers(group)
            result.forgotten += int(gone.sum())
            _restore_group(registry, group.filter(~gone), src, request, result, pool)
            request.on_progress(result.rows, clips.height)


def _restore_group(
    registry: VideoRegistry, group: pl.DataFrame, src: str, request: Request, result: Imported, pool: Pool
) -> None:
    rows_of = {key[0]: part.to_dicts() for key, part in group.group_by("video_id", maintain_order=True)}
    entries = _entries(registry, rows_of, request)
    unfinished = {e.video_id: e for e in registry.unfinished(entries.values())}
    new = {video: e for video, e in entries.items() if e.video_id in unfinished}
    _complete([e for e in new.values() if e.failure is None], rows_of, registry, pool)
    done = registry.enter(list(unfinished.values()))
    for video, entry in new.items():
        if entry.video_id not in done:
            continue
        if entry.failure is not None:
            result.quarantine(f"{src}, video {video}", entry.failure, len(rows_of[video]))
        else:
            result.entered += len(entry.clips)
            result.same_content += len(rows_of[video]) - len(entry.clips)
    known = {video: e for video, e in entries.items() if e.video_id not in done}
    _recognise(registry, known, rows_of, src, result)
    registry.note(list(known.values()))
    _mark(registry, rows_of)


def _entries(registry: VideoRegistry, rows_of: dict[str, list[dict]], request: Request) -> dict[str, Video]:
    """By video as the table names it. A source that is missing or another is entered as such, by its address."""
    videos = list(rows_of)
    sources = [look_at(_address(rows_of[video][0]["uri"], request)) for video in videos]
    entries = {}
    for video, source, (identity, problem) in zip(videos, sources, registry.identify(sources), strict=True):
        if problem is None and identity != video:
            problem = MediaError(
                ErrorKind.SOURCE_CHANGED, f"{source.uri} is not the video {video} that the clips are of", "import"
            )
        first = rows_of[video][0]
        attributes: dict[str, object] = {
            name: first.get(name) for name in ("license", "source_url", "attribution", "source_caption", "extra")
        }
        entries[video] = Video(
            video if problem is None else unreadable_id(source.uri), [source], attributes=attributes, failure=problem
        )
        if problem is None:
            entries[video].captions = _captions(registry, rows_of[video], request.style)
    return entries


def _complete(entries: list[Video], rows_of: dict[str, list[dict]], registry: VideoRegistry, pool: Pool) -> None:
    """Clips and technical facts: those in the table; where it has them not, the videos are decoded."""
    lacking = {}
    for entry in entries:
        rows = rows_of[entry.video_id]
        by_id = {row_id: row for row in reversed(rows) for row_id in [_id(row)]}
        entry.clips = [_clip(row, row_id) for row_id, row in reversed(by_id.items())]
        facts = rows[0].get(tabular.SOURCE)
        if facts is None or facts["num_frames"] is None or any(name not in rows[0] for name in FACTS):
            lacking[entry.video_id] = entry
        else:
            known = {name: facts[name] for name in tabular.SOURCE_FACTS}
            entry.columns = {**{name: rows[0][name] for name in FACTS}, **known, "time_base": rows[0]["time_base"]}
    jobs = (
        MeasureJob(e.sources[0].uri, e.sources[0].size, e.video_id, registry.catalog.shard_of(e.video_id))
        for e in lacking.values()
    )
    for event in pool.run(jobs):
        entry = lacking[event.task.video_id]
        if isinstance(event, Result):
            entry.columns = event.value.columns
            entry.clips = [_with_facts(clip, event.value) for clip in entry.clips]
        elif event.error is not None:
            entry.failure, entry.clips, entry.captions = event.error, [], {}


def _clip(row: dict, row_id: str) -> dict:
    own = {c.name: row[c.name] for c in CLIPS if c.name in row and c.name not in NOT_RESTORED}
    return {**own, "clip_id": row_id}


def _with_facts(clip: dict, measured) -> dict:
    """A clip of a table with few columns: what follows from its span and the video."""
    columns = measured.columns
    numerator, denominator = columns["time_base"].split("/")
    base, first = int(numerator) / int(denominator), columns["start_pts"]
    follows = {
        "time_base": columns["time_base"],
        "start_s": (clip["start_pts"] - first) * base,
        "end_s": (clip["end_pts"] - first) * base,
        "width": columns["width"],
        "height": columns["height"],
        "aspect_ratio": columns["height"] / columns["width"],
        "resolution": columns["height"] * columns["width"],
    }
    return {**follows, **{name: value for name, value in clip.items() if value is not None}}


def _captions(registry: VideoRegistry, rows: list[dict], style: str) -> dict[str, dict]:
    found = {}
    for row in rows:
        if row.get("caption"):
            found[_id(row)] = {
                "text": row["caption"],
                "shard": registry.catalog.shard_of(row["video_id"]),
                "style": row.get("caption_style") or style,
                "model": row.get("caption_model") or IMPORTED,
                "flags": row.get("caption_flags") or [],
            }
    return found


def _recognise(
    registry: VideoRegistry, known: dict[str, Video], rows_of: dict[str, list[dict]], src: str, result: Imported
) -> None:
    """Count the rows of videos that the catalog has; captions only for clips that it has."""
    there = set(registry.clips_of([e.video_id for e in known.values()])["clip_id"])
    states = registry.states({e.video_id for e in known.values()})
    for video, entry in known.items():
        ids = [_id(row) for row in rows_of[video]]
        if entry.video_id not in states:  # forgotten since this group began
            result.forgotten += len(ids)
            continue
        if states[entry.video_id].status != "ok" or entry.failure is not None:
            result.quarantine(f"{src}, video {video}", entry.failure, len(ids))
            entry.captions = {}
            continue
        result.in_catalog += sum(1 for clip in ids if clip in there)
        result.divided_otherwise += sum(1 for clip in ids if clip not in there)
        entry.captions = {clip: caption for clip, caption in entry.captions.items() if clip in there}


def _mark(registry: VideoRegistry, rows_of: dict[str, list[dict]]) -> None:
    """What people said of the clips, where it is not what the catalog says."""
    wanted = {
        _id(row): (row["mark"], row.get("comment"))
        for rows in rows_of.values()
        for row in rows
        if row.get("mark") in MARKS
    }
    if not wanted:
        return
    marks = registry.catalog.marks().select("clip_id", "mark", "comment").collect()
    before = {clip: (value, comment) for clip, value, comment in marks.iter_rows()}
    entered = set(registry.clips_of(rows_of)["clip_id"])
    groups: dict[tuple[str, str | None], list[str]] = {}
    for clip, said in wanted.items():
        if clip in entered and before.get(clip) != said:
            groups.setdefault(said, []).append(clip)
    for (value, comment), ids in groups.items():
        mark(registry.catalog, ids, value, comment)


def _address(uri: str, request: Request) -> str:
    """Of a source: as the table says, or by its name in `media_root`."""
    if is_remote(uri) or request.media_root is None:
        return uri
    return os.path.join(request.media_root, os.path.basename(local_path(uri)))


def _id(row: dict) -> str:
    return clip_id(row["video_id"], row["stream"], row["start_pts"], row["end_pts"])
