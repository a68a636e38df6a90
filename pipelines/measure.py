"""The candidate grid, and the stages that measure on it. The ingest pass and `run score` share this.

A grid frame is the first frame at or after a multiple of `GRID_S` seconds from the video's first frame:
a property of the video, not of its clips. So a later pass finds the same frames by their times.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol, Sequence

import numpy as np

from datakit.clip import Span
from datakit.errors import ErrorKind
from datakit.video.decode import GRID_S, PAIR_GAP_S
from datakit.video.picture import IMAGE_SIDE, Picture
from pipelines.stages.letterbox import Letterbox
from pipelines.stages.motion import Motion, MotionVmaf
from pipelines.stages.quality import Quality


class FrameStage(Protocol):
    """A measurement on single grid frames."""

    name: str
    columns: tuple[str, ...]

    def frame(self, picture: Picture) -> Any: ...
    def summarise(self, frames: Sequence[Any]) -> dict[str, object]: ...


class PairStage(Protocol):
    """A measurement on a grid frame and the first frame at least 40 ms later."""

    name: str
    columns: tuple[str, ...]

    def pair(self, first: Picture, second: Picture, seconds: float) -> Any: ...
    def summarise(self, pairs: Sequence[Any]) -> dict[str, object]: ...


GRID_STAGES = {
    "motion": lambda options: Motion(options.get("method", "dis")),
    "motion_vmaf": lambda options: MotionVmaf(),
    "letterbox": lambda options: Letterbox(),
    "quality": lambda options: Quality(),
}


@dataclass(slots=True)
class Sample:
    """What was measured at one grid frame. Values are whatever the stage returned, or its exception."""

    pts: int
    frames: dict[str, Any] = field(default_factory=dict)
    pair_pts: int | None = None
    pairs: dict[str, Any] = field(default_factory=dict)
    image: np.ndarray | None = None


@dataclass(slots=True)
class Measured:
    """The columns of one clip, the errors that left some of them null, and its pictures."""

    columns: dict[str, object]
    errors: list[dict[str, str]]
    images: list[np.ndarray]


class GridMeter:
    """Feed it every frame in order; ask it for the columns of a span afterwards.

    Args:
        stages: name -> options, of `GRID_STAGES`.
        start_pts: timestamp of the video's first frame.
        time_base: seconds per pts unit.
        positions: where in a clip (0..1) image stages look; empty when there are none.
    """

    def __init__(self, stages: dict[str, dict], start_pts: int, time_base: Fraction, positions: Sequence[float] = ()):
        made = {name: GRID_STAGES[name](options) for name, options in stages.items()}
        self._frame_stages: dict[str, FrameStage] = {n: s for n, s in made.items() if hasattr(s, "frame")}
        self._pair_stages: dict[str, PairStage] = {n: s for n, s in made.items() if hasattr(s, "pair")}
        self._start = start_pts
        self._step = GRID_S / time_base
        self._gap = PAIR_GAP_S / time_base
        self._time_base = time_base
        self._positions = tuple(positions)
        self._last_k = -1
        self._samples: deque[Sample] = deque()
        self._waiting: list[tuple[Picture, Sample]] = []
        self.cpu_s: dict[str, float] = dict.fromkeys(made, 0.0)

    def grid_pts(self, pts: int) -> int:
        """The grid time at or before `pts`: reading from there on, the meter sees every grid frame of a
        span that starts at `pts`."""
        return self._start + -(-(self._k(pts) * self._step.numerator) // self._step.denominator)

    def jump(self, pts: int) -> None:
        """The next frame pushed is the first one at or after `pts`, which is a grid time."""
        self._last_k = self._k(pts) - 1
        self._waiting.clear()

    def push(self, picture: Picture) -> None:
        while self._waiting and picture.pts - self._waiting[0][0].pts >= self._gap:
            first, sample = self._waiting.pop(0)
            self._measure_pair(first, picture, sample)
        k = self._k(picture.pts)
        if k > self._last_k:
            self._last_k = k
            self._measure_frame(picture)

    def measure(self, span: Span) -> Measured:
        """The columns of a clip, from the samples inside it."""
        inside = [s for s in self._samples if s.pts in span]
        columns: dict[str, object] = {}
        errors: list[dict[str, str]] = []
        for name, stage in self._frame_stages.items():
            self._summarise(name, stage, [s.frames[name] for s in inside], columns, errors)
        for name, stage in self._pair_stages.items():
            values = [s.pairs[name] for s in inside if s.pair_pts is not None and s.pair_pts in span]
            self._summarise(name, stage, values, columns, errors)
        return Measured(columns, errors, self._choose_images(inside, span))

    def forget(self, before_pts: int) -> None:
        """Drop samples that no later span can contain."""
        while self._samples and self._samples[0].pts < before_pts:
            self._samples.popleft()

    def _k(self, pts: int) -> int:
        return (pts - self._start) * self._step.denominator // self._step.numerator

    def _measure_frame(self, picture: Picture) -> None:
        sample = Sample(picture.pts)
        for name, stage in self._frame_stages.items():
            sample.frames[name] = self._timed(name, stage.frame, picture)
        if self._positions:
            sample.image = picture.rgb(IMAGE_SIDE)
        self._samples.append(sample)
        if self._pair_stages:
            self._waiting.append((picture, sample))

    def _measure_pair(self, first: Picture, second: Picture, sample: Sample) -> None:
        seconds = float((second.pts - first.pts) * self._time_base)
        sample.pair_pts = second.pts
        for name, stage in self._pair_stages.items():
            sample.pairs[name] = self._timed(name, stage.pair, first, second, seconds)

    def _timed(self, name: str, call, *args) -> Any:
        """A failing measurement costs its clip a quarantine, not the video its other clips."""
        started = time.thread_time()
        try:
            return call(*args)
        except Exception as e:  # kept as the value, reported by `_summarise`
            return e
        finally:
            self.cpu_s[name] += time.thread_time() - started

    def _summarise(self, name: str, stage: FrameStage | PairStage, values: list, columns: dict, errors: list) -> None:
        failed = next((v for v in values if isinstance(v, Exception)), None)
        result = failed or self._timed(name, stage.summarise, values)
        if isinstance(result, Exception):
            errors.append(stage_error(name, result))
            result = dict.fromkeys(stage.columns)
        columns.update(result)

    def _choose_images(self, samples: list[Sample], span: Span) -> list[np.ndarray]:
        chosen: dict[int, np.ndarray] = {}
        for position in self._positions if samples else ():
            target = span.start_pts + position * (span.end_pts - span.start_pts)
            nearest = min(samples, key=lambda s: abs(s.pts - target))
            chosen[nearest.pts] = nearest.image
        return [chosen[pts] for pts in sorted(chosen)]


def stage_error(stage: str, error: Exception) -> dict[str, str]:
    """An entry of the `errors` column."""
    kind = getattr(error, "kind", ErrorKind.STAGE)
    return {"stage": stage, "kind": str(kind), "message": f"{type(error).__name__}: {error}"[:500]}
