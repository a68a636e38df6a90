"""Copies of real footage as they go around: another size, rate, colour, with a logo, cropped, trimmed, with bars."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import imageio_ffmpeg
import polars as pl

HALF, SMALL = "scale=trunc(iw/4)*2:trunc(ih/4)*2", "scale=480:-2"
LOGO = (
    "drawbox=x=iw*0.82:y=ih*0.06:w=iw*0.13:h=ih*0.1:color=white:t=fill,"
    "drawbox=x=iw*0.84:y=ih*0.08:w=iw*0.09:h=ih*0.06:color=red:t=fill"
)
KINDS: dict[str, tuple[float, str, int]] = {
    "half": (0.0, HALF, 23),
    "crf35": (0.0, SMALL, 35),
    "grey": (0.0, f"{SMALL},hue=s=0", 23),
    "logo": (0.0, f"{SMALL},{LOGO}", 23),
    "crop": (0.0, f"crop=trunc(iw*0.475)*2:trunc(ih*0.475)*2,{SMALL}", 23),
    "shift": (1.0, SMALL, 23),
    "off-grid": (1.3, SMALL, 23),
    "bars": (0.0, f"{SMALL},pad=iw:trunc(ih*0.65)*2:0:(oh-ih)/2:black", 23),
}
"""Seconds trimmed from the start, filters, constant rate factor. A corner logo, opaque; 5 % cropped; the start trimmed
by whole steps of the grid and by 0.6 of one; letterboxed."""
TRIMMED = {kind: start for kind, (start, _, _) in KINDS.items() if start}


class Clip(NamedTuple):
    """A clip of a test catalog: which footage, which copy of it (empty: the original), when in the original, group."""

    footage: str
    kind: str
    start_s: float
    end_s: float
    group: str
    clip_id: str


def make_copies(source: Path, folder: Path) -> None:
    """All kinds of copies, named STEM.KIND.mp4. One run of ffmpeg, which decodes and scales once for all of them."""
    small = [kind for kind, (_, filters, _) in KINDS.items() if filters.startswith(SMALL)]
    others = [kind for kind in KINDS if kind not in small]
    graph = [
        f"[0:v]split={len(others) + 1}[large]{_inputs(others)}",
        f"[large]{SMALL},split={len(small)}{_inputs(small)}",
    ]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(source)]
    outputs = []
    for kind, (start, filters, rate) in KINDS.items():
        steps = [f"trim=start={start},setpts=PTS-{start}/TB"] if start else []
        rest = filters.removeprefix(SMALL).removeprefix(",")
        graph.append(f"[{kind}]{','.join([*steps, rest or 'null'])}[{kind} made]")
        outputs += ["-map", f"[{kind} made]", "-an", "-c:v", "libx264", "-preset", "ultrafast", "-crf", str(rate)]
        outputs.append(str(folder / f"{source.stem}.{kind}.mp4"))
    subprocess.run([*command, "-filter_complex", ";".join(graph), *outputs], check=True)


def _inputs(kinds: Sequence[str]) -> str:
    return "".join(f"[{kind}]" for kind in kinds)


def remux(source: Path, target: Path) -> Path:
    """The same stream in another container."""
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-v",
        "error",
        "-i",
        str(source),
        "-map",
        "0:v",
        "-c",
        "copy",
        str(target),
    ]
    subprocess.run(command, check=True)
    return target


def clips_of(view: pl.DataFrame) -> list[Clip]:
    """The clips that took part in a search for duplicates."""
    found = []
    rows = view.filter(pl.col("duplicate_group").is_not_null()).select(
        "uri", "start_s", "end_s", "duplicate_group", "clip_id"
    )
    for uri, start, end, group, clip_id in rows.iter_rows():
        footage, _, kind = Path(uri).stem.partition(".")
        footage, kind = (footage.removesuffix("-remuxed"), "remux") if footage.endswith("-remuxed") else (footage, kind)
        trimmed = TRIMMED.get(kind, 0.0)
        found.append(Clip(footage, kind, start + trimmed, end + trimmed, group, clip_id))
    return found


def same_footage(a: Clip, b: Clip) -> bool:
    """Whether the clips share more than half of the shorter one's time."""
    shared = min(a.end_s, b.end_s) - max(a.start_s, b.start_s)
    return a.footage == b.footage and shared > 0.5 * min(a.end_s - a.start_s, b.end_s - b.start_s)


class Score(NamedTuple):
    """`pairs` of an original's clip and a copy's show the same footage. `recall`: share of them that are in one group;
    `precision`: share of those in one group that show the same."""

    recall: float
    precision: float
    pairs: int


def score_of(clips: Sequence[Clip], kind: str) -> Score:
    """How well the copies of a kind were found."""
    pairs = [(a, b) for a in clips if not a.kind for b in clips if b.kind == kind]
    true = {(a, b) for a, b in pairs if same_footage(a, b)}
    found = {(a, b) for a, b in pairs if a.group == b.group}
    return Score(len(true & found) / len(true), len(true & found) / max(1, len(found)), len(true))
