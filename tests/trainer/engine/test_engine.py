"""The engine: every way of spreading a model over processes learns what one process with torch alone learns; resumes
are exact.

Two processes run all of `engine_worker.py` once, over gloo on the CPU; the tests look at what they found.
"""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from trainer.engine import EngineSettings, OptimizerSettings

pytestmark = pytest.mark.slow

WORKER = Path(__file__).parents[2] / "support" / "engine_worker.py"
LIMIT_S = 120
"""From one engine that the processes make to the next; a hang ends here."""
FP32 = ("ddp", "zero1", "zero2", "tp", "tp fused", "sp")
BF16 = ("ddp bf16", "zero2 bf16", "gemini", "tp bf16", "tp zero2 bf16", "sp zero1 bf16", "sp zero2 bf16")
RESUMED = ("ddp", "ddp fp32", "zero1", "zero2", "tp", "sp zero2", "gemini")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("engine")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[3]),
    }
    logs = [folder / f"log{rank}.txt" for rank in (0, 1)]
    (alive := folder / "alive").touch()
    command = [sys.executable, str(WORKER), str(folder)]
    both = [
        subprocess.Popen(command, env=env | {"RANK": str(rank)}, stdout=log.open("w"), stderr=subprocess.STDOUT)
        for rank, log in enumerate(logs)
    ]
    try:
        while any(process.poll() is None for process in both) and time.time() - alive.stat().st_mtime < LIMIT_S:
            time.sleep(0.2)
    finally:
        for process in both:
            process.send_signal(signal.SIGABRT)  # one that hangs writes where
        codes = [process.wait() for process in both]
    assert codes == [0, 0], f"ended as {codes}\n" + "\n".join(log.read_text()[-4000:] for log in logs)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("name", FP32)
def test_spread_over_two_processes_it_learns_what_one_learns(found, name):
    """Micro-batches of 3, 2 and 3 samples, one of them on each rank with weight 0 in its place, against one batch of 8;
    the norm is clipped; tokens do not divide by the ranks. Five steps."""
    result = found["matches"][name]
    assert result["names"] and result["clipped"]
    assert result["loss"] <= 1e-5 and result["norm"] <= 1e-5
    assert result["weights"] <= 1e-4  # of the way that they went


@pytest.mark.parametrize("name", BF16)
def test_in_bf16_it_learns_nearly_the_same(found, name):
    """Against float32: losses near 1.2; Adam moves a weight by the sign of a gradient that rounding may turn."""
    result = found["matches"][name]
    assert result["loss"] <= 1e-2 and result["norm"] <= 2e-2
    assert result["weights"] <= 0.15


def test_all_ways_agree_in_bf16(found):
    """What rounding does is the same for all: they are nearer to each other than to float32."""
    losses = [found["matches"][name]["loss"] for name in BF16]
    assert max(losses) - min(losses) <= 1e-3


def test_gradients_are_exchanged_once_a_step(found):
    assert {name: found["exchanges_once"][name] for name in ("ddp", "zero1", "sp")} == {
        "ddp": True,
        "zero1": True,
        "sp": True,
    }


def test_the_average_is_its_closed_form_and_is_exported(found):
    assert found["averages"]["error"] <= 1e-6
    assert found["averages"]["moved"] >= 1e-4
    assert found["averages"]["exported"] == [True, True]


@pytest.mark.parametrize("plugin", ["ddp", "zero2"])
def test_only_what_requires_a_gradient_is_trained_and_saved(found, plugin):
    result = found["trains_a_part"][plugin]
    assert result["as wanted"]
    assert "img_in.weight is not in it" in result["error"] and "and 47 more" in result["error"]


def test_what_does_not_fit_is_said_in_one_line_on_all_ranks(found):
    said = found["refuses"]
    assert said["alike"]
    for name, words in {
        "other model": "not a Linear",
        "heads": "3 heads must divide",
        "frozen with tp": "trains all parameters",
        "nothing": "to train",
        "frozen with gemini": "zero2",
        "processes": "2 processes do not divide",
        "no ema": "set engine.ema",
        "compile": "engine.compile=false",
    }.items():
        assert words in said[name] and "\n" not in said[name]


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_unbroken_one_to_the_bit(found, name):
    result = found["resumes"][name]
    assert result["losses"] and result["masters"] and result["ema"]
    assert result["random"] and result["rate"]
    assert result["loop"] == {"position": [3, 14]} and result["step"] == 2 and result["whole"] == [2]


def test_another_plan_is_refused(found):
    assert "was trained on the plan p1, not on p2" in found["resumes"]["zero2"]["other plan"]


def test_any_number_of_processes_with_any_plugin_loads_what_another_saved(found):
    """ZeRO-2 on two, four plugins on one, six ways on two again: masters, moments and EMA never change by a bit."""
    result = dict(found["changes_worlds"])
    assert result.pop("loss") == result.pop("loss of the first")
    result.pop("seconds")
    assert len(result) == 10 and all(result.values())


@pytest.mark.parametrize("step, share", [(0, 0.25), (3, 1.0), (4, 1.0), (54, 0.55), (104, 0.1), (500, 0.1)])
def test_the_rate_rises_then_falls_as_half_a_cosine(step, share):
    settings = OptimizerSettings(lr=2e-4, warmup=4, schedule="cosine", steps=104, final=0.1)
    assert math.isclose(settings.rate(step), 2e-4 * share, rel_tol=1e-9)


@pytest.mark.parametrize(
    "settings",
    [
        dict(plugin="ddp", tp=2),
        dict(plugin="zero2", sp=2),
        dict(plugin="gemini", precision="fp32"),
        dict(plugin="gemini", compile=True),
        dict(plugin="hybrid", zero=1, precision="fp32"),
        dict(plugin="hybrid", tp=2, compile=True),
        dict(ema=1.0),
        dict(grad_clip=0),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValidationError):
        EngineSettings(**settings)
    with pytest.raises(ValidationError):
        OptimizerSettings(schedule="cosine")
