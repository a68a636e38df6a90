"""The process that does the dangerous work: `python -m datakit.process.child_main FD`. See `datakit.process.child`.

Reads a `ToolSpec`, then payloads, from the socket FD; for each payload answers with items and a final
`Done` or `Failed`. Dies with its parent.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import pickle
import resource
import signal
import sys
import time
from multiprocessing.connection import Connection

from datakit.errors import ErrorKind, MediaError
from datakit.process.messages import Done, Failed, ToolSpec

_PR_SET_PDEATHSIG = 1


def main(fd: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    connection = Connection(fd)
    spec: ToolSpec = connection.recv()
    try:
        _limit_memory(spec.memory_bytes)
        tool = load_tool(spec)
    except Exception as e:
        connection.send(_failure(e))
        return
    connection.send(Done(time.process_time()))
    while True:
        try:
            payload = connection.recv()
        except EOFError:
            return
        _work(tool, payload, connection)


def load_tool(spec: ToolSpec):
    """A function `payload -> iterator of items`; classes are built once with the spec's options."""
    target = _find(spec)
    if not isinstance(target, type):
        return target
    stage = load_stage(spec)
    return lambda payload: iter([stage.run(*payload)])


def load_stage(spec: ToolSpec):
    """An instance of the class that the spec names."""
    return _find(spec)(**spec.options)


def _find(spec: ToolSpec):
    module, name = spec.target.split(":")
    return getattr(importlib.import_module(module), name)


def _work(tool, payload, connection: Connection) -> None:
    started = time.process_time()
    try:
        for item in tool(payload):
            connection.send_bytes(pickle.dumps(item, protocol=5))
        connection.send(Done(time.process_time() - started))
    except (BrokenPipeError, ConnectionResetError):
        sys.exit(0)  # the parent gave up on this payload
    except Exception as e:
        connection.send(_failure(e, time.process_time() - started))


def _failure(error: Exception, cpu_s: float = 0.0) -> Failed:
    if isinstance(error, MediaError):
        return Failed(error.kind, error.message, cpu_s, error.stage)
    if isinstance(error, MemoryError):
        return Failed(ErrorKind.OUT_OF_MEMORY, f"memory limit reached: {error}", cpu_s)
    return Failed(ErrorKind.STAGE, f"{type(error).__name__}: {error}"[:500], cpu_s)


def _limit_memory(limit: int | None) -> None:
    """Bound private writable memory; code and files mapped read-only do not count (Linux 4.7)."""
    if limit:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


if __name__ == "__main__":
    os.setsid()
    import cv2  # while the parent still thinks about what it wants

    cv2.setNumThreads(1)  # one CPU per child: parallelism is the runner's
    main(int(sys.argv[1]))
