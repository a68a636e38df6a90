"""The models that sampling takes, each loaded once, on the device while there is room.

Where there is not (or `work.offload` says so), the others wait in main memory while one works.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from sampler.generation.model_source import Checkpoint, load_model
from sampler.settings import SampleSettings
from trainer.models.autoencoders.base import Autoencoder
from trainer.models.autoencoders.build import load_autoencoder
from trainer.models.common.compile import compile_blocks
from trainer.models.common.fp8 import to_fp8
from trainer.models.common.text_encoders import TextEncoder, build_text_encoder

if TYPE_CHECKING:
    from sampler.generation.text_to_image import TextToImage

Name = Literal["text", "autoencoder", "dit"]


class Models:
    """Builds models when they are asked for.

    Args:
        split: applied to the diffusion transformer on the CPU, before it is moved: cuts it for several devices.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: SampleSettings,
        device: torch.device,
        split: Callable[[nn.Module], nn.Module] | None = None,
    ):
        self.checkpoint, self.settings, self.device, self._split = checkpoint, settings, device, split
        on_gpu = device.type == "cuda"
        self.dtype = (
            torch.bfloat16 if (settings.work.precision or ("bf16" if on_gpu else "fp32")) == "bf16" else torch.float32
        )
        self._loaded: dict[Name, nn.Module] = {}
        self._painter: TextToImage | None = None
        self._compiled = False

    @property
    def text(self) -> TextEncoder:
        return self._on_device("text", self._build_text)

    @property
    def autoencoder(self) -> Autoencoder:
        return self._on_device("autoencoder", self._build_autoencoder)

    @property
    def dit(self) -> nn.Module:
        """The diffusion transformer."""
        return self._on_device("dit", self._build_dit)

    @property
    def painter(self) -> TextToImage:
        """The text-to-image model; it has the device while it is used, see `release_painter`."""
        if self._painter is None:
            from sampler.generation.text_to_image import TextToImage

            own = self.settings.image
            assert own.model is not None
            self._leave(self._loaded)
            self._painter = TextToImage(own.model, own.steps, own.guidance, own.dtype, self.device, own.offload)
        return self._painter

    def release_painter(self) -> None:
        self._painter = None
        self._free()

    def compile(self) -> None:
        """Compile the diffusion transformer's blocks from now on."""
        if not self._compiled:
            compile_blocks(self.checkpoint.architecture.blocks(self.dit))
            self._compiled = True

    def make_room(self, keep: Name) -> bool:
        """Send the others to main memory; whether there were any."""
        others: dict[Name, nn.Module] = {
            name: model
            for name, model in self._loaded.items()
            if name != keep and _device_of(model) != torch.device("cpu")
        }
        if self.device.type == "cpu" or not others:
            return False
        self._leave(others)
        return True

    def _on_device(self, name: Name, build: Callable[[], nn.Module]) -> Any:
        if self.settings.work.offload:
            self.make_room(name)
        if name not in self._loaded:
            self._loaded[name] = build()
        model = self._loaded[name]
        if _device_of(model) != self.device:
            try:
                model.to(self.device)
            except torch.OutOfMemoryError:
                if not self.make_room(name):
                    raise
                model.to(self.device)
        return model

    def _build_text(self) -> TextEncoder:
        own = self.checkpoint.text
        return build_text_encoder(own.kind, **own.options)

    def _build_autoencoder(self) -> Autoencoder:
        model = load_autoencoder(self.checkpoint.autoencoder)
        dtype = (
            self.dtype if self.device.type == "cuda" else torch.float32
        )  # torch 2.13's bf16 convolutions on CPUs give NaN
        return model.requires_grad_(False).eval().to(dtype)

    def _build_dit(self) -> nn.Module:
        model, architecture = load_model(self.checkpoint, self.settings.model), self.checkpoint.architecture
        if self._split is not None:
            model = self._split(model)
        model = model.to(self.dtype)
        if self.settings.work.fp8:
            if self.device.type == "cuda":
                self.make_room("dit")
            to_fp8(architecture.blocks(model), self.settings.work.fp8, self.device, architecture.fp8_kept)
        return model

    def _leave(self, models: dict[Name, nn.Module]) -> None:
        for model in models.values():
            model.to("cpu")
        self._free()

    def _free(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


@contextlib.contextmanager
def out_of_memory_as(found: list[bool]):
    """Note whether the block ran out of the device's memory, in place of raising it; what it held is free again."""
    try:
        yield
    except torch.OutOfMemoryError:
        found.append(True)
    if found and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
