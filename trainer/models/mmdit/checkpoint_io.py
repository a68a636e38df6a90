"""The MMDiT from and to checkpoints: Open-Sora's (`separate` layout), Flux's (`fused`), our own. Rows and names move,
no number changes."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from datakit.errors import ConfigError
from datakit.weights.registry import DEFAULT_FOLDER
from trainer.models.common.weights import cast, check_weights, load_weights, read_metadata, read_weights, save_weights
from trainer.models.mmdit.layout import to_fused, to_separate
from trainer.models.mmdit.model import MMDiT, MMDiTConfig

Layout = Literal["separate", "fused"]

CONFIG_KEY = "datakit.mmdit"
"""Under this a file's metadata holds the config as JSON; Open-Sora's and Flux's own code do not look there."""
FIRST, STATES, POOLED = "img_in.weight", "txt_in.weight", "vector_in.in_layer.weight"
"""Weights that read the latents, and a text's states and pooled vector."""
COMPILED = "_orig_mod."
DIFFUSERS = "x_embedder.weight"


def load_mmdit(
    source: str | Path,
    config: MMDiTConfig | None = None,
    layout: Layout | None = None,
    dtype: torch.dtype | None = None,
    allow_missing: tuple[str, ...] = (),
    allow_unexpected: tuple[str, ...] = (),
    folder: str | Path = DEFAULT_FOLDER,
) -> MMDiT:
    """The model with its weights, on the CPU, which shares memory with the file where neither layout nor dtype changes.

    Args:
        source: see `read_weights`: Open-Sora 2.0's release, Flux's (`flux1-dev.safetensors`), what `export_open_sora`
            wrote; names may have a prefix (`module.`, `model.diffusion_model.` …) and traces of torch.compile.
        config: None: the one in the file's metadata, else `config_of` the shapes. Its layout is that of the model.
        layout: of the model when `config` is None; None: that of the file.
        dtype: None: the file's.
        allow_missing: only `cond_in.*`, for a model with a condition from weights without: it is zero, as in
            Open-Sora's training from Flux, so that the condition changes nothing at first.
        allow_unexpected: patterns of what to leave behind, such as `guidance_in.*` of Flux.

    Raises:
        WeightsError: weights that do not fit, by name and shape.
        MissingDependency, ConfigError: see `read_weights`; no MMDiT in it.
    """
    state = unwrapped(read_weights(source, folder=folder), str(source))
    stored = layout_of(state)
    if config is None:
        config = dataclasses.replace(config_in(source, folder), layout=layout or stored)
    what = f"weights in {source} do not fit the model"
    with torch.device("meta"):
        wanted = MMDiT(dataclasses.replace(config, layout=stored)).state_dict()
        model = MMDiT(config)
    check_weights(wanted, state, what, [p for p in allow_missing if p.startswith("cond_in")], allow_unexpected)
    state = {name: state[name] if name in state else state[FIRST].new_zeros(wanted[name].shape) for name in wanted}
    load_weights(model, converted(state, config.layout, config.num_heads), dtype=dtype)
    return model


def export_open_sora(
    model: MMDiT,
    path: str | Path,
    layout: Layout = "separate",
    dtype: torch.dtype | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """One safetensors file with the names and shapes that Open-Sora 2.0's code loads (layout `separate`, its
    `fused_qkv=False`), or Flux's (`fused`). Written whole or not at all.

    Args:
        path: of the file, `.safetensors`.
        dtype: None: as they are. The releases are bfloat16.
        state: weights in place of the model's own, named as they are (an EMA, weights gathered from shards).

    Raises:
        WeightsError: a state that is not that of the model.
        ConfigError: LoRA that is not merged; a path without the suffix.
        DatakitError: the disk does not take it.
    """
    config = dataclasses.replace(model.config, layout=layout)
    about = {CONFIG_KEY: json.dumps(dataclasses.asdict(config))}
    exported = open_sora_state(model.state_dict() if state is None else state, model.config, layout)
    save_weights({name: cast(tensor, dtype) for name, tensor in exported.items()}, path, about)


def open_sora_state(state: Mapping[str, Tensor], config: MMDiTConfig, layout: Layout = "separate") -> dict[str, Tensor]:
    """The weights of a model of this config under a release's names. Raises as `export_open_sora`."""
    if lora := [name for name in state if ".lora_" in name]:
        raise ConfigError(
            f"the model has LoRA on it ({lora[0]} …), which a plain checkpoint cannot hold: merge_lora first, or "
            f"save_lora"
        )
    state = unwrapped(state, "the model")
    with torch.device("meta"):
        wanted = MMDiT(config).state_dict()
    check_weights(wanted, state, "cannot export weights that are not those of the model")
    return converted({name: state[name] for name in wanted}, layout, config.num_heads)


def config_in(source: str | Path, folder: str | Path = DEFAULT_FOLDER) -> MMDiTConfig:
    """The config in a file's metadata, else `config_of` the shapes, in the file's layout. Raises as `load_mmdit`."""
    state = unwrapped(read_weights(source, folder=folder), str(source))
    return dataclasses.replace(_recorded(source, folder) or config_of(state), layout=layout_of(state))


def recognises(names: Iterable[str]) -> bool:
    """Whether these are names of an MMDiT's weights, whatever prefix they have."""
    return any(name == FIRST or name.endswith(f".{FIRST}") for name in names)


def config_of(state: Mapping[str, Tensor]) -> MMDiTConfig:
    """Sizes from names and shapes. What shapes do not show: theta is 10000; how a head divides over t, h and w is
    `axes_of`; the patch size without a condition is 2.

    Raises:
        ConfigError: names that an MMDiT has are not there.
    """
    names = ["time_in.in_layer.weight", POOLED, STATES]
    norm = next((name for name in state if name.endswith(".norm.query_norm.scale")), None)
    if norm is None or (lost := [name for name in names if name not in state]):
        raise ConfigError(f"no MMDiT: it has {FIRST}, but no {'norm of queries' if norm is None else ', '.join(lost)}")
    hidden, in_channels = state[FIRST].shape
    head = state[norm].shape[0]
    if hidden % head:
        raise ConfigError(f"no MMDiT: its width {hidden} does not divide into heads of {head} features")
    cond = state["cond_in.weight"].shape[1] - in_channels if "cond_in.weight" in state else None
    return MMDiTConfig(
        in_channels=in_channels,
        vec_in_dim=state[POOLED].shape[1],
        context_in_dim=state[STATES].shape[1],
        hidden_size=hidden,
        mlp_ratio=_mlp_ratio(state, hidden),
        num_heads=hidden // head,
        depth=_count(state, "double_blocks"),
        depth_single_blocks=_count(state, "single_blocks"),
        axes_dim=axes_of(head),
        qkv_bias=any(name.endswith(("_attn.q_proj.bias", "_attn.qkv.bias")) for name in state),
        guidance_embed="guidance_in.in_layer.weight" in state,
        cond_embed=cond is not None,
        patch_size=math.isqrt(cond) if cond else MMDiTConfig.patch_size,
        layout=layout_of(state),
    )


def axes_of(head: int) -> tuple[int, int, int]:
    """Of a head's features, how many turn with t, h and w: 7/16 for each of h and w, as 128 gives (16, 56, 56) in
    Open-Sora 2.0 and Flux, rounded down to even numbers; t has the rest."""
    side = 2 * (7 * head // 32)
    return head - 2 * side, side, side


def layout_of(state: Mapping[str, Tensor]) -> Layout:
    return "fused" if any(".qkv." in name or ".linear1." in name for name in state) else "separate"


def converted(state: dict[str, Tensor], layout: Layout, heads: int) -> dict[str, Tensor]:
    """In a layout, whichever it is in."""
    if layout_of(state) == layout:
        return state
    return to_fused(state, heads) if layout == "fused" else to_separate(state, heads)


def unwrapped(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Under the model's own names: without what wrappers (torch.compile, DDP, a trainer) put before them.

    Raises:
        ConfigError: no MMDiT, or several.
    """
    plain = {name.replace(COMPILED, ""): tensor for name, tensor in state.items()}
    prefixes = [name.removesuffix(FIRST) for name in plain if name == FIRST or name.endswith(f".{FIRST}")]
    if len(prefixes) == 1:
        return {name.removeprefix(prefixes[0]): tensor for name, tensor in plain.items()}
    if prefixes:
        raise ConfigError(
            f"{source} holds several models ({', '.join(p or 'one without prefix' for p in prefixes)}): keep one of "
            f"them"
        )
    hint = "diffusers' names: take the release's own file, such as flux1-dev.safetensors"
    hint = hint if DIFFUSERS in plain else ", ".join(list(plain)[:3])
    raise ConfigError(f"{source} holds no MMDiT: no {FIRST}, but {hint}")


def _recorded(source: str | Path, folder: str | Path) -> MMDiTConfig | None:
    """The config in the metadata of what we wrote."""
    text = read_metadata(source, folder).get(CONFIG_KEY)
    if text is None:
        return None
    try:
        values = json.loads(text)
        return MMDiTConfig(**{**values, "axes_dim": tuple(values["axes_dim"])})
    except (ValueError, TypeError, KeyError) as e:
        raise ConfigError(f"{source}: the config in its metadata is not one of an MMDiT ({e}): give the config") from e


def _count(state: Mapping[str, Tensor], blocks: str) -> int:
    numbers = [int(found[1]) for name in state if (found := re.match(rf"{blocks}\.(\d+)\.", name))]
    return max(numbers, default=-1) + 1


def _mlp_ratio(state: Mapping[str, Tensor], hidden: int) -> float:
    """Such that MMDiTConfig.mlp_size is the size found, whatever the rounding."""
    sizes = Counter(tensor.shape[0] for name, tensor in state.items() if name.endswith("_mlp.0.weight"))
    sizes = sizes or Counter(
        tensor.shape[1] - hidden for name, tensor in state.items() if name.endswith(".linear2.weight")
    )
    if not sizes:
        raise ConfigError(f"no MMDiT: it has {FIRST}, but no blocks")
    size = sizes.most_common(1)[0][0]
    ratio = size / hidden
    return ratio if int(hidden * ratio) == size else math.nextafter(ratio, math.inf)
