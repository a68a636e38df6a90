"""Samples as they reach the model: the right frames, the same ones for any number of ranks and workers, whatever
breaks."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from fractions import Fraction
from itertools import islice
from pathlib import Path

import cv2
import fsspec
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from datakit.errors import ConfigError, DatakitError
from datakit.identity import Span
from datakit.video.cut import cut
from datakit.video.reader import VideoReader
from support.drawn_videos import encode
from support.plan_folders import bucket, plan_of, window
from trainer.data.batch_sampler import Order
from trainer.data.dataloader import Batch, Loader, LoaderOptions, Position
from trainer.data.latent_reader import INDEX, LatentReader, Place
from trainer.data.reader_pool import READER, Ring
from trainer.data.sample_reader import SampleReader, Spec, Window, crop_box

HERE = LoaderOptions(workers=0, retries=0)
SMALL = bucket(2, frames=5, height=32, width=48)
START = Position(0, 0)


def level(video: int, frame: int) -> int:
    """Grey of a frame: which one it is can be seen."""
    return 20 + video * 40 + frame * 2


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> list[Path]:
    """Four films of 20 frames, 64 x 48, at 25 frames/s; film v, frame i is grey `level(v, i)`. And one that is none."""
    folder = tmp_path_factory.mktemp("films")
    made = [
        encode(folder / f"{v}.mp4", [np.full((48, 64, 3), level(v, i), np.uint8) for i in range(20)], 25)
        for v in range(4)
    ]
    (folder / "broken.mp4").write_bytes(b"this is no video" * 100)
    return [*made, folder / "broken.mp4"]


def row(film: Path, v: int, first: int = 0, of: int = 0, **columns) -> dict:
    usual = {
        "clip_id": f"clip{v}-{first:02d}",
        "uri": str(film),
        "first": first,
        "time_base": "1/12800",
        "end_pts": 20 * 512,
    }
    return window(of, f"video {v}", **usual | columns)


@pytest.fixture(scope="module")
def plan(films, tmp_path_factory):
    """Bucket 0: four windows of each film, and two of the broken one; bucket 1: two single frames. Two micro-batches a
    step."""
    rows = [row(film, v, first) for v, film in enumerate(films[:4]) for first in (0, 5, 10, 15)]
    rows += [row(films[4], 4, first) for first in (0, 5)]
    rows += [row(films[v], v, 3, of=1, frames=1, fps=0.0) for v in (0, 1)]
    return plan_of(
        tmp_path_factory.mktemp("plans") / "plan", rows, [SMALL, bucket(1, frames=1, tokens=20)], global_batches=2
    )


def hashed(video: torch.Tensor) -> str:
    return hashlib.sha1(video.numpy().tobytes()).hexdigest()


def samples(batches: list[Batch]) -> list[tuple]:
    """Of a step: what was trained on."""
    return sorted(
        (seed, clip, caption, hashed(video), round(b.weight / len(b.seeds), 6))
        for b in batches
        if b.weight
        for seed, clip, caption, video in zip(b.seeds, b.clip_ids, b.captions, b.video)
    )


def steps(loader: Loader, count: int) -> list[list[tuple]]:
    with loader:
        return [samples(batches) for _, batches in islice(loader, count)]


def together(loaders: list[Loader], count: int) -> list[list[tuple]]:
    """Steps of a run on several ranks."""
    return [sorted(sum(parts, [])) for parts in zip(*(steps(loader, count) for loader in loaders))]


STEPS = 11
"""Two epochs of 10 + 1 micro-batches (5 steps: 4, and one of both buckets), and one step more."""


@pytest.fixture(scope="module")
def unbroken(plan) -> tuple[list[list[tuple]], dict[int, dict], list]:
    """One rank, this process: samples of every step; states before some steps; what was replaced."""
    seen, states = [], {}
    with Loader(plan, Order(plan, 5), 0, 1, START, HERE) as loader:
        for i in range(STEPS):
            states[i] = loader.state()
            seen.append(samples(next(loader)[1]))
        return seen, states, loader.replaced


def test_every_window_or_its_stand_in(plan, unbroken):
    seen, _, replaced = unbroken
    epoch = [clip for step in seen[: Order(plan, 5).steps(0)] for _, clip, *_ in step]
    assert len(epoch) == 20
    assert not any(clip.startswith("clip4") for clip in epoch)
    assert set(epoch) == {f"clip{v}-{first:02d}" for v in range(4) for first in (0, 5, 10, 15)} | {
        "clip0-03",
        "clip1-03",
    }
    first = [r for r in replaced if r.epoch == 0]  # three: one's stand-in was the other
    assert {plan.rows([r.window], ["clip_id"])[0]["clip_id"] for r in first} == {"clip4-00", "clip4-05"}
    assert {(r.kind, r.message.split(":")[0]) for r in first} == {("not_media", "not a media file FFmpeg can read")}


def test_frames_are_those_of_the_window(films, tmp_path):
    """By place, stride and size; from the source by span, and from a clip file."""
    clip = tmp_path / "clip.mp4"
    span = Span(4 * 512, 20 * 512, Fraction(1, 12800))
    with VideoReader(str(films[1])) as reader:
        assert cut(reader, span, clip) == 16
    base = row(films[1], 1, 2, start_pts=span.start_pts, end_pts=span.end_pts, frames=5, stride=3, fps=25 / 3)
    by_time = base | {"stride": 0, "fps": 12.5, "frames": 5, "clip_id": "by time"}
    rows = [base, base | {"path": str(clip), "clip_id": "file"}, by_time]
    plan = plan_of(tmp_path / "plan", rows, [SMALL])
    for index, id_ in enumerate(plan.windows.column("clip_id").to_pylist()):
        out = np.zeros((3, 5, 32, 48), np.uint8)
        found = reader_of(plan).read(index, 0, out.reshape(-1))
        assert found.broken == ()
        frames = [4 + 2 + 2 * i for i in range(5)] if id_ == "by time" else [4 + 2 + 3 * i for i in range(5)]
        greys = np.array([level(1, f) for f in frames])
        assert np.abs(out.astype(int) - greys[None, :, None, None]).max() <= (4 if id_ == "file" else 1), id_


def reader_of(plan, latents=None, augment=False, flip=False, raw_if_missing=False) -> SampleReader:
    return SampleReader(Spec(str(plan.folder), latents, augment, flip, raw_if_missing, 1 << 20))


@pytest.fixture(scope="module")
def bordered(tmp_path_factory) -> dict:
    """One frame with black columns at its sides (picture 16..112 of 128); red grows to the right, green downwards."""
    picture = np.zeros((64, 128, 3), np.uint8)
    picture[:, 16:112, 0] = np.linspace(40, 230, 96)[None]
    picture[:, 16:112, 1] = np.linspace(40, 230, 64)[:, None]
    film = encode(tmp_path_factory.mktemp("bordered") / "film.mp4", [picture] * 2, 25)
    return row(
        film,
        0,
        frames=1,
        fps=0.0,
        width=128,
        height=64,
        crop_x=16,
        crop_y=0,
        crop_width=96,
        crop_height=64,
        end_pts=1024,
    )


def test_crops_lie_inside_the_borders(bordered, tmp_path):
    tall, wide = bucket(1, 1, 32, 24), bucket(1, 1, 32, 64)
    plan = plan_of(tmp_path / "plan", [bordered | {"bucket": i, "clip_id": str(i)} for i in range(2)], [tall, wide])
    inside = Window.of(plan, 0).inside
    assert crop_box(inside, 32 / 24) == crop_box(inside, 32 / 24, 0.5, 0.5)

    def edges(index: int, seed: int, augment: bool = True, flip: bool = False) -> tuple[int, ...]:
        """Red at the left and right, green at the top and bottom."""
        shape = 3, 1, plan.buckets[index].height, plan.buckets[index].width
        out = np.zeros(shape, np.uint8)
        reader_of(plan, augment=augment, flip=flip).read(index, seed, out.reshape(-1))
        return tuple(int(part.mean()) for part in (out[0, 0, :, 0], out[0, 0, :, -1], out[1, 0, 0], out[1, 0, -1]))

    # Tall: 48 of 96 columns, all 64 lines. In the middle it sees columns 24..72.
    assert edges(0, 1, augment=False) == edges(0, 2, augment=False) == pytest.approx((89, 181, 42, 228), abs=4)
    seen = [edges(0, seed) for seed in range(8)]
    assert edges(0, 3) == seen[3]
    assert max(left for left, *_ in seen) - min(left for left, *_ in seen) > 40
    for left, right, top, bottom in seen:
        assert (
            left >= 38
            and right <= 232
            and right - left == pytest.approx(92, abs=8)
            and (top, bottom) == pytest.approx((42, 228), abs=4)
        )
    # Wide: all 96 columns, 48 of 64 lines.
    assert edges(1, 1, augment=False) == pytest.approx((41, 229, 64, 205), abs=4)
    assert len({edges(1, seed)[2:] for seed in range(8)}) > 3
    mirrored = [edges(1, seed, augment=False, flip=True)[:2] for seed in range(16)]
    assert 2 < sum(left > right for left, right in mirrored) < 14


def test_an_image(tmp_path):
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:, :32], picture[:, 32:] = (250, 20, 30), (10, 60, 200)
    for name in ("still.png", "still.jpg"):
        assert cv2.imwrite(str(tmp_path / name), picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 98])
    rows = [
        row(tmp_path / name, 0, kind="image", frames=1, fps=0.0, clip_id=name) for name in ("still.png", "still.jpg")
    ]
    plan = plan_of(tmp_path / "plan", rows, [bucket(2, 1, 24, 32)])
    with Loader(plan, Order(plan, 0), 0, 1, START, HERE) as loader:
        _, [batch] = next(loader)
    assert batch.video.shape == (2, 3, 1, 24, 32) and batch.fps == [0.0, 0.0] and batch.mean is None
    for colour, part in (((250, 20, 30), batch.video[..., 4:12]), ((10, 60, 200), batch.video[..., 20:28])):
        assert (part.int() - torch.tensor(colour)[:, None, None, None]).abs().max() <= 3


def test_a_clip_with_too_few_frames_is_broken_for_good(films, tmp_path):
    plan = plan_of(tmp_path / "plan", [row(films[0], 0, 16)], [SMALL])
    with Loader(plan, Order(plan, 0), 0, 1, START, HERE) as loader, pytest.raises(DatakitError) as error:
        next(loader)
    assert str(error.value) == (
        f"nothing can stand in for clip clip0-16 ({films[0]}): 1 windows of bucket 32x48x5 are broken, this one: "
        "the clip has 20 frames, the window needs frame 20"
    )


def test_a_source_that_was_exchanged_is_broken(films, tmp_path):
    wrong = [row(films[0], 0, width=96, clip_id="size"), row(films[0], 0, time_base="1/90000", clip_id="time base")]
    plan = plan_of(tmp_path / "plan", [*wrong, row(films[1], 1)], [SMALL])
    with Loader(plan, Order(plan, 0), 0, 1, START, HERE) as loader:
        next(loader), next(loader)
    assert {(r.kind, r.message) for r in loader.replaced} == {
        ("source_changed", "its picture is 64 x 48, the catalog says 96 x 48"),
        ("source_changed", "its time base is 1/12800, the catalog says 1/90000"),
    }


# ---- the same samples for any number of ranks and workers, resumed anywhere


def test_processes_bring_what_this_one_does_and_leave_nothing_behind(plan, unbroken):
    seen, states, replaced = unbroken
    children = set(psutil.Process().children(recursive=True))
    with Loader(plan, Order(plan, 5), 0, 1, START, LoaderOptions(workers=2, prefetch_mb=1)) as loader:
        first = [samples(batches) for _, batches in islice(loader, 4)]
        processes = set(psutil.Process().children(recursive=True)) - children
        assert len(processes) == 2
        for process in processes:
            libraries = Path(f"/proc/{process.pid}/maps").read_text()
            assert "libavcodec" in libraries  # it does read
            assert "deltalake" not in libraries and "libtorch" not in libraries
            assert "memfd:datakit-loader" in libraries and "/dev/shm" not in libraries
        # One of them dies of it: another takes its place, and nothing is lost.
        os.kill(next(iter(processes)).pid, signal.SIGKILL)
        assert first + [samples(batches) for _, batches in islice(loader, STEPS - 4)] == seen
        assert loader.replaced == replaced
        # What was read ahead is not in the state.
        assert loader.state() == states_after(plan, states)
        assert loader.waited_s > 0
    assert "datakit-loader" not in Path("/proc/self/maps").read_text()
    assert not any(
        "datakit-loader" in os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if fd_is_open(fd)
    )
    assert set(psutil.Process().children(recursive=True)) <= children
    with pytest.raises(DatakitError, match="closed"):
        next(loader)
        next(loader)


def fd_is_open(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def states_after(plan, states: dict[int, dict]) -> dict:
    with Loader.resumed(states[STEPS - 1], plan, Order(plan, 5), 0, 1, HERE) as loader:
        next(loader)
        return loader.state()


@pytest.mark.parametrize("at", [0, 3, 5])
def test_resumed_on_one_rank(plan, unbroken, at):
    """Mid-epoch, and where an epoch begins."""
    seen, states, replaced = unbroken
    loader = Loader.resumed(states[at], plan, Order(plan, 5), 0, 1, HERE)
    assert steps(loader, STEPS - at) == seen[at:]
    assert loader.replaced == replaced


def test_resumed_on_two_ranks_and_back(plan, unbroken):
    """1 to 2 ranks of two processes each, in the middle of the first epoch; back to 1 in the second."""
    seen, states, replaced = unbroken
    options = LoaderOptions(workers=2, prefetch_mb=1)
    ranks = [Loader.resumed(states[3], plan, Order(plan, 5), rank, 2, options) for rank in (0, 1)]
    assert together(ranks, 4) == seen[3:7]
    assert ranks[0].position == ranks[1].position
    merged = sorted({r for loader in ranks for r in loader.replaced})
    assert merged == sorted(
        r for r in replaced if (r.epoch, r.step) < (ranks[0].position.epoch, ranks[0].position.step)
    )
    state = ranks[0].state() | {"replaced": [vars(r) for r in merged]}
    assert steps(Loader.resumed(state, plan, Order(plan, 5), 0, 1, HERE), STEPS - 7) == seen[7:]


def test_what_was_broken_stays_replaced(films, tmp_path):
    """A file that was repaired meanwhile does not change the samples of a run that met it broken."""
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(films[4].read_bytes())
    plan = plan_of(tmp_path / "plan", [row(film, v) for v, film in enumerate([*films[:3], broken])], [SMALL])

    def run(state: dict | None = None) -> tuple[list, dict]:
        start = {"epoch": 0, "step": 0, "replaced": []}
        with Loader.resumed(state or start, plan, Order(plan, 0), 0, 1, HERE) as loader:
            return [samples(batches) for _, batches in islice(loader, 4)], loader.state()

    first, state = run()
    broken.write_bytes(films[3].read_bytes())
    assert run(state | {"epoch": 0, "step": 0})[0] == first
    assert any(clip == "clip3-00" for step in run()[0] for _, clip, *_ in step)
    assert not any(clip == "clip3-00" for step in first for _, clip, *_ in step)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_have_equal_rounds_and_weights_of_one(plan, world):
    loaders = [Loader(plan, Order(plan, 5), rank, world, START, HERE) for rank in range(world)]
    for _ in range(5):
        ranks = [next(loader)[1] for loader in loaders]
        assert len({len(batches) for batches in ranks}) == 1
        assert sum(b.weight for batches in ranks for b in batches) == pytest.approx(1)
        assert all(b.video is not None for batches in ranks for b in batches)
    if world == 3:  # a step has two micro-batches at most: somebody repeats
        assert any(b.weight == 0 for b in next(loaders[0])[1] + next(loaders[1])[1] + next(loaders[2])[1])


def test_one_clip_for_two_ranks(films, tmp_path):
    plan = plan_of(tmp_path / "plan", [row(films[0], 0)], [SMALL], global_batches=4)
    ranks = [next(Loader(plan, Order(plan, 0), rank, 2, START, HERE)) for rank in (0, 1)]
    assert [[b.weight for b in batches] for _, batches in ranks] == [[1.0], [0.0]]
    assert ranks[0][1][0].clip_ids == ranks[1][1][0].clip_ids == ["clip0-00"]
    assert [position for position, _ in ranks] == [START, START]


# ---- what goes wrong


def test_a_file_that_comes_back(films, tmp_path):
    """Waited for, not replaced."""
    plan = plan_of(tmp_path / "plan", [row(tmp_path / "late.mp4", 0)], [SMALL])
    timer = threading.Timer(0.3, lambda: os.link(films[0], tmp_path / "late.mp4"))
    timer.start()
    with Loader(plan, Order(plan, 0), 0, 1, START, LoaderOptions(workers=0, retries=7, backoff_s=0.05)) as loader:
        _, [batch] = next(loader)
    assert batch.clip_ids == ["clip0-00"] and loader.replaced == []
    assert loader.waited_s > 0.3


def test_a_file_that_stays_away_stops_the_run(plan, films, tmp_path):
    missing = plan_of(tmp_path / "plan", [row(films[0], 0), row(tmp_path / "gone.mp4", 1)], [bucket(1)])
    with Loader(missing, Order(missing, 0), 0, 1, START, LoaderOptions(workers=0, retries=2, backoff_s=0.01)) as loader:
        with pytest.raises(DatakitError) as error:
            next(loader), next(loader)
    assert str(error.value) == (
        f"clip clip1-00 ({tmp_path}/gone.mp4) could not be read in 3 attempts (unreadable: cannot read "
        f"{tmp_path}/gone.mp4: No such file "
        "or directory): the run stops rather than skip it. Resume once the storage answers again, or plan without "
        "the clip"
    )


def test_hung_reads_and_killed_processes_end_with_the_clip_named(films, tmp_path):
    """A named pipe that nobody writes to hangs whoever opens it. The step before is delivered all the same."""
    os.mkfifo(tmp_path / "pipe.mp4")
    plan = plan_of(tmp_path / "plan", [row(films[0], 0), row(tmp_path / "pipe.mp4", 1)], [bucket(1)])
    seed = next(s for s in range(99) if Order(plan, s).step(0, 0)[0].windows == (0,))
    options = LoaderOptions(workers=1, prefetch_mb=1, retries=1, backoff_s=0.01, deadline_s=0.5)
    with Loader(plan, Order(plan, seed), 0, 1, START, options) as loader:
        assert next(loader)[1][0].clip_ids == ["clip0-00"]
        with pytest.raises(
            DatakitError,
            match=r"clip clip1-00 \(.*pipe.mp4\) could not be read in 2 attempts \(timeout: no answer within",
        ):
            next(loader)
    patient = options.model_copy(update={"deadline_s": 60.0})
    over = threading.Event()
    with Loader(plan, Order(plan, seed), 0, 1, START, patient) as loader:
        killer = threading.Thread(target=kill_who_opens, args=(tmp_path / "pipe.mp4", over))
        killer.start()
        with pytest.raises(
            DatakitError, match=r"clip1-00 .* in 2 attempts \(crash: the process that read it died \(SIGKILL\)\)"
        ):
            next(loader), next(loader)
    over.set()
    killer.join()


def kill_who_opens(pipe: Path, over: threading.Event) -> None:
    while not over.is_set():
        try:
            writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)  # fails until somebody reads
        except OSError:
            time.sleep(0.02)
            continue
        for process in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):  # gone already
                if READER in process.cmdline():  # other tests' Ray is a child as well
                    process.kill()
        os.close(writer)


def test_processes_that_cannot_start_are_told(plan, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Loader(plan, Order(plan, 0), 0, 1, START, LoaderOptions(workers=1, retries=2, prefetch_mb=1)) as loader:
        with pytest.raises(DatakitError, match=r"die while they start \(exit code 1\)"):
            next(loader)


def test_objects_of_a_store(films, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.pipe("/films/one.mp4", films[1].read_bytes())
    plan = plan_of(tmp_path / "plan", [row(Path("x"), 1, 5, uri="memory://films/one.mp4")], [SMALL])
    with Loader(plan, Order(plan, 0), 0, 1, START, HERE) as loader:
        _, [batch] = next(loader)
    assert [int(batch.video[0, 0, i].float().mean().round()) for i in range(5)] == pytest.approx(
        [level(1, 5 + i) for i in range(5)], abs=1
    )


def test_shared_memory_is_never_given_out_twice():
    rng = np.random.default_rng(0)
    ring, taken = Ring(1 << 16), []
    refused = 0
    for _ in range(3000):
        size = int(rng.integers(1, 20_000))
        offset = ring.take(size)
        if offset is None:
            refused += 1
            assert taken, "all of it is free"
        else:
            assert offset + size <= ring.size
            assert all(offset + size <= start or offset >= end for start, end in taken)
            taken.append((offset, offset + size))
        while taken and (offset is None or rng.random() < 0.4):
            ring.give_back()
            taken.pop(0)
            offset = 0
    assert refused > 100
    with pytest.raises(ValueError):
        ring.take(ring.size + 1)
    ring.close()


# ---- latents

SHAPE = (4, 2, 3, 5)


def write_latents(folder: Path, windows: list[tuple[int, str]], dtype: str = "bfloat16", group: int = 2) -> Path:
    """Latents full of the window's number (mean) and a quarter (spread), for (row of the plan, geometry)."""

    def numbers(value: float) -> bytes:
        return torch.full(SHAPE, value).to(getattr(torch, dtype)).view(torch.uint8).numpy().tobytes()

    table = pa.table(
        {
            "mean": [numbers(float(w)) for w, _ in windows],
            "std": [numbers(0.25) for _ in windows],
            "dtype": [dtype] * len(windows),
            "shape": pa.array([SHAPE] * len(windows), pa.list_(pa.int32())),
            "geometry": [g for _, g in windows],
        }
    )
    pq.write_table(table, folder / "latents.parquet", row_group_size=group)
    index = pa.table(
        {
            "window": [w for w, _ in windows],
            "file": [str(folder / "latents.parquet")] * len(windows),
            "row_group": [i // group for i in range(len(windows))],
            "row": [i % group for i in range(len(windows))],
        },
        INDEX,
    )
    with pa.OSFile(str(folder / "latents.arrow"), "wb") as sink, pa.ipc.new_file(sink, INDEX) as writer:
        writer.write_table(index)
    return folder / "latents.arrow"


@pytest.mark.parametrize(("dtype", "workers"), [("bfloat16", 1), ("float32", 0), ("float16", 0)])
def test_latents(plan, tmp_path, dtype, workers):
    """Each window's own, in the order of the run; broken files are never opened."""
    index = write_latents(tmp_path, [(w, "0" * 16) for w in reversed(range(20))], dtype, group=3)
    with Loader(
        plan, Order(plan, 5), 0, 1, START, LoaderOptions(workers=workers, prefetch_mb=1), latents=index
    ) as loader:
        for _, batches in islice(loader, 5):
            for batch in batches:
                assert batch.video is None and batch.raw == []
                assert batch.mean.dtype == batch.std.dtype == getattr(torch, dtype)
                assert batch.mean.shape == batch.std.shape == (len(batch.windows), *SHAPE)
                assert (
                    all((mean == w).all() for mean, w in zip(batch.mean, batch.windows)) and (batch.std == 0.25).all()
                )
                assert [plan.rows([w], ["clip_id"])[0]["clip_id"] for w in batch.windows] == batch.clip_ids
        assert loader.replaced == []


def test_a_row_group_is_read_once_for_its_neighbours(tmp_path, monkeypatch):
    index = write_latents(tmp_path, [(w, "g") for w in range(12)], group=4)
    reads: Counter = Counter()
    read = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, i, **kw: reads.update([i]) or read(self, i, **kw)
    )
    reader = LatentReader(index, cache_bytes=1 << 20)
    for w in (0, 5, 1, 11, 3, 4, 8, 2):
        reader.read(reader.find(w), "g", "clip")
    assert reads == {0: 1, 1: 1, 2: 1}
    assert reader.find(12) is None and reader.find(7) == Place(str(tmp_path / "latents.parquet"), 1, 3)
    tight = LatentReader(index, cache_bytes=0)
    for w in (0, 1, 4, 5, 0):
        tight.read(tight.find(w), "g", "clip")
    assert reads == {0: 3, 1: 2, 2: 1}


def test_a_stale_latent_is_refused_by_name(plan, tmp_path):
    index = write_latents(tmp_path, [(w, "1" * 16 if w == 4 else "0" * 16) for w in range(20)])
    with Loader(plan, Order(plan, 5), 0, 1, START, HERE, latents=index) as loader, pytest.raises(DatakitError) as error:
        list(islice(loader, 6))
    clip = plan.rows([4], ["clip_id"])[0]["clip_id"]
    assert str(error.value) == (
        f"the latent of clip {clip} in {tmp_path}/latents.parquet is stale: it has geometry 1111111111111111, the "
        f"plan wants "
        "0000000000000000; run `datakit run encode` for this plan"
    )


def test_windows_without_a_latent_are_read_or_refused(plan, unbroken, tmp_path):
    index = write_latents(tmp_path, [(w, "0" * 16) for w in range(0, 16, 2)])
    both = LoaderOptions(workers=0, missing="raw")
    with Loader(plan, Order(plan, 5), 0, 1, START, both, latents=index) as loader:
        batches = [b for _, found in islice(loader, 5) for b in found]
    pixels = {(seed, clip): picture for step in unbroken[0] for seed, clip, _, picture, _ in step}
    mixed = 0
    for b in batches:
        encoded = [i for i in range(len(b.windows)) if i not in b.raw]
        assert [b.windows[i] % 2 == 0 and b.windows[i] < 16 for i in encoded] == [True] * len(encoded)
        assert (
            b.mean is None if not encoded else [int(m[0, 0, 0, 0]) for m in b.mean] == [b.windows[i] for i in encoded]
        )
        assert (
            b.video is None
            if not b.raw
            else [hashed(v) for v in b.video] == [pixels[b.seeds[i], b.clip_ids[i]] for i in b.raw]
        )
        mixed += bool(encoded and b.raw)
    assert mixed
    with (
        Loader(plan, Order(plan, 5), 0, 1, START, HERE, latents=index) as loader,
        pytest.raises(DatakitError, match="no latent of clip"),
    ):
        list(islice(loader, 6))


def test_damaged_latents_are_told(plan, tmp_path):
    index = write_latents(tmp_path, [(w, "0" * 16) for w in range(20)])
    (tmp_path / "latents.parquet").write_bytes(b"PAR1 something else PAR1")
    with pytest.raises(DatakitError, match="latents.parquet is damaged or holds no latents"):
        Loader(plan, Order(plan, 5), 0, 1, START, HERE, latents=index)
    with pytest.raises(ConfigError, match="no index of latents at"):
        Loader(plan, Order(plan, 5), 0, 1, START, HERE, latents=tmp_path / "nothing.arrow")


def test_options_that_contradict_each_other(plan, tmp_path):
    index = write_latents(tmp_path, [(0, "0" * 16)])
    with pytest.raises(ConfigError, match="loader.augment=random and loader.flip need frames"):
        Loader(plan, Order(plan, 0), 0, 1, START, LoaderOptions(augment="random"), latents=index)
    with pytest.raises(ConfigError, match="no latents are given"):
        Loader(plan, Order(plan, 0), 0, 1, START, LoaderOptions(missing="raw"))
    with pytest.raises(ConfigError, match="rank 2 of 2 ranks"):
        Loader(plan, Order(plan, 0), 2, 2, START, LoaderOptions())


def test_reader_processes_stay_small():
    """What a process imports decides its memory and how fast it starts."""
    code = (
        "import sys, trainer.data.reader_pool, datakit.process.child_main\n"
        "print([m for m in ('torch', 'deltalake', 'polars', 'ray', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
