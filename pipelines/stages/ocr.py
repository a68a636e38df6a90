"""How much text covers a clip: the detection half of RapidOCR (PP-OCRv6, DB; weights in its wheel).

Costs are held down by looking at few frames per clip (`images.positions`), at `side` pixels, inside the
crop box only, and by not running the network on frames that cannot hold text or that repeat the frame
before. A look at a third of the size first would save more, but misses small print (the credits of
Big Buck Bunny), so it is not done.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from pydantic import Field

from datakit.columns import Column
from pipelines.stages.base import ImageSettings, ImageStage

CONFIDENCE = 0.7
"""Open-Sora 2.0 (arXiv:2503.09642): total area of boxes with confidence above 0.7."""
TALLEST_LINE = 0.3
"""A box whose shorter side exceeds this share of the picture's height is no line of text: the network
takes single figures before a plain sky for giant letters (0.62 of a frame of Big Buck Bunny)."""
LEAST_CONTRAST = 24
"""Luma range, in 8-bit codes, that some 8x8 block must have for the frame to hold legible text."""
SAME_PICTURE = 6
"""Frames are the same picture when no 16x16 block's mean changes by more codes than this."""


class Ocr(ImageStage):
    """RapidOCR's text detector, on few frames.

    Args:
        side: longer side of the picture the network sees, pixels.
        batch: most pictures of one size run at once.
    """

    name = "ocr"
    version = "1"
    order = 80
    columns = (
        Column(
            "ocr_area",
            "float32",
            "0..1",
            "union of text boxes (confidence ≥ 0.7) over picture area, mean over frames",
            good=-1,
        ),
        Column("ocr_boxes", "int32", "boxes", "most text boxes seen in a frame", good=-1),
    )
    upstream = ("letterbox",)
    runtime = ("batch",)

    class Settings(ImageSettings):
        side: int = Field(default=640, ge=64)
        """longer side of the picture the text detector sees, pixels"""
        batch: int = Field(default=8, ge=1)
        """pictures per network call"""

    def __init__(self, side: int = 640, batch: int = 8):
        import onnxruntime
        import rapidocr
        from rapidocr.ch_ppocr_det.utils import DBPostProcess

        model = os.path.join(os.path.dirname(rapidocr.__file__), "models", "PP-OCRv6_det_small.onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
        providers = [p for p in wanted if p in onnxruntime.get_available_providers()]
        self._session = onnxruntime.InferenceSession(model, options, providers=providers)
        self._input = self._session.get_inputs()[0].name
        # RapidOCR's own settings, but for the confidence.
        self._boxes = DBPostProcess(thresh=0.3, box_thresh=CONFIDENCE, unclip_ratio=1.6, use_dilation=True)
        self._side = side
        self._batch = batch

    def run(self, rows: Sequence[dict], images: Sequence[Sequence[np.ndarray]]) -> list[dict[str, object]]:
        """Columns of each clip.

        Args:
            rows: the clips; their crop boxes are used.
            images: for each clip its uint8 RGB pictures [h, w, 3].
        """
        pictures = [[crop(image, row) for image in clip] for row, clip in zip(rows, images)]
        distinct = [first_of_kind(clip) for clip in pictures]
        wanted = {(c, kinds[i]) for c, kinds in enumerate(distinct) for i in range(len(kinds)) if kinds[i] is not None}
        found = self._detect({key: pictures[key[0]][key[1]] for key in sorted(wanted)})
        return [self._summarise([found.get((c, kind), (0.0, 0)) for kind in kinds]) for c, kinds in enumerate(distinct)]

    def _summarise(self, frames: list[tuple[float, int]]) -> dict[str, object]:
        if not frames:
            return self.nothing()
        return {"ocr_area": float(np.mean([a for a, _ in frames])), "ocr_boxes": max(n for _, n in frames)}

    def _detect(self, pictures: dict[tuple[int, int], np.ndarray]) -> dict[tuple[int, int], tuple[float, int]]:
        """(area share, number of boxes) of each picture."""
        by_shape: dict[tuple[int, int], list] = {}
        for key, picture in pictures.items():
            by_shape.setdefault(network_size(picture.shape[1], picture.shape[0], self._side), []).append(key)
        found = {}
        for size, keys in by_shape.items():
            for start in range(0, len(keys), self._batch):
                part = keys[start : start + self._batch]
                stack = np.stack([_normalised(pictures[key], size) for key in part])
                maps = self._session.run(None, {self._input: stack})[0]
                for key, text_map in zip(part, maps):
                    found[key] = self._text_area(text_map, size)
        return found

    def _text_area(self, text_map: np.ndarray, size: tuple[int, int]) -> tuple[float, int]:
        import cv2

        width, height = size
        boxes, _ = self._boxes(text_map[None], (height, width))
        lines = [b for b in boxes if min(_side(b[0], b[1]), _side(b[1], b[2])) <= TALLEST_LINE * height]
        mask = np.zeros((height, width), np.uint8)
        for box in lines:
            cv2.fillPoly(mask, [box.astype(np.int32)], 1)
        return float(mask.mean()), len(lines)


def crop(image: np.ndarray, row: dict) -> np.ndarray:
    """The part of a picture inside the clip's crop box (all of it when there is none)."""
    if row.get("crop_width") is None:
        return image
    x_scale, y_scale = image.shape[1] / row["width"], image.shape[0] / row["height"]
    x0, x1 = (round(v * x_scale) for v in (row["crop_x"], row["crop_x"] + row["crop_width"]))
    y0, y1 = (round(v * y_scale) for v in (row["crop_y"], row["crop_y"] + row["crop_height"]))
    return image[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]


def first_of_kind(images: Sequence[np.ndarray]) -> list[int | None]:
    """For each frame of a clip, the first frame that shows the same picture; None: too flat to hold text."""
    import cv2

    greys = [cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY) for image in images]
    thumbs = [
        cv2.resize(g, (max(1, g.shape[1] // 16), max(1, g.shape[0] // 16)), interpolation=cv2.INTER_AREA) for g in greys
    ]
    kinds: list[int | None] = []
    for i, grey in enumerate(greys):
        if is_flat(grey):
            kinds.append(None)
            continue
        same = (
            k
            for k in dict.fromkeys(kinds)
            if k is not None
            and thumbs[k].shape == thumbs[i].shape
            and cv2.norm(thumbs[k], thumbs[i], cv2.NORM_INF) <= SAME_PICTURE
        )
        kinds.append(next(same, i))
    return kinds


def is_flat(grey: np.ndarray) -> bool:
    """No block of 8x8 pixels has the contrast of legible text."""
    import cv2

    kernel = np.ones((8, 8), np.uint8)
    spread = cv2.subtract(cv2.dilate(grey, kernel), cv2.erode(grey, kernel))
    return int(spread.max()) < LEAST_CONTRAST


def network_size(width: int, height: int, side: int) -> tuple[int, int]:
    """Width and height the network sees: longer side at most `side`, multiples of 32."""
    scale = min(1.0, side / max(width, height))
    return max(32, round(width * scale / 32) * 32), max(32, round(height * scale / 32) * 32)


def _normalised(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """float32 [3, h, w] in −1..1, channels B, G, R."""
    import cv2

    scaled = cv2.resize(picture, size)[..., ::-1].astype(np.float32)
    return np.ascontiguousarray(((scaled / 255 - 0.5) / 0.5).transpose(2, 0, 1))


def _side(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.hypot(*(a.astype(float) - b.astype(float))))
