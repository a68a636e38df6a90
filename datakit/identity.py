"""Identity and time: the vocabulary of the whole project.

A *video* is one source file by content, a *span* a half-open range of presentation timestamps in
the stream's own time base, a *clip* the span of a video that a dataset row stands for. Identity is
content: moving or renaming a file changes nothing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from fractions import Fraction
from typing import BinaryIO

from datakit.hashing import hash_hex

HEAD_BYTES = 1 << 20
SAMPLE_BYTES = 64 << 10
INTERIOR_SAMPLES = 6
DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Span:
    """A half-open time range `[start_pts, end_pts)` in units of `time_base` seconds."""

    start_pts: int
    end_pts: int
    time_base: Fraction

    def __post_init__(self) -> None:
        if self.end_pts <= self.start_pts:
            raise ValueError(f"empty span: [{self.start_pts}, {self.end_pts})")

    @property
    def seconds(self) -> float:
        return float((self.end_pts - self.start_pts) * self.time_base)

    def __contains__(self, pts: int) -> bool:
        return self.start_pts <= pts < self.end_pts


def video_id(file: BinaryIO, size: int) -> str:
    """Content identity of a source: 32 hex digits.

    Args:
        file: seekable binary file.
        size: its length in bytes.
    """
    return content_hash(file, size, b"datakit-video")


def content_hash(file: BinaryIO, size: int, person: bytes) -> str:
    """Hash of a file's content that reads a bounded part of it: 32 hex digits.

    BLAKE2b-128 of the size, the first and the last MiB, and six 64 KiB samples spread evenly over
    what lies between, so that a terabyte file costs 2.4 MB of reading.

    Args:
        file: seekable binary file.
        size: its length in bytes.
        person: what kind of thing is identified (at most 16 bytes); equal content of another kind hashes otherwise.
    """
    digest = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=DIGEST_BYTES, person=person)
    if size <= 2 * HEAD_BYTES + INTERIOR_SAMPLES * SAMPLE_BYTES:
        file.seek(0)
        digest.update(file.read())
        return digest.hexdigest()
    step = (size - 2 * HEAD_BYTES - SAMPLE_BYTES) // (INTERIOR_SAMPLES - 1)
    interior = [(HEAD_BYTES + i * step, SAMPLE_BYTES) for i in range(INTERIOR_SAMPLES)]
    for offset, length in [(0, HEAD_BYTES), *interior, (size - HEAD_BYTES, HEAD_BYTES)]:
        file.seek(offset)
        digest.update(file.read(length))
    return digest.hexdigest()


def unreadable_id(uri: str) -> str:
    """Stand-in identity of a source whose content cannot be read: a hash of its address."""
    return hash_hex(uri, DIGEST_BYTES, "datakit-uri")


def clip_id(video: str, stream: int, start_pts: int, end_pts: int) -> str:
    """Identity of a clip: hash of the video, the stream index and the span. 32 hex digits."""
    return hash_hex(f"{video}/{stream}/{start_pts}/{end_pts}", DIGEST_BYTES, "datakit-clip")


def caption_id(clip: str, style: str, model: str) -> str:
    """Identity of a caption: hash of the clip, the style and the model that wrote it. 32 hex digits."""
    return hash_hex(f"{clip}/{style}/{model}", DIGEST_BYTES, "datakit-caption")
