"""Known colours come back within 2/255 on every decode path, whatever the tags, range, depth and size."""

from fractions import Fraction

import av
import numpy as np
import pytest

from datakit.errors import ErrorKind, MediaError
from datakit.identity import Span
from datakit.video.color import RGB_TO_LUMA_CODES, Colour, swscale_tables, yuv_to_rgb
from datakit.video.cut import cut
from datakit.video.frame import Geometry, Picture
from datakit.video.reader import VideoReader
from support.drawn_videos import bars, encode

CASES = [
    # height, width, matrix, full range, tagged, pixel format
    (720, 1280, "bt709", False, True, "yuv420p"),
    (720, 1280, "bt709", False, False, "yuv420p"),  # untagged HD is BT.709
    (1080, 1920, "bt709", True, True, "yuv420p"),
    (240, 320, "bt601", False, False, "yuv420p"),  # untagged SD is BT.601
    (240, 320, "bt601", False, True, "yuv420p"),
    (240, 320, "bt709", False, True, "yuv420p"),  # the tag wins over the size
    (240, 320, "bt601", True, True, "yuv444p"),
    (720, 1280, "bt709", False, True, "yuv444p10le"),
    (240, 320, "bt2020", False, True, "yuv444p10le"),
]


def middles(picture: np.ndarray) -> np.ndarray:
    """The colour in the middle of each of eight bars, away from the edges."""
    h, w = picture.shape[:2]
    return np.array([picture[h // 2, round((i + 0.5) * w / 8)] for i in range(8)], int)


@pytest.fixture(params=CASES, ids=lambda c: "-".join(map(str, c)))
def bar_video(request, tmp_path):
    height, width, matrix, full, tagged, pix_fmt = request.param
    picture = bars(height, width)
    path = encode(
        tmp_path / "bars.mp4", [picture] * 12, 24, matrix=matrix, full_range=full, tagged=tagged, pix_fmt=pix_fmt
    )
    return path, middles(picture)


def test_every_decode_path_gives_the_colours(bar_video, tmp_path):
    path, truth = bar_video
    with VideoReader(str(path)) as reader:
        time_base = reader.time_base
        pictures = list(reader.frames())
    paths = {"sequential": pictures[5].rgb(), "scaled": pictures[5].rgb(160)}
    with VideoReader(str(path)) as reader:
        paths["sparse"] = next(reader.at([pictures[7].pts]))[1].rgb()
    with VideoReader(str(path)) as reader:
        paths["span"] = next(reader.span(Span(pictures[3].pts, pictures[6].pts, time_base))).rgb()
    for name, picture in paths.items():
        assert np.abs(middles(picture) - truth).max() <= 2, name


def test_cut_files_keep_the_colours_and_are_tagged(bar_video, tmp_path):
    path, truth = bar_video
    with VideoReader(str(path)) as reader:
        first, *_, last = [p.pts for p in reader.frames()]
        span = Span(first, last, reader.time_base)
    with VideoReader(str(path)) as reader:
        cut(reader, span, tmp_path / "cut.mp4")
    with VideoReader(str(tmp_path / "cut.mp4")) as reader:
        picture = next(reader.frames())
        assert (int(picture.frame.colorspace), int(picture.frame.color_range)) == (1, 1)  # BT.709, limited
        assert np.abs(middles(picture.rgb()) - truth).max() <= 3  # one more step of rounding


def test_luma_is_the_same_at_every_range_and_size(tmp_path):
    levels = []
    for height, width, full in [(240, 320, False), (720, 960, True), (1080, 1440, False)]:
        path = encode(tmp_path / f"{height}.mp4", [bars(height, width)] * 2, 24, full_range=full, pix_fmt="yuv420p")
        with VideoReader(str(path)) as reader:
            luma = next(reader.frames()).luma()
        assert luma.shape == (360, 480)
        levels.append([int(luma[180, round((i + 0.5) * 60)]) for i in range(8)])
    assert np.abs(np.diff(np.array(levels), axis=0)).max() <= 2


def test_rgb_images_are_read_as_they_are(tmp_path):
    import cv2

    picture = bars(120, 160)
    cv2.imwrite(str(tmp_path / "bars.png"), picture[..., ::-1])
    with VideoReader(str(tmp_path / "bars.png")) as reader:
        assert np.array_equal(next(reader.frames()).rgb(), picture)


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotation_is_applied(tmp_path, rotation):
    upright = np.zeros((64, 96, 3), np.uint8)
    upright[:16, :24] = (200, 60, 40)  # a red corner, top left
    stored = np.rot90(upright, -rotation // 90).copy()
    path = encode(tmp_path / "turned.mp4", [stored] * 3, 25, rotation=rotation, pix_fmt="yuv420p")
    with VideoReader(str(path)) as reader:
        picture = next(reader.frames())
    assert (picture.geometry.width, picture.geometry.height) == (96, 64)
    shown = picture.rgb().astype(int)
    assert np.abs(shown[8, 12] - (200, 60, 40)).max() <= 2
    assert shown[40, 60].max() <= 2
    assert Fraction(picture.luma().shape[1], picture.luma().shape[0]) == Fraction(540, 360)


KR_KB = [("bt709", 0.2126, 0.0722), ("bt601", 0.299, 0.114), ("bt2020", 0.2627, 0.0593), ("smpte240m", 0.212, 0.087)]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name, kr, kb", [*KR_KB, ("fcc", 0.30, 0.11)])
def test_the_matrix_takes_codes_back_to_the_colours_that_they_were_made_of(name, kr, kb, full):
    """Y' = Kr R' + Kg G' + Kb B', Cb = (B' - Y') / (2 - 2 Kb), Cr = (R' - Y') / (2 - 2 Kr), as 8-bit codes."""
    rgb = np.array([[r, g, b] for r in (0, 0.25, 1) for g in (0, 0.5, 1) for b in (0, 0.75, 1)])
    luma = rgb @ [kr, 1 - kr - kb, kb]
    chroma = np.stack([(rgb[:, 2] - luma) / (2 - 2 * kb), (rgb[:, 0] - luma) / (2 - 2 * kr)], 1)
    codes = np.column_stack([luma * 255, chroma * 255 + 128] if full else [luma * 219 + 16, chroma * 224 + 128])
    affine = yuv_to_rgb(Colour(name, full))
    assert affine.shape == (3, 4) and affine.dtype == np.float32
    assert np.abs(codes @ affine[:, :3].T + affine[:, 3] - rgb * 255).max() < 1e-3


def frame(pixel_format: str = "yuv420p", space: int = 2, color_range: int = 0, height: int = 64) -> av.VideoFrame:
    """An empty one, tagged with a number of libavutil's AVColorSpace and one of AVColorRange."""
    empty = av.VideoFrame(64, height, pixel_format)
    empty.colorspace, empty.color_range = space, color_range
    return empty


@pytest.mark.parametrize(
    "space, matrix",
    [(1, "bt709"), (4, "fcc"), (5, "bt601"), (6, "bt601"), (7, "smpte240m"), (9, "bt2020"), (10, "bt2020")],
)
def test_tags_name_the_matrix(space, matrix):
    assert Colour.of(frame(space=space)) == Colour(matrix, full_range=False, tagged=True)
    assert Colour.of(frame(space=space, height=1080, color_range=2)) == Colour(matrix, full_range=True)


@pytest.mark.parametrize("space", [2, 3, 0], ids=["unspecified", "reserved", "RGB"])
def test_without_a_usable_tag_the_height_decides(space):
    assert Colour.of(frame(space=space, height=718)) == Colour("bt601", full_range=False, tagged=False)
    assert Colour.of(frame(space=space, height=720)) == Colour("bt709", full_range=False, tagged=False)
    assert Colour.of(frame(space=space, height=719, pixel_format="yuv444p")).matrix == "bt601"


def test_range_is_that_of_the_tag_or_of_the_format():
    assert [Colour.of(frame(color_range=tag)).full_range for tag in (0, 1, 2)] == [False, False, True]
    assert Colour.of(frame("yuvj420p")).full_range and Colour.of(frame("yuvj420p", color_range=2)).full_range


@pytest.mark.parametrize("pixel_format", ["rgb24", "gbrp", "pal8", "monob", "monow"])
def test_rgb_has_no_matrix(pixel_format):
    assert Colour.of(frame(pixel_format)) == Colour("rgb", full_range=True, tagged=True)


def test_other_matrices_are_not_supported():
    with pytest.raises(MediaError, match="is not supported") as raised:  # YCgCo
        Colour.of(frame(space=8))
    assert raised.value.kind == ErrorKind.UNSUPPORTED


def test_opencv_takes_what_is_untagged_for_bt601():
    tagged = Colour("bt709", False)
    assert tagged.tagged and tagged.as_opencv == tagged
    assert Colour("bt709", True, tagged=False).as_opencv == Colour("bt601", True)


@pytest.mark.parametrize(
    "colour, low, coefficients",
    [
        # 1.16438, 2.01723, -0.39176, -0.81297 and 1.59603 times 8192: the numbers in libswscale and libmpeg2
        (Colour("bt601", False), 16, (9539, 16525, -3209, -6660, 13075)),
        (Colour("bt709", False), 16, (9539, 17305, -1747, -4366, 14686)),
        (Colour("bt601", True), 0, (8192, 14516, -2819, -5850, 11485)),
    ],
)
def test_the_detectors_tables_truncate_as_swscale_does(colour, low, coefficients):
    tables = swscale_tables(colour)
    for table, coefficient, zero in zip(tables, coefficients, (low, 128, 128, 128, 128), strict=True):
        exact = [8 * (code - zero) * coefficient // 65536 for code in range(256)]  # floor
        assert table.tolist() == exact and table.dtype == np.int16


def test_luma_of_rgb_is_bt709s():
    white, red, green, blue = ([255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255])
    luma = RGB_TO_LUMA_CODES @ np.array([white, red, green, blue]).T
    assert luma.ravel().tolist() == pytest.approx([219, 0.2126 * 219, 0.7152 * 219, 0.0722 * 219], rel=1e-5)


@pytest.mark.parametrize("pixel_format", ["monob", "monow"])
def test_pictures_of_one_bit_are_black_and_white(pixel_format):
    """Their codes carry no range: taken for Y'CbCr of limited range, white would lie above 235."""
    bits = frame(pixel_format, height=360)
    stride = bits.planes[0].line_size
    bits.planes[0].update(bytes([0xF0] * stride * 360))  # half of every eight pixels
    picture = Picture(bits, Geometry.of(bits), 0, 1, 0)
    black, white = sorted(np.unique(picture.luma()))
    assert (black, white) == (16, 235) and sorted(np.unique(picture.rgb())) == [0, 255]
    assert picture.rgb()[0, 0].tolist() == [255 if pixel_format == "monob" else 0] * 3
