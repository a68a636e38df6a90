"""Processes that read samples into shared memory: bounded, ordered by the caller, replaced when they die or hang.

They are started afresh, never forked, import neither torch nor deltalake, and hold nothing that would be lost with
them. The memory has no name (memfd): nothing of it outlives the processes, and `/dev/shm` may be as small as it likes.
"""

from __future__ import annotations

import mmap
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from datakit.errors import DatakitError, ErrorKind, MediaError
from trainer.data.sample_reader import Broken, Read, Spec, describe
from trainer.planning.plan import Plan

IN_HAND = 2
"""Samples that a process has been given: one it reads, one to go on with."""
START_S = 300.0
"""A process that has not started by then is taken for dead."""
END_S, KILL_S = 1.0, 10.0
"""A process that closed its connection, and one that was killed, is waited for so long."""
LONGEST_WAIT_S = 60.0
"""Between two attempts."""
ALIGNED = 64
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Patience:
    """What is done about reads that fail for reasons that may pass.

    Attributes:
        retries: attempts after the first.
        backoff_s: wait before the second attempt; doubled for each further one.
        deadline_s: after which a read counts as hung.
    """

    retries: int
    backoff_s: float
    deadline_s: float

    def wait_s(self, failures: int) -> float:
        return min(LONGEST_WAIT_S, self.backoff_s * 2 ** (failures - 1))

    def gives_up(self, plan: Plan, window: int, failures: int, error: Exception) -> DatakitError:
        why = f"{error.kind}: {error.message}" if isinstance(error, MediaError) else f"{type(error).__name__}: {error}"
        return DatakitError(
            f"{describe(plan, window)} could not be read in {failures} attempts ({why}): the run stops rather than "
            f"skip it. "
            "Resume once the storage answers again, or plan without the clip"
        )


class Ring:
    """Shared memory given out and taken back in order.

    Args:
        size: bytes; they are taken from the system when they are first written.
    """

    def __init__(self, size: int):
        self.size = size
        self.fd = os.memfd_create("datakit-loader")
        os.ftruncate(self.fd, size)
        self._taken: deque[tuple[int, int]] = deque()
        self.bytes = np.frombuffer(mmap.mmap(self.fd, size), np.uint8)

    def take(self, size: int) -> int | None:
        """Offset of so many bytes; None: wait until some are given back.

        Raises:
            ValueError: it never has so many.
        """
        size = -(-size // ALIGNED) * ALIGNED
        if size > self.size:
            raise ValueError(f"{size} bytes of {self.size}")
        start = self._free(size)
        if start is not None:
            self._taken.append((start, start + size))
        return start

    def give_back(self) -> None:
        """What was taken first."""
        self._taken.popleft()

    def close(self) -> None:
        del self.bytes
        os.close(self.fd)

    def _free(self, size: int) -> int | None:
        if not self._taken:
            return 0
        (oldest, _), (newest, end) = self._taken[0], self._taken[-1]
        if newest < oldest:  # wrapped
            return end if end + size <= oldest else None
        if end + size <= self.size:
            return end
        return 0 if size <= oldest else None


@dataclass(frozen=True)
class Task:
    """A sample to read.

    Attributes:
        number: tasks with lower ones go first.
        offset, size: of the bytes to fill.
        worker: who should do it, as it may have neighbours in memory; None: anybody.
    """

    number: int
    window: int
    seed: int
    offset: int
    size: int
    worker: int | None = None


class Crew:
    """Not for several threads.

    Args:
        count: of processes; they start when there is work.
        broken: windows known to be.
    """

    def __init__(
        self, spec: Spec, plan: Plan, count: int, ring: Ring, patience: Patience, broken: Sequence[Broken] = ()
    ):
        self._spec, self._plan, self._ring, self._patience = spec, plan, ring, patience
        self._workers: list[_Worker | None] = [None] * count
        self._broken = list(broken)
        self._waiting: dict[int | None, deque[Task]] = {number: deque() for number in (None, *range(count))}
        self._later: list[tuple[float, Task]] = []
        self._failures: dict[int, int] = {}
        self._false_starts = 0

    def give(self, task: Task) -> None:
        self._waiting[task.worker].append(task)

    def poll(self, timeout_s: float, also: Sequence[Any] = ()) -> list[tuple[Task, Read | DatakitError]]:
        """Samples that are done, in no order. Waits until some are, until one of `also` can be read from, or so long.

        An error ends its sample for good: the data are unusable, or patience is at an end.
        """
        self._hand_out()
        done: list[tuple[Task, Read | DatakitError]] = []
        by_connection = {w.connection: i for i, w in enumerate(self._workers) if w is not None}
        for ready in wait([*by_connection, *also], timeout=self._wait_s(timeout_s)):
            if ready in by_connection:
                done += self._receive(by_connection[ready])
        now = time.monotonic()
        for i, worker in enumerate(self._workers):
            if worker is not None and worker.is_late(now, self._patience.deadline_s):
                done += self._lose(i, ErrorKind.TIMEOUT, f"no answer within {now - worker.since:.0f} s")
        self._hand_out()
        return done

    def close(self) -> None:
        for worker in self._workers:
            if worker is not None:
                worker.stop()
        self._workers = [None] * len(self._workers)

    def _wait_s(self, timeout_s: float) -> float:
        now = time.monotonic()
        starts = [at - now for at, _ in self._later]
        ends = [w.late_at(self._patience.deadline_s) - now for w in self._workers if w is not None and w.in_hand]
        return max(0.0, min([timeout_s, *starts, *ends]))

    def _hand_out(self) -> None:
        now = time.monotonic()
        for at, task in self._later:
            if at <= now:
                self._waiting[task.worker].appendleft(task)
        self._later = [(at, task) for at, task in self._later if at > now]
        for in_hand in range(IN_HAND):  # everybody gets a first one before anybody gets a second
            for i in range(len(self._workers)):
                worker = self._workers[i]
                if (len(worker.in_hand) if worker is not None else 0) > in_hand:
                    continue
                queues = [q for q in (self._waiting[i], self._waiting[None]) if q]
                if not queues:
                    continue
                if worker is None:
                    worker = self._workers[i] = _Worker(self._spec, self._ring)
                worker.give(min(queues, key=lambda q: q[0].number).popleft(), self._broken)

    def _receive(self, i: int) -> list[tuple[Task, Read | DatakitError]]:
        worker = self._workers[i]
        try:
            answer = worker.connection.recv()
        except (EOFError, OSError):
            return self._lose(i, ErrorKind.CRASH, "the process that read it died")
        worker.started, worker.since = True, time.monotonic()
        self._false_starts = 0
        if answer is None:
            return []
        task = worker.in_hand.popleft()
        if isinstance(answer, MediaError):
            return self._again(task, answer)
        if isinstance(answer, Read):
            self._broken += [b for b in answer.broken if b not in self._broken]
        self._failures.pop(task.number, None)
        return [(task, answer)]

    def _lose(self, i: int, kind: ErrorKind, message: str) -> list[tuple[Task, Read | DatakitError]]:
        """A process is gone, or has to go. What it was at may be to blame; what else it was given is not.

        Raises:
            DatakitError: one after the other dies before it has begun.
        """
        worker, self._workers[i] = self._workers[i], None
        code = worker.stop(END_S if kind == ErrorKind.CRASH else 0.0)
        if kind == ErrorKind.CRASH:
            message += f" ({_cause(code)})"
        blamed = 1 if worker.started else 0
        for task in list(worker.in_hand)[blamed:][::-1]:
            self._waiting[task.worker].appendleft(task)
        if not worker.started:
            self._false_starts += 1
            if self._false_starts > self._patience.retries:
                raise DatakitError(
                    f"the loader's processes die while they start ({_cause(code)}): what they said is in the log"
                )
        return self._again(worker.in_hand[0], MediaError(kind, message)) if worker.started and worker.in_hand else []

    def _again(self, task: Task, error: MediaError) -> list[tuple[Task, Read | DatakitError]]:
        failures = self._failures[task.number] = self._failures.get(task.number, 0) + 1
        if failures > self._patience.retries:
            return [(task, self._patience.gives_up(self._plan, task.window, failures, error))]
        self._later.append((time.monotonic() + self._patience.wait_s(failures), task))
        return []


class _Worker:
    """A process and what it was given, the first of which it is at."""

    def __init__(self, spec: Spec, ring: Ring):
        ours, theirs = socket.socketpair()
        numbers = [theirs.fileno(), ring.fd]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "trainer.data.reader_main", *map(str, numbers), str(ring.size)],
            pass_fds=numbers,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **dict.fromkeys(THREADS, "1")},
        )
        theirs.close()
        self.connection = Connection(ours.detach())
        self._send(spec)
        self.in_hand: deque[Task] = deque()
        self.since, self.started = time.monotonic(), False
        self._told = 0

    def give(self, task: Task, broken: list[Broken]) -> None:
        """Args:
        broken: all windows known to be; those are sent that it was not told of.
        """
        if not self.in_hand and self.started:
            self.since = time.monotonic()
        self.in_hand.append(task)
        self._send((task, broken[self._told :]))
        self._told = len(broken)

    def _send(self, thing: Any) -> None:
        with suppress(OSError):  # it has died: receiving says so
            self.connection.send(thing)

    def late_at(self, deadline_s: float) -> float:
        return self.since + (deadline_s if self.started else START_S)

    def is_late(self, now: float, deadline_s: float) -> bool:
        return bool(self.in_hand) and now > self.late_at(deadline_s)

    def stop(self, patience_s: float = 0.0) -> int | None:
        """Kill it, unless it ends by itself within `patience_s`.

        Returns:
            its exit code, negative for a signal; None: it hangs in the kernel, and dies when that lets it.
        """
        for seconds in (patience_s, KILL_S):
            try:
                code = self.process.wait(seconds)
                break
            except subprocess.TimeoutExpired:
                code = None
                self.process.kill()
        self.connection.close()
        return code


def _cause(exit_code: int | None) -> str:
    if exit_code is None:
        return "it closed its connection"
    return signal.Signals(-exit_code).name if exit_code < 0 else f"exit code {exit_code}"
