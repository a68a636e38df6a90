"""Samples that are to be made, through the passes (paint, encode, denoise, decode) and into the result catalog.

The command does this with many actors and thousands of samples, the page with one worker and a few: what differs is who
performs a pass, and on how many samples at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from catalogs.records.runs import RunRecord
from datakit.process.messages import Failed
from pipelines.recipes.recipe import load_recipe
from sampler.generation.artifact_store import Store
from sampler.generation.model_source import Checkpoint
from sampler.generation.passes import given_key, picture_of, text_key
from sampler.generation.prompt_completion import worded
from sampler.generation.result_catalog import RECIPE, Results
from sampler.generation.sample_spec import Sample
from sampler.settings import SampleSettings
from trainer.diffusion.conditioning import MODES

ENCODED_TOGETHER = 16
DECODED_TOGETHER = 4
"""Samples of a call: what is lost when a process dies."""
COMMIT_S = 60.0
"""Between commits of what became of samples."""
STATUS = {"paint": "queued", "encode": "encoded", "denoise": "denoised"}
"""Of a sample after a pass."""

Perform = Callable[[str, Iterable[list[Sample]]], Iterable[tuple[list[Sample], list[Any]]]]
"""Name of a pass and lists of samples of one shape and mode -> each list, or a part of it, with its answers."""


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
class Making:
    """What samples are made of and where to.

    Attributes:
        store: for what passes leave for each other.
        done: counts what becomes of samples.
    """

    results: Results
    checkpoint: Checkpoint
    settings: SampleSettings
    store: Store
    done: Sampled


def recorded(
    making: Making,
    todo: list[Sample],
    known: dict[str, dict[str, Any]],
    ray: str,
    make: Callable[[list[Sample], str], None],
) -> None:
    """Make samples, with a row of `runs` that says how.

    Args:
        known: rows of samples that are in the catalog.
        ray: where language models run that complete prompts.
        make: has samples go through `run_passes`; is told the run's id.
    """
    settings, recipe = making.settings, load_recipe(RECIPE)
    config = {
        **settings.model_dump(mode="json"),
        "checkpoint": making.checkpoint.name,
        "checkpoint_hash": making.checkpoint.hash,
        "recipe": recipe.label,
        "recipe_rules": recipe.file.model_dump(),
    }
    record = RunRecord(making.results.open(), "sample", config)
    with record.running() as counts:
        todo = worded(todo, known, settings, ray)
        making.results.enter(todo, settings, making.checkpoint, record.run_id)
        make(todo, record.run_id)
        making.results.decide()
        if making.done.there + making.done.done + making.done.failed != making.done.asked:
            raise AssertionError(f"accounting: {making.done}")
        making.done.wall_s = time.monotonic() - record.started
        counts.update(asdict(making.done))
        record.spend(making.done.seconds)
    if not settings.work.keep:
        making.store.clear()


def run_passes(
    making: Making,
    samples: list[Sample],
    together: int,
    run_id: str,
    perform: Perform,
    on_pass: Callable[[str, int, int], None],
) -> list[Sample]:
    """All passes over some samples; what earlier attempts left in the store is not computed again.

    Args:
        together: samples that are denoised at once.
        on_pass: told of a pass by name, when it begins and when samples are through it: how many, of how many.

    Returns:
        the samples that were made.
    """
    passes = Passes(making, run_id, perform, on_pass)
    todo = [s for s in samples if not making.store.has("latents", s.sample_id)]
    ready = [s for s in samples if making.store.has("latents", s.sample_id)]
    unpainted = [s for s in todo if s.painted and not picture_of(making.results.folder, s).exists()]
    failed = passes.run("paint", unpainted, ENCODED_TOGETHER)
    unencoded = [s for s in todo if s not in failed and not is_encoded(making, s)]
    failed |= passes.run("encode", unencoded, ENCODED_TOGETHER)
    todo = [s for s in todo if s not in failed]
    failed |= passes.run("denoise", todo, together)
    failed |= passes.run("decode", [*ready, *(s for s in todo if s not in failed)], DECODED_TOGETHER)
    return [s for s in samples if s not in failed]


class Passes:
    """One pass after the other, and what became of samples in the catalog."""

    def __init__(self, making: Making, run_id: str, perform: Perform, on_pass: Callable[[str, int, int], None]):
        self._making, self._run_id, self._perform, self._on_pass = making, run_id, perform, on_pass

    def run(self, name: str, samples: list[Sample], size: int) -> set[Sample]:
        """One pass over samples, in lists of so many of a shape; what became of them is committed now and then. Gives
        those that failed."""
        failed: set[Sample] = set()
        if not samples:
            return failed
        done, answers = self._making.done, []
        count, committed = 0, time.monotonic()
        self._on_pass(name, 0, len(samples))
        for items, results in self._perform(name, lists_of(samples, size)):
            for sample, answer in zip(items, results, strict=True):
                answers.append((sample, answer))
                if isinstance(answer, Failed):
                    failed.add(sample)
                    done.fail(sample, answer)
                else:
                    done.spend(name, answer.seconds)
                    done.done += name == "decode"
            count += len(items)
            self._on_pass(name, count, len(samples))
            if time.monotonic() - committed > COMMIT_S:
                self._commit(name, answers)
                answers, committed = [], time.monotonic()
        self._commit(name, answers)
        return failed

    def _commit(self, name: str, answers: list[tuple[Sample, Any]]) -> None:
        """Enter what became of samples; the latents of finished files are not needed any more."""
        making = self._making
        if not answers:
            return
        if name != "decode":
            making.results.passed(STATUS[name], answers)
            return
        making.results.written(answers, self._run_id)
        if not making.settings.work.keep:
            for sample, answer in answers:
                if not isinstance(answer, Failed):
                    making.store.drop("latents", sample.sample_id)


def is_encoded(making: Making, sample: Sample) -> bool:
    """Whether the texts and the condition of a sample are in the store."""
    store, mode = making.store, MODES[sample.mode]
    if not all(store.has("texts", text_key(making.checkpoint, text)) for text in (sample.text, sample.negative)):
        return False
    return not (mode.head or mode.tail) or store.has("given", given_key(making.checkpoint, making.settings, sample))


def lists_of(samples: Sequence[Sample], size: int) -> Iterator[list[Sample]]:
    """Lists of samples of one shape and mode, in order."""
    alike: dict[tuple, list[Sample]] = {}
    for one in samples:
        alike.setdefault((one.shape, one.mode), []).append(one)
    for group in alike.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]
