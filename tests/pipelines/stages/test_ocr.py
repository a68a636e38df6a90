"""Drawn text has the area that was drawn; savings do not change what is measured."""

import cv2
import numpy as np
import pytest

from pipelines.stages.ocr import Ocr, crop, is_flat, network_size
from pipelines.video_tasks.analyse import analyse
from pipelines.video_tasks.messages import ClipBatch, PassJob
from support.drawn_videos import encode, texture
from support.ocr_savings import savings


@pytest.fixture(scope="module")
def ocr():
    return Ocr()


def row(image: np.ndarray, **crop_box) -> dict:
    return {"width": image.shape[1], "height": image.shape[0], "crop_width": None, **crop_box}


def card(height: int, lines: list[str], scale: float = 1.0) -> tuple[np.ndarray, float]:
    """White text on a dark picture, and the share of it that the text lines' boxes cover."""
    width = height * 16 // 9
    image = np.full((height, width, 3), 30, np.uint8)
    size = height / 360 * 1.4 * scale
    thick = max(1, round(height / 360 * 3))
    covered = 0
    for i, line in enumerate(lines):
        (w, h), base = cv2.getTextSize(line, cv2.FONT_HERSHEY_SIMPLEX, size, thick)
        cv2.putText(
            image,
            line,
            (round(width * 0.06), round(height * (0.25 + 0.22 * i))),
            cv2.FONT_HERSHEY_SIMPLEX,
            size,
            (230, 230, 230),
            thick,
        )
        covered += w * (h + base)
    return image, covered / (width * height)


@pytest.mark.parametrize("height", [240, 360, 720, 1080])
def test_drawn_text_has_its_area_at_every_size(ocr, height):
    image, area = card(height, ["READ THIS LINE", "AND THAT ONE", "THEN STOP"])
    small = cv2.resize(image, (640, 360), interpolation=cv2.INTER_AREA) if height > 360 else image
    (result,) = ocr.run([row(image)], [[small]])
    assert result["ocr_boxes"] >= 3
    # The detector's boxes are looser than the letters by about half of a line's height around.
    assert area * 0.7 <= result["ocr_area"] <= area * 2.0, (result["ocr_area"], area)


def test_the_area_is_the_same_at_every_size(ocr, tmp_path):
    """Through the whole pass: 240p at 24, 720p at 30, 1080p at 60 frames a second."""
    areas = []
    for height, fps in ((240, 24), (720, 30), (1080, 60)):
        image, _ = card(height, ["READ THIS LINE", "AND THAT ONE", "THEN STOP"])
        image = image[:, : image.shape[1] // 2 * 2]
        video = encode(tmp_path / f"{height}.mp4", [image] * fps, fps, pix_fmt="yuv420p")
        (batch,) = (
            item
            for item in analyse(PassJob("v", str(video), "0", 0, positions=(0.1, 0.5, 0.9)))
            if isinstance(item, ClipBatch)
        )
        areas.append(ocr.run([{**batch.rows[0], "crop_width": None}], batch.images)[0]["ocr_area"])
    assert max(areas) <= 1.15 * min(areas) and min(areas) > 0.1, areas


def test_pictures_without_text_have_none(ocr):
    clean = texture(360, 640, 3)
    assert ocr.run([row(clean)], [[clean, clean // 2]]) == [{"ocr_area": 0.0, "ocr_boxes": 0}]


def test_clips_do_not_mix(ocr):
    text, _ = card(360, ["HELLO WORLD"])
    clean = texture(360, 640, 1)
    results = ocr.run([row(clean), row(text), row(clean)], [[clean], [text, text], []])
    assert [r["ocr_boxes"] for r in results] == [0, 1, None]
    assert results[0]["ocr_area"] == 0 and results[1]["ocr_area"] > 0.02 and results[2]["ocr_area"] is None


def test_the_mean_is_over_frames(ocr):
    text, _ = card(360, ["HELLO WORLD"])
    clean = texture(360, 640, 1)
    both = ocr.run([row(text), row(text)], [[text], [text, clean]])
    assert both[1]["ocr_area"] == pytest.approx(both[0]["ocr_area"] / 2)


def test_text_in_the_bars_does_not_count(ocr):
    image = np.zeros((360, 640, 3), np.uint8)
    image[60:300] = texture(240, 640, 2)
    cv2.putText(image, "SUBTITLE IN THE BAR", (100, 345), cv2.FONT_HERSHEY_SIMPLEX, 1.1, (255, 255, 255), 3)
    box = dict(crop_x=0, crop_y=120, crop_width=1280, crop_height=480)
    whole = {"width": 1280, "height": 720, "crop_width": None}
    inside = {"width": 1280, "height": 720, **box}
    seen, unseen = ocr.run([whole, inside], [[image], [image]])
    assert seen["ocr_boxes"] == 1 and unseen["ocr_boxes"] == 0
    assert crop(image, inside).shape == (240, 640, 3)


def test_savings_leave_the_area_alone(ocr, footage, titles):
    skipped, compared = savings(ocr, [*footage.values(), titles])
    assert skipped > 0 and compared > 25


def test_flat_frames_are_recognised():
    assert is_flat(np.full((90, 160), 40, np.uint8))
    faint = np.full((90, 160), 40, np.uint8)
    faint[20:40, 30:60] += 10
    assert is_flat(faint)
    legible = np.full((90, 160), 40, np.uint8)
    cv2.putText(legible, "text", (20, 50), cv2.FONT_HERSHEY_SIMPLEX, 0.6, 110, 1)
    assert not is_flat(legible)


def test_network_sizes_are_multiples_of_32_and_capped():
    assert network_size(1920, 1080, 640) == (640, 352)
    assert network_size(200, 200, 640) == (192, 192)
    assert network_size(10, 3000, 640) == (32, 640)
