"""Rows in the types of the schema: as Arrow tables, as polars frames."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import polars as pl
import pyarrow as pa

from catalogs.tables import schema
from catalogs.tables.schema import VIEW_ADDED, VIEW_FROM_VIDEOS
from datakit.errors import CatalogError


def as_arrow(name: str, rows: Sequence[dict[str, Any]] | pl.DataFrame) -> pa.Table:
    """Rows as an Arrow table of exactly the schema of table `name`.

    Raises:
        CatalogError: a column that the table does not have.
    """
    return full_rows(name, rows).to_arrow().cast(schema.arrow_schema(name))


def full_rows(name: str, rows: Sequence[dict[str, Any]] | pl.DataFrame) -> pl.DataFrame:
    """Rows as a frame of all columns of table `name`, null where they have none.

    Raises:
        CatalogError: a column that the table does not have.
    """
    types = polars_schema(name)
    if not isinstance(rows, pl.DataFrame):
        _check_columns(name, {column for row in rows for column in row})
        return pl.DataFrame(rows, schema=types)
    _check_columns(name, rows.columns)
    missing = [pl.lit(None, types[column]).alias(column) for column in types if column not in rows.columns]
    return rows.with_columns(missing).select(list(types))


def as_frame(name: str, rows: Sequence[dict[str, Any]] | pl.DataFrame) -> pl.DataFrame:
    """Rows as a frame of those columns of table `name` that they have.

    Raises:
        CatalogError: a column that the table does not have.
    """
    if isinstance(rows, pl.DataFrame):
        return rows
    columns = {column for row in rows for column in row}
    _check_columns(name, columns)
    types = {column: kind for column, kind in polars_schema(name).items() if column in columns}
    return pl.DataFrame(rows, schema=types)


def as_source(name: str, rows: pl.DataFrame) -> pa.Table:
    """Rows as an Arrow table of those columns of table `name` that they have.

    Raises:
        CatalogError: a column that the table does not have.
    """
    _check_columns(name, rows.columns)
    types = schema.arrow_schema(name)
    return rows.to_arrow().cast(pa.schema([types.field(column) for column in rows.columns]))


def polars_type(arrow_type: pa.DataType) -> pl.DataType | type[pl.DataType]:
    """The polars type of a column (by name, as making an Arrow array to convert would import pandas)."""
    if pa.types.is_list(arrow_type):
        return pl.List(polars_type(arrow_type.value_type))
    if pa.types.is_struct(arrow_type):
        return pl.Struct({field.name: polars_type(field.type) for field in arrow_type})
    return {
        schema.S: pl.String,
        schema.I4: pl.Int32,
        schema.I8: pl.Int64,
        schema.F4: pl.Float32,
        schema.F8: pl.Float64,
        schema.B: pl.Boolean,
        schema.TIME: pl.Datetime("us", "UTC"),
        pa.binary(): pl.Binary,
    }[arrow_type]


def polars_schema(table: str) -> dict[str, pl.DataType | type[pl.DataType]]:
    """Column types of a table."""
    return {field.name: polars_type(field.type) for field in schema.arrow_schema(table)}


@cache
def view_schema() -> dict[str, pl.DataType | type[pl.DataType]]:
    """Column types of the view `clips`."""
    own = {c.name: c.arrow for c in schema.CLIPS}
    of_videos = {c.name: c.arrow for c in schema.VIDEOS if c.name in VIEW_FROM_VIDEOS}
    added = {c.name: c.arrow for c in VIEW_ADDED}
    return {name: polars_type(kind) for name, kind in {**own, **of_videos, **added}.items()}


def _check_columns(name: str, columns: Iterable[str]) -> None:
    unknown = sorted(set(columns) - set(polars_schema(name)))
    if unknown:
        raise CatalogError(f"table {name} has no column {', '.join(unknown)}")
