"""Reading ahead: a thread that keeps processes busy and puts what they read together, step by step, in order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe
from typing import Generic, TypeVar

import numpy as np

from datakit.errors import DatakitError
from trainer.data.batch_sampler import MicroBatch
from trainer.data.reader_pool import Crew, Ring, Task
from trainer.data.sample_reader import Read

STEPS_READY = 1
"""Steps that are put together ahead of time; what is read beyond them stays in the ring."""
POLL_S = 1.0

T = TypeVar("T")


@dataclass(frozen=True)
class Flight(Generic[T]):
    """A micro-batch to read.

    Attributes:
        batch: what.
        sample_bytes: memory of each sample.
        workers: who should read each sample (see `Task`).
        land: makes the finished batch of reads and their bytes.
        last: of its step.
    """

    batch: MicroBatch
    sample_bytes: int
    workers: tuple[int | None, ...]
    land: Callable[[Sequence[Read], Sequence[np.ndarray]], T]
    last: bool


class Prefetcher(Generic[T]):
    """Iterate to get, for each step, what its flights landed as, in order. Close it at the end.

    Args:
        flights: endless; taken in the thread.
    """

    def __init__(self, flights: Iterator[Flight[T]], crew: Crew, ring: Ring):
        self._flights, self._crew, self._ring = flights, crew, ring
        self._aloft: deque[_Aloft[T]] = deque()
        self._tasks: dict[int, tuple[_Aloft[T], int]] = {}
        self._given = 0
        self._next: Flight[T] | None = None
        self._landed: list[T] = []
        self._ready: deque[list[T]] = deque()
        self._error: BaseException | None = None
        self._closing = False
        self._changed = threading.Condition()
        self._bell, self._ring_bell = Pipe(duplex=False)
        self._thread = threading.Thread(target=self._run, name="datakit-prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Prefetcher[T]:
        return self

    def __next__(self) -> list[T]:
        """Raises:
        DatakitError: a sample of the next step cannot be read.
        """
        if self._closing:
            raise DatakitError("the loader is closed")
        with self._changed:
            while not self._ready and self._error is None:
                self._changed.wait()
            if not self._ready:
                raise self._error
            step = self._ready.popleft()
        self._ring_bell.send_bytes(b"!")
        return step

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        self._ring_bell.send_bytes(b"!")
        self._thread.join()
        self._bell.close()
        self._ring_bell.close()
        self._aloft.clear()
        self._tasks.clear()
        self._ring.close()

    def _run(self) -> None:
        try:
            while not self._closing:
                self._launch()
                self._land()
                for task, answer in self._crew.poll(POLL_S, [self._bell]):
                    aloft, i = self._tasks.pop(task.number)
                    aloft.answers[i] = answer
                while self._bell.poll():
                    self._bell.recv_bytes()
        except BaseException as e:  # the thread that iterates raises it
            self._error = e
        finally:
            self._crew.close()
            with self._changed:
                self._changed.notify_all()

    def _launch(self) -> None:
        """Give out what fits into the ring."""
        while True:
            self._next = self._next or next(self._flights)
            samples, size = len(self._next.batch.windows), self._next.sample_bytes
            offset = self._ring.take(samples * size)
            if offset is None:
                return
            aloft = _Aloft(self._next, offset, [None] * samples)
            self._aloft.append(aloft)
            for i, (window, seed, worker) in enumerate(
                zip(aloft.flight.batch.windows, aloft.flight.batch.seeds, aloft.flight.workers)
            ):
                self._tasks[self._given] = aloft, i
                self._crew.give(Task(self._given, window, seed, offset + i * size, size, worker))
                self._given += 1
            self._next = None

    def _land(self) -> None:
        """Put together what has been read, in order, as far as there is room for it.

        Raises:
            DatakitError: of the first sample that cannot be read; the steps before it are delivered.
        """
        while self._aloft and None not in self._aloft[0].answers and len(self._ready) < STEPS_READY:
            aloft = self._aloft[0]
            for answer in aloft.answers:
                if isinstance(answer, DatakitError):
                    raise answer
            size = aloft.flight.sample_bytes
            starts = range(aloft.offset, aloft.offset + size * len(aloft.answers), size)
            self._landed.append(aloft.flight.land(aloft.answers, [self._ring.bytes[s : s + size] for s in starts]))
            self._aloft.popleft()
            self._ring.give_back()
            if aloft.flight.last:
                with self._changed:
                    self._ready.append(self._landed)
                    self._changed.notify_all()
                self._landed = []


@dataclass(eq=False)
class _Aloft(Generic[T]):
    """A flight on its way, and what came back so far."""

    flight: Flight[T]
    offset: int
    answers: list[Read | DatakitError | None] = field(default_factory=list)
