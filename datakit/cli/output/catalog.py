"""What `datakit catalog …` prints: tables. Nothing here computes."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import polars as pl

    from catalogs.query.diff import Diff
    from catalogs.query.selection import Selection
    from catalogs.query.snapshots import Vacuumed
    from catalogs.tables.catalog import Catalog

PIPED_WIDTH = 200


def show_catalog(catalog: Catalog, as_json: bool) -> None:
    from catalogs.tables import schema

    with catalog.reading():
        tables = [
            {
                "table": name,
                "version": handle.version(),
                "rows": catalog.scan(name).select(_count()).collect().item(),
                "files": len(handle.file_uris()),
            }
            for name in schema.TABLES
            for handle in [catalog.table(name)]
        ]
        filled = catalog.finished_clips().count().collect().row(0, named=True)
    clips = max(1, filled["clip_id"])
    columns = {
        name: [
            {
                "column": c.name,
                "type": str(c.arrow),
                "unit": c.unit,
                "meaning": c.meaning,
                "filled_by": c.filled_by,
                **({"filled": filled[c.name] / clips} if name == "clips" else {}),
            }
            for c in described
        ]
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
    console.print(
        f"`datakit catalog query` shows the view clips: the columns of clips and, joined to them, {added}.",
        markup=False,
    )


def show_rows(frame: pl.DataFrame, form: str, rows: int) -> None:
    import polars as pl

    from datakit.errors import ConfigError

    frame = frame.with_columns(pl.col(pl.Binary).bin.encode("hex"))
    if form == "csv":
        nested = [name for name, kind in frame.schema.items() if kind.is_nested()]
        flat = frame.with_columns(
            [pl.col(n).map_elements(lambda v: json.dumps(_plain(v)), return_dtype=pl.String) for n in nested]
        )
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


def show_selection(selection: Selection, as_json: bool) -> None:
    clips, hours = selection.size
    if as_json:
        print(json.dumps({**selection.as_dict(), "clips": clips, "hours": hours}, indent=1))
        return
    print(f"{clips} clips, {hours:.3f} hours: {selection.where or 'every clip'}")
    print(f"snapshot {','.join(f'{name}={version}' for name, version in selection.versions.items())}")
    print(f"content {selection.content_hash}")


def show_history(rows: pl.DataFrame, as_json: bool) -> None:
    """Newest last, as one reads a log."""
    if as_json:
        sys.stdout.write(rows.write_ndjson())
        return
    table = Table(*rows.columns)
    for row in rows.iter_rows(named=True):
        table.add_row(
            *(f"{value:%Y-%m-%d %H:%M:%S}" if name == "time" else _cell(value) for name, value in row.items())
        )
    wide().print(table)


def show_diff(found: Diff, as_json: bool) -> None:
    """What differs; a line for what does not."""
    if as_json:
        print(json.dumps(found.as_dict(), indent=1))
        return
    console = wide()
    print(f"videos +{found.videos_added} −{found.videos_removed}")
    print(
        f"clips +{found.clips_added} ({found.hours_added:.3f} h) −{found.clips_removed} ({found.hours_removed:.3f} h)"
    )
    print(
        f"captions +{found.captions_added} −{found.captions_removed} ~{found.captions_changed}, marks "
        f"~{found.marks_changed}"
    )
    if found.recipes[0] != found.recipes[1]:
        print(f"recipe {', '.join(found.recipes[0]) or 'none'} → {', '.join(found.recipes[1]) or 'none'}")
    if found.flips:
        table = Table("status", "clips", "hours", "by", title="Changed status", title_justify="left")
        for flip in found.flips:
            rules = ", ".join(f"{rule} {count}" for rule, count in flip.rules.items())
            table.add_row(f"{flip.before} → {flip.after}", str(flip.clips), f"{flip.hours:.3f}", rules)
        console.print(table)
    else:
        print("no clip of both changed its status")
    if found.scores:
        table = Table(
            "column",
            "filled",
            "cleared",
            "changed",
            "mean difference",
            "largest",
            title="Changed columns",
            title_justify="left",
        )
        for name, drift in found.scores.items():
            table.add_row(
                name,
                *(_cell(value) for value in (drift.filled, drift.cleared, drift.changed, drift.mean, drift.largest)),
            )
        console.print(table)
    else:
        print("no score changed")


def show_vacuumed(done: Vacuumed, dry_run: bool, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(done), indent=1))
        return
    size = "" if done.bytes is None else f", {done.bytes / 2**20:.1f} MiB"
    kept = ", ".join(f"{name} {'/'.join(map(str, versions))}" for name, versions in done.referenced.items() if versions)
    print(
        f"{done.files} files{size} {'would be deleted' if dry_run else 'deleted'}; kept for tags and runs: "
        f"{kept or 'nothing'}"
    )


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


def _plain(value: Any) -> Any:
    return value.to_list() if hasattr(value, "to_list") else value


def _count():
    import polars as pl

    return pl.len()


def _short_type(text: str) -> str:
    return text.split("<", maxsplit=1)[0] if "<" in text else text
