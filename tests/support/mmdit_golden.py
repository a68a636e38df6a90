"""The tiny MMDiTs of tests/data/golden, as tests of weights and of LoRA take them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from trainer.models.mmdit.model import MMDiTConfig

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


def golden(name: str) -> tuple[dict[str, Tensor], MMDiTConfig, dict[str, Tensor], Tensor]:
    """State dict, config, inputs and the velocity that the reference computed."""
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        about = {k: json.loads(v) for k, v in file.metadata().items()}
    known = {field.name for field in dataclasses.fields(MMDiTConfig)}
    config = MMDiTConfig(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in about.items() if k in known},
        layout="fused" if about["fused_qkv"] else "separate",
    )
    part = {
        p: {k.split(".", 1)[1]: v for k, v in tensors.items() if k.startswith(f"{p}.")}
        for p in ("weights", "inputs", "expected")
    }
    return part["weights"], config, part["inputs"], part["expected"]["velocity"]


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Names, dtypes and values, bit for bit."""
    return found.keys() == expected.keys() and all(
        torch.equal(t, expected[k]) and t.dtype == expected[k].dtype for k, t in found.items()
    )


def close(found: Tensor, expected: Tensor) -> bool:
    """As tests/data/golden/README.md asks."""
    return found.shape == expected.shape and bool(
        (found - expected).abs().max() <= 1e-4 * max(1.0, expected.abs().max().item())
    )
