"""What a model is trained towards, what is random about it, and the words it is told."""

import math

import pytest
import torch

from trainer.diffusion.conditioning import MODES, choose, fitting
from trainer.diffusion.prompt_format import motion_score, prompt
from trainer.diffusion.rectified_flow import (
    Guidance,
    Text,
    condition,
    denoise,
    forwards,
    keep_given,
    losses,
    noised,
    pack,
    positions,
    schedule,
    shift,
    shifted,
    training_time,
    unpack,
    velocity_of,
)
from trainer.diffusion.sample_randomness import draw

SHAPE = (4, 3, 2, 2)


def test_the_objective_is_open_soras():
    """x_t = (1 − t)·x0 + (1 − (1 − σ)(1 − t))·x1 and v = (1 − σ)·x1 − x0, σ = 1e-5: v is the derivative of x_t."""
    torch.manual_seed(0)
    x0, x1, t = torch.randn(2, *SHAPE).double(), torch.randn(2, *SHAPE).double(), torch.tensor([0.25, 0.75]).double()
    x, v = noised(x0, x1, t)
    assert torch.allclose(x[0], 0.75 * x0[0] + (1 - (1 - 1e-5) * 0.75) * x1[0]) and torch.allclose(
        v, (1 - 1e-5) * x1 - x0
    )
    later, _ = noised(x0, x1, t + 1e-3)
    assert torch.allclose((later - x) / 1e-3, v, atol=1e-9)
    assert torch.allclose(noised(x0, x1, torch.ones(2).double())[0], x1) and torch.equal(losses(v, v), torch.zeros(2))
    assert torch.allclose(losses(v + 2, v), torch.full((2,), 4.0))


def test_times_are_shifted_towards_noise_as_the_schedule_is():
    """Median 0.5 becomes α / (1 + α); 256 px × 129 frames: 5.74."""
    alpha = shift(33, 32, 32)
    assert training_time(torch.zeros(1), alpha).item() == pytest.approx(alpha / (1 + alpha))
    times = training_time(torch.randn(10_000, generator=torch.Generator().manual_seed(0)), alpha)
    assert times.min() > 0 and times.max() < 1 and (times > 0.5).float().mean() > 0.9


def test_a_perfect_velocity_takes_noise_back_to_the_data():
    """Trained to the objective without error, the sampling loop ends at the data: both use one definition of time and
    velocity."""
    torch.manual_seed(0)
    x0 = torch.randn(1, 4, 3, 4, 4)
    noise = torch.randn_like(x0)

    def velocity(x, cond, states, pooled, t):
        return noised(x0, noise, t)[1].expand_as(x)

    empty = Text(torch.zeros(1, 1, 1), torch.zeros(1, 1))
    cond = condition(torch.zeros(1, 1, 3, 4, 4), torch.zeros_like(x0))
    assert torch.allclose(denoise(velocity, noise, cond, empty, empty, 7, Guidance(text=1.0)), x0, atol=1e-4)


def test_draws_depend_on_the_seed_alone():
    both = draw([3, 9], SHAPE, 33, {"t2v": 1, "i2v_head": 1}, 0.3)
    alone = draw([9], SHAPE, 33, {"t2v": 1, "i2v_head": 1}, 0.3)
    assert (
        torch.equal(both.noise[1:], alone.noise)
        and torch.equal(both.spread[1:], alone.spread)
        and both.modes[1:] == alone.modes
    )
    assert torch.equal(both.normal[1:], alone.normal) and torch.equal(both.no_states[1:], alone.no_states)
    other = draw([9], (4, 5, 2, 2), 65, {"t2v": 1, "i2v_head": 1}, 0.3)
    assert torch.equal(other.normal, alone.normal) and other.modes == alone.modes, (
        "another bucket draws the same time and mode"
    )
    assert not torch.equal(both.noise[0], both.noise[1]) and not torch.equal(both.noise, both.spread)


def test_draws_have_the_stated_distributions():
    """2,000 samples: dropouts of 0.3162 are independent (both: a tenth), modes come by weight, noise is standard
    normal."""
    drawn = draw(range(2000), SHAPE, 33, {"t2v": 1, "i2v_head": 5, "i2v_loop": 1, "i2v_tail": 1, "v2v_head": 3}, 0.3162)
    states, pooled = drawn.no_states.float(), drawn.no_pooled.float()
    assert (
        abs(states.mean() - 0.3162) < 0.04
        and abs(pooled.mean() - 0.3162) < 0.04
        and abs((states * pooled).mean() - 0.1) < 0.03
    )
    share = {mode: drawn.modes.count(mode) / 2000 for mode in set(drawn.modes)}
    assert set(share) == {"t2v", "i2v_head", "i2v_loop", "i2v_tail"}, "v2v_head needs more than 33 frames"
    assert share["i2v_head"] == pytest.approx(5 / 8, abs=0.04) and share["t2v"] == pytest.approx(1 / 8, abs=0.03)
    assert abs(drawn.normal.mean()) < 0.08 and abs(drawn.normal.std() - 1) < 0.05 and abs(drawn.noise.std() - 1) < 0.02


def test_modes_that_leave_nothing_to_make_are_left_out():
    weights = dict.fromkeys(MODES, 1.0)
    assert set(fitting(weights, 129)) == set(MODES) and "v2v_head_easy" not in fitting(weights, 65)
    assert set(fitting(weights, 17)) == {"t2v", "i2v_head", "i2v_tail", "i2v_loop"} and set(fitting(weights, 1)) == {
        "t2v"
    }
    assert fitting({"v2v_head": 1.0}, 17) == {"t2v": 1.0} and fitting({"t2v": 0.0, "i2v_head": 2.0}, 17) == {
        "i2v_head": 2.0
    }
    assert [choose({"t2v": 1, "i2v_head": 3}, 17, u) for u in (0.0, 0.2499, 0.25, 0.9999)] == [
        "t2v",
        "t2v",
        "i2v_head",
        "i2v_head",
    ]
    with pytest.raises(KeyError, match="i2v_middle"):
        fitting({"i2v_middle": 1.0}, 17)


@pytest.mark.parametrize(
    "told, expected",
    [
        (("A cat.", 24.0, 4), "A cat. 24 FPS, 4 motion score."),
        (("A cat. ", 23.976, None), "A cat. 24 FPS."),
        (("A cat.", 0.0, 4), "A cat."),
        (("", 12.5, 0), " 12 FPS, 0 motion score."),
    ],
)
def test_the_prompt_states_rate_and_motion(told, expected):
    assert prompt(*told) == expected


def test_the_motion_score_is_vmafs_motion_rounded():
    assert [motion_score(v) for v in (None, 0.0, 0.49, 0.5, 2.5, 4.2, 55.0)] == [None, 0, 0, 1, 3, 4, 20]
    assert math.isclose(round(3.999), motion_score(3.999))


def test_a_hundred_thousandth_of_the_noise_is_in_the_data():
    x, v = noised(torch.full((1, 1), 3.0).double(), torch.full((1, 1), 1e5).double(), torch.zeros(1).double())
    assert x.item() == pytest.approx(3.0 + 1.0) and v.item() == pytest.approx(1e5 - 1.0 - 3.0)


def test_losses_are_means_over_a_sample():
    """Squares 0, 0, 4, 16 and 1, 1, 1, 1; in float32 also of half-precision velocities."""
    velocity = torch.tensor([[[0.0, 0], [2, 4]], [[1, 1], [1, 1]]])
    assert losses(velocity.bfloat16(), torch.zeros_like(velocity)).tolist() == [5.0, 1.0]
    assert losses(velocity.bfloat16(), torch.zeros(2, 2, 2).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    "shape, patch, alpha",
    [
        # Latents of 256 tokens: 1; of 4096: 3; between (1216 = 256 + 3840 / 4): 1.5; times the root of the frames.
        ((1, 32, 32), 2, 1.0),
        ((1, 16, 64), 2, 1.0),
        ((1, 16, 16), 1, 1.0),
        ((1, 128, 128), 2, 3.0),
        ((1, 38, 128), 2, 1.5),
        ((4, 128, 128), 2, 6.0),
        ((9, 32, 32), 2, 3.0),
    ],
)
def test_the_shift_grows_with_tokens_and_frames(shape, patch, alpha):
    assert shift(*shape, patch) == pytest.approx(alpha)


def test_the_schedule_goes_from_noise_to_data():
    """αt / (1 + (α − 1)t): at α = 3 a half becomes 3/4, a quarter a half."""
    assert shifted(torch.tensor([0.0, 0.25, 0.5, 1.0]), 3.0).tolist() == [0.0, 0.5, 0.75, 1.0]
    assert schedule(4, 1.0).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0] and schedule(4, 1.0).dtype == torch.float64
    assert schedule(4, 3.0).tolist() == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])


def scales(guidance: Guidance, step: int, steps: int = 20, frames: int = 3) -> tuple[float, list[float]]:
    text, image = guidance.scales(step, steps, frames)
    return text, image.tolist()


def test_guidance_is_off_at_odd_steps_from_the_tenth_on():
    guidance = Guidance()
    assert guidance == Guidance(text=7.5, image=3.0, oscillate=True, over_frames=False)
    on, off = (7.5, [3.0] * 3), (1.0, [1.0] * 3)
    assert [scales(guidance, step) for step in (0, 1, 8, 9, 10, 11, 12, 13)] == [on, on, on, on, on, off, on, off]
    assert scales(Guidance(oscillate=False), 11) == on


def test_guidance_over_frames_rises_to_the_last_frame_and_falls_with_the_steps():
    """An image scale of 3 at the first step, 2 half way: the last frame's."""
    guidance = Guidance(over_frames=True, oscillate=False)
    assert scales(guidance, 0) == (7.5, [1.0, 2.0, 3.0])
    assert scales(guidance, 10) == (7.5, [1.0, 1.5, 2.0])
    assert scales(guidance, 15, frames=2)[1] == pytest.approx([1.0, 1.5])
    assert scales(Guidance(image=0.5, over_frames=True), 0) == (7.5, [0.5] * 3), "what does not guide is not spread"
    assert scales(Guidance(over_frames=True), 11) == (1.0, [1.0] * 3)


def test_the_three_velocities_weigh_one_together():
    """c: the text's scale; u: image less text; u2: 1 less image. Without an image its scale is 1."""
    c, u, u2 = (w.tolist() for w in Guidance(text=7.5, image=3.0).weights(0, 20, 2, True))
    assert (c, u, u2) == ([7.5] * 2, [-4.5] * 2, [-2.0] * 2)
    c, u, u2 = (w.tolist() for w in Guidance(text=7.5, image=3.0).weights(0, 20, 2, False))
    assert (c, u, u2) == ([7.5] * 2, [-6.5] * 2, [0.0] * 2)


@pytest.mark.parametrize(
    "guidance, given, run, expected",
    [
        (Guidance(), False, None, 2 * 15 + 5),  # 20 steps: 11, 13, 15, 17 and 19 take one
        (Guidance(), True, None, 3 * 15 + 5),
        (Guidance(), True, 12, 3 * 11 + 1),
        (Guidance(oscillate=False), True, None, 60),
        (Guidance(text=1.0), False, None, 20),
        (Guidance(text=3.0), True, 10, 20),  # the image's scale is the text's: u does not count
        (Guidance(over_frames=True), True, 1, 3),
    ],
)
def test_forwards_are_those_that_change_the_result(guidance, given, run, expected):
    assert forwards(20, guidance, 3, given, run) == expected


class Constant:
    """A velocity whose value tells what it was given: 8 with text and image, 3 without the image, 2 without text, −1
    with neither. Notes what it was called with."""

    def __init__(self):
        self.calls: list[tuple[int, float]] = []

    def __call__(self, x, cond, states, pooled, t):
        assert len(x) == len(cond) == len(states) == len(pooled) == len(t) and t.dtype == x.dtype
        assert len(set(t.tolist())) == 1 and torch.equal(states[:, 0, 0], pooled[:, 0])
        self.calls.append((len(x), t[0].item()))
        with_text, with_image = states[:, 0, 0] > 0, cond.flatten(1).any(1)
        value = with_text * 4 + with_image * 3 + (with_text & with_image) * 2 - 1.0
        return value.view(-1, 1, 1, 1, 1).expand_as(x)


def sampled(guidance: Guidance, image: bool, steps: int = 12, **options) -> tuple[torch.Tensor, Constant, list]:
    """From zero noise of two samples of [1, 2, 4, 4]."""
    noise, velocity, told = torch.zeros(2, 1, 2, 4, 4), Constant(), []
    cond = torch.zeros(2, 2, 2, 4, 4)
    cond[:, :, 0] = float(image)
    text, empty = (Text(torch.full((2, 1, 1), v), torch.full((2, 1), v)) for v in (1.0, 0.0))
    options = {"alpha": 1.0, "on_step": lambda step, forwards: told.append((step, forwards)), **options}
    return denoise(velocity, noise, cond, text, empty, steps, guidance, **options), velocity, told


def test_a_constant_velocity_is_followed_all_the_way():
    """From time 1 to 0: noise less the velocity g_txt · c + (g_img − g_txt) · u + (1 − g_img) · u2."""
    steady = Guidance(text=7.5, image=3.0, oscillate=False)
    x, velocity, told = sampled(steady, image=False)
    assert torch.allclose(x, torch.tensor(-(7.5 * 3 + (1 - 7.5) * -1)))
    assert velocity.calls == [(4, pytest.approx(1 - i / 12)) for i in range(12)] and told == [(i, 2) for i in range(12)]
    x, velocity, told = sampled(steady, image=True)
    assert torch.allclose(x, torch.tensor(-(7.5 * 8 + (3 - 7.5) * 2 + (1 - 3) * -1)))
    assert velocity.calls[0][0] == 6 and told[-1] == (11, 3)


def test_each_latent_frame_is_guided_by_its_scale():
    """Image scale 1 on the first of two frames, and on the last 3 − 2 · step / 12."""
    x, _, _ = sampled(Guidance(text=7.5, image=3.0, oscillate=False, over_frames=True), image=True)
    mean = sum(3 - 2 * step / 12 for step in range(12)) / 12
    assert torch.allclose(x[:, :, 0], torch.tensor(-(7.5 * 8 + (1 - 7.5) * 2)))
    assert torch.allclose(x[:, :, 1], torch.tensor(-(7.5 * 8 + (mean - 7.5) * 2 + (1 - mean) * -1)))


def test_a_step_without_guidance_takes_one_velocity():
    x, velocity, told = sampled(Guidance(text=7.5, image=3.0), image=False)
    assert [forwards for _, forwards in told] == [2] * 11 + [1] and velocity.calls[-1] == (2, pytest.approx(1 / 12))
    assert torch.allclose(x, torch.tensor(-(11 * (7.5 * 3 + 6.5) + 3) / 12))


def test_a_run_may_stop_early_and_the_shift_follows_the_shape():
    """Two of four steps at α = 3: times 1, 0.9, 0.75. By itself the schedule has the shift of the noise's shape."""
    x, velocity, _ = sampled(Guidance(text=1.0), image=False, steps=4, alpha=3.0, run=2)
    assert torch.allclose(x, torch.tensor(-3 * 0.25)) and [t for _, t in velocity.calls] == pytest.approx([1, 0.9])
    _, velocity, _ = sampled(Guidance(text=1.0), image=False, steps=2, alpha=None)
    alpha = (1 + 2 * (4 - 256) / 3840) * math.sqrt(2)
    assert velocity.calls[1][1] == pytest.approx(alpha * 0.5 / (1 + (alpha - 1) * 0.5))
    _, velocity, _ = sampled(Guidance(text=1.0), image=False, steps=2, alpha=None, patch=1)
    alpha = (1 + 2 * (16 - 256) / 3840) * math.sqrt(2)
    assert velocity.calls[1][1] == pytest.approx(alpha * 0.5 / (1 + (alpha - 1) * 0.5))
    assert sampled(Guidance(text=1.0), image=False, steps=50)[1].calls[-1] == (2, pytest.approx(0.02))


def test_given_frames_are_put_back():
    latents, mask = torch.zeros(1, 2, 3, 1, 1), torch.tensor([1.0, 0, 1]).view(1, 1, 3, 1, 1)
    reference = torch.arange(6.0).view(1, 2, 3, 1, 1)
    cond = condition(mask, reference)
    assert cond.shape == (1, 3, 3, 1, 1) and cond[0, :, :, 0, 0].tolist() == [[1, 0, 1], [0, 1, 2], [3, 4, 5]]
    assert keep_given(latents, cond)[0, :, :, 0, 0].tolist() == [[0, 0, 2], [3, 0, 5]]


@pytest.mark.parametrize("patch", [1, 2])
def test_tokens_are_patches(patch):
    """By the definition: token (t, i, j) holds, for each channel, the patch's rows from the top."""
    latents = torch.arange(2 * 3 * 2 * 4 * 6).view(2, 3, 2, 4, 6)
    tokens, places = pack(latents, patch), positions(2, 2, 4, 6, patch)
    rows, columns = 4 // patch, 6 // patch
    assert tokens.shape == (2, 2 * rows * columns, 3 * patch**2) and places.shape == (2, 2 * rows * columns, 3)
    for n, (t, i, j) in enumerate((t, i, j) for t in range(2) for i in range(rows) for j in range(columns)):
        part = latents[1, :, t, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
        assert tokens[1, n].tolist() == part.flatten().tolist()
        assert places[0, n].tolist() == places[1, n].tolist() == [t, i, j]
    assert torch.equal(unpack(tokens, 2, 4, 6, patch), latents) and places.dtype == torch.float32


def test_patches_have_a_side_of_two():
    latents = torch.arange(16).view(1, 1, 1, 4, 4)
    assert pack(latents)[0, 1].tolist() == [2, 3, 6, 7] and torch.equal(unpack(pack(latents), 1, 4, 4), latents)
    assert positions(1, 1, 4, 4).shape == (1, 4, 3) and shift(1, 32, 32) == pytest.approx(1)


def test_a_model_gets_tokens_and_gives_latents():
    """Here a model that gives back what it is given to denoise, tripled."""
    seen = {}

    def model(**inputs):
        seen.update(inputs)
        return 3 * inputs["img"]

    x, cond, states, pooled = (
        torch.randn(2, 4, 3, 4, 6),
        torch.randn(2, 5, 3, 4, 6),
        torch.randn(2, 7, 8),
        torch.randn(2, 9),
    )
    t, guidance = torch.tensor([0.1, 0.9]), torch.ones(2)
    assert torch.equal(velocity_of(model)(x, cond, states, pooled, t), 3 * x)
    assert torch.equal(seen["img"], pack(x)) and torch.equal(seen["cond"], pack(cond)) and seen["guidance"] is None
    assert torch.equal(seen["img_ids"], positions(2, 3, 4, 6)) and torch.equal(seen["txt_ids"], torch.zeros(2, 7, 3))
    assert seen["txt"] is states and seen["y_vec"] is pooled and seen["timesteps"] is t
    assert torch.equal(velocity_of(model, patch=1)(x, None, states, pooled, t, guidance), 3 * x)
    assert seen["cond"] is None and seen["guidance"] is guidance and seen["img"].shape == (2, 72, 4)
