"""How good an autoencoder is on clips: how near and how alike its reconstructions are, and at what rate; by bucket, and
over all."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from trainer.data.batch_sampler import Order
from trainer.data.dataloader import Batch, Loader, LoaderOptions, Position
from trainer.evaluation.psnr_ssim import psnr, ssim
from trainer.models.autoencoders.base import Autoencoder
from trainer.models.autoencoders.build import autoencoder_hash
from trainer.models.autoencoders.lpips import Perceptual
from trainer.models.autoencoders.tiling import Tiles
from trainer.planning.plan import Plan
from trainer.training.preview import write_video

BITS = 16
"""Of a latent, as caches and models hold them (bfloat16)."""
PIXEL_BITS = 24
MEASURES = ("psnr", "ssim", "lpips")
FEW_QUANTILES = {1: 12.706, 2: 4.303}
AT_ONCE = 8
"""Pictures that the perceptual distance sees at a time."""


@dataclass(frozen=True)
class ClipScores:
    """Of one clip: PSNR in dB, SSIM and the perceptual distance (None: not measured), means over its frames."""

    clip_id: str
    bucket: str
    psnr: float
    ssim: float
    lpips: float | None


@dataclass(frozen=True)
class Interval:
    """A mean, and where it lies with 95 % confidence (None: one clip does not tell)."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Summary:
    """Of a bucket, or of all.

    Attributes:
        bits_per_pixel: of latents, at 16 bits an element, over the video's pixels.
        compression: a video's 24 bits a pixel over that.
    """

    bucket: str
    clips: int
    psnr: Interval
    ssim: Interval
    lpips: Interval | None
    bits_per_pixel: float
    compression: float


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of latents as a model sees them, sampled and scaled."""

    mean: float
    std: float


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes:
        autoencoder: its hash.
        perceptual: the kind of the distance; None: none.
        broken: clips that could not be read.
        encode_s, decode_s: of all clips together, first calls included.
        pixels: of all clips.
        peak_bytes: on a GPU, of tensors; else of this process.
    """

    autoencoder: str
    perceptual: str | None
    overall: Summary
    buckets: tuple[Summary, ...]
    clips: tuple[ClipScores, ...]
    broken: int
    latents: Moments
    encode_s: float
    decode_s: float
    pixels: int
    peak_bytes: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    plan: Plan,
    autoencoder: Autoencoder,
    perceptual: Perceptual | None,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    tiles: Tiles | None = None,
    limit: int | None = None,
    workers: int = 0,
    videos: Path | None = None,
    shown: int = 0,
) -> Evaluation:
    """Reconstruct the windows of a plan, from the means of their latents, and measure.

    Args:
        plan: what to reconstruct; a window is a clip here.
        dtype: of the autoencoder while it works.
        tiles: None: whole.
        limit: windows at most, in an order drawn from the plan.
        videos: folder for originals with reconstructions on their right, of the first `shown`.

    Raises:
        DatakitError: a clip that cannot be read for a reason that may pass; none that can be.
        ValueError: sizes that do not fit the autoencoder.
    """
    autoencoder = autoencoder.to(device, dtype).eval()
    perceptual = perceptual.to(device) if perceptual is not None else None
    clock, moments, scores = _Clock(device), _Moments(), []
    rates: dict[str, tuple[int, int]] = {}
    pixels = 0
    options = LoaderOptions(workers=workers, prefetch_mb=256)
    with Loader(plan, Order(plan, 0), 0, 1, Position(0, 0), options) as loader, torch.inference_mode():
        for batch in _once(loader, limit):
            video = batch.video.to(device).float() / 127.5 - 1
            with clock.timing("encode"):
                encoded = autoencoder.encode(video.to(dtype), tiles)
            with clock.timing("decode"):
                made = autoencoder.decode(encoded.mean, tiles).float().clamp(-1, 1)
            moments.add(encoded.mean, encoded.std)
            rates[batch.bucket.name] = encoded.mean[0].numel() * BITS, video[0, 0].numel()
            for row in range(len(video)):
                if videos is not None and len(scores) < shown:
                    pair = torch.cat((video[row], made[row]), -1)
                    write_video(pair, videos / f"{len(scores):03d}-{batch.clip_ids[row]}.mp4", batch.fps[row])
                scores.append(_score(batch, row, video[row : row + 1], made[row : row + 1], perceptual))
                pixels += video[0, 0].numel()
        broken = len({r.window for r in loader.replaced})
    names = sorted({s.bucket for s in scores}, key=lambda name: [int(n) for n in name.split("x")])
    return Evaluation(
        autoencoder_hash(autoencoder),
        perceptual.kind if perceptual is not None else None,
        _summary("all", scores, rates),
        tuple(_summary(name, [s for s in scores if s.bucket == name], rates) for name in names),
        tuple(scores),
        broken,
        moments.read(),
        clock.seconds["encode"],
        clock.seconds["decode"],
        pixels,
        _peak(device),
    )


@torch.inference_mode()
def latent_moments(plan: Plan, autoencoder: Autoencoder, limit: int | None = None) -> Moments:
    """Of the latents of a plan's windows, on the device that the autoencoder is on.

    Args:
        limit: windows at most.
    """
    weight = next(autoencoder.parameters())
    moments = _Moments()
    with Loader(plan, Order(plan, 0), 0, 1, Position(0, 0), LoaderOptions(workers=0)) as loader:
        for batch in _once(loader, limit):
            encoded = autoencoder.encode((batch.video.to(weight.device).float() / 127.5 - 1).to(weight.dtype))
            moments.add(encoded.mean, encoded.std)
    return moments.read()


def interval(values: Sequence[float]) -> Interval:
    """Student's interval of a mean, the values taken for independent."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return Interval(mean, None, None)
    deviation = (sum((v - mean) ** 2 for v in values) / (n - 1)) ** 0.5
    half = _quantile(n - 1) * deviation / n**0.5
    return Interval(mean, mean - half, mean + half)


def _quantile(freedom: int) -> float:
    """Of Student's t, at 97.5 %: exact for few degrees of freedom, else by the expansion around the normal one
    (Abramowitz and Stegun 26.7.5), right to 1 %."""
    if freedom in FEW_QUANTILES:
        return FEW_QUANTILES[freedom]
    z, v = NormalDist().inv_cdf(0.975), freedom
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )


def _once(loader: Loader, limit: int | None) -> Iterator[Batch]:
    """Every window that can be read once, at most so many. One that stands in for a broken one does not come again."""
    seen: set[int] = set()
    most = limit if limit is not None else loader.plan.windows.num_rows
    for _ in range(loader.order.steps(0)):
        for batch in next(loader)[1]:
            new = {window: row for row, window in reversed([*enumerate(batch.windows)]) if window not in seen}
            rows = sorted(new.values())[: most - len(seen)]
            seen.update(batch.windows[row] for row in rows)
            if rows:
                yield _cut(batch, rows)
        if len(seen) >= most:
            return


def _cut(batch: Batch, rows: Sequence[int]) -> Batch:
    """Some samples of a batch of frames."""
    taken = {
        name: [getattr(batch, name)[i] for i in rows]
        for name in ("windows", "clip_ids", "seeds", "captions", "fps", "motion_vmaf")
    }
    return Batch(
        batch.bucket,
        **taken,
        video=batch.video[list(rows)],
        raw=list(range(len(rows))),
        mean=None,
        std=None,
        weight=batch.weight,
    )


def _score(batch: Batch, row: int, video: Tensor, made: Tensor, perceptual: Perceptual | None) -> ClipScores:
    lpips = None
    if perceptual is not None:
        one, other = (x[0].transpose(0, 1).split(AT_ONCE) for x in (video, made))
        lpips = float(torch.cat([perceptual(a, b) for a, b in zip(one, other)]).mean())
    return ClipScores(batch.clip_ids[row], batch.bucket.name, float(psnr(video, made)), float(ssim(video, made)), lpips)


def _summary(name: str, scores: Sequence[ClipScores], rates: dict[str, tuple[int, int]]) -> Summary:
    bits, pixels = (sum(rates[s.bucket][i] for s in scores) for i in (0, 1))
    found = {
        m: interval([getattr(s, m) for s in scores]) if scores[0].lpips is not None or m != "lpips" else None
        for m in MEASURES
    }
    return Summary(name, len(scores), **found, bits_per_pixel=bits / pixels, compression=PIXEL_BITS * pixels / bits)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _Clock:
    """Time of what a device does."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = {"encode": 0.0, "decode": 0.0}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def timing(self, what: str) -> _Clock:
        self._what = what
        return self

    def __enter__(self) -> None:
        self._wait()
        self._began = time.perf_counter()

    def __exit__(self, *exc: Any) -> None:
        self._wait()
        self.seconds[self._what] += time.perf_counter() - self._began

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _Moments:
    """Of all latents together."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, 0.0, 0.0

    def add(self, mean: Tensor, std: Tensor) -> None:
        mean, std = mean.double(), std.double()
        self.count += mean.numel()
        self.total += float(mean.sum())
        self.squares += float((mean.square() + std.square()).sum())

    def read(self) -> Moments:
        mean = self.total / self.count
        return Moments(mean, (self.squares / self.count - mean**2) ** 0.5)
