"""The process that reads samples: `python -m trainer.data.reader_main SOCKET MEMORY BYTES`, two file descriptors and a
size.

Reads a `Spec` from the socket, says that it is ready, then answers each (`Task`, newly known broken windows) in turn.
Dies with its parent. See `trainer.data.reader_pool`.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
from multiprocessing.connection import Connection

import numpy as np

from datakit.errors import DatakitError, ErrorKind, MediaError
from trainer.data.sample_reader import SampleReader

_PR_SET_PDEATHSIG = 1


def main(socket: int, memory: int, size: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    shared = np.frombuffer(mmap.mmap(memory, size), np.uint8)
    os.close(memory)
    connection = Connection(socket)
    reader = SampleReader(connection.recv())
    connection.send(None)
    while True:
        try:
            task, broken = connection.recv()
        except (EOFError, OSError):
            return
        reader.learn(broken)
        try:
            answer = reader.read(task.window, task.seed, shared[task.offset : task.offset + task.size])
        except DatakitError as e:
            answer = e
        except Exception as e:  # stores raise errors of their own making
            answer = MediaError(ErrorKind.UNREADABLE, f"{type(e).__name__}: {e}"[:500])
        connection.send(answer)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
