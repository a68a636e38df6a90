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
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Iterator

from datakit.errors import ErrorKind

PAYLOADS_PER_CHILD = 500
"""A child is replaced after this many payloads: decoders leak a little on damaged files."""


@dataclass(frozen=True)
class ToolSpec:
    """What a child does.

    Attributes:
        target: `module:function` taking a payload and yielding items, or `module:class` whose instance
            answers a payload (a tuple) by one item: `run(*payload)`.
        options: keyword arguments for the class.
        memory_bytes: limit on private memory; None for none (CUDA reserves address space beyond reason).
        stall_s: seconds without an item after which a payload is given up.
        start_s: seconds allowed for starting and loading.
    """

    target: str
    options: dict[str, Any] = field(default_factory=dict)
    memory_bytes: int | None = 4 << 30
    stall_s: float = 60.0
    start_s: float = 300.0


@dataclass(frozen=True)
class Done:
    """A payload is finished (or the tool is ready); CPU seconds it took."""

    cpu_s: float


@dataclass(frozen=True)
class Failed:
    """A payload could not be finished."""

    kind: ErrorKind
    message: str
    cpu_s: float = 0.0
    stage: str = "decode"  # only meaningful for whole videos

    @property
    def child_died(self) -> bool:
        """Worth another attempt: the failure may lie in the child's past or in its neighbours."""
        return self.kind in (ErrorKind.CRASH, ErrorKind.TIMEOUT, ErrorKind.OUT_OF_MEMORY)


class Child:
    """Runs payloads one after another in a process that is started when needed and replaced when broken."""

    def __init__(self, spec: ToolSpec):
        self.spec = spec
        self.load_cpu_s = 0.0
        self._process: subprocess.Popen | None = None
        self._done = 0

    def stream(self, payload: Any) -> Iterator[Any]:
        """The items of one payload, then `Done` or `Failed`. Never raises for what the payload does."""
        failure = self._ensure_started()
        if failure is None:
            try:
                self._connection.send(payload)
            except (BrokenPipeError, ConnectionResetError):
                failure = self._post_mortem()
        if failure is not None:
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

    def _ensure_started(self) -> Failed | None:
        if self._process is not None and self._process.poll() is None:
            return None
        self.stop()
        ours, theirs = socket.socketpair()
        self._log = tempfile.TemporaryFile()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.child", str(theirs.fileno())],
            pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, env=environment,
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        self._done = 0
        self._connection.send(self.spec)
        answer = self._receive(self.spec.start_s)
        if isinstance(answer, Done):
            self.load_cpu_s += answer.cpu_s
            return None
        self.stop()
        return answer

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
