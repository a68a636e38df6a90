"""From a training run's folder to weights: for the sampler as they are, for others as one file
(`datakit train export`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from datakit.config import load
from datakit.errors import ConfigError
from trainer.engine.sharded_state import Shards
from trainer.export.checkpoint_reader import EMA, checkpoint_of, open_shards, read_whole, step_of
from trainer.models.common.dit_architecture import ARCHITECTURES, Architecture
from trainer.models.common.lora import add_lora, merge_lora, save_lora
from trainer.models.common.settings import DiTModelSettings, LoraSettings
from trainer.models.common.weights import SAFETENSORS, cast, read_weights, save_weights
from trainer.settings import DiTSettings
from trainer.training.setup import recorded

DIT, VAE = "model", "autoencoder"
"""What checkpoints call the trained model of either kind of run."""
RUN_KEY = "datakit.run"
"""Under this a file's metadata says where its weights are from, as JSON."""


@dataclass(frozen=True)
class RunWeights:
    """What a run of `datakit train dit` has learned.

    Attributes:
        state: the whole model under its own names, float32 on the CPU; LoRA is merged.
        settings: of the run; architecture: of the model.
        path: the checkpoint; step: after which it was written.
        ema: whether this is the average of the weights, not the weights.
    """

    state: dict[str, Tensor]
    settings: DiTSettings
    architecture: Architecture
    path: Path
    step: int
    ema: bool


def run_weights(run: str | Path, ema: bool = True, step: int | None = None) -> RunWeights:
    """The model of a run's checkpoint. No process group is needed, whatever plugin and number of processes trained it.

    Args:
        run: its folder.
        ema: the average of the weights, where the run has one.
        step: of the checkpoint; None: the newest.

    Raises:
        ConfigError: no run of `datakit train dit`, no whole checkpoint, none of this step, damage; the weights that
            LoRA was trained on are others now.
        MissingDependency: of a LoRA run, the weights that it started from are not here; peft.
    """
    return _read(Path(run), ema, step, torch.float32)


@dataclass(frozen=True)
class Exported:
    """What was written: the weights of which checkpoint, after which step, and whether their EMA."""

    checkpoint: Path
    step: int
    ema: bool


def export_run(
    run: str | Path,
    out: str | Path,
    ema: bool = True,
    step: int | None = None,
    dtype: torch.dtype | None = None,
    layout: str | None = None,
    lora: bool = False,
    rescale: bool = False,
) -> Exported:
    """Write the model of a run's checkpoint as one safetensors file, whole or not at all: a diffusion transformer for
    `Architecture.load` and the release's own code, an autoencoder for `build_autoencoder`.

    Args:
        out: `.safetensors`; of LoRA alone also a folder (see `save_lora`).
        ema, step: as of `run_weights`.
        dtype: None: bfloat16 of a diffusion transformer, as the releases; float32 of an autoencoder and of LoRA alone.
        layout: of a diffusion transformer's weights (`Architecture.layouts`; of an MMDiT: Open-Sora's, `separate`, or
            Flux's, `fused`); None: the one that it was trained in.
        lora: of a LoRA run, LoRA alone, not merged.
        rescale: of an autoencoder: see `export_autoencoder`.

    Raises:
        ConfigError, MissingDependency: as `run_weights`; what this kind of run does not give.
        DatakitError: the disk does not take it.
    """
    run, out = Path(run), Path(out)
    if out.suffix != SAFETENSORS and not lora:
        raise ConfigError(f"{out}: weights are written to a file that ends in {SAFETENSORS}")
    checkpoint = checkpoint_of(run, step)
    kind = VAE if (checkpoint / VAE).is_dir() else DIT
    if kind == VAE and (lora or layout is not None):
        raise ConfigError(f"{run} has trained an autoencoder: --lora and --layout are for diffusion transformers")
    if kind == DIT and rescale:
        raise ConfigError(f"{run} has trained a diffusion transformer: --rescale is for autoencoders")
    if lora and layout is not None:
        raise ConfigError(
            "--lora: LoRA fits the layout that it was trained on: leave --layout out, or merge it by leaving --lora out"
        )
    exported = Exported(checkpoint, step_of(checkpoint), ema and Shards(checkpoint / kind).has(EMA))
    if kind == VAE:
        from trainer.export.vae import export_autoencoder

        export_autoencoder(
            run, out, exported.ema, rescale, dtype or torch.float32, _origin(run, exported), exported.step
        )
    elif lora:
        _export_lora(run, out, exported, dtype)
    else:
        _export_dit(run, out, exported, dtype or torch.bfloat16, layout)
    return exported


def _export_dit(run: Path, out: Path, exported: Exported, dtype: torch.dtype, layout: str | None) -> None:
    weights = _read(run, exported.ema, exported.step, dtype)
    layouts = weights.architecture.layouts
    if layout is not None and layout not in layouts:
        raise ConfigError(f"--layout {layout}: {weights.architecture.kind} has {', '.join(layouts)}")
    state, about = weights.architecture.exported(weights.state, layout)
    save_weights(state, out, {**about, **_origin(run, exported)})


def _export_lora(run: Path, out: Path, exported: Exported, dtype: torch.dtype | None) -> None:
    settings, shards = _opened(run, exported.checkpoint)
    if settings.model.lora is None:
        raise ConfigError(f"{run} has trained the whole model (model.lora is null): export it without --lora")
    model, _ = _with_lora(settings, settings.model.lora, shards, exported.ema)
    save_lora(model, out, {name: cast(model.get_parameter(name), dtype) for name in shards.parameters})


def _read(run: Path, ema: bool, step: int | None, dtype: torch.dtype) -> RunWeights:
    checkpoint = checkpoint_of(run, step)
    settings, shards = _opened(run, checkpoint)
    ema = ema and shards.has(EMA)
    if settings.model.lora is None:
        state = {name: read_whole(shards, name, ema).to(dtype) for name in shards.parameters}
        architecture = _architecture(state, settings.model)
    else:
        model, architecture = _with_lora(settings, settings.model.lora, shards, ema)
        merge_lora(model)
        state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    state, _ = architecture.exported(state)
    return RunWeights(state, settings, architecture, checkpoint, step_of(checkpoint), ema)


def _opened(run: Path, checkpoint: Path) -> tuple[DiTSettings, Shards]:
    if not (checkpoint / DIT).is_dir():
        raise ConfigError(f"{run} is not a run of `datakit train dit`: {checkpoint} has no diffusion transformer")
    return load(DiTSettings, run / "settings.yaml"), open_shards(checkpoint / DIT)


def _architecture(state: Mapping[str, Tensor], settings: DiTModelSettings) -> Architecture:
    """Of a model that a run trains: sizes of latents and texts follow from shapes, the rest is as the run was told; the
    text encoder, which may be large, is not loaded for its sizes."""
    family = ARCHITECTURES.get(settings.architecture)
    return family.of_settings(settings, family.inputs_of(state, settings))


@torch.no_grad()
def _with_lora(settings: DiTSettings, lora: LoraSettings, shards: Shards, ema: bool) -> tuple[nn.Module, Architecture]:
    """What LoRA was trained on, float32, as `build_model` makes it, and LoRA on it."""
    base = settings.model.weights
    if base is None:
        raise AssertionError("LoRA has a base: see DiTModelSettings")
    architecture = _architecture(read_weights(base), settings.model)
    model = architecture.load(base, torch.float32)
    add_lora(model, lora, settings.seed, architecture.lora_targets)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    shards.check_model({name: tuple(parameter.shape) for name, parameter in trained.items()})
    for name, parameter in trained.items():
        parameter.copy_(read_whole(shards, name, ema))
    return model, architecture


def _origin(run: Path, exported: Exported) -> dict[str, str]:
    return {RUN_KEY: json.dumps({"run_id": recorded(run)["run_id"], "step": exported.step, "ema": exported.ema})}
