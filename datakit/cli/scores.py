"""The command `datakit scores`: what is measured of clips, by which stage."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from datakit.cli.options import JsonOption

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pipelines.stages.base import Stage

GOOD = {1: "more", -1: "less", 0: ""}


def scores(
    markdown: Annotated[bool, typer.Option("--markdown", help="As the table of docs/scores.md.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Every score: its stage, unit, meaning, which direction is good, and what it needs."""
    from pipelines.stages.registry import STAGES

    listed = [_described(stage) for stage in STAGES.values()]
    if as_json:
        print(json.dumps(listed, indent=1))
    elif markdown:
        print(markdown_table(STAGES.values()))
    else:
        _print_table(listed)


def _described(stage: type[Stage]) -> dict[str, Any]:
    return {
        "stage": stage.name,
        "about": stage.summary(),
        "looks_at": stage.needs,
        "by_default": _runs_by_default(stage),
        "extras": _extras(stage),
        "columns": [
            {"column": c.name, "type": c.type, "unit": c.unit, "meaning": c.meaning, "good": c.good, "shown": c.shown}
            for c in stage.columns
        ],
    }


def _runs_by_default(stage: type[Stage]) -> bool:
    return stage.Settings is None or getattr(stage.Settings(), "enabled", True)


def _extras(stage: type[Stage]) -> list[str]:
    """Those that it needs under its default settings."""
    return sorted({extra for _, extra in stage.required(stage.Settings() if stage.Settings else None)})


def markdown_table(stages: Iterable[type[Stage]]) -> str:
    """Rows of docs/scores.md: stage, columns, and what the stage says of itself."""
    return "\n".join(["| stage | columns of `clips` | how |", "|---|---|---|", *map(_markdown_row, stages)])


def _markdown_row(stage: type[Stage]) -> str:
    off = "" if _runs_by_default(stage) else " *"
    columns = ", ".join(f"`{name}`" for name in stage.column_names())
    extras = "".join(f" (extra `{extra}`)" for extra in _extras(stage))
    return f"| `{stage.name}`{off} | {columns} | {stage.summary().rstrip('.')}{extras} |"


def _print_table(listed: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from datakit.cli.output.catalog import wide

    table = Table("column", "unit", "good", "stage", "looks at", "needs", "meaning")
    for stage in listed:
        needs = ", ".join(f"extra {extra}" for extra in stage["extras"])
        name = stage["stage"] + ("" if stage["by_default"] else " *")
        for c in stage["columns"]:
            table.add_row(c["column"], c["unit"], GOOD[c["good"]], name, stage["looks_at"], needs, c["meaning"])
    console = wide()
    console.print(table)
    console.print("* off by default: --set STAGE.enabled=true, or datakit run score --stages STAGE", markup=False)
