"""The clips that match, as a file to download: written by polars' streaming engine, so that any number of rows fits."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from catalogs.browse.clip_index import Index
from catalogs.query.selection import Selection
from catalogs.tables.arrow_types import view_schema
from datakit.errors import ConfigError

FORMATS = {
    "csv": "text/csv; charset=utf-8",
    "jsonl": "application/x-ndjson",
    "parquet": "application/vnd.apache.parquet",
}


def export(index: Index, where: str | None, columns: Sequence[str], form: str) -> Path:
    """Write the matching rows of the snapshot that is shown; the caller deletes the file.

    Lists and records are JSON in CSV, binary values hex digits in CSV and JSON lines.

    Raises:
        ConfigError: no such format, or a condition or a column that makes no sense.
    """
    if form not in FORMATS:
        raise ConfigError(f"formats are {', '.join(FORMATS)}, not {form!r}")
    rows = Selection(index.catalog, dict(index.versions), where or None, columns).rows(columns)
    with tempfile.NamedTemporaryFile(prefix="datakit-export-", suffix=f".{form}", delete=False) as file:
        path = Path(file.name)
    try:
        with index.catalog.reading():
            if form == "parquet":
                rows.sink_parquet(path)
            elif form == "jsonl":
                rows.with_columns(pl.col(pl.Binary).bin.encode("hex")).sink_ndjson(path)
            else:
                rows.with_columns(pl.col(pl.Binary).bin.encode("hex")).with_columns(_flat(columns)).sink_csv(path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


def _flat(columns: Sequence[str]) -> list[pl.Expr]:
    """Nested columns as JSON text: polars writes records as JSON, so each goes in as one with a single field."""
    nested = [name for name in columns if view_schema()[name].is_nested()]
    texts = [(name, pl.struct(name).struct.json_encode()) for name in nested]
    return [
        pl.when(pl.col(name).is_not_null()).then(text.str.slice(len(f'{{"{name}":')).str.head(-1)).alias(name)
        for name, text in texts
    ]
