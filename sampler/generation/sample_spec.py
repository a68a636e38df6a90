"""Prompts to samples: what each is of, and its identity, which depends on everything that decides its pixels and on
nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from datakit.errors import ConfigError
from datakit.hashing import seed_of
from sampler.generation.artifact_store import key_of
from sampler.generation.model_source import FPS, Checkpoint
from sampler.generation.video_size import check_frames, size_of
from sampler.prompts.prompt import Prompt
from sampler.prompts.references import Reference, content_hash
from sampler.settings import SampleSettings
from trainer.diffusion.conditioning import MODES
from trainer.diffusion.prompt_format import prompt as told
from trainer.models.autoencoders.base import Autoencoder

FILES, PICTURES = "sample_files", "pictures"
"""Folders of a run's results, for videos and for painted first frames; none of the catalog's tables, whose vacuum
deletes what is not its own."""
WORDS, LETTERS = 8, 60
"""Of a prompt, that name its file."""
DEFAULT_ASPECT = "16:9"


@dataclass(frozen=True)
class Sample:
    """One video to make. Plain values: it crosses process boundaries.

    Attributes:
        name: of its file, without suffix; has part of the id in it.
        prompt: as it was given; `refined`: as a language model rewrote it (None: it did not).
        told_motion: score that the model is told; None: none, or to be asked for (`asks_motion`).
        painted: whether its reference is a picture that the text-to-image model paints.
        frames, height, width: of the video.
    """

    sample_id: str
    name: str
    prompt: str
    negative: str
    mode: str
    references: tuple[Reference, ...]
    seed: int
    number: int
    frames: int
    height: int
    width: int
    fps: float
    told_motion: int | None = None
    asks_motion: bool = False
    painted: bool = False
    source_clip: str | None = None
    refined: str | None = None

    @property
    def text(self) -> str:
        """What the model is told."""
        return told(self.refined or self.prompt, self.fps if self.frames > 1 else 0.0, self.told_motion)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.frames, self.height, self.width

    def random_seed(self, purpose: str = "noise") -> int:
        """63 bits that depend on prompt, seed and number alone."""
        return seed_of(f"{purpose}/{self.seed}/{self.number}/{self.prompt}", "datakit-noise")


def expand(
    prompts: Sequence[Prompt], settings: SampleSettings, checkpoint: Checkpoint, autoencoder: Autoencoder
) -> list[Sample]:
    """All samples of a run, in order. Prompts that say the same twice are sampled once.

    Raises:
        ConfigError: sizes that the autoencoder does not take, a mode that the model or the number of frames does not
            allow.
    """
    mode = mode_of(settings)
    if (MODES[mode].head or MODES[mode].tail) and not checkpoint.architecture.takes_condition:
        raise ConfigError(f"{checkpoint.name} takes no references (it has no cond_in): video.mode=t2v only")
    shapes = _shapes(prompts, mode, settings, checkpoint, autoencoder)
    common = _identity(settings, checkpoint)
    fps = settings.video.fps or (checkpoint.usual.fps if checkpoint.usual else FPS)
    found: dict[str, Sample] = {}
    for prompt in prompts:
        shape = shapes[prompt.aspect_ratio, prompt.num_frames]
        motion = prompt.motion if prompt.motion is not None else settings.prompt.motion
        whole = Sample(
            "",
            "",
            prompt.text,
            settings.prompt.negative if prompt.negative is None else prompt.negative,
            mode,
            prompt.references,
            settings.seed if prompt.seed is None else prompt.seed,
            0,
            *shape,
            fps,
            None if motion == "auto" else motion,
            motion == "auto",
            bool(settings.image.model) and not prompt.references,
            prompt.source_clip,
        )
        contents = [content_hash(reference) for reference in prompt.references]
        for number in range(settings.samples):
            sample = replace(whole, number=number)
            identity = key_of(
                sample.prompt, sample.negative, mode, contents, sample.seed, number, shape, fps, motion, common
            )
            found.setdefault(identity, replace(sample, sample_id=identity, name=_name(prompt, number, identity)))
    return list(found.values())


def _shapes(
    prompts: Sequence[Prompt],
    mode: str,
    settings: SampleSettings,
    checkpoint: Checkpoint,
    autoencoder: Autoencoder,
) -> dict[tuple[str | None, int | None], tuple[int, int, int]]:
    """By what prompts ask for themselves."""
    given, found = MODES[mode], {}
    for prompt in prompts:
        asked = prompt.aspect_ratio, prompt.num_frames
        if asked in found:
            continue
        own = {name: value for name, value in zip(("aspect_ratio", "num_frames"), asked) if value is not None}
        try:
            shape = shape_of(
                settings.model_copy(update={"video": settings.video.model_copy(update=own)}), checkpoint, autoencoder
            )
        except ConfigError as e:
            if own and prompt.where:
                raise ConfigError(f"{prompt.where}: {e}") from e
            raise
        if given.head + given.tail >= shape[0]:
            raise ConfigError(
                f"mode {mode} gives {given.head + given.tail} frames, the video has {shape[0]}: nothing is left to make"
            )
        found[asked] = shape
    return found


def mode_of(settings: SampleSettings) -> str:
    if settings.image.model is None:
        return settings.video.mode
    if settings.video.mode not in ("t2v", "i2v_head"):
        raise ConfigError(f"image.model paints first frames: video.mode is i2v_head then, not {settings.video.mode}")
    return "i2v_head"


def shape_of(settings: SampleSettings, checkpoint: Checkpoint, autoencoder: Autoencoder) -> tuple[int, int, int]:
    """Frames, height and width: as they are set, else as the training run had most."""
    video, usual, (_, h, w) = settings.video, checkpoint.usual, autoencoder.compression
    patch = checkpoint.architecture.patch
    multiples = h * patch, w * patch
    if video.height is not None and video.width is not None and video.aspect_ratio is not None:
        area = round((video.height * video.width) ** 0.5)
        height, width = size_of(f"{area}px", video.aspect_ratio, multiples)
    elif video.height is not None and video.width is not None:
        height, width = video.height, video.width
        if height % multiples[0] or width % multiples[1]:
            near = [max(m, round(n / m) * m) for n, m in zip((height, width), multiples)]
            raise ConfigError(
                f"height {height} and width {width} must be multiples of {multiples[0]} and {multiples[1]}, "
                f"the nearest are {near[0]} and {near[1]}"
            )
    elif video.resolution is not None:
        height, width = size_of(video.resolution, video.aspect_ratio or DEFAULT_ASPECT, multiples)
    elif usual is None:
        raise ConfigError(
            f"{checkpoint.name} does not say what it was trained on: --set video.resolution=256px, or a --preset"
        )
    elif video.aspect_ratio is not None:
        height, width = size_of(f"{round((usual.height * usual.width) ** 0.5)}px", video.aspect_ratio, multiples)
    else:
        height, width = usual.height, usual.width
    frames = video.num_frames or (usual.num_frames if usual else None)
    if frames is None:
        raise ConfigError(
            f"{checkpoint.name} does not say what it was trained on: --set video.num_frames=129, or a --preset"
        )
    check_frames(frames, autoencoder.grid, None)
    return frames, height, width


def _identity(settings: SampleSettings, checkpoint: Checkpoint) -> list[object]:
    """What all samples of a run share and that decides their pixels."""
    asks = settings.prompt.refine or settings.prompt.motion == "auto"
    llm = settings.llm.model_dump(
        mode="json", include={"backend", "model", "max_tokens", "temperature", "top_p", "seed", "dtype"}
    )
    return [
        checkpoint.hash,
        settings.sampling.model_dump(),
        checkpoint.autoencoder.model_dump(exclude={"tiled"}),
        checkpoint.text.model_dump(exclude={"cache_mb"}),
        settings.prompt.refine,
        llm if asks else None,
        settings.image.model_dump(exclude={"offload"}) if settings.image.model else None,
        settings.work.precision,
        settings.work.fp8,
        settings.output.model_dump(),
    ]


def _name(prompt: Prompt, number: int, identity: str) -> str:
    """Of a file: the prompt's name or first words, the number, and enough of the id that no two are the same."""
    words = (
        re.sub(r"[^\w.-]+", "_", prompt.name or " ".join(prompt.text.split()[:WORDS])).strip("._")[:LETTERS] or "sample"
    )
    return f"{words}-{number:02d}-{identity[:8]}"
