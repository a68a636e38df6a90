"""Sparse access (the frames at 10, 50 and 90 % of every 8 s): our reader on PyAV against decord2.

    uv run --inexact --with decord2 scripts/bench_sparse.py VIDEO…

decord2 is no dependency of datakit: this measurement is why. Frames are compared too: decord counts frames
from the container's index and converts untagged 720p as BT.601.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import numpy as np

from datakit.video.reader import VideoReader

POSITIONS = (0.1, 0.5, 0.9)
EVERY_S = 8.0


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    try:
        import decord  # noqa: F401 - read() imports it again
    except ImportError:
        sys.exit("decord2 is missing: uv run --inexact --with decord2 scripts/bench_sparse.py VIDEO…")
    print(
        f"{'video':<28} {'frames':>6} {'PyAV s':>8} {'decord s':>9} {'ratio':>6}   mean difference of pixels, same "
        f"times"
    )
    for path in map(Path, sys.argv[1:]):
        ours, spent = timed(read_pyav, path)
        try:
            theirs, spent_decord = timed(read_decord, path)
        except Exception as e:  # what it cannot read is part of the answer
            print(f"{path.name:<28} {len(ours):>6} {spent:8.2f}   decord fails: {str(e).strip().splitlines()[0][:80]}")
            continue
        gaps = [float(np.abs(a.astype(int) - b).mean()) for a, b in zip(ours, theirs) if a.shape == b.shape]
        difference = f"{np.mean(gaps):.1f}" if gaps else "other frame sizes"
        print(
            f"{path.name:<28} {len(ours):>6} {spent:8.2f} {spent_decord:9.2f} {spent / spent_decord:6.2f}   "
            f"{difference}"
        )


def times_of(duration_s: float) -> list[float]:
    starts = np.arange(0, max(EVERY_S, duration_s - EVERY_S), EVERY_S)
    return [float(s + p * min(EVERY_S, duration_s)) for s in starts for p in POSITIONS]


def read_pyav(path: Path) -> list[np.ndarray]:
    with VideoReader(str(path)) as reader:
        stream = reader.stream
        duration = float(stream.duration * reader.time_base) if stream.duration else reader.container.duration / 1e6
        start = stream.start_time or 0
        targets = [start + round(t / reader.time_base) for t in times_of(duration)]
        return [picture.rgb() for _, picture in reader.at(targets)]


def read_decord(path: Path) -> list[np.ndarray]:
    import decord

    reader = decord.VideoReader(str(path), num_threads=1)
    ends = reader.get_frame_timestamp(np.arange(len(reader)))
    starts = ends[:, 0] - ends[0, 0]
    indices = np.minimum(np.searchsorted(starts, times_of(float(starts[-1]))), len(reader) - 1)
    return list(reader.get_batch(indices).asnumpy())


def timed(read, path: Path) -> tuple[list[np.ndarray], float]:
    """Frames, and the CPU seconds they took."""
    started = resource.getrusage(resource.RUSAGE_SELF)
    frames = read(path)
    ended = resource.getrusage(resource.RUSAGE_SELF)
    return frames, ended.ru_utime + ended.ru_stime - started.ru_utime - started.ru_stime


if __name__ == "__main__":
    main()
