"""How good a model is on windows that it does not train on: the same ones each time, shared out over the ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

from trainer.data.batch_sampler import Order
from trainer.data.dataloader import Batch, Loader, Position
from trainer.planning.plan import Plan
from trainer.settings import LoaderSettings
from trainer.training.task import Task


@torch.no_grad()
def evaluate(task: Task, plan: Plan, windows: int, options: LoaderSettings) -> dict[str, float]:
    """Means of what the task says of every sample, over all ranks: the same numbers on each.

    Args:
        windows: of the plan, at least, if it has so many.
    """
    engine = next(iter(task.engines.values()))
    sums: dict[str, torch.Tensor] = {}
    count = 0
    for batch in first_batches(plan, windows, options, engine.rank, engine.world):
        counts = bool(batch.weight)  # a repeat is computed, since other ranks may wait for it, and does not count
        for name, values in task.evaluate(batch).items():
            sums[name] = sums.get(name, 0) + values.double().sum().cpu() * counts
        count += len(batch.windows) * counts
    everything = torch.stack([*sums.values(), torch.tensor(count, dtype=torch.float64)])
    dist.all_reduce(everything)
    return {f"val_{name}": float(value / everything[-1]) for name, value in zip(sums, everything)}


def first_batches(plan: Plan, windows: int, options: LoaderSettings, rank: int, world: int) -> Iterator[Batch]:
    """A rank's micro-batches of the first steps that hold so many windows, not augmented; every rank has as many."""
    order, seen = Order(plan, 0), 0
    plain = options.model_copy(update={"augment": "none", "flip": False, "workers": 0})
    with Loader(plan, order, rank, world, Position(0, 0), plain) as loader:
        for index in range(order.steps(0)):
            if seen >= windows:
                return
            yield from next(loader)[1]
            seen += sum(len(b.windows) for b in order.step(0, index))
