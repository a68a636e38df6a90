"""datakit: raw video in, a versioned Parquet catalog of scored clips out; all that follows is a query on that catalog.

    import datakit

    datakit.ingest(["videos/"], "catalog")
    selection = datakit.Selection(datakit.Catalog("catalog"), where="status = 'kept' and motion > 2")

Names are imported when they are first used, so that `import datakit` stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from datakit.version import __version__

if TYPE_CHECKING:
    from catalogs.query.selection import Selection
    from catalogs.tables.catalog import Catalog
    from pipelines.runs.ingest import ingest
    from pipelines.runs.score import score
    from sampler.generation.run import sample
    from trainer.dit.train import train_dit
    from trainer.planning.build_plan import make_plan


__all__ = ["Catalog", "Selection", "__version__", "ingest", "make_plan", "sample", "score", "train_dit"]
_HOMES = {
    "Catalog": "catalogs.tables.catalog",
    "Selection": "catalogs.query.selection",
    "ingest": "pipelines.runs.ingest",
    "score": "pipelines.runs.score",
    "make_plan": "trainer.planning.build_plan",
    "train_dit": "trainer.dit.train",
    "sample": "sampler.generation.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'datakit' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
