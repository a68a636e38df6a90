"""What an evaluation of samples found, as the page shows it and JSON holds it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from sampler.evaluate.distributions import NotCompared, ScoreComparison
from sampler.evaluate.features import FeatureComparison
from sampler.evaluate.memorization import Memorisation
from sampler.evaluate.preference import Tally
from sampler.evaluate.result_sets import SampleSet


@dataclass(frozen=True)
class Evaluation:
    """What was found. See the classes of the parts.

    Attributes:
        clips: selected training clips.
        stages_not_run: stage and why.
        left_out: stage, and how many training clips have it at another fingerprint than most: their scores do not
            count.
        page: file and bytes, where one was written.
    """

    catalog: str
    where: str | None
    clips: int
    sets: list[SampleSet]
    scores: list[ScoreComparison]
    not_compared: list[NotCompared]
    stages_not_run: list[tuple[str, str]]
    left_out: list[tuple[str, int]]
    features: FeatureComparison
    memorisation: Memorisation
    preferences: list[Tally]
    splits: int
    seed: int
    made_at: datetime
    page: tuple[Path, int] | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        memory = self.memorisation
        return {
            "catalog": self.catalog,
            "where": self.where,
            "clips": self.clips,
            "splits": self.splits,
            "seed": self.seed,
            "samples": [
                {
                    "label": s.label,
                    "root": s.root,
                    "checkpoint": s.checkpoint,
                    "checkpoint_hash": s.checkpoint_hash,
                    "finished": s.rows.height,
                    "videos": s.videos.height,
                }
                for s in self.sets
            ],
            "scores": [
                {
                    "score": c.column.name,
                    "unit": c.column.unit,
                    "clips": len(c.real),
                    "median": c.median,
                    "sets": [
                        {
                            "label": s.label,
                            "samples": len(s.values),
                            "median": s.median,
                            "ks": _plain(s.ks),
                            "shift": _plain(s.shift),
                        }
                        for s in c.sets
                    ],
                }
                for c in self.scores
            ],
            "not_compared": [asdict(n) for n in self.not_compared],
            "stages_not_run": [{"stage": stage, "why": why} for stage, why in self.stages_not_run],
            "left_out": [{"stage": stage, "clips": clips} for stage, clips in self.left_out],
            "features": _plain(self.features) | {"nearer": {s.label: self.features.nearer(s.label) for s in self.sets}},
            "memorisation": {
                "trained": memory.trained,
                "held_out": len(memory.held),
                "held_from": memory.held_from,
                "threshold": memory.threshold,
                "problem": memory.problem,
                "flagged": [asdict(n) for n in memory.flagged],
                "neighbours": [asdict(n) for n in memory.neighbours],
            },
            "preferences": [asdict(t) for t in self.preferences],
            "page": str(self.page[0]) if self.page else None,
        }


def _plain(value: Any) -> Any:
    """Dataclasses as dicts; numbers that JSON has no word for as None."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return _plain(asdict(value))
