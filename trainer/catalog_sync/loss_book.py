"""Back to the catalog: what a training run learns about each clip becomes rows of the table `losses`, exactly once.

    back = WriteBack(plan, run_id, record.catalogs)           # on every rank; with catalogs on rank 0
    for step in ...:
        back.add(step, batch, losses, times)                  # every micro-batch; waits for no device
        ...
    state, files = back.save(step)                            # on every rank: what a checkpoint has to hold
    back.commit(checkpoint)                                   # on rank 0, once that checkpoint is whole
    back.resume(checkpoint, state, step)                      # on every rank, when a run goes on from it

Rows of the steps since the last checkpoint are part of the checkpoint (`losses.arrow`) before they are committed. So a
kill at any moment counts nothing twice and loses nothing: before a checkpoint is whole, its steps are done again; after
that, its rows are there to be committed by whoever goes on.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
import torch.distributed as dist
from torch import Tensor

from catalogs.records.losses import LEARNED, MEANS, NOISE_LEVELS, RANGE, commit, rewind
from catalogs.records.tombstones import SPAN
from catalogs.tables.catalog import Catalog
from datakit.errors import ConfigError, DatakitError
from trainer.catalog_sync.loss_rows import FILE, as_bytes, no_rows, read_rows
from trainer.planning.plan import ROWS, Plan

if TYPE_CHECKING:
    from trainer.data.dataloader import Batch

HALF_LIFE = 64
"""Samples of a noise level and bucket after which one counts half in their running mean. It is then a mean of some 185
(its error, 7 % of the spread of single losses, adds half a per cent to their variance) and lags by 93 samples behind a
loss that falls. Longer would gain nothing in the one and lose in the other: whether a clip is seen early or late would
decide what is said about it."""
FOLDED = 256
"""Micro-batches whose losses are put together in one tensor: small ones take half a KiB of a GPU's memory each."""
WHO = ("step", "seed", "window")
SAMPLE = np.dtype([*((name, "<i8") for name in WHO), ("loss", "<f8"), ("time", "<f8")])
ABOUT = ("clip_id", *SPAN, "part", "bucket")
KEY = ("catalog", "clip_id", "bucket", "noise_level")


class WriteBack:
    """See the module.

    Args:
        catalogs: of the plan's parts, by address, to write to (rank 0). Their signature is the run's.
        step: the first that is to come.

    Attributes:
        book: running means, and what was added since the last checkpoint.
        waiting: rows of checkpoints that were saved and are not committed yet; those that a commit could not bring to
            their catalog are in the next checkpoint too.
    """

    def __init__(self, plan: Plan, run_id: str, catalogs: Mapping[str, Catalog], step: int = 0):
        self.run_id, self.catalogs = run_id, catalogs
        self.book = LossBook(plan, step)
        self.waiting = no_rows()

    def add(self, step: int, batch: Batch, losses: Tensor, times: Tensor) -> None:
        """See `LossBook.add`."""
        self.book.add(step, batch, losses, times)

    def save(self, step: int) -> tuple[dict[str, Any], dict[str, bytes]]:
        """What a checkpoint holds of this, to be called on every rank: a state, the same everywhere, as JSON takes it;
        and a file of what the steps before `step` taught (rank 0).

        Raises:
            DatakitError: on every rank: a loss is not finite.
        """
        rows = self.book.gather(step)
        state = {"run_id": self.run_id, **self.book.state_dict()}
        if _rank() != 0:
            return state, {}
        self.waiting = pl.concat([self.waiting, rows])
        return state, {FILE: as_bytes(self.waiting)}

    def commit(self, folder: Path) -> int:
        """Enter the rows of a checkpoint that is whole in the catalogs; done again, it does nothing. Returns the rows
        entered.

        Raises:
            CatalogError: a catalog cannot be written. Nothing is lost: the next checkpoint holds these rows too.
            ConfigError: the checkpoint has no such rows, damaged ones, or those of a catalog that the plan does not
                have.
        """
        rows = read_rows(folder / FILE)
        strange = sorted(set(rows["catalog"]) - set(self.catalogs))
        if strange:
            raise ConfigError(
                f"{folder / FILE} has rows for the catalog {strange[0]}, of which the plan has no part: "
                "use the plan that the run began with"
            )
        entered = sum(
            commit(catalog, self.run_id, rows.filter(pl.col("catalog") == address))
            for address, catalog in self.catalogs.items()
        )
        self.waiting = self.waiting.join(rows.select(RANGE).unique(), on=RANGE, how="anti")
        return entered

    def counts(self) -> dict[str, Any]:
        """For the run's record; the report draws it."""
        return {MEANS: self.book.means()}

    def resume(self, folder: Path, state: Mapping[str, Any] | None, step: int) -> None:
        """Go on from a checkpoint, of whatever number of ranks: what this run committed of later steps goes, what its
        earlier life did not commit any more is committed. Of another run's checkpoint the running means are taken over,
        and no rows.

        Args:
            state: that `save` gave; None: the checkpoint was made without.
            step: the first that is to come.

        Raises:
            CatalogError, ConfigError: see `commit` (on rank 0).
        """
        self.book.load_state_dict(state or {"means": []}, step)
        if _rank() != 0:
            return
        for catalog in self.catalogs.values():
            rewind(catalog, self.run_id, step)
        if state and state["run_id"] == self.run_id:
            self.waiting = read_rows(folder / FILE)
            self.commit(folder)


class LossBook:
    """Losses of samples, and how far they are from the running mean of their noise level and bucket.

    The mean of a level and bucket is m = s / w; after a sample of loss x, s ← d·s + x and w ← d·w + 1 with d = 2 ** (-1
    / HALF_LIFE): an exponential mean without the bias of its beginning. (One over all samples would be behind for ever:
    the loss falls, so whatever is seen late would look easy.) The excess of a sample is its loss minus m before it; the
    first of a level and bucket has none and is not counted. Samples come in the order of (step, seed), whichever ranks
    they were on; so the sums are the same, to the last bit, on any number of ranks.

    Args:
        step: the first that is to come.
    """

    def __init__(self, plan: Plan, step: int = 0):
        self.plan, self.step = plan, step
        self._means: dict[tuple[int, int], tuple[float, float]] = {}
        self._names = [bucket.name for bucket in plan.buckets]
        self._clear()

    def add(self, step: int, batch: Batch, losses: Tensor, times: Tensor) -> None:
        """Note the losses of a micro-batch; a repeat of weight 0 is none.

        Args:
            losses, times: [B], on any device: they are not looked at before `gather`.
        """
        if not batch.weight:
            return
        if losses.shape != (len(batch.windows),) or times.shape != losses.shape:
            raise ValueError(
                f"{len(batch.windows)} samples have losses {tuple(losses.shape)} and times {tuple(times.shape)}"
            )
        for numbers, more in zip(self._who, ([step] * len(batch.windows), batch.seeds, batch.windows), strict=True):
            numbers.extend(more)
        self._few.append(torch.stack((losses.detach().double(), times.detach().to(losses.device).double())))
        if len(self._few) == FOLDED:
            self._folded.append(torch.cat(self._few, 1))
            self._few = []

    def gather(self, to_step: int) -> pl.DataFrame:
        """What the steps before `to_step` taught, of all ranks, the same on each (`LEARNED`); they are behind then.

        Raises:
            DatakitError: a loss that is not finite, or a time outside 0..1.
        """
        samples = _in_order(_of_all_ranks(self._collect()))
        _check(samples, self.plan)
        windows, places = np.unique(samples["window"], return_inverse=True)
        about = _about(self.plan, windows)
        levels = np.minimum(samples["time"] * NOISE_LEVELS, NOISE_LEVELS - 1).astype(np.int32)
        excess = self._excess(about["bucket"].to_numpy()[places], levels, samples["loss"])
        counted = ~np.isnan(excess)
        rows = _summed(self.plan, about[places[counted]], levels[counted], excess[counted])
        rows = rows.with_columns(from_step=pl.lit(self.step, pl.Int64), to_step=pl.lit(to_step, pl.Int64)).select(
            list(LEARNED)
        )
        self.step = to_step
        self._clear()
        return rows

    def means(self) -> dict[str, list[float | None]]:
        """The running mean of each noise level, by bucket; None where nothing was seen."""
        found: dict[str, list[float | None]] = {}
        for (bucket, level), (total, weight) in sorted(self._means.items()):
            found.setdefault(self._names[bucket], [None] * NOISE_LEVELS)[level] = total / weight
        return found

    def state_dict(self) -> dict[str, Any]:
        """The running means, as JSON takes them."""
        return {"means": [[self._names[bucket], level, *mean] for (bucket, level), mean in sorted(self._means.items())]}

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Go on from a state; means of buckets that the plan does not have are dropped.

        Args:
            step: the first that is to come.
        """
        places = {name: i for i, name in enumerate(self._names)}
        self._means = {
            (places[name], level): (total, weight) for name, level, total, weight in state["means"] if name in places
        }
        self.step = step
        self._clear()

    def _clear(self) -> None:
        self._who = tuple(array("q") for _ in WHO)
        self._few: list[Tensor] = []
        self._folded: list[Tensor] = []

    def _collect(self) -> np.ndarray:
        """This rank's samples, as `SAMPLE`."""
        found = np.empty(len(self._who[0]), SAMPLE)
        for name, numbers in zip(WHO, self._who):
            found[name] = numbers
        measured = [*self._folded, *self._few]
        found["loss"], found["time"] = torch.cat(measured, 1).cpu().numpy() if measured else ((), ())
        return found

    def _excess(self, buckets: np.ndarray, levels: np.ndarray, losses: np.ndarray) -> np.ndarray:
        """Of each sample, in order; NaN where there was no mean before it."""
        excess = np.full(len(losses), np.nan)
        cells = buckets.astype(np.int64) * NOISE_LEVELS + levels
        decay = 2 ** (-1 / HALF_LIFE)
        for cell in np.unique(cells).tolist():
            places = np.flatnonzero(cells == cell)
            key = divmod(cell, NOISE_LEVELS)
            total, weight = self._means.get(key, (0.0, 0.0))
            found = []
            for loss in losses[places].tolist():
                found.append(loss - total / weight if weight else np.nan)
                total, weight = decay * total + loss, decay * weight + 1
            excess[places] = found
            self._means[key] = total, weight
        return excess


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _of_all_ranks(mine: np.ndarray) -> np.ndarray:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return mine
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    return np.concatenate(every)


def _in_order(samples: np.ndarray) -> np.ndarray:
    """By step and seed, each once: ranks that share samples (tensor and sequence parallelism) have all noted them."""
    samples = samples[np.lexsort((samples["window"], samples["seed"], samples["step"]))]
    who = samples[list(WHO)]
    return samples[np.concatenate(([True], who[1:] != who[:-1]))] if len(samples) else samples


def _check(samples: np.ndarray, plan: Plan) -> None:
    good = np.isfinite(samples["loss"]) & (samples["time"] >= 0) & (samples["time"] <= 1)
    if not good.all():
        worst = samples[np.flatnonzero(~good)[0]]
        clip = plan.rows([int(worst["window"])], ["clip_id"])[0]["clip_id"]
        raise DatakitError(
            f"step {worst['step']}: clip {clip} has loss {worst['loss']} at time {worst['time']}: nothing of these "
            f"steps is recorded"
        )


def _about(plan: Plan, windows: np.ndarray) -> pl.DataFrame:
    """`ABOUT` of windows, rising. A take from the whole table would bring all its texts into memory."""
    batches = plan.windows.select(ABOUT).to_batches()
    chunks, inside = np.divmod(windows, ROWS)
    frames = [pl.from_arrow(batches[chunk].take(inside[chunks == chunk])) for chunk in np.unique(chunks).tolist()]
    return pl.concat(frames) if frames else pl.from_arrow(plan.windows.select(ABOUT).slice(0, 0))


def _summed(plan: Plan, about: pl.DataFrame, levels: np.ndarray, excess: np.ndarray) -> pl.DataFrame:
    """Excess and count by `KEY`, added in the order of the samples: polars' own sums depend on the number of
    threads."""
    samples = about.select(
        pl.col("part")
        .replace_strict(dict(enumerate(part.catalog for part in plan.parts)), return_dtype=pl.String)
        .alias("catalog"),
        "clip_id",
        *SPAN,
        pl.col("bucket").replace_strict(dict(enumerate(b.name for b in plan.buckets)), return_dtype=pl.String),
    ).with_columns(noise_level=pl.Series(levels, dtype=pl.Int32), excess=pl.Series(excess, dtype=pl.Float64))
    samples = samples.sort(KEY, maintain_order=True).with_columns(group=pl.struct(KEY).rle_id())
    groups = samples["group"].to_numpy()
    return (
        samples.unique("group", keep="first", maintain_order=True)
        .drop("group")
        .with_columns(
            excess=pl.Series(np.bincount(groups, samples["excess"].to_numpy()), dtype=pl.Float64),
            count=pl.Series(np.bincount(groups), dtype=pl.Int64),
        )
    )
