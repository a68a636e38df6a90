"""The same prompts by every checkpoint: a few frames of each sample in one strip."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np

from datakit.errors import ErrorKind, MediaError
from datakit.video.reader import VideoReader
from datakit.video.thumbnail import JPEG_QUALITY
from sampler.evaluate.result_sets import SampleSet, file_of, key_of

FRAMES = 3
HEIGHT = 90
WIDEST = 480
"""Of a strip, px."""
GAP = 3
THREADS = 4


@dataclass(frozen=True)
class Cell:
    """A sample. `strip`: JPEG, or None and in `problem` why."""

    sample_id: str
    file: str
    strip: bytes | None
    problem: str = ""


@dataclass(frozen=True)
class Row:
    """One prompt, seed and number; a cell for each checkpoint (None: it has not made that)."""

    prompt: str
    seed: int | None
    number: int | None
    cells: list[Cell | None]


@dataclass(frozen=True)
class Grid:
    """`every`: rows there are; `rows`: those that are shown."""

    labels: list[str]
    rows: list[Row]
    every: int


def make_grid(sets: Sequence[SampleSet], most: int) -> Grid:
    """Rows by prompt, seed and number; first those that most checkpoints have.

    Args:
        most: rows to draw.
    """
    found: dict[tuple, list[dict | None]] = {}
    for i, s in enumerate(sets):
        for row in s.rows.iter_rows(named=True):
            found.setdefault(key_of(row), [None] * len(sets))[i] = row
    order = sorted(
        found, key=lambda key: (sum(row is None for row in found[key]), key[0] or "", key[1] or 0, key[2] or 0, key[3])
    )
    shown = order[:most]
    asked = [(s, row) for key in shown for s, row in zip(sets, found[key])]
    with ThreadPoolExecutor(THREADS) as pool:
        cells = pool.map(lambda each: None if each[1] is None else _cell(*each), asked)
        rows = [Row(key[0], key[1], key[2], [next(cells) for _ in sets]) for key in shown]
    return Grid([s.label for s in sets], rows, len(order))


def strip(uri: str, stream: int | None, start_pts: int, end_pts: int, frames: int) -> bytes:
    """First, middle and last frame of a span side by side, as JPEG.

    Args:
        frames: of the span; fewer than three are each shown once.

    Raises:
        MediaError: the file cannot be read.
    """
    chosen = sorted({round(i * (frames - 1) / (FRAMES - 1)) for i in range(FRAMES)})
    targets = [start_pts + int((end_pts - start_pts) * max(0.0, (i - 0.5) / frames)) for i in chosen]
    with VideoReader(uri, stream) as reader:
        pictures = [_small(picture.rgb(2 * WIDEST), len(chosen)) for _, picture in reader.at(targets)]
    if not pictures:
        raise MediaError(ErrorKind.TRUNCATED, f"{uri} has no frame at {start_pts}")
    gap = np.full((pictures[0].shape[0], GAP, 3), 255, np.uint8)
    joined = np.concatenate([part for picture in pictures for part in (gap, picture)][1:], axis=1)
    return cv2.imencode(".jpg", joined[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()


def _small(rgb: np.ndarray, of: int) -> np.ndarray:
    height, width = rgb.shape[:2]
    scale = min(HEIGHT / height, WIDEST / of / width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(rgb, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST)


def _cell(s: SampleSet, row: dict) -> Cell:
    file = file_of(s.root, row)
    if row["uri"] is None:
        return Cell(row["sample_id"], file, None, "not a video file")
    try:
        return Cell(
            row["sample_id"],
            file,
            strip(row["uri"], row["stream"], row["start_pts"], row["end_pts"], row["num_frames"]),
        )
    except MediaError as e:
        return Cell(row["sample_id"], file, None, e.message[:200])
