"""What the workers of `datakit run encode` do: read windows (in child processes, without torch), and encode them (in
Ray actors)."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from datakit.errors import ConfigError, ErrorKind, MediaError
from datakit.process.messages import Failed
from datakit.source import check_content
from pipelines.video_tasks.messages import Advance, ClipBatch, VideoFacts
from trainer.data.sample_reader import Window, read_frames
from trainer.models.autoencoders.base import pixels

if TYPE_CHECKING:
    import torch

READ_AGAIN_S = (1.0, 4.0)
"""Waits before further attempts at a file that cannot be read: that may pass."""
VIDEOS_KNOWN = 256
"""Sources that a process remembers to hold what they should."""


@dataclass(frozen=True)
class EncodeJob:
    """Windows of one shape that are encoded together.

    Attributes:
        windows: with the ids of their videos.
        shape: [3, frames, height, width].
    """

    windows: tuple[tuple[Window, str], ...]
    shape: tuple[int, int, int, int]


def read_windows(job: EncodeJob) -> Iterator[Advance | ClipBatch | VideoFacts]:
    """The frames of every window, as a loader without augmentation reads them: uint8, of the job's shape. What cannot
    be read has an error in its row; `place` is its number in the job."""
    started = time.process_time()
    batch = ClipBatch([], [])
    for place, (window, video_id) in enumerate(job.windows):
        errors: list[dict[str, str]] = []
        frames = np.empty(job.shape, np.uint8)
        try:
            _read(window, video_id, frames)
        except MediaError as e:
            errors = [{"stage": "read", "kind": str(e.kind), "message": e.message}]
        batch.rows.append({"place": place, "errors": errors})
        batch.images.append([] if errors else [frames])
        yield Advance()  # a sign of life
    yield batch
    yield VideoFacts({}, len(batch.rows), {"decode": time.process_time() - started})


class Encoder:
    """An autoencoder, for `pipelines.executor.actors.EngineWorker`.

    Args:
        settings: fields of `trainer.models.autoencoders.settings.AutoencoderSettings`.
        expected: hash of the autoencoder.
        gpu: encode there; else on `threads` CPUs.
        precision: of the computation: bf16 or fp32.
        dtype: of the numbers that are given back: bfloat16 or float32.

    Raises:
        ConfigError: weights are missing, or others than expected.
    """

    def __init__(self, settings: dict[str, Any], expected: str, gpu: bool, precision: str, dtype: str, threads: int):
        import torch

        from trainer.models.autoencoders.build import autoencoder_hash, load_autoencoder
        from trainer.models.autoencoders.settings import AutoencoderSettings

        if gpu and not torch.cuda.is_available():
            raise ConfigError(
                "Ray gave an encoder a GPU, but torch finds none there: install torch with CUDA, or --set "
                "encode.num_gpus=0"
            )
        torch.set_num_threads(threads)
        wanted = AutoencoderSettings(**settings)
        model = load_autoencoder(wanted)
        if (found := autoencoder_hash(model)) != expected:
            raise ConfigError(
                f"the weights of autoencoder {wanted.kind} differ between machines: {found} here, {expected} where "
                f"the run started"
            )
        self._device = torch.device("cuda" if gpu else "cpu")
        self._model = (
            model.to(self._device, torch.bfloat16 if precision == "bf16" else torch.float32)
            .eval()
            .requires_grad_(False)
        )
        self._tiles = model.tiles if wanted.tiled else None
        self._dtype = getattr(torch, dtype)
        self._name = dtype
        self._lock = threading.Lock()  # one call computes while others fetch what they need

    def run(self, rows: list[dict], images: list[list[np.ndarray]]) -> list[dict[str, Any] | Failed]:
        """Column `latent` of every row (null where there are no frames): `dtype`, `shape`, and the bytes of `mean` and
        `std`.

        Raises:
            ConfigError: one window alone does not fit the GPU.
        """
        there = [i for i, pictures in enumerate(images) if pictures]
        encoded = dict(zip(there, self._encode([images[i][0] for i in there]), strict=True)) if there else {}
        return [encoded.get(i, {"latent": None}) for i in range(len(rows))]

    def _encode(self, videos: list[np.ndarray]) -> list[dict[str, Any] | Failed]:
        import torch

        try:
            with self._lock, torch.inference_mode():
                found = self._model.encode(
                    pixels(torch.from_numpy(np.stack(videos)).to(self._device), self._model), self._tiles
                )
                mean, std = (x.to(self._dtype).cpu() for x in found)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
        except RuntimeError:
            self._leave_if_lost()
            raise
        else:
            return [self._answer(*one) for one in zip(mean, std)]
        if len(videos) == 1:
            _, frames, height, width = videos[0].shape
            raise ConfigError(
                f"a window of {height}x{width}x{frames} does not fit the GPU's memory: --set autoencoder.tiled=true "
                f"encodes it in pieces"
            )
        half = len(videos) // 2
        return self._encode(videos[:half]) + self._encode(videos[half:])

    def _answer(self, mean: torch.Tensor, std: torch.Tensor) -> dict[str, Any] | Failed:
        if not (mean.isfinite().all() and std.isfinite().all()):
            return Failed(ErrorKind.STAGE, "the latent has numbers that are not finite")
        return {"latent": {"dtype": self._name, "shape": list(mean.shape), "mean": _bytes(mean), "std": _bytes(std)}}

    def _leave_if_lost(self) -> None:
        """After some errors a process can never use its GPU again: another one takes over."""
        import torch

        if self._device.type == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                os._exit(1)


def _bytes(x: torch.Tensor) -> bytes:
    """Little-endian, C order."""
    import torch

    return x.contiguous().view(torch.uint8).numpy().tobytes()


def _read(window: Window, video_id: str, out: np.ndarray) -> None:
    """Raises:
    MediaError: it cannot be read, now or ever; or its source holds another video.
    """
    for wait_s in (*READ_AGAIN_S, None):
        try:
            if window.path is None:
                _check(window.uri, video_id)
            return read_frames(window, None, out)
        except MediaError as e:
            if e.kind != ErrorKind.UNREADABLE or wait_s is None:
                raise
            time.sleep(wait_s)


@lru_cache(maxsize=VIDEOS_KNOWN)
def _check(uri: str, video_id: str) -> None:
    """Raises (and then it is not remembered): see `check_content`."""
    check_content(uri, None, video_id)
