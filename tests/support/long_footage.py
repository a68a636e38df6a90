"""Where longer real footage comes from."""

from __future__ import annotations

import subprocess
from pathlib import Path

import imageio_ffmpeg

SHARED_VIDEOS = Path(__file__).parents[3] / "shared" / "videos"


def part_of(film: Path, start_s: float, seconds: float, path: Path) -> Path:
    """A stream copy of a part."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-ss", str(start_s), "-t", str(seconds), "-i", str(film)]
    subprocess.run([*command, "-map", "0:v", "-c", "copy", str(path)], check=True)
    return path
