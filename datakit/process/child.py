"""Work in a child process with a deadline and a memory limit.

A damaged file can crash a decoder, hang it or make it ask for all memory there is. Ray would hand such an input to
worker after worker, and a training run would go down with it; so whoever reads files talks to a `Child`, which fails
cleanly instead.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, BinaryIO

from datakit.errors import ErrorKind
from datakit.process.messages import Done, Failed, ToolSpec

END_S = 10.0
"""A process that closed its connection, and one that was killed, is waited for so long."""
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Child:
    """Runs payloads one after another in a process that is started when needed and replaced when broken.

    `stream` and `ask` wait for one payload. Who watches several children gives them payloads (`give`), waits for any of
    them (`wait_for`) and takes what they say (`receive`).

    Args:
        spec: what it runs, and what it is allowed.
        fork: make the process by forking this one, which must have a single thread and no open tables or decoders: it
            then starts with the libraries loaded.
        pass_fds: file descriptors that it inherits, under the same numbers.
        log: its output goes into a file of its own, whose end becomes part of the message when it dies; else where this
            process's goes.

    Attributes:
        in_hand: payloads that it was given, the first of which it is at.
        loaded: whether it has said that it can work.
    """

    def __init__(self, spec: ToolSpec, fork: bool = False, pass_fds: Sequence[int] = (), log: bool = True):
        self.spec = spec
        self._fork, self._pass_fds, self._logs = fork, tuple(pass_fds), log
        self._process: subprocess.Popen[bytes] | _Forked | None = None
        self._log: BinaryIO | None = None
        self.in_hand: deque[Any] = deque()
        self.loaded = False

    def start(self) -> None:
        """Begin starting the process, without waiting for it: it loads while the caller does other things."""
        if self.running:
            return
        self.stop()
        ours, theirs = socket.socketpair()
        if self._logs:
            self._log = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the child lives
        if self._fork:
            self._process = _Forked(theirs, self._log)
        else:
            self._process = _spawn(self.spec, theirs, self._pass_fds, self._log)
        theirs.close()
        self._connection = Connection(ours.detach())
        self.loaded, self._heard_at, self._payloads = False, time.monotonic(), 0
        self._send(self.spec)

    def stop(self, patience_s: float = 0.0) -> None:
        """Kill the process, unless it ends by itself within `patience_s`. What it has in hand stays there."""
        process, self._process = self._process, None
        if process is None:
            return
        if _wait(process, patience_s) is None:
            process.kill()
            _wait(process, END_S)  # what hangs in the kernel dies when that lets it
        self._connection.close()
        if self._log is not None:
            self._log.close()

    def ready(self) -> Failed | None:
        """Wait until the process can take payloads; why it cannot."""
        self.start()
        while not self.loaded:
            failure = self.receive()
            if failure is not None:
                return failure
        return None

    def stream(self, payload: Any) -> Iterator[Any]:
        """The items of one payload, then `Done` or `Failed`. Never raises for what the payload does."""
        failure = self.ready()
        if failure is not None:
            yield failure
            return
        self.give(payload)
        try:
            while self.in_hand:
                self._heard_at = time.monotonic()  # what the caller did meanwhile does not count
                yield self.receive()
        finally:
            if self.take_back():  # the caller has had enough
                self.stop()

    def ask(self, payload: Any) -> Done | Failed:
        """How one payload ended; a class's answer is in `Done`."""
        *_, end = self.stream(payload)
        return end

    def give(self, payload: Any) -> None:
        """Hand over a payload. Where the process may still be at another one, it must be small: a full pipe waits."""
        self.start()
        if self.loaded and not self.in_hand:
            self._heard_at = time.monotonic()
        self.in_hand.append(payload)
        self._send(payload)

    def receive(self) -> Any:
        """What the process says next; waits for it as long as is allowed.

        Returns:
            None once it has loaded; an item of the first payload in hand; `Done` or `Failed`, which end that payload.
            Where a `Failed` comes before it has loaded, no payload is to blame, and all stay in hand.
        """
        message = self._next_message()
        if not self.loaded:
            if isinstance(message, Failed):
                self.stop()
                return message
            self.loaded = True
            return None
        if isinstance(message, (Done, Failed)):
            if self.in_hand:
                self.in_hand.popleft()
            self._payloads += 1
            worn_out = self._payloads == self.spec.payloads and not self.in_hand
            if worn_out or (isinstance(message, Failed) and message.child_died):
                self.stop()
        return message

    def take_back(self) -> list[Any]:
        """What it has in hand, which it will not finish."""
        payloads = list(self.in_hand)
        self.in_hand.clear()
        return payloads

    @property
    def running(self) -> bool:
        """Whether there is a process that works, or whose death is still to be received."""
        return self._process is not None and (bool(self.in_hand) or self._process.poll() is None)

    @property
    def connection(self) -> Connection | None:
        """Can be read from when there is something to receive; None: no process."""
        return self._connection if self._process is not None else None

    @property
    def late_at(self) -> float:
        """When (`time.monotonic`) it will have said nothing for too long."""
        return self._heard_at + (self.spec.stall_s if self.loaded else self.spec.start_s)

    def _send(self, thing: Any) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # it has died: receiving says so
            self._connection.send(thing)

    def _next_message(self) -> Any:
        try:
            while not self._connection.poll(max(0.0, self.late_at - time.monotonic())):
                if time.monotonic() >= self.late_at:
                    patience_s = self.spec.stall_s if self.loaded else self.spec.start_s
                    return Failed(ErrorKind.TIMEOUT, f"no progress for {patience_s:g} s")
            message = self._connection.recv()
        except (EOFError, OSError):
            return self._post_mortem()
        self._heard_at = time.monotonic()
        return message

    def _post_mortem(self) -> Failed:
        code = None if self._process is None else _wait(self._process, END_S)
        if code is None:
            message, death = "worker process closed its connection", "it closed its connection"
            return Failed(ErrorKind.CRASH, message, death=death)
        death = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        words = self._last_words()
        if code == -signal.SIGKILL:
            message = f"worker process was killed, most likely for its memory{words}"
            return Failed(ErrorKind.OUT_OF_MEMORY, message, death=death)
        how = f"died of {death}" if code < 0 else f"exited with code {code}"
        return Failed(ErrorKind.CRASH, f"worker process {how}{words}", death=death)

    def _last_words(self) -> str:
        if self._log is None:
            return ""
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - 300))
        text = " ".join(self._log.read().decode(errors="replace").split())
        return f": … {text}" if text else ""


def wait_for(children: Sequence[Child], timeout_s: float, also: Sequence[Any] = ()) -> list[Child]:
    """Those of the children that have something to be received: a message, their death, or that they are late.

    Waits until there are some, until one of `also` can be read from, or so long.
    """
    by_connection = {child.connection: child for child in children if child.connection is not None}
    busy = [child for child in by_connection.values() if child.in_hand]
    now = time.monotonic()
    patience_s = min([timeout_s, *(child.late_at - now for child in busy)])
    readable = wait([*by_connection, *also], max(0.0, patience_s))
    heard = [child for connection, child in by_connection.items() if connection in readable]
    now = time.monotonic()
    return heard + [child for child in busy if child.late_at <= now and child not in heard]


def _spawn(
    spec: ToolSpec, connection: socket.socket, pass_fds: tuple[int, ...], log: BinaryIO | None
) -> subprocess.Popen[bytes]:
    fd = connection.fileno()
    return subprocess.Popen(
        [sys.executable, "-m", "datakit.process.child_main", str(fd), spec.target],
        pass_fds=[fd, *pass_fds],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env={**os.environ, **dict.fromkeys(THREADS, str(spec.threads))},
    )


def _wait(process: subprocess.Popen[bytes] | _Forked, timeout_s: float) -> int | None:
    """Its exit code, negative for a signal; None: it has not ended by then."""
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return None


class _Forked:
    """A forked child with what `Child` uses of `subprocess.Popen`."""

    def __init__(self, connection: socket.socket, log: BinaryIO | None):
        self._code: int | None = None
        self._pid = os.fork()
        if self._pid == 0:
            try:
                if log is not None:
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

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("forked child", timeout)
            time.sleep(0.005)
        return code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self._pid, signal.SIGKILL)
