"""Settings of an autoencoder."""

from __future__ import annotations

from typing import Annotated, Any

from datakit.config import Section
from trainer.models.autoencoders.registry import AUTOENCODERS

Kind = Annotated[str, AUTOENCODERS.choice]


class AutoencoderSettings(Section):
    """`weights`: a file, folder or name (see `datakit models list`); null for `tiny`: those that come with datakit."""

    kind: Kind = "hunyuan"
    """Which autoencoder: HunyuanVideo's, the Video DC-AE, or a small one for CPUs."""
    weights: str | None = None
    """A file, a folder or a name of `datakit models list`; null for `tiny`: those that come with datakit."""
    sizes: dict[str, Any] = {}
    """Of another model of the kind than the released one."""
    tiled: bool = False
    """Encode in tiles: less memory, seams below what can be seen."""
