"""Sequence parallelism by all-to-all (DeepSpeed-Ulysses, arXiv:2309.14509): outside attention each rank has a share of
the tokens and all heads, inside it all tokens and a share of the heads. Shares need not be equal.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from trainer.models.common.attention import Attention


class Ulysses(Attention):
    """`Attention` for a share of the tokens. `turns` are those of all tokens, a rank's share after the other's."""

    group: ProcessGroup

    @classmethod
    def from_native_module(cls, module: Attention, process_group: ProcessGroup, group: ProcessGroup) -> Ulysses:
        """ColossalAI's way to replace a module; `process_group` is that of tensor parallelism, which has its heads
        already."""
        replaced = cls(module.rotate, module.kernel)
        replaced.group = group
        return replaced

    def forward(self, q: Tensor, k: Tensor, v: Tensor, turns: Tensor) -> Tensor:
        """[B, heads, n, d] each, n of this rank's share -> [B, n, heads · d]."""
        lengths = shares(turns.shape[-2], self.group.size())
        q, k, v = _to_heads(torch.stack((q, k, v)), lengths, self.group)
        return _to_tokens(super().forward(q, k, v, turns), lengths, self.group)


def shares(total: int, count: int) -> list[int]:
    """How many tokens each rank has: as equal as can be, the first ranks more."""
    return [total // count + (rank < total % count) for rank in range(count)]


def gather_tokens(x: Tensor, lengths: list[int], group: ProcessGroup) -> Tensor:
    """[B, own share, c] -> [B, all, c], the same on every rank. Backward, a rank gets the gradient of its own share:
    what comes of the gathered tensor must be the same on every rank, and counts once."""
    return _Gather.apply(x, lengths, group)


def _to_heads(qkv: Tensor, lengths: list[int], group: ProcessGroup) -> Tensor:
    """[3, B, heads, own share, d] -> [3, B, own heads, all, d]."""
    parts = qkv.chunk(len(lengths), 2)
    sizes = [parts[0][..., :1, :].numel() * length for length in lengths]
    got = _AllToAll.apply(_join(parts), sizes, [part.numel() for part in parts], group)
    return torch.cat([part.view(*parts[0].shape[:3], length, -1) for part, length in zip(got.split(sizes), lengths)], 3)


def _to_tokens(x: Tensor, lengths: list[int], group: ProcessGroup) -> Tensor:
    """[B, all, own heads · d] -> [B, own share, all heads · d]."""
    parts = x.split(lengths, 1)
    own = parts[group.rank()]
    got = _AllToAll.apply(_join(parts), [own.numel()] * len(parts), [part.numel() for part in parts], group)
    return torch.cat([part.view(own.shape) for part in got.chunk(len(parts))], -1)


def _join(parts: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


class _AllToAll(torch.autograd.Function):
    """Send each rank its part of a flat tensor, get a flat tensor of what all sent; the gradient goes the way back."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, received: list[int], sent: list[int], group: ProcessGroup) -> Tensor:
        ctx.sizes, ctx.group = (sent, received), group
        return _exchange(flat, received, sent, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _exchange(grad.contiguous(), *ctx.sizes, ctx.group), None, None, None


def _exchange(flat: Tensor, received: list[int], sent: list[int], group: ProcessGroup) -> Tensor:
    out = flat.new_empty(sum(received))
    dist.all_to_all_single(out, flat, received, sent, group=group)
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: list[int], group: ProcessGroup) -> Tensor:
        ctx.lengths, ctx.rank = lengths, group.rank()
        padded = x.new_zeros(x.shape[0], max(lengths), x.shape[2])
        padded[:, : x.shape[1]] = x
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:, :length] for part, length in zip(parts, lengths)], 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        start = sum(ctx.lengths[: ctx.rank])
        return grad[:, start : start + ctx.lengths[ctx.rank]].contiguous(), None, None
