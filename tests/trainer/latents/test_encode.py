"""Windows of a plan are encoded once, come back as the loader's own frames would give them, and go when their clips
go."""

import json
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
import typer
from typer.testing import CliRunner

from catalogs.maintenance.forget import Forgetting, Request
from catalogs.maintenance.validate import problems
from catalogs.query.history import runs
from catalogs.query.selection import Selection
from catalogs.query.snapshots import vacuum
from catalogs.records.latents import GROUP_BYTES, Latents
from catalogs.records.runs import RunRecord
from catalogs.tables.catalog import Catalog
from datakit import config
from datakit.cli.encode import run_encode
from datakit.errors import ConfigError, DatakitError, ErrorKind
from datakit.identity import clip_id, video_id
from datakit.process.messages import Failed
from pipelines.executor.flow import Outcome
from pipelines.executor.session import RaySession
from support import catalog_rows as handmade
from support import plan_folders
from support.drawn_videos import encode as write_video
from support.drawn_videos import shots
from trainer.data.sample_reader import Broken, SampleReader, Spec, Window, frames_shape
from trainer.latents import encoder as encoder_module
from trainer.latents.encode import Encode, EncodeSettings, _encode_into, encode
from trainer.latents.encode_queue import Queue, Tally
from trainer.latents.encoder import EncodeJob, Encoder, read_windows
from trainer.latents.index import locate
from trainer.models.autoencoders.base import pixels
from trainer.models.autoencoders.build import autoencoder_hash, build_autoencoder
from trainer.models.common.weights import save_weights
from trainer.planning.build_plan import make_plan
from trainer.planning.mixture import COLUMNS
from trainer.planning.plan import Plan
from trainer.planning.settings import PlanSettings

pytestmark = pytest.mark.slow

SIZES = {"widths": [8, 8, 8], "latent_channels": 4}
LENGTHS = {"a": 30, "b": 30, "c": 30, "d": 30, "e": 7, "f": 1}
"""Frames: two windows of nine each, one of five, and an image."""
PLAN = PlanSettings(fps=25, resolutions=["64px"], aspects=["4:3"], frames=[1, 5, 9], captions="optional", windows=2)
TICKS = 512
"""Of a frame, in MP4 at 25 frames/s: 1/12800 s."""


@pytest.fixture(scope="module")
def footage(tmp_path_factory) -> Path:
    """Moving pictures, each file other ones."""
    folder = tmp_path_factory.mktemp("footage")
    for number, (name, length) in enumerate(LENGTHS.items()):
        frames = [np.roll(f, (3 * i, number), (1, 0)) for i, f in enumerate(shots([length], 96, 128))]
        if length == 1:
            cv2.imwrite(str(folder / f"{name}.png"), frames[0])
        else:
            write_video(
                folder / f"{name}.mp4", frames, 25, pix_fmt="yuv420p", options={"crf": "20", "preset": "ultrafast"}
            )
    return folder


def catalog_of(footage: Path, root: Path) -> Catalog:
    """A clip of each file, whole."""
    catalog = Catalog.create(root)
    for file in sorted(footage.iterdir()):
        length = LENGTHS[file.stem]
        with file.open("rb") as opened:
            video = video_id(opened, file.stat().st_size)
        image, end = length == 1, length * TICKS
        base = "1/25" if image else "1/12800"
        catalog.append(
            "videos",
            [
                {
                    "video_id": video,
                    "shard": video[0],
                    "status": "ok",
                    "run_id": "r",
                    "clip_count": 1,
                    "kind": "image" if image else "video",
                    "uris": [{"uri": str(file), "size": file.stat().st_size, "etag": "e"}],
                    "duration_s": length / 25,
                    "vfr": False,
                    "time_base": base,
                }
            ],
        )
        catalog.append(
            "clips",
            [
                {
                    "clip_id": clip_id(video, 0, 0, end),
                    "video_id": video,
                    "shard": video[0],
                    "stream": 0,
                    "run_id": "r",
                    "start_pts": 0,
                    "end_pts": end,
                    "time_base": base,
                    "start_s": 0.0,
                    "end_s": length / 25,
                    "num_frames": length,
                    "fps": None if image else 25.0,
                    "width": 128,
                    "height": 96,
                    "split": "train",
                    "errors": [],
                    "stage_versions": [],
                }
            ],
        )
    return catalog


def plan_of(catalog: Catalog, folder: Path) -> Plan:
    return make_plan(Selection(catalog, where=None, columns=COLUMNS), PLAN, folder)


def clip_of(catalog: Catalog, name: str) -> dict:
    return catalog.clips().filter(pl.col("uri").str.contains(f"/{name}.")).collect().row(0, named=True)


def crop(catalog: Catalog, *names: str) -> None:
    """Black borders are found in clips: other pixels train."""
    box = {"crop_x": 16, "crop_y": 0, "crop_width": 96, "crop_height": 96}
    rows = [{**{key: clip_of(catalog, name)[key] for key in ("clip_id", "shard")}, **box} for name in names]
    catalog.upsert("clips", rows, keys=("clip_id",), only="update")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_weights(build_autoencoder("tiny", None, **SIZES).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def model(weights):
    return build_autoencoder("tiny", weights, **SIZES).eval()


def settings(weights: Path, *sets: str) -> EncodeSettings:
    return config.load(
        EncodeSettings,
        None,
        [
            "autoencoder.kind=tiny",
            f"autoencoder.weights={weights}",
            f"autoencoder.sizes={json.dumps(SIZES)}",
            "encode.threads=1",
            "encode.dtype=float32",
            "encode.batch=2",
            *sets,
        ],
    )


@pytest.fixture(scope="module")
def world(footage, weights, ray_address, tmp_path_factory):
    """A catalog with an encoded plan."""
    folder = tmp_path_factory.mktemp("world")
    catalog = catalog_of(footage, folder / "catalog")
    plan = plan_of(catalog, folder / "plan")
    seen = []
    done = encode([plan.folder], settings(weights), ray=ray_address, on_progress=lambda *state: seen.append(state))
    return SimpleNamespace(
        folder=folder, catalog=catalog, plan=plan, done=done, hash=done.estimate.autoencoder, seen=seen
    )


@pytest.fixture
def one_thread():
    """The same sums in the same order as in the actors."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def latents(catalog: Catalog, *columns: str) -> pl.DataFrame:
    return catalog.scan("latents").select(columns or pl.all()).collect()


def same(one: pl.DataFrame, other: pl.DataFrame) -> bool:
    names = [name for name in one.columns if name not in ("run_id", "created_at")]
    return one.select(names).sort("geometry").equals(other.select(names).sort("geometry"), null_equal=True)


def read_latents(plan: Plan, index: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Mean and std of every window, as a loader process reads them."""
    reader = SampleReader(Spec(str(plan.folder), str(index), False, False, False, 1 << 20))
    found = []
    for window in range(plan.windows.num_rows):
        memory = np.zeros(1 << 20, np.uint8)
        read = reader.read(window, 7, memory)
        assert read.window == window and read.latent[0] == "float32"
        size = 4 * int(np.prod(read.latent[1]))
        parts = (memory[i * size : (i + 1) * size].copy().view(np.float32).reshape(read.latent[1]) for i in (0, 1))
        found.append(tuple(torch.from_numpy(part) for part in parts))
    return found


def read_frames_raw(plan: Plan) -> list[np.ndarray]:
    """uint8 of every window, as a loader process without augmentation reads it."""
    reader = SampleReader(Spec(str(plan.folder), None, False, False, False, 0))
    found = []
    for window in range(plan.windows.num_rows):
        memory = np.zeros(frames_shape(plan.buckets[Window.of(plan, window).bucket]), np.uint8)
        assert reader.read(window, 7, memory.reshape(-1)).window == window
        found.append(memory)
    return found


def test_latents_are_what_the_frames_that_a_loader_reads_are_encoded_to(world, model, one_thread, tmp_path):
    located = locate(world.plan, world.hash, tmp_path / "latents.arrow")
    assert (located.found, located.missing, located.broken) == (10, 0, ()) and world.done.tally.encoded == 10
    assert world.hash == autoencoder_hash(model)
    stored, raw = read_latents(world.plan, located.index), read_frames_raw(world.plan)
    buckets = world.plan.windows.column("bucket").to_pylist()
    assert sorted(world.plan.buckets[b].frames for b in buckets) == [1, 5, *[9] * 8]
    for bucket in set(buckets):
        rows = [i for i, b in enumerate(buckets) if b == bucket]
        for pair in (rows[i : i + 2] for i in range(0, len(rows), 2)):  # as encode.batch=2 puts them together
            with torch.inference_mode():
                together = model.encode(pixels(torch.from_numpy(np.stack([raw[i] for i in pair])), model))
            for i, mean, std in zip(pair, *together):
                assert torch.equal(stored[i][0], mean) and torch.equal(stored[i][1], std)
                with torch.inference_mode():
                    alone = model.encode(pixels(torch.from_numpy(raw[i])[None], model))
                assert torch.allclose(stored[i][0], alone.mean[0], atol=1e-5) and torch.allclose(
                    stored[i][1], alone.std[0], atol=1e-5
                )
    assert len({mean.numpy().tobytes() for mean, _ in stored}) == 10  # no two windows show the same


def test_rows_lie_as_in_the_plan_and_the_run_is_recorded(world):
    assert (
        world.done.estimate.bytes
        == world.done.tally.bytes
        == sum(
            r for r in latents(world.catalog).select(pl.col("mean").bin.size() + pl.col("std").bin.size()).to_series()
        )
    )
    assert world.seen[-1] == (10, 10) and list(world.seen) == sorted(world.seen)
    order = {g: i for i, g in enumerate(world.plan.windows.column("geometry").to_pylist())}
    for file in Path(world.catalog.root, "latents").rglob("*.parquet"):
        places = [order[g] for g in pq.read_table(file, columns=["geometry"], partitioning=None).column(0).to_pylist()]
        assert places == sorted(places)
    assert not list(problems(world.catalog))
    listed = runs(world.catalog).filter(pl.col("pipeline") == "encode")
    assert listed["changes"].to_list() == ["latents +10"] and listed["status"].to_list() == ["finished"]


def test_what_is_there_is_not_encoded_again(world, weights, ray_address, monkeypatch):
    monkeypatch.setattr(RaySession, "__enter__", lambda self: pytest.fail("nothing is to be done"))
    again = encode([world.plan.folder, world.plan.folder], settings(weights), ray=ray_address)
    assert (again.estimate.windows, again.estimate.there, again.estimate.todo) == (10, 10, {})


def test_a_changed_plan_and_a_changed_source(world, footage, weights, ray_address, tmp_path):
    """Only windows whose geometry changed are encoded; what cannot be read has a row that says why, and may be tried
    again."""
    shutil.copytree(world.catalog.root, tmp_path / "catalog")
    shutil.copytree(footage, tmp_path / "footage")
    catalog = Catalog(tmp_path / "catalog")
    moved = {"uris": [{"uri": str(tmp_path / "footage" / "d.mp4"), "size": 1, "etag": "e"}]}
    video = clip_of(catalog, "d")["video_id"]
    catalog.upsert("videos", [{"video_id": video, **moved}], only="update")
    crop(catalog, "a", "d")
    plan = plan_of(catalog, tmp_path / "plan")
    old, new = (set(p.windows.column("geometry").to_pylist()) for p in (world.plan, plan))
    assert len(new - old) == 4
    message = r"latents of 4 of the plan's 10 windows are stale.*it was encoded as .*geometry.*the plan has .*geometry"
    with pytest.raises(ConfigError, match=message) as refused:
        locate(plan, world.hash, tmp_path / "i.arrow")
    assert "\n" not in str(refused.value) and any(clip_of(catalog, n)["clip_id"] in str(refused.value) for n in "ad")

    shutil.copy(footage / "b.mp4", tmp_path / "footage" / "d.mp4")  # other content
    done = encode([plan.folder], settings(weights), ray=ray_address)
    assert (done.estimate.there, done.tally.encoded, done.tally.failed) == (6, 2, {"source_changed": 2})
    table = latents(catalog)
    assert set(table.filter(pl.col("error_kind").is_null())["geometry"]) - old == set(
        i
        for i, c in zip(plan.windows.column("geometry").to_pylist(), plan.windows.column("clip_id").to_pylist())
        if c == clip_of(catalog, "a")["clip_id"]
    )
    errors = table.filter(pl.col("error_kind").is_not_null())
    assert set(errors["clip_id"]) == {clip_of(catalog, "d")["clip_id"]} and errors["mean"].null_count() == 2
    assert all("holds other content" in text for text in errors["error"])
    located = locate(plan, world.hash, tmp_path / "i.arrow")
    assert (located.found, located.missing, {b.kind for b in located.broken}, len(located.broken)) == (
        8,
        0,
        {"source_changed"},
        2,
    )
    assert all(isinstance(b, Broken) and plan.rows([b.window])[0]["uri"].endswith("d.mp4") for b in located.broken)
    assert encode([plan.folder], settings(weights), ray=ray_address, dry_run=True).estimate.broken == 2

    shutil.copy(footage / "d.mp4", tmp_path / "footage" / "d.mp4")
    done = encode([plan.folder], settings(weights), retry_failed=True, ray=ray_address)
    assert (done.tally.encoded, done.tally.failed) == (2, {})
    assert (
        latents(catalog)["error_kind"].null_count() == 14 == latents(catalog).height
    )  # ten of the first plan, four of this one
    assert locate(plan, world.hash, tmp_path / "i.arrow").found == 10 and not list(problems(catalog, sources=False))


KILLED = """
import os, signal
from catalogs.records.latents import Latents
from deltalake import DeltaTable
commits = []
plain = DeltaTable.create_write_transaction
def dying(*arguments, **options):
    commits.append(1)
    if len(commits) > 2:
        os.kill(os.getpid(), signal.SIGKILL)  # files are written, the log does not know them
    return plain(*arguments, **options)
DeltaTable.create_write_transaction = dying
"""


def test_killed_between_files_and_log_it_goes_on(world, footage, weights, ray_address, tmp_path):
    catalog = catalog_of(footage, tmp_path / "catalog")
    plan = plan_of(catalog, tmp_path / "plan")
    chosen = settings(weights, "encode.commit_s=0.001").model_dump_json()
    script = (
        f"{KILLED}\nfrom trainer.latents.encode import *\n"
        f"encode([{str(plan.folder)!r}], EncodeSettings.model_validate_json({chosen!r}), ray={ray_address!r})"
    )
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    before = latents(catalog, "geometry").height
    assert 2 <= before < 10
    on_disk, known = (
        len(list(Path(catalog.root, "latents").rglob("*.parquet"))),
        len(catalog.table("latents").file_uris()),
    )
    assert on_disk > known == 2
    done = encode([plan.folder], settings(weights), ray=ray_address)
    assert (done.estimate.there, done.tally.encoded, done.tally.failed) == (before, 10 - before, {})
    assert same(latents(catalog), latents(world.catalog)) and not list(problems(catalog))


def test_latents_of_another_autoencoder_and_none_at_all(world, footage, tmp_path):
    other = "f" * 32
    with pytest.raises(
        ConfigError, match=f"latents of 10 of the plan's 10 .*was encoded by autoencoder {world.hash}, not by {other}"
    ):
        locate(world.plan, other, tmp_path / "i.arrow")
    plan = plan_of(catalog_of(footage, tmp_path / "catalog"), tmp_path / "plan")
    located = locate(plan, world.hash, tmp_path / "none.arrow")
    assert (located.found, located.missing) == (0, 10)
    assert SampleReader(Spec(str(plan.folder), str(located.index), False, False, True, 0)).latents.find(0) is None


# the table


def row(number: int, size: int = 8, video: str = "a" * 32, **columns) -> dict:
    start = number * 100
    return {
        "clip_id": clip_id(video, 0, start, start + 100),
        "video_id": video,
        "shard": video[0],
        "stream": 0,
        "start_pts": start,
        "end_pts": start + 100,
        "geometry": f"{number:016x}",
        "bucket": "8x8x1",
        "first": 0,
        "frames": 1,
        "fps": 0.0,
        "dtype": "float32",
        "shape": [1, 1, 1, size // 4],
        "mean": bytes([number % 251]) * size,
        "std": b"\0" * size,
        "error_kind": None,
        "error": None,
        "run_id": "e",
        "created_at": datetime.now(UTC),
        **columns,
    }


def failed(number: int, kind: str = "decode") -> dict:
    return row(number, dtype=None, shape=None, mean=None, std=None, error_kind=kind, error="broken")


@pytest.fixture
def catalog(tmp_path) -> Catalog:
    return Catalog.create(tmp_path / "a catalog")


@pytest.mark.parametrize("compression", ["snappy", "zstd"])
def test_row_groups_are_small_and_in_order(catalog, compression):
    rng = np.random.default_rng(0)
    rows = [row(i, 1 << 19, mean=rng.bytes(1 << 19)) for i in (5, 3, 9, 1, 0, 7, 8, 2, 4, 6)]
    assert Latents(catalog, "ae", compression).add([*rows, *(row(20 + i, bucket="16x8x1") for i in range(3))]) == 13
    files = {Path(f).parent.name: pq.ParquetFile(f) for f in catalog.table("latents").file_uris()}
    big, small = files["bucket=8x8x1"], files["bucket=16x8x1"]
    assert [big.metadata.row_group(i).num_rows for i in range(big.num_row_groups)] == [
        4,
        4,
        2,
    ] and small.num_row_groups == 1
    assert (
        max(sum(c.nbytes for c in big.read_row_group(i, ["mean", "std"]).columns) for i in range(3))
        <= GROUP_BYTES + 1024
    )
    assert big.read(["geometry"])["geometry"].to_pylist() == [r["geometry"] for r in rows]
    there = latents(catalog, *rows[0]).filter(bucket="8x8x1")
    assert same(there, pl.DataFrame(rows, schema=there.schema))


def test_two_writers_at_once_enter_every_window_once(catalog):
    """Each of them wants all windows, in another order, and neither knows of the other's until it commits."""
    writers = [Latents(catalog, "ae") for _ in range(3)]
    orders = [list(np.random.default_rng(seed).permutation(60)) for seed in range(3)]
    added = [0] * 3

    def work(me: int) -> None:
        for start in range(0, 60, 10):
            added[me] += writers[me].add([row(int(i)) for i in orders[me][start : start + 10]])

    threads = [threading.Thread(target=work, args=(me,)) for me in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    there = latents(catalog, "geometry")["geometry"]
    assert sum(added) == 60 == len(there) == there.n_unique()
    lying = [p for p in Path(catalog.root, "latents").rglob("*.parquet")]
    assert len(lying) == len(catalog.table("latents").file_uris())  # those of commits that lost are gone
    late = Latents(catalog, "ae")
    assert (
        late.add([row(3)]) == 1
    )  # it was told that there is one, and asked all the same: only what came since is looked at
    assert any("latents: 1" in line for line in problems(catalog))


def test_an_error_counts_until_there_is_a_latent(catalog):
    mine, other = Latents(catalog, "ae"), Latents(catalog, "ae")
    assert mine.add([row(0), failed(1), failed(2), row(3)]) == 4
    assert (
        other.add([failed(0), failed(1), row(2), failed(4)]) == 2
    )  # a latent comes before an error, an error is told once
    assert other.added(f"{0:016x}") and not other.added(f"{1:016x}")
    good = {Path(f).name for f in catalog.table("latents").file_uris()}
    again = Latents(catalog, "ae")
    assert again.windows().height == 6
    assert again.add([row(1), failed(4, "truncated")], [f"{1:016x}", f"{4:016x}"]) == 2
    kinds = dict(
        latents(catalog).filter(pl.col("geometry") != f"{2:016x}").select("geometry", "error_kind").iter_rows()
    )
    assert kinds == {f"{i:016x}": kind for i, kind in ((0, None), (1, None), (3, None), (4, "truncated"))}
    still = {Path(f).name for f in catalog.table("latents").file_uris()}
    means = [pq.ParquetFile(next(Path(catalog.root).rglob(name))).read(["mean"])["mean"] for name in good & still]
    assert sum(mean.null_count == 0 for mean in means) == 2  # files of latents are left alone when errors go
    assert not list(problems(catalog))


def test_forgotten_clips_have_no_latents_in_any_version(catalog):
    """Those of a clip that no table has any more, too: a part of the span that was forgotten."""
    video = "a" * 32
    catalog.append("videos", [handmade.video(video, clip_count=3)])
    catalog.append("clips", [handmade.clip(video, i * 100) for i in range(3)])
    writer = Latents(catalog, "ae")
    writer.add([row(i, mean=b"secret" if i == 1 else b"public") for i in range(3)])
    before = catalog.table("latents").version()
    older = row(7, start_pts=150, end_pts=250, clip_id="0" * 32, mean=b"secret")  # of an earlier division of the video
    writer.add([older, row(5)])
    forgetting = Forgetting(catalog, Request(clips=(row(1)["clip_id"],)))
    assert forgetting.plan.versions["latents"] == 2
    forgetting.run("asked")
    assert sorted(latents(catalog)["geometry"]) == [f"{i:016x}" for i in (0, 2, 5)]
    assert sorted(catalog.scan("latents", before).collect()["geometry"]) == [f"{i:016x}" for i in (0, 2)]
    assert not [p for p in Path(catalog.root).rglob("*") if p.is_file() and b"secret" in p.read_bytes()]
    assert Latents(catalog, "ae").add([row(1), older, row(6)]) == 1  # they do not come back
    assert not list(problems(catalog, sources=False))
    assert writer.add([row(0), row(8)]) == 1  # files were renamed under this one: it looks into them anew


def test_vacuum_keeps_what_a_run_reads(catalog):
    writer = Latents(catalog, "ae")
    writer.add([row(0), row(1)])
    kept = catalog.table("latents").version()
    RunRecord(catalog, "train", {}, selection=Selection(catalog)).begin()
    catalog.delete("latents", "first = 0")
    writer.add([row(2)])
    catalog.delete("latents", "first = 0")
    assert vacuum(catalog, keep_days=0).referenced["latents"] == [kept]
    assert catalog.scan("latents", kept).collect().height == 2 and latents(catalog).height == 0
    assert len(list(Path(catalog.root, "latents").rglob("*.parquet"))) == 1


# the parts of a run


def test_what_fails_together_is_tried_again_alone(world):
    """A window on which a process dies takes none of its neighbours with it."""
    todo = pl.DataFrame({"plan": [0] * 3, "row": [0, 1, 2], "bucket": [0] * 3, "again": [False] * 3})
    queue = Queue([world.plan], todo, Latents(world.catalog, "nobody's"), 2)
    jobs = queue.jobs()
    first, second = next(jobs), next(jobs)
    assert [len(make(1).windows) for _, make in (first, second)] == [2, 1] and next(jobs) is None
    crash = Failed(ErrorKind.CRASH, "died")
    assert queue.take(Outcome(first[0], failure=crash)) == []
    alone = [next(jobs), next(jobs)]
    assert [make(1).windows for _, make in alone] == [(w,) for w in first[1](1).windows]
    done = queue.take(Outcome(alone[0][0], failure=crash))
    done += queue.take(Outcome(second[0], [{"place": 0, "latent": {"mean": b""}, "errors": []}]))
    encode_error = [{"place": 0, "latent": None, "errors": [{"stage": "encode", "kind": "stage", "message": "m"}]}]
    done += queue.take(Outcome(alone[1][0], encode_error))
    assert [(task.row, error and error["kind"]) for task, _, error in done] == [(0, "crash"), (2, None), (1, "stage")]
    with pytest.raises(StopIteration):
        next(jobs)


def test_an_encoder_that_fails_on_everything_ends_the_run(world, catalog):
    """Thousands of windows would be taken for broken otherwise."""
    todo = pl.DataFrame({"plan": 0, "row": range(10), "bucket": 0, "again": False, "name": "b"})
    target = SimpleNamespace(plans=[world.plan] * 1, todo=pl.concat([todo] * 2), latents=Latents(catalog, "ae"))

    def run(jobs):
        for key, _ in (job for job in jobs if job is not None):
            yield Outcome(
                key,
                [
                    {
                        "place": 0,
                        "latent": None,
                        "errors": [{"stage": "encode", "kind": "stage", "message": "no kernel"}],
                    }
                ],
            )

    with pytest.raises(DatakitError, match="the encoder failed on each of 16 windows; the last error: no kernel"):
        _encode_into(SimpleNamespace(run=run), target, Encode(batch=1), "run", Tally(), lambda count: None)


def test_reading_says_what_is_wrong_and_goes_on(world, monkeypatch, tmp_path):
    monkeypatch.setattr(encoder_module, "READ_AGAIN_S", (0.0, 0.0))
    rows = [i for i in range(10) if Window.of(world.plan, i).frames == 9][:3]
    windows = [Window.of(world.plan, i) for i in rows]
    ids = [world.plan.rows([i], ["video_id"])[0]["video_id"] for i in rows]
    gone, other = replace(windows[1], uri=str(tmp_path / "no.mp4")), replace(windows[2], uri=windows[0].uri)
    job = EncodeJob(
        ((windows[0], ids[0]), (gone, ids[1]), (other, "0" * 32)), frames_shape(world.plan.buckets[windows[0].bucket])
    )
    *signs, batch, facts = read_windows(job)
    assert len(signs) == 3 and facts.clip_count == 3
    assert [[e["kind"] for e in r["errors"]] for r in batch.rows] == [[], ["unreadable"], ["source_changed"]]
    assert [len(pictures) for pictures in batch.images] == [1, 0, 0]
    assert np.array_equal(batch.images[0][0], read_frames_raw(world.plan)[rows[0]])


def test_the_encoder(weights, model, world):
    about = settings(weights).autoencoder.model_dump()
    with pytest.raises(ConfigError, match="weights of autoencoder tiny differ between machines"):
        Encoder(about, "0" * 32, False, "fp32", "float32", 1)
    encoder = Encoder(about, world.hash, False, "bf16", "bfloat16", 1)
    video = np.random.default_rng(1).integers(0, 256, (3, 5, 16, 16), np.uint8)
    nothing, found = encoder.run([{}, {}], [[], [video]])
    assert (
        nothing == {"latent": None}
        and found["latent"]["dtype"] == "bfloat16"
        and found["latent"]["shape"] == [4, 2, 2, 2]
    )
    with torch.inference_mode():
        exact = model.encode(pixels(torch.from_numpy(video)[None], model)).mean[0]
    stored = torch.frombuffer(bytearray(found["latent"]["mean"]), dtype=torch.bfloat16).view(4, 2, 2, 2)
    assert torch.allclose(stored.float(), exact, atol=0.05 * exact.abs().max())
    with torch.no_grad():
        next(encoder._model.parameters()).fill_(float("nan"))
    (bad,) = encoder.run([{}], [[video]])
    assert isinstance(bad, Failed) and "not finite" in bad.message


def cli(*arguments: str):
    app = typer.Typer()
    app.command()(run_encode)
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_the_command_says_how_much_before_it_starts(world, weights, footage, tmp_path, monkeypatch):
    plan = plan_of(catalog_of(footage, tmp_path / "catalog"), tmp_path / "plan")
    common = (
        "--plan",
        plan.folder,
        "--autoencoder",
        "tiny",
        "--weights",
        weights,
        "--set",
        f"autoencoder.sizes={json.dumps(SIZES)}",
    )
    shown = cli(*common, "--dry-run")
    assert shown.exit_code == 0, shown.output
    assert (
        "10 windows; 10 to encode:" in shown.output
        and "MB of latents, of " in shown.output
        and "GB free" in shown.output
        and world.hash in shown.output
    )
    told = json.loads(cli(*common, "--dry-run", "--json").stdout)
    sizes = {
        b.name: 2 * 2 * 4 * (b.frames // 4 + 1) * (b.height // 8) * (b.width // 8) for b in plan.buckets
    }  # bfloat16, four channels
    assert told["estimate"]["bytes"] == sum(sizes[name] * count for name, count in told["estimate"]["todo"].items())
    assert Catalog(tmp_path / "catalog").table("latents").version() == 0
    assert "10 of the windows have float32 latents" in str(
        cli("--plan", world.plan.folder, *common[2:], "--dry-run").exception
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "has 0.001 MB left" in str(cli(*common).exception)
    assert "the sections are autoencoder, encode, runner" in str(cli(*common, "--set", "plan.fps=3").exception)
    assert "unknown setting encode.dtpye: did you mean dtype" in str(cli(*common, "--set", "encode.dtpye=3").exception)
    assert "no plan at" in str(cli("--plan", tmp_path / "nowhere").exception)


def test_a_bucket_that_does_not_fit_the_autoencoder_is_named(weights, tmp_path):
    plan = plan_folders.plan_of(tmp_path / "plan", [plan_folders.window()], [plan_folders.bucket(frames=6)])
    with pytest.raises(
        ConfigError, match=f"bucket 32x48x6 of {plan.folder} does not fit autoencoder tiny: tiny takes 4k . 1 frames"
    ):
        encode([plan.folder], settings(weights), dry_run=True)


def test_bf16_is_refused_on_cpus(footage, weights, ray_address, tmp_path):
    """torch's convolutions of single frames give garbage there (`check_precision`); nothing is written."""
    catalog = catalog_of(footage, tmp_path / "catalog")
    plan = plan_of(catalog, tmp_path / "plan")
    with pytest.raises(ConfigError, match="works in fp32 on a CPU.*encode.precision=fp32"):
        encode([plan.folder], settings(weights, "encode.precision=bf16"), ray=ray_address)
    assert catalog.table("latents").version() == 0 and catalog.scan("runs").collect().is_empty()
