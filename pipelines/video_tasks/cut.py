"""Write clips of a video as files. Runs in a child process."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from datakit.errors import ErrorKind, MediaError
from datakit.identity import Span
from datakit.source import check_content
from datakit.video.cut import copy, copy_suffix, cut
from datakit.video.reader import VideoReader
from datakit.video.uri import is_remote
from pipelines.video_tasks.messages import CLIP_FOLDER, ClipBatch, ClipSpan, FileJob, VideoFacts


def materialise(job: FileJob) -> Iterator[ClipBatch | VideoFacts]:
    """One batch per clip: `path` (relative to the root), `lost_start`, `lost_end`; null path: not possible.

    Raises:
        MediaError: the source cannot be read, or holds other content now.
    """
    started = time.process_time()
    check_content(job.uri, job.size, job.video_id)
    for clip in job.clips:
        with VideoReader(job.uri, job.stream) as reader:
            yield ClipBatch([{"clip_id": clip.clip_id, **_write(job, clip, reader)}], [[]])
    yield VideoFacts({}, len(job.clips), {"clips": time.process_time() - started})


def _write(job: FileJob, clip: ClipSpan, reader: VideoReader) -> dict[str, object]:
    span = Span(clip.start_pts, clip.end_pts, reader.time_base)
    suffix = ".mp4" if job.mode == "cut" else copy_suffix(reader)
    relative = f"{CLIP_FOLDER}/{clip.clip_id[:2]}/{clip.clip_id}{suffix}"
    row: dict[str, object] = {"path": relative, "lost_start": 0, "lost_end": 0, "errors": []}
    folder = Path(tempfile.gettempdir()) if is_remote(job.root) else Path(job.root, relative).parent
    folder.mkdir(parents=True, exist_ok=True)
    # The same name for every try, so that one writes over what a killed one left: nothing of a clip lies elsewhere.
    part = folder / f".{clip.clip_id}.part{suffix}"
    try:
        if job.mode == "cut":
            cut(reader, span, part)
        else:
            copied = copy(reader, span, part)
            if copied is None:
                return {**row, "path": None, "lost_start": None, "lost_end": None}
            row.update(lost_start=copied.lost_start, lost_end=copied.lost_end)
        _place(part, job.root, relative)
        return row
    except MediaError as e:
        error = {"stage": "clips", "kind": str(e.kind), "message": e.message}
        return {"path": None, "lost_start": None, "lost_end": None, "errors": [error]}
    except OSError as e:
        raise MediaError(ErrorKind.ENCODE, f"cannot write {relative}: {e}", "clips") from e
    finally:
        part.unlink(missing_ok=True)


def _place(part: Path, root: str, relative: str) -> None:
    """Move a finished file to where it belongs: it is there whole or not at all."""
    if is_remote(root):
        import fsspec

        fs, base = fsspec.core.url_to_fs(root)
        fs.put(str(part), f"{base}/{relative}")
    else:
        os.replace(part, Path(root, relative))
