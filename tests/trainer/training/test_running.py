"""Around the loop: numbers, the watchdog, processes on this machine."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from datakit.errors import ConfigError, DatakitError
from trainer.settings import DiTSettings, load_settings
from trainer.training.launch import on_this_machine
from trainer.training.metrics import Log, Meter
from trainer.training.watchdog import Status, stuck

ROOT = Path(__file__).resolve().parents[3]


def test_rates_are_work_over_time_without_the_pauses(monkeypatch):
    """0.1 s of work, then a pause of 0.3 s."""
    times = iter([10.1, 10.4, 10.4, 10.5])
    monkeypatch.setattr("trainer.training.metrics.time", SimpleNamespace(perf_counter=lambda: next(times)))
    meter = Meter(peak=1e12, devices=2, _since=10.0)
    meter.add(samples=4, tokens=100, flops=1e10, waited_s=0.05)
    meter.pause()
    meter.resume()
    found = meter.read()
    assert [found[name] for name in ("samples_per_s", "tokens_per_s", "data_wait")] == pytest.approx([40, 1000, 0.5])
    assert found["tflops"] == pytest.approx(0.05) and found["mfu"] == pytest.approx(0.05)
    assert meter.read()["samples_per_s"] == 0, "read, it starts anew"


def test_a_resumed_log_has_every_step_once(tmp_path):
    """Lines after the checkpoint, and one that a kill cut, are gone; TensorBoard has the same scalars."""
    log = Log(tmp_path, {})
    for step in (10, 20, 30):
        log.write(step, {"loss": step / 10})
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    log = Log(tmp_path, {}, step=20, quiet=True)
    log.write(30, {"loss": 7.0}, "said")
    log.close()
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [
        {"step": 10, "loss": 1.0},
        {"step": 20, "loss": 2.0},
        {"step": 30, "loss": 7.0},
    ]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(10, 1.0), (20, 2.0), (30, 7.0)]


@pytest.mark.parametrize(
    "others, named",
    [
        ([Status(0, 7, "exchange", [], 0.0), Status(1, 7, "data", ["c9"], 50.0)], "rank 1 is stuck at step 7 in data"),
        (
            [Status(0, 8, "data", [], 10.0), Status(1, 7, "forward", ["c1", "c2"], 90.0)],
            r"rank 1 is stuck at step 7 in forward for \d+ s, clips c1, c2",
        ),
        ([Status(0, 7, "data", [], 90.0), Status(1, 7, "data", ["c9"], 50.0)], "rank 1 is stuck"),
    ],
)
def test_the_rank_that_is_behind_is_named(tmp_path, others, named):
    """Of the lowest step; not one that waits for the others; of those left, the one that moved longest ago."""
    import re

    for status in others:
        (tmp_path / f"rank-{status.rank}.json").write_text(json.dumps(status.__dict__))
    assert re.search(named, stuck(tmp_path))


def test_a_process_that_does_not_move_ends_and_says_why(tmp_path):
    code = f"""
import sys, time; from pathlib import Path; from trainer.training.watchdog import Watchdog
dog = Watchdog(Path({str(tmp_path)!r}), 3, 0.6)
with dog.off(): time.sleep(1.2)
for step in range(4):
    dog.at(step, "data"); time.sleep(0.3)
dog.at(4, "forward", ["clip-a"]); print("moving", flush=True); time.sleep(30)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3 and done.stdout == "moving\n"
    assert (
        "nothing moved for 0.6 s: rank 3 is stuck at step 4 in forward" in done.stderr and "clips clip-a" in done.stderr
    )
    assert "time.sleep" in done.stderr or "line" in done.stderr, "where, as a traceback"


def test_processes_of_this_machine(tmp_path, monkeypatch):
    """Each has its rank; the first that fails ends all, and what it said is told."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, time\nrank = os.environ['RANK']\nopen(f'{sys.argv[2]}/{rank}', "
        "'w').write(os.environ['WORLD_SIZE'])\n"
        "if sys.argv[1] == 'fail' and rank == '1':\n    print('some more'); sys.exit('datakit: rank one has no "
        "heart')\n"
        "if sys.argv[1] == 'fail':\n    time.sleep(60)\n"
    )
    monkeypatch.setattr(sys, "executable", _without_module(tmp_path, program))
    on_this_machine(3, ["pass", str(tmp_path)], tmp_path)
    assert [(tmp_path / str(rank)).read_text() for rank in range(3)] == ["3"] * 3
    started = time.monotonic()
    with pytest.raises(DatakitError, match="rank 1 of 2 ended with code 1: datakit: rank one has no heart"):
        on_this_machine(2, ["fail", str(tmp_path)], tmp_path)
    assert time.monotonic() - started < 30


def test_signals_reach_all_processes(tmp_path):
    """In a process of its own, so that a signal never comes to the one that runs the tests."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, time\nopen(f'{sys.argv[2]}/{os.environ[\"RANK\"]}', 'w').close()\ntime.sleep(60)\n"
    )
    code = f"""
import signal, sys
from pathlib import Path
from trainer.training.launch import on_this_machine
from datakit.errors import DatakitError
before = signal.getsignal(signal.SIGTERM)
sys.executable = {_without_module(tmp_path, program)!r}
try:
    on_this_machine(2, ["wait", {str(tmp_path)!r}], Path({str(tmp_path)!r}))
except DatakitError as e:
    print(e, signal.getsignal(signal.SIGTERM) == before)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not all((tmp_path / str(rank)).exists() for rank in range(2)) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=30)
    assert said == "rank 0 of 2 ended with code -15 True\n"


def _without_module(folder: Path, program: Path) -> str:
    """A python that runs a program in place of `-m datakit`."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} {program} "$@"\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("preset", ["tiny", "1b", "open-sora-v2"])
def test_presets_are_settings(preset):
    found = load_settings(DiTSettings, preset, None, ["steps=3", "conditions.t2v=2", "engine.precision=fp32"])
    assert found.steps == 3 and found.conditions["t2v"] == 2 and found.engine.precision == "fp32"
    with pytest.raises(ConfigError, match="did you mean hidden_size"):
        load_settings(DiTSettings, preset, None, ["model.hiden_size=3"])


def test_what_is_no_preset_is_told():
    with pytest.raises(ConfigError, match="there is no preset big: there are 1b, .*open-sora-v2, tiny"):
        load_settings(DiTSettings, "big")
    with pytest.raises(ConfigError, match="i2v_middle"):
        load_settings(DiTSettings, "tiny", None, ["conditions.i2v_middle=1"])
