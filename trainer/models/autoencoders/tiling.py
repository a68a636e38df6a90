"""Encoding and decoding piece by piece: the network sees one tile of the video at a time, the results overlap and
blend.

Along each axis tiles are spread evenly, all of the size asked for (or of the axis, where that is shorter), as few as
overlap by at least what was asked. Blends are linear, over half of what two tiles share: the middle half, for a tile
knows least at its edge; in causal time the last half, for there the earlier tile lacks nothing. A position's weights
sum to 1, so order does not matter. Memory: the result in float32, and one tile.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiles:
    """How large a tile may be; the defaults are those of HunyuanVideo.

    Attributes:
        frames: of a tile. A causal autoencoder gets one more, the frame before, which has its own latent: 64 means 65
            frames.
        height, width: of a tile, pixels.
        overlap: of neighbours, as a part of a tile, at least.

    All sizes are rounded down to whole latents.
    """

    frames: int = 64
    height: int = 256
    width: int = 256
    overlap: float = 0.25

    def __post_init__(self) -> None:
        if min(self.frames, self.height, self.width) < 1 or not 0 <= self.overlap < 1:
            raise ValueError(f"tiles need positive sizes and an overlap from 0 to below 1, not {self}")


@dataclass(frozen=True)
class Piece:
    """A tile's part of one axis.

    Attributes:
        source: what the network is given, in the input's units.
        drop: how many leading results are context only.
        target: where the others go, in the output's units.
        weight: of each of them.
    """

    source: slice
    drop: int
    target: slice
    weight: Tensor


def tiled(network: Callable[[Tensor], Tensor], x: Tensor, axes: Sequence[Sequence[Piece]]) -> Tensor:
    """What `network` makes of [B, C, T, H, W], tile by tile.

    Args:
        axes: the pieces of time, height and width, see `pieces`.
    """
    if all(len(axis) == 1 for axis in axes):
        return network(x)
    total: Tensor | None = None
    for tile in itertools.product(*axes):
        part = network(x[(..., *(piece.source for piece in tile))])[(..., *(slice(piece.drop, None) for piece in tile))]
        if total is None:
            total = torch.zeros(*part.shape[:2], *(axis[-1].target.stop for axis in axes), device=part.device)
        t, h, w = (piece.weight.to(part.device) for piece in tile)
        total[(..., *(piece.target for piece in tile))] += part * (t[:, None, None] * h[:, None] * w)
        dtype = part.dtype
        del part  # before the next tile is computed
    return total.to(dtype)


def pieces(latents: int, tile: int, overlap: float, units: tuple[int, int], lead: int = 0) -> list[Piece]:
    """An axis in pieces.

    Args:
        latents: its length.
        tile: latents of a piece, without the lead.
        overlap: of neighbours, as a part of a tile.
        units: pixels (or frames) per latent of the input and of the output: (8, 1) encodes, (1, 8) decodes.
        lead: 1 in causal time, where the first frame has a latent of its own. A network takes the first frame of any
            tile for such a one; so tiles after the first begin with a frame, or a latent, whose result is dropped: the
            tile before has it.
    """
    body = latents - lead
    tile = min(tile, body)
    starts = _starts(body, tile, tile - math.ceil(overlap * tile)) if body else [0]
    into, out = units
    found = []
    for start, weight in zip(starts, _weights(starts, tile * out, out, bool(lead))):
        drop = lead if start else 0
        weight = weight if drop else torch.cat((torch.ones(lead), weight))
        found.append(
            Piece(
                slice(start * into, (start + tile) * into + lead),
                drop,
                slice(start * out + drop, (start + tile) * out + lead),
                weight,
            )
        )
    return found


def _starts(size: int, tile: int, step: int) -> list[int]:
    """As few as reach the end without gaps above `step`, evenly."""
    gaps = math.ceil((size - tile) / max(step, 1))
    return [0] + [(i + 1) * (size - tile) // gaps for i in range(gaps)]


def _weights(starts: Sequence[int], length: int, unit: int, causal: bool) -> list[Tensor]:
    """Each tile fades in over what it shares with the one before; what it gains, all before it lose."""
    weights: list[Tensor] = []
    for i, start in enumerate(starts):
        weight = torch.ones(length)
        if i:
            shared = length - (start - starts[i - 1]) * unit
            before, after = (shared // 2, 0) if causal else (shared // 4, shared // 4)
            ramp = shared - before - after
            weight[:before] = 0
            weight[before : before + ramp] = torch.arange(1, ramp + 1) / (ramp + 1)
        for earlier, other in zip(starts, weights):
            shared = max(0, length - (start - earlier) * unit)
            other[length - shared :] *= 1 - weight[:shared]
        weights.append(weight)
    return weights
