"""What a model is trained towards, what is random about it, and the words it is told."""

import math

import pytest
import torch

from trainer.diffusion.conditioning import MODES, choose, fitting
from trainer.diffusion.prompt_format import motion_score, prompt
from trainer.diffusion.rectified_flow import Guidance, Text, condition, denoise, losses, noised, shift, training_time
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
