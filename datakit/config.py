"""Settings: defaults < YAML file < `--set a.b=value`. Unknown keys are errors, with a suggestion."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, ErrorDetails, PydanticKnownError, PydanticUndefined
from pydantic_core.core_schema import no_info_after_validator_function

from datakit.errors import ConfigError, either


class Section(BaseModel):
    """Base of every settings section. The text below a field is what `datakit settings` says of it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @classmethod
    def chosen(cls, values: Mapping[str, Any]) -> type[Section]:
        """The section that such values are of: this one, or one of several that may stand in its place."""
        return cls


@dataclass(frozen=True)
class OneOf:
    """What an annotation says of a text setting: it is one of some names (`Annotated[str, OneOf(names)]`). Like a
    `Literal`, but the names are asked for when a value is checked, so that a registry can give them.

    Attributes:
        names: gives them.
    """

    names: Callable[[], Sequence[str]]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self._checked, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "enum": list(self.names())}

    def _checked(self, value: str) -> str:
        known = self.names()
        if value not in known:
            raise PydanticKnownError("literal_error", {"expected": either([repr(name) for name in known])})
        return value


M = TypeVar("M", bound=BaseModel)


def load(model: type[M], file: str | Path | Sequence[str | Path] | None = None, sets: Sequence[str] = ()) -> M:
    """Settings of type `model`.

    Args:
        file: YAML mapping of sections to options; of several, later ones win, option by option.
        sets: `section.option=value` strings; values are YAML (`true`, `2.5`, `[0.1, 0.9]`, text).

    Raises:
        ConfigError: unknown key, wrong type, unreadable file.
    """
    values: dict[str, Any] = {}
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
        raise ConfigError("; ".join(_explain(model, values, error) for error in e.errors())) from e


def preset_file(folder: Path, name: str) -> Path:
    """Settings that are shipped under a name, or a YAML file.

    Args:
        folder: of the shipped ones, `NAME.yaml`.

    Raises:
        ConfigError: there is no such preset.
    """
    path = folder / f"{name}.yaml"
    if path.exists():
        return path
    if Path(name).suffix in (".yaml", ".yml"):
        return Path(name)
    shipped = ", ".join(sorted(preset.stem for preset in folder.glob("*.yaml")))
    raise ConfigError(f"there is no preset {name}: there are {shipped}, or give a YAML file")


@dataclass(frozen=True)
class Setting:
    """One setting, as a user gives it.

    Attributes:
        name: `section.option`.
        type: as it is declared, for people: `int ≥ 1`, `adaptive | content`.
        default: as YAML writes it.
        meaning: of the option, from its declaration.
    """

    name: str
    type: str
    default: str
    meaning: str


def describe(model: type[BaseModel], section: str = "", defaults: BaseModel | None = None) -> list[Setting]:
    """Every setting of a model, sections one in the other, in the order of their declaration.

    Args:
        section: what precedes the names, as `plan`.
        defaults: an instance whose values are the defaults, in place of those of the declaration.
    """
    described: list[Setting] = []
    for name, field in model.model_fields.items():
        path = f"{section}.{name}" if section else name
        default = field.get_default(call_default_factory=True) if defaults is None else getattr(defaults, name)
        inner = _model_of(field.annotation)
        if inner is None or _is_list(field.annotation):
            meaning = " ".join((field.description or "").split())
            described.append(Setting(path, _type_name(field), _default_text(default), meaning))
            continue
        if default is None:
            meaning = " ".join((field.description or inner.__doc__ or "").split())
            described.append(Setting(path, "section | null", "null", meaning))
        if isinstance(default, BaseModel):
            described += describe(type(default), path, default)
        else:
            described += describe(inner, path)
    return described


def _default_text(default: Any) -> str:
    if default is PydanticUndefined:
        return "(required)"
    if isinstance(default, BaseModel):
        default = default.model_dump(mode="json")
    if isinstance(default, tuple):
        default = list(default)
    return yaml.safe_dump(default, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")


def _type_name(field: FieldInfo) -> str:
    names = [each.names() for each in field.metadata if isinstance(each, OneOf)]
    if names:
        return " | ".join(names[0])
    bounds = {"Ge": "≥", "Gt": ">", "Le": "≤", "Lt": "<"}
    limits: list[str] = []
    for limit in field.metadata:
        for kind, sign in bounds.items():
            if type(limit).__name__ == kind:
                limits.append(f"{sign} {getattr(limit, kind.lower()):g}")
    return " ".join([_annotation_name(field.annotation), *limits])


def _annotation_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is type(None):
        return "null"
    if annotation is Ellipsis:
        return "…"
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin is Annotated:
        names = [each.names() for each in arguments[1:] if isinstance(each, OneOf)]
        return " | ".join(names[0]) if names else _annotation_name(arguments[0])
    if origin in (Union, UnionType):
        return " | ".join(_annotation_name(each) for each in arguments)
    if origin is not None:
        return f"{origin.__name__}[{', '.join(_annotation_name(each) for each in arguments)}]"
    return {str: "text", Any: "any"}.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) in (list, tuple, dict) or any(_is_list(each) for each in get_args(annotation))


def _read_yaml(file: str | Path) -> dict[str, Any]:
    try:
        values: Any = yaml.safe_load(Path(file).read_text()) or {}
    except OSError as e:
        raise ConfigError(f"cannot read config file {file}: {e.strerror}") from e
    except yaml.YAMLError as e:
        raise ConfigError(f"{file} is not valid YAML: {e}") from e
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must map sections to options")
    return values


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Sections one in the other; what is no section replaces."""
    return below | {
        k: _merge(below[k], v) if isinstance(v, dict) and isinstance(below.get(k), dict) else v
        for k, v in above.items()
    }


def _assign(values: dict[str, Any], path: list[str], value: Any, assignment: str) -> None:
    for key in path[:-1]:
        inner: Any = values.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {assignment}: {key} is not a section")
        values = inner
    values[path[-1]] = value


def _explain(model: type[BaseModel], values: Mapping[str, Any], error: ErrorDetails) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] != "extra_forbidden":
        given = error.get("input")
        got = (
            "" if isinstance(given, dict) else f" (got {given!r})"
        )  # of a whole section the message says which part it is about
        return ": ".join(filter(None, (where, error["msg"].removeprefix("Value error, ")))) + got
    section = _section(model, values, error["loc"][:-1])
    if section is None:
        return f"unknown setting {where}"
    known = list(section.model_fields)
    close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(known)}"
    return f"unknown setting {where}: {hint}"


def _section(model: type[BaseModel], values: Any, path: Sequence[str | int]) -> type[BaseModel] | None:
    """The settings at a path, through lists and unions; None where it leads to no section."""
    section = model
    for part in path:
        values = values.get(part) if isinstance(values, Mapping) else None
        if isinstance(part, int):
            continue  # an item of the list that the annotation was of
        if part not in section.model_fields:
            return None
        found = _model_of(section.model_fields[part].annotation)
        if found is None:
            return None
        section = found.chosen(values) if issubclass(found, Section) and isinstance(values, Mapping) else found
    return section


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The settings in an annotation such as `Section | None` or `list[Section]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for each in get_args(annotation) if (found := _model_of(each))), None)
