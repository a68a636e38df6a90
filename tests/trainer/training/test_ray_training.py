"""`datakit train dit --ray`: workers that a Ray cluster places train as those of one machine do."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from datakit.cli.train import train_app
from datakit.errors import ConfigError, DatakitError
from support import bar_films, failing_ranks
from trainer.training.launch import on_ray, on_this_machine

pytestmark = pytest.mark.slow


def test_two_workers_of_a_cluster_train_as_two_processes_of_this_machine(ray_address, tmp_path, monkeypatch):
    """All paths are relative to the folder that the user is in. What rank 0 says is shown."""
    bar_films.make_bars(tmp_path, clips=5)
    monkeypatch.chdir(tmp_path)
    sets = [*bar_films.SETTINGS, "autoencoder.weights=tiny.safetensors", "checkpoint.every=2", "steps=3"]
    options = [
        "dit",
        "--plan",
        "plan",
        "--preset",
        "tiny",
        "--nproc",
        "2",
        *(word for s in sets for word in ("--set", s)),
    ]
    done = CliRunner().invoke(train_app, [*options, "--out", "cluster", "--ray", ray_address], catch_exceptions=False)
    said = done.stdout.splitlines()
    assert said[-1] == f"finished after 3 steps: {tmp_path / 'cluster' / 'checkpoints' / 'step-000003'}"
    assert [line.partition(":")[0] for line in said if line.startswith("step")] == ["step 1/3", "step 2/3", "step 3/3"]
    assert (
        len(list((tmp_path / "cluster" / "checkpoints" / "step-000003" / "model").glob("shard-*-of-00002.safetensors")))
        == 2
    )
    on_this_machine(2, ["train", *options, "--out", "here"], tmp_path / "here")
    for name in ("loss", "norm"):
        here, cluster = (numbers(tmp_path / run / "log.jsonl", name) for run in ("here", "cluster"))
        assert len(here) == 3 and cluster == pytest.approx(here, rel=1e-5)


def test_a_signal_is_a_checkpoint_in_a_cluster_too(ray_address, tmp_path):
    """Ctrl-C at the command stops the workers at their next step, with a checkpoint that `--resume` goes on from."""
    bar_films.make_bars(tmp_path, clips=5)
    sets = [*bar_films.SETTINGS, "autoencoder.weights=tiny.safetensors", "checkpoint.every=100000", "steps=100000"]
    command = [
        sys.executable,
        "-m",
        "datakit",
        "train",
        "dit",
        "--out",
        "run",
        "--nproc",
        "2",
        "--ray",
        ray_address,
    ]
    begun = [*command, "--plan", "plan", "--preset", "tiny", *(word for s in sets for word in ("--set", s))]
    process = subprocess.Popen(begun, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert any(line.startswith("step 2/") for line in process.stdout)
        process.send_signal(signal.SIGINT)
        said, complaints = process.communicate(timeout=120)
    finally:
        process.kill()
    last = said.splitlines()[-1]
    step = int(re.fullmatch(r"stopped after (\d+) steps: .*/run/checkpoints/step-0*\1", last)[1])
    assert 2 <= step < 100_000 and process.returncode == 0, complaints
    done = subprocess.run(
        [*command, "--resume", "--set", f"steps={step + 1}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1].startswith(f"finished after {step + 1} steps"), done.stderr


def numbers(log: Path, name: str) -> list[float]:
    return [json.loads(line)[name] for line in log.read_text().splitlines()]


def test_how_a_worker_failed_is_told_in_a_line(ray_address, tmp_path, capsys):
    with pytest.raises(DatakitError, match="^rank 1 of 2 failed: the plan has no clip that fits"):
        on_ray(2, ray_address, failing_ranks.fail, "said", tmp_path)
    assert capsys.readouterr().out == "rank 0 of 2 is here\n"
    assert (tmp_path / "ranks" / "rank-1.log").read_text().startswith("rank 1 of 2 is here\ndatakit: the plan")
    seen_first = (
        r"training on Ray failed: [^\n]* died [^\n]*logs are in .*/other/ranks\)",
        r"rank 0 of 2 failed: [^\n]*rank-0.log\)",
    )
    with pytest.raises(DatakitError, match=f"^({'|'.join(seen_first)})$"):  # the death, or that rank 0 lost the other
        on_ray(2, ray_address, failing_ranks.fail, "killed", tmp_path / "other")
    with pytest.raises(ConfigError, match=r"--nproc 99: the Ray cluster has 2 CPUs"):
        on_ray(99, ray_address, failing_ranks.fail, "said", tmp_path)
