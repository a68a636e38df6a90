"""A pool of processes for work that may crash: each task's results arrive one by one, a dead process costs one task.

Processes are spawned, never forked: deltalake's threads do not survive a fork. What they run is imported by name,
and must not import deltalake.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from datakit.errors import ErrorKind, MediaError

STALL_S = 300.0
"""Seconds without a sign of life after which a process is killed."""


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
        self._target = target
        self._most = workers or len(os.sched_getaffinity(0))
        self._stall_s = stall_s
        self._idle: list[_Worker] = []
        self._busy: dict[Connection, _Worker] = {}

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exc) -> None:
        for worker in [*self._idle, *self._busy.values()]:
            worker.stop()

    def run(self, tasks: Iterable[Any]) -> Iterator[Result | End]:
        """Results in the order in which they come; tasks are taken as processes become free."""
        waiting = iter(tasks)  # asked again after its end: it may have got more
        while True:
            while len(self._busy) < self._most and (task := next(waiting, None)) is not None:
                self._start(task)
            if not self._busy:
                return
            for connection in wait(list(self._busy), timeout=1.0):
                yield from self._receive(self._busy[connection])
            for worker in [w for w in self._busy.values() if time.monotonic() - w.heard_at > self._stall_s]:
                yield self._lost(worker, MediaError(ErrorKind.TIMEOUT, f"no progress for {self._stall_s:.0f} s"))

    def _start(self, task: Any) -> None:
        worker = self._idle.pop() if self._idle else _Worker(self._target)
        worker.give(task)
        self._busy[worker.connection] = worker

    def _receive(self, worker: _Worker) -> Iterator[Result | End]:
        try:
            kind, value = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join()
            yield self._lost(
                worker,
                MediaError(ErrorKind.CRASH, f"the process that read it died ({_cause(worker.process.exitcode)})"),
            )
            return
        worker.heard_at = time.monotonic()
        if kind == "value":
            if value is not None:
                yield Result(worker.task, value)
            return
        del self._busy[worker.connection]
        self._idle.append(worker)
        yield End(worker.task, value)

    def _lost(self, worker: _Worker, error: MediaError) -> End:
        del self._busy[worker.connection]
        worker.stop()
        return End(worker.task, error)


class _Worker:
    def __init__(self, target: str):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(target, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.task: Any = None
        self.heard_at = time.monotonic()

    def give(self, task: Any) -> None:
        self.task, self.heard_at = task, time.monotonic()
        try:
            self.connection.send(task)
        except OSError:
            return  # it has died: receiving says so

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(target: str, connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    _volunteer()
    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(module), name)
    while True:
        try:
            task = connection.recv()
        except (EOFError, OSError):
            return  # the parent is gone
        error = None
        try:
            for value in function(task):
                connection.send(("value", value))
        except MediaError as e:
            error = e
        except MemoryError as e:
            error = MediaError(ErrorKind.OUT_OF_MEMORY, f"out of memory: {e}")
        except Exception as e:
            error = MediaError(ErrorKind.STAGE, f"{type(e).__name__}: {e}"[:500])
        with contextlib.suppress(BrokenPipeError):  # the next receive sees that the parent is gone
            connection.send(("end", error))


def _volunteer() -> None:
    """When memory runs out, the kernel takes this process and not its parent."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:
        return


def _cause(exit_code: int | None) -> str:
    return signal.Signals(-exit_code).name if exit_code is not None and exit_code < 0 else f"exit code {exit_code}"
