"""LoRA (arXiv:2106.09685) through peft: low-rank additions to chosen linears are trained, the model itself stays as it
is.

The model keeps its class and its forward; its linears become peft's, with the original inside.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datakit.atomic import atomic_path
from datakit.dependencies import install_command
from datakit.errors import ConfigError, MissingDependency
from datakit.weights.registry import DEFAULT_FOLDER
from trainer.models.common.settings import LoraSettings
from trainer.models.common.weights import (
    SAFETENSORS,
    check_weights,
    find_weights,
    read_metadata,
    read_weights,
    save_weights,
)

ADAPTER = "default"
FOLDER_WEIGHTS, FOLDER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_PREFIX = "base_model.model."
"""A folder is as peft writes it (and as Open-Sora's training does, through ColossalAI)."""
DIFFUSERS_PREFIX, DIFFUSERS_CONFIG = "transformer.", "lora_adapter_metadata"
"""A file is as diffusers writes it; the config is JSON in its metadata."""
USED = ("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora")
PLACE = (
    "peft_type",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "auto_mapping",
    "inference_mode",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
)
"""Of peft's config: what is read, and what says where it came from and which linears it is on, as the tensors' names
do."""
START = "gaussian"
"""How diffusers' scripts start the first factors; other ways (pissa …) also change the model, and then the tensors
alone mean nothing."""
SHOWN = 8


def add_lora(
    model: nn.Module, settings: LoraSettings = LoraSettings(), seed: int = 0, targets: Sequence[str] = ()
) -> list[str]:
    """Put LoRA, in float32, on linears. Only its parameters require gradients after that; at first it adds exactly
    nothing.

    Args:
        seed: of the first factors, so that they are the same on every rank; PyTorch's generator is left alone.
        targets: the architecture's patterns of the names of linears, for where the settings have none.

    Returns:
        names of the linears.

    Raises:
        ConfigError: a pattern that no linear's name matches; LoRA that is there already.
        MissingDependency: peft.
    """
    names = _targets(model, settings.targets, targets)
    alpha = settings.rank if settings.alpha is None else settings.alpha
    config = _peft().LoraConfig(r=settings.rank, lora_alpha=alpha, lora_dropout=settings.dropout, target_modules=names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _inject(model, config, names)
    return names


def lora_state(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """LoRA's tensors alone, `….lora_A.weight` [rank, in] and `….lora_B.weight` [out, rank].

    Args:
        state: a state dict of the model to take them from in place of its own (an EMA, weights gathered from shards).

    Raises:
        ConfigError: the model has no LoRA.
    """
    _layers(model)
    given = None if state is None else dict(state)
    return _peft().get_peft_model_state_dict(model, given, ADAPTER, save_embedding_layers=False)


def save_lora(model: nn.Module, path: str | Path, state: Mapping[str, Tensor] | None = None) -> None:
    """LoRA's tensors and config: a file `.safetensors` in diffusers' format, any other path as a folder in peft's.

    Raises:
        ConfigError: the model has no LoRA.
        DatakitError: the disk does not take it.
    """
    path, tensors, config = Path(path), lora_state(model, state), _told(model)
    if path.suffix == SAFETENSORS:
        about = json.dumps({f"{DIFFUSERS_PREFIX}{key}": value for key, value in config.items()}, sort_keys=True)
        save_weights({f"{DIFFUSERS_PREFIX}{name}": t for name, t in tensors.items()}, path, {DIFFUSERS_CONFIG: about})
        return
    save_weights({f"{PEFT_PREFIX}{name}": t for name, t in tensors.items()}, path / FOLDER_WEIGHTS)
    with atomic_path(path / FOLDER_CONFIG, durable=True) as aside:
        aside.write_text(json.dumps(config, indent=2, sort_keys=True))


def load_lora(model: nn.Module, source: str | Path, folder: str | Path = DEFAULT_FOLDER) -> list[str]:
    """Put LoRA on a model as it was saved, here or by peft or diffusers; it can be trained on. All of it or, with an
    error, none.

    Args:
        source: file or folder, or a Hugging Face id that is on this machine (`read_weights`). Without a config, ranks
            are those of the tensors and the scale is 1.

    Returns:
        names of the linears.

    Raises:
        WeightsError: tensors that do not fit the model, by name and shape.
        ConfigError: no LoRA in it, or of linears that the model has not; the model has LoRA already.
        MissingDependency: not on this machine; peft.
    """
    place = find_weights(source, folder)
    state = {_plain(name): tensor for name, tensor in read_weights(place).items()}
    names = sorted({name.rpartition(".lora_")[0] for name in state})
    _check_names(model, names, str(source))
    _inject(model, _config(place, state, names), names)
    try:
        own = lora_state(model)
        check_weights(own, state, f"LoRA in {source} does not fit the model")
    except ConfigError:
        _unload(model)
        raise
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])
    return names


def merge_lora(model: nn.Module) -> None:
    """Add LoRA into the linears, which get their own class and names back; every parameter requires gradients again.

    Raises:
        ConfigError: no LoRA, or values in it that are not finite (then nothing was merged).
    """
    layers = _layers(model)
    if bad := [name for name, tensor in lora_state(model).items() if not tensor.isfinite().all()]:
        raise ConfigError(f"LoRA is not finite ({bad[0]} …), {len(bad)} of its tensors: nothing was merged")
    for layer in layers.values():
        layer.merge()
    _unload(model)


def _targets(model: nn.Module, patterns: tuple[str, ...] | None, usual: Sequence[str]) -> list[str]:
    linears = dict(_linears(model))
    asked = usual if patterns is None else patterns
    found = {pattern: [name for name in linears if fnmatchcase(name, pattern)] for pattern in asked}
    empty = [pattern for pattern, names in found.items() if not names]
    if patterns is not None and empty or not any(found.values()):
        kinds = list(
            dict.fromkeys(".".join("*" if part.isdigit() else part for part in name.split(".")) for name in linears)
        )
        raise ConfigError(
            f"LoRA: no linear of {type(model).__name__} matches {', '.join(empty)}; there are {_some(kinds)}"
        )
    return [name for name in linears if any(name in names for names in found.values())]


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Where LoRA could be put. Raises ConfigError if it is there."""
    if getattr(model, "peft_config", None):
        raise ConfigError("the model has LoRA already: merge_lora first")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name:
            yield name, module


def _check_names(model: nn.Module, names: list[str], source: str) -> None:
    """Of the other layout of the MMDiT, too: a low-rank addition to joined rows is none to each of its parts."""
    linears = dict(_linears(model))
    if unknown := [name for name in names if name not in linears]:
        raise ConfigError(
            f"LoRA in {source} is of {len(unknown):,} linears that the model has not ({_some(unknown)}): another "
            f"layout?"
        )


def _inject(model: nn.Module, config: Any, names: list[str]) -> None:
    config.target_modules = set(names)
    try:
        _peft().inject_adapter_in_model(config, model, ADAPTER)
    except (TypeError, ValueError) as e:  # perhaps after some linears
        _unload(model)
        raise ConfigError(f"LoRA: peft does not take this config ({e})") from e
    layers = _layers(model)
    if others := sorted(set(layers) - set(names)):
        _unload(model)
        raise ConfigError(f"LoRA: peft also matches {_some(others)}, whose names end like others'")
    for layer in layers.values():  # precise, as in peft's own models, whatever the linears are in
        layer.lora_A.float()
        layer.lora_B.float()


def _layers(model: nn.Module) -> dict[str, Any]:
    if not getattr(model, "peft_config", None):
        raise ConfigError("the model has no LoRA: add_lora or load_lora first")
    return _found(model)


def _found(model: nn.Module) -> dict[str, Any]:
    kind = _peft().tuners.lora.LoraLayer
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def _unload(model: nn.Module) -> None:
    """The linears themselves back in their places."""
    for name, layer in _found(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    model.requires_grad_(True)


def _plain(name: str) -> str:
    """A name as `lora_state` gives it, from those of peft and diffusers."""
    for prefix in (PEFT_PREFIX, DIFFUSERS_PREFIX):
        name = name.removeprefix(prefix)
    if not re.search(r"\.lora_[AB]\b", name):
        raise ConfigError(f"{name} is no name of peft's or diffusers' for LoRA (….lora_A.weight)")
    return name.replace(f".{ADAPTER}.", ".")


def _config(place: Path, state: Mapping[str, Tensor], names: list[str]) -> Any:
    """peft's config: the saved one, else from the shapes."""
    kind = _peft().LoraConfig
    values = _saved(place)
    if values is None:
        ranks = {name: state[f"{name}.lora_A.weight"].shape[0] for name in names if f"{name}.lora_A.weight" in state}
        most = Counter(ranks.values() or [1]).most_common(1)[0][0]
        other = {name: rank for name, rank in ranks.items() if rank != most}
        return kind(r=most, lora_alpha=most, rank_pattern=other, alpha_pattern=other)
    if values.get("peft_type", "LORA") != "LORA":
        raise ConfigError(f"{place} is {values['peft_type']}, not LoRA")
    default = kind().to_dict()
    if other := [
        key
        for key, value in values.items()
        if key not in (*USED, *PLACE) and value and value not in (default.get(key), START)
    ]:
        raise ConfigError(f"{place} is LoRA with {', '.join(other)}, which is not supported here")
    return kind(**{key: value for key, value in values.items() if key in USED})


def _saved(place: Path) -> dict[str, Any] | None:
    file = (place if place.is_dir() else place.parent) / FOLDER_CONFIG
    text = read_metadata(place).get(DIFFUSERS_CONFIG)
    if text is None and not file.is_file():
        return None
    try:
        values = json.loads(file.read_text() if text is None else text)
        return {key.removeprefix(DIFFUSERS_PREFIX): value for key, value in values.items()}
    except (OSError, ValueError, AttributeError) as e:
        raise ConfigError(f"{place}: its LoRA config cannot be read ({e})") from e


def _told(model: nn.Module) -> dict[str, Any]:
    """What of peft's config differs from its defaults (another version of peft may not know the rest), and the linears
    by full name (peft shortens the names to what tells this model's linears apart, which need not hold for
    another's)."""
    config = model.peft_config[ADAPTER]
    default, own = type(config)().to_dict(), config.to_dict()
    kept = {
        key: value for key, value in own.items() if value != default[key] or key in ("peft_type", "r", "lora_alpha")
    }
    return kept | {"target_modules": list(_layers(model))}


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:SHOWN])}{' …' if len(names) > SHOWN else ''}"


def _peft() -> Any:
    try:
        import peft
    except ImportError as e:
        raise MissingDependency(f"LoRA needs peft: {install_command('train')}") from e
    return peft
