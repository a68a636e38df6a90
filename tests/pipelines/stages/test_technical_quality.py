"""The column `quality` is BRISQUE as the package `brisque` computes it, turned so that high is good."""

import json
import math
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from catalogs.tables.catalog import Catalog
from datakit import config
from datakit.errors import ConfigError
from datakit.video.reader import VideoReader
from pipelines.runs.ingest import ingest
from pipelines.runs.score import score
from pipelines.settings import Settings
from pipelines.stages.technical_quality import (
    Regression,
    TechnicalQuality,
    asymmetric_fit,
    brisque_features,
    luma,
    normalised,
)
from support.drawn_videos import encode, moving, texture

REFERENCE = json.loads((Path(__file__).parents[2] / "data" / "brisque_reference.json").read_text())
"""Made by the package's own code on numpy 2.2, with libsvm: tests/data/tools/make_brisque_reference.py says how."""
FAST = config.load(Settings, None, ["ocr.enabled=false", "recipe=technical"])


@pytest.fixture(scope="module")
def stage() -> TechnicalQuality:
    return TechnicalQuality()


@pytest.fixture(scope="module")
def pictures(footage) -> dict[str, np.ndarray]:
    """The pictures of the reference: name -> uint8 RGB [h, w, 3]."""
    found = {"texture": texture(240, 320)}
    for name, index in (("bikes.mp4", 240), ("bigbuckbunny.mp4", 0)):
        with VideoReader(str(footage[name])) as reader:
            found[f"{name} {index}"] = next(p.rgb(640) for p in reader.frames() if p.index == index)
    return found


def quality(stage: TechnicalQuality, *images: np.ndarray, **row) -> float | None:
    return stage.run([row], [images])[0]["quality"]


# Film has flat areas, where the package's numbers hang on rounding noise: they move its features by up to 1e-3.
@pytest.mark.parametrize("name, tolerance", [("texture", 1e-6), ("bikes.mp4 240", 1e-3), ("bigbuckbunny.mp4 0", 1e-3)])
def test_features_and_score_are_the_packages_own(stage, pictures, name, tolerance):
    expected = REFERENCE[name]
    features = brisque_features(luma(pictures[name]))
    assert features == pytest.approx(expected["features"], abs=tolerance)
    assert Regression.shipped().predict(features[None])[0] == pytest.approx(expected["score"], abs=100 * tolerance)
    assert quality(stage, pictures[name]) == pytest.approx(1 - expected["score"] / 100, abs=tolerance)


def test_the_regression_is_that_of_libsvm():
    regression = Regression.shipped()
    features = np.array([REFERENCE[name]["features"] for name in REFERENCE])
    assert regression.vectors.shape == (770, 36)
    assert regression.predict(features) == pytest.approx([REFERENCE[name]["score"] for name in REFERENCE], abs=1e-6)


@pytest.mark.parametrize("alpha, left, right", [(0.6, 1.0, 1.0), (1.0, 2.0, 1.0), (2.0, 1.0, 1.0), (2.0, 0.5, 3.0)])
def test_the_fit_finds_the_distribution_that_was_drawn_from(alpha, left, right):
    """Gamma variates to the power of 1/alpha, with signs: an asymmetric generalised Gaussian of scales `left`,
    `right`."""
    rng = np.random.default_rng(0)
    size = rng.gamma(1 / alpha, size=1_000_000) ** (1 / alpha)
    below = rng.random(size.size) < left / (left + right)
    x = np.where(below, -left, right) * size
    variance = math.gamma(3 / alpha) / math.gamma(1 / alpha)
    found = asymmetric_fit(x.astype(np.float32)[None])
    assert found == pytest.approx((alpha, x.mean(), left**2 * variance, right**2 * variance), rel=0.02, abs=0.03)


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    return cv2.GaussianBlur(image, (0, 0), sigma)


def noise(image: np.ndarray, sigma: float) -> np.ndarray:
    grain = np.random.default_rng(0).normal(size=image.shape)
    return np.clip(image + sigma * grain, 0, 255).round().astype(np.uint8)


def jpeg(image: np.ndarray, level: int) -> np.ndarray:
    return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, level])[1], cv2.IMREAD_COLOR)


# Noise from 8 codes on: BRISQUE takes fainter grain on a soft picture for detail.
@pytest.mark.parametrize("name", ["bikes.mp4 240", "bigbuckbunny.mp4 0"])
@pytest.mark.parametrize(
    "damage, levels",
    [
        (blur, (0.6, 0.9, 1.2, 2, 3, 5)),
        (noise, (8, 16, 32, 64)),
        (jpeg, (80, 60, 40, 20, 10, 5)),
    ],
)
def test_more_damage_lowers_the_score(stage, pictures, name, damage, levels):
    scores = [quality(stage, damage(pictures[name], level)) for level in levels]
    assert all(a > b + 0.01 for a, b in zip(scores, scores[1:])), scores
    assert quality(stage, pictures[name]) > scores[-1] + 0.3


def test_a_clip_is_the_mean_of_its_frames_within_0_and_1(stage, pictures):
    good, poor = pictures["bigbuckbunny.mp4 0"], jpeg(pictures["bikes.mp4 240"], 2)
    assert quality(stage, poor) == 0.0  # BRISQUE is above 100 here
    assert quality(stage, good, poor) == pytest.approx(quality(stage, good) / 2)


def test_frames_without_contrast_do_not_count(stage, pictures):
    flat = [np.full((360, 640, 3), level, np.uint8) for level in (0, 90, 255)]
    almost = flat[1] + np.random.default_rng(0).integers(0, 2, (360, 640, 3)).astype(np.uint8)
    assert quality(stage) is None
    assert [quality(stage, image) for image in (*flat, almost)] == [None] * 4
    good = pictures["bigbuckbunny.mp4 0"]
    assert quality(stage, flat[0], good, almost) == quality(stage, good)


def test_odd_pictures_have_a_score_or_none(stage):
    """Stripes, a dot and a step have products of one sign only; tiny pictures have no window at half size."""
    stripes, dot, step = (np.zeros((90, 160, 3), np.uint8) for _ in range(3))
    stripes[::2], dot[45, 80], step[:, 80:] = 200, 255, 255
    checks = (np.indices((90, 160)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, 2)
    for image in (stripes, dot, step, checks):
        assert 0 <= quality(stage, image) <= 1
    for shape in ((1, 1), (1, 640), (13, 640)):
        assert quality(stage, texture(40, 640)[: shape[0], : shape[1]]) is None
    assert 0 <= quality(stage, texture(14, 640)) <= 1


def test_flat_areas_are_exactly_flat():
    """Their normalised luma is 0, not rounding noise whose sign the statistics would count."""
    slide = np.full((120, 200, 3), 201, np.uint8)
    slide[50:60, 50:150] = texture(10, 100)
    assert not normalised(luma(slide))[70:110, 10:190].any()


def test_only_the_picture_inside_black_borders_counts(stage, pictures):
    image = pictures["bigbuckbunny.mp4 0"]
    boxed = cv2.copyMakeBorder(image, 60, 60, 0, 0, cv2.BORDER_CONSTANT)
    row = {"width": 1280, "height": 960, "crop_x": 0, "crop_y": 120, "crop_width": 1280, "crop_height": 720}
    assert quality(stage, boxed, **row) == quality(stage, image) != quality(stage, boxed)


def test_score_fills_the_column(tmp_path, ray_address, footage, stage):
    root = str(tmp_path / "c")
    ingest([str(footage["bikes.mp4"])], root, FAST, ray_address)
    assert Catalog(root).clips().collect()["quality"].is_null().all()
    command = [sys.executable, "-m", "datakit", "run", "score", "--catalog", root, "--stages", "technical_quality"]
    done = subprocess.run([*command, "--ray", ray_address], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    clips = Catalog(root).clips().sort("start_frame").collect()
    assert clips["quality"].is_null().to_list() == [False] * 5 + [True]  # 8 frames, none of them on the grid
    with VideoReader(str(footage["bikes.mp4"])) as reader:
        first = [p.rgb(640) for p in reader.frames() if p.index in (0, 13, 25)]  # the grid frames nearest 10, 50, 90 %
    row = clips.row(0, named=True)
    assert row["quality"] == pytest.approx(quality(stage, *first, **row), abs=1e-3)


def test_ingest_and_score_agree_on_letterboxed_and_black_clips(tmp_path, ray_address):
    (tmp_path / "in").mkdir()
    boxed = moving(240, 426, 25, 2.4, lambda t: [[1, 0, 0.2 * t], [0, 1, 0]])
    for frame in boxed:
        frame[:40], frame[-40:] = 0, 0
    encode(tmp_path / "in" / "boxed.mp4", boxed, 25, pix_fmt="yuv420p")
    encode(tmp_path / "in" / "black.mp4", [np.zeros((240, 426, 3), np.uint8)] * 60, 25, pix_fmt="yuv420p")
    values = {}
    for name, at_ingest in (("ingested", True), ("scored", False)):
        root = str(tmp_path / name)
        settings = config.load(
            Settings, None, ["ocr.enabled=false", "recipe=technical", f"technical_quality.enabled={at_ingest}"]
        )
        ingest([str(tmp_path / "in")], root, settings, ray_address)
        if not at_ingest:
            score(root, settings, ["technical_quality"], ray=ray_address)
        rows = {Path(row["uri"]).stem: row for row in Catalog(root).clips().collect().iter_rows(named=True)}
        assert not any(row["errors"] for row in rows.values()) and abs(rows["boxed"]["crop_height"] - 160) <= 4
        values[name] = {stem: row["quality"] for stem, row in rows.items()}
    assert values["ingested"]["black"] is None and values["scored"]["black"] is None
    assert 0 < values["ingested"]["boxed"] < 1
    assert values["scored"]["boxed"] == pytest.approx(values["ingested"]["boxed"], abs=1e-3)


def test_without_the_package_the_run_says_what_to_install(tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "brisque" else find(name, *a))
    with pytest.raises(ConfigError, match="stage technical_quality needs brisque: uv sync --inexact --extra quality"):
        score(str(tmp_path), FAST, ["technical_quality"])
    with pytest.raises(ModuleNotFoundError, match="--extra quality"):
        TechnicalQuality()


def test_the_packages_code_is_not_imported(stage):
    assert "brisque" not in sys.modules
