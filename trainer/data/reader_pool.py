"""Processes that read samples into shared memory: bounded, ordered by the caller, replaced when they die or hang.

They are children as all that read media (`datakit.process.child`): started afresh, never forked, without torch or
deltalake, and with nothing that would be lost with them. The memory has no name (memfd): nothing of it outlives the
processes, and `/dev/shm` may be as small as it likes.
"""

from __future__ import annotations

import mmap
import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from datakit.errors import DatakitError, ErrorKind, MediaError
from datakit.process.child import Child, wait_for
from datakit.process.messages import Done, Failed, ToolSpec
from datakit.process.pool import media_error
from trainer.data.sample_reader import Broken, Read, SampleReader, Spec, describe
from trainer.planning.plan import Plan

IN_HAND = 2
"""Samples that a process has been given: one it reads, one to go on with."""
LONGEST_WAIT_S = 60.0
"""Between two attempts."""
ALIGNED = 64


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


READER = "trainer.data.reader_pool:Reader"


class Reader:
    """What a process does: reads samples into memory that it shares with the loader.

    Args:
        memory, size: file descriptor and bytes of that memory.
    """

    def __init__(self, spec: Spec, memory: int, size: int):
        self._shared = np.frombuffer(mmap.mmap(memory, size), np.uint8)
        os.close(memory)
        self._reader = SampleReader(spec)

    def run(self, task: Task, broken: Sequence[Broken]) -> Read | DatakitError:
        """The sample, or why there is none.

        Args:
            broken: windows that have become known to be, since the last task.
        """
        self._reader.learn(broken)
        try:
            return self._reader.read(task.window, task.seed, self._shared[task.offset : task.offset + task.size])
        except DatakitError as e:
            return e
        except Exception as e:  # stores raise errors of their own making
            return MediaError(ErrorKind.UNREADABLE, f"{type(e).__name__}: {e}"[:500])


class Crew:
    """Not for several threads.

    Args:
        count: of processes; they start when there is work.
        broken: windows known to be.
    """

    def __init__(
        self, spec: Spec, plan: Plan, count: int, ring: Ring, patience: Patience, broken: Sequence[Broken] = ()
    ):
        options = {"spec": spec, "memory": ring.fd, "size": ring.size}
        tool = ToolSpec(READER, options, memory_bytes=None, stall_s=patience.deadline_s, payloads=None)
        self._plan, self._patience = plan, patience
        self._children = [Child(tool, pass_fds=[ring.fd], log=False) for _ in range(count)]
        self._broken = list(broken)
        self._told = [0] * count
        """Windows of `_broken` that each process knows of."""
        self._waiting: dict[int | None, deque[Task]] = {number: deque() for number in (None, *range(count))}
        self._later: list[tuple[float, Task]] = []
        self._failures: dict[int, int] = {}
        self._false_starts = 0

    def give(self, task: Task) -> None:
        self._waiting[task.worker].append(task)

    def poll(self, timeout_s: float, also: Sequence[Any] = ()) -> list[tuple[Task, Read | DatakitError]]:
        """Samples that are done, in no order. Waits until some are, until one of `also` can be read from, or so long.

        An error ends its sample for good: the data are unusable, or patience is at an end.

        Raises:
            DatakitError: one process after the other dies before it has begun.
        """
        self._hand_out()
        soonest = min([timeout_s, *(at - time.monotonic() for at, _ in self._later)])
        done: list[tuple[Task, Read | DatakitError]] = []
        for child in wait_for(self._children, soonest, also):
            done += self._receive(child)
        self._hand_out()
        return done

    def close(self) -> None:
        for child in self._children:
            child.stop()

    def _hand_out(self) -> None:
        now = time.monotonic()
        for at, task in self._later:
            if at <= now:
                self._waiting[task.worker].appendleft(task)
        self._later = [(at, task) for at, task in self._later if at > now]
        for in_hand in range(IN_HAND):  # everybody gets a first one before anybody gets a second
            for i, child in enumerate(self._children):
                queues = [q for q in (self._waiting[i], self._waiting[None]) if q]
                if queues and len(child.in_hand) <= in_hand:
                    task = min(queues, key=lambda q: q[0].number).popleft()
                    if not child.running:
                        self._told[i] = 0
                    child.give((task, self._broken[self._told[i] :]))
                    self._told[i] = len(self._broken)

    def _receive(self, child: Child) -> list[tuple[Task, Read | DatakitError]]:
        """Raises:
        DatakitError: one process after the other dies before it has begun.
        """
        tasks: list[Task] = [task for task, _ in child.in_hand]
        began = child.loaded
        match child.receive():
            case None:  # it has loaded
                self._false_starts = 0
                return []
            case Failed() as failure:
                for task, _ in reversed(child.take_back() if child.connection is None else []):
                    self._waiting[task.worker].appendleft(task)  # it was not at them: they are not to blame
                if not began:
                    self._count_false_start(failure)
                return self._again(tasks[0], self._error_of(failure)) if began and tasks else []
            case Done(answer=MediaError() as error):
                return self._again(tasks[0], error)
            case Done(answer=answer):
                if isinstance(answer, Read):
                    self._broken += [b for b in answer.broken if b not in self._broken]
                self._failures.pop(tasks[0].number, None)
                return [(tasks[0], answer)]
            case other:
                raise AssertionError(f"a reader gave a {type(other).__name__}")

    def _count_false_start(self, failure: Failed) -> None:
        self._false_starts += 1
        if self._false_starts > self._patience.retries:
            raise DatakitError(
                f"the loader's processes die while they start ({failure.death or failure.message}): what they said is "
                "in the log"
            )

    def _error_of(self, failure: Failed) -> MediaError:
        if failure.kind == ErrorKind.TIMEOUT:
            return MediaError(failure.kind, f"no answer within {self._patience.deadline_s:g} s")
        return media_error(failure)

    def _again(self, task: Task, error: MediaError) -> list[tuple[Task, Read | DatakitError]]:
        failures = self._failures[task.number] = self._failures.get(task.number, 0) + 1
        if failures > self._patience.retries:
            return [(task, self._patience.gives_up(self._plan, task.window, failures, error))]
        self._later.append((time.monotonic() + self._patience.wait_s(failures), task))
        return []
