"""`datakit sample`: prompts in, videos and a result catalog out.

Samples go through three passes (encode, denoise, decode) in waves, so that what passes leave for each other fits a
bounded piece of disk. What is there is not done again: after a kill, in whichever pass, the same command goes on with
what is missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from catalogs.records.runs import RunRecord
from datakit.errors import ConfigError
from datakit.process.messages import Failed
from pipelines.executor.actor_pool import ActorPool
from pipelines.executor.session import RaySession
from pipelines.recipes.recipe import load_recipe
from sampler.generation.artifact_store import Store
from sampler.generation.cost_estimate import Estimate, estimate
from sampler.generation.model_source import Checkpoint, open_checkpoint
from sampler.generation.passes import Worker, given_key, picture_of, text_key
from sampler.generation.prompt_completion import worded
from sampler.generation.result_catalog import RECIPE, Results
from sampler.generation.sample_spec import Sample, expand, mode_of
from sampler.generation.text_to_image import check_painter
from sampler.prompts.llm_rewrite import check_language_model
from sampler.prompts.prompt import Prompt, check_references
from sampler.settings import SampleSettings
from trainer.diffusion.conditioning import MODES
from trainer.models.autoencoders.base import Autoencoder
from trainer.models.common.text_encoders import check_text_encoder

WORK = "work"
"""Folder of a run's results, for what passes leave for each other; none of the catalog's."""
MOST_TOGETHER = 8
"""Samples denoised together on a GPU where nothing is set: beyond, a large model gains nothing."""
TOGETHER_TOKENS = 80_000
"""Tokens denoised together on a GPU where nothing is set: what saturates it."""
ENCODED_TOGETHER = 16
DECODED_TOGETHER = 4
"""Samples of a call: what is lost when a process dies."""
COMMIT_S = 60.0
"""Between commits of what became of samples."""
STATUS = {"paint": "queued", "encode": "encoded", "denoise": "denoised"}
"""Of a sample after a pass."""


@dataclass
class Sampled:
    """What a run did: `asked` = `there` + `done` + `failed`.

    Attributes:
        there: done by an earlier run.
        kinds: of failures.
        seconds: of actors, by pass.
    """

    asked: int = 0
    there: int = 0
    done: int = 0
    failed: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    first_problems: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    wall_s: float = 0.0

    def fail(self, sample: Sample, failure: Failed) -> None:
        self.failed += 1
        self.kinds[str(failure.kind)] = self.kinds.get(str(failure.kind), 0) + 1
        if len(self.first_problems) < 5:
            self.first_problems.append(f"{sample.name}: {failure.message}")

    def spend(self, what: str, seconds: float) -> None:
        self.seconds[what] = self.seconds.get(what, 0.0) + seconds


@dataclass(frozen=True)
class Progress:
    """`wave` of `waves`; in its pass `name`, `done` of `of` samples."""

    wave: int
    waves: int
    name: str
    done: int
    of: int


def sample(
    prompts: Sequence[Prompt],
    ckpt: str,
    out: str,
    settings: SampleSettings = SampleSettings(),
    ray: str = "local",
    dry_run: bool = False,
    on_start: Callable[[Estimate], None] = lambda estimate: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Sampled:
    """Sample videos.

    Args:
        ckpt: folder of a training run, one of its checkpoints, or weights.
        out: folder of the results; the same command again makes what is missing.
        dry_run: only check and estimate.

    Raises:
        ConfigError, MissingDependency: options, prompts, references or weights that make no sense or are not there;
            before any model is loaded or file written.
    """
    started = time.monotonic()
    results = Results(out)
    checkpoint = open_checkpoint(ckpt, settings)
    autoencoder = checkpoint.describe_autoencoder()
    samples = checked_samples(prompts, settings, checkpoint, autoencoder)
    session = RaySession(ray)
    known = results.known()
    todo = [s for s in samples if not results.is_done(known.get(s.sample_id))]
    found = estimate(samples, todo, settings, checkpoint, autoencoder, results.folder)
    on_start(found)
    done = Sampled(len(samples), len(samples) - len(todo))
    if not dry_run and todo:
        found.check_space()
        with session:
            _Run(session, results, checkpoint, settings, autoencoder, done, on_progress).make(todo, known, found)
    done.wall_s = time.monotonic() - started
    return done


def checked_samples(
    prompts: Sequence[Prompt], settings: SampleSettings, checkpoint: Checkpoint, autoencoder: Autoencoder
) -> list[Sample]:
    """The samples that prompts ask for. Raises as `sample`."""
    if not prompts:
        raise ConfigError("there is no prompt to sample")
    if settings.prompt.refine or settings.prompt.motion == "auto":
        check_language_model(settings.llm)
    check_text_encoder(checkpoint.text.kind, **checkpoint.text.options)
    if settings.image.model is not None:
        check_painter(settings.image.model)
    samples = expand(prompts, settings, checkpoint, autoencoder)
    unpainted = [prompt for prompt in prompts if prompt.references or settings.image.model is None]
    check_references(unpainted, mode_of(settings), samples[0].fps)
    names: dict[str, str] = {}
    for one in samples:
        if names.setdefault(one.name, one.sample_id) != one.sample_id:
            raise ConfigError(f"two samples would have the file {one.name}: give their prompts other names")
    return samples


class _Run:
    """The way of samples that are to be made through the passes."""

    def __init__(
        self,
        session: RaySession,
        results: Results,
        checkpoint: Checkpoint,
        settings: SampleSettings,
        autoencoder: Autoencoder,
        done: Sampled,
        on_progress: Callable[[Progress], None],
    ):
        self.session, self.results, self.checkpoint, self.settings = session, results, checkpoint, settings
        self.autoencoder, self.done, self.on_progress = autoencoder, done, on_progress
        self.store = Store(results.folder / WORK)

    def make(self, todo: list[Sample], known: dict[str, dict[str, Any]], found: Estimate) -> None:
        catalog = self.results.open()
        recipe = load_recipe(RECIPE)
        record = RunRecord(
            catalog,
            "sample",
            {
                **self.settings.model_dump(mode="json"),
                "checkpoint": self.checkpoint.name,
                "checkpoint_hash": self.checkpoint.hash,
                "recipe": recipe.label,
                "recipe_rules": recipe.file.model_dump(),
            },
        )
        self.run_id = record.run_id
        with record.running() as counts:
            todo = worded(todo, known, self.settings, self.session.address)
            self.results.enter(todo, self.settings, self.checkpoint, self.run_id)
            pool = self._pool()
            try:
                waves = list(_waves(todo, found.work_bytes_of, self.settings.work.work_gb * 1e9))
                for number, wave in enumerate(waves):
                    self._wave(pool, wave, (number + 1, len(waves)))
            finally:
                pool.close()
            self.results.decide()
            if self.done.there + self.done.done + self.done.failed != self.done.asked:
                raise AssertionError(f"accounting: {self.done}")
            counts.update(asdict(self.done))
            record.spend(self.done.seconds)
        if not self.settings.work.keep:
            self.store.clear()

    def _wave(self, pool: ActorPool, wave: list[Sample], where: tuple[int, int]) -> None:
        """All passes over some samples."""
        folder, batch = self.results.folder, self.settings.work.batch
        todo = [s for s in wave if not self.store.has("latents", s.sample_id)]
        ready = [s for s in wave if self.store.has("latents", s.sample_id)]
        unpainted = [s for s in todo if s.painted and not picture_of(folder, s).exists()]
        lost = self._pass(pool, "paint", unpainted, ENCODED_TOGETHER, where)
        unencoded = [s for s in todo if s not in lost and not self._is_encoded(s)]
        lost |= self._pass(pool, "encode", unencoded, ENCODED_TOGETHER, where)
        todo = [s for s in todo if s not in lost]
        lost |= self._pass(
            pool, "denoise", todo, batch or self._batch(wave[0]), where, divide=batch is None, alone=False
        )
        self._pass(pool, "decode", [*ready, *(s for s in todo if s not in lost)], DECODED_TOGETHER, where)
        if not self.settings.work.keep:
            for one in wave:
                self.store.drop("texts", text_key(self.checkpoint, one.text))
                self.store.drop("given", given_key(self.checkpoint, self.settings, one))

    def _pass(
        self,
        pool: ActorPool,
        name: str,
        samples: list[Sample],
        size: int,
        where: tuple[int, int],
        divide: bool = True,
        alone: bool = True,
    ) -> set[Sample]:
        """One pass over samples, in lists of so many of a shape; what became of them is committed now and then. Gives
        those that failed."""
        failed: set[Sample] = set()
        answers: list[tuple[Sample, Any]] = []
        count, committed = 0, time.monotonic()
        for items, found in pool.run(name, lists_of(samples, size), divide, alone):
            for one, answer in zip(items, found, strict=True):
                answers.append((one, answer))
                if isinstance(answer, Failed):
                    failed.add(one)
                    self.done.fail(one, answer)
                else:
                    self.done.spend(name, answer.seconds)
                    self.done.done += name == "decode"
            count += len(items)
            self.on_progress(Progress(*where, name, count, len(samples)))
            if time.monotonic() - committed > COMMIT_S:
                self._commit(name, answers)
                answers, committed = [], time.monotonic()
        self._commit(name, answers)
        return failed

    def _commit(self, name: str, answers: list[tuple[Sample, Any]]) -> None:
        """Enter what became of samples; the latents of finished files are not needed any more."""
        if not answers:
            return
        if name != "decode":
            self.results.passed(STATUS[name], answers)
            return
        self.results.written(answers, self.run_id)
        if not self.settings.work.keep:
            for one, answer in answers:
                if not isinstance(answer, Failed):
                    self.store.drop("latents", one.sample_id)

    def _is_encoded(self, one: Sample) -> bool:
        texts = all(self.store.has("texts", text_key(self.checkpoint, text)) for text in (one.text, one.negative))
        mode = MODES[one.mode]
        return texts and (
            not (mode.head or mode.tail) or self.store.has("given", given_key(self.checkpoint, self.settings, one))
        )

    def _batch(self, first: Sample) -> int:
        if not self._gpus():
            return 1
        tokens = self.checkpoint.architecture.tokens(self.autoencoder.latent_shape(*first.shape)[1:])
        return max(1, min(MOST_TOGETHER, TOGETHER_TOKENS // tokens))

    def _gpus(self) -> float:
        own = self.settings.work
        return own.num_gpus if own.num_gpus is not None else float(self.session.gpus() > 0)

    def _pool(self) -> ActorPool:
        own, gpus = self.settings.work, self._gpus()
        group = own.tensor_parallel * own.sequence_parallel
        cpus = int(self.session.cpus())
        count = own.actors or (max(1, int(self.session.gpus() / gpus) // group) if gpus else 1)
        if gpus and count * group * gpus > self.session.gpus():
            raise ConfigError(
                f"{count} × {group} processes with {gpus:g} GPUs each: the cluster has {self.session.gpus():g}"
            )
        threads = None if gpus else own.threads or max(1, cpus // (count * group))
        num_cpus = own.num_cpus if own.num_cpus is not None else (0.0 if gpus else cpus / (count * group))
        arguments = (self.checkpoint, self.settings, str(self.results.folder), str(self.store.root), gpus > 0, threads)
        return ActorPool(self.session, Worker, arguments, count, group=group, num_cpus=num_cpus, num_gpus=gpus)


def lists_of(samples: Sequence[Sample], size: int) -> Iterator[list[Sample]]:
    """Lists of samples of one shape and mode, in order."""
    alike: dict[tuple, list[Sample]] = {}
    for one in samples:
        alike.setdefault((one.shape, one.mode), []).append(one)
    for group in alike.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _waves(samples: Sequence[Sample], bytes_of: Callable[[Sample], int], room: float) -> Iterator[list[Sample]]:
    """Samples whose files fit the room together; at least one."""
    wave, used = [], 0.0
    for one in samples:
        size = bytes_of(one)
        if wave and used + size > room:
            yield wave
            wave, used = [], 0.0
        wave.append(one)
        used += size
    if wave:
        yield wave
