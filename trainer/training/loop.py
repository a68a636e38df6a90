"""The loop around every training: steps from the loader, numbers, validation, previews, checkpoints, and how it
ends."""

from __future__ import annotations

import math
import sys
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from datakit.errors import CatalogError, DatakitError
from trainer.data.dataloader import Batch, Loader
from trainer.engine import Engine
from trainer.training.checkpoint import Checkpoints, Run, latest, resume, whole
from trainer.training.collectives import added, anywhere, gathered
from trainer.training.evaluation import evaluate
from trainer.training.metrics import Log, Meter, peak_flops
from trainer.training.setup import Latents, Prepared
from trainer.training.signals import stop_signals
from trainer.training.task import Stepped, Task
from trainer.training.watchdog import Watchdog

SHOWN = ("norm", "lr", "psnr")
"""Values that are in the line for people, besides losses and rates."""
CLIPS_NAMED = 16
"""Of a step, in an error."""


class NotFinite(DatakitError):
    """A loss or a gradient is NaN or infinite."""


@dataclass(frozen=True)
class Ended:
    """How a run ended: `finished`, or `stopped` by a signal; after so many steps, with its newest checkpoint and last
    numbers."""

    status: str
    step: int
    checkpoint: Path | None
    values: dict[str, float]


def train(run: Prepared, task: Task, latents: Latents | None = None) -> Ended:
    """From where the run is to its end. Raises what `Loop.run` raises."""
    record = run.record
    try:
        ended = _train(run, task, latents)
    except BaseException as e:
        if record:
            record.fail(e)
        raise
    if record:
        learned = run.back.counts() if run.back else {}
        record.end(ended.status, {"steps": ended.step, **learned, **ended.values})
    return ended


def _train(run: Prepared, task: Task, latents: Latents | None) -> Ended:
    """Take up what a checkpoint has, open what the loop writes to, and loop."""
    settings, plan, places = run.settings, run.plan, run.folder / "checkpoints"
    before = resume(task.engines, places, plan.hash) if run.request.resume else None
    step, state = 0, {"epoch": 0, "step": 0, "replaced": []}
    if before:
        step, state = before.step, {**before.loop["position"], "replaced": before.loop["replaced"]}
        if run.back:
            run.back.resume(latest(places), before.loop.get("write_back"), step)
    broken = [asdict(replacement) for replacement in latents.broken] if latents else []
    state["replaced"] = [*broken, *state["replaced"]]
    values = settings.model_dump(mode="json")
    about = Run(plan.hash, tuple(part.selection["content_hash"] for part in plan.parts), values)
    missing = "raw" if settings.loader.latents == "if there" else "error"
    options = settings.loader.model_copy(update={"missing": missing})
    engine, log = next(iter(task.engines.values())), None
    with ExitStack() as opened:
        checkpoints = Checkpoints(places, task.engines, about, settings.checkpoint.keep)
        if run.main:
            own = settings.log
            log = Log(run.folder, values, step, own.tensorboard, own.wandb, run.request.quiet)
            opened.enter_context(closing(log))
        watchdog = opened.enter_context(closing(Watchdog(run.folder, dist.get_rank(), settings.watchdog_s)))
        index = latents.index if latents else None
        loader = opened.enter_context(Loader.resumed(state, plan, run.order, engine.rank, engine.world, options, index))
        return Loop(run, task, loader, checkpoints, log, watchdog, step).run()


class Loop:
    """Trains a task on what a loader brings.

    Args:
        run: its folder, settings, val plan, and way back to the catalogs.
        log: on rank 0, else None.
        step: steps taken before.
    """

    def __init__(
        self,
        run: Prepared,
        task: Task,
        loader: Loader,
        checkpoints: Checkpoints,
        log: Log | None,
        watchdog: Watchdog,
        step: int = 0,
    ):
        self.task, self.loader, self.checkpoints, self.settings = task, loader, checkpoints, run.settings
        self.folder, self.val, self.back, self.record = run.folder, run.val, run.back, run.record
        self.log, self.watchdog, self.step = log, watchdog, step
        self.meter, self.sums = Meter(peak_flops(run.device)), Sums()
        self.engine = next(iter(task.engines.values()))
        self._speaks = gathered(self.engine.rank).index(self.engine.rank) == dist.get_rank()
        """Of the processes that share samples, one tells the catalogs of them."""
        self._unentered: Path | None = None

    def run(self) -> Ended:
        """Until `settings.steps`, or until SIGINT or SIGTERM; the last step is always in a checkpoint.

        Raises:
            NotFinite: naming the clips; nothing of that step is in a checkpoint.
            DatakitError: what the loader raises; a checkpoint that cannot be written; a catalog that is out of reach at
                the end.
        """
        settings, saved, values = self.settings, self.step, {}
        with stop_signals() as asked:
            while self.step < settings.steps and not anywhere(asked.is_set()):
                self.sums.add(self.train_step())
                if self._due(settings.log.every):
                    values |= self._write_log()
                self.meter.pause()
                if self._due(settings.validation.every):
                    values |= self._validate()
                if self._due(settings.preview.every):
                    self._preview()
                if self.step % settings.checkpoint.every == 0:
                    saved = self._save()
                self.checkpoints.poll(self._entered)
                self.meter.resume()
        if saved < self.step:
            self._save()
        self.checkpoints.wait(self._entered)
        if self._unentered:
            self._enter(self._unentered, self.step)
        status = "finished" if self.step >= settings.steps else "stopped"
        return Ended(status, self.step, latest(self.checkpoints.folder), values)

    def train_step(self) -> Stepped:
        """The gradients of all micro-batches of the next step, and the update."""
        batches, waited_s = self._next_batches()
        stepped = Stepped()
        for i, batch in enumerate(batches):
            learned = self.task.learn(self.step, batch, last=i + 1 == len(batches))
            if not batch.weight:  # a repeat, for the sake of equal rounds
                continue
            stepped.add(batch, learned)
            if self.back and self._speaks and learned.times is not None:
                self.back.add(self.step, batch, learned.losses, learned.times)
        stepped.norm = self.task.update(self.step)
        self.watchdog.at(self.step, "exchange")
        self._check_finite(stepped)
        self.step += 1
        self.meter.add(samples=len(stepped.clips), tokens=stepped.tokens, flops=stepped.flops, waited_s=waited_s)
        return stepped

    def _next_batches(self) -> tuple[list[Batch], float]:
        """This rank's micro-batches of the next step, and the seconds that it waited for them."""
        before = self.loader.waited_s
        self.watchdog.at(self.step, "data")
        _, batches = next(self.loader)
        self.watchdog.at(self.step, "forward", [clip for batch in batches for clip in batch.clip_ids])
        return batches, self.loader.waited_s - before

    def _check_finite(self, stepped: Stepped) -> None:
        """Where one rank sees that something is wrong, all do, and gather whose loss it is."""
        finite = torch.isfinite(torch.cat(stepped.losses)) if stepped.losses else torch.ones(0, dtype=torch.bool)
        if not anywhere(not (math.isfinite(stepped.norm) and bool(finite.all()))):
            return
        bad = [clip for clip, fine in zip(stepped.clips, finite.tolist()) if not fine]
        everywhere = gathered((bad, stepped.clips))
        names = sorted({clip for wrong, _ in everywhere for clip in wrong})
        what = f"the loss of clip {', '.join(names)} is" if names else "all losses are finite, but the gradient is"
        clips = sorted({clip for _, of_step in everywhere for clip in of_step})
        newest = latest(self.checkpoints.folder)
        raise NotFinite(
            f"step {self.step}: {what} not finite (clips of the step: "
            f"{', '.join(clips[:CLIPS_NAMED])}{' …' if len(clips) > CLIPS_NAMED else ''}); "
            f"{f'--resume goes on from {newest.name}' if newest else 'there is no checkpoint yet'}"
        )

    def _due(self, every: int) -> bool:
        """Whether something is that happens every so many steps (0: never), and after the last one."""
        return bool(every) and (self.step % every == 0 or self.step == self.settings.steps)

    def _validate(self) -> dict[str, float]:
        """The same numbers on every rank; {}: there is nothing to validate on."""
        if self.val is None:
            return {}
        self.watchdog.at(self.step, "validation")
        with self.watchdog.off():
            values = evaluate(self.task, self.val, self.settings.validation.windows, self.settings.loader)
        if self.log:
            line = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            self.log.write(self.step, values, f"step {self.step}: {line}")
        return values

    def _preview(self) -> None:
        self.watchdog.at(self.step, "preview")
        with self.watchdog.off():
            self.task.preview(self.folder / "previews" / f"step-{self.step:06d}")

    def _write_log(self) -> dict[str, float]:
        values = self.sums.read(self.engine) | self._rates()
        if self.log:
            rates = [f"{values['samples_per_s']:.3g} samples/s", f"{values['tokens_per_s']:.3g} tokens/s"]
            rates += [f"MFU {values['mfu']:.0%}"] if "mfu" in values else []
            shown = [f"{k} {v:.4g}" for k, v in values.items() if k in SHOWN or k.startswith("loss")]
            line = f"step {self.step}/{self.settings.steps}: {', '.join([*shown, *rates])}"
            self.log.write(self.step, values, f"{line}, waiting for data {values['data_wait']:.0%}")
        return values

    def _rates(self) -> dict[str, float]:
        """This rank's rates and those of the others: work adds up, the wait is the mean."""
        world, total = dist.get_world_size(), added(self.meter.read())
        copies = world / self.engine.world  # ranks that share their samples
        add_up = {"samples_per_s", "tokens_per_s"}
        return {name: value / (copies if name in add_up else world) for name, value in total.items()}

    def _save(self) -> int:
        """Begin to write a checkpoint. Gives the step that it is of."""
        self.watchdog.at(self.step, "checkpoint")
        with self.watchdog.off():
            self.checkpoints.wait(self._entered)
            learned, files = self.back.save(self.step) if self.back else (None, {})
            for name, content in files.items():
                (self.checkpoints.opened() / name).write_bytes(content)
            state = self.loader.state()
            replaced = _union(state.pop("replaced"))
            self.checkpoints.save({"position": state, "replaced": replaced, "write_back": learned})
        return self.step

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
        if not (self.back and self.record):
            raise AssertionError("a run without a way back to the catalogs has nothing to enter")
        self.back.commit(path)
        there = [(str(p.absolute()), int(p.name.removeprefix("step-"))) for p in whole(self.checkpoints.folder)]
        self.record.checkpoints(there, {"steps": step, **self.back.counts()})


class Sums:
    """Logged values of the steps since they were last read, added up on the device."""

    def __init__(self) -> None:
        self._values: dict[str, Tensor] = {}
        self._norm, self._steps = 0.0, 0

    def add(self, stepped: Stepped) -> None:
        for name, value in stepped.values.items():
            self._values[name] = self._values.get(name, 0) + value.detach().double()
        self._norm += stepped.norm
        self._steps += 1

    def read(self, engine: Engine) -> dict[str, float]:
        """Means over the steps, of all ranks; then they are forgotten."""
        copies = dist.get_world_size() / engine.world
        totals = added({name: value.item() for name, value in self._values.items()})
        means = {name: value / copies / self._steps for name, value in totals.items()}
        means |= {"norm": self._norm / self._steps, "lr": engine.rate}
        self._values, self._norm, self._steps = {}, 0.0, 0
        return means


def _union(replaced: list[dict]) -> list[dict]:
    """Of all ranks, each once, in the order of the run."""
    found = {(r["epoch"], r["step"], r["window"]): r for each in gathered(replaced) for r in each}
    return [found[key] for key in sorted(found)]
