"""Settings of a sampling run: a preset < a YAML file < `--set section.option=value`. Options left at null follow from
others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from datakit.config import OneOf, Section, load, preset_file
from pipelines.settings import LanguageModel
from sampler.video_files import FORMATS
from trainer.diffusion.conditioning import MODES
from trainer.models.autoencoders.settings import AutoencoderSettings
from trainer.planning.settings import Aspect, Resolution
from trainer.settings import TextSettings

PRESETS = Path(__file__).parent / "presets"
Positive = Annotated[int, Field(gt=0)]


class ModelSettings(Section):
    """The diffusion transformer whose weights `--ckpt` names."""

    lora: str | None = None
    """File or folder of LoRA weights to merge into it."""
    ema: bool = True
    """Of a training run: the moving average of its weights, if it kept one."""
    allow_unexpected: list[str] = ["guidance_in.*"]
    """Weights to leave behind."""


class VideoSettings(Section):
    """What to make. Height and width, or resolution and aspect ratio; all null: those that the training run had most
    of."""

    mode: Literal[tuple(MODES)] = "t2v"  # type: ignore[valid-type]
    """What is given of each video, see `trainer.diffusion.conditioning`. With image.model, t2v becomes i2v_head: the
    model paints the first frame."""
    resolution: Resolution | None = None
    """256px: the area of a square of that side."""
    aspect_ratio: Aspect | None = None
    """Width to height: 16:9, 9:16, 1:1, 2.39:1 …"""
    height: Positive | None = None
    """Pixels; null: by resolution and aspect ratio."""
    width: Positive | None = None
    """Pixels; null: by resolution and aspect ratio."""
    num_frames: Positive | None = None
    """Frames, 4k + 1; null: what the model was trained on."""
    fps: Annotated[float, Field(gt=0)] | None = None
    """Frames per second, told to the model and of the file. Null: the training run's, else 24."""

    @model_validator(mode="after")
    def _one_way(self) -> VideoSettings:
        if (self.height is None) != (self.width is None):
            raise ValueError("video.height and video.width go together")
        if self.height is not None and (self.resolution is not None or self.aspect_ratio is not None):
            raise ValueError("give video.height and video.width, or video.resolution and video.aspect_ratio, not both")
        return self


class SamplingSettings(Section):
    """The way from noise to a video. Defaults: Open-Sora 2.0's."""

    steps: Positive = 50
    """Steps from noise to a video."""
    guidance: Annotated[float, Field(ge=1)] = 7.5
    """Scale on the text; 1: none."""
    image_guidance: Annotated[float, Field(ge=1)] = 3.0
    """Scale on the references; 1: none."""
    shift: Annotated[float, Field(gt=0)] | None = None
    """How far the schedule leans towards noise; null: by the number of tokens and frames, as in training."""
    oscillate: bool = True
    """Past the first ten steps, guidance at every other step only: fewer forwards."""
    image_over_frames: bool = True
    """The scale on the references rises over the frames and falls over the steps (modes i2v)."""


class PromptSettings(Section):
    motion: Annotated[int, Field(ge=0)] | Literal["auto"] | None = None
    """Motion score told to the model; auto: a language model (section `llm`) says, for each prompt."""
    negative: str = ""
    """For prompts that have none of their own."""
    refine: bool = False
    """Have the language model write the prompts out first."""


class ImageSettings(Section):
    """The text-to-image model that paints first frames (t2i2v); any that diffusers knows."""

    model: str | None = None
    """Folder, or name that `datakit models` knows. Null: none."""
    resolution: Resolution | None = None
    """To paint at, scaled to the video's size afterwards: such models are at their best at the size they were trained
    at. Null: the video's."""
    steps: Positive | None = None
    """Null: the pipeline's own."""
    guidance: Annotated[float, Field(ge=0)] | None = None
    """Guidance scale of the image model; null: its own."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the image model; auto: its own."""
    offload: bool = False
    """Keep parts of the image model in main memory until they are needed."""


class WorkSettings(Section):
    """How the work is done; nothing here changes what is sampled, beyond rounding."""

    batch: Positive | None = None
    """Samples denoised together; null: 1 on a CPU, as many as there is memory for on a GPU, at most 8."""
    work_gb: Annotated[float, Field(gt=0)] = 20.0
    """Disk that texts, conditions and latents of a wave may take."""
    actors: Positive | None = None
    """Processes that work; null: one a GPU, else one."""
    num_gpus: Annotated[float, Field(ge=0)] | None = None
    """Per process; null: 1 where Ray has GPUs, else 0."""
    num_cpus: Annotated[float, Field(ge=0)] | None = None
    """Per worker; null: by what Ray has."""
    threads: Positive | None = None
    """Of a process without a GPU; null: the CPUs shared out."""
    precision: Literal["fp32", "bf16"] | None = None
    """Null: bf16 on a GPU, fp32 on a CPU."""
    fp8: Literal["row", "tensor"] | None = None
    """Blocks' linear layers in 8-bit floats, with scales for each row or tensor."""
    compile: bool | None = None
    """Compile each block; null: on a GPU, for 32 forwards or more of a shape."""
    tiled: bool | None = None
    """Decode in tiles; null: where the whole does not fit."""
    offload: bool = False
    """Keep one model at a time on the GPU, the others in main memory."""
    tensor_parallel: Positive = 1
    """GPUs that share each video's heads and features."""
    sequence_parallel: Positive = 1
    """GPUs that share each video's tokens."""
    keep: bool = False
    """Keep texts and latents of finished samples."""

    @model_validator(mode="after")
    def _fits(self) -> WorkSettings:
        if self.fp8 and self.precision == "fp32":
            raise ValueError("work.fp8 computes in bf16: leave work.precision out")
        if self.tensor_parallel > 1 and (self.fp8 or self.compile):
            raise ValueError("work.tensor_parallel goes without work.fp8 and work.compile")
        return self


class OutputSettings(Section):
    format: Annotated[str, OneOf(lambda: tuple(FORMATS))] = "mp4"
    """mp4: H.264, 4:2:0, BT.709; lossless: RGB, FFV1 in Matroska; frames: a folder of PNGs. Only the first two can be
    scored."""
    crf: Annotated[int, Field(ge=0, le=51)] = 16
    """Of mp4; 23 is what Open-Sora writes."""


class SampleSettings(Section):
    """`datakit sample`."""

    seed: int = Field(0, ge=0)
    """Of the first sample of each prompt; noise follows from prompt, seed and sample alone."""
    samples: Positive = 1
    """Of each prompt."""
    model: ModelSettings = ModelSettings()
    autoencoder: AutoencoderSettings | None = None
    """Null: the training run's."""
    text: TextSettings | None = None
    """Null: the training run's."""
    video: VideoSettings = VideoSettings()
    sampling: SamplingSettings = SamplingSettings()
    prompt: PromptSettings = PromptSettings()
    llm: LanguageModel = LanguageModel()
    """For prompt.refine and prompt.motion=auto."""
    image: ImageSettings = ImageSettings()
    work: WorkSettings = WorkSettings()
    output: OutputSettings = OutputSettings()


def load_settings(preset: str | None, file: str | Path | None = None, sets: Sequence[str] = ()) -> SampleSettings:
    """Settings of a run.

    Args:
        preset: name of a file in `sampler/presets`, or a path.

    Raises:
        ConfigError: no such preset, unknown keys, values that make no sense.
    """
    files: list[Any] = [*([preset_file(PRESETS, preset)] if preset else []), *([file] if file else [])]
    return load(SampleSettings, files, sets)
