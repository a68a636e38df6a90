"""What a child process is told to do, and what it says of it. Plain values: they cross process boundaries."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from datakit.errors import ErrorKind


@dataclass(frozen=True)
class ToolSpec:
    """What a child does.

    Attributes:
        target: `module:function`, a generator function of a payload, whose items are sent one by one; or
            `module:class`, of which one instance is made, whose method `run(*payload)` gives one answer.
        options: keyword arguments for the class.
        memory_bytes: limit on private memory; None for none (CUDA reserves address space beyond reason).
        stall_s: seconds without an item after which a payload is given up.
        start_s: seconds allowed for starting and loading.
        threads: that its libraries may use.
        payloads: after so many the process is replaced; None: never. Decoders leak a little on damaged files.
    """

    target: str
    options: dict[str, Any] = field(default_factory=dict)
    memory_bytes: int | None = 4 << 30
    stall_s: float = 60.0
    start_s: float = 300.0
    threads: int = 1
    payloads: int | None = 500


@dataclass(frozen=True)
class Done:
    """A payload is finished (or the tool is ready): CPU seconds it took, and what a class's `run` gave."""

    cpu_s: float
    answer: Any = None


@dataclass(frozen=True)
class Failed:
    """A payload could not be finished.

    Attributes:
        stage: only meaningful for whole videos.
        death: what the process died of, where it did: a signal or an exit code.
    """

    kind: ErrorKind
    message: str
    cpu_s: float = 0.0
    stage: str = "decode"
    death: str | None = None

    @property
    def child_died(self) -> bool:
        """The process is gone, or unfit. Worth another attempt: the failure may lie in the child's past or in its
        neighbours."""
        return self.kind in (ErrorKind.CRASH, ErrorKind.TIMEOUT, ErrorKind.OUT_OF_MEMORY)
