"""Sizes are those of training's buckets, numbers of frames those that autoencoders take."""

import pytest

from datakit.errors import ConfigError
from sampler.generation.video_size import check_frames, size_of
from trainer.planning.latent_grid import LatentGrid


@pytest.mark.parametrize(
    "resolution, aspect, multiples, size",
    [
        ("256px", "16:9", (16, 16), (192, 336)),
        ("768px", "16:9", (16, 16), (576, 1024)),
        ("256px", "9:16", (16, 16), (336, 192)),
        ("256px", "1:1", (16, 16), (256, 256)),
        ("768px", "1:1", (16, 16), (768, 768)),
        ("768px", "16:9", (32, 32), (576, 1024)),
        ("256", "16:9", (16, 16), (192, 336)),
        ("480p", "16:9", (16, 16), (480, 848)),
    ],
)
def test_sizes_are_those_of_open_sora(resolution, aspect, multiples, size):
    assert size_of(resolution, aspect, multiples) == size


@pytest.mark.parametrize("multiples", [(16, 16), (32, 32), (8, 16)])
@pytest.mark.parametrize("resolution, area", [("256px", 256**2), ("768px", 768**2)])
def test_other_shapes_have_about_the_area(resolution, area, multiples):
    height, width = size_of(resolution, "2.39:1", multiples)
    assert height % multiples[0] == width % multiples[1] == 0
    assert abs(height * width / area - 1) < 0.13 and abs(width / height / 2.39 - 1) < 0.15
    assert size_of(resolution, "1:2.39", multiples[::-1]) == (width, height)


def test_yaml_reads_16_9_as_a_number_of_base_60():
    assert size_of("256px", 16 * 60 + 9, (16, 16)) == (192, 336)


@pytest.mark.parametrize(
    "resolution, aspect, said",
    [
        ("256px", "16x9", "no aspect ratio '16x9': write width:height"),
        ("256px", "0:9", "neither side can be 0"),
        ("big", "16:9", "no resolution 'big'"),
        ("0px", "1:1", "no resolution '0px'"),
    ],
)
def test_what_is_no_size(resolution, aspect, said):
    with pytest.raises(ConfigError, match=said):
        size_of(resolution, aspect, (16, 16))


def test_numbers_of_frames():
    for causal, fine in ((True, (1, 5, 9, 33, 129)), (False, (1, 8, 12, 128))):
        for frames in fine:
            check_frames(frames, LatentGrid((4, 8, 8), causal), 129)


@pytest.mark.parametrize(
    "frames, causal, most, said",
    [
        (128, True, 129, "takes 4k . 1 frames; the nearest are 125 and 129"),
        (2, True, None, "nearest are 1 and 5"),
        (133, True, 129, "133 frames are more than the 129 .* nearest is 129"),
        (131, True, 129, "nearest is 129"),
        (128, True, 128, "nearest is 125"),
        (129, False, None, "multiples of 4 from 8 on; the nearest are 128 and 132"),
        (5, False, None, "nearest are 1 and 8"),
        (300, False, 129, "nearest is 128"),
        (5, False, 7, "nearest is 1 "),
    ],
)
def test_other_numbers_are_told_the_nearest(frames, causal, most, said):
    with pytest.raises(ConfigError, match=said):
        check_frames(frames, LatentGrid((4, 8, 8), causal), most)


@pytest.mark.parametrize(
    "frames, causal, most, nearest",
    [
        (0, True, None, "the nearest is 1"),
        (6, True, None, "the nearest are 5 and 9"),
        (128, True, 128, "128 frames: this autoencoder takes 4k . 1 frames; the nearest is 125"),
        (126, True, 125, "126 frames are more than the 125 that can be made: the nearest is 125"),
        (0, False, None, "the nearest is 1"),
        (2, False, None, "the nearest are 1 and 8"),
        (7, False, None, "the nearest are 1 and 8"),
        (9, False, None, "the nearest are 8 and 12"),
        (10, False, 8, "10 frames are more than the 8 that can be made: the nearest is 8"),
    ],
)
def test_the_nearest_numbers_at_the_limits(frames, causal, most, nearest):
    with pytest.raises(ConfigError, match=rf"{nearest} \(video.num_frames\)"):
        check_frames(frames, LatentGrid((4, 8, 8), causal), most)
