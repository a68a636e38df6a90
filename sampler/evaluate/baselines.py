"""What any model should beat: videos of noise, and the mean picture of the footage held still. Made as files of the
samples' sizes and embedded by the same stages, in a catalog that lives as long as that takes."""

from __future__ import annotations

import csv
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import polars as pl

from catalogs.interop import import_dataset
from catalogs.tables.catalog import Catalog
from datakit.errors import CatalogError, MediaError
from datakit.video.thumbnail import clip_thumbnail
from datakit.video.writer import VideoWriter
from pipelines.settings import Settings
from sampler.evaluate.features import RealFeatures
from sampler.evaluate.result_sets import FACTS, SampleSet
from sampler.evaluate.scoring import Scorer

NOISE, STILL = "noise", "the mean frame"
MOST_NOISE = 64
"""Videos of noise: they are slow to encode, and one is like the other."""
MOST_PICTURES = 128
"""Training clips whose middle frames make the mean."""
PICTURE_SIDE = 640
MIDDLE, SPREAD = 127.5, 64.0
"""Of the noise: mean, and standard deviation, codes of 0..255 (what falls outside is clipped)."""
THREADS = 4


class Geometry(NamedTuple):
    """Of a video. `fps`: frames per second (None: one frame)."""

    width: int
    height: int
    num_frames: int
    fps: float | None


def baselines(
    scorer: Scorer,
    settings: Settings,
    stages: list[str],
    real: RealFeatures,
    samples: SampleSet,
    seed: int,
) -> dict[str, np.ndarray]:
    """Features of as many videos of noise (at most `MOST_NOISE`), and of as many stills, as there are samples, each of
    a sample's size.

    Args:
        stages: `embed`, and what its pictures depend on.
        settings: under which they ran on both sides.

    Returns:
        float32 [n, d] by name.

    Raises:
        CatalogError: no training clip can be read, or the videos could not be embedded.
    """
    sizes = [Geometry(*row) for row in samples.videos.select("width", "height", "num_frames", "fps").iter_rows()]
    mean = mean_picture(real, samples_aspect(sizes))
    with tempfile.TemporaryDirectory(prefix="datakit-baselines-") as name:
        folder = Path(name)
        noise = [
            _write(folder / f"noise-{i}.mp4", size, _noise(size, (seed, i)))
            for i, size in enumerate(sizes[:MOST_NOISE])
        ]
        still = {
            size: _write(folder / f"still-{i}.mp4", size, _still(size, mean)) for i, size in enumerate(Counter(sizes))
        }
        vectors = _embedded(folder, [*noise, *still.values()], scorer, settings, stages, real.fingerprint)
    return {
        NOISE: np.stack([vectors[path] for path in noise]),
        STILL: np.stack([vectors[still[size]] for size in sizes]),
    }


def mean_picture(real: RealFeatures, aspect: float) -> np.ndarray:
    """Mean of the middle frames of training clips, cut to one shape: float64 R'G'B' [h, w, 3], 0..255.

    Args:
        aspect: height over width.

    Raises:
        CatalogError: none of the clips can be read.
    """
    ids = real.rows["clip_id"].head(MOST_PICTURES)
    clips = (
        real.catalog.clips(columns=["clip_id", "path", *FACTS]).filter(pl.col("clip_id").is_in(ids.to_list())).collect()
    )
    width = PICTURE_SIDE if aspect <= 1 else max(1, round(PICTURE_SIDE / aspect))
    size = (width, max(1, round(width * aspect)))

    def look(clip: dict) -> np.ndarray | None:
        try:
            jpeg = clip_thumbnail(real.catalog.root, clip, PICTURE_SIDE)
        except MediaError:  # one of many: the mean is that of the others
            return None
        picture = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
        assert picture is not None, "a JPEG that was just made"
        return cut_to(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), size)

    with ThreadPoolExecutor(THREADS) as pool:
        pictures = [picture for picture in pool.map(look, clips.to_dicts()) if picture is not None]
    if not pictures:
        raise CatalogError(
            f"no clip of {real.catalog.root} can be read: their sources are gone; `datakit catalog relink` tells "
            f"where to, "
            "--no-baselines does without"
        )
    return np.asarray(np.mean(pictures, axis=0, dtype=np.float64))


def cut_to(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The middle of a picture, of the shape of `size` (width, height), scaled to it."""
    height, width = picture.shape[:2]
    scale = min(width / size[0], height / size[1])
    w, h = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    x, y = (width - w) // 2, (height - h) // 2
    return cv2.resize(picture[y : y + h, x : x + w], size, interpolation=cv2.INTER_AREA)


def samples_aspect(sizes: Sequence[Geometry]) -> float:
    """Height over width of most samples."""
    width, height, *_ = Counter(sizes).most_common(1)[0][0]
    return height / width


def _noise(size: Geometry, seed: tuple[int, int]) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    for _ in range(size.num_frames):
        frame = rng.normal(MIDDLE, SPREAD, (size.height, size.width, 3))
        yield frame.round().clip(0, 255).astype(np.uint8)


def _still(size: Geometry, mean: np.ndarray) -> Iterator[np.ndarray]:
    frame = cut_to(mean.astype(np.float32), (size.width, size.height)).round().clip(0, 255).astype(np.uint8)
    for _ in range(size.num_frames):
        yield frame


def _write(path: Path, size: Geometry, frames: Iterator[np.ndarray]) -> Path:
    rate = size.fps or 1.0
    with VideoWriter(path, size.width, size.height, 1 / Fraction(rate).limit_denominator(1001), rate) as writer:
        for pts, frame in enumerate(frames):
            writer.write_rgb(frame, pts)
    return path


def _embedded(
    folder: Path,
    files: list[Path],
    scorer: Scorer,
    settings: Settings,
    stages: list[str],
    fingerprint: str,
) -> dict[Path, np.ndarray]:
    listing, root = folder / "files.csv", folder / "baselines"
    with open(listing, "w", newline="") as file:
        csv.writer(file).writerows([["path"], *([str(path)] for path in files)])
    import_dataset(str(listing), str(root))
    scorer.run(str(root), settings, stages)
    catalog = Catalog(root)
    rows = catalog.embeddings().filter(pl.col("fingerprint") == fingerprint).select("clip_id", "vector")
    found = dict(
        catalog.clips(columns=["clip_id", "uri"]).join(rows, on="clip_id").select("uri", "vector").collect().iter_rows()
    )
    lost = [path for path in files if found.get(str(path)) is None]
    if lost:
        raise CatalogError(f"{len(lost)} of {len(files)} baseline videos could not be embedded (first: {lost[0].name})")
    return {path: np.asarray(found[str(path)], np.float32) for path in files}
