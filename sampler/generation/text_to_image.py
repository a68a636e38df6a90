"""First frames from text: any text-to-image pipeline that diffusers has."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from datakit.dependencies import require
from datakit.errors import ConfigError
from datakit.weights.registry import locate

INDEX = "model_index.json"
"""Of a pipeline's folder: which parts it has."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TextToImage:
    """A pipeline, loaded.

    Args:
        model: folder, or name that `datakit.weights.registry.locate` finds: of a pipeline in diffusers' form (with a
            model_index.json).
        steps, guidance: None: the pipeline's own defaults.
        dtype: float32, bfloat16, float16; auto: bfloat16 on a GPU, float32 on a CPU.
        offload: keep only the part that works on the device, the others in main memory.

    Raises:
        MissingDependency: no such model on this machine, or no diffusers.
        ConfigError: it is no pipeline, makes no pictures from text, or does not load.
    """

    def __init__(
        self, model: str, steps: int | None, guidance: float | None, dtype: str, device: torch.device, offload: bool
    ):
        require("image.model", "train", "diffusers", "transformers", "accelerate")
        self._name = model
        chosen = DTYPES.get(dtype) or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        self._pipeline = _load(check_painter(model), chosen)
        self._options = self._known({"num_inference_steps": steps, "guidance_scale": guidance})
        self._pipeline.set_progress_bar_config(disable=True)
        if offload and device.type != "cpu":
            self._pipeline.enable_model_cpu_offload(device=device)
        else:
            self._pipeline.to(device)

    @torch.inference_mode()
    def paint(self, prompts: Sequence[str], seeds: Sequence[int], height: int, width: int) -> np.ndarray:
        """A picture for each prompt; it depends on its own prompt and seed only, so they are painted one by one, from
        noise that is drawn on the CPU.

        Args:
            seeds: 0 to 2⁶³ − 1.
            height, width: sizes that the pipeline does not take are painted as near as it can, scaled and cut in the
                middle.

        Returns:
            uint8 [N, height, width, 3].
        """
        with _quiet():  # CLIP says of every long prompt that it reads the first 77 tokens only
            pictures = [self._paint(prompt, seed, height, width) for prompt, seed in zip(prompts, seeds, strict=True)]
        return np.stack(pictures) if pictures else np.empty((0, height, width, 3), np.uint8)

    def _paint(self, prompt: str, seed: int, height: int, width: int) -> np.ndarray:
        generator = torch.Generator("cpu").manual_seed(seed)
        found = self._pipeline(
            prompt=prompt, height=height, width=width, generator=generator, output_type="np", **self._options
        ).images[0]
        if not np.isfinite(found).all():
            raise ConfigError(f"{self._name} paints numbers that are not finite: try another image.dtype")
        return _cover((found.clip(0, 1) * 255).round().astype(np.uint8), height, width)

    def _known(self, options: dict[str, Any]) -> dict[str, Any]:
        """Those that are set.

        Raises:
            ConfigError: the pipeline does not know one of them.
        """
        takes = inspect.signature(self._pipeline.__call__).parameters
        chosen = {name: value for name, value in options.items() if value is not None}
        strange = next(
            (name for name in ("prompt", "height", "width", "generator", "output_type", *chosen) if name not in takes),
            None,
        )
        if strange is not None:
            raise ConfigError(
                f"image.model={self._name} is a {type(self._pipeline).__name__}, which takes no {strange}"
            )
        return chosen


def check_painter(model: str) -> Path:
    """The folder of a pipeline; nothing is loaded.

    Raises:
        MissingDependency, ConfigError: no such model on this machine, or not in diffusers' form.
    """
    folder = locate(model)
    if not (folder / INDEX).is_file():
        raise ConfigError(
            f"{folder} is no pipeline of diffusers: it has no {INDEX}; image.model is a folder in diffusers' form, "
            f"with all of its parts"
        )
    return folder


def _load(folder: Path, dtype: torch.dtype) -> Any:
    import diffusers

    try:
        with _quiet():
            try:
                return diffusers.AutoPipelineForText2Image.from_pretrained(
                    folder, torch_dtype=dtype, local_files_only=True
                )
            except ValueError:  # not among the families that it knows by name; the folder says which class it is
                return diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
    except Exception as e:  # missing parts, unknown classes, broken weights: each library has its own
        raise ConfigError(f"the pipeline at {folder} does not load: {' '.join(str(e).split())[:300]}") from e


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars and advice."""
    import diffusers
    import transformers

    libraries = [library.utils.logging for library in (diffusers, transformers)]
    before = [(logging, logging.get_verbosity(), logging.is_progress_bar_enabled()) for logging in libraries]
    for logging in libraries:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # "torch_dtype is deprecated": earlier versions of diffusers know no other name
            yield
    finally:
        for logging, verbosity, bars in before:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()


def _cover(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scaled until it covers a size, and cut in the middle."""
    h, w = picture.shape[:2]
    if (h, w) == (height, width):
        return picture
    scale = max(height / h, width / w)
    size = max(width, round(w * scale)), max(height, round(h * scale))
    scaled = cv2.resize(picture, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    top, left = (size[1] - height) // 2, (size[0] - width) // 2
    return np.ascontiguousarray(scaled[top : top + height, left : left + width])
