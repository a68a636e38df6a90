"""What training learns about clips: the numbers, their independence of ranks, and that nothing is counted twice or
lost."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist

from catalogs.maintenance.forget import Forgetting, Request
from catalogs.maintenance.validate import problems
from catalogs.query.selection import Selection
from catalogs.query.snapshots import restore, tag, vacuum
from catalogs.query.sql import query
from catalogs.records.losses import commit, rewind
from catalogs.tables.catalog import Catalog
from datakit.errors import CatalogError, ConfigError, DatakitError
from support import loss_writers
from support.catalog_rows import clip, video
from support.loss_writers import learned
from support.plan_folders import bucket, window
from trainer.catalog_sync.loss_book import HALF_LIFE, LossBook, WriteBack
from trainer.catalog_sync.loss_rows import FILE, as_bytes
from trainer.catalog_sync.run_record import TrainingRecord
from trainer.planning.plan import WINDOWS, Part, Plan, write_plan

BUCKETS = [bucket(4), bucket(4, frames=9)]
NAMES = [b.name for b in BUCKETS]
DECAY = 2 ** (-1 / HALF_LIFE)


@dataclass
class Micro:
    """What of a loader's batch is looked at."""

    windows: list[int]
    seeds: list[int]
    weight: float = 1.0


def catalog_of(root: Path, videos: list[str], clips: int = 3) -> Catalog:
    catalog = Catalog.create(root)
    catalog.append("videos", [video(v, clip_count=clips) for v in videos])
    catalog.append("clips", [clip(v, n * 100) for v in videos for n in range(clips)])
    catalog.replace(
        "decisions",
        pl.DataFrame(
            [
                {
                    "clip_id": clip(v, n * 100)["clip_id"],
                    "shard": v[0],
                    "status": "kept",
                    "reasons": [],
                    "recipe": "r",
                    "level": 1,
                }
                for v in videos
                for n in range(clips)
            ]
        ),
    )
    return catalog


def plan_of(folder: Path, catalogs: list[Catalog], videos: list[list[str]], clips: int = 3) -> Plan:
    """For each clip of each part a window in both buckets, the clip's number in `start_pts`."""
    rows = [
        window(b, v, clip_id=clip(v, n * 100)["clip_id"], part=part, start_pts=n * 100, end_pts=n * 100 + 100)
        for part, names in enumerate(videos)
        for v in names
        for n in range(clips)
        for b in range(len(BUCKETS))
    ]
    rows.sort(key=lambda r: (r["bucket"], r["video_id"], r["start_pts"], r["first"], r["part"], r["clip_id"]))
    parts = [Part(f"part {i}", 1.0, Selection(c).as_dict(), c.root) for i, c in enumerate(catalogs)]
    return write_plan(folder, BUCKETS, parts, {}, 1, {}, [pa.RecordBatch.from_pylist(rows, schema=WINDOWS)], [])


IDS = ["ab" + "0" * 30, "cd" + "0" * 30]


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> Plan:
    """Six clips of two videos: windows 0 … 5 are theirs in the first bucket, 6 … 11 in the second."""
    folder = tmp_path_factory.mktemp("plan")
    return plan_of(folder / "plan", [catalog_of(folder / "c", IDS)], [IDS])


@pytest.fixture
def own(plan, tmp_path) -> Plan:
    """The same, on a catalog that may be written to."""
    return plan_of(tmp_path / "plan", [catalog_of(tmp_path / "c", IDS)], [IDS])


def clip_ids(plan: Plan) -> list[str]:
    return plan.windows["clip_id"].to_pylist()[:6]


def add(
    book,
    step: int,
    windows: list[int],
    losses: list[float],
    times: list[float],
    seeds: list[int] | None = None,
    weight: float = 1.0,
):
    seeds = seeds or [step * 1000 + w for w in windows]
    book.add(
        step,
        Micro(windows, seeds, weight),
        torch.tensor(losses, dtype=torch.float64),
        torch.tensor(times, dtype=torch.float64),
    )


def entries(rows: pl.DataFrame) -> dict[tuple, tuple]:
    return {row[:3]: row[3:] for row in rows.select("clip_id", "bucket", "noise_level", "excess", "count").iter_rows()}


def test_a_small_example_by_hand(plan):
    """Loss 3, then 1, 2, 5 at one level: means before them are none, 3, (3d + 1) / (d + 1), (3d² + d + 2) / (d² + d +
    1)."""
    book, (a, b, *_) = LossBook(plan), clip_ids(plan)
    add(book, 0, [0, 1], [3.0, 1.0], [0.31, 0.39])
    add(book, 1, [0, 6], [2.0, 7.0], [0.35, 0.35])  # window 6: clip a in the other bucket, the first there
    add(book, 2, [1], [5.0], [0.3])
    add(book, 2, [0], [9.0], [1.0])  # the noise itself: the last tenth
    add(book, 2, [0], [99.0], [0.3], seeds=[1], weight=0.0)  # a repeat
    rows = book.gather(3)
    second, third = (3 * DECAY + 1) / (DECAY + 1), (3 * DECAY**2 + DECAY + 2) / (DECAY**2 + DECAY + 1)
    found = entries(rows)
    assert set(found) == {(a, NAMES[0], 3), (b, NAMES[0], 3)}
    assert found[a, NAMES[0], 3] == (pytest.approx(2 - second, abs=1e-12), 1)
    assert found[b, NAMES[0], 3] == (pytest.approx((1 - 3) + (5 - third), abs=1e-12), 2)
    assert set(rows.select("from_step", "to_step").rows()) == {(0, 3)}
    assert book.means()[NAMES[1]][3] == pytest.approx(7.0) and book.means()[NAMES[0]][9] == pytest.approx(9.0)
    assert book.means()[NAMES[0]][3] == pytest.approx(
        (3 * DECAY**3 + DECAY**2 + 2 * DECAY + 5) / (DECAY**3 + DECAY**2 + DECAY + 1)
    )
    add(book, 3, [0], [10.0], [0.95])  # means go on; what was gathered does not come again
    rows = book.gather(4)
    assert entries(rows) == {(a, NAMES[0], 9): (pytest.approx(1.0), 1)} and rows.select(
        "from_step", "to_step"
    ).rows() == [(3, 4)]
    assert book.gather(5).is_empty()


def stream(plan: Plan, samples: int, seed: int = 0) -> list[tuple]:
    """(step, window, seed of the sample, loss, time): loss depends on time and bucket, and falls."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(samples):
        window, t = int(rng.integers(12)), float(rng.random())
        loss = (1 + t) * (1 + (window >= 6)) * (0.5 + math.exp(-i / 500)) * math.exp(rng.normal(0, 0.2))
        found.append((i // 8, window, int(rng.integers(2**63)), loss, t))
    return found


def book_of(plan: Plan, samples: list[tuple], batch: int = 4) -> LossBook:
    book = LossBook(plan)
    by_step: dict[int, list] = {}
    for sample in samples:
        by_step.setdefault(sample[0], []).append(sample)
    for step, some in by_step.items():
        for i in range(0, len(some), batch):
            _, windows, seeds, losses, times = zip(*some[i : i + batch])
            add(book, step, list(windows), list(losses), list(times), list(seeds))
    return book


def _gather(rank: int, world: int, folder: str, plan_folder: str, parts: list[list[tuple]], found) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
    book = book_of(Plan.open(plan_folder), parts[rank], batch=3)
    rows = book.gather(1000)
    found.put((rank, as_bytes(rows), json.dumps(book.state_dict())))
    dist.barrier()
    dist.destroy_process_group()


def test_ranks_and_their_order_do_not_matter(plan, tmp_path):
    """Two real ranks, some of whose samples are the same as tensor parallelism has it: the same bits as of one."""
    samples = stream(plan, 600)
    alone = book_of(plan, samples)
    rows, state = alone.gather(1000), alone.state_dict()
    shuffled = samples[:]
    random.Random(1).shuffle(shuffled)
    other = book_of(plan, shuffled, batch=5)
    assert other.gather(1000).equals(rows) and other.state_dict() == state
    parts = [samples[:400], samples[300:]]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    ranks = [
        context.Process(daemon=True, target=_gather, args=(r, 2, str(tmp_path), str(plan.folder), parts, queue))
        for r in range(2)
    ]
    for process in ranks:
        process.start()
    found = sorted(queue.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    for _, data, text in found:
        assert pl.read_ipc(data).equals(rows) and json.loads(text) == state


def test_many_micro_batches_are_folded(plan):
    samples = stream(plan, 3000, seed=4)
    one, two = book_of(plan, samples, batch=2), book_of(plan, samples, batch=1000)
    assert len(one._folded) > 4 and one.gather(999).equals(two.gather(999))


def test_what_is_not_a_loss_is_refused(plan):
    book = LossBook(plan)
    add(book, 3, [0, 1], [1.0, math.nan], [0.1, 0.1])
    with pytest.raises(DatakitError, match=f"step 3: clip {clip_ids(plan)[1]} has loss nan"):
        book.gather(4)
    book = LossBook(plan)
    add(book, 3, [2], [1.0], [1.5])
    with pytest.raises(DatakitError, match="at time 1.5"):
        book.gather(4)
    with pytest.raises(ValueError, match="2 samples have losses"):
        add(book, 3, [0, 1], [1.0], [0.1])


def test_falling_loss_leaves_equal_clips_equal(plan):
    """All clips are alike, and the loss falls from 3 to 1: a clip seen early and one seen late have nearly the same
    excess, where a mean over everything would be behind by more than the noise."""
    rng = np.random.default_rng(5)
    book, every = LossBook(plan), []
    for i in range(6000):
        loss = 1 + 2 * math.exp(-i / 2500) + rng.normal(0, 0.1)
        every.append(loss)
        add(book, i, [i // 1000], [loss], [0.5])  # clip 0 is seen first only, clip 5 last only
    rows = book.gather(6000)
    mean = {row["clip_id"]: row["excess"] / row["count"] for row in rows.iter_rows(named=True)}
    assert set(mean) == set(clip_ids(plan))
    assert max(mean.values()) - min(mean.values()) < 0.06 and all(-0.06 < m < 0 for m in mean.values())
    over_all = np.array(every[1:]) - np.cumsum(every)[:-1] / np.arange(1, 6000)
    assert over_all[-1000:].mean() < -0.55  # for comparison: the cumulative mean


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """400 clips, four of them with the wrong caption: their loss is higher by less than the spread of single losses."""
    folder = tmp_path_factory.mktemp("planted")
    videos = [f"{n:02x}" + "0" * 30 for n in range(20)]
    catalog = catalog_of(folder / "c", videos, clips=20)
    plan = plan_of(folder / "plan", [catalog], [videos], clips=20)
    wrong = {17, 133, 250, 399}
    rng = np.random.default_rng(11)
    back = WriteBack(plan, "planted", {catalog.root: catalog})
    for step in range(600):
        windows = rng.integers(0, 800, 16)
        times = rng.random(16)
        level = 0.3 + times**2 * (1 + (windows >= 400)) + math.exp(-step / 100)
        losses = level * (1 + 0.1 * rng.normal(size=16)) + 0.13 * np.array([w % 400 in wrong for w in windows])
        add(back, step, windows.tolist(), losses.tolist(), times.tolist(), rng.integers(0, 2**62, 16).tolist())
        if step % 200 == 199:
            (folder / FILE).write_bytes(back.save(step + 1)[1][FILE])
            back.commit(folder)
    ids = plan.windows["clip_id"].to_pylist()
    return catalog, {ids[w] for w in wrong}


def test_planted_clips_come_first_in_the_view(planted):
    catalog, wrong = planted
    found = query(catalog, "SELECT clip_id, loss FROM clips WHERE loss IS NOT NULL ORDER BY loss DESC LIMIT 12")
    assert wrong <= set(found["clip_id"]) and found["loss"].is_sorted(descending=True)
    rows = catalog.scan("losses").collect()
    ratio = rows.group_by("clip_id").agg(loss=pl.col("excess").sum() / pl.col("count").sum())
    some = found.row(0)
    assert dict(ratio.iter_rows())[some[0]] == pytest.approx(some[1])
    assert 9600 - 40 <= rows["count"].sum() <= 9600  # all but the first of each level and bucket
    known = catalog.scan("clips").select("clip_id", "shard").collect()
    assert rows.join(known, on=["clip_id", "shard"], how="anti").is_empty()
    assert list(problems(catalog, sources=False)) == []


def test_a_selection_by_loss(planted):
    catalog, wrong = planted
    bound = query(catalog, "SELECT loss FROM clips WHERE loss IS NOT NULL ORDER BY loss DESC LIMIT 12")["loss"][-1]
    chosen = Selection(catalog, where=f"loss >= {bound} and status = 'kept'", columns=["clip_id", "loss"])
    assert wrong <= set(chosen.read()["clip_id"]) and chosen.size[0] == 12
    again = Selection.from_dict(catalog, chosen.as_dict())
    everything = "loss > -1e9"
    commit(catalog, "other", learned(catalog, chosen.read()["clip_id"].to_list()[:1], 0, 10, excess=-100.0))
    assert (
        again.content_hash
        == chosen.content_hash
        != Selection(catalog, where=again.where, columns=again.columns).content_hash
    )
    assert (
        Selection(catalog, "losses=0", where=everything).size[0] == 0
        and Selection(catalog, where=everything).size[0] == 400
    )
    rewind(catalog, "other", 0)


# a run that is killed


class Killed(BaseException):
    pass


SAVE_EVERY, STEPS = 5, 20


def train(
    plan: Plan,
    folder: Path,
    catalogs: dict[str, Catalog],
    steps: int = STEPS,
    kill: tuple[str, int] | None = None,
    start: int | None = None,
) -> None:
    """The loop as far as it matters here, from the newest checkpoint or a given one.

    Args:
        kill: where: `saving`, `saved`, `committing`, `committed` or `step`, and at which step.
    """

    def maybe(where: str, step: int) -> None:
        if kill == (where, step):
            raise Killed

    folder.mkdir(exist_ok=True)
    whole = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())
    begin = start if start is not None else (whole[-1] if whole else 0)
    back = WriteBack(plan, "run", catalogs, begin)
    if begin:
        back.resume(folder / str(begin), json.loads((folder / str(begin) / "state.json").read_text()), begin)
    samples = stream(plan, STEPS * 8)
    for step in range(begin, steps):
        maybe("step", step)
        for i in range(0, 8, 4):
            _, windows, seeds, losses, times = zip(*samples[step * 8 + i : step * 8 + i + 4])
            add(back, step, list(windows), list(losses), list(times), list(seeds))
        if (step + 1) % SAVE_EVERY:
            continue
        state, files = back.save(step + 1)
        maybe("saving", step + 1)
        target = folder / str(step + 1)
        target.mkdir(exist_ok=True)
        (target / "state.json").write_text(json.dumps(state))
        (target / FILE).write_bytes(files[FILE])
        maybe("saved", step + 1)
        if kill == ("committing", step + 1):
            _dying(catalogs, back, target)
        back.commit(target)
        maybe("committed", step + 1)


def _dying(catalogs: dict[str, Catalog], back: WriteBack, target: Path) -> None:
    """Killed between the commits of two catalogs; with one catalog, right after what it read."""
    last = list(catalogs.values())[-1]
    upsert = last.upsert

    def killed(name, rows, revise, **options):
        def read_and_die(rows, table):
            revise(rows, table)
            raise Killed

        return upsert(name, rows, revise=read_and_die, **options)

    last.upsert = killed
    try:
        back.commit(target)
    finally:
        del last.upsert


def table(catalog: Catalog) -> pl.DataFrame:
    return catalog.scan("losses").collect().sort("clip_id", "bucket", "noise_level", "from_step")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """What a run without a kill writes: into two catalogs, of one video each."""
    folder = tmp_path_factory.mktemp("unbroken")
    plan, catalogs = two(folder)
    train(plan, folder / "run", catalogs)
    return [table(c) for c in catalogs.values()]


def two(folder: Path) -> tuple[Plan, dict[str, Catalog]]:
    catalogs = [catalog_of(folder / name, [v]) for name, v in zip("cd", IDS)]
    return plan_of(folder / "plan", catalogs, [[v] for v in IDS]), {c.root: c for c in catalogs}


def test_parts_of_several_catalogs(unbroken):
    for rows, v in zip(unbroken, IDS):
        assert (
            rows.height
            and set(rows["shard"]) == {v[0]}
            and set(rows["clip_id"]) == {clip(v, n * 100)["clip_id"] for n in range(3)}
        )
        assert set(rows.select("from_step", "to_step").rows()) == {(0, 5), (5, 10), (10, 15), (15, 20)}
    assert sum(rows["count"].sum() for rows in unbroken) == STEPS * 8 - 20  # the first of 10 levels of 2 buckets


@pytest.mark.parametrize(
    "kill",
    [
        ("step", 3),
        ("saving", 5),
        ("saved", 5),
        ("committing", 5),
        ("committed", 5),
        ("step", 7),
        ("saved", 20),
        ("committing", 20),
    ],
)
def test_killed_anywhere_nothing_is_counted_twice_or_lost(unbroken, tmp_path, kill):
    plan, catalogs = two(tmp_path)
    with pytest.raises(Killed):
        train(plan, tmp_path / "run", catalogs, kill=kill)
    train(plan, tmp_path / "run", catalogs)
    for catalog, rows in zip(catalogs.values(), unbroken):
        assert table(catalog).equals(rows)


def test_killed_before_the_first_checkpoint_is_whole_nothing_is_committed(tmp_path):
    plan, catalogs = two(tmp_path)
    with pytest.raises(Killed):
        train(plan, tmp_path / "run", catalogs, kill=("saving", 5))
    assert all(table(c).is_empty() for c in catalogs.values())


def test_resumed_from_an_earlier_checkpoint(unbroken, tmp_path):
    plan, catalogs = two(tmp_path)
    train(plan, tmp_path / "run", catalogs, steps=17)
    commit(other := list(catalogs.values())[0], "another run", learned(other, [clip(IDS[0])["clip_id"]], 12, 99))
    train(plan, tmp_path / "run", catalogs, start=5)
    for catalog, rows in zip(catalogs.values(), unbroken):
        assert table(catalog).filter(pl.col("run_id") == "run").equals(rows)
    assert table(other).filter(pl.col("run_id") == "another run").height == 1


def test_a_range_that_reaches_over_the_step_goes_too(own):
    catalog, ids = Catalog(own.parts[0].catalog), clip_ids(own)
    for start, end in ((0, 4), (4, 9), (9, 12)):
        commit(catalog, "run", learned(catalog, ids, start, end))
    assert rewind(catalog, "run", 6) == 12 and table(catalog)["from_step"].unique().to_list() == [0]
    version = catalog.table("losses").version()
    assert rewind(catalog, "run", 6) == 0 and commit(catalog, "run", learned(catalog, ids, 0, 4)) == 0
    assert catalog.table("losses").version() == version  # nothing to do is no commit


def test_a_catalog_that_cannot_be_written_loses_nothing(unbroken, tmp_path):
    """One checkpoint's commit fails, the run goes on, the next one brings both."""
    plan, catalogs = two(tmp_path)
    first = list(catalogs.values())[0]
    back = WriteBack(plan, "run", catalogs)
    samples = stream(plan, STEPS * 8)
    for step in range(STEPS):
        for i in range(0, 8, 4):
            _, windows, seeds, losses, times = zip(*samples[step * 8 + i : step * 8 + i + 4])
            add(back, step, list(windows), list(losses), list(times), list(seeds))
        if step + 1 in (5, 10, 15, 20):
            (tmp_path / FILE).write_bytes(back.save(step + 1)[1][FILE])
            os.rename(first.root, f"{first.root}-away") if step + 1 in (5, 10) else None
            try:
                back.commit(tmp_path)
                assert step + 1 > 10 and back.waiting.is_empty()
            except CatalogError:
                assert step + 1 <= 10 and back.waiting["to_step"].max() == step + 1
            os.rename(f"{first.root}-away", first.root) if step + 1 in (5, 10) else None
    for catalog, rows in zip(catalogs.values(), unbroken):
        assert table(catalog).equals(rows)


def test_a_checkpoint_of_another_run_gives_its_means_and_no_rows(tmp_path):
    plan, catalogs = two(tmp_path)
    train(plan, tmp_path / "run", catalogs, steps=5)
    state = json.loads((tmp_path / "run" / "5" / "state.json").read_text())
    back = WriteBack(plan, "fork", catalogs)
    back.resume(tmp_path / "run" / "5", state, 5)
    assert back.save(5)[0] == {**state, "run_id": "fork"} and back.waiting.is_empty()
    assert all(set(table(c)["run_id"]) == {"run"} for c in catalogs.values())


def test_a_checkpoint_without_its_rows_says_so(tmp_path):
    plan, catalogs = two(tmp_path)
    back = WriteBack(plan, "run", catalogs)
    with pytest.raises(ConfigError, match="losses.arrow is missing or damaged"):
        back.commit(tmp_path)
    (tmp_path / FILE).write_bytes(b"ARROW1 no")
    with pytest.raises(ConfigError, match="missing or damaged"):
        back.commit(tmp_path)
    first = list(catalogs.values())[0]
    strange = learned(first, [clip(IDS[0])["clip_id"]], 0, 5).with_columns(catalog=pl.lit("/moved"))
    (tmp_path / FILE).write_bytes(as_bytes(strange))
    with pytest.raises(ConfigError, match="for the catalog /moved"):
        back.commit(tmp_path)


# others at work


def test_others_write_at_the_same_time(own):
    """Two processes that both are run x (one was thought dead), one that is run y, one that decides: x counts once."""
    root, ids = own.parts[0].catalog, clip_ids(own)
    ranges = [(n * 5, n * 5 + 5) for n in range(6)]
    context = multiprocessing.get_context("spawn")
    gate, found = context.Barrier(4), context.Queue()
    jobs = [
        context.Process(daemon=True, target=loss_writers.commit_all, args=(root, run, ids, ranges, gate, found))
        for run in ("x", "x", "y")
    ]
    jobs.append(context.Process(daemon=True, target=loss_writers.decide, args=(root, gate, found)))
    for job in jobs:
        job.start()
    counts = sorted(found.get(timeout=120) for _ in jobs)
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0] * 4 and sum(counts) == 2 * 6 * 6
    rows = table(Catalog(root))
    assert not rows.select("run_id", "clip_id", "from_step").is_duplicated().any()
    assert dict(rows.group_by("run_id").len().iter_rows()) == {"x": 36, "y": 36}
    assert list(problems(Catalog(root), sources=False)) == []


def test_clips_that_were_forgotten_get_no_rows(own, tmp_path):
    """One clip by its span, then all of the other video; what other clips learned stays."""
    catalogs = {own.parts[0].catalog: Catalog(own.parts[0].catalog)}
    catalog = list(catalogs.values())[0]
    train(own, tmp_path / "run", catalogs, steps=5)
    gone = clip_ids(own)[1]
    Forgetting(catalog, Request(clips=(gone,))).run()
    assert gone not in set(table(catalog)["clip_id"])
    train(own, tmp_path / "run", catalogs, steps=10)
    Forgetting(catalog, Request(sources=(IDS[1],))).run()
    train(own, tmp_path / "run", catalogs)
    later = table(catalog).filter(pl.col("from_step") >= 10)
    left = {clip_ids(own)[0], clip_ids(own)[2]}
    assert set(table(catalog)["clip_id"]) == set(later["clip_id"]) == left
    assert set(table(catalog)["from_step"]) == {0, 5, 10, 15} and list(problems(catalog, sources=False)) == []


# the run's row


def rows_of(catalog: Catalog) -> list[dict]:
    return catalog.scan("runs").filter(pl.col("pipeline") == "train dit").sort("run_id").collect().to_dicts()


def test_the_record_of_a_run_through_a_resume(own):
    catalog = Catalog(own.parts[0].catalog)
    first = TrainingRecord.open(own.parts, "train dit", {"steps": 10}, gpus=2)
    first.checkpoints([("/run/5", 5), ("/run/10", 10)], {"steps": 10, "samples": 80})
    (row,) = rows_of(catalog)
    assert (row["run_id"], row["status"], row["finished_at"]) == (first.run_id, "running", None)
    assert json.loads(row["selection"]) == own.parts[0].selection and json.loads(row["counts"]) == {
        "steps": 10,
        "samples": 80,
    }
    assert [(c["path"], c["step"]) for c in row["checkpoints"]] == [("/run/5", 5), ("/run/10", 10)]
    assert row["wall_s"] > 0 and row["gpu_hours"] == pytest.approx(2 * row["wall_s"] / 3600)
    again = TrainingRecord.open(own.parts, "train dit", {"steps": 20}, run_id=first.run_id)  # killed, now without a GPU
    again.checkpoints([("/run/10", 10), ("/run/15", 15)])
    assert again.catalogs[catalog.root].signature["run_id"] == first.run_id
    ids = clip_ids(own)
    for start in (0, 10):
        commit(again.catalogs[catalog.root], first.run_id, learned(catalog, ids, start, start + 10))
    again.end("finished", {"steps": 20})
    (after,) = rows_of(catalog)
    assert (after["run_id"], after["status"], json.loads(after["config"])) == (first.run_id, "finished", {"steps": 20})
    assert (
        after["started_at"] == row["started_at"] < after["finished_at"]
        and json.loads(after["snapshot"]) == catalog.versions()
    )
    kept, new = after["checkpoints"]
    assert kept == row["checkpoints"][1] and new["step"] == 15
    assert after["wall_s"] > row["wall_s"] and after["gpu_hours"] == pytest.approx(row["gpu_hours"])
    assert len(catalog.table("losses").file_uris()) == 2 and table(catalog).height == 12  # one for each shard
    assert catalog.table("losses").history(1)[0]["run_id"] == first.run_id


def test_how_runs_end_badly(own):
    catalog = Catalog(own.parts[0].catalog)
    cases = (
        (KeyboardInterrupt(), "stopped", "KeyboardInterrupt"),
        (DatakitError("loss is nan"), "failed", "loss is nan"),
    )
    for error, status, said in cases:
        record = TrainingRecord.open(own.parts, "train dit", {})
        record.fail(error, {"steps": 3})
        (row,) = [r for r in rows_of(catalog) if r["run_id"] == record.run_id]
        assert row["status"] == status and json.loads(row["counts"]) == {"steps": 3, "error": said}


def set_motion(catalog: Catalog, videos: list[str], motion: float) -> None:
    rows = [{"video_id": video, "shard": catalog.shard_of(video), "motion": motion} for video in videos]
    catalog.upsert("clips", rows, keys=("video_id",), only="update")


def test_vacuum_keeps_what_the_run_read_and_forget_names_its_checkpoints(tmp_path):
    """Two selections of one catalog at different snapshots, both recorded."""
    catalog = catalog_of(tmp_path / "c", IDS)
    parts = [Part("a", 1.0, Selection(catalog, where=f"video_id = '{IDS[0]}'").as_dict(), catalog.root)]
    set_motion(catalog, IDS[1:2], 7.0)
    parts.append(Part("b", 1.0, Selection(catalog, where="motion = 7").as_dict(), catalog.root))
    record = TrainingRecord.open(parts, "train dit", {})
    record.checkpoints([("/run/5", 5)])
    assert {r["run_id"] for r in rows_of(catalog)} == {record.run_id, f"part2-{record.run_id}"}
    set_motion(catalog, IDS, 8.0)
    vacuum(catalog, keep_days=0)
    for part in parts:
        assert Selection.from_dict(catalog, part.selection).content_hash == part.selection["content_hash"]
    assert Selection(catalog, where="motion = 7").size[0] == 0
    plan = Forgetting(catalog, Request(clips=(clip(IDS[1])["clip_id"],))).plan
    assert plan.checkpoints == ["/run/5"] and f"run part2-{record.run_id}" in plan.selections
    record.end("finished", {})
    assert {r["status"] for r in rows_of(catalog)} == {"finished"}


def test_a_catalog_that_is_gone_or_being_restored(own, tmp_path, monkeypatch):
    part = own.parts[0]
    with pytest.raises(CatalogError, match=r"part nine of the plan: no catalog at .*write_back=false"):
        TrainingRecord.open([Part("nine", 1.0, part.selection, str(tmp_path / "gone"))], "train dit", {})
    catalog = Catalog(part.catalog)
    tag(catalog, "good")
    catalog.append("losses", [{"clip_id": clip_ids(own)[0], "shard": "a", "run_id": "t", "excess": 1.0, "count": 1}])

    def die(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Catalog, "restore_table", die)
        with pytest.raises(Killed):
            restore(catalog, "good")
    with pytest.raises(CatalogError, match="a restore of .* was interrupted"):
        TrainingRecord.open(own.parts, "train dit", {})


@pytest.mark.parametrize("at", ["before", "after"])
def test_a_process_that_is_killed_while_it_commits(unbroken, tmp_path, at):
    plan, catalogs = two(tmp_path)
    with pytest.raises(Killed):
        train(plan, tmp_path / "run", catalogs, kill=("saved", 5))
    first = list(catalogs.values())[0]
    process = multiprocessing.get_context("spawn").Process(
        daemon=True,
        target=loss_writers.commit_and_die,
        args=(first.root, "run", str(tmp_path / "run" / "5" / FILE), at),
    )
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert set(table(first)["to_step"]) == (set() if at == "before" else {5})
    train(plan, tmp_path / "run", catalogs)
    for catalog, rows in zip(catalogs.values(), unbroken):
        assert table(catalog).equals(rows)
