"""SQL over a catalog: the joined view as `clips`, the tables under their own names."""

from __future__ import annotations

import re

import polars as pl

from catalogs.tables import schema
from catalogs.tables.catalog import Catalog
from catalogs.tables.view import unknown_column
from datakit.errors import CatalogError

EVERY_COLUMN = re.compile(r"\*(?<!\bcount\(\*)|\bcolumns\s*\(", re.IGNORECASE)


def query(catalog: Catalog, sql: str, limit: int | None = None) -> pl.DataFrame:
    """Run a SQL statement (polars' dialect) over `clips` (the view) and the tables; `captions` and `embeddings` hold
    the rows that count.

    Args:
        limit: most rows; None: all.

    Raises:
        CatalogError: the statement cannot be read or run.
    """
    versions = catalog.versions()
    frames = {
        "clips": catalog.clips(versions, _mentioned(sql, catalog.view_columns())),
        "captions": catalog.captions(versions),
        "embeddings": catalog.embeddings(versions),
        **{
            name: catalog.scan(name, versions.get(name))
            for name in schema.TABLES
            if name not in ("clips", "captions", "embeddings")
        },
    }
    try:
        with catalog.reading():
            rows = pl.SQLContext(frames).execute(sql)
            return (rows if limit is None else rows.head(limit)).collect()
    except pl.exceptions.ColumnNotFoundError as e:
        known = [
            c
            for name, frame in frames.items()
            for c in (catalog.view_columns() if name == "clips" else frame.collect_schema().names())
        ]
        raise CatalogError(_unknown_column(str(e), known)) from e
    except pl.exceptions.PolarsError as e:
        raise CatalogError(f"cannot run the query: {str(e).splitlines()[0]}") from e


def _mentioned(sql: str, columns: list[str]) -> list[str]:
    """Columns of the view that a statement may use: those whose names occur in it, all where it has a `*`. The view
    joins no table that none of them comes from."""
    if EVERY_COLUMN.search(sql):
        return columns
    words = set(re.findall(r"\w+", sql.lower()))
    return [name for name in columns if name in words or name == "clip_id"]


def _unknown_column(message: str, columns: list[str]) -> str:
    named = re.search(r"[\"'`]?(\w+)[\"'`]?", message.removeprefix("unable to find column "))
    return unknown_column(named.group(1) if named else message, columns)
