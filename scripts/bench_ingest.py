"""What an ingest costs, each number beside its baseline from the same run.

    .venv/bin/python scripts/bench_ingest.py [MORE_VIDEOS…] [--tiny] [--repeats N] [--only PART …]

Uses the whole of Big Buck Bunny (scripts/fetch_film.py brings it) and whatever videos are named; `--tiny`
uses its first minute. Machines are shared and noisy: look at the ratios, whose two sides take turns.

Parts:
    pass     CPU of decode + shots + motion + quality + letterbox + phash, against `ffmpeg -threads 1 … -f null -`
    wall     whole ingest without OCR, against PySceneDetect's command line with detect-adaptive alone
    ray      whole-run CPU against the sum of the stages' own; start to the first row
    ocr      CPU of OCR per minute of film, and what each saving brings
    memory   peak of a video worker at one minute and at ten
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
PARTS = ("pass", "wall", "ray", "ocr", "memory")
POSITIONS = (0.1, 0.5, 0.9)


@dataclass
class Used:
    """What a command took, its descendants included."""

    wall_s: float
    cpu_s: float
    output: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="*", type=Path, help="further videos for part `pass`")
    parser.add_argument("--tiny", action="store_true", help="the film's first minute, one repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    arguments = parser.parse_args()
    repeats = 1 if arguments.tiny else arguments.repeats
    film = Path(run([sys.executable, ROOT / "scripts" / "fetch_film.py"]).output.split("\n")[0])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        minute = part_of(film, 60, folder / "minute.mp4")
        film = minute if arguments.tiny else film
        for part in arguments.only:
            {
                "pass": lambda: bench_pass([film, *arguments.videos], repeats),
                "wall": lambda: bench_wall(film, repeats, folder),
                "ray": lambda: bench_ray(film, folder),
                "ocr": lambda: bench_ocr(film),
                "memory": lambda: bench_memory(minute, film, folder),
            }[part]()


def bench_pass(videos: list[Path], repeats: int) -> None:
    title("One pass, one thread: CPU seconds against ffmpeg decoding to nowhere")
    print(f"{'video':<28} {'ffmpeg':>8} {'pass':>8} {'ratio':>6}   by stage")
    for video in videos:
        ours, theirs, stages = [], [], defaultdict(list)
        for _ in range(repeats):
            theirs.append(
                run([FFMPEG, "-v", "error", "-threads", "1", "-i", video, "-map", "0:v:0", "-f", "null", "-"]).cpu_s
            )
            spent = json.loads(in_process("pass_cpu", video).output)
            ours.append(sum(spent.values()))
            for stage, seconds in spent.items():
                stages[stage].append(seconds)
        mine, base = statistics.median(ours), statistics.median(theirs)
        detail = ", ".join(f"{stage} {statistics.median(values):.1f}" for stage, values in stages.items())
        print(f"{video.name:<28} {base:8.1f} {mine:8.1f} {mine / base:6.2f}   {detail}")


def bench_wall(film: Path, repeats: int, folder: Path) -> None:
    title("Whole ingest without OCR: wall seconds, start-up included, against PySceneDetect's detect-adaptive")
    ours, theirs = [], []
    for i in range(repeats):
        theirs.append(
            run([BIN / "scenedetect", "-q", "-i", film, "-o", folder, "detect-adaptive", "list-scenes", "-q"]).wall_s
        )
        ours.append(ingest(film, folder / f"wall{i}", "--recipe", "technical", "--set", "ocr.enabled=false").wall_s)
    print(
        f"PySceneDetect {spread(theirs)}   datakit {spread(ours)}   ratio "
        f"{statistics.median(ours) / statistics.median(theirs):.2f}"
    )


def bench_ray(film: Path, folder: Path) -> None:
    title("Ray's share: CPU seconds of the whole run, Ray's processes included, over the sum of the stages' own")
    for name, options in (
        ("default (with OCR)", []),
        ("without OCR", ["--recipe", "technical", "--set", "ocr.enabled=false"]),
    ):
        used = ingest(film, folder / f"ray{len(options)}", *options)
        own = sum(json.loads(used.output)["stage_cpu_s"].values())
        print(
            f"{name:<20} run {used.cpu_s:.1f}   stages {own:.1f}   ratio {used.cpu_s / own:.2f}   wall "
            f"{used.wall_s:.1f}"
        )
    nothing = "from pipelines.executor.session import RaySession\nwith RaySession(): pass"
    idle = run([sys.executable, "-c", nothing])
    print(f"{'Ray alone':<20} {idle.cpu_s:.1f} CPU s, {idle.wall_s:.1f} s wall: started and stopped, nothing else")
    print(f"start to first row: {first_row_s(film, folder / 'first'):.1f} s")


def first_row_s(film: Path, folder: Path) -> float:
    """Seconds from the start of the command to the first rows that count, where short videos come with the film."""
    source = folder / "in"
    source.mkdir(parents=True)
    part_of(film, 8, source / "a_short_one.mp4")
    (source / film.name).symlink_to(film)
    started = time.monotonic()
    process = subprocess.Popen(ingest_command(source, folder / "c", []), stdout=subprocess.DEVNULL)
    marker = folder / "c" / "clips" / "_delta_log" / f"{1:020}.json"
    while process.poll() is None and not marker.exists():
        time.sleep(0.05)
    seconds = time.monotonic() - started
    process.wait()
    return seconds


def bench_ocr(film: Path) -> None:
    title("OCR: CPU seconds per minute of film, and what each saving brings")
    print(in_process("ocr_savings", film).output.rstrip())


def bench_memory(minute: Path, film: Path, folder: Path) -> None:
    title("Peak memory of a video worker (MiB), pictures for image stages included")
    ten = folder / "ten_minutes.mp4"
    run([FFMPEG, "-v", "error", "-stream_loop", "9", "-i", minute, "-c", "copy", ten])
    one, many, whole = (int(in_process("peak_memory", video).output) for video in (minute, ten, film))
    print(f"one minute {one}   the same ten times {many}   growth {many - one}   ({film.name} {whole})")


# The parts below run in processes of their own: `python bench_ingest.py --inside NAME VIDEO`.


def pass_cpu(video: Path) -> None:
    facts = [item for item in _pass(video, ()) if hasattr(item, "cpu_s")]
    print(json.dumps(facts[-1].cpu_s))


def peak_memory(video: Path) -> None:
    for _ in _pass(video, POSITIONS):
        pass
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def ocr_savings(video: Path) -> None:
    from rapidocr import RapidOCR

    from pipelines.stages.ocr import Ocr, crop, first_of_kind, network_size

    facts, rows, images = None, [], []
    for item in _pass(video, POSITIONS):
        if hasattr(item, "images"):
            rows += item.rows
            images += item.images
        elif hasattr(item, "columns"):
            facts = item
    minutes = facts.columns["duration_s"] / 60
    grid = 2 * facts.columns["duration_s"]  # a frame every half second
    flat = [crop(image, row) for row, clip in zip(rows, images) for image in clip]
    ocr = Ocr()
    started = time.process_time()
    ocr.run(rows, images)
    spent = time.process_time() - started
    kinds = first_of_kind(flat)
    blank = sum(k is None for k in kinds)
    repeated = len(flat) - blank - len({k for k in kinds if k is not None})
    looked = len(flat) - blank - repeated
    each = spent / max(1, looked)

    sample = flat[:: max(1, len(flat) // 12)]
    engine = RapidOCR(params={"Global.log_level": "error", "EngineConfig.onnxruntime.intra_op_num_threads": 1})
    engine(sample[0])
    started = time.process_time()
    for image in sample:
        engine(image, use_det=True, use_cls=False, use_rec=False)
    plain = (time.process_time() - started) / len(sample)
    height, width = flat[0].shape[:2]
    size = "×".join(map(str, network_size(width, height, 640)))
    print(f"{len(rows)} clips, {minutes:.1f} min: {spent:.1f} CPU s = {spent / minutes:.1f} per minute of film")
    print(f"{'every grid frame, RapidOCR as it comes':<52} {plain * grid / minutes:8.1f} per minute")
    print(f"{'three frames a clip':<52} {plain * len(flat) / minutes:8.1f}")
    small = f"network input {size} at most, not 736 at least"
    print(f"{small:<52} {each * len(flat) / minutes:8.1f}   ({each * 1000:.0f} ms a frame, not {plain * 1000:.0f})")
    print(f"{f'flat frames skipped ({blank} of {len(flat)})':<52} {each * (len(flat) - blank) / minutes:8.1f}")
    print(f"{f'repeated frames looked at once ({repeated})':<52} {spent / minutes:8.1f}")


INSIDE = {"pass_cpu": pass_cpu, "peak_memory": peak_memory, "ocr_savings": ocr_savings}


def _pass(video: Path, positions: tuple[float, ...]):
    import cv2

    from pipelines.stages.registry import STAGES, on_grid
    from pipelines.video_tasks.analyse import analyse
    from pipelines.video_tasks.messages import PassJob

    cv2.setNumThreads(1)
    yield from analyse(
        PassJob("bench", str(video), "0", video.stat().st_size, stages=on_grid(STAGES), positions=positions)
    )


def in_process(name: str, video: Path) -> Used:
    return run([sys.executable, __file__, "--inside", name, video], OMP_NUM_THREADS="1")


def ingest(video: Path, catalog: Path, *options: str) -> Used:
    return run(ingest_command(video, catalog, list(options)))


def ingest_command(source: Path, catalog: Path, options: list[str]) -> list:
    return [BIN / "datakit", "run", "ingest", source, "--catalog", catalog, "--json", *options]


def part_of(film: Path, seconds: float, path: Path) -> Path:
    """The first seconds, as a stream copy."""
    run([FFMPEG, "-v", "error", "-t", seconds, "-i", film, "-map", "0:v:0", "-c", "copy", path])
    return path


def run(command: list, **environment: str) -> Used:
    """Run a command and wait for it and for every process that it leaves behind.

    A child of this script adopts the orphans (`PR_SET_CHILD_SUBREAPER`), so that CPU seconds of Ray's
    daemons count too.
    """
    command = [str(word) for word in command]
    if shutil.which(command[0]) is None:
        sys.exit(f"{command[0]} is missing: run scripts/test.sh once, it installs everything")
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as report:
        pid = os.fork()
        if pid == 0:
            _adopt(command, output.fileno(), report.fileno(), environment)
        os.waitpid(pid, 0)
        report.seek(0)
        code, wall, cpu = json.load(report)
        output.seek(0)
        if code:
            sys.exit(f"{' '.join(command)} failed with code {code}")
        return Used(wall, cpu, output.read())


def _adopt(command: list[str], output: int, report: int, environment: dict[str, str]) -> None:
    """The child's side: never returns."""
    pr_set_child_subreaper = 36
    ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1, 0, 0, 0)
    started = time.monotonic()
    code = subprocess.run(command, stdout=output, env={**os.environ, **environment}).returncode
    wall = time.monotonic() - started
    while True:
        try:
            os.wait()
        except ChildProcessError:
            break
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    os.write(report, json.dumps([code, wall, used.ru_utime + used.ru_stime]).encode())
    os._exit(0)


def title(text: str) -> None:
    print(f"\n{text}", flush=True)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({', '.join(f'{v:.1f}' for v in values)})"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        INSIDE[sys.argv[2]](Path(sys.argv[3]))
    else:
        main()
