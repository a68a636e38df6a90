"""The order of samples: a pure function of (plan, seed, epoch, position). It knows nothing of ranks and workers.

- A window whose repeat is 1 is drawn exactly once an epoch. With a repeat of r, the n windows of a part and bucket are
  walked through again and again, each time in another order, ⌊(e + 1)·r·n⌋ of them by the end of epoch e.
- Within a bucket the shuffle is hierarchical: files are shuffled, then the windows of `FILES_AT_ONCE` files at a time.
  So reads stay near each other. (Whole files of few windows count as one, up to `FILE_WINDOWS`: that costs no
  randomness, as neighbours in the plan are neighbours by content hash.)
- Samples are cut into micro-batches of the bucket's size, these into steps of `plan.global_batches`: of one bucket as
  far as possible, what remains of the buckets together. The order of buckets is shuffled; the one smaller step is the
  last.

Random numbers are those of Philox's bits and BLAKE2b, which no version of NumPy changes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from datakit.errors import ConfigError
from datakit.hashing import hash_bytes, seed_of
from trainer.planning.plan import Plan

FILES_AT_ONCE = 16
"""Files whose windows are shuffled together."""
FILE_WINDOWS = 16
"""Consecutive files are taken for one until they have so many windows."""
PERSON = "datakit-order"
EPOCHS_KEPT = 2
"""A loader that reads ahead is in two epochs at once."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Samples that go through the model together.

    Attributes:
        bucket: row of the plan's bucket table.
        windows: rows of the plan's windows.
        seeds: of each sample, 63 bits: every random choice for it is drawn from its seed.
        tokens: of all samples together, what it costs.
    """

    bucket: int
    windows: tuple[int, ...]
    seeds: tuple[int, ...]
    tokens: int


class Order:
    """The steps of every epoch. Random access costs what sequential access does, once an epoch is laid out (some 20 MB
    and a second for five million windows).

    Raises:
        ConfigError: the plan has nothing to draw.
    """

    def __init__(self, plan: Plan, seed: int):
        self.plan, self.seed = plan, seed
        self._groups = _groups(plan)
        if not any(g.repeat for g in self._groups):
            raise ConfigError(f"the plan at {plan.folder} has no window to train on: see its left_out.arrow")
        self._epoch = lru_cache(maxsize=EPOCHS_KEPT)(self._lay_out)

    def steps(self, epoch: int) -> int:
        """Steps of an epoch: 0 only where repeats are so small that nothing is drawn."""
        return len(self._epoch(epoch).labels)

    def step(self, epoch: int, index: int) -> tuple[MicroBatch, ...]:
        """Micro-batches of a step, at least one, at most `plan.global_batches`.

        Raises:
            IndexError: the epoch has no such step.
        """
        laid = self._epoch(epoch)
        if not 0 <= index < len(laid.labels):
            raise IndexError(f"epoch {epoch} has {len(laid.labels)} steps, no step {index}")
        position = int(laid.positions[index])
        batches = []
        for bucket, number in laid.batches_of(index):
            size = self.plan.buckets[bucket].batch
            windows = laid.drawn[bucket][number * size : (number + 1) * size].tolist()
            seeds = tuple(_hash63("sample", self.seed, epoch, position + i) for i in range(len(windows)))
            batches.append(MicroBatch(bucket, tuple(windows), seeds, self.plan.buckets[bucket].tokens * len(windows)))
            position += len(windows)
        return tuple(batches)

    def _lay_out(self, epoch: int) -> _Epoch:
        drawn = {bucket: self._draw(epoch, bucket) for bucket in range(len(self.plan.buckets))}
        return _Epoch.of(
            {b: rows for b, rows in drawn.items() if len(rows)},
            [b.batch for b in self.plan.buckets],
            self.plan.global_batches,
            _random("steps", self.seed, epoch),
        )

    def _draw(self, epoch: int, bucket: int) -> np.ndarray:
        """Windows that the epoch draws of a bucket, in order; the parts' own orders are kept and interleaved."""
        groups = [g for g in self._groups if g.bucket == bucket]
        drawn = [g.drawn(self.seed, epoch) for g in groups]
        if len(drawn) <= 1:
            return drawn[0] if drawn else np.zeros(0, np.int32)
        owners = np.repeat(np.arange(len(drawn), dtype=np.int16), [len(d) for d in drawn])
        owners = owners[_permutation(len(owners), _random("parts", self.seed, epoch, bucket))]
        merged = np.empty(len(owners), np.int32)
        for i, rows in enumerate(drawn):
            merged[owners == i] = rows
        return merged


def share(step: Sequence[MicroBatch], rank: int, world: int) -> list[MicroBatch | None]:
    """What a rank does of a step, the dearest first: as many rounds as every other rank; None where nothing is left for
    it.

    All micro-batches are given out once: from the dearest down, each to the rank that has least to do and a round free.
    """
    rounds = -(-len(step) // world)
    shares: list[list[MicroBatch]] = [[] for _ in range(world)]
    costs = [0] * world
    for batch in sorted(step, key=lambda b: -b.tokens):
        owner = min((r for r in range(world) if len(shares[r]) < rounds), key=lambda r: (costs[r], r))
        shares[owner].append(batch)
        costs[owner] += batch.tokens
    return [*shares[rank], *[None] * (rounds - len(shares[rank]))]


def draw(seed: int, what: str) -> float:
    """A number in [0, 1) that depends on a sample's seed and on what it is for."""
    return _hash63(what, seed) / 2**63


def stand_in(seed: int, number: int, rows: Sequence[int]) -> int:
    """The number-th of the rows that may take the place of a sample that cannot be read."""
    return rows[_hash63("stand-in", seed, number) % len(rows)]


@dataclass(frozen=True)
class _Group:
    """The windows of one part in one bucket.

    Attributes:
        repeat: how often each is drawn in an epoch.
        rows: int32, rising; consecutive ones lie near each other.
        starts: where a file begins in `rows`, int32.
    """

    part: int
    bucket: int
    repeat: Fraction
    rows: np.ndarray
    starts: np.ndarray

    def drawn(self, seed: int, epoch: int) -> np.ndarray:
        count = len(self.rows)
        begin, end = (math.floor(e * self.repeat * count) for e in (epoch, epoch + 1))
        walks = [
            self.walk(seed, number)[max(0, begin - number * count) : end - number * count]
            for number in range(begin // count, -(-end // count))
        ]
        return np.concatenate(walks) if walks else np.zeros(0, np.int32)

    def walk(self, seed: int, number: int) -> np.ndarray:
        """Every row once, in the order of the number-th walk."""
        bits = _random("walk", seed, self.part, self.bucket, number)
        files = _permutation(len(self.starts), bits)
        lengths = np.diff(self.starts, append=len(self.rows))[files]
        ends = np.cumsum(lengths)
        # Windows of the shuffled files one after the other; then shuffled within each block of files.
        sequence = np.arange(len(self.rows)) + np.repeat(self.starts[files] - (ends - lengths), lengths)
        blocks = np.repeat(np.arange(len(files), dtype=np.uint64) // FILES_AT_ONCE, lengths)
        keys = (blocks << np.uint64(40)) | (bits.random_raw(len(sequence)) >> np.uint64(24))
        return self.rows[sequence[np.argsort(keys, kind="stable")]]


@dataclass(frozen=True)
class _Epoch:
    """An epoch laid out.

    Attributes:
        drawn: by bucket, the windows in order.
        labels: of every step, its bucket; `_REST`: made of what remains of the buckets.
        numbers: of every step, how many steps of its label come before.
        positions: of every step, samples before it.
        rest: (bucket, number of the micro-batch) of what remains.
        group: micro-batches of a step.
    """

    drawn: dict[int, np.ndarray]
    labels: np.ndarray
    numbers: np.ndarray
    positions: np.ndarray
    rest: list[tuple[int, int]]
    group: int

    @classmethod
    def of(cls, drawn: dict[int, np.ndarray], sizes: Sequence[int], group: int, bits: np.random.Philox) -> _Epoch:
        labels, rest = [], []
        for bucket, rows in drawn.items():
            batches = -(-len(rows) // sizes[bucket])
            labels += [np.full(batches // group, bucket, np.int32)]
            rest += [(bucket, number) for number in range(batches // group * group, batches)]
        labels += [np.full(len(rest) // group, _REST, np.int32)]
        shuffled = np.concatenate(labels)
        shuffled = np.append(
            shuffled[_permutation(len(shuffled), bits)], np.full(1 if len(rest) % group else 0, _REST, np.int32)
        )
        numbers = np.zeros(len(shuffled), np.int64)
        counts = np.zeros(len(shuffled), np.int64)
        for bucket, rows in drawn.items():
            of_it = np.flatnonzero(shuffled == bucket)
            numbers[of_it] = np.arange(len(of_it))
            counts[of_it] = np.minimum(group * sizes[bucket], len(rows) - numbers[of_it] * group * sizes[bucket])
        of_rest = np.flatnonzero(shuffled == _REST)
        numbers[of_rest] = np.arange(len(of_rest))
        samples = [min(sizes[b], len(drawn[b]) - n * sizes[b]) for b, n in rest]
        counts[of_rest] = [sum(samples[n * group : (n + 1) * group]) for n in range(len(of_rest))]
        return cls(drawn, shuffled, numbers, np.cumsum(counts) - counts, rest, group)

    def batches_of(self, index: int) -> list[tuple[int, int]]:
        """(bucket, number of the micro-batch in it)."""
        label, first = int(self.labels[index]), int(self.numbers[index]) * self.group
        if label == _REST:
            return self.rest[first : first + self.group]
        return [(label, first + i) for i in range(self.group)]


_REST = -1


def _groups(plan: Plan) -> list[_Group]:
    windows = plan.windows
    buckets, parts = (windows.column(name).to_numpy() for name in ("bucket", "part"))
    new_file = _changes(windows.column("video_id"))
    groups = []
    for bucket in range(len(plan.buckets)):
        first, last = np.searchsorted(buckets, [bucket, bucket + 1])  # the plan is sorted by bucket
        for part in range(len(plan.parts)):
            rows = (np.flatnonzero(parts[first:last] == part) + first).astype(np.int32)
            repeat = Fraction(plan.repeat(part, bucket)).limit_denominator(10**6)
            if len(rows) and repeat > 0:
                # A row begins a file if one between it and the row before, of whatever part, does.
                files = np.cumsum(new_file[first:last])[rows - first]
                groups.append(_Group(part, bucket, repeat, rows, _file_starts(files)))
    return groups


def _file_starts(files: np.ndarray) -> np.ndarray:
    """Where files begin, given each row's file; small ones taken together."""
    starts = np.flatnonzero(np.diff(files, prepend=files[0] - 1))
    # A file begins a new one when it is the first to begin in its stretch of FILE_WINDOWS rows.
    stretches = starts // FILE_WINDOWS
    return starts[np.diff(stretches, prepend=-1) > 0].astype(np.int32)


def _changes(column: pa.ChunkedArray) -> np.ndarray:
    """Whether a row differs from the one before it; the first does."""
    changed = np.ones(len(column), bool)
    at = 0
    for chunk in column.chunks:
        changed[at + 1 : at + len(chunk)] = pc.not_equal(chunk[1:], chunk[:-1]).to_numpy(zero_copy_only=False)
        if at and len(chunk):
            changed[at] = chunk[0] != column[at - 1]
        at += len(chunk)
    return changed


def _permutation(count: int, bits: np.random.Philox) -> np.ndarray:
    return np.argsort(bits.random_raw(count), kind="stable")


def _random(what: str, *numbers: int) -> np.random.Philox:
    return np.random.Philox(key=np.frombuffer(hash_bytes(_words(what, numbers), 16, PERSON), "<u8"))


def _hash63(what: str, *numbers: int) -> int:
    return seed_of(_words(what, numbers), PERSON)


def _words(what: str, numbers: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(numbers)}q", *numbers) + what.encode()
