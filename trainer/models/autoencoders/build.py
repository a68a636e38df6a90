"""Autoencoders from settings and files, whole or without their numbers; what identifies one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from datakit.errors import ConfigError
from trainer.models.autoencoders.base import Autoencoder
from trainer.models.autoencoders.registry import AUTOENCODERS
from trainer.models.autoencoders.settings import AutoencoderSettings
from trainer.models.common.weights import find_weights, load_weights, read_metadata

CONFIG_KEY = "datakit.autoencoder"
"""Under this a file's metadata holds kind and config as JSON, see `described`."""
EMBEDDED = "embedded"
"""In the place of weights: those that come with datakit."""


def build_autoencoder(kind: str, weights: str | Path | None = None, **sizes: Any) -> Autoencoder:
    """An autoencoder.

    Args:
        kind: see `AUTOENCODERS`.
        weights: see `trainer.models.common.weights.read_weights`; `embedded`: those that come with datakit; None:
            random.
        sizes: fields of the kind's config, for other than the released sizes; those that the weights' file records need
            not be given.

    Raises:
        ConfigError: a kind or size that does not exist, weights that do not fit.
        MissingDependency: hunyuan without diffusers.
    """
    weights = _with_embedded(kind, weights)
    model = _build(kind, weights, sizes)
    if weights is not None:
        load_weights(model, weights)
    return model


def describe_autoencoder(kind: str, weights: str | Path | None = None, **sizes: Any) -> Autoencoder:
    """The same without numbers in it (on the device meta): what it compresses by, and whether its weights are there.

    Raises:
        ConfigError, MissingDependency: as `build_autoencoder`, but for weights that do not fit.
    """
    weights = _with_embedded(kind, weights)
    if weights is not None:
        find_weights(weights)
    with torch.device("meta"):
        return _build(kind, weights, sizes)


def load_autoencoder(settings: AutoencoderSettings) -> Autoencoder:
    """With its weights.

    Raises:
        ConfigError: none are set, and none of its kind come with datakit.
    """
    return build_autoencoder(settings.kind, weights_of(settings), **settings.sizes)


def weights_of(settings: AutoencoderSettings) -> str:
    """Those that are set, else those that come with datakit.

    Raises:
        ConfigError: neither.
    """
    if settings.weights is None and AUTOENCODERS.get(settings.kind).embedded is None:
        raise ConfigError(
            f"autoencoder {settings.kind} needs weights: set autoencoder.weights to a file, a folder, or a name of "
            f"`datakit models list`"
        )
    return settings.weights or EMBEDDED


def described(model: Autoencoder) -> str:
    """Kind and config, for the metadata of a file of its weights."""
    return json.dumps({"kind": model.kind, "config": dataclasses.asdict(model.config)}, sort_keys=True)


def check_precision(precision: str, device_type: str) -> None:
    """Raises:
    ConfigError: bf16 on a CPU. torch 2.13's 3D convolutions (oneDNN, from 3 or 16 channels) read beyond single frames
        there: what comes out is NaN, or 1e36.
    """
    if precision == "bf16" and device_type == "cpu":
        raise ConfigError(
            "an autoencoder works in fp32 on a CPU: torch's 3D convolutions of images give garbage in bf16 there "
            "(engine.precision=fp32, encode.precision=fp32, --precision fp32)"
        )


def autoencoder_hash(model: Autoencoder) -> str:
    """32 hex digits of the kind, the config and every weight as it is now (in bf16 another than in float32)."""
    digest = hashlib.blake2b(digest_size=16, person=b"datakit-autoenc")
    digest.update(json.dumps([model.kind, dataclasses.asdict(model.config)], sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _with_embedded(kind: str, weights: str | Path | None) -> str | Path | None:
    if weights != EMBEDDED:
        return weights
    embedded = AUTOENCODERS.get(kind).embedded
    if embedded is None:
        having = [name for name in AUTOENCODERS.names() if AUTOENCODERS.get(name).embedded is not None]
        raise ConfigError(
            f"no weights of the autoencoder {kind} come with datakit (of {', '.join(having)} do): give a file, "
            f"folder or name"
        )
    return embedded


def _build(kind: str, weights: str | Path | None, sizes: dict[str, Any]) -> Autoencoder:
    model_class = AUTOENCODERS.get(kind)
    known = [field.name for field in dataclasses.fields(model_class.config_class)]
    if unknown := sorted(set(sizes) - set(known)):
        raise ConfigError(f"the autoencoder {kind} has no size {unknown[0]!r}: it has {', '.join(known)}")
    sizes = {**(_recorded(weights, kind) if weights is not None else {}), **sizes}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in sizes.items()}
    return model_class(model_class.config_class(**values))  # pyright: ignore[reportCallIssue]: a kind takes its config


def _recorded(weights: str | Path, kind: str) -> dict[str, Any]:
    """The config that a file of weights has in its metadata, if any."""
    recorded = json.loads(read_metadata(weights).get(CONFIG_KEY, "{}"))
    if recorded and recorded["kind"] != kind:
        raise ConfigError(f"{weights} has weights of the autoencoder {recorded['kind']}, not of {kind}")
    return recorded.get("config", {})
