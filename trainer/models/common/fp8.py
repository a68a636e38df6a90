"""Linear layers in 8-bit floats (e4m3), for sampling: half the bytes of the weights, up to twice the GEMM rate on
Hopper and later.

Weights are quantised once, inputs as they come ("dynamic"), with one scale a row or one a tensor. Compiled, a row's
scale is found in the pass that normalises and modulates the row; a tensor's scale takes a pass of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal

import torch
from torch import Tensor, nn

E4M3 = torch.float8_e4m3fn
MOST = 448.0
"""The largest e4m3 number."""
LEAST = 1e-12
MULTIPLE = 16
"""Of both sizes of a matrix, that the kernels take."""
Scales = Literal["row", "tensor"]


class Fp8Linear(nn.Module):
    """`nn.Linear` with its weight in e4m3; no gradients.

    Args:
        linear: to replace.
        scales: one for each row (of the input: each token; of the weight: each output feature), or one for each tensor.
    """

    def __init__(self, linear: nn.Linear, scales: Scales = "row"):
        super().__init__()
        self.in_features, self.out_features, self.scales = linear.in_features, linear.out_features, scales
        weight, scale = quantise(linear.weight.detach(), scales)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.T.contiguous() if scales == "row" else scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        rows, scale = quantise(x.flatten(0, -2), self.scales)
        # the private name: it is what Inductor fuses, and what torch before 2.10 has
        out = torch._scaled_mm(
            rows, self.weight.T, scale_a=scale, scale_b=self.scale, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        if self.bias is not None:
            out = out + self.bias
        return out.to(x.dtype).unflatten(0, x.shape[:-1])

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scales={self.scales}"


def quantise(x: Tensor, scales: Scales) -> tuple[Tensor, Tensor]:
    """[M, K] -> e4m3 of the same shape, and the float32 scales to multiply it by: [M, 1], or one number."""
    most = x.abs().amax(1, keepdim=True) if scales == "row" else x.abs().amax()
    scale = most.float().clamp(min=LEAST) / MOST
    return (x.float() / scale).to(E4M3), scale


def to_fp8(
    blocks: Iterable[nn.Module],
    scales: Scales = "row",
    device: torch.device | None = None,
    kept: Collection[str] = (),
) -> int:
    """Put the large linear layers of a model's blocks into fp8, in place; for sampling.

    What is outside of blocks stays, and so does modulation: 28 % of the weights of Open-Sora's release, but hardly any
    of its FLOPs, and where errors reach every token.

    Args:
        blocks, kept: see `trainer.models.common.dit_architecture.Architecture`, `blocks` and `fp8_kept`.
        device: that blocks are moved to, one by one, and quantised on: the whole model is never there in more than 8
            bits.

    Returns:
        number of layers replaced.

    Raises:
        ValueError: sizes that the kernels do not take.
    """
    count = 0
    for block in blocks:
        found = [
            (parent, name, linear)
            for parent in block.modules()
            for name, linear in parent.named_children()
            if isinstance(linear, nn.Linear) and name not in kept
        ]
        for _, name, linear in found:
            if linear.in_features % MULTIPLE or linear.out_features % MULTIPLE:
                raise ValueError(
                    f"{name} is {linear.in_features} × {linear.out_features}: fp8 takes multiples of {MULTIPLE}"
                )
        if device is not None:
            block.to(device)
        for parent, name, linear in found:
            setattr(parent, name, Fp8Linear(linear, scales))
        count += len(found)
    return count
