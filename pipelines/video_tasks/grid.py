"""The candidate grid, and the stages that measure on it. The ingest pass and `run score` share this.

A grid frame is the first frame at or after a multiple of `GRID_S` seconds from the video's first frame:
a property of the video, not of its clips. So a later pass finds the same frames by their times.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from datakit.errors import ErrorKind, MediaError
from datakit.identity import Span
from datakit.video.frame import IMAGE_SIDE, Picture
from datakit.video.reader import GRID_S, PAIR_GAP_S
from pipelines.stages.base import FrameStage, GridStage, GridStages, PairStage


@dataclass(frozen=True, slots=True)
class FrameSample:
    """What was measured on one grid frame: each stage's value, or its exception; and the picture, if wanted
    (uint8 RGB [h, w, 3], longer side at most 640)."""

    pts: int
    values: dict[str, Any]
    image: np.ndarray | None


@dataclass(frozen=True, slots=True)
class PairSample:
    """What was measured on a grid frame and its partner: each stage's value, or its exception."""

    pts: int
    partner_pts: int
    values: dict[str, Any]


@dataclass(slots=True)
class Measured:
    """The columns of one clip, the errors that left some of them null, and its pictures."""

    columns: dict[str, object]
    errors: list[dict[str, str]]
    images: list[np.ndarray]


def grid_slot(pts: int, start: int, step: Fraction) -> int:
    """Which grid interval a timestamp falls into; the first frame in each is the grid frame.

    Args:
        start: timestamp of the video's first frame.
        step: interval in pts units.
    """
    return (pts - start) * step.denominator // step.numerator


class GridProbe:
    """Feed it every frame in order; it gives samples.

    Args:
        stages: what to measure.
        start_pts: timestamp of the video's first frame.
        time_base: seconds per pts unit.
        with_images: whether samples carry pictures.
    """

    def __init__(self, stages: GridStages, start_pts: int, time_base: Fraction, with_images: bool):
        self._frame_stages, self._pair_stages = _made(stages)
        self._start = start_pts
        self._step = GRID_S / time_base
        self._gap = PAIR_GAP_S / time_base
        self._time_base = time_base
        self._with_images = with_images
        self._last_slot = -1
        self._waiting: list[Picture] = []
        self.cpu_s: dict[str, float] = dict.fromkeys(stages, 0.0)

    def grid_time(self, pts: int) -> int:
        """The grid time at or before `pts`, as pts: reading from there on (after `jump`), the probe sees
        every grid frame of a span that starts at `pts`."""
        return self._start + math.ceil(self._slot(pts) * self._step)

    def jump(self, pts: int) -> None:
        """The next frame pushed is the first one at or after `pts`, which is a grid time."""
        self._last_slot = self._slot(pts) - 1
        self._waiting.clear()

    def push(self, picture: Picture, pairs_only: bool = False) -> list[FrameSample | PairSample]:
        """Samples that this frame completes.

        Args:
            pairs_only: the frame may end pairs but begins nothing.
        """
        samples: list[FrameSample | PairSample] = []
        while self._waiting and picture.pts - self._waiting[0].pts >= self._gap:
            samples.append(self._pair(self._waiting.pop(0), picture))
        slot = self._slot(picture.pts)
        if slot > self._last_slot and not pairs_only:
            self._last_slot = slot
            samples.append(self._frame(picture))
            if self._pair_stages:
                self._waiting.append(picture)
        return samples

    @property
    def waits(self) -> bool:
        """Whether a grid frame still lacks its partner."""
        return bool(self._waiting)

    def _slot(self, pts: int) -> int:
        return grid_slot(pts, self._start, self._step)

    def _frame(self, picture: Picture) -> FrameSample:
        values = {name: self._timed(name, stage.frame, picture) for name, stage in self._frame_stages.items()}
        return FrameSample(picture.pts, values, picture.rgb(IMAGE_SIDE) if self._with_images else None)

    def _pair(self, first: Picture, second: Picture) -> PairSample:
        seconds = float((second.pts - first.pts) * self._time_base)
        values = {n: self._timed(n, stage.pair, first, second, seconds) for n, stage in self._pair_stages.items()}
        return PairSample(first.pts, second.pts, values)

    def _timed(self, name: str, call, *args) -> Any:
        started = time.thread_time()
        try:
            return call(*args)
        except Exception as e:  # kept as the value: it costs its clip a quarantine, not the video its others
            return _portable(e)
        finally:
            self.cpu_s[name] += time.thread_time() - started


class GridSummary:
    """Takes samples, gives the columns of spans.

    Args:
        stages: as for `GridProbe`.
        positions: where in a clip (0..1) image stages look; empty when there are none.
    """

    def __init__(self, stages: GridStages, positions: Sequence[float] = ()):
        self._frame_stages, self._pair_stages = _made(stages)
        self._positions = tuple(positions)
        self._frames: deque[FrameSample] = deque()
        self._pairs: deque[PairSample] = deque()

    def add(self, sample: FrameSample | PairSample) -> None:
        if isinstance(sample, FrameSample):
            self._frames.append(sample)
        else:
            self._pairs.append(sample)

    def measure(self, span: Span, facts: Mapping[str, object] = {}) -> Measured:
        """The columns of a clip, from the samples inside it; pairs must lie inside with both frames.

        Args:
            facts: columns that the clip has already, for stages that use them.
        """
        frames = [s for s in self._frames if s.pts in span]
        pairs = [s for s in self._pairs if s.pts in span and s.partner_pts in span]
        measured = Measured({}, [], self._choose_images(frames, span))
        for name, stage in self._frame_stages.items():
            known = {column: measured.columns.get(column, facts.get(column)) for column in stage.uses}
            self._summarise(name, stage, [s.values[name] for s in frames], measured, known)
        for name, stage in self._pair_stages.items():
            self._summarise(name, stage, [s.values[name] for s in pairs], measured, {})
        return measured

    def forget(self, before_pts: int) -> None:
        """Drop samples that no later span can contain."""
        for samples in (self._frames, self._pairs):
            while samples and samples[0].pts < before_pts:
                samples.popleft()

    def _summarise(
        self, name: str, stage: GridStage, values: list, measured: Measured, known: dict[str, object]
    ) -> None:
        failed = next((v for v in values if isinstance(v, Exception)), None)
        if failed is None:
            try:
                measured.columns.update(stage.summarise(values, **known))
                return
            except Exception as e:  # reported as the clip's error
                failed = e
        measured.errors.append(stage_error(name, failed))
        measured.columns.update(stage.nothing())

    def _choose_images(self, frames: list[FrameSample], span: Span) -> list[np.ndarray]:
        chosen: dict[int, np.ndarray] = {}
        for position in self._positions if frames else ():
            target = span.start_pts + position * (span.end_pts - span.start_pts)
            nearest = min(frames, key=lambda s: abs(s.pts - target))
            assert nearest.image is not None, "the probe keeps pictures where stages look at them"
            chosen[nearest.pts] = nearest.image
        return [chosen[pts] for pts in sorted(chosen)]


def _made(stages: GridStages) -> tuple[dict[str, FrameStage], dict[str, PairStage]]:
    """The stages on frames, and those on pairs."""
    made = {name: make() for name, make in stages.items()}
    frames = {name: stage for name, stage in made.items() if isinstance(stage, FrameStage)}
    return frames, {name: stage for name, stage in made.items() if isinstance(stage, PairStage)}


def stage_error(stage: str, error: Exception) -> dict[str, str]:
    """An entry of the `errors` column."""
    failure = error if isinstance(error, MediaError) else _portable(error)
    return {"stage": stage, "kind": str(failure.kind), "message": failure.message}


def _portable(error: Exception) -> MediaError:
    """The error as one that survives pickling, whatever its class."""
    return MediaError(getattr(error, "kind", ErrorKind.STAGE), f"{type(error).__name__}: {error}"[:500])
