"""The language model that settings name: whether it can be had, where it lies, and what an engine is told of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datakit.errors import ConfigError, MissingDependency
from datakit.weights.registry import DEFAULT_FOLDER, locate
from pipelines.llm.engine import BACKENDS, missing_backend
from pipelines.settings import LanguageModel


def is_local(section: LanguageModel) -> bool:
    """Whether the model runs in processes of ours, and not behind an endpoint."""
    return BACKENDS[section.backend].local


def check_language_model(section: LanguageModel, name: str, folder: str = DEFAULT_FOLDER, what: str = "model") -> None:
    """What can be seen to be missing before anything starts.

    Args:
        name: of the section, for errors.
        folder: of weights.
        what: that the model is called, in errors.

    Raises:
        ConfigError: which of library, model or endpoint, and how to bring it.
    """
    missing = missing_backend(section.backend)
    if missing:
        raise ConfigError(f"cannot start: {missing}")
    if section.model is None:
        raise ConfigError(f"which {what}? --set {name}.model=NAME (see `datakit models list`) or a folder")
    if is_local(section):
        weights_folder(section, folder)
    elif section.base_url is None:
        raise ConfigError(f"which endpoint? --set {name}.base_url=http://HOST:PORT/v1")


def model_name(section: LanguageModel) -> str:
    """What the catalog calls the model: its name, wherever it lies."""
    model = _named(section)
    return Path(model).name if Path(model).is_dir() else model


def weights_folder(section: LanguageModel, folder: str = DEFAULT_FOLDER) -> Path:
    """Where the weights of a local model lie.

    Raises:
        ConfigError: they are not here.
    """
    try:
        return locate(_named(section), folder)
    except MissingDependency as e:
        raise ConfigError(f"cannot start: {e}") from e


def engine_options(section: LanguageModel, folder: str = DEFAULT_FOLDER) -> dict[str, Any]:
    """What `pipelines.llm.engine.make_engine` is told: the section, with `model` where it lies and `name` what it is
    called."""
    options = {**section.model_dump(), "name": model_name(section)}
    return options | ({"model": str(weights_folder(section, folder))} if is_local(section) else {})


def _named(section: LanguageModel) -> str:
    assert section.model is not None, "checked before a run starts"
    return section.model
