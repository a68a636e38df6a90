"""The Ray actors. Each owns one child process (`datakit.process.child`) and does nothing dangerous itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from datakit.errors import ConfigError, DatakitError, ErrorKind
from datakit.process.child import Child
from datakit.process.messages import Done, Failed, ToolSpec
from datakit.version import __version__
from pipelines.video_tasks.messages import Advance, ClipBatch, VideoFacts

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Header:
    """Announces a batch of clip rows; the next object of the stream holds their pictures, if `images`."""

    rows: list[dict]
    images: bool


@dataclass(frozen=True)
class Restarted:
    """The worker process died and the video starts anew: forget what came before."""

    failure: Failed


@dataclass(frozen=True)
class StageAnswer:
    """One stage's columns for each clip of a batch, or the error that left them null."""

    results: list[dict | Failed]
    cpu_s: float


Streamed = Header | list[list["np.ndarray"]] | Restarted | Advance | VideoFacts | Done | Failed
"""What a video worker gives: after a `Header` with `images` comes the list of its clips' pictures."""


class VideoWorker:
    """Streams one video at a time through a video tool (`analyse`, `rescore`).

    Args:
        spec: the tool.
        attempts: tries of a video whose process died.
        with_images: whether pictures are passed on.
    """

    def __init__(self, spec: ToolSpec, attempts: int, with_images: bool):
        self._child = Child(spec)
        self._child.start()
        self._attempts = attempts
        self._with_images = with_images

    def version(self) -> str:
        return __version__

    def process(self, payload: Any) -> Iterator[Streamed]:
        """What the tool gives, batches as `Header` and pictures; last a `Done` or a `Failed`."""
        for attempt in range(1, self._attempts + 1):
            for item in self._child.stream(payload):
                match item:
                    case Failed(child_died=True) if attempt < self._attempts:
                        yield Restarted(item)
                    case Failed() if attempt > 1:
                        yield replace(item, message=f"{item.message} ({attempt} attempts)")
                        return
                    case Done() | Failed():
                        yield item
                        return
                    case ClipBatch():
                        yield from self._batch(item)
                    case Advance() | VideoFacts():
                        yield item
                    case _:
                        raise AssertionError(f"{self._child.spec.target} gave a {type(item).__name__}")

    def _batch(self, batch: ClipBatch) -> Iterator[Streamed]:
        passed_on = self._with_images and any(batch.images)
        yield Header(batch.rows, passed_on)
        if passed_on:
            yield batch.images


class EngineWorker:
    """Runs a stage that lives in this actor and takes many calls at once (a language model)."""

    def __init__(self, spec: ToolSpec):
        self._spec = spec
        self._lock = threading.Lock()
        self._counted = time.process_time()

    def version(self) -> str:
        """Once the stage is loaded."""
        from datakit.process.child_main import load_tool

        self._stage = load_tool(self._spec)
        return __version__

    def process(self, rows: list[list[dict]], *images: list[list]) -> list[StageAnswer]:
        """Answers in the order of the batches; see `StageWorker.process`."""
        answers = []
        for batch, pictures in zip(rows, images, strict=True):
            answers.append(StageAnswer(self._run(batch, pictures), self._spent()))
        return answers

    def _run(self, rows: list[dict], images: list) -> list[dict | Failed]:
        try:
            results = self._stage.run(rows, images)
        except DatakitError:
            raise  # the stage as a whole cannot go on
        except Exception as e:  # these clips' own
            return [Failed(ErrorKind.STAGE, f"{type(e).__name__}: {e}"[:500])] * len(rows)
        if len(results) != len(rows):
            raise AssertionError(f"{len(rows)} clips went in, {len(results)} came out")
        return results

    def _spent(self) -> float:
        """CPU seconds of this process since the last call that asked."""
        with self._lock:
            before, self._counted = self._counted, time.process_time()
            return self._counted - before


class StageWorker:
    """Runs an image stage over batches of clips. A batch that fails is retried clip by clip."""

    def __init__(self, spec: ToolSpec):
        self._child = Child(spec)
        self._child.start()

    def version(self) -> str:
        """Once the stage is loaded.

        Raises:
            ConfigError: it cannot be.
        """
        failure = self._child.ready()
        if failure is not None:
            reason = " ".join(failure.message.split())
            raise ConfigError(f"a stage cannot start ({self._child.spec.target.split(':')[-1]}): {reason}")
        return __version__

    def process(self, rows: list[list[dict]], *images: list[list]) -> list[StageAnswer]:
        """Answers in the order of the batches.

        Args:
            rows: the clips of each batch.
            images: the pictures of each batch, as `ClipBatch.images`.
        """
        flat_rows = [row for batch in rows for row in batch]
        flat_images = [clip for batch in images for clip in batch]
        if len(flat_rows) != len(flat_images):
            raise AssertionError(f"{len(flat_rows)} clips came with {len(flat_images)} sets of pictures")
        results, cpu_s = self._run(flat_rows, flat_images)
        if isinstance(results, Failed):
            results = []
            for row, clip in zip(flat_rows, flat_images, strict=True):
                single, spent = self._run([row], [clip])
                results += [single] if isinstance(single, Failed) else single
                cpu_s += spent
        if len(results) != len(flat_rows):
            raise AssertionError(f"{len(flat_rows)} clips went in, {len(results)} came out")
        share = cpu_s / max(1, len(rows))
        answers, start = [], 0
        for batch in rows:
            answers.append(StageAnswer(results[start : start + len(batch)], share))
            start += len(batch)
        return answers

    def _run(self, rows: list[dict], images: list[list]) -> tuple[list[dict | Failed] | Failed, float]:
        """The stage's answer to each clip, or why there is none; CPU seconds."""
        end = self._child.ask((rows, images))
        if isinstance(end, Failed):
            return end, end.cpu_s
        if len(end.answer) != len(rows):
            return Failed(ErrorKind.STAGE, f"the stage answered {len(end.answer)} of {len(rows)} clips"), end.cpu_s
        return end.answer, end.cpu_s
