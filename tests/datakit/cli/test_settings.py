"""`datakit settings`: every setting of every command, with type, default and meaning."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import pytest
from pydantic import Field
from typer.testing import CliRunner

from datakit.cli.app import app
from datakit.cli.settings import COMMANDS, _load
from datakit.config import OneOf, Section, Setting, describe


class Inner(Section):
    size: Annotated[int, Field(ge=1)] = 3
    """How large."""
    kind: Literal["a", "b"] | None = None
    """Which one,
    or none."""


class Outer(Section):
    name: str
    """Of it."""
    inner: Inner = Inner(size=5)
    other: Inner | None = None
    """Another."""
    shares: tuple[float, ...] = Field((0.5,), description="of the whole")
    name_of: Annotated[str, OneOf(lambda: ("a", "b"))] = "a"
    """One."""
    perhaps: Annotated[str, OneOf(lambda: ("a", "b"))] | None = None
    """Or none."""


def test_describe():
    assert describe(Outer) == [
        Setting("name", "text", "(required)", "Of it."),
        Setting("inner.size", "int ≥ 1", "5", "How large."),
        Setting("inner.kind", "a | b | null", "null", "Which one, or none."),
        Setting("other", "section | null", "null", "Another."),
        Setting("other.size", "int ≥ 1", "3", "How large."),
        Setting("other.kind", "a | b | null", "null", "Which one, or none."),
        Setting("shares", "tuple[float, …]", "[0.5]", "of the whole"),
        Setting("name_of", "a | b", "a", "One."),
        Setting("perhaps", "a | b | null", "null", "Or none."),
    ]


@pytest.mark.parametrize("group", COMMANDS)
def test_every_setting_says_what_it_means(group):
    listed = describe(_load(group))
    assert len(listed) > 15
    assert [each.name for each in listed if not each.meaning] == []


def run(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["settings", *words], env={"COLUMNS": "200"})
    return done.exit_code, done.output


def test_the_command():
    code, said = run()
    assert code == 0 and all(f"{group}  (" in said for group in COMMANDS)
    code, said = run("shots.max_s")
    assert code == 0 and said.splitlines()[2].split(maxsplit=5)[:5] == ["shots.max_s", "float", ">", "0", "8.0"]
    listed = json.loads(run("optimizer", "--json")[1])
    assert set(listed) == {"train dit", "train vae"}
    assert {each["name"] for each in listed["train dit"]} >= {"optimizer.lr", "optimizer.betas"}
    done = CliRunner().invoke(app, ["settings", "shot"])
    assert done.exit_code and "did you mean shots?" in str(done.exception)
