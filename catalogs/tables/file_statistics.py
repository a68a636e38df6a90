"""Statistics of data files, as the log of a Delta table holds them."""

from __future__ import annotations

import math
from typing import Any

import pyarrow.parquet as pq

LONGEST_STATISTIC = 64
"""Characters; longer texts get no minimum and maximum in the log."""


def statistics_of(about: pq.FileMetaData) -> dict[str, Any]:
    """Delta's statistics of a file: of numbers, truth values and short texts."""
    lows: dict[str, Any] = {}
    highs: dict[str, Any] = {}
    nulls: dict[str, int] = {}
    unknown: set[str] = set()
    for g in range(about.num_row_groups):
        for i in range(about.num_columns):
            column = about.row_group(g).column(i)
            name, found = column.path_in_schema, column.statistics
            if "." in name:
                continue
            if found is None or not found.has_null_count:
                unknown.add(name)
                continue
            nulls[name] = nulls.get(name, 0) + found.null_count
            if found.has_min_max and _is_plain(found.min) and _is_plain(found.max):
                lows[name] = min(lows.get(name, found.min), found.min)
                highs[name] = max(highs.get(name, found.max), found.max)
            elif found.null_count < column.num_values:
                unknown.add(name)
    known = [name for name in lows if name not in unknown]
    return {
        "numRecords": about.num_rows,
        "minValues": {n: lows[n] for n in known},
        "maxValues": {n: highs[n] for n in known},
        "nullCount": {n: count for n, count in nulls.items() if n not in unknown},
    }


def _is_plain(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= LONGEST_STATISTIC
    return isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value))
