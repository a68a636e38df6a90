"""A run that is killed and started again, and runs side by side, give the catalog of one quiet run."""

import json
import random
import subprocess
import sys
import time

import numpy as np
import pytest

from catalogs.maintenance.validate import problems
from catalogs.tables.catalog import Catalog
from datakit import config
from datakit.errors import CatalogError
from pipelines.runs.ingest import ingest
from pipelines.settings import Settings
from support.compare_catalogs import differences
from support.drawn_videos import encode, shots

pytestmark = pytest.mark.slow

SETS = ("ocr.enabled=false", "recipe=technical", "runner.commit_s=0.3")
KILLS = 10


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Twelve small videos, one broken file, one video twice."""
    folder = tmp_path_factory.mktemp("sources")
    for i in range(12):
        frames = [np.roll(f, j + 9 * i, 1) for j, f in enumerate(shots([50 + i, 60, 55], 240, 320))]
        encode(folder / f"v{i:02}.mp4", frames, 25, pix_fmt="yuv420p", options={"crf": "20", "preset": "ultrafast"})
    (folder / "broken.mp4").write_bytes(b"not a video" * 1000)
    (folder / "v03_again.mp4").write_bytes((folder / "v03.mp4").read_bytes())
    return folder


@pytest.fixture(scope="module")
def reference(sources, tmp_path_factory, ray_address):
    """The catalog of an uninterrupted run, and how long that took."""
    root = str(tmp_path_factory.mktemp("reference") / "c")
    started = time.monotonic()
    run = start([sources], root, ray_address)
    assert run.wait() == 0, run.stderr.read()
    return Catalog(root), time.monotonic() - started


def start(sources, root: str, ray_address: str, code: str = "", *options: str) -> subprocess.Popen:
    """`datakit run ingest` in a process of its own, after `code`."""
    sets = [word for line in SETS for word in ("--set", line)]
    arguments = [
        "datakit",
        "run",
        "ingest",
        *map(str, sources),
        "--catalog",
        root,
        "--ray",
        ray_address,
        "--json",
        *sets,
        *options,
    ]
    script = f"import sys\n{code}\nsys.argv = {arguments!r}\nfrom datakit.cli.app import main\nmain()"
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def assert_equals(root: str, reference: Catalog) -> None:
    catalog = Catalog(root)
    assert differences(catalog, reference) == [] and not list(problems(catalog))


def test_killed_at_ten_random_moments(sources, reference, tmp_path, ray_address):
    expected, seconds = reference
    root = str(tmp_path / "c")
    moments = random.Random(7)
    progress = []
    for _ in range(KILLS):
        run = start([sources], root, ray_address)
        try:
            run.wait(moments.uniform(0.25, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            run.kill()
            run.wait()
        try:
            progress.append(Catalog(root).scan("videos").collect()["status"].to_list().count("ok"))
        except CatalogError:  # killed before there was one
            progress.append(0)
    final = start([sources], root, ray_address)
    out, err = final.communicate()
    assert final.returncode == 0, err
    assert_equals(root, expected)
    assert progress == sorted(progress), "a killed run took back what was committed"
    assert json.loads(out)["funnel"]["videos"] == 13


KILL = (
    "import os, signal\nfrom catalogs.records.video_registry import VideoRegistry as Registry\n"
    "from pipelines.catalog_sync.video_ledger import Ledger\nfrom pipelines.runs import ingest as ingest_run\n"
    "die = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)\n"
)


@pytest.mark.parametrize(
    "moment",
    [
        # between the two commits
        "append = Registry._append_clips\nRegistry._append_clips = lambda *a: (append(*a), die())",
        "Registry._finished_here = die",  # after both
        "Ledger._choose = die",  # registered, nothing done
        "Registry.sweep = die",  # all done, strays not swept
        "ingest_run.decide = die",
        "ingest_run.IngestRun.conclude = die",
    ],
)
def test_killed_at_a_chosen_moment(sources, reference, tmp_path, ray_address, moment):
    root = str(tmp_path / "c")
    for _ in range(2):
        assert start([sources], root, ray_address, KILL + moment).wait() == -9
    last = start([sources], root, ray_address)
    assert last.wait() == 0, last.stderr.read()
    assert_equals(root, reference[0])
    statuses = Catalog(root).scan("runs").collect()["status"].to_list()
    assert statuses.count("finished") == 1


def test_two_ingests_with_overlapping_sources_at_once(sources, reference, tmp_path, ray_address):
    expected, _ = reference
    files = sorted(sources.iterdir())
    root = str(tmp_path / "c")
    runs = [start(some, root, ray_address) for some in (files[:9], files[5:], files)]
    results = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], results
    assert_equals(root, expected)
    done = [json.loads(out)["counts"] for out, _ in results]
    assert sum(counts["ok"] for counts in done) == 12 and sum(counts["clips"] for counts in done) == 36


def test_a_run_without_interruption_is_the_same_in_this_process(sources, reference, tmp_path, ray_address):
    root = str(tmp_path / "c")
    ingest([str(sources)], root, config.load(Settings, None, list(SETS)), ray_address)
    assert_equals(root, reference[0])
