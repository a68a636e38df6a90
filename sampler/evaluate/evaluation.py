"""`datakit eval samples`: score result catalogs with the stages of the training catalog, compare, and write the
page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import polars as pl

from catalogs.query.where import parse_where
from catalogs.tables.catalog import Catalog
from datakit.errors import CatalogError
from pipelines.settings import Settings
from pipelines.stages.registry import STAGES
from sampler.evaluate import features
from sampler.evaluate.baselines import NOISE, STILL, baselines
from sampler.evaluate.captions import enter_prompts
from sampler.evaluate.distributions import compare_scores, stages_not_run
from sampler.evaluate.features import FeatureComparison, RealFeatures, distance_to
from sampler.evaluate.memorization import Memorisation, memorisation
from sampler.evaluate.preference import FILE, Tally, Votes, tally
from sampler.evaluate.result import Evaluation
from sampler.evaluate.result_sets import SampleSet, read_sets
from sampler.evaluate.scoring import EVERYTHING, Planned, Progress, Scorer, plan_embedding, plan_stages, score_samples

KEPT = "status = 'kept'"
SPLITS = 10
PROMPTS = 40
KINDS = {NOISE: "noise", STILL: "still"}


def evaluate_samples(
    samples: Sequence[str],
    catalog: str,
    out: str | Path | None = None,
    where: str | None = KEPT,
    settings: Settings = Settings(),
    ray: str = "local",
    with_baselines: bool = True,
    splits: int = SPLITS,
    seed: int = 0,
    prompts: int = PROMPTS,
    on_progress: Progress = lambda what, done, of: None,
) -> Evaluation:
    """Judge samples beside the footage that their model was trained on.

    Writes scores, embeddings and prompts (as captions) into the result catalogs; into the training catalog only
    embeddings, where the selected clips have none of the model that is compared by.

    Args:
        samples: result catalogs of `datakit sample`.
        catalog: the training catalog.
        out: page to write; None: none.
        where: SQL condition over the training catalog's view: the clips that are compared with; None: all.
        settings: of the stages; where the training catalog was scored under others that it recorded, those are taken.
        with_baselines: also how far noise and the mean frame are from the footage.
        splits: of the training clips into held-out and other ones, for noise floors.
        prompts: rows of the page's grid of prompts, at most.
        on_progress: called with what is done, clips done, and clips in all.

    Raises:
        ConfigError: the condition or settings make no sense.
        CatalogError: no catalog, no finished samples, no clip that matches; the page cannot be written.
    """
    if out is not None:
        from catalogs.report import check_writable

        check_writable(Path(out))
    sets, training = read_sets(samples), Catalog(catalog)
    condition = parse_where(where)
    clips = _count(training, condition, where)
    planned = plan_stages(training, condition, settings)
    embed = plan_embedding(settings, planned)
    with Scorer(ray, on_progress) as scorer:
        for root in dict.fromkeys(s.root for s in sets):
            enter_prompts(Catalog(root))
            score_samples(scorer, root, [p for p in planned if p.stage != "embed"] + [embed])
        sets = read_sets(samples)
        compared, memory = _features(
            scorer, training, condition, where, embed, sets, planned, with_baselines, splits, seed
        )
    scores, left = compare_scores(training, condition, planned, sets, splits, seed)
    found = Evaluation(
        training.root,
        where,
        clips,
        sets,
        scores,
        left,
        stages_not_run(planned),
        _left_out(planned),
        compared,
        memory,
        _preferences(sets),
        splits,
        seed,
        datetime.now(UTC),
    )
    if out is None:
        return found
    from sampler.evaluate.page import write_page

    return replace(found, page=(Path(out), write_page(found, Path(out), prompts)))


def _left_out(planned: list[Planned]) -> list[tuple[str, int]]:
    return [(p.stage, p.others) for p in planned if p.others and STAGES[p.stage].columns]


def _count(catalog: Catalog, condition: pl.Expr, where: str | None) -> int:
    with catalog.reading():
        count = (
            catalog.clips(columns=sorted({"clip_id", *condition.meta.root_names()}))
            .filter(condition)
            .select(pl.len())
            .collect()
            .item()
        )
    if not count:
        raise CatalogError(
            f"no clip of {catalog.root} matches {where!r}: there is nothing to compare samples with"
            if where
            else f"{catalog.root} has no clips: there is nothing to compare samples with"
        )
    return count


def _features(
    scorer: Scorer,
    training: Catalog,
    condition: pl.Expr,
    where: str | None,
    embed: Planned,
    sets: list[SampleSet],
    planned: list[Planned],
    with_baselines: bool,
    splits: int,
    seed: int,
) -> tuple[FeatureComparison, Memorisation]:
    """Both need features of both sides."""
    if embed.settings is None:
        return FeatureComparison(problem=embed.problem), Memorisation(problem=embed.problem)
    if _without_features(training, condition, embed.fingerprint):
        scorer.run(training.root, embed.settings, ["embed"], where or EVERYTHING)
    real = features.read_real(training, condition, embed.fingerprint)
    if real is None:
        why = (
            "no selected training clip has features: stage embed failed on all of them (`datakit catalog funnel` "
            "says why)"
        )
        return FeatureComparison(problem=why), Memorisation(problem=why)
    read = [(s, *features.read_samples(s, embed.fingerprint)) for s in sets]
    if not sum(rows.height for _, rows, _ in read):
        why = "no sample has features: none is a video that stage embed can read"
        return FeatureComparison(real.model, real.rows.height, problem=why), Memorisation(problem=why)
    distances = [distance_to(real, s.label, "samples", vectors, splits, seed) for s, _, vectors in read if len(vectors)]
    if with_baselines:
        largest = max((s for s, _, vectors in read if len(vectors)), key=lambda s: s.videos.height)
        distances += _baselines(scorer, embed, planned, real, largest, splits, seed)
    return (
        FeatureComparison(real.model, real.rows.height, distances),
        memorisation(real, [(s.label, rows, vectors) for s, rows, vectors in read], seed),
    )


def _without_features(catalog: Catalog, condition: pl.Expr, mark: str) -> bool:
    clips = catalog.clips(columns=sorted({"clip_id", *condition.meta.root_names()})).filter(condition)
    have = catalog.embeddings().filter(pl.col("fingerprint") == mark)
    with catalog.reading():
        return bool(clips.join(have, on="clip_id", how="anti").select(pl.len()).collect().item())


def _baselines(
    scorer: Scorer,
    embed: Planned,
    planned: list[Planned],
    real: RealFeatures,
    samples: SampleSet,
    splits: int,
    seed: int,
) -> list[features.FeatureDistance]:
    assert embed.settings is not None, "features were compared under them"
    boxes = [p.stage for p in planned if p.stage == "letterbox" and p.settings is not None]
    made = baselines(scorer, embed.settings, [*boxes, "embed"], real, samples, seed)
    return [distance_to(real, name, KINDS[name], vectors, splits, seed) for name, vectors in made.items()]


def _preferences(sets: list[SampleSet]) -> list[Tally]:
    """What people said of these samples, in whichever of the folders they were asked."""
    files = [os.path.join(root, FILE) for root in dict.fromkeys(s.root for s in sets)]
    return tally([vote for file in files if os.path.exists(file) for vote in Votes(file).all()], sets)
