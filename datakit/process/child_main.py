"""The process that does the dangerous work: `python -m datakit.process.child_main FD TARGET`.

Reads a `ToolSpec`, then payloads, from the socket FD; for each payload answers with items and a final `Done` or
`Failed`. Dies with its parent. TARGET is only there to be seen in lists of processes. See `datakit.process.child`.
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
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from datakit.errors import ErrorKind, MediaError
from datakit.process.messages import Done, Failed, ToolSpec

_PR_SET_PDEATHSIG = 1


def main(fd: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    _volunteer()
    connection = Connection(fd)
    spec: ToolSpec = connection.recv()
    try:
        _limit_memory(spec.memory_bytes)
        tool = load_tool(spec)
    except Exception as e:
        connection.send(_failure(e, spec))
        return
    connection.send(Done(time.process_time()))
    while True:
        try:
            payload = connection.recv()
        except (EOFError, OSError):
            return  # the parent is gone, or has had enough
        _work(tool, spec, payload, connection)


def load_tool(spec: ToolSpec) -> Any:
    """The function that the spec names, or an instance of the class."""
    module, _, name = spec.target.partition(":")
    target = getattr(importlib.import_module(module), name)
    return target(**spec.options) if isinstance(target, type) else target


def _work(tool: Any, spec: ToolSpec, payload: Any, connection: Connection) -> None:
    started = time.process_time()
    try:
        if hasattr(tool, "run"):
            answer = tool.run(*payload)
        else:
            answer = None
            for item in tool(payload):
                _send(connection, item)
        _send(connection, Done(time.process_time() - started, answer))
    except (BrokenPipeError, ConnectionResetError):
        sys.exit(0)  # the parent gave up on this payload
    except Exception as e:
        connection.send(_failure(e, spec, time.process_time() - started))


def _send(connection: Connection, thing: Any) -> None:
    connection.send_bytes(pickle.dumps(thing, protocol=5))


def _failure(error: Exception, spec: ToolSpec, cpu_s: float = 0.0) -> Failed:
    if isinstance(error, MediaError):
        return Failed(error.kind, error.message, cpu_s, error.stage)
    if isinstance(error, MemoryError):
        what = "memory limit reached" if spec.memory_bytes else "out of memory"
        return Failed(ErrorKind.OUT_OF_MEMORY, f"{what}: {error}", cpu_s)
    return Failed(ErrorKind.STAGE, f"{type(error).__name__}: {error}"[:500], cpu_s)


def _limit_memory(limit: int | None) -> None:
    """Bound private writable memory; code and files mapped read-only do not count (Linux 4.7)."""
    if limit:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _volunteer() -> None:
    """When memory runs out, the kernel takes this process and not its parent."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


if __name__ == "__main__":
    os.setsid()
    import cv2  # takes longest of what most tools need

    cv2.setNumThreads(1)  # one CPU per child: parallelism is the runner's
    main(int(sys.argv[1]))
