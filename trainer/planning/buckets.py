"""The shapes that batches may have: resolution × aspect × frames, and how many samples of each make a micro-batch.

A table in Open-Sora's form, `bucket_config: {256px: {1: [1.0, 45], 33: [0.5, 12]}}`, is read with its meaning: at a
resolution, a clip takes the longest window that it fills, and stays there with the probability given first; else it
goes on to the next lower resolution. `[[p, q], batch]` adds q, the probability that this length is taken rather than
the next shorter one. What was drawn there in every epoch anew is drawn here once for each clip (from its id and
`plan.seed`), so that a plan can be made again. The second number is the batch size; null: from the budget.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from datakit.errors import ConfigError
from trainer.planning.memory_budget import DEFAULT_TOKENS, tokens_that_fit
from trainer.planning.plan import Bucket
from trainer.planning.settings import Keep, PlanSettings


@dataclass(frozen=True)
class Length:
    """A number of frames at a resolution.

    Attributes:
        frames: of a window.
        keep: share of the clips that stay at this resolution with it.
        keep_frames: share of the clips that take it.
        buckets: for every size of the level its index in the table; -1: it takes more tokens than the budget.
    """

    frames: int
    keep: float
    keep_frames: float
    buckets: tuple[int, ...]


@dataclass(frozen=True)
class Level:
    """A resolution: sizes of about the same area, one for each aspect; its lengths, longest first."""

    name: str
    area: int
    sizes: tuple[tuple[int, int], ...]
    lengths: tuple[Length, ...]


@dataclass(frozen=True)
class Table:
    """All buckets, and the levels that they belong to, largest first.

    Attributes:
        budget: tokens of a micro-batch.
        too_large: buckets that take more: name and tokens of a sample.
    """

    levels: tuple[Level, ...]
    buckets: tuple[Bucket, ...]
    budget: int
    too_large: tuple[tuple[str, int], ...]


def bucket_table(settings: PlanSettings) -> Table:
    """Every bucket of the settings.

    Raises:
        ConfigError: an unknown resolution, frames that the autoencoder does not take, a budget that no bucket fits
            into.
    """
    budget = token_budget(settings)
    levels: list[Level] = []
    buckets: list[Bucket] = []
    too_large: list[tuple[str, int]] = []
    for area, name, lengths in _wanted(settings):
        sizes = sizes_of(area, settings.aspects, _multiples(settings))
        found = []
        for frames, (keep, keep_frames, batch) in sorted(lengths.items(), reverse=True):
            indices = []
            for height, width in sizes:
                bucket = _bucket(height, width, frames, batch, budget, settings)
                indices.append(len(buckets) if bucket.batch else -1)
                if bucket.batch:
                    buckets.append(bucket)
                else:
                    too_large.append((bucket.name, bucket.tokens))
            found.append(Length(frames, keep, keep_frames, tuple(indices)))
        levels.append(Level(name, area, sizes, tuple(found)))
    if not buckets:
        name, tokens = min(too_large, key=lambda item: item[1])
        raise ConfigError(
            f"no bucket fits: {name}, the smallest, takes {tokens:,} tokens a sample, the budget is {budget:,} "
            f"(plan.tokens, plan.gpu)"
        )
    _check_weights(settings, buckets)
    return Table(tuple(levels), tuple(buckets), budget, tuple(too_large))


def token_budget(settings: PlanSettings) -> int:
    """Tokens of a micro-batch.

    Raises:
        ConfigError: unknown GPU, or one too small for the model.
    """
    if settings.gpu is not None:
        return tokens_that_fit(settings.gpu, settings.memory)
    return settings.tokens or DEFAULT_TOKENS


def sizes_of(area: int, aspects: Sequence[str], multiples: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """(height, width) of every aspect at an area, duplicates dropped: Open-Sora 2.0's (opensora/datasets/aspect.py),
    for any aspects.

    16:9 is 192 x 336 at 256², 576 x 1024 at 768².

    Args:
        multiples: that height and width are of.
    """
    sizes = []
    for aspect in aspects:
        width, height = map(float, aspect.split(":"))
        upright = height > width
        across, along = multiples
        tall, wide = _landscape(
            area, max(width, height) / min(width, height), (along, across) if upright else (across, along)
        )
        sizes.append((wide, tall) if upright else (tall, wide))
    return tuple(dict.fromkeys(sizes))


def tokens_of(frames: int, height: int, width: int, settings: PlanSettings) -> int:
    """Of a sample: video tokens and text."""
    _, down, across = settings.compression
    return (
        settings.grid.latent_frames(frames) * (height // (down * settings.patch)) * (width // (across * settings.patch))
        + settings.text_tokens
    )


def _bucket(height: int, width: int, frames: int, batch: int | None, budget: int, settings: PlanSettings) -> Bucket:
    """With a batch of 0 where a sample takes more than the budget."""
    tokens = tokens_of(frames, height, width, settings)
    weight = settings.weights.get(frames, 1.0)
    return Bucket(f"{height}x{width}x{frames}", height, width, frames, batch or budget // tokens, tokens, weight)


def _landscape(area: int, ratio: float, multiples: tuple[int, int]) -> tuple[int, int]:
    down, across = multiples
    width = max(int(math.sqrt(area * ratio) // across), 1) * across
    height = max(int(area / width // down), 1) * down
    off = abs(height * width - area)
    for h, w in [(height - down, width), (height + down, width), (height, width - across), (height, width + across)]:
        if h and w and abs(h * w - area) < off:
            height, width, off = h, w, abs(h * w - area)
    return height, width


def _wanted(settings: PlanSettings) -> list[tuple[int, str, dict[int, tuple[float, float, int | None]]]]:
    """(area, resolution, frames -> (keep, keep_frames, batch)), largest first."""
    chosen: dict[str, dict[int, tuple[float, float, int | None]]]
    if settings.bucket_config is None:
        chosen = {name: {frames: (1.0, 1.0, None) for frames in settings.frames} for name in settings.resolutions}
    else:
        chosen = {
            name: {
                frames: (*_probabilities(f"{name}.{frames}", keep), batch) for frames, (keep, batch) in lengths.items()
            }
            for name, lengths in settings.bucket_config.items()
        }
    if not any(chosen.values()):
        raise ConfigError("plan.bucket_config is empty")
    for name, lengths in chosen.items():
        for frames, (_, _, batch) in lengths.items():
            _check_frames(frames, settings)
            if batch is not None and batch < 1:
                raise ConfigError(f"plan.bucket_config.{name}.{frames}: a batch has at least one sample, not {batch}")
    if len({area_of(name) for name in chosen}) < len(chosen):
        raise ConfigError(f"two of the resolutions {', '.join(chosen)} are the same")
    return sorted(
        ((area_of(name), name, lengths) for name, lengths in chosen.items()), reverse=True, key=lambda level: level[0]
    )


def _probabilities(where: str, keep: Keep) -> tuple[float, float]:
    pair = keep if isinstance(keep, tuple) else (keep, 1.0)
    if not all(0 <= p <= 1 for p in pair):
        raise ConfigError(f"plan.bucket_config.{where}: a probability lies between 0 and 1, not {keep}")
    return pair


def _check_frames(frames: int, settings: PlanSettings) -> None:
    below, above = settings.grid.around(frames)
    if below != above:
        time = settings.compression[0]
        if not settings.causal and below == 1:  # two videos, rather than a picture
            below, above = above, above + time
        takes = (
            f"a causal autoencoder takes {settings.grid.rule}"
            if settings.causal
            else f"this autoencoder (plan.causal: false) takes images and multiples of {time} frames from {2 * time} on"
        )
        raise ConfigError(f"windows of {frames} frames: {takes}, for example {below} or {above}")


def _check_weights(settings: PlanSettings, buckets: Sequence[Bucket]) -> None:
    unknown = set(settings.weights) - {b.frames for b in buckets}
    if unknown:
        raise ConfigError(f"plan.weights: no bucket has {min(unknown)} frames")


def area_of(resolution: str) -> int:
    """Pixels of an area class, as Open-Sora 2.0 reads them: 256px (or 256) is 256², 480p is 480² · 16/9."""
    match = re.fullmatch(r"(\d+)(px|p|)", resolution)
    if match is None or int(match[1]) == 0:
        raise ConfigError(f"no resolution {resolution!r}: write 256px (256² pixels) or 480p (480 lines at 16:9)")
    side = int(match[1])
    return side * side * 16 // 9 if match[2] == "p" else side * side


def _multiples(settings: PlanSettings) -> tuple[int, int]:
    return settings.compression[1] * settings.patch, settings.compression[2] * settings.patch
