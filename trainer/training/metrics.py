"""What a run says of itself while it trains: lines for people, a JSON line each for machines, TensorBoard and wandb for
both."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from datakit.dependencies import install_command
from datakit.errors import MissingDependency

PEAK_TFLOPS: dict[str, float] = {
    "H200": 989.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}
"""bf16, dense, by NVIDIA's data sheets; a name is looked for in the device's. What is not here has no MFU."""


@dataclass
class Meter:
    """Work since it was last read.

    Attributes:
        peak: FLOP/s of one device (None: unknown, no MFU).
        devices: that share the work that is counted.
    """

    peak: float | None = None
    devices: int = 1
    _counts: dict[str, float] = field(default_factory=dict)
    _since: float = field(default_factory=time.perf_counter)

    def add(self, **counts: float) -> None:
        """Count `samples`, `tokens`, `flops`, and `waited_s` for data."""
        for name, value in counts.items():
            self._counts[name] = self._counts.get(name, 0.0) + value

    def read(self) -> dict[str, float]:
        """Rates since the last reading: samples/s and tokens/s of all devices, TFLOP/s and MFU of one, share of the
        time that was spent waiting for data."""
        now = time.perf_counter()
        elapsed, counts = now - self._since, self._counts
        self._since, self._counts = now, {}
        rates = {f"{name}_per_s": counts.get(name, 0.0) / elapsed for name in ("samples", "tokens")}
        if counts.get("flops"):
            per_device = counts["flops"] / elapsed / self.devices
            rates["tflops"] = per_device / 1e12
            if self.peak:
                rates["mfu"] = per_device / self.peak
        return rates | {"data_wait": counts.get("waited_s", 0.0) / elapsed}

    def pause(self) -> None:
        """What comes now (validation, previews) is not work: `resume` when it is over."""
        self._paused = time.perf_counter()

    def resume(self) -> None:
        self._since += time.perf_counter() - self._paused


def peak_flops(device: torch.device) -> float | None:
    """bf16 FLOP/s of a device by its data sheet."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for known, tflops in PEAK_TFLOPS.items() if known in name), None)


class Log:
    """Where the numbers of a run go. On ranks other than 0, nowhere.

    Args:
        folder: gets `log.jsonl` and TensorBoard's files. Lines of steps after `step` are of a run that was resumed
            before them, and go.
        wandb: project to log to as well.

    Raises:
        MissingDependency: wandb or TensorBoard is not installed.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        step: int = 0,
        tensorboard: bool = True,
        wandb: str | None = None,
        quiet: bool = False,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.quiet = quiet
        self.path = folder / "log.jsonl"
        _keep_before(self.path, step)
        self._file = self.path.open("a")
        self._board = _tensorboard(folder / "tensorboard", step) if tensorboard else None
        self._wandb = _wandb(wandb, folder, settings) if wandb else None

    def write(self, step: int, values: Mapping[str, float], line: str | None = None) -> None:
        """Numbers of a step; `line` is what a person reads."""
        self._file.write(json.dumps({"step": step, **{k: float(v) for k, v in values.items()}}) + "\n")
        self._file.flush()
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(dict(values), step=step)
        if line and not self.quiet:
            print(line, flush=True)

    def close(self) -> None:
        self._file.close()
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()


def _keep_before(path: Path, step: int) -> None:
    """Drop lines after a step, and one that was cut."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            continue
    path.write_text("".join(kept))


def _tensorboard(folder: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise MissingDependency(
            f"logging to TensorBoard needs it: {install_command('train')}, or set log.tensorboard=false"
        ) from e
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


def _wandb(project: str, folder: Path, settings: Mapping[str, Any]):
    try:
        import wandb
    except ImportError as e:
        raise MissingDependency("log.wandb needs the library wandb: uv pip install wandb") from e
    return wandb.init(
        project=project, dir=str(folder), config=dict(settings), name=folder.name, resume="allow", id=folder.name
    )
