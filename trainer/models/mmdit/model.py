"""The MMDiT of Open-Sora 2.0 (arXiv:2503.09642): text and video tokens in one attention, first in double blocks with
weights of their own for each, then in single blocks. Its parameters have the released checkpoint's names and shapes.

Two layouts of the same network: `separate`, as Open-Sora releases it (one Linear each for q, k and v; RoPE on the
halves of a head), and `fused`, as Flux has it (one Linear for all three; RoPE on neighbouring pairs). See
`trainer.models.mmdit.layout`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from trainer.models.common.attention import Attention, Kernel

TIME_FEATURES = 256
MAX_PERIOD = 10000.0
TIME_FACTOR = 1000.0
NORM_EPS = 1e-6
EMBEDDING_STD = 0.02


@dataclass(frozen=True)
class MMDiTConfig:
    """Sizes; the defaults are those of the released 11.891 B model.

    Attributes:
        in_channels: of a video token: latent channels × patch_size².
        cond_embed: takes a condition: per token the mask and the masked latents, `in_channels + patch_size²` features.
        guidance_embed: takes the guidance scale as an input (distilled models).
        axes_dim: of a head's features, how many turn with t, h and w.
    """

    in_channels: int = 64
    vec_in_dim: int = 768
    context_in_dim: int = 4096
    hidden_size: int = 3072
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 19
    depth_single_blocks: int = 38
    axes_dim: tuple[int, ...] = (16, 56, 56)
    theta: int = 10000
    qkv_bias: bool = True
    guidance_embed: bool = False
    cond_embed: bool = True
    patch_size: int = 2
    layout: Literal["separate", "fused"] = "separate"

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads or sum(self.axes_dim) != self.hidden_size // self.num_heads:
            raise ValueError(
                f"axes_dim {self.axes_dim} must add up to the head's {self.hidden_size}/{self.num_heads} features"
            )

    @property
    def mlp_size(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)


class MMDiT(nn.Module):
    """Velocity of noised video tokens, given text."""

    def __init__(self, config: MMDiTConfig = MMDiTConfig()):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.img_in = nn.Linear(config.in_channels, width)
        self.time_in = MLPEmbedder(TIME_FEATURES, width)
        self.vector_in = MLPEmbedder(config.vec_in_dim, width)
        if config.guidance_embed:
            self.guidance_in = MLPEmbedder(TIME_FEATURES, width)
        if config.cond_embed:
            self.cond_in = nn.Linear(config.in_channels + config.patch_size**2, width)
            nn.init.zeros_(self.cond_in.weight)
            nn.init.zeros_(self.cond_in.bias)
        self.txt_in = nn.Linear(config.context_in_dim, width)
        self.double_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.depth_single_blocks))
        self.final_layer = FinalLayer(width, config.in_channels)

    @torch.no_grad()
    def initialise(self) -> None:
        """Random weights to train from, as DiT's (facebookresearch/DiT, models.py): gates and the last layer are zero,
        so that every block starts as the identity and the velocity as zero; the rest Xavier uniform, embeddings
        normal."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.scale)
        for embedder in (m for m in self.modules() if isinstance(m, MLPEmbedder)):
            nn.init.normal_(embedder.in_layer.weight, std=EMBEDDING_STD)
            nn.init.normal_(embedder.out_layer.weight, std=EMBEDDING_STD)
        for modulation in (m for m in self.modules() if isinstance(m, Modulation)):
            nn.init.zeros_(modulation.lin.weight)
        nn.init.zeros_(self.final_layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)
        if self.config.cond_embed:
            nn.init.zeros_(self.cond_in.weight)

    def use_kernel(self, kernel: Kernel | None) -> None:
        """Attend by this kernel; None: by the best one at hand."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.kernel = kernel

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        return *self.double_blocks, *self.single_blocks

    def checkpoint_activations(self, double: int, single: int, keep_attention: bool = True) -> None:
        """Selective activation checkpointing: so many of the double and of the single blocks, from the first on, keep
        nothing of their forward pass in training and compute it again in the backward pass.

        Args:
            keep_attention: all but the attention's output, which costs most to compute again: 81 % of the FLOPs of a
                pass at 576×1024×129, for one tensor of the block's width.
        """
        for blocks, count in ((self.double_blocks, double), (self.single_blocks, single)):
            for i, block in enumerate(blocks):
                block.recomputed = ("all but attention" if keep_attention else "all") if i < count else None

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y_vec: Tensor,
        cond: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """One evaluation.

        Args:
            img: [B, N, in_channels] noised latents, packed (`trainer.diffusion.rectified_flow.pack`).
            img_ids: [B, N, 3] position (t, h, w) of each token, in patches; txt_ids: [B, L, 3], zeros.
            txt: [B, L, context_in_dim] states of the text encoder, padding included: it is attended to, as in training.
            timesteps: [B] in 0 (data) to 1 (noise).
            y_vec: [B, vec_in_dim] pooled text embedding.
            cond: [B, N, in_channels + patch_size²]; with `cond_embed` only, and then needed.
            guidance: [B]; with `guidance_embed` only, and then needed.

        Returns:
            velocity, [B, N, in_channels].

        Raises:
            ValueError: an input that the model needs is not given, or one that it does not take is.
        """
        if (cond is None) == self.config.cond_embed or (guidance is None) == self.config.guidance_embed:
            raise ValueError("cond and guidance are given if, and only if, the model has cond_embed and guidance_embed")
        x = self.img_in(img)
        if cond is not None:
            x = x + self.cond_in(cond)
        vec = self.time_in(sinusoid(timesteps, img.dtype))
        if guidance is not None:
            vec = vec + self.guidance_in(sinusoid(guidance, img.dtype))
        vec = vec + self.vector_in(y_vec)
        text = self.txt_in(txt)
        turns = rotations(torch.cat((txt_ids, img_ids), 1), self.config)
        for block in self.double_blocks:
            x, text = block(x, text, vec, turns)
        joint = torch.cat((text, x), 1)
        for block in self.single_blocks:
            joint = block(joint, vec, turns)
        return self.final_layer(joint[:, text.shape[1] :], vec)


class Block(nn.Module):
    """A block whose forward pass may be computed again in the backward pass, see `MMDiT.checkpoint_activations`."""

    recomputed: Literal["all", "all but attention"] | None = None

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        if self.recomputed is None or not torch.is_grad_enabled():
            return self.run(*inputs)
        keep = (
            {"context_fn": partial(create_selective_checkpoint_contexts, _keep_attention)}
            if self.recomputed == "all but attention"
            else {}
        )
        return checkpoint(self.run, *inputs, use_reentrant=False, **keep)


class DoubleBlock(Block):
    """Text and video have weights of their own and attend to each other."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.attend = Attention(turner(config))
        self.img_mod, self.txt_mod = Modulation(config.hidden_size, 6), Modulation(config.hidden_size, 6)
        self.img_attn, self.txt_attn = SelfAttention(config), SelfAttention(config)
        self.img_mlp, self.txt_mlp = mlp(config), mlp(config)

    def run(self, x: Tensor, text: Tensor, vec: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
        """x: [B, N, width]; text: [B, L, width]; vec: [B, width]; turns: see `rotations`."""
        of_x, of_text = self.img_mod(vec), self.txt_mod(vec)
        q, k, v = self.img_attn.qkv_heads(modulate(x, *of_x[:2]))
        text_q, text_k, text_v = self.txt_attn.qkv_heads(modulate(text, *of_text[:2]))
        joint = self.attend(torch.cat((text_q, q), 2), torch.cat((text_k, k), 2), torch.cat((text_v, v), 2), turns)
        length = text.shape[1]
        x = x + of_x[2] * self.img_attn.proj(joint[:, length:])
        x = x + of_x[5] * self.img_mlp(modulate(x, *of_x[3:5]))
        text = text + of_text[2] * self.txt_attn.proj(joint[:, :length])
        text = text + of_text[5] * self.txt_mlp(modulate(text, *of_text[3:5]))
        return x, text


class SingleBlock(Block):
    """One stream; attention and MLP side by side."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        width, self.heads, self.fused = config.hidden_size, config.num_heads, config.layout == "fused"
        self.mlp_size = config.mlp_size
        self.attend = Attention(turner(config))
        if self.fused:
            self.linear1 = nn.Linear(width, 3 * width + config.mlp_size)
        else:
            self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
            self.v_mlp = nn.Linear(width, width + config.mlp_size)
        self.linear2 = nn.Linear(width + config.mlp_size, width)
        self.norm = QKNorm(width // config.num_heads)
        self.modulation = Modulation(width, 3)

    def run(self, x: Tensor, vec: Tensor, turns: Tensor) -> Tensor:
        """x: [B, L + N, width]."""
        shift, scale, gate = self.modulation(vec)
        q, k, v, wide = self._project(modulate(x, shift, scale))
        q, k = self.norm(split_heads(q, self.heads), split_heads(k, self.heads))
        seen = self.attend(q, k, split_heads(v, self.heads), turns)
        return x + gate * self.linear2(torch.cat((seen, F.gelu(wide, approximate="tanh")), 2))

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        width = x.shape[-1]
        if self.fused:
            return self.linear1(x).split([width, width, width, self.mlp_size], -1)
        return self.q_proj(x), self.k_proj(x), *self.v_mlp(x).split([width, self.mlp_size], -1)


class SelfAttention(nn.Module):
    """One stream's projections to and from the joint attention."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        width, bias = config.hidden_size, config.qkv_bias
        self.heads, self.fused = config.num_heads, config.layout == "fused"
        if self.fused:
            self.qkv = nn.Linear(width, 3 * width, bias=bias)
        else:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=bias) for _ in range(3))
        self.norm = QKNorm(width // config.num_heads)
        self.proj = nn.Linear(width, width)

    def qkv_heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, width] -> three of [B, heads, N, head width], q and k normalised."""
        q, k, v = self.qkv(x).chunk(3, -1) if self.fused else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        return *self.norm(split_heads(q, self.heads), split_heads(k, self.heads)), split_heads(v, self.heads)


class QKNorm(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.query_norm, self.key_norm = RMSNorm(size), RMSNorm(size)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q), self.key_norm(k)


class RMSNorm(nn.Module):
    """Over the last dimension, computed in float32."""

    def __init__(self, size: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM_EPS)).to(x.dtype) * self.scale


class Modulation(nn.Module):
    """Shifts, scales and gates, [B, 1, width] each, from the vector of time and text."""

    def __init__(self, width: int, count: int):
        super().__init__()
        self.count = count
        self.lin = nn.Linear(width, count * width)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self.lin(F.silu(vec))[:, None].chunk(self.count, -1)


class MLPEmbedder(nn.Module):
    def __init__(self, size: int, width: int):
        super().__init__()
        self.in_layer, self.out_layer = nn.Linear(size, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class FinalLayer(nn.Module):
    def __init__(self, width: int, out_channels: int):
        super().__init__()
        self.linear = nn.Linear(width, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        return self.linear(modulate(x, *self.adaLN_modulation(vec)[:, None].chunk(2, -1)))


def mlp(config: MMDiTConfig) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(config.hidden_size, config.mlp_size),
        nn.GELU(approximate="tanh"),
        nn.Linear(config.mlp_size, config.hidden_size),
    )


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights of its own, then scaled and shifted."""
    return (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) + shift


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, heads · d] -> [B, heads, N, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def sinusoid(t: Tensor, dtype: torch.dtype) -> Tensor:
    """[B] in 0..1 -> [B, 256]: cosines, then sines, of 1000·t at periods up to 10000 · 2π."""
    half = TIME_FEATURES // 2
    frequencies = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = (TIME_FACTOR * t).float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), -1).to(dtype)


def rotations(ids: Tensor, config: MMDiTConfig) -> Tensor:
    """Cosines and sines of the angles that each token's features turn by (RoPE, arXiv:2104.09864, an axis at a time).

    Args:
        ids: [B, N, axes].

    Returns:
        [2, B, 1, N, head width / 2], float32; angles are computed in float64.
    """
    angles = []
    for axis, size in enumerate(config.axes_dim):
        omega = config.theta ** -(torch.arange(0, size, 2, dtype=torch.float64, device=ids.device) / size)
        angles.append(ids[..., axis].double()[..., None] * omega)
    angle = torch.cat(angles, -1)[:, None]
    return torch.stack((angle.cos(), angle.sin())).float()


def turner(config: MMDiTConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """How a layout turns its heads."""
    return turn_pairs if config.layout == "fused" else turn_halves


def turn_pairs(x: Tensor, turns: Tensor) -> Tensor:
    """Turn neighbouring features of a head; in float32. [B, heads, N, d]."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack(_turned(a, b, turns), -1).flatten(-2).to(x.dtype)


def turn_halves(x: Tensor, turns: Tensor) -> Tensor:
    """Turn features half a head apart; in float32. [B, heads, N, d]."""
    a, b = x.float().chunk(2, -1)
    return torch.cat(_turned(a, b, turns), -1).to(x.dtype)


def _turned(a: Tensor, b: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = turns
    return a * cos - b * sin, b * cos + a * sin


def _keep_attention(context, op, *args, **kwargs) -> CheckpointPolicy:
    """Of a checkpointed block, keep what attention kernels give."""
    return (
        CheckpointPolicy.MUST_SAVE
        if "attn" in op.__name__ or "attention" in op.__name__
        else CheckpointPolicy.PREFER_RECOMPUTE
    )
