"""Settings: defaults < YAML file < `--set a.b=value`. Unknown keys are errors, with a suggestion."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from datakit.errors import ConfigError


class Section(BaseModel):
    """Base of every settings section."""

    model_config = ConfigDict(extra="forbid", frozen=True)


M = TypeVar("M", bound=BaseModel)


def load(model: type[M], file: str | Path | Sequence[str | Path] | None = None, sets: Sequence[str] = ()) -> M:
    """Settings of type `model`.

    Args:
        file: YAML mapping of sections to options; of several, later ones win, option by option.
        sets: `section.option=value` strings; values are YAML (`true`, `2.5`, `[0.1, 0.9]`, text).

    Raises:
        ConfigError: unknown key, wrong type, unreadable file.
    """
    values: dict = {}
    for each in [file] if isinstance(file, (str, Path)) else file or []:
        values = _merge(values, _read_yaml(each))
    for assignment in sets:
        path, separator, text = assignment.partition("=")
        if not separator or not path:
            raise ConfigError(f"--set takes section.option=value, got {assignment!r}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as e:
            raise ConfigError(f"--set {assignment}: the value is not valid YAML") from e
        _assign(values, path.strip().split("."), value, assignment)
    try:
        return model.model_validate(values)
    except ValidationError as e:
        raise ConfigError("; ".join(_explain(model, error) for error in e.errors())) from e


def _read_yaml(file: str | Path) -> dict:
    try:
        values = yaml.safe_load(Path(file).read_text()) or {}
    except OSError as e:
        raise ConfigError(f"cannot read config file {file}: {e.strerror}") from e
    except yaml.YAMLError as e:
        raise ConfigError(f"{file} is not valid YAML: {e}") from e
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must map sections to options")
    return values


def _merge(below: dict, above: dict) -> dict:
    """Sections one in the other; what is no section replaces."""
    return below | {
        k: _merge(below[k], v) if isinstance(v, dict) and isinstance(below.get(k), dict) else v
        for k, v in above.items()
    }


def _assign(values: dict, path: list[str], value: Any, assignment: str) -> None:
    for key in path[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {assignment}: {key} is not a section")
    values[path[-1]] = value


def _explain(model: type[BaseModel], error: dict) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] != "extra_forbidden":
        given = error.get("input")
        got = (
            "" if isinstance(given, dict) else f" (got {given!r})"
        )  # of a whole section the message says which part it is about
        return ": ".join(filter(None, (where, error["msg"].removeprefix("Value error, ")))) + got
    section = _section(model, error["loc"][:-1])
    if section is None:
        return f"unknown setting {where}"
    known = list(section.model_fields)
    close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(known)}"
    return f"unknown setting {where}: {hint}"


def _section(model: type[BaseModel], path: Sequence[str | int]) -> type[BaseModel] | None:
    """The settings at a path, through lists and unions; None where it leads to no section."""
    found: Any = model
    for part in path:
        if isinstance(part, int):
            continue  # an item of the list that the annotation was of
        found = _model_of(found.model_fields[part].annotation) if part in getattr(found, "model_fields", {}) else None
        if found is None:
            return None
    return found


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The settings in an annotation such as `Section | None` or `list[Section]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for each in get_args(annotation) if (found := _model_of(each))), None)
