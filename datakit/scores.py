"""Where a catalog learns which scores there are. It may not import the pipelines (they stand above it), and still has
every column from its first version on: it asks here, and the stages in `pipelines.stages` say what they fill."""

from __future__ import annotations

from datakit.columns import Column


def score_columns() -> tuple[Column, ...]:
    """Columns of `clips` that stages fill, in the order of the stages."""
    from pipelines.stages.registry import STAGES

    return tuple(column for stage in STAGES.values() for column in stage.columns)
