"""Settings of an autoencoder."""

from __future__ import annotations

from typing import Any, Literal

from datakit.config import Section


class AutoencoderSettings(Section):
    """`weights`: a file, folder or name (see `datakit models list`); null for `tiny`: those that come with datakit."""

    kind: Literal["hunyuan", "dc-ae", "tiny"] = "hunyuan"
    """Which autoencoder: HunyuanVideo's, the Video DC-AE, or a small one for CPUs."""
    weights: str | None = None
    """A file, a folder or a name of `datakit models list`; null for `tiny`: those that come with datakit."""
    sizes: dict[str, Any] = {}
    """Of another model of the kind than the released one."""
    tiled: bool = False
    """Encode in tiles: less memory, seams below what can be seen."""
