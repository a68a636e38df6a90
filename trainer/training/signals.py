"""Being asked to stop: the run ends after the step that it is at."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from trainer.training.launch import asked_to_stop


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Set by SIGINT and SIGTERM; a second one ends the process at once. Only a main thread can listen: others (of Ray's
    workers) are told by `trainer.training.launch`."""
    if threading.current_thread() is not threading.main_thread():
        yield asked_to_stop
        return
    asked = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
