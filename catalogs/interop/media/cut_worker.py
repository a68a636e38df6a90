"""Clips of a video as files. Runs in a child process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from datakit.errors import ErrorKind, MediaError
from datakit.identity import Span
from datakit.source import check_content
from datakit.video.cut import copy, copy_suffix, cut
from datakit.video.probe import probe
from datakit.video.reader import VideoReader


@dataclass(frozen=True)
class Wanted:
    """A clip to be written: its span and decoded frames, and the path of its file without a suffix."""

    clip_id: str
    start_pts: int
    end_pts: int
    num_frames: int
    stem: str


@dataclass(frozen=True)
class CutJob:
    """Clips of one video. `mode`: cut or copy."""

    uri: str
    size: int | None
    video_id: str
    stream: int
    mode: str
    clips: tuple[Wanted, ...]


@dataclass(frozen=True)
class Written:
    """A clip's file, or why there is none (`path` None)."""

    clip_id: str
    path: str | None
    frames: int = 0
    width: int = 0
    height: int = 0
    kind: str = ""
    reason: str = ""


def cut_clips(job: CutJob) -> Iterator[Written]:
    """One result per clip.

    Raises:
        MediaError: the source cannot be read, or holds other content now.
    """
    check_content(job.uri, job.size, job.video_id)
    for clip in job.clips:
        yield _write(job, clip)


def _write(job: CutJob, clip: Wanted) -> Written:
    path = ""
    try:
        with VideoReader(job.uri, job.stream) as reader:
            path = clip.stem + (".mp4" if job.mode == "cut" else copy_suffix(reader))
            os.makedirs(os.path.dirname(path), exist_ok=True)
            frames = _cut(reader, clip, path) if job.mode == "cut" else _copy(reader, clip, path)
        facts = probe(path)
        return Written(clip.clip_id, path, frames, facts.width, facts.height)
    except MediaError as e:
        _remove(path)
        return Written(clip.clip_id, None, kind=str(e.kind), reason=e.message)
    except OSError as e:
        _remove(path)
        return Written(clip.clip_id, None, kind=str(ErrorKind.ENCODE), reason=f"cannot write {path}: {e}")


def _cut(reader: VideoReader, clip: Wanted, path: str) -> int:
    frames = cut(reader, Span(clip.start_pts, clip.end_pts, reader.time_base), path)
    if frames != clip.num_frames:
        raise MediaError(ErrorKind.DECODE, f"{frames} frames could be decoded, the clip has {clip.num_frames}", "clips")
    return frames


def _copy(reader: VideoReader, clip: Wanted, path: str) -> int:
    copied = copy(reader, Span(clip.start_pts, clip.end_pts, reader.time_base), path)
    if copied is None:
        raise MediaError(ErrorKind.ENCODE, "no key frame to begin a stream copy with (--media cut re-encodes)", "clips")
    return copied.frames


def _remove(path: str) -> None:
    if path and os.path.exists(path):
        os.unlink(path)
