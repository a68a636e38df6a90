"""`datakit run caption` and `datakit run refine`: texts about the clips of a catalog, into its table `captions`.

A clip is asked about once per style and model: what was answered at the same fingerprint (prompt, model, frames,
sampling) is not asked again. Answers are committed now and then, keyed by clip, style and model; so a run that
is killed goes on where it was, and nothing is entered twice.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime

import polars as pl

from catalogs.query.where import parse_where
from catalogs.records.runs import RunRecord
from catalogs.tables.arrow_types import full_rows
from catalogs.tables.catalog import Catalog
from datakit.errors import ConfigError, ErrorKind
from datakit.hashing import hash_hex
from datakit.identity import caption_id
from datakit.process.messages import ToolSpec
from datakit.source import present
from datakit.weights.registry import weights_hash
from pipelines.captioning.caption_quality import UNUSABLE, repeated_texts
from pipelines.captioning.captioner import STALL_S, Question
from pipelines.captioning.language_id import check_language
from pipelines.captioning.language_model import (
    check_language_model,
    engine_options,
    is_local,
    model_name,
    weights_folder,
)
from pipelines.captioning.prompt_templates import FACTS as FACTS_OF_PROMPTS
from pipelines.captioning.prompt_templates import Prompt, load_prompt
from pipelines.executor.flow import Flow, Outcome, add_up
from pipelines.executor.flow_setup import ROWS_ONLY, jobs_of_clips, language_model_pool, worker_limits
from pipelines.executor.session import RaySession
from pipelines.recipes.decide import redecide
from pipelines.settings import Caption, LanguageModel, Refine, Settings
from pipelines.video_tasks.messages import CLIP_FACTS, CaptionJob, ClipSpan
from pipelines.video_tasks.passthrough import RowJob

CLIPS_A_JOB = 8
"""Answers are committed job by job."""
CAPTIONS_A_COMMIT = 2000
WHERE = "status in ('kept', 'pending')"
DUPLICATE = "duplicate"
NUMBERS = ("backend", "temperature", "top_p", "seed", "max_tokens", "dtype")
"""Settings that change what a model writes (the backend only by rounding, but see `captions.backend`)."""


@dataclass
class Captioned:
    """What a run did."""

    clips: int = 0
    captions: int = 0
    failed: int = 0
    flags: dict[str, int] = field(default_factory=dict)
    statuses: dict[str, int] | None = None
    stage_cpu_s: dict[str, float] = field(default_factory=dict)
    wall_s: float = 0.0


def caption(
    root: str,
    settings: Settings = Settings(),
    where: str | None = None,
    retry_failed: bool = False,
    ray: str = "local",
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> Captioned:
    """Caption the clips that match `where` (SQL over the view `clips`; None: those kept or pending), in every style
    of `caption.styles` that they lack.

    Args:
        retry_failed: ask again where there was an error.
        on_progress: called with clips done and clips in all.

    Raises:
        ConfigError: unknown prompt, missing library or weights.
        EngineDown: the model cannot be started, or the endpoint stays away; what was answered is committed.
    """
    return _run("caption", root, settings, where, retry_failed, ray, on_progress)


def refine(
    root: str,
    settings: Settings = Settings(),
    where: str | None = None,
    retry_failed: bool = False,
    ray: str = "local",
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> Captioned:
    """Have a language model rewrite the captions of style `refine.source`, as new ones of style `refine.style`; the
    originals stay. Arguments as for `caption`."""
    return _run("refine", root, settings, where, retry_failed, ray, on_progress)


def _run(pipeline: str, root: str, settings: Settings, where, retry_failed, ray, on_progress) -> Captioned:
    settings = check_captioning(settings, pipeline)
    catalog = Catalog(root)
    condition = parse_where(where if where is not None else WHERE)
    session = RaySession(ray)
    record = RunRecord(catalog, pipeline, {**settings.model_dump(), "where": where}).begin()
    try:
        with session:
            result = fill_captions(
                session, catalog, settings, pipeline, condition, record.run_id, retry_failed, on_progress
            )
        record.spend(result.stage_cpu_s)
        result.statuses = redecide(catalog)
        result.wall_s = time.monotonic() - record.started
        record.end("finished", asdict(result))
    except BaseException as e:
        record.fail(e)
        raise
    return result


def check_captioning(settings: Settings, pipeline: str = "caption") -> Settings:
    """The settings, seen to make sense; before anything starts.

    Raises:
        ConfigError: which of prompt, library, model or endpoint is wrong or missing, and how to bring it.
    """
    section: Caption | Refine = getattr(settings, pipeline)
    check_language(section.language)
    check_language_model(section, pipeline, settings.models.folder)
    for question in questions(settings, pipeline).values():
        if pipeline == "refine" and "caption" not in question.prompt.placeholders:
            raise ConfigError(
                f"prompt {question.prompt.name} has no place {{caption}}: refine has nothing to rewrite with it"
            )
        if pipeline == "caption" and "caption" in question.prompt.placeholders:
            raise ConfigError(f"prompt {question.prompt.name} rewrites captions: it is for `datakit run refine`")
    return settings


def questions(settings: Settings, pipeline: str) -> dict[str, Question]:
    """What is asked, by style.

    Raises:
        ConfigError: unknown or malformed prompt; two prompts of one name.
    """
    if pipeline == "refine":
        prompt = load_prompt(settings.refine.prompt)
        return {
            settings.refine.style: Question(settings.refine.style, prompt, _fingerprint(prompt, settings, pipeline))
        }
    prompts = [load_prompt(name) for name in settings.caption.styles]
    if len({p.name for p in prompts}) < len(prompts):
        raise ConfigError("caption.styles: two prompts have the same name")
    return {p.name: Question(p.name, p, _fingerprint(p, settings, pipeline)) for p in prompts}


def fill_captions(
    session: RaySession,
    catalog: Catalog,
    settings: Settings,
    pipeline: str,
    condition: pl.Expr,
    run_id: str,
    retry_failed: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> Captioned:
    """Ask about the clips that match and enter the answers; see `caption`."""
    asked = questions(settings, pipeline)
    section: Caption | Refine = getattr(settings, pipeline)
    with catalog.reading():
        todo = (_captions_to_refine if pipeline == "refine" else _clips_to_caption)(
            catalog, settings, asked, condition, retry_failed
        )
    result = Captioned(clips=todo.height)
    if not todo.height:
        return result
    clips_of = jobs_of_clips(todo, CLIPS_A_JOB)
    flow = _flow(session, settings, pipeline, asked)
    writer = _Writer(catalog, section, asked, run_id, result)
    done = 0
    try:
        for outcome in flow.run(_jobs(clips_of, settings, pipeline)):
            if outcome is not None:
                clips = clips_of.pop(outcome.key)
                writer.take(outcome, clips)
                done += len(clips)
                on_progress(done, todo.height)
            writer.commit_if_due(settings.runner.commit_s)
    finally:
        flow.close()
        writer.commit()
    result.flags[DUPLICATE] = flag_repeated(catalog)
    result.flags = {name: count for name, count in sorted(result.flags.items()) if count}
    return result


def flag_repeated(catalog: Catalog) -> int:
    """Set the flag `duplicate` on captions that say the same of unrelated clips, take it from others; how many have
    it."""
    clips = catalog.clips().select("clip_id", "video_id", "duplicate_group")
    rows = (
        catalog.captions()
        .filter(pl.col("text").is_not_null())
        .select("caption_id", "clip_id", "shard", "style", "text", "flags")
    )
    rows = rows.join(clips, on="clip_id").collect()
    repeated = repeated_texts(rows)
    has = pl.col("flags").list.contains(DUPLICATE).fill_null(False)
    should = pl.col("caption_id").is_in(list(repeated))
    wrong = rows.filter(has != should).with_columns(
        flags=pl.when(should)
        .then(pl.concat_list("flags", pl.lit(DUPLICATE)))
        .otherwise(pl.col("flags").list.set_difference([DUPLICATE]))
    )
    catalog.upsert("captions", wrong.select("caption_id", "shard", "flags"), only="update")
    return len(repeated)


class _Writer:
    """Turns outcomes into rows of `captions`, and merges them in."""

    def __init__(
        self, catalog: Catalog, section: LanguageModel, asked: dict[str, Question], run_id: str, result: Captioned
    ):
        self._catalog, self._asked, self._run_id, self._result = catalog, asked, run_id, result
        self._section = section
        self._rows: list[dict] = []
        self._committed_at = time.monotonic()

    def take(self, outcome: Outcome, clips: list[dict]) -> None:
        add_up(self._result.stage_cpu_s, outcome.cpu_s)
        answered = {row["clip_id"]: row for row in outcome.rows}
        for clip in clips:
            row = answered.get(clip["clip_id"], {})
            captions = row.get("captions")
            if captions is None:
                problem = outcome.failure or row["errors"][0]
                captions = self._failures(clip, problem)
            self._rows += [{**caption, **self._identity(clip, caption["style"])} for caption in captions]

    def commit_if_due(self, seconds: float) -> None:
        if self._rows and (time.monotonic() - self._committed_at > seconds or len(self._rows) > CAPTIONS_A_COMMIT):
            self.commit()

    def commit(self) -> None:
        rows, self._rows = self._rows, []
        self._committed_at = time.monotonic()
        if not rows:
            return
        self._catalog.upsert("captions", full_rows("captions", rows))
        for row in rows:
            self._result.captions += row["text"] is not None
            self._result.failed += row["text"] is None
            for flag in row["flags"]:
                self._result.flags[flag] = self._result.flags.get(flag, 0) + 1

    def _identity(self, clip: dict, style: str) -> dict[str, object]:
        return {
            "caption_id": caption_id(clip["clip_id"], style, model_name(self._section)),
            "clip_id": clip["clip_id"],
            "shard": clip["shard"],
            "run_id": self._run_id,
            "created_at": datetime.now(UTC),
        }

    def _failures(self, clip: dict, problem) -> list[dict]:
        """A clip that could not be shown or asked about, as a row for each style."""
        kind, message = (
            (problem["kind"], problem["message"]) if isinstance(problem, dict) else (str(problem.kind), problem.message)
        )
        return [
            {
                "style": style,
                "model": model_name(self._section),
                "backend": self._section.backend,
                "prompt_hash": self._asked[style].prompt.hash,
                "fingerprint": clip.get("fingerprint") or self._asked[style].fingerprint,
                "made_from": clip.get("made_from"),
                "text": None,
                "flags": [],
                "error_kind": kind or str(ErrorKind.STAGE),
                "error": message,
            }
            for style in clip["styles"]
        ]


def _flow(session: RaySession, settings: Settings, pipeline: str, asked: dict[str, Question]) -> Flow:
    section: Caption | Refine = getattr(settings, pipeline)
    pictures = pipeline == "caption"
    options = {
        "options": engine_options(section, settings.models.folder),
        "questions": asked,
        "language": section.language,
        "as_video": pictures and settings.caption.input != "images",
        "stall_s": STALL_S,
    }
    spec = ToolSpec("pipelines.captioning.captioner:Captioner", options)
    pool = language_model_pool("caption", spec, ("captions",), section, session.gpus(), pictures)
    tool = "pipelines.video_tasks.sample_frames:sample" if pictures else ROWS_ONLY.target
    return Flow(session, worker_limits(settings, tool), [pool], settings.runner.workers, settings.runner.attempts)


def _fingerprint(prompt: Prompt, settings: Settings, pipeline: str) -> str:
    """Hash of all that decides an answer but the clip."""
    section: Caption | Refine = getattr(settings, pipeline)
    parts: list = [
        prompt.hash,
        {name: getattr(section, name) for name in NUMBERS if name != "backend"},
        section.language,
    ]
    parts.append(weights_hash(weights_folder(section, settings.models.folder)) if is_local(section) else section.model)
    if pipeline == "caption":
        parts += [settings.caption.fps, settings.caption.frames, settings.caption.side, settings.caption.input]
    return hash_hex(json.dumps(parts, sort_keys=True), 8)


def _clips_to_caption(
    catalog: Catalog, settings: Settings, asked: dict[str, Question], condition: pl.Expr, retry_failed: bool
) -> pl.DataFrame:
    """Clips that lack a style, with what their jobs need and the `styles` they lack."""
    clips = catalog.clips().filter(condition)
    for style, question in asked.items():
        answered = _answered(catalog, style, model_name(settings.caption), retry_failed).filter(
            pl.col("fingerprint") == question.fingerprint
        )
        clips = clips.join(answered.select("clip_id", pl.lit(True).alias(f"has {style}")), on="clip_id", how="left")
    lacks = [pl.when(pl.col(f"has {style}").is_null()).then(pl.lit(style)) for style in asked]
    videos = catalog.scan("videos").select("video_id", "uris")
    return (
        clips.with_columns(styles=pl.concat_list(lacks).list.drop_nulls())
        .filter(pl.col("styles").list.len() > 0)
        .select(
            "clip_id",
            "video_id",
            "shard",
            "stream",
            "start_pts",
            "end_pts",
            *CLIP_FACTS,
            "camera_motion",
            (pl.col("end_s") - pl.col("start_s")).alias("duration"),
            "styles",
        )
        .join(videos, on="video_id")
        .sort("video_id", "start_pts")
        .collect()
    )


def _captions_to_refine(
    catalog: Catalog, settings: Settings, asked: dict[str, Question], condition: pl.Expr, retry_failed: bool
) -> pl.DataFrame:
    """Clips with a usable caption of the source style that was not rewritten yet (by newest, where several models
    wrote one)."""
    own, (style, question) = settings.refine, next(iter(asked.items()))
    usable = (pl.col("style") == own.source) & pl.col("text").is_not_null()
    usable &= ~pl.col("flags").list.eval(pl.element().is_in(list(UNUSABLE))).list.any().fill_null(False)
    source = (
        catalog.captions()
        .filter(usable)
        .sort("created_at", "caption_id", descending=True)
        .unique("clip_id", keep="first", maintain_order=True)
    )
    source = source.select("clip_id", pl.col("caption_id").alias("made_from"), pl.col("text").alias("source_text"))
    clips = (
        catalog.clips()
        .filter(condition)
        .select(
            "clip_id",
            "video_id",
            "shard",
            "camera_motion",
            (pl.col("end_s") - pl.col("start_s")).alias("duration"),
            "start_pts",
        )
    )
    before = _answered(catalog, style, model_name(own), retry_failed).select(
        "clip_id", pl.col("fingerprint").alias("before")
    )
    rows = (
        clips.join(source, on="clip_id").join(before, on="clip_id", how="left").sort("video_id", "start_pts").collect()
    )
    marks = [_source_mark(question.fingerprint, text) for text in rows["source_text"]]
    rows = rows.with_columns(fingerprint=pl.Series(marks, dtype=pl.String), styles=pl.lit([style])).rename(
        {"source_text": "caption"}
    )
    return rows.filter(pl.col("before").is_null() | (pl.col("before") != pl.col("fingerprint")))


def _answered(catalog: Catalog, style: str, model: str, retry_failed: bool) -> pl.LazyFrame:
    """Captions of a style by a model that are not to be asked for again."""
    rows = catalog.scan("captions").filter((pl.col("style") == style) & (pl.col("model") == model))
    return rows.filter(pl.col("error_kind").is_null()) if retry_failed else rows


def _source_mark(fingerprint: str, text: str) -> str:
    return f"{fingerprint}.{hash_hex(text, 6)}"


def _jobs(clips_of: dict[str, list[dict]], settings: Settings, pipeline: str) -> Iterator:
    for key, clips in list(clips_of.items()):
        make = _row_job if pipeline == "refine" else _caption_job
        yield key, lambda threads, clips=clips, make=make: make(clips, settings)


def _caption_job(clips: list[dict], settings: Settings) -> CaptionJob:
    own, address = settings.caption, present(clips[0]["uris"])
    spans = tuple(
        ClipSpan(
            c["clip_id"],
            c["start_pts"],
            c["end_pts"],
            {**{k: c[k] for k in CLIP_FACTS}, "styles": c["styles"], "facts": _facts(c)},
        )
        for c in clips
    )
    return CaptionJob(
        clips[0]["video_id"], address["uri"], address["size"], clips[0]["stream"], spans, own.fps, own.frames, own.side
    )


def _row_job(clips: list[dict], settings: Settings) -> RowJob:
    return RowJob(
        tuple(
            {
                "clip_id": c["clip_id"],
                "styles": c["styles"],
                "facts": _facts(c),
                "fingerprint": c["fingerprint"],
                "made_from": c["made_from"],
            }
            for c in clips
        )
    )


def _facts(clip: dict) -> dict[str, object]:
    """What prompts have places for."""
    return {name: clip[name] for name in FACTS_OF_PROMPTS if clip.get(name) is not None}
