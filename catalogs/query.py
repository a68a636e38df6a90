"""SQL over a catalog: the joined view as `clips`, the tables under their own names."""

from __future__ import annotations

import difflib
import re

import polars as pl

from catalogs.tables import Catalog
from datakit.errors import CatalogError


def query(catalog: Catalog, sql: str) -> pl.DataFrame:
    """Run a SQL statement (polars' dialect) over `clips` (the view), `videos`, `captions`, `embeddings`, `decisions`, `runs`.

    Raises:
        CatalogError: the statement cannot be read or run.
    """
    frames = {
        "clips": catalog.clips(), "captions": catalog.captions(), "embeddings": catalog.embeddings(),
        **{name: catalog.scan(name) for name in ("videos", "decisions", "runs")},
    }
    try:
        return pl.SQLContext(frames).execute(sql).collect()
    except pl.exceptions.ColumnNotFoundError as e:
        raise CatalogError(_unknown_column(str(e), [c for frame in frames.values() for c in frame.collect_schema().names()])) from e
    except pl.exceptions.PolarsError as e:
        raise CatalogError(f"cannot run the query: {str(e).splitlines()[0]}") from e


def _unknown_column(message: str, columns: list[str]) -> str:
    named = re.search(r"[\"'`]?(\w+)[\"'`]?", message.removeprefix("unable to find column "))
    name = named.group(1) if named else message
    close = difflib.get_close_matches(name, columns, n=1)
    return f"no column {name!r}" + (f": did you mean {close[0]}?" if close else " (see `datakit catalog show`)")
