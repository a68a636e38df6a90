"""The driver's side of `datakit run encode`: which windows go to the workers together, and what becomes of what comes
back."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

import polars as pl

from catalogs.records.latents import Latents
from pipelines.executor.flow import Outcome, add_up
from trainer.data.sample_reader import Window, frames_shape
from trainer.latents.encoder import EncodeJob
from trainer.planning.plan import Bucket, Plan

PIXELS_A_CALL = 129 * 256 * 256
"""Of the frames that go through the autoencoder together, where nothing else is said: one window of the longest usual
bucket, 129 images of the smallest."""
STAGE = "encode"
FACTS = ("clip_id", "video_id", "stream", "start_pts", "end_pts", "geometry", "first", "frames", "fps")
"""Columns that a window has in the plan and in `latents`."""


@dataclass
class Tally:
    """What was done.

    Attributes:
        failed: windows that could not be read or encoded, by kind of error.
        left_out: windows that others encoded meanwhile, or whose clips were forgotten.
        bytes: of latents, before compression.
        cpu_s: by stage.
    """

    encoded: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    left_out: int = 0
    bytes: int = 0
    cpu_s: dict[str, float] = field(default_factory=dict)

    def fail(self, kind: str, count: int = 1) -> None:
        self.failed[kind] = self.failed.get(kind, 0) + count

    def spend(self, cpu_s: dict[str, float]) -> None:
        add_up(self.cpu_s, cpu_s)

    def add(self, other: Tally) -> None:
        """What another one counted, too."""
        self.encoded, self.left_out, self.bytes = (
            self.encoded + other.encoded,
            self.left_out + other.left_out,
            self.bytes + other.bytes,
        )
        for kind, count in other.failed.items():
            self.fail(kind, count)
        self.spend(other.cpu_s)


class Task(NamedTuple):
    """A window to encode.

    Attributes:
        order: of the rows of a commit.
        again: it has a row with an error.
    """

    order: int
    plan: Plan
    row: int
    again: bool


class Queue:
    """Windows in the order of the plans, in batches of one shape. What failed together is tried again one by one.

    Args:
        todo: in order: `plan` (number), `row`, `bucket` (its row in the plan), `again` (it has a row with an error).
        batch: windows; None: see `PIXELS_A_CALL`.

    Attributes:
        skipped: windows that somebody else has encoded since the run began.
    """

    def __init__(self, plans: Sequence[Plan], todo: pl.DataFrame, latents: Latents, batch: int | None):
        self._plans, self._todo, self._latents, self._batch = plans, todo, latents, batch
        self._under_way: dict[str, list[Task]] = {}
        self._alone: deque[Task] = deque()
        self._number = 0
        self.skipped = 0

    def jobs(self) -> Iterator[tuple[str, Callable[[int], EncodeJob]] | None]:
        """For `Flow.run`: batches; None while those under way may come back."""
        for tasks in self._batches():
            if tasks:
                yield self._job(tasks)
            while self._alone:
                yield self._job([self._alone.popleft()])
        while self._under_way or self._alone:
            yield self._job([self._alone.popleft()]) if self._alone else None

    def take(self, outcome: Outcome) -> list[tuple[Task, dict[str, Any] | None, dict[str, str] | None]]:
        """Windows that are finished: each with its latent or its error."""
        tasks = self._under_way.pop(outcome.key)
        problem = outcome.failure
        if problem is not None:
            error = {"stage": problem.stage, "kind": str(problem.kind), "message": problem.message}
            rows = [{"latent": None, "errors": [error]}] * len(tasks)
        else:
            rows = sorted(outcome.rows, key=lambda row: row["place"])
        results = []
        for task, row in zip(tasks, rows, strict=True):
            error = row["errors"][0] if row["errors"] else None
            if len(tasks) > 1 and error is not None and (problem is not None or error["stage"] == STAGE):
                self._alone.append(task)
            else:
                results.append((task, row["latent"], error))
        return results

    def _batches(self) -> Iterator[list[Task]]:
        tasks: list[Task] = []
        shape: tuple[int, int] | None = None
        for order, (number, row, bucket, again) in enumerate(
            self._todo.select("plan", "row", "bucket", "again").iter_rows()
        ):
            plan = self._plans[number]
            if tasks and ((number, bucket) != shape or len(tasks) >= self._most(plan.buckets[bucket])):
                yield tasks
                tasks = []
            shape = number, bucket
            if self._latents.added(plan.rows([row], ["geometry"])[0]["geometry"]):
                self.skipped += 1
            else:
                tasks.append(Task(order, plan, row, again))
        yield tasks

    def _most(self, bucket: Bucket) -> int:
        return self._batch or max(1, PIXELS_A_CALL // (bucket.frames * bucket.height * bucket.width))

    def _job(self, tasks: list[Task]) -> tuple[str, Callable[[int], EncodeJob]]:
        self._number += 1
        key = str(self._number)
        self._under_way[key] = tasks
        return key, lambda threads: _job_of(tasks)


def _job_of(tasks: Sequence[Task]) -> EncodeJob:
    windows = tuple((Window.of(t.plan, t.row), t.plan.rows([t.row], ["video_id"])[0]["video_id"]) for t in tasks)
    return EncodeJob(windows, frames_shape(tasks[0].plan.buckets[windows[0][0].bucket]))


class Writer:
    """Commits what comes back: one commit is written while the next one gathers.

    Args:
        most_bytes: of latents, that a commit has.
        every_s: seconds between commits.
    """

    def __init__(self, latents: Latents, run_id: str, most_bytes: int, every_s: float, tally: Tally):
        self._latents, self._run_id, self._most_bytes, self._every_s, self._tally = (
            latents,
            run_id,
            most_bytes,
            every_s,
            tally,
        )
        self._rows: list[tuple[Task, dict[str, Any]]] = []
        self._bytes = 0
        self._committed_at = time.monotonic()
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[int] | None = None

    def take(self, task: Task, latent: dict[str, Any] | None, error: dict[str, str] | None) -> None:
        facts = task.plan.rows([task.row], [*FACTS, "bucket"])[0]
        size = len(latent["mean"]) + len(latent["std"]) if latent else 0
        self._rows.append(
            (
                task,
                {
                    **facts,
                    "bucket": task.plan.buckets[facts["bucket"]].name,
                    "shard": self._latents.catalog.shard_of(facts["video_id"]),
                    **(latent or {}),
                    "error_kind": error["kind"] if error else None,
                    "error": error["message"] if error else None,
                    "run_id": self._run_id,
                    "created_at": datetime.now(UTC),
                },
            )
        )
        self._bytes += size
        self._tally.bytes += size
        if error:
            self._tally.fail(error["kind"])
        else:
            self._tally.encoded += 1

    def commit_if_due(self) -> None:
        if self._rows and (self._bytes >= self._most_bytes or time.monotonic() - self._committed_at > self._every_s):
            self._commit()

    def close(self) -> None:
        try:
            if self._rows:
                self._commit()
            self._wait()
        finally:
            self._thread.shutdown()

    def _commit(self) -> None:
        self._wait()
        gathered, self._rows, self._bytes = sorted(self._rows, key=lambda one: one[0].order), [], 0
        rows, again = [row for _, row in gathered], [row["geometry"] for task, row in gathered if task.again]

        def left_out() -> int:
            return len(rows) - self._latents.add(rows, again)

        self._writing = self._thread.submit(left_out)
        self._committed_at = time.monotonic()

    def _wait(self) -> None:
        """Until the commit that is being written is."""
        writing, self._writing = self._writing, None
        if writing is not None:
            self._tally.left_out += writing.result()
