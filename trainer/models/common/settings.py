"""Settings of a diffusion transformer: what holds for every architecture, and LoRA. The options of one architecture are
those of its own section (`Architecture.settings`), which stands in the same place. Importing this takes no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from datakit.config import Section
from trainer.models.common.dit_architecture import ARCHITECTURES, DEFAULT


class LoraSettings(Section):
    """Low-rank updates of linears."""

    rank: int = Field(16, gt=0)
    """Rank of the update of each layer."""
    alpha: float | None = Field(None, gt=0)
    """The update is scaled by alpha / rank; null: alpha = rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Of the input of each update, in training."""
    targets: tuple[str, ...] | None = None
    """Patterns of the names of linears (`*_attn.proj`, `single_blocks.0.*`); null: attention and MLP of every block."""


class DiTModelSettings(Section):
    """A diffusion transformer. Features of tokens and texts follow from the autoencoder and the text encoder."""

    architecture: Annotated[str, ARCHITECTURES.choice] = DEFAULT
    """Which one; the other options are its own."""
    weights: str | None = None
    """To start from; sizes must fit. Null: random."""
    lora: LoraSettings | None = None
    """Train low-rank updates of the model, not the model itself. Null: the whole."""

    @classmethod
    def chosen(cls, values: Mapping[str, Any]) -> type[Section]:
        """The section of the architecture that the values name."""
        named = DiTModelSettings.model_validate({key: values[key] for key in ("architecture",) if key in values})
        return ARCHITECTURES.get(named.architecture).settings

    @model_validator(mode="after")
    def _lora_has_a_base(self) -> DiTModelSettings:
        if (
            self.lora is not None and self.weights is None
        ):  # gates of random weights are zero: LoRA alone could learn nothing
            raise ValueError("lora adapts a model that has learned something: set model.weights")
        return self


def _of_its_architecture(value: Any) -> Any:
    return DiTModelSettings.chosen(value).model_validate(value) if isinstance(value, Mapping) else value


DiTModel = Annotated[SerializeAsAny[DiTModelSettings], BeforeValidator(_of_its_architecture)]
"""The settings of one architecture, whichever the values name."""


def usual_model() -> DiTModelSettings:
    """The defaults of the architecture that is meant where none is named."""
    return ARCHITECTURES.get(DEFAULT).settings()
