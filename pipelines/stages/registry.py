"""All stages: the classes in the modules of this folder, and what can be asked about them.

The modules are light (see `pipelines.stages.base`), so that the driver plans, checks and fingerprints without loading
what the stages measure with.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import pkgutil
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from datakit.dependencies import install_command
from datakit.hashing import hash_hex
from pipelines.stages.base import EmbeddingStage, GridStage, Stage

NO_STAGES = ("base", "registry", "image_encoders")
"""Modules of this folder without a stage."""


def _find() -> dict[str, type[Stage]]:
    """Name -> class, in order."""
    folder = str(Path(__file__).parent)
    names = [m.name for m in pkgutil.iter_modules([folder]) if m.name not in NO_STAGES]
    modules = [importlib.import_module(f"pipelines.stages.{name}") for name in names]
    classes = [
        each
        for module in modules
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, Stage) and each.__module__ == module.__name__
    ]
    return checked([each for each in classes if hasattr(each, "name")])


def checked(classes: list[type[Stage]]) -> dict[str, type[Stage]]:
    """Name -> class of stages that go together, in order.

    Raises:
        TypeError: two have one name or fill one column; a stage lacks its version, or comes before one it builds on.
    """
    stages: dict[str, type[Stage]] = {}
    columns: dict[str, str] = {}
    for stage in sorted(classes, key=lambda s: (s.order, s.name)):
        if stage.name in stages:
            raise TypeError(f"two stages are called {stage.name}: {stages[stage.name].target()} and {stage.target()}")
        if not hasattr(stage, "version"):
            raise TypeError(f"stage {stage.name} has no version: set `version` in {stage.target()}")
        late = [name for name in stage.upstream if name not in stages]
        if late:
            raise TypeError(f"stage {stage.name} builds on {late[0]}, which does not come before it: see `order`")
        for name in stage.column_names():
            if name in columns:
                raise TypeError(f"stages {columns[name]} and {stage.name} both fill the column {name}")
            columns[name] = stage.name
        stages[stage.name] = stage
    return stages


STAGES: dict[str, type[Stage]] = _find()
OPTIONAL = tuple(name for name, stage in STAGES.items() if stage.Settings and "enabled" in stage.Settings.model_fields)
"""Stages that settings can switch off. Shots make the clips, jitter falls out of them."""


def enabled_stages(settings) -> list[str]:
    """Names of the stages that run under these settings, in order."""
    return [name for name in STAGES if name not in OPTIONAL or getattr(settings, name).enabled]


def on_embeddings(names: Iterable[str]) -> dict[str, type[EmbeddingStage]]:
    """Name -> class of those of the stages that look at embeddings alone."""
    asked = set(names)
    return {name: stage for name, stage in STAGES.items() if name in asked and issubclass(stage, EmbeddingStage)}


def on_grid(names: Iterable[str]) -> dict[str, type[GridStage]]:
    """Name -> class of those of the stages that look at grid frames."""
    asked = set(names)
    return {name: stage for name, stage in STAGES.items() if name in asked and issubclass(stage, GridStage)}


def missing_requirements(stage: str, settings) -> list[str]:
    """Why a stage cannot run here: one line per extra that is missing, with the command that brings it."""
    missing: dict[str, list[str]] = {}
    for module, extra in STAGES[stage].required(getattr(settings, stage, None)):
        if importlib.util.find_spec(module) is None:
            missing.setdefault(extra, []).append(module)
    return [
        f"stage {stage} needs {' and '.join(modules)}: {install_command(extra)}" for extra, modules in missing.items()
    ]


def options_of(stage: str, settings) -> dict[str, Any]:
    """The settings that change a stage's numbers."""
    declared = STAGES[stage]
    section = getattr(settings, stage, None)
    options = {} if section is None else {name: getattr(section, name) for name in declared.numbers()}
    options |= {name: content_of(getattr(section, name)) for name in declared.weights}
    if declared.needs == "images":
        options["positions"] = list(settings.images.positions)
    return options


def content_of(weights: str | None) -> str | None:
    """Hash of a weights file or folder; None for one that was not looked for yet."""
    from datakit.weights.registry import weights_hash

    if weights is None or not Path(weights).exists():
        return None
    return _hash_once(weights, Path(weights).stat().st_mtime_ns, weights_hash)


@lru_cache
def _hash_once(path: str, changed: int, weights_hash) -> str:
    return weights_hash(Path(path))


def fingerprint(stage: str, settings) -> str:
    """Hash of what determines a stage's numbers: version, settings, and the stages it builds on."""
    declared = STAGES[stage]
    parts = [declared.name, declared.version, options_of(stage, settings)]
    parts += [fingerprint(name, settings) for name in declared.upstream]
    return hash_hex(json.dumps(parts, sort_keys=True), 8)
