"""The MMDiT as an architecture (`trainer.models.common.dit_architecture`): the only place where its config is made of
settings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.diffusion.rectified_flow import Velocity, velocity_of
from trainer.models.common.dit_architecture import Architecture, Flops, Inputs
from trainer.models.mmdit.checkpoint_io import (
    CONFIG_KEY,
    FIRST,
    POOLED,
    STATES,
    config_in,
    load_mmdit,
    open_sora_state,
    recognises,
    unwrapped,
)
from trainer.models.mmdit.flops import forward_flops
from trainer.models.mmdit.model import MMDiT, MMDiTConfig
from trainer.models.mmdit.settings import MMDiTSettings

LEFT_BEHIND = ("guidance_in.*",)
"""Of Flux's weights, when a model is trained from them: Open-Sora's has no guidance to be told."""


@dataclass(frozen=True)
class MMDiTArchitecture(Architecture):
    """See `trainer.models.mmdit.model`."""

    config: MMDiTConfig

    kind = "mmdit"
    settings = MMDiTSettings
    lora_targets = (
        "double_blocks.*_attn.*",
        "double_blocks.*_mlp.*",
        "single_blocks.*.q_proj",
        "single_blocks.*.k_proj",
        "single_blocks.*.v_mlp",
        "single_blocks.*.linear1",
        "single_blocks.*.linear2",
    )
    exact_inputs = frozenset({"timesteps", "guidance", "img_ids", "txt_ids"})
    fp8_kept = frozenset({"lin"})
    layouts = ("separate", "fused")

    @classmethod
    def of_settings(cls, settings: MMDiTSettings, inputs: Inputs) -> MMDiTArchitecture:
        usual = MMDiTConfig()
        return cls(
            MMDiTConfig(
                in_channels=inputs.channels * settings.patch_size**2,
                vec_in_dim=inputs.pooled or usual.vec_in_dim,
                context_in_dim=inputs.states or usual.context_in_dim,
                hidden_size=settings.hidden_size,
                mlp_ratio=settings.mlp_ratio,
                num_heads=settings.num_heads,
                depth=settings.depth,
                depth_single_blocks=settings.depth_single_blocks,
                axes_dim=settings.axes_dim,
                patch_size=settings.patch_size,
            )
        )

    @classmethod
    def of_file(cls, source: str | Path) -> MMDiTArchitecture:
        return cls(config_in(source))

    @classmethod
    def recognises(cls, names: Sequence[str]) -> bool:
        return recognises(names)

    @classmethod
    def inputs_of(cls, state: Mapping[str, Tensor], settings: MMDiTSettings) -> Inputs:
        plain = unwrapped(state, "the model")
        sizes = [plain[name].shape[1] for name in (FIRST, STATES, POOLED)]
        return Inputs(sizes[0] // settings.patch_size**2, *sizes[1:])

    @property
    def patch(self) -> int:
        return self.config.patch_size

    @property
    def channels(self) -> int:
        return self.config.in_channels // self.config.patch_size**2

    @property
    def head_features(self) -> int:
        return self.config.hidden_size // self.config.num_heads

    @property
    def takes_condition(self) -> bool:
        return self.config.cond_embed

    def build(self) -> MMDiT:
        return MMDiT(self.config)

    def initialise(self, model: MMDiT) -> None:
        model.initialise()

    def load(
        self, source: str | Path, dtype: torch.dtype | None = None, allow_unexpected: Sequence[str] | None = None
    ) -> MMDiT:
        behind = LEFT_BEHIND if allow_unexpected is None else tuple(allow_unexpected)
        return load_mmdit(source, self.config, dtype=dtype, allow_missing=("cond_in.*",), allow_unexpected=behind)

    def exported(
        self, state: Mapping[str, Tensor], layout: str | None = None
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        config = dataclasses.replace(self.config, layout=layout or self.config.layout)
        about = {CONFIG_KEY: json.dumps(dataclasses.asdict(config))}
        return open_sora_state(state, self.config, config.layout), about

    def velocity(self, model: Any) -> Velocity:
        return velocity_of(model, self.patch)

    def blocks(self, model: MMDiT) -> Sequence[nn.Module]:
        return model.blocks

    def checkpoint_activations(self, model: MMDiT, settings: MMDiTSettings) -> None:
        model.checkpoint_activations(*settings.recompute, settings.keep_attention)

    def shallow(self, blocks: int) -> MMDiTArchitecture:
        config = self.config
        fewer = {name: min(blocks, getattr(config, name)) for name in ("depth", "depth_single_blocks")}
        return MMDiTArchitecture(dataclasses.replace(config, **fewer))

    def flops(self, tokens: int) -> Flops:
        return forward_flops(self.config, tokens)

    def memory(self) -> dict[str, Any]:
        config = self.config
        return {
            "width": config.hidden_size,
            "double_blocks": config.depth,
            "single_blocks": config.depth_single_blocks,
        }
