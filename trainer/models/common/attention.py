"""Attention without a mask, by the fastest kernel at hand.

On one H100 at 8,960 tokens, 24 heads of 128, bf16: cuDNN's kernel 685 TFLOP/s, FlashAttention-2 356
(`scripts/bench_dit.py` prints both). cuDNN's is torch's own; output and gradients are within 3.2e-3 of
FlashAttention-2's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Kernel = Literal["cudnn", "flash-attn", "sdpa"]
KERNELS: tuple[Kernel, ...] = ("cudnn", "flash-attn", "sdpa")
HOPPER = 9
"""Compute capability from which cuDNN's kernel is the fastest."""
MOST_FEATURES = 128
"""Of a head, that cuDNN's kernel takes forward and back."""
FLASH_ATTN = importlib.util.find_spec("flash_attn") is not None


def best_kernel(device: torch.device, dtype: torch.dtype, features: int) -> Kernel:
    """The kernel for heads of so many features: cuDNN's on Hopper and later, else flash-attn where it is installed,
    else what `scaled_dot_product_attention` chooses (on CPUs always)."""
    if (
        device.type != "cuda"
        or dtype not in (torch.bfloat16, torch.float16)
        or features % 8
        or features > MOST_FEATURES
    ):
        return "sdpa"
    if torch.cuda.get_device_properties(device).major >= HOPPER:
        return "cudnn"
    return "flash-attn" if FLASH_ATTN else "sdpa"


class Attention(nn.Module):
    """Rotate q and k by position, then attend; without weights.

    Attributes:
        rotate: see `trainer.models.mmdit.model.turner`.
        kernel: to use; None: the best one for the tensors that come.
    """

    def __init__(self, rotate: Callable[[Tensor, Tensor], Tensor], kernel: Kernel | None = None):
        super().__init__()
        self.rotate, self.kernel = rotate, kernel

    def forward(self, q: Tensor, k: Tensor, v: Tensor, turns: Tensor) -> Tensor:
        """[B, heads, N, d] each, and `rotations` -> [B, N, heads · d]."""
        return attend(self.rotate(q, turns), self.rotate(k, turns), v, self.kernel).transpose(1, 2).flatten(2)


def attend(q: Tensor, k: Tensor, v: Tensor, kernel: Kernel | None = None) -> Tensor:
    """softmax(q kᵀ / √d) v: [B, heads, N, d] -> the same.

    Raises:
        ValueError: there is no such kernel.
    """
    kernel = kernel or best_kernel(q.device, q.dtype, q.shape[-1])
    if kernel == "sdpa":
        return F.scaled_dot_product_attention(q, k, v)
    if kernel == "cudnn":
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
            return F.scaled_dot_product_attention(q, k, v)
    if kernel == "flash-attn":
        from flash_attn import flash_attn_func

        return flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    raise ValueError(f"there is no attention kernel {kernel!r}; there are {', '.join(KERNELS)}")


def describe(device: torch.device, dtype: torch.dtype, features: int) -> str:
    """One line for logs: which kernel `attend` uses there, in words."""
    return {
        "cudnn": "attention: cuDNN (torch's scaled_dot_product_attention)",
        "flash-attn": "attention: flash-attn",
        "sdpa": f"attention: torch's scaled_dot_product_attention on {device.type}",
    }[best_kernel(device, dtype, features)]
