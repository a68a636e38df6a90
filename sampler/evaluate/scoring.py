"""The same stages on both sides: which settings gave the training clips their scores, and running those on the samples.

A number of another stage version, other settings or other weights is another number. So a stage runs on samples only
under settings that give the fingerprint which most of the selected training clips have; where no settings do, its
columns are not compared.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import polars as pl
from pydantic import ValidationError

from catalogs.tables.catalog import Catalog
from datakit.errors import ConfigError
from datakit.weights.registry import EFFICIENTNET
from pipelines.catalog_sync.embeddings import derived, mark_of, resolve
from pipelines.executor.session import RaySession
from pipelines.runs.score import scorable, score
from pipelines.settings import Settings
from pipelines.stages.registry import STAGES, fingerprint

EVERYTHING = "num_frames > 0"
"""A condition that all clips meet; `embed` then takes those that no recipe keeps, too."""
LEFT_OUT = ("shots", "phash")
"""Stages without scores."""
FROM_EMBEDDINGS = tuple(derived(STAGES))
EMBEDDING = ("embed", *FROM_EMBEDDINGS)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Planned:
    """A stage that the training clips have been through.

    Attributes:
        fingerprint: that most of them have; `clips`: how many do, `others`: how many have another.
        settings: that give it here; None: `problem` says why there are none.
    """

    stage: str
    fingerprint: str
    clips: int
    others: int
    settings: Settings | None
    problem: str = ""


class Scorer:
    """Runs `pipelines.runs.score.score` where something is lacking; Ray starts with the first run. Use as a context
    manager."""

    def __init__(self, ray: str, on_progress: Progress = lambda what, done, of: None):
        self._ray, self._tell = ray, on_progress
        self._stack = contextlib.ExitStack()
        self._started = False

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *exc) -> None:
        self._stack.__exit__(*exc)

    def run(self, root: str, settings: Settings, stages: list[str], where: str | None = EVERYTHING) -> None:
        """Score the clips of a catalog that lack these stages."""
        if not self._started:
            self._stack.enter_context(RaySession(self._ray))
            self._started = True
        name = root.rstrip("/").rsplit("/", 1)[-1]
        score(
            root,
            settings,
            stages,
            where,
            ray=self._ray,
            on_progress=lambda done, of: self._tell(f"scoring {name}", done, of),
        )


def plan_stages(catalog: Catalog, condition: pl.Expr, settings: Settings) -> list[Planned]:
    """Every stage with scores that selected training clips have been through, in the order of the registry.

    Args:
        settings: tried first; then those of the catalog's own runs, the newest first.
    """
    candidates = [settings, *_recorded(catalog)]
    with catalog.reading():
        marks = (
            catalog.clips(columns=list({"stage_versions", *condition.meta.root_names()}))
            .filter(condition)
            .select(mark_of(name).alias(name) for name in STAGES if name not in LEFT_OUT)
            .collect()
        )
    planned = []
    for stage in marks.columns:
        counted = plain_marks(marks[stage]).drop_nulls().value_counts().sort("count", stage, descending=[True, False])
        if counted.height:
            mark, clips = counted.row(0)
            late = (
                stage in EMBEDDING and settings.embed == Settings().embed
            )  # nobody asked for it: what the catalog has comes first
            found, problem = settings_for(stage, mark, [*candidates[1:], settings] if late else candidates)
            planned.append(Planned(stage, mark, clips, int(counted["count"].sum()) - clips, found, problem))
    return planned


def plan_embedding(settings: Settings, planned: list[Planned]) -> Planned:
    """Whose features both sides are compared by: what the settings ask for; else what most training clips have, if it
    can be had here; else what there is here (the package's features without any weights). `problem`: none can be
    had."""
    had = next((p for p in planned if p.stage == "embed"), None)
    asked = settings.embed != Settings().embed
    if had and had.settings and not asked:
        return had
    try:
        scorable(["embed"], settings)
        chosen = resolve(settings, ["embed"])
    except ConfigError as e:
        return Planned("embed", "", 0, 0, None, str(e))
    return Planned("embed", fingerprint("embed", chosen), 0, 0, _named(settings, chosen))


def score_samples(scorer: Scorer, root: str, planned: list[Planned]) -> None:
    """Run on a result catalog what its clips lack of these stages."""
    catalog = Catalog(root)
    lacking = [p for p in planned if p.settings is not None and _lack(catalog, p)]
    for chosen, stages in _runs(lacking):
        scorer.run(root, chosen, stages)


def _runs(planned: list[Planned]) -> list[tuple[Settings, list[str]]]:
    """Settings, and the stages to run under them: all at once where one set of settings gives every fingerprint."""
    chosen_for = [(p.stage, p.settings) for p in planned if p.settings is not None]
    if not chosen_for:
        return []
    merged = chosen_for[0][1]
    for stage, settings in chosen_for:
        sections = {stage, "embed" if stage in EMBEDDING else stage, "images", "models"} & set(Settings.model_fields)
        merged = merged.model_copy(update={name: getattr(settings, name) for name in sections})
    if _gives(merged, planned):
        return [(merged, _with_embed([p.stage for p in planned]))]
    groups: dict[str, tuple[Settings, list[str]]] = {}
    for stage, settings in chosen_for:
        groups.setdefault(settings.model_dump_json(), (settings, []))[1].append(stage)
    runs = [(chosen, _with_embed(stages)) for chosen, stages in groups.values()]
    return sorted(runs, key=lambda run: "letterbox" not in run[1])  # its crop box is what others look at


def _gives(settings: Settings, planned: list[Planned]) -> bool:
    """Whether the settings give every stage its fingerprint."""
    try:
        found = resolve(settings, [p.stage for p in planned])
    except ConfigError:  # sections that do not go together
        return False
    return all(fingerprint(p.stage, found) == p.fingerprint for p in planned)


def _with_embed(stages: list[str]) -> list[str]:
    """The stages, with that whose vectors some of them take."""
    return list(dict.fromkeys([*(["embed"] if set(stages) & set(FROM_EMBEDDINGS) else []), *stages]))


def settings_for(stage: str, mark: str, candidates: list[Settings]) -> tuple[Settings | None, str]:
    """The first of the settings under which a stage has a fingerprint; else why there are none."""
    problem = "it was made by another version of the stage, or with settings that no run of the catalog recorded"
    for given in candidates:
        for each in _variants(given):
            try:
                scorable([stage], each)
                found = resolve(each, [stage])
                if fingerprint(stage, found) == mark:
                    return _named(each, found), ""
            except ConfigError as e:
                problem = str(e)
    return None, problem


def _named(settings: Settings, resolved: Settings) -> Settings:
    """Settings that ask for the model which was found in place of one whose weights are not here: nobody looks for
    those again, and says so again."""
    if resolved.embed.model != EFFICIENTNET:
        return settings
    return settings.model_copy(
        update={"embed": settings.embed.model_copy(update={"model": EFFICIENTNET, "weights": None})}
    )


def _variants(settings: Settings) -> Iterator[Settings]:
    """Settings as a run recorded them, after it had found weights, and as they may have been given: a folder of weights
    gave its name to the model."""
    yield settings
    embed = settings.embed
    if embed.weights and "/" not in embed.model:
        yield settings.model_copy(update={"embed": embed.model_copy(update={"model": embed.weights, "weights": None})})


def _recorded(catalog: Catalog) -> Iterator[Settings]:
    """Different settings of the catalog's ingests and scorings, the newest first."""
    runs = (
        catalog.scan("runs").filter(pl.col("pipeline").is_in(["ingest", "score"])).sort("started_at", descending=True)
    )
    seen = set()
    for text in runs.select("config").collect()["config"]:
        values = {name: value for name, value in json.loads(text).items() if name in Settings.model_fields}
        told = json.dumps(values, sort_keys=True)
        if told in seen:
            continue
        seen.add(told)
        try:
            yield Settings.model_validate(values)
        except ValidationError:  # of an older datakit
            continue


def _lack(catalog: Catalog, planned: Planned) -> bool:
    """Whether a clip of the catalog has not been through the stage at the planned fingerprint."""
    if planned.stage == "embed":
        there = catalog.embeddings().filter(pl.col("fingerprint") == planned.fingerprint).select("clip_id")
        return catalog.finished_clips().join(there, on="clip_id", how="anti").select(pl.len()).collect().item() > 0
    clips = catalog.clips(columns=["clip_id", "stage_versions", "caption"])
    if planned.stage in FROM_EMBEDDINGS:  # nothing can be said of clips without a frame, or a caption
        blank = (
            catalog.embeddings()
            .group_by("clip_id")
            .agg(pl.col("vector").is_null().all().alias("blank"))
            .filter("blank")
        )
        clips = clips.join(blank, on="clip_id", how="anti")
    if planned.stage == "caption_match":
        clips = clips.filter(pl.col("caption").is_not_null())
    marks = clips.select(mark_of(planned.stage).alias("mark")).collect()["mark"]
    return bool((plain_marks(marks).fill_null("") != planned.fingerprint).any())


def plain_marks(marks: pl.Series) -> pl.Series:
    """Fingerprints without what they say of single clips (`caption_match`: of the caption)."""
    return marks.str.split(".").list.first()
