"""Several selections in one plan: `--mix mix.yaml`.

    parts:
      - name: films
        catalog: /data/films          # relative to the file
        where: "aesthetic > 5"        # not given: status = 'kept'
        snapshot: v1                  # not given: now
        weight: 3                     # three times as many samples as a part of weight 1
      - name: screens
        catalog: /data/screens
        weight: 1

`weight` is a share of the samples: the repeats follow from how many windows the parts have, and are so large that every
window is drawn at least once in an epoch. `repeat` in its place says directly how often (0.5: every second one). All
parts have the one or all have the other; with neither, every window is drawn once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from catalogs.query.selection import KEPT, Selection
from catalogs.tables.catalog import Catalog
from datakit.config import Section, load
from datakit.errors import ConfigError

COLUMNS = (
    "clip_id",
    "video_id",
    "uri",
    "path",
    "lost_start",
    "lost_end",
    "stream",
    "start_pts",
    "end_pts",
    "time_base",
    "num_frames",
    "fps",
    "vfr",
    "kind",
    "width",
    "height",
    "crop_x",
    "crop_y",
    "crop_width",
    "crop_height",
    "motion_vmaf",
    "split",
    "status",
    "caption",
)
"""Of the view: all that a plan is made of. A selection's content hash is of them."""
Positive = Annotated[float, Field(gt=0)]


class MixPart(Section):
    """See the module."""

    catalog: str
    name: str | None = None
    where: str | None = KEPT
    snapshot: str | None = None
    weight: Positive | None = None
    repeat: Positive | None = None


class Mix(Section):
    """See the module."""

    parts: Annotated[list[dict[str, Any]], Field(min_length=1)]
    """Of `MixPart`: read one by one, so that errors name theirs."""


@dataclass(frozen=True)
class Member:
    """A selection in a mix.

    Attributes:
        weight: share of the samples relative to the other members'; None: `repeat` holds.
        repeat: how often every window is drawn in an epoch.
    """

    name: str
    selection: Selection
    weight: float | None = None
    repeat: float = 1.0


def selected(catalog: str, where: str | None, snapshot: str | None, name: str | None = None) -> Member:
    """One selection as a member.

    Raises:
        CatalogError, ConfigError: no such catalog, snapshot or column.
    """
    opened = Catalog(catalog)
    return Member(name or Path(opened.root).name, Selection(opened, snapshot, where, COLUMNS))


def read_mix(file: str | Path) -> list[Member]:
    """Raises:
    ConfigError: an unreadable file, unknown keys, weights and repeats mixed, two parts of one name.
    """
    parts = [_part(file, i, values) for i, values in enumerate(load(Mix, file).parts)]
    if any(p.weight is not None for p in parts) and not all(p.weight is not None and p.repeat is None for p in parts):
        raise ConfigError(f"{file}: give every part a weight, or none (and then, where it is not 1, a repeat)")
    members = []
    for part in parts:
        address = part.catalog if "://" in part.catalog else str(Path(file).parent / part.catalog)
        found = selected(address, part.where, part.snapshot, part.name)
        members.append(Member(found.name, found.selection, part.weight, part.repeat or 1.0))
    names = [m.name for m in members]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise ConfigError(f"{file}: two parts are named {twice!r}: give them names")
    return members


def _part(file: str | Path, index: int, values: dict[str, Any]) -> MixPart:
    try:
        return MixPart.model_validate(values)
    except ValidationError as e:
        wrong = e.errors()[0]
        where = ".".join(map(str, (index, *wrong["loc"])))
        raise ConfigError(
            f"{file}: parts.{where}: {wrong['msg']} (a part has {', '.join(MixPart.model_fields)})"
        ) from e


def repeats(members: Sequence[Member], draws: Sequence[float]) -> list[float]:
    """How often every window of each member is drawn in an epoch.

    Args:
        draws: samples of each member if its windows were drawn once (its buckets' weights counted).
    """
    weights = [m.weight for m in members if m.weight is not None]
    if len(weights) < len(members):
        return [m.repeat for m in members]
    shares = [weight / n for weight, n in zip(weights, draws)]
    return [round(share / min(shares), 6) for share in shares]
