"""Memory and cost of a model small enough for sums by hand: width 10, 2 double and 3 single blocks, 11,700 weights."""

import pytest

from datakit.errors import ConfigError
from trainer.planning.memory_budget import (
    DEFAULT_TOKENS,
    GIB,
    GPUS,
    cost,
    gpu_gib,
    parameters,
    peak_bytes,
    tokens_that_fit,
)
from trainer.planning.settings import MemorySettings

TINY = MemorySettings(width=10, double_blocks=2, single_blocks=3, reserve_gib=0)
P = 11_700


def tiny(**options) -> MemorySettings:
    return TINY.model_copy(update=options)


def test_parameters_of_the_blocks():
    """Double: two streams of q, k, v, projection (4 w²), MLP (8 w²) and modulation (6 w²). Single: 4, 8 and 3 w²."""
    assert parameters(TINY) == 100 * (2 * 2 * (4 + 8 + 6) + 3 * (4 + 8 + 3)) == P


@pytest.mark.parametrize(
    "zero, weights, gradients, states",
    [(0, 2 * P, 2 * P, 16 * P), (1, 2 * P, 2 * P, 4 * P), (2, 2 * P, P / 2, 4 * P), (3, P / 2, P / 2, 4 * P)],
)
def test_a_step_holds_weights_gradients_masters_and_moments(zero, weights, gradients, states):
    """In bytes on one of four GPUs: 2 a weight, 2 a gradient, 12 for master and moments, 4 for the copy as it steps."""
    assert peak_bytes(tiny(zero=zero, shards=4), 0) == weights + gradients + states


def test_what_is_not_trained_has_no_gradient():
    assert peak_bytes(tiny(trained=0.5, shards=4, zero=2), 0) == 2 * P + (2 * P / 4 + 16 * P / 4) / 2
    assert peak_bytes(tiny(trained=0.0), 0) == 2 * P


@pytest.mark.parametrize("recompute, per_token", [(0.0, 5 * 33), (0.5, 5 * (33 + 2) / 2 + 33), (1.0, 5 * 2 + 33)])
def test_tokens_take_33_bytes_a_block_and_2_where_it_is_recomputed(recompute, per_token):
    """Times the width of 10; recomputing takes the working set of one block. The optimizer's copy is gone by then."""
    memory = tiny(recompute=recompute)
    assert peak_bytes(memory, 1000) == 16 * P + 1000 * 10 * per_token
    assert peak_bytes(memory, 1) == 20 * P


def test_as_many_tokens_as_fit():
    """4 GiB of which 1 is reserved, 16 bytes a parameter gone, 1,650 bytes a token."""
    assert tokens_that_fit(4, tiny(reserve_gib=1)) == (3 * 2**30 - 16 * P) // 1650


def test_a_model_must_leave_room_for_a_token():
    stepping = 20 * P / GIB
    assert tokens_that_fit(stepping, TINY) == 4 * P // 1650
    with pytest.raises(ConfigError, match=r"a model of 0.0 G parameters takes 0 GiB .* are there less 0: divide it"):
        tokens_that_fit(stepping - 1 / GIB, TINY)
    frozen = tiny(trained=0.0)
    assert tokens_that_fit((2 * P + 1650) / GIB, frozen) == 1
    with pytest.raises(ConfigError, match="before any sample does"):
        tokens_that_fit((2 * P + 1649) / GIB, frozen)


def test_cost_is_that_of_the_products():
    """7 tokens through five blocks: 12 w² weights, two operations each, and 4 w for each pair of tokens."""
    assert cost(7, TINY) == 5 * (7 * 2 * 12 * 100 + 49 * 4 * 10)


def test_cards_have_less_than_they_are_sold_by():
    sold = {"24gb": 23, "32gb": 31, "40gb": 39, "48gb": 44, "80gb": 78, "96gb": 94, "141gb": 139, "192gb": 178}
    assert sold == GPUS and [gpu_gib(name.upper()) for name in sold] == list(sold.values())
    assert gpu_gib("0.5") == 0.5 and gpu_gib(7) == 7
    assert DEFAULT_TOKENS == 18_432  # stated in the manual


def test_the_smallest_gpu_of_a_machine_less_two_per_cent(tmp_path, monkeypatch):
    """24,564 MiB, an RTX 4090: 23.99 GiB."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 81559\necho '[N/A]'\necho 24564\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    assert gpu_gib("here") == gpu_gib("Here") == 23.5
