"""Several processes at once, and processes that are killed: nothing is lost, and no reader sees half of anything."""

import multiprocessing
import os
import random
import shutil
import signal
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from catalogs.maintenance.validate import problems
from catalogs.query.funnel import funnel
from catalogs.query.selection import Selection
from catalogs.query.snapshots import resolve, restore, tag, tags, untag
from catalogs.records.marks import mark
from catalogs.records.runs import RunRecord
from catalogs.tables.catalog import Catalog
from catalogs.tables.schema import RECORDS, TABLES
from datakit.errors import CatalogError
from datakit.identity import caption_id
from pipelines.catalog_sync.score_writer import write_columns
from pipelines.recipes.decide import decide
from pipelines.recipes.recipe import load_recipe
from pipelines.runs.caption import Captioned, _Writer
from support.catalog_rows import clip, video

pytestmark = pytest.mark.slow

VIDEOS = [f"{n:x}{m}" + "0" * 30 for n in range(16) for m in range(2)]
CLIPS = 10
ROUNDS = 4
IDS = [clip(v, n * 100)["clip_id"] for v in VIDEOS for n in range(CLIPS)]
SHARD = {clip(v, n * 100)["clip_id"]: v[0] for v in VIDEOS for n in range(CLIPS)}
WAIT_S = 240


@pytest.fixture(scope="module")
def decided(tmp_path_factory) -> Catalog:
    """320 clips of 32 videos in 16 shards, decided; to be copied."""
    catalog = Catalog.create(tmp_path_factory.mktemp("decided") / "catalog")
    catalog.append("clips", [clip(v, n * 100, motion=float(n)) for v in VIDEOS for n in range(CLIPS)])
    catalog.append("videos", [video(v, clip_count=CLIPS) for v in VIDEOS])
    decide(catalog, load_recipe("technical"))
    return catalog


@pytest.fixture
def catalog(decided, tmp_path) -> Catalog:
    return Catalog(shutil.copytree(decided.root, tmp_path / "catalog"))


def _decide(root: str, recipe: str) -> None:
    for _ in range(ROUNDS):
        decide(Catalog(root), load_recipe(recipe))


def _caption(root: str, model: str) -> None:
    """As pipelines.runs.caption enters answers."""
    section = SimpleNamespace(model=model, backend="openai")
    for n in range(ROUNDS):
        writer = _Writer(Catalog(root), section, {}, "run", Captioned())
        writer._rows += [_answer(c, model) for c in IDS[n::ROUNDS]]
        writer.commit()


def _answer(clip_id: str, model: str) -> dict:
    return {
        "caption_id": caption_id(clip_id, "dense", model),
        "clip_id": clip_id,
        "shard": SHARD[clip_id],
        "style": "dense",
        "model": model,
        "text": f"{model} about {clip_id}",
        "flags": [],
        "backend": "openai",
        "run_id": "run",
        "created_at": datetime.now(UTC),
    }


def _score(root: str, column: str, stage: str) -> None:
    for n in range(ROUNDS):
        rows = [
            {"clip_id": c, "run_id": "r", "shard": SHARD[c], "errors": [], column: float(i)}
            for i, c in enumerate(IDS)
            if i % ROUNDS == n
        ]
        write_columns(Catalog(root), rows, {stage: f"{stage} fingerprint"})


def _mark(root: str, value: str) -> None:
    for n in range(ROUNDS * 3):
        mark(Catalog(root), IDS[n::12], value)


def _tag(root: str, name: str) -> None:
    for n in range(ROUNDS * 2):
        tag(Catalog(root), f"{name}{n}")
        if n % 2:
            untag(Catalog(root), f"{name}{n}")


def _read(root: str, stop, found) -> None:
    """Looks all the time, and reports how often, or what was wrong."""
    catalog, looks = Catalog(root), 0
    try:
        while not stop.is_set():
            counted = funnel(catalog)
            assert (counted.videos_ok, counted.clips) == (len(VIDEOS), len(IDS)), counted
            selection = Selection(catalog, where=None, columns=("clip_id", "video_id", "caption", "mark", "status"))
            rows = selection.read()
            assert rows.height == len(IDS) and rows["clip_id"].is_unique().all() and rows["status"].null_count() == 0
            assert (
                Selection(catalog, selection.versions, where=None, columns=selection.columns).content_hash
                == selection.content_hash
            )
            looks += 1
        found.put(looks)
    except BaseException as e:
        found.put(f"{type(e).__name__}: {e}"[:1000])


def start(context, target, *arguments):
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def test_many_writers_and_a_reader(catalog):
    context = multiprocessing.get_context("spawn")
    stop, found = context.Event(), context.Queue()
    reader = start(context, _read, catalog.root, stop, found)
    writers = [
        start(context, *work)
        for work in (
            (_decide, catalog.root, "technical"),
            (_decide, catalog.root, "svd"),
            (_caption, catalog.root, "one"),
            (_caption, catalog.root, "two"),
            (_score, catalog.root, "blur", "quality"),
            (_score, catalog.root, "aesthetic", "aesthetic"),
            (_mark, catalog.root, "keep"),
            (_mark, catalog.root, "reject"),
            (_tag, catalog.root, "tag"),
        )
    ]
    for writer in writers:
        writer.join(WAIT_S)
    stop.set()
    looks = found.get(timeout=60)
    reader.join(60)
    assert [writer.exitcode for writer in writers] == [0] * len(writers)
    assert isinstance(looks, int) and looks >= 2, looks
    assert_complete(catalog)
    assert list(problems(catalog, sources=False)) == []


def assert_complete(catalog: Catalog) -> None:
    captions = catalog.captions().select("clip_id", "model", "text").collect()
    assert sorted(captions.rows()) == sorted((c, m, f"{m} about {c}") for c in IDS for m in ("one", "two"))
    values = catalog.finished_clips().select("clip_id", "blur", "aesthetic", "motion", "stage_versions").collect()
    by_id = {row[0]: row for row in values.iter_rows()}
    for i, c in enumerate(IDS):
        assert by_id[c][1:4] == (i, i, i % CLIPS)
        assert sorted(v["stage"] for v in by_id[c][4]) == ["aesthetic", "quality"]
    assert catalog.scan("marks").collect().height == 2 * len(IDS)
    assert sorted(catalog.scan("decisions").collect()["clip_id"]) == sorted(IDS)
    assert sorted(tags(catalog)["name"]) == [f"tag{n}" for n in range(0, ROUNDS * 2, 2)]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_restore_that_is_killed_between_tables(catalog, monkeypatch, after):
    """Readers see the state before, writers are told, and the same restore completes."""
    write_columns(
        catalog,
        [{"clip_id": c, "run_id": "r", "shard": SHARD[c], "errors": [], "blur": 1.0} for c in IDS],
        {"quality": "f"},
    )
    tag(catalog, "good")
    good = funnel(catalog).as_dict()
    mark(catalog, IDS[:7], "reject")
    write_columns(
        catalog,
        [{"clip_id": c, "run_id": "r", "shard": SHARD[c], "errors": [], "blur": 2.0} for c in IDS],
        {"quality": "g"},
    )
    decide(catalog, load_recipe("svd"))
    before, selected = funnel(catalog).as_dict(), Selection(catalog, where=None).content_hash
    calls, original = [0], Catalog.restore_table

    def restore_table(self, name, version):
        if calls[0] == after:
            raise Killed
        calls[0] += 1
        original(self, name, version)

    with monkeypatch.context() as patched:
        patched.setattr(Catalog, "restore_table", restore_table)
        with pytest.raises(Killed):
            restore(catalog, "good")
    assert funnel(catalog).as_dict() == before and Selection(Catalog(catalog.root), where=None).content_hash == selected
    with pytest.raises(CatalogError, match="restore"):
        RunRecord(catalog, "decide", {}).begin()
    assert set(restore(catalog, "good").tables) <= {"clips", "decisions", "marks"}
    assert funnel(catalog).as_dict() == good and catalog.finished_clips().collect()["blur"].unique().to_list() == [1.0]
    RunRecord(catalog, "decide", {}).begin().end("finished", {})
    assert list(problems(catalog, sources=False)) == []


def test_a_restore_under_way_while_others_read(catalog):
    tag(catalog, "good")
    decide(catalog, load_recipe("svd"))
    mark(catalog, IDS[:3], "reject")
    context = multiprocessing.get_context("spawn")
    stop, found = context.Event(), context.Queue()
    reader = start(context, _read, catalog.root, stop, found)
    time.sleep(1.5)
    now = resolve(catalog, None)
    for _ in range(4):
        restore(catalog, "good")
        restore(catalog, ",".join(f"{name}={version}" for name, version in now.items()))
    stop.set()
    looks = found.get(timeout=60)
    reader.join(60)
    assert isinstance(looks, int) and looks >= 1, looks


def commits(catalog: Catalog) -> int:
    """Of all tables that hold data; cheap to ask, so that who waits leaves the processors to the writers."""
    return sum(
        1 for name in TABLES if name not in RECORDS for _ in Path(catalog.root, name, "_delta_log").glob("*.json")
    )


def test_writers_that_are_killed(catalog):
    """At random moments, a few rounds; then the same work once more, to its end."""
    context = multiprocessing.get_context("spawn")
    random.seed(11)
    work = [
        (_decide, catalog.root, "svd"),
        (_caption, catalog.root, "one"),
        (_score, catalog.root, "blur", "quality"),
        (_mark, catalog.root, "keep"),
    ]
    for _ in range(3):
        before = commits(catalog)
        writers = [start(context, *w) for w in work]
        deadline = time.monotonic() + 60
        while commits(catalog) == before and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(random.uniform(0, 0.6))
        for writer in writers:
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
        assert list(problems(Catalog(catalog.root), sources=False)) == []
        assert funnel(catalog).clips == len(IDS)
    _caption(catalog.root, "one")
    _caption(catalog.root, "two")
    _score(catalog.root, "blur", "quality")
    _decide(catalog.root, "svd")
    assert (
        catalog.captions().collect().height == 2 * len(IDS)
        and catalog.finished_clips().collect()["blur"].null_count() == 0
    )
    assert sorted(catalog.scan("decisions").collect()["clip_id"]) == sorted(IDS)
    assert list(problems(catalog, sources=False)) == []
