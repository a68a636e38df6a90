"""A pool of processes for work that may crash: each task's results arrive one by one, a dead process costs one task.

Processes are spawned, never forked: deltalake's threads do not survive a fork. What they run is imported by name,
and must not import deltalake.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from datakit.errors import ErrorKind, MediaError
from datakit.process.child import Child, wait_for
from datakit.process.messages import Done, Failed, ToolSpec

STALL_S = 300.0
"""Seconds without a sign of life after which a process is killed."""
POLL_S = 1.0


@dataclass(frozen=True)
class Result:
    """Something that a task yielded."""

    task: Any
    value: Any


@dataclass(frozen=True)
class End:
    """A task is over; `error`: why before its end."""

    task: Any
    error: MediaError | None = None


class Pool:
    """Args:
    target: `module:function`, a generator function of a task; whatever it yields but None becomes a `Result`. None is a
        sign of life.
    workers: processes at most; None: one per processor.
    """

    def __init__(self, target: str, workers: int | None = None, stall_s: float = STALL_S):
        self._spec = ToolSpec(target, memory_bytes=None, stall_s=stall_s)
        self._most = workers or len(os.sched_getaffinity(0))
        self._idle: list[Child] = []
        self._busy: list[Child] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exc: object) -> None:
        for child in [*self._idle, *self._busy]:
            child.stop()

    def run(self, tasks: Iterable[Any]) -> Iterator[Result | End]:
        """Results in the order in which they come; tasks are taken as processes become free."""
        waiting = iter(tasks)  # asked again after its end: it may have got more
        while True:
            while len(self._busy) < self._most and (task := next(waiting, None)) is not None:
                self._busy.append(self._idle.pop() if self._idle else Child(self._spec))
                self._busy[-1].give(task)
            if not self._busy:
                return
            for child in wait_for(self._busy, POLL_S):
                yield from self._receive(child)

    def _receive(self, child: Child) -> Iterator[Result | End]:
        task = child.in_hand[0]
        match child.receive():
            case None:
                return
            case Done() | Failed() as end:
                child.take_back()  # of a process that died before it began
                self._busy.remove(child)
                self._idle.append(child)
                yield End(task, media_error(end) if isinstance(end, Failed) else None)
            case value:
                yield Result(task, value)


def media_error(failure: Failed) -> MediaError:
    """What a file that could not be read has for an error."""
    if failure.death is not None:
        return MediaError(ErrorKind.CRASH, f"the process that read it died ({failure.death})")
    return MediaError(failure.kind, failure.message, failure.stage)
