"""Settings of an autoencoder."""

from __future__ import annotations

from typing import Any, Literal

from datakit.config import Section


class AutoencoderSettings(Section):
    """`weights`: a file, folder or name (see `datakit models list`); null for `tiny`: those that come with datakit."""

    kind: Literal["hunyuan", "dc-ae", "tiny"] = "hunyuan"
    weights: str | None = None
    sizes: dict[str, Any] = {}
    """Of another model of the kind than the released one."""
    tiled: bool = False
    """Encode in tiles: less memory, seams below what can be seen."""
