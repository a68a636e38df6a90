"""What people say about clips: keep, reject, a comment. Rows are only ever added; a clip's newest row counts."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import UTC, datetime

from catalogs.query.snapshots import author
from catalogs.tables.catalog import Catalog
from datakit.errors import ConfigError

MARKS = ("keep", "reject")


def mark(catalog: Catalog, clip_ids: Sequence[str], value: str | None, comment: str | None = None) -> None:
    """Mark clips. The mark wins over the recipe at once, and in every later run; None takes it back.

    Args:
        comment: replaces the one before; None: there is none.

    Raises:
        ConfigError: no such mark.
    """
    mark_each(catalog, [(clip, value, comment) for clip in clip_ids])


def mark_each(catalog: Catalog, marks: Sequence[tuple[str, str | None, str | None]]) -> None:
    """Mark clips in one commit, each in its own way: (clip_id, mark, comment). See `mark`.

    Raises:
        ConfigError: no such mark.
    """
    if unknown := sorted({value for _, value, _ in marks if value is not None} - set(MARKS)):
        raise ConfigError(f"a mark is {' or '.join(MARKS)}, not {unknown[0]!r}")
    now, who = datetime.now(UTC), author()
    catalog.append(
        "marks",
        [
            {
                "mark_id": uuid.uuid4().hex,
                "clip_id": clip,
                "mark": value,
                "comment": comment or None,
                "author": who,
                "created_at": now,
            }
            for clip, value, comment in marks
        ],
    )
