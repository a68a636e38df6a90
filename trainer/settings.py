"""Settings of a training run: a preset < a YAML file < `--set section.option=value`. Options left at null follow from
others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from datakit.config import Section, load, preset_file
from trainer.data.dataloader import LoaderOptions
from trainer.diffusion.conditioning import MODES
from trainer.engine.settings import EngineSettings, OptimizerSettings
from trainer.models.autoencoders.settings import AutoencoderSettings
from trainer.models.common.settings import DiTModel, usual_model
from trainer.planning.settings import PlanSettings

PRESETS = Path(__file__).parent / "presets"
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
S = TypeVar("S", bound=Section)


class TextSettings(Section):
    """`minilm` comes in a package; `t5-clip` is that of Open-Sora 2.0, in folders or by name."""

    kind: Literal["minilm", "t5-clip"] = "t5-clip"
    """Which text encoder: `minilm` comes in a package; `t5-clip` is that of Open-Sora 2.0."""
    options: dict[str, Any] = {}
    """Of `trainer.models.common.text_encoders`: t5, clip, length …"""
    cache_mb: Annotated[int, Field(ge=0)] = 256
    """Memory for the texts of prompts that come again."""


class LoaderSettings(LoaderOptions):
    """How samples are read, and whether from the source or from cached latents (`datakit run encode`)."""

    latents: Literal["no", "if there", "only"] = "no"
    """Read latents that `datakit run encode` made, in place of videos."""


class ValidationSettings(Section):
    """Of the `val` split, always at the same noise."""

    every: Annotated[int, Field(ge=0)] = 500
    """Steps; 0: never."""
    levels: list[Annotated[float, Field(gt=0, le=1)]] = [0.1, 0.3, 0.5, 0.7, 0.9]
    """Noise levels, 0 (clean) to 1 (noise), at which the loss is measured."""
    windows: Positive = 64
    """At most."""


class Previews(Section):
    every: Annotated[int, Field(ge=0)] = 1000
    """Steps; 0: never."""


class PreviewSettings(Previews):
    prompts: list[str] = []
    """Empty: captions of the plan."""
    count: Positive = 2
    """Videos of a preview."""
    steps: Positive = 20
    """Sampling steps of a preview."""
    guidance: Annotated[float, Field(ge=1)] = 7.5
    """Guidance scale of a preview; 1: none."""


class CheckpointSettings(Section):
    every: Positive = 500
    """Steps between checkpoints."""
    keep: Positive = 2
    """Newest checkpoints that stay."""


class LogSettings(Section):
    every: Positive = 10
    """Steps between lines of metrics."""
    tensorboard: bool = True
    """Also write metrics for TensorBoard."""
    wandb: str | None = None
    """Project."""


class RunSettings(Section):
    """What DiT and VAE training share."""

    seed: int = 0
    """Of weights, noise and every other random choice."""
    steps: Positive = 10_000
    """Optimizer steps of the run."""
    plan: PlanSettings = PlanSettings()
    engine: EngineSettings = EngineSettings()
    loader: LoaderSettings = LoaderSettings()
    validation: ValidationSettings = ValidationSettings()
    preview: Previews = Previews()
    checkpoint: CheckpointSettings = CheckpointSettings()
    log: LogSettings = LogSettings()
    watchdog_s: Annotated[float, Field(ge=0)] = 1800.0
    """Without any progress for so long, a rank says who is stuck and ends; 0: never."""
    write_back: bool = True
    """Enter what the run learns about each clip in the catalog."""


class DiTSettings(RunSettings):
    """`datakit train dit`. Defaults: Open-Sora 2.0's."""

    model: DiTModel = Field(default_factory=usual_model)
    autoencoder: AutoencoderSettings = AutoencoderSettings()
    text: TextSettings = TextSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    conditions: dict[Literal[tuple(MODES)], Annotated[float, Field(ge=0)]] = {
        "t2v": 1,
        "i2v_head": 5,
        "i2v_loop": 1,
        "i2v_tail": 1,
    }
    """Modes of `trainer.diffusion.conditioning`, by weight."""
    dropout: Share = 0.3162
    """Of the token states, and apart from it of the pooled text: a tenth of the samples have neither."""
    preview: PreviewSettings = PreviewSettings()
    check_compile: bool = True
    """Compare a few compiled blocks' gradients with eager before training, with engine.compile."""


def load_settings(kind: type[S], preset: str | None, file: str | Path | None = None, sets: Sequence[str] = ()) -> S:
    """Settings of a run.

    Args:
        preset: name of a file in `trainer/presets`, or a path.

    Raises:
        ConfigError: no such preset, unknown keys, values that make no sense.
    """
    return load(kind, [*([preset_file(PRESETS, preset)] if preset else []), *([file] if file else [])], sets)
