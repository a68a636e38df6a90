"""Settings of `datakit train vae`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from datakit.config import Section
from trainer.engine.settings import OptimizerSettings
from trainer.models.autoencoders.settings import Kind
from trainer.settings import Positive, Previews, RunSettings

Weight = Annotated[float, Field(ge=0)]


class TrainedAutoencoder(Section):
    """`weights`: to start from (`embedded`: those of `tiny` that come with datakit); null: random."""

    kind: Kind = "hunyuan"
    """Which autoencoder."""
    weights: str | None = None
    """To start from: a file, folder or name; `embedded`: those of `tiny` that come with datakit; null: random."""
    sizes: dict[str, Any] = {}
    """Of another model of the kind than the released one."""
    recompute: bool = False
    """Compute the activations of each block again in the backward pass: far less memory, a third more work."""


class PerceptualSettings(Section):
    """LPIPS. `alex`, `vgg`: version 0.1, with weights to be given; `alex-st`, `vgg-st`: shift-tolerant, with weights in
    a package."""

    kind: Literal["alex-st", "vgg-st", "alex", "vgg"] = "vgg-st"
    """Network of LPIPS: `-st` come in a package, `alex` and `vgg` need weights."""
    weights: list[str] = []
    """Files or names that have the network and the weights of LPIPS's layers."""
    weight: Weight = 0.5
    """Of the perceptual distance in the loss."""
    frames: Positive | None = None
    """Of each sample that are looked at in a step, drawn by its seed; null: all."""


class GanSettings(Section):
    """A patch discriminator, from a step on."""

    weight: Weight = 0.05
    """Of the gradient that the reconstruction loss has at the last layer."""
    start: Annotated[int, Field(ge=0)] = 250_000
    """First step with it; before that, the discriminator does not learn either."""
    layers: Annotated[int, Field(ge=1, le=8)] = 5
    """Of the discriminator."""
    width: Positive = 64
    """Features of the discriminator's first layer."""
    optimizer: OptimizerSettings = OptimizerSettings(lr=1e-4)


class VAEPreviewSettings(Previews):
    count: Positive = 4
    """Videos of a preview."""


class VAESettings(RunSettings):
    """`datakit train vae`. Defaults: those of Open-Sora 2.0's video DC-AE (arXiv:2503.09642)."""

    steps: Positive = 450_000
    """Optimizer steps of the run."""
    autoencoder: TrainedAutoencoder = TrainedAutoencoder()
    optimizer: OptimizerSettings = OptimizerSettings(lr=5e-5)
    perceptual: PerceptualSettings | None = PerceptualSettings()
    """Null: none."""
    kl: Weight = 1e-6
    """Of the divergence from a standard normal, a sample's sum over the values of one frame; only where there is a
    spread."""
    gan: GanSettings | None = GanSettings()
    """Null: none."""
    preview: VAEPreviewSettings = VAEPreviewSettings()

    @model_validator(mode="after")
    def _whole_layers(self) -> VAESettings:
        if self.engine.plugin not in ("ddp", "zero1", "zero2"):
            raise ValueError(
                f"engine.plugin={self.engine.plugin} cannot train an autoencoder: the adversarial loss is weighed by "
                f"gradients of its last "
                "layer, which a rank must hold whole, and hybrid divides MMDiTs only; take ddp, zero1 or zero2"
            )
        if self.loader.latents != "no":
            raise ValueError("loader.latents: an autoencoder is trained on frames")
        return self
