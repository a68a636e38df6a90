"""Reading one sample: the frames of a window as the model sees them, or its latent; and what happens to broken ones.

No torch here: this is what loader processes import.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from itertools import chain
from math import ceil, prod
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from datakit.errors import DatakitError, ErrorKind, MediaError
from datakit.identity import Span
from datakit.video.frame import Picture
from datakit.video.sparse_reader import Box, ChosenFrames, Scaler
from trainer.data.batch_sampler import draw, stand_in
from trainer.data.latent_reader import LatentReader
from trainer.planning.frame_rate import choose_frames
from trainer.planning.plan import Bucket, Plan

PASSING = frozenset({ErrorKind.UNREADABLE, ErrorKind.TIMEOUT, ErrorKind.CRASH, ErrorKind.OUT_OF_MEMORY})
"""What may be better a moment later; everything else is wrong with the file and stays so."""
CANDIDATES = 64
"""Windows that may stand in for a broken one, tried in turn."""
SLACK_S = 1.0
"""Packets are looked at so far beyond where a window should end, and a quarter of its length: rates are averages."""


@dataclass(frozen=True, slots=True)
class Window:
    """A row of the plan's windows: what reading it takes. See `trainer.planning.plan.WINDOWS`."""

    clip_id: str
    uri: str
    path: str | None
    stream: int
    time_base: str
    start_pts: int
    end_pts: int
    crop_x: int
    crop_y: int
    crop_width: int
    crop_height: int
    width: int
    height: int
    kind: str
    bucket: int
    first: int
    frames: int
    stride: int
    fps: float
    geometry: str

    @property
    def address(self) -> str:
        return self.path or self.uri

    @property
    def inside(self) -> Box:
        """The picture inside its borders."""
        return Box(self.crop_x, self.crop_y, self.crop_width, self.crop_height)

    @classmethod
    def of(cls, plan: Plan, index: int) -> Window:
        return cls(**plan.rows([index], [f.name for f in fields(cls)])[0])


class Broken(NamedTuple):
    """A window that can never be read."""

    window: int
    kind: str
    message: str


class Read(NamedTuple):
    """A sample that was read.

    Attributes:
        window: the one asked for, or its stand-in.
        broken: what came before it in the chain: the one asked for, then stand-ins. The same whether they were tried or
            known.
        latent: (dtype, shape) of a latent; None: frames.
    """

    window: int
    broken: tuple[Broken, ...] = ()
    latent: tuple[str, tuple[int, ...]] | None = None


class Spec(NamedTuple):
    """What a reader is made from.

    Attributes:
        plan: folder.
        latents: Arrow file, see `trainer.data.latent_reader`.
        augment: the crop lies anywhere, chosen by the sample's seed; else in the middle.
        flip: mirror half of the samples.
        raw_if_missing: windows without a latent are read as frames; else that is an error.
        cache_bytes: of latents kept in memory.
    """

    plan: str
    latents: str | None
    augment: bool
    flip: bool
    raw_if_missing: bool
    cache_bytes: int


class SampleReader:
    """Reads samples of a plan.

    Args:
        broken: windows known to be: they are not tried.

    Attributes:
        rows: by bucket, its windows.
    """

    def __init__(self, spec: Spec, broken: Sequence[Broken] = ()):
        cv2.setNumThreads(1)
        self.spec = spec
        self.plan = Plan.open(spec.plan)
        self.latents = LatentReader(Path(spec.latents), spec.cache_bytes) if spec.latents else None
        self._broken = {b.window: b for b in broken}
        buckets = self.plan.windows.column("bucket").to_numpy()
        edges = np.searchsorted(buckets, range(len(self.plan.buckets) + 1))
        self.rows = [range(first, last) for first, last in zip(edges.tolist(), edges[1:].tolist())]

    def read(self, window: int, seed: int, out: np.ndarray) -> Read:
        """Fill `out` with frames, uint8 [3, frames, height, width] full-range RGB; or with a latent's mean and std as
        stored.

        A broken window's place is taken by the first of a chain of windows of its bucket that can be read. The chain
        depends on the sample's seed only, so that it is the same whatever was tried before.

        Args:
            window: row of the plan.
            seed: of the sample.
            out: uint8, at least as many bytes as are read.

        Raises:
            MediaError: of a kind in `PASSING`.
            DatakitError: a stale or missing latent; no window of the bucket can be read.
        """
        broken: dict[int, Broken] = {}
        asked = Window.of(self.plan, window)
        rows = self.rows[asked.bucket]
        for row in chain([window], (stand_in(seed, i, rows) for i in range(CANDIDATES))):
            if row in broken:
                continue
            if row not in self._broken:
                try:
                    found = asked if row == window else Window.of(self.plan, row)
                    return Read(row, tuple(broken.values()), self._read(row, found, seed, out))
                except MediaError as e:
                    if e.kind in PASSING:
                        raise
                    self.learn([Broken(row, str(e.kind), e.message)])
            broken[row] = self._broken[row]
        name = self.plan.buckets[asked.bucket].name
        raise DatakitError(
            f"nothing can stand in for {describe(self.plan, window)}: {len(broken)} windows of bucket {name} are "
            f"broken, this one: "
            f"{broken[window].message}"
        )

    def learn(self, broken: Sequence[Broken]) -> None:
        """Windows that need not be tried."""
        self._broken.update({b.window: b for b in broken})

    def _read(self, row: int, window: Window, seed: int, out: np.ndarray) -> tuple[str, tuple[int, ...]] | None:
        place = self.latents.find(row) if self.latents else None
        if place is not None:
            latent = self.latents.read(place, window.geometry, window.clip_id)
            size = len(latent.mean)
            if 2 * size > len(out):
                raise DatakitError(
                    f"the latent of {describe(self.plan, row)} is larger than others of its bucket: encode again"
                )
            out[:size] = np.frombuffer(latent.mean, np.uint8)
            out[size : 2 * size] = np.frombuffer(latent.std, np.uint8)
            return latent.dtype, latent.shape
        if self.latents is not None and not self.spec.raw_if_missing:
            raise DatakitError(
                f"no latent of {describe(self.plan, row)} in {self.spec.latents}: run `datakit run encode`, or set "
                f"loader.missing=raw"
            )
        shape = frames_shape(self.plan.buckets[window.bucket])
        video = out[: prod(shape)].reshape(shape)
        read_frames(window, seed if self.spec.augment else None, video)
        if self.spec.flip and draw(seed, "flip") < 0.5:
            video[:] = video[..., ::-1].copy()
        return None


def frames_shape(bucket: Bucket) -> tuple[int, int, int, int]:
    """[3, frames, height, width]"""
    return 3, bucket.frames, bucket.height, bucket.width


def read_frames(window: Window, seed: int | None, out: np.ndarray) -> None:
    """The frames of a window, cut to a bucket's shape and scaled once (`datakit.video.sparse_reader.SCALER`).

    Args:
        seed: where the crop lies, if not in the middle.
        out: uint8 [3, frames, height, width] of the bucket, filled with full-range RGB.

    Raises:
        MediaError: fewer or other frames than the catalog says, damage, or whatever keeps the file from being read.
    """
    across, down = (0.5, 0.5) if seed is None else (draw(seed, "crop across"), draw(seed, "crop down"))
    height, width = out.shape[2:]
    scaler = Scaler(crop_box(window.inside, height / width, across, down), height, width)
    enough_s = _enough_s(window)
    try:
        _read_until(enough_s, window, scaler, out)
    except MediaError as e:
        if enough_s is None or e.kind != ErrorKind.TRUNCATED:
            raise
        _read_until(None, window, scaler, out)


def crop_box(inside: Box, aspect: float, across: float = 0.5, down: float = 0.5) -> Box:
    """The largest part of a box that has an aspect ratio.

    Args:
        inside: the picture inside its borders.
        aspect: height over width.
        across, down: where, 0 to 1: 0 is left and top.
    """
    width = min(inside.width, inside.height / aspect)
    height = width * aspect
    return Box(inside.x + across * (inside.width - width), inside.y + down * (inside.height - height), width, height)


def describe(plan: Plan, row: int) -> str:
    """A window, for messages."""
    found = plan.rows([row], ["clip_id", "uri", "path"])[0]
    return f"clip {found['clip_id']} ({found['path'] or found['uri']})"


def _read_until(seconds: float | None, window: Window, scaler: Scaler, out: np.ndarray) -> None:
    """See `read_frames`; packets after `seconds` of the clip are not looked at."""
    with ChosenFrames(window.address, None if window.path else window.stream) as reader:
        base = reader.time_base
        if window.kind == "image":
            picture = next(reader.frames())
            _check_size(window, picture)
            scaler.rgb(picture, out[:, 0])
            return
        if window.path is None and base != Fraction(window.time_base):
            raise MediaError(ErrorKind.SOURCE_CHANGED, f"its time base is {base}, the catalog says {window.time_base}")
        span = None if window.path else Span(window.start_pts, window.end_pts, base)
        until = None if seconds is None else (span.start_pts if span else 0) + ceil(seconds / base)

        def choose(pts: Sequence[int]) -> list[int]:
            times = pts if window.stride else [p * base for p in pts]
            return choose_frames(times, window.first, window.frames, window.stride, window.fps)

        for place, picture in reader.chosen(span, choose, until):
            _check_size(window, picture)
            scaler.rgb(picture, out[:, place])


def _enough_s(window: Window) -> float | None:
    """Seconds of the clip in which all frames of the window should lie; None: unknown."""
    if window.fps <= 0 or (window.stride == 0 and window.first > 0):
        return None
    frames = window.first / max(window.stride, 1) + window.frames
    return frames / window.fps * 1.25 + SLACK_S


def _check_size(window: Window, picture: Picture) -> None:
    width, height = picture.geometry.width, picture.geometry.height
    if abs(width - window.width) > 1 or abs(height - window.height) > 1:  # clip files have even sides
        raise MediaError(
            ErrorKind.SOURCE_CHANGED,
            f"its picture is {width} x {height}, the catalog says {window.width} x {window.height}",
        )
