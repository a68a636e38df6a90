"""Values as SQL."""

from __future__ import annotations

from collections.abc import Sequence


def quoted(value: str) -> str:
    """A string as a SQL literal."""
    return "'" + value.replace("'", "''") + "'"


def sql_list(values: Sequence[str]) -> str:
    """`('a', 'b')` for a SQL IN."""
    return "(" + ", ".join(map(quoted, values)) + ")"
