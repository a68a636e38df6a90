"""What is random about a sample: a generator of its own, read in the stated order."""

import pytest
import torch

from trainer.diffusion.sample_randomness import draw

SHAPE = (4, 3, 2, 2)


def read(seed: int) -> tuple[float, list[float], torch.Tensor, torch.Tensor]:
    """A normal number, three uniform ones, and twice the shape of normal ones."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn((), generator=generator).item()
    uniform = torch.rand(3, generator=generator).tolist()
    return normal, uniform, torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)


def test_a_sample_reads_its_generator_in_the_stated_order():
    """Time, mode, the two dropouts, the posterior's noise, the noise at time 1."""
    modes = {"t2v": 1, "i2v_head": 1}
    seeds = [3, 9, 27, 2**62, 5, 6]
    drawn = draw(seeds, SHAPE, 33, modes, 0.5)
    for i, seed in enumerate(seeds):
        normal, (mode, states, pooled), spread, noise = read(seed)
        assert drawn.normal[i].item() == normal and drawn.modes[i] == ("t2v" if mode < 0.5 else "i2v_head")
        assert drawn.no_states[i].item() is (states < 0.5) and drawn.no_pooled[i].item() is (pooled < 0.5)
        assert torch.equal(drawn.spread[i], spread) and torch.equal(drawn.noise[i], noise)
    assert len({(a, b, c) for a, b, c in zip(drawn.modes, drawn.no_states.tolist(), drawn.no_pooled.tolist())}) > 3


def test_a_dropout_of_0_drops_nothing_and_of_1_everything():
    never, always = draw(range(50), SHAPE, 33, {"t2v": 1}, 0.0), draw(range(50), SHAPE, 33, {"t2v": 1}, 1.0)
    assert not never.no_states.any() and not never.no_pooled.any() and always.no_states.all() and always.no_pooled.all()
    _, (_, states, pooled), _, _ = read(3)
    assert not draw([3], SHAPE, 33, {"t2v": 1}, states).no_states.any(), "below, not at, the probability"
    assert not draw([3], SHAPE, 33, {"t2v": 1}, pooled).no_pooled.any()


def test_known_numbers():
    """Of no meaning: they change when resuming an old run would draw otherwise."""
    drawn = draw([1], SHAPE, 33, {"t2v": 1}, 0.5)
    assert drawn.normal.item() == pytest.approx(0.66135216)
    assert drawn.spread[0, 0, 0, 0].tolist() == pytest.approx([-1.6090963, -1.1660347])
