"""The loader: micro-batches of a plan, in its order, ready to train on.

    with Loader(plan, Order(plan, seed), rank, world, Position(0, 0), LoaderOptions()) as loader:
        for position, batches in loader:      # a step; for ever, epoch after epoch
            for batch in batches: ...
        state = loader.state()                # goes on with Loader.resumed(state, ...)

What a sample is depends on the plan, the seed and its place in the epoch alone: not on the number of ranks or workers,
nor on where the run was interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from datakit.config import Section
from datakit.errors import ConfigError, DatakitError, MediaError
from datakit.hashing import hash_bytes
from trainer.data.batch_sampler import MicroBatch, Order, share
from trainer.data.latent_reader import SIZES
from trainer.data.prefetch import Flight, Prefetcher
from trainer.data.reader_pool import ALIGNED, Crew, Patience, Ring
from trainer.data.sample_reader import Broken, Read, SampleReader, Spec, frames_shape
from trainer.planning.plan import Bucket, Plan

COLUMNS = ("clip_id", "caption", "fps", "motion_vmaf")


class LoaderOptions(Section):
    """How samples are read."""

    workers: int = Field(
        4, ge=0, description="processes of each rank that read samples; 0: the training process does it"
    )
    prefetch_mb: int = Field(1024, ge=1, description="memory for what is read ahead, MiB; one micro-batch always fits")
    augment: Literal["none", "random"] = Field(
        "none", description="where the crop lies: in the middle, or anywhere, by the sample's seed"
    )
    flip: bool = Field(False, description="mirror half of the samples")
    missing: Literal["error", "raw"] = Field(
        "error", description="windows without a latent: stop, or read their frames"
    )
    retries: int = Field(4, ge=0, description="further attempts at a read that fails for a reason that may pass")
    backoff_s: float = Field(
        1.0, ge=0, description="wait before the second attempt; doubled each time, a minute at most"
    )
    deadline_s: float = Field(120.0, gt=0, description="seconds after which a read counts as hung (not with workers=0)")
    cache_mb: int = Field(256, ge=0, description="latents that each process keeps for their neighbours, MiB")
    pin: bool = Field(True, description="page-locked memory, where there is a GPU")


@dataclass(frozen=True, order=True)
class Position:
    """A step of the run."""

    epoch: int
    step: int


@dataclass(frozen=True, order=True)
class Replacement:
    """A window that can never be read, and the one that took its place.

    Attributes:
        epoch, step: where it was met.
        window, by: rows of the plan.
        kind: see `ErrorKind`.
    """

    epoch: int
    step: int
    window: int
    by: int
    kind: str
    message: str


@dataclass(frozen=True)
class Batch:
    """A micro-batch.

    Attributes:
        bucket: shape.
        windows: rows of the plan, stand-ins in their place.
        clip_ids, captions, fps, motion_vmaf: of the windows; fps 0: an image.
        seeds: of the samples, in place of broken ones too.
        video: uint8 [R, 3, T, H, W] full-range RGB: the samples without a latent; None: there is none.
        raw: places of `video`'s rows in the batch, rising.
        mean, std: [B - R, c, T', H', W'] of the others, in order, dtype as stored; None: there is none.
        weight: share of the step's samples (of all ranks); 0: a repeat, for the sake of equal rounds.
    """

    bucket: Bucket
    windows: list[int]
    clip_ids: list[str]
    seeds: list[int]
    captions: list[str]
    fps: list[float]
    motion_vmaf: list[float | None]
    video: Tensor | None
    raw: list[int]
    mean: Tensor | None
    std: Tensor | None
    weight: float


class Loader:
    """See the module.

    Args:
        rank, world: of data parallelism.
        start: the first step.
        latents: index of encoded windows (`trainer.data.latent_reader`); None: read frames.
        replaced: of the run so far, from every rank: their stand-ins are taken at once.

    Attributes:
        position: of the step that comes next.
        replaced: so far, the ones given included; up to `position`, whatever was read ahead.
        waited_s: spent waiting for data.

    Raises:
        ConfigError: options that contradict each other.
        DatakitError (while iterating): a clip that could not be read for a reason that may pass.
    """

    def __init__(
        self,
        plan: Plan,
        order: Order,
        rank: int,
        world: int,
        start: Position,
        options: LoaderOptions,
        latents: Path | None = None,
        replaced: Sequence[Replacement] = (),
    ):
        _check(options, latents, rank, world)
        self.plan, self.order, self.rank, self.world, self.options = plan, order, rank, world, options
        self.position = self._settle(start)
        self.replaced = list(replaced)
        self.waited_s = 0.0
        spec = Spec(
            str(plan.folder),
            str(latents) if latents else None,
            options.augment == "random",
            options.flip,
            options.missing == "raw",
            options.cache_mb << 20,
        )
        broken = [Broken(r.window, r.kind, r.message) for r in replaced]
        self._reader = SampleReader(spec, broken)
        self._patience = Patience(options.retries, options.backoff_s, options.deadline_s)
        self._pin_for = torch.cuda.current_device() if options.pin and torch.cuda.is_available() else None
        self._sizes = [self._sample_bytes(i) for i in range(len(plan.buckets))]
        self._ahead: Prefetcher[_Landed] | None = None
        self._coming = self._flights(self.position)
        if options.workers:
            largest = max(size * bucket.batch + ALIGNED for size, bucket in zip(self._sizes, plan.buckets))
            ring = Ring(max(options.prefetch_mb << 20, largest))
            crew = Crew(spec, plan, options.workers, ring, self._patience, broken)
            self._ahead = Prefetcher(self._coming, crew, ring)

    @classmethod
    def resumed(
        cls,
        state: dict[str, Any],
        plan: Plan,
        order: Order,
        rank: int,
        world: int,
        options: LoaderOptions,
        latents: Path | None = None,
    ) -> Loader:
        """The loader that goes on from `state`, on any number of ranks.

        Args:
            state: of one rank, its `replaced` those of all ranks together.
        """
        replaced = [Replacement(**r) for r in state["replaced"]]
        return cls(plan, order, rank, world, Position(state["epoch"], state["step"]), options, latents, replaced)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def __iter__(self) -> Iterator[tuple[Position, list[Batch]]]:
        return self

    def __next__(self) -> tuple[Position, list[Batch]]:
        """The next step's position, and this rank's rounds of it: as many as every other rank has."""
        started = time.monotonic()
        landed = next(self._ahead) if self._ahead is not None else self._read_step()
        self.waited_s += time.monotonic() - started
        self.replaced += [r for one in landed for r in one.replaced]
        self.position = landed[0].at.following
        return landed[0].at.position, _rounds(landed)

    def state(self) -> dict[str, Any]:
        """What resuming takes: plain values. Merge `replaced` over the ranks."""
        return {**asdict(self.position), "replaced": [asdict(r) for r in self.replaced]}

    def close(self) -> None:
        """End the processes. Again does nothing."""
        self._coming = iter(())
        if self._ahead is not None:
            self._ahead.close()

    def _settle(self, position: Position) -> Position:
        """The same moment, as a step that is there."""
        while position.step >= (steps := self.order.steps(position.epoch)):
            position = Position(position.epoch + 1, position.step - steps)
        return position

    def _flights(self, position: Position) -> Iterator[Flight[_Landed]]:
        """What this rank reads: its share of every step, or where it has none the step's cheapest micro-batch."""
        while True:
            step = self.order.step(position.epoch, position.step)
            rounds = share(step, self.rank, self.world)
            samples = sum(len(b.windows) for b in step)
            following = self._settle(Position(position.epoch, position.step + 1))
            mine = [b for b in rounds if b is not None]
            for batch in mine or [min(step, key=lambda b: b.tokens)]:
                weight = len(batch.windows) / samples if mine else 0.0
                at = _Place(position, following, len(rounds), weight)
                workers = tuple(self._worker_of(window) for window in batch.windows)
                yield Flight(
                    batch,
                    self._sizes[batch.bucket],
                    workers,
                    partial(self._land, at, batch),
                    not mine or batch is mine[-1],
                )
            position = following

    def _land(self, at: _Place, batch: MicroBatch, reads: Sequence[Read], samples: Sequence[np.ndarray]) -> _Landed:
        """A batch of samples that were read.

        Args:
            samples: memory of each; it is copied.
        """
        replaced = [
            Replacement(at.position.epoch, at.position.step, b.window, read.window, b.kind, b.message)
            for read in reads
            for b in read.broken
            if at.weight
        ]
        raw = [i for i, read in enumerate(reads) if read.latent is None]
        encoded = [i for i, read in enumerate(reads) if read.latent is not None]
        bucket = self.plan.buckets[batch.bucket]
        if len({reads[i].latent for i in encoded}) > 1:
            raise DatakitError(f"latents of bucket {bucket.name} differ in shape or number format: encode again")
        frames = frames_shape(bucket)
        video = self._stack([samples[i][: prod(frames)] for i in raw], "uint8", frames)
        dtype, shape = reads[encoded[0]].latent if encoded else ("uint8", ())
        size = prod(shape) * SIZES.get(dtype, 1)
        mean = self._stack([samples[i][:size] for i in encoded], dtype, shape)
        std = self._stack([samples[i][size : 2 * size] for i in encoded], dtype, shape)
        windows = [read.window for read in reads]
        rows = self.plan.rows(windows, COLUMNS)
        return _Landed(
            at,
            replaced,
            Batch(
                bucket,
                windows,
                [r["clip_id"] for r in rows],
                list(batch.seeds),
                [r["caption"] or "" for r in rows],
                [r["fps"] for r in rows],
                [r["motion_vmaf"] for r in rows],
                video,
                raw,
                mean,
                std,
                at.weight,
            ),
        )

    def _stack(self, parts: list[np.ndarray], dtype: str, shape: tuple[int, ...]) -> Tensor | None:
        """[parts, *shape] of copied bytes; None of nothing. By NumPy: torch would wake its threads for each."""
        if not parts:
            return None
        # In the thread that reads ahead the current device would be the first, whatever the rank's is.
        with nullcontext() if self._pin_for is None else torch.cuda.device(self._pin_for):
            whole = torch.empty((len(parts), parts[0].nbytes), dtype=torch.uint8, pin_memory=self._pin_for is not None)
        np.stack(parts, out=whole.numpy())
        return whole.view(getattr(torch, dtype)).view(len(parts), *shape)

    def _read_step(self) -> list[_Landed]:
        """As the processes do, in this one."""
        landed: list[_Landed] = []
        for flight in self._coming:
            memory = [np.empty(flight.sample_bytes, np.uint8) for _ in flight.batch.windows]
            reads = [self._read(*of) for of in zip(flight.batch.windows, flight.batch.seeds, memory)]
            landed.append(flight.land(reads, memory))
            if flight.last:
                return landed
        raise DatakitError("the loader is closed")

    def _read(self, window: int, seed: int, out: np.ndarray) -> Read:
        failures = 0
        while True:
            try:
                return self._reader.read(window, seed, out)
            except Exception as e:  # stores raise errors of their own making
                if isinstance(e, DatakitError) and not isinstance(e, MediaError):
                    raise
                failures += 1
                if failures > self._patience.retries:
                    raise self._patience.gives_up(self.plan, window, failures, e) from e
                time.sleep(self._patience.wait_s(failures))

    def _sample_bytes(self, bucket: int) -> int:
        """Of the larger form in which a sample may come."""
        latents = self._reader.latents
        place = latents.first(self._reader.rows[bucket]) if latents else None
        dtype, shape = latents.form(place) if place else ("float32", (0,))
        encoded = 2 * prod(shape) * SIZES[dtype]
        raw = prod(frames_shape(self.plan.buckets[bucket])) if latents is None or self.options.missing == "raw" else 0
        return -(-max(encoded, raw, 1) // ALIGNED) * ALIGNED

    def _worker_of(self, window: int) -> int | None:
        """Latents that lie together are read by the same process."""
        place = self._reader.latents.find(window) if self._reader.latents else None
        if place is None or not self.options.workers:
            return None
        group = hash_bytes(f"{place.file}/{place.row_group}", 8)
        return int.from_bytes(group, "little") % self.options.workers


@dataclass(frozen=True)
class _Place:
    """Where a micro-batch belongs.

    Attributes:
        position, following: its step, and the next one.
        rounds: of each rank in the step.
        weight: see `Batch`.
    """

    position: Position
    following: Position
    rounds: int
    weight: float


@dataclass(frozen=True)
class _Landed:
    """A finished micro-batch."""

    at: _Place
    replaced: list[Replacement]
    batch: Batch


def _rounds(landed: list[_Landed]) -> list[Batch]:
    """The batches, filled up with repeats of the cheapest that count for nothing."""
    batches = [one.batch for one in landed]
    cheapest = min(batches, key=lambda b: b.bucket.tokens * len(b.windows))
    return batches + [replace(cheapest, weight=0.0)] * (landed[0].at.rounds - len(batches))


def _check(options: LoaderOptions, latents: Path | None, rank: int, world: int) -> None:
    if latents is not None and (options.augment != "none" or options.flip):
        raise ConfigError(
            "latents were encoded with the crop in the middle: loader.augment=random and loader.flip need frames"
        )
    if latents is None and options.missing != "error":
        raise ConfigError("loader.missing=raw is about windows without a latent: no latents are given")
    if not 0 <= rank < world:
        raise ConfigError(f"rank {rank} of {world} ranks")
