"""What a run is about to do: how many samples of what size, the work in FLOPs, the disk that it takes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from datakit.errors import ConfigError
from datakit.units import readable
from sampler.generation.denoiser import guidance_of
from sampler.generation.model_source import Checkpoint
from sampler.generation.sample_spec import Sample
from sampler.settings import SampleSettings
from sampler.video_files import FORMATS
from trainer.diffusion.conditioning import MODES
from trainer.diffusion.rectified_flow import forwards
from trainer.models.autoencoders.base import Autoencoder
from trainer.models.common.text_encoders import MINILM_LENGTH, T5_LENGTH
from trainer.training.metrics import peak_flops

SHARE_OF_PEAK = 0.5
CPU_MATRIX, CPU_PROBE_S = 512, 0.1
"""The product of two such matrices, for so long, tells what a CPU can."""
STATE_BYTES = 4
"""Of a number that passes leave for each other."""


@dataclass(frozen=True)
class Estimate:
    """Before anything is done.

    Attributes:
        asked, todo: samples.
        shapes: (frames, height, width) of those to do.
        forwards: of the model, for each of them; pflop: of all these, in 10¹⁵ operations.
        seconds: that they take on this machine, about; None: it has a GPU of unknown speed.
        work_bytes: that passes leave for each other, at most (`work.work_gb`); sample_bytes: of one sample of a shape.
        out_bytes: of the videos, about.
        free: bytes on the disk of the folder.
    """

    asked: int
    todo: int
    shapes: tuple[tuple[int, int, int], ...]
    forwards: int
    pflop: float
    seconds: float | None
    work_bytes: int
    sample_bytes: dict[tuple[int, int, int], int]
    out_bytes: int
    free: int
    folder: str

    def work_bytes_of(self, sample: Sample) -> int:
        return self.sample_bytes[sample.shape]

    def check_space(self) -> None:
        """Raises:
        ConfigError: the disk has no room for it.
        """
        needed = self.work_bytes + self.out_bytes
        if needed > self.free:
            raise ConfigError(
                f"{self.todo} samples take about {readable(needed)} in {self.folder}, the disk has "
                f"{readable(self.free)} left: "
                "make room, or lower work.work_gb"
            )


def estimate(
    samples: Sequence[Sample],
    todo: Sequence[Sample],
    settings: SampleSettings,
    checkpoint: Checkpoint,
    autoencoder: Autoencoder,
    folder: Path,
) -> Estimate:
    own = settings.sampling
    if not todo:
        return Estimate(len(samples), 0, (), 0, 0.0, 0.0, 0, {}, 0, _free(folder), str(folder))
    mode, texts = MODES[todo[0].mode], 2 * _text_bytes(checkpoint)
    given, own_guidance = bool(mode.head or mode.tail), guidance_of(own, todo[0].mode)
    latents = {shape: autoencoder.latent_shape(*shape) for shape in dict.fromkeys(sample.shape for sample in todo)}
    count = {shape: forwards(own.steps, own_guidance, latent[1], given) for shape, latent in latents.items()}
    one = {shape: STATE_BYTES * (prod(latent) * 2 + prod(latent[1:])) + texts for shape, latent in latents.items()}
    model = checkpoint.architecture
    flops = {
        shape: model.flops(model.tokens(latent[1:]) + _text_tokens(checkpoint)).total * count[shape]
        for shape, latent in latents.items()
    }
    flop, rate = sum(flops[sample.shape] for sample in todo), _rate()
    most = round(max(settings.work.work_gb * 1000000000.0, *one.values()))
    pixels = sum(prod(sample.shape) for sample in todo)
    return Estimate(
        len(samples),
        len(todo),
        tuple(latents),
        max(count.values()),
        flop / 1e15,
        rate and flop / rate,
        min(sum(one[sample.shape] for sample in todo), most),
        one,
        round(pixels * FORMATS[settings.output.format].bits / 8),
        _free(folder),
        str(folder),
    )


def _rate() -> float | None:
    """Operations per second that a model does here: of the best that the machine can, what attention and small layers
    leave."""
    if torch.cuda.is_available():
        peak = peak_flops(torch.device("cuda"))
        return peak and SHARE_OF_PEAK * peak * torch.cuda.device_count()
    matrix = torch.randn(CPU_MATRIX, CPU_MATRIX)
    matrix @ matrix
    started, rounds = time.perf_counter(), 0
    while time.perf_counter() - started < CPU_PROBE_S:
        matrix @ matrix
        rounds += 1
    return SHARE_OF_PEAK * 2 * CPU_MATRIX**3 * rounds / (time.perf_counter() - started)


def _text_tokens(checkpoint: Checkpoint) -> int:
    return checkpoint.text.options.get("length", T5_LENGTH if checkpoint.text.kind == "t5-clip" else MINILM_LENGTH)


def _text_bytes(checkpoint: Checkpoint) -> int:
    """States of a text, by the largest encoder of each kind."""
    return STATE_BYTES * (512 * 4096 if checkpoint.text.kind == "t5-clip" else 512 * 384)


def _free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
