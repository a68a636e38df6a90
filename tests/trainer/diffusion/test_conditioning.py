"""What is given of a video, with an autoencoder whose latents are means."""

import pytest
import torch

from trainer.diffusion.conditioning import MODES, Given, choose, fitting, given_condition, latent_frames
from trainer.models.autoencoders.base import Autoencoder
from trainer.models.autoencoders.tiling import Tiles


class Means(Autoencoder):
    """A latent is the mean of what it stands for: 2 x 2 pixels of four frames, or of the first frame alone."""

    kind = "means"

    def __init__(self, causal: bool):
        super().__init__(None, channels=3, compression=(4, 2, 2), scale=1.0, shift=0.0, causal=causal)
        self.encoded: list[int] = []
        self.tiled: list[Tiles | None] = []

    def encode(self, video: torch.Tensor, tiles: Tiles | None = None):
        self.tiled.append(tiles)
        return super().encode(video, tiles)

    def moments(self, video: torch.Tensor) -> torch.Tensor:
        frames = video.shape[2]
        self.encoded.append(frames)
        first = 1 if self.causal or frames == 1 else 0
        groups = [video[:, :, :first]] * first + [video[:, :, i : i + 4] for i in range(first, frames, 4)]
        squares = [part.mean(2).unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2)) for part in groups]
        return torch.stack(squares, 2)


def video(frames: int) -> torch.Tensor:
    """Each frame is its number; [1, 3, T, 4, 4]."""
    return torch.arange(float(frames)).view(1, 1, -1, 1, 1).expand(1, 3, -1, 4, 4).clone()


def rows(cond: torch.Tensor) -> list[tuple[float, float]]:
    """(mask, reference) of every latent frame; both the same over the picture and the channels."""
    assert cond.shape[1] == 4 and cond.shape[3:] == (2, 2)
    assert torch.equal(cond[:, 1:], cond[:, 1:2, :, :1, :1].expand_as(cond[:, 1:]))
    assert torch.equal(cond[:, :1], cond[:, :1, :, :1, :1].expand_as(cond[:, :1]))
    return [(m, r) for m, r in cond[0, :2, :, 0, 0].T.tolist()]


def test_the_modes_are_open_soras():
    assert {mode: (given.head, given.tail) for mode, given in MODES.items()} == {
        "t2v": (0, 0),
        "i2v_head": (1, 0),
        "i2v_tail": (0, 1),
        "i2v_loop": (1, 1),
        "v2v_head": (33, 0),
        "v2v_tail": (0, 33),
        "v2v_head_easy": (65, 0),
        "v2v_tail_easy": (0, 65),
    }


def test_something_is_left_to_make():
    """Of two frames both may not be given; of three one is left. A weight of 0 is no weight."""
    weights = {"i2v_head": 2.0, "i2v_loop": 3.0, "i2v_tail": 0.0}
    assert [fitting(weights, frames) for frames in (1, 2, 3)] == [
        {"t2v": 1.0},
        {"i2v_head": 2.0},
        {"i2v_head": 2.0, "i2v_loop": 3.0},
    ]
    assert [mode for frames in (33, 34, 65, 66) for mode in fitting({"v2v_tail": 1, "v2v_tail_easy": 1}, frames)] == [
        "t2v",
        "v2v_tail",
        "v2v_tail",
        "v2v_tail",
        "v2v_tail_easy",
    ]


def test_modes_are_chosen_by_weight():
    """Weights 1, 2 and 5 of 8; what a rounding leaves goes to the last."""
    weights = {"t2v": 1, "i2v_head": 2, "i2v_tail": 5}
    drawn = [choose(weights, 9, u) for u in (0, 0.124, 0.125, 0.374, 0.375, 0.99, 1.0)]
    assert drawn == ["t2v"] * 2 + ["i2v_head"] * 2 + ["i2v_tail"] * 3


@pytest.mark.parametrize(
    "causal, frames, latents",
    [
        *((True, f, n) for f, n in [(0, 0), (1, 1), (2, 2), (5, 2), (6, 3), (9, 3), (33, 9), (65, 17)]),
        *((False, f, n) for f, n in [(0, 0), (1, 1), (2, 2), (4, 2), (8, 2), (9, 3), (12, 3), (33, 9), (65, 17)]),
    ],
)
def test_given_frames_take_whole_latent_frames(causal, frames, latents):
    """4k + 1 frames of a causal autoencoder, else one or multiples of four from eight on."""
    assert latent_frames(Given(head=frames, tail=1), Means(causal)) == Given(latents, 1)
    assert latent_frames(Given(head=0, tail=frames), Means(causal)) == Given(0, latents)


def test_nothing_given_is_nothing():
    autoencoder = Means(True)
    assert rows(given_condition(video(9), Given(), autoencoder)) == [(0, 0)] * 3 and autoencoder.encoded == []


def test_frames_at_the_start():
    """Frames 0 to 4 of 9: frame 0 by itself, then the mean of 1 to 4."""
    autoencoder = Means(True)
    assert rows(given_condition(video(9), Given(head=5), autoencoder)) == [(1, 0), (1, 2.5), (0, 0)]
    assert autoencoder.encoded == [5]


def test_frames_at_the_start_are_padded_by_their_last():
    """Three of 13: frame 0, and 1, 2, 2, 2."""
    assert rows(given_condition(video(13), Given(head=3), Means(True))) == [(1, 0), (1, 1.75), (0, 0), (0, 0)]


def test_frames_at_the_end_are_encoded_by_themselves():
    """The last five of 13: 8 is a first frame now, then 9 to 12; and the last alone."""
    autoencoder, tiles = Means(True), Tiles(9, 4, 4)
    assert rows(given_condition(video(13), Given(tail=5), autoencoder, tiles=tiles)) == [
        (0, 0),
        (0, 0),
        (1, 8),
        (1, 10.5),
    ]
    assert autoencoder.encoded == [5] and autoencoder.tiled == [tiles]
    assert rows(given_condition(video(13), Given(1, 1), autoencoder)) == [(1, 0), (0, 0), (0, 0), (1, 12)]


def test_latents_at_hand_serve_at_the_start_of_causal_autoencoders():
    known = torch.full((1, 3, 3, 2, 2), 7.0)
    for causal, frames, expected in ((True, 9, 7), (False, 12, 0)):
        autoencoder = Means(causal)
        found = rows(given_condition(video(frames), Given(1, 1), autoencoder, latents=known))
        assert found == [(1, expected), (0, 0), (1, frames - 1)]
        assert autoencoder.encoded == [1] * (1 if causal else 2), (
            "frames at the end never come from the latents at hand"
        )


def test_the_condition_has_the_type_of_the_latents():
    for given in (Given(), Given(head=1)):
        found = given_condition(video(9), given, Means(True), latents=torch.ones(1, 3, 3, 2, 2).double())
        assert found.dtype == torch.float64 and found.shape == (1, 4, 3, 2, 2)
    assert given_condition(video(9).double(), Given(), Means(True)).dtype == torch.float64
