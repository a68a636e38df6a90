"""From one layout of the MMDiT's weights to the other, bit for bit: rows only move.

`fused` (Flux) turns neighbouring features of a head, `separate` (Open-Sora's release) those half a head apart; so the
rows of q and k, and the scales of their norms, change places besides being joined or parted.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_fused(weights: dict[str, Tensor], heads: int) -> dict[str, Tensor]:
    """State dict in the layout `fused` from one in `separate`."""
    fused = {}
    for name, tensor in weights.items():
        prefix, _, rest = name.rpartition("_proj.")
        if name.endswith("_norm.scale"):
            fused[name] = _to_pairs(tensor, 1)
        elif rest and prefix.endswith((".k", ".v")) or ".v_mlp." in name:
            continue  # they go with q
        elif rest and prefix.endswith(".q"):
            stem = prefix[: -len("q")]
            q, k = _to_pairs(tensor, heads), _to_pairs(weights[f"{stem}k_proj.{rest}"], heads)
            single = f"{stem}v_mlp.{rest}"
            v, target = (weights[single], "linear1") if single in weights else (weights[f"{stem}v_proj.{rest}"], "qkv")
            fused[f"{stem}{target}.{rest}"] = torch.cat((q, k, v))
        else:
            fused[name] = tensor
    return fused


def to_separate(weights: dict[str, Tensor], heads: int) -> dict[str, Tensor]:
    """State dict in the layout `separate` from one in `fused`."""
    separate = {}
    for name, tensor in weights.items():
        stem, found, rest = name.rpartition("qkv.") if ".qkv." in name else name.rpartition("linear1.")
        if name.endswith("_norm.scale"):
            separate[name] = _to_halves(tensor, 1)
        elif found:
            width = weights[f"{stem}norm.query_norm.scale"].shape[0] * heads
            parts = {
                "q_proj": _to_halves(tensor[:width], heads),
                "k_proj": _to_halves(tensor[width : 2 * width], heads),
                ("v_proj" if ".qkv." in name else "v_mlp"): tensor[2 * width :],
            }
            separate.update({f"{stem}{part}.{rest}": rows.clone() for part, rows in parts.items()})
        else:
            separate[name] = tensor
    return separate


def _to_pairs(rows: Tensor, heads: int) -> Tensor:
    """Row i of a head's first half and row i of its second become neighbours."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def _to_halves(rows: Tensor, heads: int) -> Tensor:
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()
