"""The command `datakit settings`: what can be set, for every command that takes `--set`."""

from __future__ import annotations

import difflib
import importlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from datakit.cli.options import JsonOption
from datakit.errors import ConfigError, MissingDependency

if TYPE_CHECKING:
    from datakit.config import Setting

COMMANDS = {
    "run": ("pipelines.settings:Settings", "datakit run ingest, score, caption, refine, dedup; eval samples"),
    "encode": ("trainer.latents.encode:EncodeSettings", "datakit run encode"),
    "train dit": ("trainer.settings:DiTSettings", "datakit train dit; its section plan also: datakit plan"),
    "train vae": ("trainer.vae.settings:VAESettings", "datakit train vae"),
    "sample": ("sampler.settings:SampleSettings", "datakit sample, datakit sample serve"),
}
"""Which class holds the settings of which commands."""
WIDTH_OF_FILES = 160
"""Columns where the output goes to a file or another program."""


def settings(
    section: Annotated[
        str | None,
        typer.Argument(help="Only this section (shots, engine, video …), setting (shots.max_s), or group (train dit)."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Every setting: name, type, default, meaning. They go into --set SECTION.option=value and into YAML files."""
    from datakit.config import describe

    groups, missing = {}, []
    for group in COMMANDS:
        try:
            groups[group] = describe(_load(group))
        except MissingDependency as e:
            missing.append(f"{group}: {e}")
    chosen = groups if section is None else _matching(groups, section)
    if as_json:
        print(json.dumps({group: [asdict(each) for each in listed] for group, listed in chosen.items()}, indent=1))
        return
    for group, listed in chosen.items():
        print(f"{group}  ({COMMANDS[group][1]})")
        _print_table(listed)
        print()
    for line in missing if section is None else ():
        print(line)


def _load(group: str) -> type:
    """The class of a group's settings.

    Raises:
        MissingDependency: a library that its declaration needs is not installed.
    """
    module, _, name = COMMANDS[group][0].partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as e:
        raise MissingDependency(f"settings of `{group}` need the library {e.name}: install the extra train") from e


def _matching(groups: dict[str, list[Setting]], section: str) -> dict[str, list[Setting]]:
    if section in groups:
        return {section: groups[section]}
    found = {
        group: [each for each in listed if each.name == section or each.name.startswith(f"{section}.")]
        for group, listed in groups.items()
    }
    found = {group: listed for group, listed in found.items() if listed}
    if not found:
        names = {each.name for listed in groups.values() for each in listed}
        names |= {name.rpartition(".")[0] for name in names} - {""}
        close = difflib.get_close_matches(section, [*names, *groups], n=1)
        known = ", ".join(sorted({name.partition(".")[0] for name in names if "." in name}))
        hint = f"did you mean {close[0]}?" if close else f"there are the sections {known}"
        raise ConfigError(f"no setting or section {section!r}: {hint}")
    return found


def _print_table(listed: list[Setting]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title, wide in (("setting", False), ("type", False), ("default", False), ("meaning", True)):
        table.add_column(title, overflow="fold", ratio=1 if wide else None, no_wrap=title == "setting")
    for each in listed:
        table.add_row(each.name, each.type, each.default, each.meaning)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = WIDTH_OF_FILES
    console.print(table)
