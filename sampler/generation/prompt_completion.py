"""What a language model adds to prompts: a refined text, a motion score. What an earlier run was told is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sampler.generation.sample_spec import Sample
from sampler.prompts.llm_rewrite import motion_scores, refine_prompts
from sampler.prompts.references import frames_of
from sampler.settings import SampleSettings
from trainer.diffusion.conditioning import MODES


def worded(
    samples: Sequence[Sample], known: Mapping[str, Mapping[str, Any]], settings: SampleSettings, ray: str
) -> list[Sample]:
    """The samples with all that the model is told of them.

    Args:
        known: rows of the table `samples`, by id.

    Raises:
        EngineDown, ConfigError: the language model cannot be started.
    """
    before = [_remembered(sample, known.get(sample.sample_id)) for sample in samples]
    if settings.prompt.refine:
        asked = [s for s in before if s.refined is None]
        first = {(s.prompt, s.references): s for s in asked}
        texts = (
            refine_prompts([s.prompt for s in first.values()], settings.llm, [_picture(s) for s in first.values()], ray)
            if first
            else []
        )
        told = dict(zip(first, texts))
        before = [replace(s, refined=told[s.prompt, s.references]) if s.refined is None else s for s in before]
    prompts = list(dict.fromkeys(s.refined or s.prompt for s in before if s.asks_motion and s.told_motion is None))
    scores = dict(zip(prompts, motion_scores(prompts, settings.llm, ray))) if prompts else {}
    return [
        replace(s, told_motion=scores[s.refined or s.prompt]) if s.asks_motion and s.told_motion is None else s
        for s in before
    ]


def _remembered(sample: Sample, row: Mapping[str, Any] | None) -> Sample:
    if row is None:
        return sample
    return replace(
        sample, refined=row["refined"], told_motion=row["motion"] if sample.asks_motion else sample.told_motion
    )


def _picture(sample: Sample) -> np.ndarray | None:
    """The frame that the video goes on from, if one is given."""
    if not MODES[sample.mode].head or not sample.references:
        return None
    return frames_of(sample.references[0], 1, sample.height, sample.width, sample.fps)[0]
