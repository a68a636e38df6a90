"""Thumbnails for the contact sheets: every clip once, in a few threads, within a time."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterable

import polars as pl

from catalogs.query.selection import Selection
from datakit.html.page import Picture

COLUMNS = ("clip_id", "uri", "path", "stream", "start_pts", "end_pts", "start_s", "end_s")
MOST_THREADS = 4
"""FFmpeg decodes in threads of its own; more readers only wait for the disk or the network together."""


def pictures(selection: Selection, clip_ids: Iterable[str], side: int, deadline_s: float) -> dict[str, Picture]:
    """Clip id -> its picture. What cannot be read, or is not ready when the time is over, has a problem instead.

    Args:
        side: longer side, px.
        deadline_s: for all of them.
    """
    wanted = sorted(set(clip_ids))
    if not wanted:
        return {}
    rows = (
        selection.rows(COLUMNS)
        .filter(pl.col("clip_id").is_in(wanted))
        .collect(engine="streaming")
        .sort("uri", "start_pts")
    )
    root = selection.catalog.root

    def draw(row: dict) -> bytes:
        from datakit.video.thumbnail import clip_thumbnail

        return clip_thumbnail(root, row, side)

    done = _in_threads(draw, rows.to_dicts(), deadline_s)
    return {row["clip_id"]: _picture(row, done.get(row["clip_id"])) for row in rows.iter_rows(named=True)}


def _picture(row: dict, outcome: bytes | Exception | None) -> Picture:
    title = (
        f"{row['uri'] or row['path'] or 'no address'}\n{row['start_s'] or 0:.2f} … {row['end_s'] or 0:.2f} "
        f"s\n{row['clip_id']}"
    )
    if isinstance(outcome, bytes):
        return Picture(row["clip_id"], title, outcome)
    lines = str(outcome).strip().splitlines() if outcome is not None else ["not ready in time"]
    why = lines[0] if lines else type(outcome).__name__
    if row["uri"]:  # the title has all of it
        why = why.replace(row["uri"], row["uri"].rsplit("/", 1)[-1])
    return Picture(row["clip_id"], title, None, why[:200])


def _in_threads(draw: Callable[[dict], bytes], rows: list[dict], deadline_s: float) -> dict[str, bytes | Exception]:
    """Outcomes by clip id. Daemon threads, not a pool: one that hangs on a dead mount must not keep the program
    alive."""
    todo: queue.SimpleQueue[dict] = queue.SimpleQueue()
    results: queue.SimpleQueue[tuple[str, bytes | Exception]] = queue.SimpleQueue()
    over = threading.Event()
    for row in rows:
        todo.put(row)

    def work() -> None:
        while not over.is_set():
            try:
                row = todo.get_nowait()
            except queue.Empty:
                return
            try:
                results.put((row["clip_id"], draw(row)))
            except Exception as e:  # whatever a decoder says about a source, the page shows it
                results.put((row["clip_id"], e))

    for _ in range(min(MOST_THREADS, os.cpu_count() or 1, len(rows))):
        threading.Thread(target=work, daemon=True).start()
    done: dict[str, bytes | Exception] = {}
    end = time.monotonic() + deadline_s
    while len(done) < len(rows):
        try:
            clip_id, outcome = results.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            break
        done[clip_id] = outcome
    over.set()
    return done
