"""SQL expressions over the view `clips`: conditions of selections and rules of recipes. polars' dialect."""

from __future__ import annotations

import polars as pl

from catalogs.tables.arrow_types import view_schema
from catalogs.tables.view import unknown_column
from datakit.errors import ConfigError


def parse_where(where: str | None) -> pl.Expr:
    """A condition over the view as an expression; None: true.

    Raises:
        ConfigError: it cannot be read, names an unknown column, or is no condition.
    """
    return pl.lit(True) if where is None else parse_condition(where, "--where")


def parse_condition(text: str, what: str) -> pl.Expr:
    """See `parse_where`.

    Args:
        what: that the text is, for errors.
    """
    known = view_schema()
    try:
        expression = pl.sql_expr(text)
        unknown = sorted(set(expression.meta.root_names()) - set(known))
        if unknown:
            raise ConfigError(f"{what}: {unknown_column(unknown[0], list(known))}")
        kind = pl.DataFrame(schema=known).select(expression.alias("condition")).schema["condition"]
    except (pl.exceptions.PolarsError, ValueError) as e:
        raise ConfigError(f"{what}: cannot read {text!r}: {str(e).splitlines()[0]}") from e
    if kind not in (pl.Boolean, pl.Null):
        raise ConfigError(f"{what}: {text!r} is a {str(kind).lower()}, not a condition")
    return expression


def columns_of(where: str | None) -> set[str]:
    """Columns that a condition looks at."""
    return set(parse_where(where).meta.root_names())
