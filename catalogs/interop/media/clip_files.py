"""Which file stands for a clip: one that exists already, or one that is cut for the export."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby

import polars as pl

from catalogs.interop.media.cut_worker import CutJob, Wanted, Written
from catalogs.tables.catalog import Catalog
from datakit.errors import ConfigError, ErrorKind, MediaError
from datakit.process.pool import End, Pool, Result
from datakit.source import present
from datakit.video.probe import probe
from datakit.video.uri import is_remote, local_path

COLUMNS = (
    "clip_id",
    "video_id",
    "kind",
    "stream",
    "start_pts",
    "end_pts",
    "start_frame",
    "num_frames",
    "width",
    "height",
    "path",
    "lost_start",
    "lost_end",
)
"""Of the view: what finding a clip's file takes."""
FACTS = ("uris", "video_frames")
"""Of the table `videos`, see `with_sources`."""
CLIPS_A_JOB = 32
CUTTER = "catalogs.interop.media.cut_worker:cut_clips"
DIED = (ErrorKind.CRASH, ErrorKind.TIMEOUT, ErrorKind.OUT_OF_MEMORY)


@dataclass(frozen=True)
class File:
    """The file of a clip, and how many frames of what size it holds. `made`: by this export."""

    path: str
    frames: int
    width: int
    height: int
    made: bool


@dataclass(frozen=True)
class Failed:
    """A clip that has no file, with an `ErrorKind` and words."""

    clip_id: str
    uri: str
    kind: str
    reason: str


def with_sources(clips: pl.LazyFrame, catalog: Catalog, versions: dict[str, int]) -> pl.LazyFrame:
    """The rows with the addresses and the frame count of their videos."""
    videos = catalog.scan("videos", versions.get("videos")).select(
        "video_id", "uris", pl.col("num_frames").alias("video_frames")
    )
    return clips.join(videos, on="video_id", how="left")


def clip_files(
    clips: pl.DataFrame, root: str, mode: str, stem: Callable[[int], str], workers: int | None
) -> Iterator[tuple[int, File | Failed]]:
    """For every row its number and its file, in order.

    Args:
        clips: with `COLUMNS` and `FACTS`, in order of video and start.
        root: of the catalog, which the column `path` starts from.
        mode: `link` (nothing is made), `cut` or `copy`.
        stem: row number -> path of a file that is to be made, without suffix.

    Raises:
        ConfigError: with `link`, clips that have no file.
    """
    rows = clips.select(*COLUMNS, *FACTS).to_dicts()
    found: dict[int, File | Failed] = {}
    for number, row in enumerate(rows):
        file = _existing(row, root, mode)
        if file is not None:
            found[number] = file
    lacking = [number for number in range(len(rows)) if number not in found]
    if lacking and mode == "link":
        raise ConfigError(
            f"{len(lacking)} of {len(rows)} clips have no file of their own, they are spans of longer videos: "
            f"--media cut writes files "
            "(so does `datakit run ingest --clips cut`), the formats jsonl, parquet and lance name spans"
        )
    yield from _in_order(len(rows), found, _made(rows, lacking, mode, stem, workers))


def _in_order(
    count: int, found: dict[int, File | Failed], made: Iterator[tuple[int, File | Failed]]
) -> Iterator[tuple[int, File | Failed]]:
    for number in range(count):
        while number not in found:
            other, file = next(made)
            found[other] = file
        yield number, found.pop(number)


def _existing(row: dict, root: str, mode: str) -> File | Failed | None:
    """The clip's own file; or its source, where the clip is all of it."""
    lost = (row["lost_start"] or 0) + (row["lost_end"] or 0)
    if row["path"] is not None and not (mode == "cut" and lost):
        path = f"{_absolute(root)}/{row['path']}"
        if is_remote(path) or os.path.isfile(path):
            try:
                width, height = _size(path, row)
            except MediaError as e:
                return Failed(row["clip_id"], path, str(e.kind), e.message)
            return File(path, row["num_frames"] - lost, width, height, False)
    if row["start_frame"] != 0 or row["num_frames"] != row["video_frames"]:
        return None
    source = present(row["uris"])
    problem = _changed(source)
    if problem is not None:
        return Failed(row["clip_id"], source["uri"], str(problem.kind), problem.message)
    return File(source["uri"], row["num_frames"], row["width"], row["height"], False)


def _size(path: str, row: dict) -> tuple[int, int]:
    """Clip files have even sides (4:2:0 has no others); only where the clip's are not, the file is asked."""
    if row["width"] % 2 == 0 and row["height"] % 2 == 0:
        return row["width"], row["height"]
    facts = probe(path)
    return facts.width, facts.height


def _changed(source: dict) -> MediaError | None:
    if is_remote(source["uri"]):
        return None
    try:
        size = os.stat(local_path(source["uri"])).st_size
    except OSError as e:
        return MediaError(
            ErrorKind.UNREADABLE, f"cannot read {source['uri']}: {e.strerror} (moved? `datakit catalog relink`)"
        )
    if source["size"] is not None and size != source["size"]:
        return MediaError(ErrorKind.SOURCE_CHANGED, f"{source['uri']} holds other content than when it was ingested")
    return None


def _made(
    rows: list[dict], lacking: list[int], mode: str, stem: Callable[[int], str], workers: int | None
) -> Iterator[tuple[int, File | Failed]]:
    """Files as they are written, by processes that take a video at a time."""
    number_of = {rows[number]["clip_id"]: number for number in lacking}
    tasks = _Tasks(_jobs(rows, lacking, mode, stem))
    open_clips: dict[str, str] = {}
    with Pool(CUTTER, min(workers or os.cpu_count() or 1, max(1, len(tasks.waiting)))) as pool:
        for event in pool.run(tasks):
            for clip in event.task.clips:
                open_clips.setdefault(clip.clip_id, event.task.uri)
            if isinstance(event, Result):
                open_clips[event.value.clip_id] = ""
                yield number_of[event.value.clip_id], _taken(event.value, event.task.uri)
                continue
            for failed in _left_over(event, open_clips, tasks):
                yield number_of[failed.clip_id], failed


def _left_over(event: End, open_clips: dict[str, str], tasks: _Tasks) -> list[Failed]:
    """Clips of a job that ended early: all of them failed; or, where the process died, the one it was at, and the
    others are done by another."""
    left = [clip for clip in event.task.clips if open_clips[clip.clip_id]]
    if event.error is None or not left:
        return []
    if event.error.kind in DIED and len(left) > 1:
        tasks.waiting.append(replace(event.task, clips=tuple(left[1:])))
        left = left[:1]
    return [Failed(clip.clip_id, event.task.uri, str(event.error.kind), event.error.message) for clip in left]


def _taken(written: Written, uri: str) -> File | Failed:
    if written.path is None:
        return Failed(written.clip_id, uri, written.kind, written.reason)
    return File(written.path, written.frames, written.width, written.height, True)


class _Tasks:
    """Jobs, to which more may be added while they are done."""

    def __init__(self, jobs: Iterator[CutJob]):
        self.waiting = deque(jobs)

    def __iter__(self) -> _Tasks:
        return self

    def __next__(self) -> CutJob:
        if not self.waiting:
            raise StopIteration
        return self.waiting.popleft()


def _jobs(rows: list[dict], lacking: list[int], mode: str, stem: Callable[[int], str]) -> Iterator[CutJob]:
    for _, numbers in groupby(lacking, key=lambda number: (rows[number]["video_id"], rows[number]["stream"])):
        numbers = list(numbers)
        first = rows[numbers[0]]
        source = present(first["uris"])
        for start in range(0, len(numbers), CLIPS_A_JOB):
            wanted = tuple(_wanted(rows[n], stem(n)) for n in numbers[start : start + CLIPS_A_JOB])
            yield CutJob(source["uri"], source["size"], first["video_id"], first["stream"], mode, wanted)


def _wanted(row: dict, stem: str) -> Wanted:
    return Wanted(row["clip_id"], row["start_pts"], row["end_pts"], row["num_frames"], stem)


def _absolute(root: str) -> str:
    return root if is_remote(root) else os.path.abspath(root)
