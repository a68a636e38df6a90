"""What a child process is told to do, and what it says of it. Plain values: they cross process boundaries."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from datakit.errors import ErrorKind


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
        threads: that its libraries may use.
    """

    target: str
    options: dict[str, Any] = field(default_factory=dict)
    memory_bytes: int | None = 4 << 30
    stall_s: float = 60.0
    start_s: float = 300.0
    threads: int = 1


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
