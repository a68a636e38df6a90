"""Settings of `datakit plan`: the section `plan` of a training config."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from datakit.config import Section
from trainer.planning.frame_rate import TIME_ERROR
from trainer.planning.latent_grid import LatentGrid

ASPECTS = (
    "2.39:1",
    "2:1",
    "16:9",
    "1.85:1",
    "8:5",
    "3:2",
    "4:3",
    "1:1",
    "1:2.39",
    "1:2",
    "9:16",
    "1:1.85",
    "5:8",
    "2:3",
    "3:4",
)
"""width:height, those of Open-Sora 2.0 (opensora/datasets/aspect.py), each also upright."""
SEXAGESIMAL = 60
"""YAML 1.1 reads 16:9 as 16 · 60 + 9."""


def _aspect(value: Any) -> Any:
    """An aspect that YAML took for a number of base 60."""
    return f"{value // SEXAGESIMAL}:{value % SEXAGESIMAL}" if isinstance(value, int) and value > SEXAGESIMAL else value


Aspect = Annotated[str, BeforeValidator(_aspect), Field(pattern=r"^\d+(\.\d+)?:\d+(\.\d+)?$")]
Resolution = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, int) else value)]
Keep = float | tuple[float, float]
Share = Annotated[float, Field(ge=0, le=1)]
TableEntry = tuple[Keep, int | None]


class MemorySettings(Section):
    """The model that is to be trained, as far as GPU memory goes. Defaults: Open-Sora 2.0's, on one GPU, whole."""

    width: Annotated[int, Field(gt=0)] = 3072
    """Hidden size."""
    double_blocks: Annotated[int, Field(ge=0)] = 19
    """Of the model that the memory is estimated for."""
    single_blocks: Annotated[int, Field(ge=0)] = 38
    """Of the model that the memory is estimated for."""
    trained: Share = 1.0
    """Share of the parameters that is trained; far below 1 with LoRA."""
    recompute: Share = 0.0
    """Share of the blocks whose activations are computed again in the backward pass."""
    zero: Annotated[int, Field(ge=0, le=3)] = 2
    """ZeRO stage: 1 divides masters and moments, 2 gradients too, 3 (Gemini) weights too."""
    shards: Annotated[int, Field(gt=0)] = 1
    """GPUs that they are divided over."""
    reserve_gib: Annotated[float, Field(ge=0)] = 2.0
    """Of a GPU: for CUDA, kernels, communication and fragments; add what else lies there (text encoder,
    autoencoder)."""


class PlanSettings(Section):
    """See `datakit plan --help` and docs/plan.md."""

    fps: Annotated[float, Field(gt=0)] = 24.0
    """Target frames per second. What cannot be met evenly keeps its own rate: see `trainer.planning.frame_rate`."""
    time_error: Annotated[float, Field(ge=0, le=0.5)] = TIME_ERROR
    """Of a target frame interval: how far a frame chosen by timestamp may lie from its time."""
    resolutions: Annotated[list[Resolution], Field(min_length=1)] = ["256px"]
    """Area classes: 256px (256² pixels), 768px; 480p, 720p …"""
    aspects: Annotated[list[Aspect], Field(min_length=1)] = list(ASPECTS)
    """width:height."""
    frames: Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=1)] = [1, 33, 65, 97, 129]
    """Of a window; 1: images."""
    bucket_config: dict[Resolution, dict[int, TableEntry]] | None = None
    """In place of `resolutions` and `frames`, a table in Open-Sora's form: {resolution: {frames: [keep, batch]}}."""
    compression: tuple[int, int, int] = (4, 8, 8)
    """Of the autoencoder: time, height, width. (4, 32, 32) for the video DC-AE."""
    causal: bool = True
    """Whether the autoencoder takes 4k + 1 frames, the first by itself; else multiples."""
    patch: Annotated[int, Field(gt=0)] = 2
    """Latent positions along a side of a token; 1 for the video DC-AE."""
    text_tokens: Annotated[int, Field(ge=0)] = 512
    """That the prompt takes in the joint sequence."""
    max_upscale: Annotated[float, Field(ge=1)] = 1.1
    """Most that a picture is enlarged by, a side (Open-Sora 2.0 accepts 0.8 of the area: 1.12)."""
    max_crop: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Most of the picture's area that the bucket's shape may cut off."""
    windows: Annotated[int, Field(gt=0)] = 4
    """Most windows of a clip: as many as fit without overlap, spread evenly from its first frame to its last."""
    images_from_video: bool = False
    """Whether videos that are too short for any other bucket go to buckets of one frame."""
    captions: Literal["required", "optional"] = "required"
    """Whether a clip without a caption is left out or trains with an empty text."""
    split: Literal["train", "val", "test"] = "train"
    """Which clips: train, val or test."""
    weights: dict[int, Annotated[float, Field(gt=0)]] = {}
    """{frames: times}: how often windows of so many frames are drawn in an epoch, for example {1: 0.5}."""
    tokens: Annotated[int, Field(gt=0)] | None = None
    """Of a micro-batch at most, video and text. Not given, and no `gpu`:
    `trainer.planning.memory_budget.DEFAULT_TOKENS`."""
    gpu: str | float | None = None
    """24gb, 40gb, 80gb, 141gb …, a number of GiB, or `here`: as many tokens as it has memory for, by `memory`."""
    memory: MemorySettings = MemorySettings()
    global_batch: Annotated[int, Field(gt=0)] | None = None
    """Samples of an optimizer step, on average; not given (nor `global_tokens`): one micro-batch."""
    global_tokens: Annotated[int, Field(gt=0)] | None = None
    """Tokens of an optimizer step."""
    seed: int = 0
    """Of the draws that `bucket_config`'s keep probabilities ask for."""

    @property
    def grid(self) -> LatentGrid:
        """The sizes that the autoencoder takes."""
        return LatentGrid(self.compression, self.causal)

    @field_validator("frames")
    @classmethod
    def _rising(cls, frames: list[int]) -> list[int]:
        return sorted(set(frames))

    @model_validator(mode="after")
    def _one_budget(self) -> PlanSettings:
        if self.tokens is not None and self.gpu is not None:
            raise ValueError("give tokens or gpu, not both")
        if self.global_batch is not None and self.global_tokens is not None:
            raise ValueError("give global_batch or global_tokens, not both")
        return self
