"""The memory of a video worker does not grow with the length of its video."""

import subprocess
import sys

import pytest

from support.drawn_videos import encode, moving

pytestmark = pytest.mark.slow

SCRIPT = """
import resource, sys
from pipelines.stages.registry import STAGES
from pipelines.video_tasks.messages import PassJob
from pipelines.video_tasks.analyse import analyse
stages = {name: STAGES[name] for name in ("motion", "motion_vmaf", "letterbox", "quality")}
job = PassJob("v", sys.argv[1], "0", 0, stages=stages, positions=(0.1, 0.5, 0.9))
clips = sum(len(item.rows) for item in analyse(job) if hasattr(item, "rows"))
print(clips, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def peak_mib(path) -> tuple[int, int]:
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(path)], capture_output=True, text=True, check=True)
    clips, peak = done.stdout.split()
    return int(clips), int(peak)


def test_ten_minutes_take_what_one_minute_takes(tmp_path):
    """All pictures of the long video's grid would be 290 MB."""
    frames = moving(240, 320, 4, 30, lambda t: [[1, 0, 0.05 * t], [0, 1, 0]])
    for name, repeats in (("one.mp4", 2), ("ten.mp4", 20)):
        encode(
            tmp_path / name,
            (f for _ in range(repeats) for f in (frames + frames[::-1])[:120]),
            4,
            pix_fmt="yuv420p",
            options={"crf": "30", "preset": "ultrafast", "g": "60"},
        )
    few, short = peak_mib(tmp_path / "one.mp4")
    many, long = peak_mib(tmp_path / "ten.mp4")
    assert many > 5 * few and long - short < 30, (short, long)
