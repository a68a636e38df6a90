"""ColossalAI's ZeRO, Gemini and hybrid plugins on CPU over gloo, for tests: an accelerator that they take for a GPU."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import torch
from colossalai.accelerator import set_accelerator
from colossalai.accelerator.cpu_accelerator import CpuAccelerator
from colossalai.zero.gemini.chunk import Chunk


def pretend() -> None:
    """From now on this process's ColossalAI takes its CPU for an accelerator."""
    set_accelerator(PretendedAccelerator())
    # Gemini's chunks tell "on the accelerator" from "offloaded to the CPU" by the type of the device: here they are
    # always on it.
    Chunk.shard_device = property(lambda chunk: SimpleNamespace(type="cuda"), lambda chunk, device: None)
    Chunk.shard_move = lambda chunk, device, force_copy=False, non_blocking=False: None


class Stream:
    """Work on a CPU is done when it is asked for: there is nothing to wait for."""

    def wait_stream(self, other: Stream) -> None:
        pass

    def synchronize(self) -> None:
        pass


class PretendedAccelerator(CpuAccelerator):
    """ColossalAI 0.5.0 asks for the name ("device is required"), for streams, and for the random state by a signature
    that its own CpuAccelerator gets wrong (`torch.get_rng_state` takes no device)."""

    def __init__(self) -> None:
        super().__init__()
        self._name = "cuda"

    def Stream(self, device=None, priority=0, **kwargs) -> Stream:
        return Stream()

    def current_stream(self, device=None) -> Stream:
        return Stream()

    def default_stream(self, device=None) -> Stream:
        return Stream()

    def stream(self, stream_) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def synchronize(self, device=None) -> None:
        pass

    def get_rng_state(self, device=None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, new_state: torch.Tensor, device=None) -> None:
        torch.set_rng_state(new_state)

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def empty_cache(self) -> None:
        pass
