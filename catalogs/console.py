"""What `datakit catalog …` prints: tables. Nothing here computes."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import polars as pl

    from catalogs.tables import Catalog

PIPED_WIDTH = 200


def show_catalog(catalog: Catalog, as_json: bool) -> None:
    from catalogs import schema

    tables = [
        {"table": name, "version": handle.version(), "rows": catalog.scan(name).select(_count()).collect().item(),
         "files": len(handle.file_uris())}
        for name in schema.TABLES for handle in [catalog.table(name)]
    ]
    filled = catalog.finished_clips().count().collect().row(0, named=True)
    clips = max(1, filled["clip_id"])
    columns = {
        name: [{"column": c.name, "type": str(c.type), "unit": c.unit, "meaning": c.meaning, "filled_by": c.filled_by,
                **({"filled": filled[c.name] / clips} if name == "clips" else {})} for c in described]
        for name, described in schema.TABLES.items()
    }
    if as_json:
        print(json.dumps({"root": catalog.root, "tables": tables, "columns": columns}, indent=1))
        return
    console = wide()
    overview = Table("table", "version", "rows", "files", title=f"Catalog {catalog.root}", title_justify="left")
    for t in tables:
        overview.add_row(*(str(value) for value in t.values()))
    console.print(overview)
    for name in ("clips", *(t for t in schema.TABLES if t != "clips")):
        share = ["filled"] if name == "clips" else []
        table = Table("column", "type", "unit", "filled by", *share, "meaning", title=name, title_justify="left")
        for c in columns[name]:
            share = [f"{c['filled']:.0%}"] if name == "clips" else []
            table.add_row(c["column"], _short_type(c["type"]), c["unit"], c["filled_by"], *share, c["meaning"])
        console.print(table)
    added = ", ".join([*schema.VIEW_FROM_VIDEOS, *(c.name for c in schema.VIEW_ADDED)])
    console.print(f"`datakit catalog query` shows the view clips: the columns of clips and, joined to them, {added}.", markup=False)


def show_rows(frame: pl.DataFrame, form: str, rows: int) -> None:
    import polars as pl

    from datakit.errors import ConfigError

    frame = frame.with_columns(pl.col(pl.Binary).bin.encode("hex"))
    if form == "csv":
        nested = [name for name, kind in frame.schema.items() if kind.is_nested()]
        flat = frame.with_columns([pl.col(n).map_elements(lambda v: json.dumps(_plain(v)), return_dtype=pl.String) for n in nested])
        sys.stdout.write(flat.write_csv())
    elif form == "jsonl":
        sys.stdout.write(frame.write_ndjson())
    elif form == "table":
        console = wide()
        table = Table(*frame.columns)
        for name, column in zip(frame.columns, table.columns):
            if frame.schema[name].is_numeric():
                column.justify = "right"
        for row in frame.head(rows).iter_rows():
            table.add_row(*(_cell(value) for value in row))
        console.print(table)
        if frame.height > rows:
            console.print(f"{rows} of {frame.height} rows (--rows for more)")
    else:
        raise ConfigError(f"--format is table, csv or jsonl, not {form!r}")


def wide() -> Console:
    """The terminal; or, into a file or a pipe, lines that are long enough for wide tables."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(_cell(v) for v in value)
    if isinstance(value, dict):
        return " ".join(f"{k}={_cell(v)}" for k, v in value.items())
    return str(value)


def _plain(value: object) -> object:
    return value.to_list() if hasattr(value, "to_list") else value


def _count():
    import polars as pl

    return pl.len()


def _short_type(text: str) -> str:
    return text.split("<")[0] if "<" in text else text
