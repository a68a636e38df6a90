"""Whole parameters on rank 0, of the pieces that all ranks hold: for exports only. (`DTensor.full_tensor` does it for
DTensors, which ColossalAI's slices are not, and on every rank.)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.engine.sharded_state import Cut, Piece


def gather_whole(
    parameters: Mapping[str, tuple[int, ...]], pieces: Sequence[Piece], own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Parameter by parameter, so that no rank has more than one in hand.

    Args:
        own: by name, what this rank owns of it, flat.

    Returns:
        on rank 0 all parameters, float32 on the CPU; elsewhere nothing.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    held: list[dict[str, tuple[Cut | None, int, int]]] = [{}] * world
    dist.all_gather_object(held, {p.name: (p.cut, *p.owned) for p in pieces})
    whole = {}
    for name, shape in parameters.items():
        longest = max(stop - start for _, start, stop in (h[name] for h in held if name in h))
        sent = torch.zeros(longest)
        if name in own:
            sent[: own[name].numel()] = own[name]
        got = [torch.empty(longest) for _ in range(world)] if rank == 0 else None
        dist.gather(sent, got)
        if got:
            whole[name] = _join(shape, [(*h[name], values) for h, values in zip(held, got) if name in h])
    return whole


def _join(shape: tuple[int, ...], parts: list[tuple[Cut | None, int, int, Tensor]]) -> Tensor:
    whole = torch.empty(shape)
    for cut in {part[0] for part in parts}:
        of_cut = cut.shape(shape) if cut else shape
        flat = torch.empty(prod(of_cut))
        for _, start, stop, values in (part for part in parts if part[0] == cut):
            flat[start:stop] = values[: stop - start]
        cut.put(flat.view(of_cut), whole) if cut else whole.copy_(flat.view(of_cut))
    return whole
