"""Video files that are in no catalog, as a selection: what a plan can be made of without ingesting anything."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import polars as pl

from datakit.errors import ConfigError, MediaError
from datakit.identity import Span, video_id
from datakit.video.metadata import Rhythm, clip_columns, frame_end, nominal_step, video_columns
from datakit.video.probe import describe
from datakit.video.reader import VideoReader
from trainer.planning.mixture import COLUMNS

TEXTS = ("clip_id", "video_id", "uri", "path", "time_base", "kind", "status", "caption", "split")
REALS = ("fps", "motion_vmaf")
TYPES = {name: pl.String for name in TEXTS} | {name: pl.Float64 for name in REALS} | {"vfr": pl.Boolean}
"""Of columns; the others are whole numbers."""


class FileSelection:
    """Each file is one clip, from its first frame to its last; cuts are not looked for. Every file is decoded once, to
    count frames.

    Stands in for `catalogs.query.selection.Selection` in `trainer.planning.build_plan.make_plan`; it is its own
    catalog.

    Raises:
        ConfigError: a file that cannot be read as a video or image.
    """

    where = None
    is_local = True

    def __init__(self, files: Sequence[str | Path]):
        self.files = [str(Path(file).absolute()) for file in files]
        self.root = os.getcwd()
        self.catalog = self
        self._rows = pl.DataFrame(
            [_row(file) for file in self.files], schema={name: TYPES.get(name, pl.Int64) for name in COLUMNS}
        )

    def reading(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def rows(self, columns: Sequence[str]) -> pl.LazyFrame:
        return self._rows.lazy().select(columns)

    def as_dict(self) -> dict[str, Any]:
        return {"where": None, "files": self.files, "content_hash": ""}


def _row(file: str) -> dict[str, Any]:
    """As the catalog would have it."""
    try:
        with open(file, "rb") as content:
            identity = video_id(content, os.path.getsize(file))
        rhythm = Rhythm()
        with VideoReader(file) as reader:
            pictures = reader.frames()
            picture = opening = next(pictures)  # a file without any is a MediaError
            first, info = opening.pts, describe(reader, opening, os.path.getsize(file))
            for picture in chain([opening], pictures):
                rhythm.add(picture.pts)
            base = reader.time_base
            span = Span(first, frame_end(picture, nominal_step(info, base)), base)
    except OSError as e:
        raise ConfigError(f"cannot read {file}: {e.strerror or e}") from e
    except MediaError as e:
        raise ConfigError(f"cannot read {file}: {e}") from e
    clip = clip_columns(identity, "", info, span, (0, rhythm.count), first)
    known = (
        video_columns(info, rhythm, first, base)
        | clip
        | {"uri": file, "status": "kept", "lost_start": 0, "lost_end": 0}
    )
    return {name: known.get(name) for name in COLUMNS}
