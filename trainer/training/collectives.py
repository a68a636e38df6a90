"""Small things that all processes of a run agree on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


def anywhere(here: bool) -> bool:
    """Whether something is so on any rank: a signal, for one, does not reach all of them in the same step."""
    flag = torch.tensor(int(here))
    if dist.get_world_size() > 1:
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def gathered(value: Any) -> list[Any]:
    """Of every rank, in their order."""
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, value)
    return everywhere


def added(values: dict[str, float]) -> dict[str, float]:
    """By name, over all ranks: one that had nothing real to do may lack some."""
    everywhere = gathered(values)
    names = dict.fromkeys(name for each in everywhere for name in each)
    return {name: sum(each.get(name, 0.0) for each in everywhere) for name in names}


def share_out(items: Sequence[Any], rank: int, world: int) -> list[Any]:
    """This rank's part, as long as every other's: short ones repeat their last."""
    rounds = -(-len(items) // world)
    mine = list(items[rank::world])
    return mine + [mine[-1] if mine else items[0]] * (rounds - len(mine))
