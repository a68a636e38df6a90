"""What columns mean on both sides: which scores of other tools are ours, which of ours go under their names.

Open-Sora's columns are defined in its repository: tools/datasets/README.md (hpcaitech/Open-Sora, versions 1.0 to 1.3)
and docs/train.md (2.0: "at least the following columns are required: path, text, num_frames, height, width,
aspect_ratio, resolution, fps"), its scores in tools/scoring/README.md. Of these scores only one has our definition:

| theirs | ours | |
|---|---|---|
| `aes` | `aesthetic` | the LAION predictor on CLIP embeddings, mean over frames (theirs: first, middle, last) |
| `match` | – | 100 times the cosine of the middle frame; our `caption_match` is the mean cosine of several frames |
| `flow` | – | UniMatch, in pixels of a 320 × 576 picture; our `motion` is percent of the diagonal per second |
| `ocr` | – | text regions of confidence over 0.3 by DBNet++; our `ocr_boxes` counts those from 0.7 by RapidOCR |
| `cmotion` | – | another detector's words |

The others of ours are exported under our own names, theirs are kept in `videos.extra`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any, TypeVar

import polars as pl

from catalogs.tables.arrow_types import polars_schema, view_schema
from catalogs.tables.schema import CLIPS

OPEN_SORA = ("path", "text", "num_frames", "height", "width", "aspect_ratio", "fps", "resolution")
SAME_SCORES = {"aes": "aesthetic"}
"""Open-Sora's name -> ours."""
TECHNICAL = ("num_frames", "height", "width", "aspect_ratio", "fps", "resolution")
"""What decoding tells: it wins over what a data set states."""
TOLERANCE = {"fps": 0.01, "aspect_ratio": 0.01}
"""Relative differences that are rounding."""
ATTRIBUTES = {
    "license": "license",
    "licence": "license",
    "source_url": "source_url",
    "attribution": "attribution",
    "source_caption": "source_caption",
}
"""Columns of a data set that `videos` has columns for."""
SCORES = tuple(
    c.name for c in CLIPS if c.filled_by not in ("ingest", "clips", "dedup") and c.name != "content_hash"
) + ("split",)
"""Of a clip, what stays true of it in a file of its own. (`content_hash` is of the pictures at the source's grid
times.)"""
EXPORTED = "exported"
"""Key of `videos.extra` under which lies what an export of ours said of the clip besides."""


def scalar_columns() -> list[str]:
    """Columns of the view that a CSV cell holds as they are."""
    return [name for name, kind in view_schema().items() if not kind.is_nested() and kind != pl.Binary]


@dataclass
class Meaning:
    """A row of a data set, sorted.

    Attributes:
        scores: columns of `clips`.
        attributes: columns of `videos`, without `extra`.
        stated: technical columns as the data set has them.
        rest: everything else that is not empty.
    """

    scores: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, str] = field(default_factory=dict)
    stated: dict[str, Any] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)


def sort_out(columns: dict[str, Any], ours: bool) -> Meaning:
    """Find the meaning of a row's columns, its path and text left out.

    Args:
        ours: the row was exported by datakit, so that our names have our meaning.
    """
    meaning = Meaning()
    exported: dict[str, Any] = {}
    for name, value in columns.items():
        score = SAME_SCORES.get(name, name if ours and name in SCORES else None)
        if is_empty(value) and not (
            value == "" and score == "phash"
        ):  # no frame showed anything: no hash, but looked at
            continue
        typed = _typed(value, polars_schema("clips")[score]) if score else None
        if score is not None and typed is not None:
            meaning.scores[score] = typed
        elif name.lower() in ATTRIBUTES:
            meaning.attributes.setdefault(ATTRIBUTES[name.lower()], str(value))
        elif name in TECHNICAL:
            meaning.stated[name] = value
        elif ours and name == "extra":
            meaning.rest.update(_parsed(value))
        elif ours:
            exported[name] = value
        else:
            meaning.rest[name] = value
    if exported:
        meaning.rest[EXPORTED] = exported
    return meaning


def discrepancies(stated: dict[str, Any], clip: dict[str, Any]) -> dict[str, Any]:
    """What a data set states otherwise than decoding tells."""
    return {name: value for name, value in stated.items() if not _agrees(name, value, clip.get(name))}


def as_extra(values: dict[str, Any]) -> str | None:
    """The column `extra`."""
    return _json(values) if values else None


def is_empty(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


Rows = TypeVar("Rows", pl.DataFrame, pl.LazyFrame)


def hex_columns(rows: Rows) -> Rows:
    """Binary columns as hex digits, for forms without bytes."""
    return rows.with_columns(pl.col(pl.Binary).bin.encode("hex"))


def flat_columns(rows: pl.DataFrame) -> pl.DataFrame:
    """Lists and structs as JSON, bytes as hex: for CSV."""
    nested = [name for name, kind in rows.schema.items() if kind.is_nested()]
    texts = [
        pl.Series(name, [None if v is None else _json(v) for v in rows[name].to_list()], pl.String) for name in nested
    ]
    return hex_columns(rows).with_columns(texts)


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row as JSON can hold it: bytes as hex, numbers that are none as null."""
    return json.loads(json.dumps({k: None if is_empty(v) and v != "" else v for k, v in row.items()}, default=_plain))


def _agrees(name: str, stated: Any, true: Any) -> bool:
    try:
        number = float(stated)
    except (TypeError, ValueError):
        return False
    if true is None:
        return name == "fps" and number in (0.0, 1.0)  # of an image, which has none
    return abs(number - true) <= TOLERANCE.get(name, 0.0) * abs(true)


def _typed(value: Any, kind: pl.DataType | type[pl.DataType]) -> Any:
    """A value as a column of this type takes it; None where it does not."""
    try:
        if kind == pl.Binary:
            return bytes.fromhex(value) if isinstance(value, str) else bytes(value)
        if kind.is_float():
            return float(value)
        if kind.is_integer():
            return int(value) if float(value) == int(float(value)) else None
        return str(value) if kind == pl.String else None
    except (TypeError, ValueError, OverflowError):
        return None


def _parsed(value: Any) -> dict[str, Any]:
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        parsed = None
    return parsed if isinstance(parsed, dict) else {"extra": value}


def _json(value: Any) -> str:
    return json.dumps(value, default=_plain, sort_keys=True, ensure_ascii=False)


def _plain(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes) else str(value)
