"""The passes: texts and references encoded, noise to latents, latents to files. Each leaves files
(`sampler.generation.artifact_store`) for the next.

Runs in a Ray actor, or anywhere else. Every random number depends on a sample's prompt, seed and number alone.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datakit.atomic import atomic_path
from datakit.errors import ErrorKind, MediaError
from datakit.process.messages import Failed
from datakit.version import __version__
from pipelines.executor.actor_pool import Member, free_port
from sampler.generation.artifact_store import Store, key_of
from sampler.generation.denoiser import Denoiser, texts
from sampler.generation.model_cache import Models, out_of_memory_as
from sampler.generation.model_source import Checkpoint
from sampler.generation.sample_spec import FILES, PICTURES, Sample
from sampler.prompts.references import Reference, content_hash, frames_of
from sampler.settings import SampleSettings
from sampler.video_files import FORMATS, write, write_picture
from trainer.diffusion.conditioning import MODES, given_condition
from trainer.diffusion.rectified_flow import Text
from trainer.planning.buckets import area_of
from trainer.training.preview import to_pixels

COMPILE_FROM = 32
"""Forwards of a shape from which compiling its blocks (about a minute for two kinds of block) pays on a GPU."""
PAINTED = 16
"""Sides of painted pictures are multiples of it: what FLUX and Stable Diffusion take."""
WHOLE_PIXELS = 16_000_000
"""Pixels times frames that are decoded whole; more are decoded in tiles (Hunyuan's decoder takes 4 GiB for 8 million in
bf16)."""


@dataclass(frozen=True)
class Encoded:
    seconds: float


@dataclass(frozen=True)
class Denoised:
    """`seconds`: the sample's share of its batch; `batch`: how many were denoised together."""

    seconds: float
    forwards: int
    batch: int


@dataclass(frozen=True)
class Written:
    """Columns of `videos` and of `clips` are those that a look at the finished file gives; None where a catalog cannot
    hold it."""

    path: str
    seconds: float
    video: dict | None
    clip: dict | None


class Worker:
    """The three passes over lists of samples; answers in their order, a `Failed` for a sample that cannot be made.

    Args:
        folder: of the run's results; see `sampler.generation.sample_spec`.
        store: folder of what passes leave for each other.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: SampleSettings,
        folder: str,
        store: str,
        gpu: bool,
        threads: int | None = None,
    ):
        if threads:
            torch.set_num_threads(threads)
        # read at the first product: sums in one order whatever the number of threads, so that actors may be few or many
        if not gpu:
            os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
        self.settings, self.checkpoint = settings, checkpoint
        self.folder, self.store = Path(folder), Store(store)
        self.device = torch.device("cuda" if gpu else "cpu")
        self.models = Models(checkpoint, settings, self.device)
        self._latents = checkpoint.describe_autoencoder()
        self._most: int | None = None

    def version(self) -> str:
        return __version__

    def free_port(self) -> tuple[str, int]:
        return free_port()

    def join(self, member: Member) -> None:
        """Become one of several processes that share each video."""
        from trainer.engine.inference_parallel import join_group

        own = self.settings.work
        self.models = Models(
            self.checkpoint,
            self.settings,
            self.device,
            join_group(member, own.tensor_parallel, own.sequence_parallel, self.device, self.checkpoint.architecture),
        )
        if member.rank:
            self.store = _Reader(self.store.root)

    def paint(self, samples: list[Sample]) -> list[Encoded | Failed]:
        """First frames, as PNGs, for samples whose reference a text-to-image model makes."""
        answers: list[Encoded | Failed] = []
        for sample in samples:
            started = time.monotonic()
            size = painted_size(self.settings, sample)
            (picture,) = self.models.painter.paint(
                [sample.refined or sample.prompt], [sample.random_seed("picture")], *size
            )
            path = picture_of(self.folder, sample)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as aside:
                write_picture(picture, aside)
            answers.append(Encoded(time.monotonic() - started))
        self.models.release_painter()
        return answers

    @torch.no_grad()
    def encode(self, samples: list[Sample]) -> list[Encoded | Failed]:
        """Texts and references; those that are there are not encoded again."""
        answers: list[Encoded | Failed] = []
        seconds = self._encode_texts([text for sample in samples for text in (sample.text, sample.negative)]) / len(
            samples
        )
        for sample in samples:
            started = time.monotonic()
            try:
                self._encode_given(sample)
            except MediaError as e:
                answers.append(Failed(e.kind, e.message, stage="encode"))
            else:
                answers.append(Encoded(seconds + time.monotonic() - started))
        return answers

    @torch.no_grad()
    def denoise(
        self,
        samples: list[Sample],
        on_step: Callable[[int, int], None] = lambda step, forwards: None,
    ) -> list[Denoised | Failed]:
        """Latents of samples of one shape and mode. Where the device's memory is too small for all at once, in halves.

        Args:
            on_step: see `trainer.diffusion.rectified_flow.denoise`; each half has steps of its own.
        """
        if self._most is not None and len(samples) > self._most:
            parts = (samples[start : start + self._most] for start in range(0, len(samples), self._most))
            return [answer for part in parts for answer in self.denoise(part, on_step)]
        full: list[bool] = []
        with out_of_memory_as(full):
            return self._denoise(samples, on_step)
        if len(samples) > 1:
            self._most = (len(samples) + 1) // 2
        elif not self.models.make_room("dit"):
            return [
                Failed(
                    ErrorKind.OUT_OF_MEMORY,
                    f"one sample of {samples[0].shape} does not fit the device's memory",
                    stage="denoise",
                )
            ]
        return self.denoise(samples, on_step)

    @torch.no_grad()
    def decode(self, samples: list[Sample]) -> list[Written | Failed]:
        """Files of finished latents, and facts about them."""
        return [self._decode(sample) for sample in samples]

    def _encode_texts(self, texts: Sequence[str]) -> float:
        """One by one, so that what a text gives does not depend on the others. Gives the seconds that it took."""
        started = time.monotonic()
        for text in dict.fromkeys(texts):
            key = text_key(self.checkpoint, text)
            if not self.store.has("texts", key):
                found = self.models.text.encode([text])
                self.store.put("texts", key, {"states": found.states, "pooled": found.pooled})
        return time.monotonic() - started

    def _encode_given(self, sample: Sample) -> None:
        given, key = MODES[sample.mode], given_key(self.checkpoint, self.settings, sample)
        if not (given.head or given.tail) or self.store.has("given", key):
            return
        head, tail = self._ends(sample)
        video = np.zeros((sample.frames, sample.height, sample.width, 3), np.uint8)
        if given.head:
            video[: given.head] = frames_of(head, given.head, sample.height, sample.width, sample.fps)
        if given.tail:
            video[-given.tail :] = frames_of(tail, given.tail, sample.height, sample.width, sample.fps, end=True)
        model = self.models.autoencoder
        inputs = (
            torch.from_numpy(video).to(self.device).permute(3, 0, 1, 2)[None].to(next(model.parameters()).dtype) / 127.5
            - 1
        )
        cond = given_condition(inputs, given, model, tiles=self._tiles(sample))
        self.store.put("given", key, {"cond": cond.float()})

    def _ends(self, sample: Sample) -> tuple[Reference, Reference]:
        """The references of head and tail: one may serve both."""
        references = sample.references or (Reference(str(picture_of(self.folder, sample))),)
        return references[0], references[-1]

    def _denoise(self, samples: list[Sample], on_step: Callable[[int, int], None]) -> list[Denoised | Failed]:
        started, first = time.monotonic(), samples[0]
        shape, given = self._latents.latent_shape(*first.shape), MODES[first.mode]
        denoiser = Denoiser(self.checkpoint.architecture, self.models.dit, self.settings.sampling)
        count = denoiser.forwards(first.mode, shape[1])
        if self.settings.work.compile or (
            self.settings.work.compile is None and self.device.type == "cuda" and count >= COMPILE_FROM
        ):
            self.models.compile()
        noise = torch.stack([noise_of(sample, shape) for sample in samples]).to(self.device)
        cond = (
            torch.cat([self._condition(sample) for sample in samples]).to(self.device)
            if given.head or given.tail
            else None
        )
        told, negative = self._texts([s.text for s in samples]), self._texts([s.negative for s in samples])
        found = denoiser(noise, cond, told, negative, first.mode, on_step)
        answers: list[Denoised | Failed] = []
        for sample, latents in zip(samples, found):
            if not torch.isfinite(latents).all():
                answers.append(Failed(ErrorKind.STAGE, "the model gave numbers that are not finite", stage="denoise"))
                continue
            self.store.put("latents", sample.sample_id, {"latents": latents})
            answers.append(Denoised((time.monotonic() - started) / len(samples), count, len(samples)))
        return answers

    def _decode(self, sample: Sample) -> Written | Failed:
        started = time.monotonic()
        model, own = self.models.autoencoder, self.settings.output
        latents = self.store.get("latents", sample.sample_id)["latents"][None]
        latents = latents.to(self.device, next(model.parameters()).dtype)
        full: list[bool] = []
        with out_of_memory_as(full):
            video = model.decode(latents, self._tiles(sample))
        if full:
            self.models.make_room("autoencoder")
            video = model.decode(latents, model.tiles)
        try:
            path = write(to_pixels(video[0]), self.folder / FILES / sample.name, sample.fps, own.format, own.crf)
            facts = _measured(path) if FORMATS[own.format].catalogued else (None, None)
        except MediaError as e:
            return Failed(e.kind, e.message, stage="decode")
        return Written(str(path.relative_to(self.folder)), time.monotonic() - started, *facts)

    def _condition(self, sample: Sample) -> Tensor:
        return self.store.get("given", given_key(self.checkpoint, self.settings, sample))["cond"]

    def _texts(self, told: Sequence[str]) -> Text:
        stored = [self.store.get("texts", text_key(self.checkpoint, text)) for text in told]
        return texts([Text(part["states"].to(self.device), part["pooled"].to(self.device)) for part in stored])

    def _tiles(self, sample: Sample):
        tiled = self.settings.work.tiled
        if tiled is None:
            tiled = sample.frames * sample.height * sample.width > WHOLE_PIXELS
        return self.models.autoencoder.tiles if tiled else None


class _Reader(Store):
    """Of a process that shares its samples with another, which writes."""

    def put(self, kind, key, tensors) -> None:
        pass


def noise_of(sample: Sample, shape: Sequence[int]) -> Tensor:
    """Standard normal noise, float32, on the CPU whatever samples: generators of different devices give different
    numbers."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(sample.random_seed()))


def text_key(checkpoint: Checkpoint, text: str) -> str:
    return key_of("text", text, checkpoint.text.model_dump(exclude={"cache_mb"}))


def given_key(checkpoint: Checkpoint, settings: SampleSettings, sample: Sample) -> str:
    """Of a condition: everything that decides its numbers."""
    if sample.painted:
        contents: list[object] = [
            sample.refined or sample.prompt,
            sample.random_seed("picture"),
            settings.image.model_dump(exclude={"offload"}),
        ]
    else:
        contents = [content_hash(reference) for reference in sample.references]
    rate = sample.fps if sample.mode.startswith("v2v") else 0.0
    return key_of(
        "given",
        sample.mode,
        contents,
        sample.shape,
        rate,
        checkpoint.autoencoder.model_dump(exclude={"tiled"}),
        settings.work.precision,
    )


def painted_size(settings: SampleSettings, sample: Sample) -> tuple[int, int]:
    """Height and width of a sample's painted first frame: of its shape, and as large as the settings say."""
    if settings.image.resolution is None:
        return sample.height, sample.width
    scale = math.sqrt(area_of(settings.image.resolution) / (sample.height * sample.width))
    return round(sample.height * scale / PAINTED) * PAINTED, round(sample.width * scale / PAINTED) * PAINTED


def picture_of(folder: Path, sample: Sample) -> Path:
    """Where the painted first frame of a sample lies."""
    return folder / PICTURES / f"{sample.name}.png"


def _measured(path: Path) -> tuple[dict, dict]:
    """What the catalog says of a file: every frame is decoded, as at ingest."""
    from catalogs.interop.media.measure_worker import Measured, MeasureJob, measure
    from datakit.source import identify, look_at

    source = look_at(str(path))
    video, problem = identify(source)
    if problem is not None:
        raise problem
    found = next(item for item in measure(MeasureJob(source.uri, source.size, video, "")) if isinstance(item, Measured))
    return {**found.columns, "video_id": video, "source": source}, found.clip
