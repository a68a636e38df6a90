"""Work in a child process with a deadline and a memory limit.

A damaged file can crash a decoder, hang it or make it ask for all memory there is. Ray would hand such an
input to worker after worker; so a Ray worker only ever talks to a `Child`, which fails cleanly instead.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from datakit.errors import ErrorKind
from datakit.process.messages import Done, Failed, ToolSpec

PAYLOADS_PER_CHILD = 500
"""A child is replaced after this many payloads: decoders leak a little on damaged files."""


class Child:
    """Runs payloads one after another in a process that is started when needed and replaced when broken.

    Args:
        fork: make the process by forking this one, which must have a single thread and no open tables or
            decoders: it then starts with the libraries loaded.
    """

    def __init__(self, spec: ToolSpec, fork: bool = False):
        self.spec = spec
        self._fork = fork
        self._process: subprocess.Popen | _Forked | None = None
        self._loaded = False
        self._done = 0

    def start(self) -> None:
        """Begin starting the process, without waiting for it: it loads while the caller does other things."""
        if self._process is not None and self._process.poll() is None:
            return
        self.stop()
        ours, theirs = socket.socketpair()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the child lives
        self._process = _Forked(theirs, self._log) if self._fork else _spawn(theirs, self._log, self.spec.threads)
        theirs.close()
        self._connection = Connection(ours.detach())
        self._loaded = False
        self._done = 0

    def ready(self) -> Failed | None:
        """Wait until the process can take payloads; why it cannot."""
        return self._load()

    def stream(self, payload: Any) -> Iterator[Any]:
        """The items of one payload, then `Done` or `Failed`. Never raises for what the payload does."""
        failure = self._load()
        if failure is None:
            failure = self._send(payload)
        if failure is not None:
            self.stop()
            yield failure
            return
        while True:
            item = self._receive(self.spec.stall_s)
            if isinstance(item, Failed) and item.child_died:
                self.stop()
            yield item
            if isinstance(item, (Done, Failed)):
                break
        self._done += 1
        if self._done >= PAYLOADS_PER_CHILD:
            self.stop()

    def stop(self) -> None:
        if self._process is None:
            return
        self._connection.close()
        self._process.kill()
        self._process.wait()
        self._log.close()
        self._process = None

    def _load(self) -> Failed | None:
        """Wait until the process is ready for payloads."""
        self.start()
        if self._loaded:
            return None
        answer = self._send(self.spec) or self._receive(self.spec.start_s)
        if isinstance(answer, Failed):
            return answer
        self._loaded = True
        return None

    def _send(self, thing: Any) -> Failed | None:
        try:
            self._connection.send(thing)
        except (BrokenPipeError, ConnectionResetError):
            return self._post_mortem()
        return None

    def _receive(self, patience_s: float) -> Any:
        deadline = time.monotonic() + patience_s
        try:
            while not self._connection.poll(max(0.0, deadline - time.monotonic())):
                if time.monotonic() >= deadline:
                    return Failed(ErrorKind.TIMEOUT, f"no progress for {patience_s:g} s")
            return self._connection.recv()
        except (EOFError, OSError):
            return self._post_mortem()

    def _post_mortem(self) -> Failed:
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return Failed(ErrorKind.CRASH, "worker process closed its connection")
        words = self._last_words()
        if code == -signal.SIGKILL:
            return Failed(ErrorKind.OUT_OF_MEMORY, f"worker process was killed, most likely for its memory{words}")
        if code < 0:
            return Failed(ErrorKind.CRASH, f"worker process died of {signal.Signals(-code).name}{words}")
        return Failed(ErrorKind.CRASH, f"worker process exited with code {code}{words}")

    def _last_words(self) -> str:
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - 300))
        text = " ".join(self._log.read().decode(errors="replace").split())
        return f": … {text}" if text else ""


def _spawn(connection: socket.socket, log, threads: int) -> subprocess.Popen:
    environment = {
        **os.environ,
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads)),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "datakit.process.child_main", str(connection.fileno())],
        pass_fds=[connection.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=environment,
    )


class _Forked:
    """A forked child with what `Child` uses of `subprocess.Popen`."""

    def __init__(self, connection: socket.socket, log):
        self._code: int | None = None
        self._pid = os.fork()
        if self._pid == 0:
            try:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                from datakit.process.child_main import main

                main(connection.fileno())
            finally:
                os._exit(1)

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("forked child", timeout)
            time.sleep(0.005)
        return self._code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self._pid, signal.SIGKILL)
