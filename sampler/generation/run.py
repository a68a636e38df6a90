"""`datakit sample`: prompts in, videos and a result catalog out.

Samples go through three passes (encode, denoise, decode) in waves, so that what passes leave for each other fits a
bounded piece of disk. What is there is not done again: after a kill, in whichever pass, the same command goes on with
what is missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from datakit.errors import ConfigError
from pipelines.executor.actor_pool import ActorPool
from pipelines.executor.session import RaySession
from sampler.generation.artifact_store import Store
from sampler.generation.cost_estimate import Estimate, estimate
from sampler.generation.model_source import Checkpoint, open_checkpoint
from sampler.generation.passes import Worker, given_key, text_key
from sampler.generation.result_catalog import Results
from sampler.generation.run_passes import Making, Sampled, recorded, run_passes
from sampler.generation.sample_spec import Sample, expand, mode_of
from sampler.generation.text_to_image import check_painter
from sampler.prompts.llm_rewrite import check_language_model
from sampler.prompts.prompt import Prompt, check_references
from sampler.settings import SampleSettings
from trainer.models.autoencoders.base import Autoencoder
from trainer.models.common.text_encoders import check_text_encoder

WORK = "work"
"""Folder of a run's results, for what passes leave for each other; none of the catalog's."""
MOST_TOGETHER = 8
"""Samples denoised together on a GPU where nothing is set: beyond, a large model gains nothing."""
TOGETHER_TOKENS = 80_000
"""Tokens denoised together on a GPU where nothing is set: what saturates it."""


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
            making = Making(results, checkpoint, settings, Store(results.folder / WORK), done)
            _Run(session, making, autoencoder, on_progress).make(todo, known, found)
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
    """The way of samples that are to be made through waves of passes, on Ray's actors."""

    def __init__(
        self, session: RaySession, making: Making, autoencoder: Autoencoder, on_progress: Callable[[Progress], None]
    ):
        self.session, self.making, self.settings, self.checkpoint = session, making, making.settings, making.checkpoint
        self.autoencoder, self.on_progress = autoencoder, on_progress

    def make(self, todo: list[Sample], known: dict[str, dict[str, Any]], estimate: Estimate) -> None:
        def in_waves(todo: list[Sample], run_id: str) -> None:
            pool = self._pool()
            try:
                waves = list(_waves(todo, estimate.work_bytes_of, self.settings.work.work_gb * 1e9))
                for number, wave in enumerate(waves, 1):
                    self._wave(pool, wave, run_id, number, len(waves))
            finally:
                pool.close()

        recorded(self.making, todo, known, self.session.address, in_waves)

    def _wave(self, pool: ActorPool, wave: list[Sample], run_id: str, number: int, waves: int) -> None:
        """All passes over some samples."""
        batch = self.settings.work.batch

        def perform(name: str, lists: Iterable[list[Sample]]) -> Iterator[tuple[list[Sample], list[Any]]]:
            denoises = name == "denoise"  # by all of a group, in batches as they are set
            return pool.run(name, lists, divide=not denoises or batch is None, alone=not denoises)

        def tell(name: str, count: int, of: int) -> None:
            if count:
                self.on_progress(Progress(number, waves, name, count, of))

        run_passes(self.making, wave, batch or self._batch(wave[0]), run_id, perform, tell)
        if not self.settings.work.keep:
            for sample in wave:
                self.making.store.drop("texts", text_key(self.checkpoint, sample.text))
                self.making.store.drop("given", given_key(self.checkpoint, self.settings, sample))

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
        folders = str(self.making.results.folder), str(self.making.store.root)
        arguments = (self.checkpoint, self.settings, *folders, gpus > 0, threads)
        return ActorPool(self.session, Worker, arguments, count, group=group, num_cpus=num_cpus, num_gpus=gpus)


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
