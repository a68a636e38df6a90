"""Who keeps the others waiting: every rank says what it does; when nothing moves for long, the one that is behind is
named."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from datakit.atomic import atomic_path

PHASES = ("data", "forward", "exchange", "validation", "preview", "checkpoint")
"""In a step, roughly in this order; ranks wait for each other in `exchange`."""


@dataclass
class Status:
    """What a rank does. `clips`: of the micro-batch at hand."""

    rank: int
    step: int = 0
    phase: str = "starting"
    clips: list[str] = field(default_factory=list)
    since: float = field(default_factory=time.time)


class Watchdog:
    """Ends the process when it has not moved for `limit_s`, after it said which rank is stuck, where, and with which
    clips.

    Args:
        folder: `folder/ranks/rank-N.json` is written by every rank, so all see who is behind.
        limit_s: 0: never.
    """

    def __init__(self, folder: Path, rank: int, limit_s: float):
        self.status = Status(rank)
        self._folder, self._limit = folder / "ranks", limit_s
        self._folder.mkdir(parents=True, exist_ok=True)
        self._moved = time.monotonic()
        self._paused = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        if limit_s:
            self._thread.start()

    def at(self, step: int, phase: str, clips: Sequence[str] = ()) -> None:
        """This rank goes on."""
        self.status = Status(self.status.rank, step, phase, list(clips), time.time())
        self._moved = time.monotonic()

    @contextmanager
    def off(self) -> Iterator[None]:
        """What follows may take as long as it takes (compilation, the first step)."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1
            self._moved = time.monotonic()

    def close(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        told = None
        while not self._stop.wait(min(1.0, self._limit / 10)):
            if self.status is not told:
                told = self.status
                self._tell()
            if not self._paused and time.monotonic() - self._moved > self._limit:
                self._give_up()

    def _tell(self) -> None:
        path = self._folder / f"rank-{self.status.rank}.json"
        with atomic_path(path) as aside:
            aside.write_text(json.dumps(asdict(self.status)))

    def _give_up(self) -> None:
        time.sleep(min(2.0, self._limit / 5))  # the others' words arrive
        print(f"datakit: nothing moved for {self._limit:g} s: {stuck(self._folder)}", file=sys.stderr)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        sys.stderr.flush()
        os._exit(3)


def stuck(folder: Path) -> str:
    """In words, the rank that is furthest behind: of the lowest step, outside of an exchange, the one that has not
    moved longest.

    Args:
        folder: of the ranks' files.
    """
    found = [Status(**json.loads(path.read_text())) for path in sorted(folder.glob("rank-*.json"))]
    first = min(found, key=lambda s: (s.step, s.phase == "exchange", s.since))
    clips = f", clips {', '.join(first.clips)}" if first.clips else ""
    return (
        f"rank {first.rank} is stuck at step {first.step} in {first.phase} for {time.time() - first.since:.0f} s{clips}"
    )
