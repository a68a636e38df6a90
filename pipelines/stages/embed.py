"""Embeddings of clips, and what follows from them: aesthetics and the match of captions.

A clip's embedding is the mean of its frames' unit vectors, scaled to unit length; the length it had, `norm`, is
kept, so that means over frames of anything linear (a LAION head, the cosine with a caption) follow from it
exactly, and no picture has to be looked at twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipelines.stages.ocr import crop


class Embed:
    """`embedding`: a dict of `vector` (float32 [d], None without frames), `norm` and `frames`.

    Args:
        model, weights, precision, threads, batch: see `encoders.make_encoder`.
    """

    name = "embed"
    columns = ("embedding",)

    def __init__(self, model: str, weights: str, precision: str | None = None, threads: int = 1, batch: int = 64):
        from pipelines.stages.image_encoders import make_encoder

        self._encoder = make_encoder(model, weights, precision, threads, batch)

    def run(self, rows: Sequence[dict], images: Sequence[Sequence[np.ndarray]]) -> list[dict[str, object]]:
        """The embedding of each clip, from its uint8 RGB pictures [h, w, 3], inside the crop box."""
        pictures = [np.ascontiguousarray(crop(image, row)) for row, clip in zip(rows, images) for image in clip]
        vectors = self._encoder.images(pictures)
        ends = np.cumsum([len(clip) for clip in images])
        return [{"embedding": mean_of(part)} for part in np.split(vectors, ends[:-1])]


class CaptionMatch:
    """`caption_match`: mean over frames of the cosine between a clip's caption and its frames.

    Args: as for `Embed`; rows have `caption`, and of the clip's embedding `vector` and `norm`.
    """

    name = "caption_match"
    columns = ("caption_match",)

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
