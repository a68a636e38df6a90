"""The loop around every training: steps from the loader, numbers, validation, previews, checkpoints, and how it
ends."""

from __future__ import annotations

import math
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from datakit.errors import CatalogError, DatakitError
from trainer.data.dataloader import Batch, Loader
from trainer.engine import Engine
from trainer.training.checkpoint import Checkpoints, latest, whole
from trainer.training.launch import asked_to_stop
from trainer.training.metrics import Log, Meter
from trainer.training.watchdog import Watchdog

if TYPE_CHECKING:
    from trainer.training.setup import Prepared


TOLD = ("norm", "lr", "psnr")
"""Values that are in the line for people, besides losses and rates."""


class NotFinite(DatakitError):
    """A loss or a gradient is NaN or infinite."""


@dataclass(frozen=True)
class Stepped:
    """What one step came to on this rank.

    Attributes:
        values: to log, on the device: this rank's share of the step's mean (data-parallel ranks are added up).
        losses: of every sample that counts, on the device; clips: theirs.
        norm: of the whole gradient.
        tokens, flops: worked on by this rank.
    """

    values: dict[str, Tensor]
    losses: Tensor
    clips: list[str]
    norm: float
    tokens: int = 0
    flops: float = 0.0


class Job(Protocol):
    """What the loop trains.

    Attributes:
        engines: their state is in checkpoints.
    """

    engines: Mapping[str, Engine]

    def step(self, index: int, batches: list[Batch]) -> Stepped:
        """The gradients of all micro-batches, and the update."""

    def validate(self) -> dict[str, float]:
        """The same numbers on every rank; {}: there is nothing to validate on."""

    def preview(self, folder: Path) -> None:
        """Files to look at."""


@dataclass(frozen=True)
class Ended:
    """How a run ended: `finished`, or `stopped` by a signal; after so many steps, with its newest checkpoint and last
    numbers."""

    status: str
    step: int
    checkpoint: Path | None
    values: dict[str, float]


class Loop:
    """Trains a job on what a loader brings.

    Args:
        run: its folder, settings, and way back to the catalogs.
        log: on rank 0, else None.
        step: steps taken before.
    """

    def __init__(
        self,
        job: Job,
        run: Prepared,
        loader: Loader,
        checkpoints: Checkpoints,
        log: Log | None,
        meter: Meter,
        watchdog: Watchdog,
        step: int = 0,
    ):
        self.job, self.loader, self.checkpoints, self.settings, self.folder = (
            job,
            loader,
            checkpoints,
            run.settings,
            run.folder,
        )
        self.back, self.record = run.back, run.record
        self.log, self.meter, self.watchdog, self.step = log, meter, watchdog, step
        self._engine = next(iter(job.engines.values()))
        self._unentered: Path | None = None

    def run(self) -> Ended:
        """Until `settings.steps`, or until SIGINT or SIGTERM; the last step is always in a checkpoint.

        Raises:
            NotFinite: naming the clips; nothing of that step is in a checkpoint.
            DatakitError: what the loader raises; a checkpoint that cannot be written; a catalog that is out of reach at
                the end.
        """
        sums, values, kept = _Sums(), {}, self.step
        with _signals() as asked:
            while self.step < self.settings.steps and not _anywhere(asked.is_set()):
                sums.add(self._one())
                if self.step % self.settings.log.every == 0 or self.step == self.settings.steps:
                    values |= self._write(sums.read(self._engine) | self._rates())
                self.meter.pause()
                values |= self._look()
                if self.step % self.settings.checkpoint.every == 0:
                    self._save()
                    kept = self.step
                self.checkpoints.poll(self._entered)
                self.meter.resume()
        if kept < self.step:
            self._save()
        self.checkpoints.wait(self._entered)
        if self._unentered:
            self._enter(self._unentered, self.step)
        return Ended(
            "finished" if self.step >= self.settings.steps else "stopped",
            self.step,
            latest(self.checkpoints.folder),
            values,
        )

    def _one(self) -> Stepped:
        waited = self.loader.waited_s
        self.watchdog.at(self.step, "data")
        _, batches = next(self.loader)
        self.watchdog.at(self.step, "forward", [clip for batch in batches for clip in batch.clip_ids])
        stepped = self.job.step(self.step, batches)
        self.watchdog.at(self.step, "exchange")
        self._check(stepped)
        self.step += 1
        self.meter.add(
            samples=len(stepped.clips),
            tokens=stepped.tokens,
            flops=stepped.flops,
            waited_s=self.loader.waited_s - waited,
        )
        return stepped

    def _check(self, stepped: Stepped) -> None:
        """Where one rank sees that something is wrong, all do, and gather whose loss it is."""
        finite = torch.isfinite(stepped.losses)
        if not _anywhere(not (math.isfinite(stepped.norm) and finite.all())):
            return
        bad = [clip for clip, fine in zip(stepped.clips, finite.tolist()) if not fine]
        everywhere: list[tuple[list[str], list[str]]] = [([], [])] * dist.get_world_size()
        dist.all_gather_object(everywhere, (bad, stepped.clips))
        names = sorted({clip for found, _ in everywhere for clip in found})
        what = f"the loss of clip {', '.join(names)} is" if names else "all losses are finite, but the gradient is"
        rest = sorted({clip for _, clips in everywhere for clip in clips})
        found = latest(self.checkpoints.folder)
        raise NotFinite(
            f"step {self.step}: {what} not finite (clips of the step: "
            f"{', '.join(rest[:16])}{' …' if len(rest) > 16 else ''}); "
            f"{f'--resume goes on from {found.name}' if found else 'there is no checkpoint yet'}"
        )

    def _look(self) -> dict[str, float]:
        """Validation and previews, where they are due; the last step has both."""
        found: dict[str, float] = {}
        if self._due(self.settings.validation.every):
            self.watchdog.at(self.step, "validation")
            with self.watchdog.off():
                found = self.job.validate()
            if self.log and found:
                self.log.write(
                    self.step, found, f"step {self.step}: " + ", ".join(f"{k} {v:.4g}" for k, v in found.items())
                )
        preview = getattr(self.settings, "preview", None)
        if preview is not None and self._due(preview.every):
            self.watchdog.at(self.step, "preview")
            with self.watchdog.off():
                self.job.preview(self.folder / "previews" / f"step-{self.step:06d}")
        return found

    def _due(self, every: int) -> bool:
        return bool(every) and (self.step % every == 0 or self.step == self.settings.steps)

    def _save(self) -> None:
        self.watchdog.at(self.step, "checkpoint")
        with self.watchdog.off():
            self.checkpoints.wait(self._entered)
            learned, files = self.back.save(self.step) if self.back else (None, {})
            for name, content in files.items():
                (self.checkpoints.opened() / name).write_bytes(content)
            state = self.loader.state()
            replaced = _union(state.pop("replaced"))
            self.checkpoints.save({"position": state, "replaced": replaced, "write_back": learned})

    def _entered(self, path: Path, step: int) -> None:
        """A checkpoint is whole: enter it, on rank 0. Where a catalog is out of reach, training goes on: the next
        checkpoint holds what this one could not enter."""
        if not self.record:
            return
        try:
            self._enter(path, step)
            self._unentered = None
        except CatalogError as e:
            self._unentered = path
            print(
                f"step {step}: what was learned is in the checkpoint, and enters the catalog with the next one: {e}",
                file=sys.stderr,
            )

    def _enter(self, path: Path, step: int) -> None:
        """A checkpoint, and what was learned until then, in the catalogs."""
        self.back.commit(path)
        there = [(str(p.absolute()), int(p.name.removeprefix("step-"))) for p in whole(self.checkpoints.folder)]
        self.record.checkpoints(there, {"steps": step, **self.back.counts()})

    def _write(self, values: dict[str, float]) -> dict[str, float]:
        if self.log:
            rates = [f"{values['samples_per_s']:.3g} samples/s", f"{values['tokens_per_s']:.3g} tokens/s"]
            rates += [f"MFU {values['mfu']:.0%}"] if "mfu" in values else []
            told = [f"{k} {v:.4g}" for k, v in values.items() if k in TOLD or k.startswith("loss")]
            self.log.write(
                self.step,
                values,
                f"step {self.step}/{self.settings.steps}: {', '.join([*told, *rates])}, waiting for data "
                f"{values['data_wait']:.0%}",
            )
        return values

    def _rates(self) -> dict[str, float]:
        """This rank's rates and those of the others: work adds up, the wait is the mean."""
        world, total = dist.get_world_size(), _added(self.meter.read())
        copies = world / self._engine.world  # ranks that share their samples
        add_up = {"samples_per_s", "tokens_per_s"}
        return {name: value / (copies if name in add_up else world) for name, value in total.items()}


class _Sums:
    """Logged values, added up on the device."""

    def __init__(self) -> None:
        self._values: dict[str, Tensor] = {}
        self._norm, self._steps = 0.0, 0

    def add(self, stepped: Stepped) -> None:
        for name, value in stepped.values.items():
            self._values[name] = self._values.get(name, 0) + value.detach().double()
        self._norm += stepped.norm
        self._steps += 1

    def read(self, engine: Engine) -> dict[str, float]:
        """Means over the steps, of all ranks."""
        values = {name: value.item() for name, value in self._values.items()}
        copies = dist.get_world_size() / engine.world
        found = {name: value / copies / self._steps for name, value in _added(values).items()}
        found |= {"norm": self._norm / self._steps, "lr": engine.rate}
        self.__init__()
        return found


def _added(values: dict[str, float]) -> dict[str, float]:
    """By name, over all ranks: one that had nothing real to do may lack some."""
    everywhere: list[dict[str, float]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everywhere, values)
    names = dict.fromkeys(name for each in everywhere for name in each)
    return {name: sum(each.get(name, 0.0) for each in everywhere) for name in names}


def _union(replaced: list[dict]) -> list[dict]:
    """Of all ranks, each once, in the order of the run."""
    everywhere: list[list[dict]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everywhere, replaced)
    found = {(r["epoch"], r["step"], r["window"]): r for each in everywhere for r in each}
    return [found[key] for key in sorted(found)]


def _anywhere(here: bool) -> bool:
    """Whether something is so on any rank: a signal, for one, does not reach all of them in the same step."""
    flag = torch.tensor(int(here))
    if dist.get_world_size() > 1:
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """Set by SIGINT and SIGTERM; a second one ends the process at once. Only a main thread can listen: others (of Ray's
    workers) are told by `trainer.training.launch`."""
    if threading.current_thread() is not threading.main_thread():
        yield asked_to_stop
        return
    asked = threading.Event()

    def stop(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
