"""The catalog as DIR and as --catalog DIR; commands that are looked for in the wrong place; help and version."""

from __future__ import annotations

import importlib.metadata
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from datakit.cli.app import app
from datakit.cli.options import CatalogApp, CatalogArgument, CatalogOption, OptionalCatalog

made = CatalogApp()


@made.command("argument")
def argument(catalog: CatalogArgument, old: str, new: Annotated[str, typer.Argument()] = "new") -> None:
    print(catalog, old, new)


@made.command("option")
def option(catalog: CatalogOption, number: int = 1) -> None:
    print(catalog, number)


@made.command("optional")
def optional(catalog: OptionalCatalog = None) -> None:
    print(catalog)


@made.command("sources")
def sources(names: list[str], catalog: CatalogOption) -> None:
    print(names, catalog)


def run(of: typer.Typer, *words: str) -> tuple[int, str]:
    done = CliRunner().invoke(of, list(words))
    return done.exit_code, done.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["argument", "DIR", "a", "b"], "DIR a b\n"),
        (["argument", "a", "b", "--catalog", "DIR"], "DIR a b\n"),
        (["argument", "-c", "DIR", "a"], "DIR a new\n"),
        (["argument", "a", "--catalog=DIR", "b"], "DIR a b\n"),
        (["argument", "DIR", "--", "--catalog"], "DIR --catalog new\n"),
        (["option", "--catalog", "DIR"], "DIR 1\n"),
        (["option", "DIR", "--number", "3"], "DIR 3\n"),
        (["option", "--number", "3", "-c", "DIR"], "DIR 3\n"),
        (["optional"], "None\n"),
        (["optional", "DIR"], "DIR\n"),
        (["sources", "a", "b", "-c", "DIR"], "['a', 'b'] DIR\n"),
    ],
)
def test_a_catalog_is_given_either_way(words, said):
    assert run(made, *words) == (0, said)


def test_a_catalog_given_twice_or_not_at_all_is_refused():
    code, said = run(made, "option", "DIR", "--catalog", "OTHER")
    assert code == 2 and "given twice" in said
    code, said = run(made, "option")
    assert code == 2 and "Give DIR, or --catalog DIR" in said
    assert run(made, "sources", "a")[0] == 2


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("ingest", "did you mean `datakit run ingest`?"),
        ("serve", "did you mean `datakit sample serve`?"),
        ("catlog", "did you mean `datakit catalog`?"),
        ("xyzzy", "`datakit --help` lists them"),
    ],
)
def test_a_command_that_is_not_there_is_answered_by_where_it_is(word, hint):
    code, said = run(app, word, "x")
    assert code == 2 and hint in " ".join(said.split())


def test_short_help_version_and_completion():
    for words in (["-h"], ["run", "ingest", "-h"], ["catalog", "show", "-h"], ["sample", "-h"]):
        code, said = run(app, *words)
        assert code == 0 and "Usage:" in said
    assert "datakit sample serve" in run(app, "sample", "-h")[1]
    assert run(app, "--version") == (0, f"datakit {importlib.metadata.version('datakit')}\n")
    assert "--install-completion" in run(app, "--help")[1]
