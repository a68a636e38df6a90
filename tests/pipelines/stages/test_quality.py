"""Quality of pictures whose numbers can be worked out by hand."""

import math

import numpy as np
import pytest

from pipelines.stages.quality import FrameQuality, Quality, is_combed
from support.pictures import picture


def measured(pixels: np.ndarray) -> FrameQuality:
    return Quality().frame(picture(pixels))


def flat(code: int, height: int = 360, width: int = 640) -> np.ndarray:
    return np.full((height, width), code, np.uint8)


def test_blur_of_a_checkerboard():
    """Each pixel differs from its four neighbours by 20 codes, up and down in turn: the Laplacian is ±80, of mean 0."""
    board = np.where(np.add.outer(np.arange(360), np.arange(640)) % 2, 120, 100).astype(np.uint8)
    assert measured(board).blur == 80**2
    assert measured(flat(100)).blur == 0


def test_blur_is_the_variance_and_not_the_mean_square():
    """Columns 0, 0, 0, 200, mirrored at the edge: Laplacian 0, 0, 200, -400: (200² + 400²) / 4 less the mean's 50²."""
    columns = np.tile(np.array([0, 0, 0, 200], np.uint8), (360, 1))
    assert measured(columns).blur == pytest.approx(50_000 - 2_500)


@pytest.mark.parametrize(
    "code, brightness", [(128, 112 / 219), (16, 0.0), (0, 0.0), (235, 1.0), (255, 1.0), (17, 1 / 219)]
)
def test_brightness_is_mean_luma_between_black_and_white(code, brightness):
    assert measured(flat(code)).brightness == pytest.approx(brightness)


def test_brightness_and_contrast_of_two_halves():
    """Codes 16 and 235, a quarter and three quarters of the picture: mean 3/4, standard deviation sqrt(3)/4."""
    halves = flat(235)
    halves[:, :160] = 16
    quality = measured(halves)
    assert quality.brightness == pytest.approx(3 / 4) and quality.contrast == pytest.approx(math.sqrt(3) / 4)
    assert measured(flat(128)).contrast == 0


@pytest.mark.parametrize(
    "colour, saturation",
    [((255, 0, 0), 1.0), ((0, 0, 255), 1.0), ((90, 90, 90), 0.0), ((50, 200, 50), 0.75), ((204, 153, 153), 0.25)],
)
def test_saturation_is_that_of_hsv(colour, saturation):
    """(largest - least) / largest of R, G and B; half the picture is grey."""
    pixels = np.full((64, 64, 3), 77, np.uint8)
    pixels[:, 32:] = colour
    assert measured(pixels).saturation == pytest.approx(saturation / 2, abs=0.0011)  # of 8-bit codes


def test_combing_is_seen_in_a_frame():
    combed = flat(100)
    combed[1::2] = 140
    assert measured(combed).combed and not measured(flat(100)).combed


def lines(slope: int, comb: int, height: int = 64, width: int = 64) -> np.ndarray:
    """Rising by `slope` a line, every other line `comb` higher: adjacent lines differ by `comb` on average (if that is
    more than the slope), lines two apart by twice the slope."""
    y = np.arange(height)
    return np.tile((y * slope + y % 2 * comb)[:, None], (1, width)).astype(np.uint16)


@pytest.mark.parametrize(
    "slope, comb, combed", [(2, 4, False), (2, 5, True), (5, 12, False), (5, 13, True), (0, 9, True)]
)
def test_lines_are_combed_when_adjacent_ones_differ_by_over_1_2_times_as_much_as_lines_two_apart(slope, comb, combed):
    assert is_combed(lines(slope, comb)) is combed


def test_combing_needs_half_a_code():
    """Over the lines of the band, 64 x 16 pixels: 512 differences of 1 are half a code on average, and not enough."""
    faint = lines(0, 0)
    faint[1:32:2] = 1  # 32 differences in each of 16 columns
    assert not is_combed(faint)
    faint[33, 24] = 1
    assert is_combed(faint)
    assert is_combed(lines(0, 1))
    third = lines(0, 0)
    third[1::2, 24:29] = 1  # 5 of 16 columns
    assert not is_combed(third)


def test_combing_is_looked_for_in_the_middle_quarter():
    """Columns 24 to 39 of 64."""
    for column, looked_at in ((23, False), (24, True), (39, True), (40, False)):
        comb = lines(0, 0)
        comb[1::2, column] = 200
        assert is_combed(comb) is looked_at
    steps = np.repeat(np.arange(16) % 2 * 60_000, 4)  # no comb: lines two apart differ by as much
    beside = lines(0, 200)
    beside[:, [23, 40]] = steps[:, None]
    assert is_combed(beside)
    beside[:, 24] = steps
    assert not is_combed(beside)


def test_combing_is_looked_for_in_all_lines_but_an_odd_last_one():
    low = lines(0, 0)
    low[41::2] = 200
    assert is_combed(low)
    odd = lines(0, 2, height=65)
    odd[64] = 2_000
    assert is_combed(odd)


def test_small_pictures_are_not_combed():
    assert (
        is_combed(lines(0, 9, height=64))
        and is_combed(lines(0, 9, height=65))
        and is_combed(lines(0, 9, height=63)) is False
    )


def test_a_clip_is_the_mean_of_its_frames_and_the_median_blur_of_five():
    """Of nine frames the first, third, fifth, seventh and ninth."""
    blurs = [7.0, 900.0, 1.0, 900.0, 50.0, 900.0, 4.0, 0.0, 9.0]
    frames = [FrameQuality(blur, i / 10, i / 20, i / 40, i < 3) for i, blur in enumerate(blurs)]
    assert Quality().summarise(frames) == {
        "blur": 7.0,  # of 7, 1, 50, 4, 9
        "brightness": pytest.approx(0.4),
        "contrast": pytest.approx(0.2),
        "saturation": pytest.approx(0.1),
        "interlaced": pytest.approx(1 / 3),
    }
    assert Quality().summarise(frames[:3])["blur"] == 7.0  # of 7, 900, 1
    assert (
        Quality().summarise(frames[:6])["blur"] == 50.0
    )  # frames 0, 1, 2, 4, 5 (2.5 is rounded to even): 7, 900, 1, 50, 900
    assert Quality().summarise(frames[3:5])["blur"] == 475.0


def test_a_clip_without_frames_has_no_quality():
    assert Quality().summarise([]) == dict.fromkeys(("blur", "brightness", "contrast", "saturation", "interlaced"))
