"""Clips that were forgotten (`datakit catalog forget`) after a plan was made: nobody trains on them any more."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from catalogs.records.tombstones import SPAN, Forgotten
from catalogs.tables.catalog import Catalog
from datakit.errors import CatalogError, ConfigError
from trainer.planning.plan import Part, Plan


def refuse_forgotten(folders: Sequence[Path], needed: bool) -> None:
    """Look at what the catalogs of plans have forgotten by now: a small table of each.

    Args:
        folders: of the plans; those that are not there are passed over.
        needed: a catalog that cannot be read is an error; if not, that is only said.

    Raises:
        ConfigError: clips of a plan show something of it.
        CatalogError: see `needed`.
    """
    for plan in [Plan.open(folder) for folder in folders if folder.exists()]:
        gone: set[str] = set()
        for address in dict.fromkeys(part.catalog for part in plan.parts if _of_catalog(part)):
            try:
                forgotten = Forgotten.read(Catalog(address))
            except CatalogError as e:
                if needed:
                    raise
                print(f"datakit: whether clips of the plan were forgotten cannot be seen: {e}", flush=True)
            else:
                gone |= _covered(plan, address, forgotten)
        if gone:
            raise ConfigError(
                f"{len(gone)} of the clips of the plan {plan.folder} were forgotten after it was made (for example "
                f"{min(gone)}): plan anew "
                "and train with another --out, from the start or from an export that did not see them (model.weights)"
            )


def _of_catalog(part: Part) -> bool:
    """Not of files alone, which nobody forgets."""
    return "versions" in part.selection


def _covered(plan: Plan, address: str, forgotten: Forgotten) -> set[str]:
    """The plan's clips that show something of what is forgotten."""
    if forgotten.rows.is_empty():
        return set()
    windows = pl.from_arrow(plan.windows.select(["part", "clip_id", *SPAN]))
    assert isinstance(windows, pl.DataFrame)
    parts = [i for i, part in enumerate(plan.parts) if part.catalog == address]
    near = windows.filter(
        pl.col("part").is_in(parts) & pl.col("video_id").is_in(list(forgotten.videos | forgotten.partly))
    )
    clips = near.unique("clip_id")
    return set(clips.filter(forgotten.covers(clips))["clip_id"])
