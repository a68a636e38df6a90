"""HunyuanVideo's causal 3D autoencoder (arXiv:2412.03603): diffusers' network, without its tiling.

Parameters keep the names of the released `hunyuan_vae.safetensors`, which diffusers' are too.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from datakit.dependencies import install_command
from datakit.errors import ConfigError, MissingDependency
from trainer.models.autoencoders.base import Autoencoder
from trainer.models.autoencoders.tiling import Tiles


@dataclass(frozen=True)
class HunyuanConfig:
    """Sizes; the defaults are those of the released model (246.5 M parameters).

    Attributes:
        layers: residual blocks of each stage.
        groups: of the norms.
        scale, shift: latents are (raw − shift) · scale; the released ones.
    """

    latent_channels: int = 16
    widths: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2
    groups: int = 32
    scale: float = 0.476986
    shift: float = 0.0

    def __post_init__(self) -> None:
        if len(self.widths) != 4:
            raise ConfigError(f"the autoencoder hunyuan has 4 widths, not {len(self.widths)}")


class HunyuanVAE(Autoencoder):
    """4 × in time, 8 × in space. Its convolutions and its attention are causal, its norms are over all frames."""

    kind = "hunyuan"
    config_class = HunyuanConfig
    tiles = Tiles(64, 256, 256)
    blocks = frozenset({"HunyuanVideoResnetBlockCausal3D", "HunyuanVideoMidBlock3D"})

    def __init__(self, config: HunyuanConfig = HunyuanConfig()):
        super().__init__(config, config.latent_channels, (4, 8, 8), config.scale, config.shift, causal=True)
        network = _network(config)
        self.encoder, self.decoder = network.encoder, network.decoder
        self.quant_conv, self.post_quant_conv = network.quant_conv, network.post_quant_conv

    def moments(self, video: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(video))

    def pixels(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents))


def _network(config: HunyuanConfig):
    try:
        from diffusers import AutoencoderKLHunyuanVideo
    except ModuleNotFoundError as e:
        raise MissingDependency(f"the autoencoder hunyuan needs {e.name}: {install_command('train')}") from e
    return AutoencoderKLHunyuanVideo(
        latent_channels=config.latent_channels,
        block_out_channels=config.widths,
        layers_per_block=config.layers,
        norm_num_groups=config.groups,
        down_block_types=("HunyuanVideoDownBlock3D",) * len(config.widths),
        up_block_types=("HunyuanVideoUpBlock3D",) * len(config.widths),
    )
