"""Where the processes of a run come from: this machine (`--nproc`), a Ray cluster (`--ray`), or torchrun and colossalai run, which
start this program on every machine themselves."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Sequence

from datakit.errors import ConfigError, DatakitError

GRACE_S = 600.0
"""That processes which are asked to stop have for their checkpoint."""
TAIL = 3000
"""Characters shown of what a process said before it failed."""


def started_by_launcher() -> bool:
    """Whether torchrun, or `on_this_machine`, started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def on_this_machine(count: int, arguments: Sequence[str], folder: Path) -> None:
    """Run this program in so many processes, and wait for them.

    Rank 0 speaks for all; the others write to `folder/ranks/rank-N.log`. Signals go to all. When one fails, the others are stopped.

    Args:
        arguments: of `datakit`.

    Raises:
        DatakitError: a process failed.
    """
    (folder / "ranks").mkdir(parents=True, exist_ok=True)
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(count)}
    processes: list[subprocess.Popen] = []
    logs = [folder / "ranks" / f"rank-{rank}.log" for rank in range(count)]
    asked: list[int] = []

    def stop(number: int, frame: Any) -> None:
        asked.append(number)
        _tell(processes, number)

    previous = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):  # before a process starts that a signal would not reach
            previous[number] = signal.signal(number, stop)
        for rank in range(count):
            environment = {"OMP_NUM_THREADS": str(threads), **os.environ, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with open(logs[rank] if rank else os.devnull, "w") as log:
                said = {} if rank == 0 else {"stdout": log, "stderr": log}
                # of its own session, so that Ctrl-C at the terminal comes once, from here
                processes.append(subprocess.Popen([sys.executable, "-m", "datakit.cli", *arguments], env=environment, start_new_session=True, **said))
            for number in asked:
                _tell(processes[-1:], number)
        codes = _wait(processes)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for process in processes:
            if process.poll() is None:
                process.kill()
    failed = [(rank, code) for rank, code in enumerate(codes) if code]
    if failed:
        rank, code = next((f for f in failed if f[1] > 0), failed[0])
        said = logs[rank].read_text()[-TAIL:].strip().splitlines()[-1:] if rank else []
        raise DatakitError(f"rank {rank} of {count} ended with code {code}" + (f": {said[0]} (all of it in {logs[rank]})" if said else ""))


def on_ray(count: int, address: str, function: Callable[[Any], None], argument: Any, gpus: bool) -> None:
    """Run a function in so many workers of a Ray cluster (Ray Train), which meet in one process group first.

    Args:
        function: of one argument; both must be picklable. The run's folder must be one that all machines see.
        gpus: one for each worker.

    Raises:
        DatakitError: a worker failed; its first line.
    """
    from pipelines.session import RaySession

    with RaySession(address) as session:
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        have = session.gpus() if gpus else session.cpus()
        if have < count:
            raise ConfigError(f"--nproc {count}: the Ray cluster has {have:g} {'GPUs' if gpus else 'CPUs'}")
        trainer = TorchTrainer(
            function, train_loop_config=argument, scaling_config=ScalingConfig(num_workers=count, use_gpu=gpus),
            torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpus else "gloo"), run_config=RunConfig())
        try:
            trainer.fit()
        except Exception as e:  # Ray wraps whatever the worker raised
            cause = e
            while cause.__cause__ is not None:
                cause = cause.__cause__
            raise DatakitError(f"training on Ray failed: {' '.join(str(cause).split())[:500]}") from e


def _wait(processes: list[subprocess.Popen]) -> list[int]:
    """Exit codes, in order; once one fails, the rest have the time of a checkpoint to stop."""
    deadline = None
    while any(p.poll() is None for p in processes):
        if deadline is None and any(p.poll() for p in processes):
            _tell(processes, signal.SIGTERM)
            deadline = time.monotonic() + 10.0
        if deadline is not None and time.monotonic() > deadline:
            for p in processes:
                p.kill()
        time.sleep(0.05)
    return [p.returncode for p in processes]


def _tell(processes: Sequence[subprocess.Popen], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
