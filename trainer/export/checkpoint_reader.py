"""The weights in a run's checkpoints, read by one process alone, whatever plugin and number of ranks wrote them."""

from __future__ import annotations

from math import prod
from pathlib import Path

from torch import Tensor

from datakit.errors import ConfigError
from trainer.engine.sharded_state import Piece, Shards, check_shard, find_shards
from trainer.training.checkpoint import folder_name, whole
from trainer.training.setup import recorded

MASTER, EMA = "master", "ema"
"""Kinds of values that a shard has of a parameter."""


def checkpoint_of(run: Path, step: int | None = None) -> Path:
    """A run's checkpoint.

    Args:
        run: its folder.
        step: None: the newest.

    Raises:
        ConfigError: no run, no whole checkpoint, none of this step.
    """
    recorded(run)
    found = whole(run / "checkpoints")
    if not found:
        raise ConfigError(f"{run} has no whole checkpoint")
    if step is None:
        return found[-1]
    wanted = next((path for path in found if path.name == folder_name(step)), None)
    if wanted is None:
        raise ConfigError(
            f"{run} has no whole checkpoint of step {step}: there are "
            f"{', '.join(str(step_of(p)) for p in sorted(found))}"
        )
    return wanted


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def open_shards(folder: Path) -> Shards:
    """What a checkpoint has of one model, after a look at every byte of it.

    Raises:
        ConfigError: nothing there, or damage.
    """
    for file in find_shards(folder):
        check_shard(file)
    return Shards(folder)


def read_whole(shards: Shards, name: str, ema: bool) -> Tensor:
    """A parameter, or its EMA, float32 in its own shape.

    Raises:
        ConfigError: it is not there.
    """
    shape = shards.parameters[name]
    size = prod(shape)
    return shards.read(EMA if ema else MASTER, Piece(name, shape, None, 0, size, (0, size), dict), 0, size).view(shape)
