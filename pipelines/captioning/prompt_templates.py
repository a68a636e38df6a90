"""Prompts as files: Markdown with a front matter in YAML, shipped in `pipelines/captioning/prompts` or the user's own.

    ---
    name: dense              # style of the captions that it asks for; default: the file's name
    description: for people
    system: the system message
    schema: {type: object}   # JSON schema; then the answer has to be a JSON object that it accepts
    min_words: 50            # answers outside are flagged `length`
    max_words: 300
    ---
    The user's message. {duration} is replaced by the clip's length; {{duration}} stays, in single braces.

A line with a placeholder whose fact is unknown (a picture has no duration) is left out.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from datakit.errors import ConfigError
from datakit.hashing import hash_hex

FACTS = {
    "duration": "length of the clip, seconds",
    "caption": "the caption to rewrite (refine only)",
    "camera_motion": "as measured: static, pan left, … (column camera_motion)",
}
"""What a prompt may have placeholders for."""

_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}|\{(\w+)\}")
_STYLE = re.compile(r"[A-Za-z0-9_-]+")
_FRONT = re.compile(r"---\n(?P<head>.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)


class FrontMatter(BaseModel):
    """The head of a prompt file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str | None = None
    description: str = ""
    system: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    min_words: int | None = Field(None, ge=1)
    max_words: int | None = Field(None, ge=1)


@dataclass(frozen=True)
class Prompt:
    """A checked prompt.

    Attributes:
        name: style of the captions that it asks for.
        text: the user's message, with placeholders.
        schema: JSON schema of the answer, None for prose.
        min_words, max_words: an answer outside is flagged, not refused.
    """

    name: str
    text: str
    description: str = ""
    system: str | None = None
    schema: dict[str, Any] | None = field(default=None, hash=False)
    min_words: int | None = None
    max_words: int | None = None

    @property
    def hash(self) -> str:
        """16 hex digits of all that is sent or asked for: system message, text, schema."""
        sent = json.dumps([self.system, self.text, self.schema], default=str)  # YAML knows dates
        return hash_hex(sent, 8)

    @property
    def placeholders(self) -> frozenset[str]:
        """Facts that the text has places for."""
        return frozenset(name for _, name in _PLACEHOLDER.findall(self.text) if name)

    def render(self, **facts: object) -> str:
        """The text with facts in their places.

        Args:
            facts: any of FACTS (others are errors); numbers are written with one decimal, None is unknown.

        Raises:
            ConfigError: the prompt rewrites a caption and there is none.
        """
        if strange := sorted(set(facts) - set(FACTS)):
            raise TypeError(f"no fact {strange[0]!r}: there are {', '.join(FACTS)}")
        if "caption" in self.placeholders and facts.get("caption") is None:
            raise ConfigError(f"prompt {self.name} rewrites captions ({{caption}}): it is for refine, not for caption")
        known = {name: _written(value) for name, value in facts.items() if value is not None}
        lines = (line for line in self.text.split("\n") if _names(line) <= known.keys())
        # line by line, each in one pass: braces inside a caption are text
        return "\n".join(_PLACEHOLDER.sub(lambda m: known[m[2]] if m[2] else f"{{{m[1]}}}", line) for line in lines)


def shipped_prompts() -> list[str]:
    """Names of the prompts that come with datakit."""
    return sorted(
        p.name.removesuffix(".md")
        for p in resources.files("pipelines.captioning.prompts").iterdir()
        if p.name.endswith(".md")
    )


def load_prompt(name_or_file: str) -> Prompt:
    """A shipped prompt by name, or a Markdown file.

    Raises:
        ConfigError: not found, malformed, or with a placeholder for something unknown.
    """
    head, text = _split(_read(name_or_file), name_or_file)
    try:
        front = FrontMatter.model_validate(head)
    except ValidationError as e:
        raise ConfigError(f"prompt {name_or_file}: {_explain(e)}") from e
    prompt = Prompt(
        front.name or Path(name_or_file).stem,
        text,
        front.description,
        front.system,
        front.schema_,
        front.min_words,
        front.max_words,
    )
    _check(prompt, name_or_file)
    return prompt


def _read(name_or_file: str) -> str:
    shipped = resources.files("pipelines.captioning.prompts") / f"{name_or_file}.md"
    try:
        if shipped.is_file():
            return shipped.read_text(encoding="utf-8")
        if Path(name_or_file).is_file():
            return Path(name_or_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"cannot read prompt {name_or_file}: {e}") from e
    close = difflib.get_close_matches(name_or_file, shipped_prompts(), n=1)
    hint = f"did you mean {close[0]}?" if close else f"give a .md file or one of {', '.join(shipped_prompts())}"
    raise ConfigError(f"no prompt {name_or_file!r}: {hint}")


def _split(content: str, name_or_file: str) -> tuple[dict, str]:
    """Front matter (may be missing) and text."""
    content = content.lstrip("\ufeff").replace("\r\n", "\n")
    if not content.startswith("---\n"):
        return {}, content.strip()
    parts = _FRONT.match(content)
    if not parts:
        raise ConfigError(f"prompt {name_or_file}: its front matter has no end (a line of ---)")
    try:
        values = yaml.safe_load(parts["head"])
    except yaml.YAMLError as e:
        raise ConfigError(f"prompt {name_or_file}: its front matter is not valid YAML: {e}") from e
    if not isinstance(values, dict | None):
        raise ConfigError(f"prompt {name_or_file}: its front matter must map keys to values")
    return values or {}, content[parts.end() :].strip()


def _check(prompt: Prompt, name_or_file: str) -> None:
    if not _STYLE.fullmatch(prompt.name):
        raise ConfigError(f"prompt {name_or_file}: its name {prompt.name!r} may have letters, digits, - and _ only")
    if not prompt.text:
        raise ConfigError(f"prompt {name_or_file} has no text")
    for name in sorted(prompt.placeholders - set(FACTS)):
        close = difflib.get_close_matches(name, FACTS, n=1)
        hint = f"did you mean {{{close[0]}}}?" if close else f"there are {', '.join(f'{{{fact}}}' for fact in FACTS)}"
        raise ConfigError(f"prompt {name_or_file}: no placeholder {{{name}}}: {hint} (braces as text: {{{{{name}}}}})")
    if (prompt.min_words or 0) > (prompt.max_words or float("inf")):
        raise ConfigError(f"prompt {name_or_file}: min_words is larger than max_words")
    if prompt.schema is not None:
        _check_schema(prompt.schema, name_or_file)


def _check_schema(schema: dict[str, Any], name_or_file: str) -> None:
    from jsonschema import Draft202012Validator, SchemaError

    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as e:
        raise ConfigError(f"prompt {name_or_file}: its schema is no JSON schema: {e.json_path}: {e.message}") from e
    if schema.get("type") != "object":
        raise ConfigError(f"prompt {name_or_file}: its schema must have `type: object`")


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] != "extra_forbidden":
        return f"{key}: {first['msg']} (got {first.get('input')!r})"
    known = [info.alias or name for name, info in FrontMatter.model_fields.items()]
    close = difflib.get_close_matches(key, known, n=1)
    return f"unknown key {key} in its front matter: " + (
        f"did you mean {close[0]}?" if close else f"there are: {', '.join(known)}"
    )


def _names(line: str) -> set[str]:
    return {name for _, name in _PLACEHOLDER.findall(line) if name}


def _written(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)
