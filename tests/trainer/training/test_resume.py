"""A run that is stopped in the middle of an epoch and goes on, on as many processes or more or fewer, is the unbroken
run: by the real loop, with a clip that can never be read.

Two processes run all of `resume_worker.py` once, over gloo on the CPU, together and each alone; the tests look at what
they left.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from safetensors.numpy import load_file

from catalogs.query.selection import Selection
from catalogs.tables.catalog import Catalog
from support.catalog_rows import clip, video
from support.drawn_videos import encode
from support.plan_folders import bucket, window
from trainer.planning.plan import WINDOWS, Part, Plan, write_plan

pytestmark = pytest.mark.slow

WORKER = Path(__file__).parents[2] / "support" / "resume_worker.py"
LIMIT_S = 240
"""From one run of the processes to the next; a hang ends here."""
SIZE, FRAMES = (32, 48), 9
IDS = [f"{v:032x}" for v in range(7)]
BROKEN = clip(IDS[6])["clip_id"]
BUCKETS = [bucket(2, FRAMES, *SIZE, tokens=3 * 24 + 8), bucket(2, 1, *SIZE, tokens=24 + 8)]
STOP, STEPS = 3, 7
EPOCH = 4
"""Steps: two of three micro-batches of films, one of three of pictures, and last the one that remains of the films."""
UNBROKEN = "1 unbroken"
PLUGINS = ("ddp", "zero2", "tp", "sp")
SAME_WORLD = {f"1 to 1, {n} workers": UNBROKEN for n in (0, 2, 4)} | {
    f"2 to 2, {plugin}": f"2 unbroken, {plugin}" for plugin in PLUGINS
}
OTHER_WORLD = [f"{change}, {n} workers" for change in ("1 to 2", "2 to 1") for n in (0, 2, 4)]
CUT_OFF = "2 to 2, zero2"
"""The last checkpoint of its first part is not whole: it goes on a step earlier."""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Six films of moving stripes and one file that is none, two windows of each, and single frames of five films; what
    came of them."""
    folder = tmp_path_factory.mktemp("resume")
    clips = [clip(id_, end_pts=2 * FRAMES * 512, time_base="1/12288") for id_ in IDS]
    (catalog := Catalog.create(folder / "catalog")).append("videos", [video(id_) for id_ in IDS])
    catalog.append("clips", clips)
    rows = []
    for v, about in enumerate(clips):
        uri = folder / f"{v}.mp4"
        stripes = np.repeat(np.arange(SIZE[1], dtype=np.uint8)[None, :, None] * 4 + 10 * v, 3, 2).repeat(SIZE[0], 0)
        if about["clip_id"] == BROKEN:
            uri.write_bytes(b"this is no video" * 100)
        else:
            encode(uri, [np.roll(stripes, i, 1) for i in range(2 * FRAMES)], 24)
        usual = {name: about[name] for name in ("clip_id", "end_pts", "time_base")} | {
            "uri": str(uri),
            "caption": f"film {v}",
            "crop_width": SIZE[1],
            "crop_height": SIZE[0],
            "width": SIZE[1],
            "height": SIZE[0],
        }
        rows += [window(0, IDS[v], first=first, frames=FRAMES, fps=24.0, **usual) for first in (0, FRAMES)]
        rows += [window(1, IDS[v], first=3, frames=1, fps=0.0, **usual)] if v < 5 else []
    rows.sort(key=lambda r: (r["bucket"], r["video_id"], r["first"]))
    fitting = {"compression": [4, 8, 8], "causal": True, "patch": 1}
    parts = [Part("all", 1.0, Selection(catalog).as_dict(), catalog.root)]
    write_plan(folder / "plan", BUCKETS, parts, fitting, 3, {}, [pa.RecordBatch.from_pylist(rows, schema=WINDOWS)], [])
    work(folder)
    return folder


def work(folder: Path) -> None:
    """Run the two processes to their end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join(str(WORKER.parents[i]) for i in (1, 2))
    env = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": paths,
    }
    logs = [folder / f"log{rank}.txt" for rank in (0, 1)]
    (alive := folder / "alive").touch()
    both = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(folder)],
            env=env | {"RANK": str(rank)},
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )
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


def parts(home: Path, name: str) -> list[dict]:
    """What a run's processes noted, from each start to the next end."""
    return [json.loads(line) for line in (home / f"{name}.jsonl").read_text().splitlines()]


def samples(home: Path, name: str, *what: str) -> list[tuple]:
    """In the order of steps and seeds, each as often as a process was shown it; of a step that was taken twice, the
    second time."""
    *before, last = parts(home, name)
    resumed = last["samples"][0]["step"]
    found = [s for part in before for s in part["samples"] if s["step"] < resumed] + last["samples"]
    return [tuple(s[key] for key in what) for s in found]


def summary(home: Path, name: str) -> dict:
    return json.loads((home / name / "checkpoints" / f"step-{STEPS:06d}" / "checkpoint.json").read_text())


def shards(home: Path, name: str) -> dict[str, np.ndarray]:
    """Masters, moments and averages of the last checkpoint, by rank and name."""
    files = sorted((home / name / "checkpoints" / f"step-{STEPS:06d}" / "model").glob("*.safetensors"))
    return {f"{path.name}/{key}": tensor for path in files for key, tensor in load_file(path).items()}


def logged(home: Path, name: str) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (home / name / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["norm"]) for line in lines]


def test_the_unbroken_run_is_as_planned(home):
    """By construction: steps of so many samples, every window once an epoch, another film's for those of the broken
    clip. They are met on both sides of the step at which other runs are stopped; once, the first to stand in is the
    other broken one."""
    windows = Plan.open(home / "plan").windows.to_pylist()
    assert {i for i, w in enumerate(windows) if w["clip_id"] == BROKEN} == {12, 13} and len(windows) == 19
    shown = samples(home, UNBROKEN, "step", "window", "clip")
    sizes = [sum(step == i for step, *_ in shown) for i in range(STEPS)]
    assert sorted(sizes[:3]) == sorted(sizes[4:]) == [5, 6, 6] and sizes[3] == 2
    replaced = summary(home, UNBROKEN)["loop"]["replaced"]
    assert {r["kind"] for r in replaced} == {"not_media"}
    places = [(r["epoch"], r["step"], r["window"], r["by"]) for r in replaced]
    assert places == [(0, 0, 12, 2), (0, 3, 12, 9), (0, 3, 13, 9), (1, 0, 13, 2), (1, 2, 12, 10)]
    assert sorted(window for step, window, _ in shown if step < EPOCH) == sorted([*range(12), *range(14, 19), 2, 9])
    assert all(windows[window]["clip_id"] == clip_id for _, window, clip_id in shown)


@pytest.mark.parametrize("name", [*SAME_WORLD, *OTHER_WORLD, *SAME_WORLD.values()])
def test_every_step_shows_the_model_the_same(home, name):
    """Windows, clips, seeds, and to the bit what the model gets of each: noise, time, condition, crop, text. Processes
    that share samples (tensor and sequence parallelism) are all shown them; else each is shown to one."""
    copies = 2 if name.endswith(("tp", "sp")) else 1
    what = "step", "window", "clip", "seed", "draws"
    assert samples(home, name, *what) == [s for s in samples(home, UNBROKEN, *what) for _ in range(copies)]
    assert summary(home, name)["loop"] | {"write_back": None} == summary(home, UNBROKEN)["loop"], (
        "position and what was replaced"
    )


@pytest.mark.parametrize("name", [*SAME_WORLD, *OTHER_WORLD])
def test_a_signal_to_one_process_stops_all_in_the_middle_of_an_epoch(home, name):
    first, second = parts(home, name)
    assert [(p["status"], p["step"]) for p in (first, second)] == [
        ("stopped", STOP),
        ("finished", STEPS),
    ] and STOP % EPOCH
    assert {s["step"] for s in first["samples"]} == set(range(STOP))
    assert min(s["step"] for s in second["samples"]) == STOP - (name == CUT_OFF)


@pytest.mark.parametrize("name", SAME_WORLD)
def test_on_as_many_processes_it_ends_with_the_same_bits(home, name):
    """Masters, moments, averages; losses and norms of all steps, each once in the log."""
    mine, others = shards(home, name), shards(home, SAME_WORLD[name])
    assert mine.keys() == others.keys() and all(mine[key].tobytes() == others[key].tobytes() for key in mine)
    assert {key.split("/")[1] for key in mine} == {"master", "exp_avg", "exp_avg_sq", "ema"}
    assert logged(home, name) == logged(home, SAME_WORLD[name]) and [step for step, *_ in logged(home, name)] == list(
        range(1, STEPS + 1)
    )
    assert samples(home, name, "loss") == samples(home, SAME_WORLD[name], "loss")


@pytest.mark.parametrize("name", OTHER_WORLD)
def test_on_more_or_fewer_processes_it_learns_the_same(home, name):
    """Within float32: sums of gradients are made in another order."""
    for mine, others in (
        (samples(home, name, "loss"), samples(home, UNBROKEN, "loss")),
        (logged(home, name), logged(home, UNBROKEN)),
    ):
        assert np.array(mine) == pytest.approx(np.array(others), rel=1e-4)


def test_what_was_learned_counts_once(home):
    """The catalog has of the run that was cut off, after it had entered a step that it took again, what it has of the
    unbroken one."""
    rows = Catalog(str(home / "catalog")).scan("losses").collect().sort("clip_id", "bucket", "noise_level", "from_step")
    ids = [json.loads((home / name / "run.json").read_text())["run_id"] for name in (SAME_WORLD[CUT_OFF], CUT_OFF)]
    one, other = (rows.filter(pl.col("run_id") == id_).drop("run_id") for id_ in ids)
    assert one.equals(other) and set(one.select("from_step", "to_step").rows()) == {(0, 2), (2, 4), (4, 6), (6, 7)}
    cells = len(
        summary(home, CUT_OFF)["loop"]["write_back"]["means"]
    )  # of a noise level and bucket the first sample is only compared with
    assert one["count"].sum() == len(samples(home, CUT_OFF, "seed")) - cells and rows["run_id"].n_unique() == 2
