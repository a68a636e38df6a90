"""What `datakit sample` says to people."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from datakit.units import readable
from sampler.generation.cost_estimate import Estimate
from sampler.generation.sample_spec import FILES

if TYPE_CHECKING:
    from sampler.generation.run import Progress
    from sampler.generation.run_passes import Sampled

PASSES = {
    "paint": "painting first frames",
    "encode": "encoding texts and references",
    "denoise": "denoising",
    "decode": "decoding and writing",
}


class Bar:
    """Progress on stderr: which wave, which pass, how far."""

    def __init__(self, quiet: bool = False):
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        self._bar = RichProgress(*columns, console=Console(stderr=True), disable=quiet or not sys.stderr.isatty())
        self._tasks: dict[tuple[int, str], TaskID] = {}

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, progress: Progress) -> None:
        key = (progress.wave, progress.name)
        if key not in self._tasks:
            wave = f"wave {progress.wave}/{progress.waves}: " if progress.waves > 1 else ""
            self._tasks[key] = self._bar.add_task(wave + PASSES[progress.name], total=progress.of)
        self._bar.update(self._tasks[key], completed=progress.done)


def show_estimate(found: Estimate, as_json: bool) -> None:
    """Before the work."""
    if as_json:
        return
    there = found.asked - found.todo
    print(f"{found.asked} samples" + (f", {there} of them there already" if there else ""))
    if not found.todo:
        return
    shapes = ", ".join(f"{frames} frames of {height}×{width}" for frames, height, width in found.shapes)
    print(
        f"{found.todo} to make: {shapes}; {found.forwards} forwards each, {found.pflop:.3g} PFLOP in all"
        + (f", about {duration(found.seconds)} on this machine" if found.seconds else "")
    )
    print(
        f"disk: {readable(found.out_bytes)} of videos, {readable(found.work_bytes)} while it works; "
        f"{readable(found.free)} free"
    )


def show_sampled(done: Sampled, folder: Path, as_json: bool) -> None:
    """After it."""
    if as_json:
        print(json.dumps({**asdict(done), "folder": str(folder)}))
        return
    parts = [
        f"{done.done} made",
        *([f"{done.there} were there"] if done.there else []),
        *([f"{done.failed} failed"] if done.failed else []),
    ]
    print(f"{done.asked} samples: {', '.join(parts)}; {duration(done.wall_s)}")
    for problem in done.first_problems:
        print(f"  {problem}")
    print(f'Videos: {folder}/{FILES}   (a catalog: datakit catalog query {folder} "SELECT prompt, path FROM samples")')


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
