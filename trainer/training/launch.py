"""Where the processes of a run come from: this machine (`--nproc`), a Ray cluster (`--ray`), or torchrun and colossalai
run, which start this program on every machine themselves.

On this machine torchrun (torch 2.13) starts 4 s later and takes 640 MB, does not show what the failed rank said, and
kills a rank that needs more than 30 s for its checkpoint; of `torch.distributed.elastic.multiprocessing`, below it, a
process stays behind if a signal comes while it starts them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, TextIO

from datakit.errors import ConfigError, DatakitError

TAIL = 3000
"""Characters shown of what a process said before it failed."""
SAID = "rank-0.out"
"""What rank 0 of a Ray cluster prints."""
SHOWN = 300
"""Characters of what Ray says."""
TOLD, RAISED = "datakit: ", "error: "
"""How the last line of a worker's log begins, that says what was wrong: for the user, or whatever it was."""
FOLLOW_S = 0.5
STOP = "stop"
"""File in a run's `ranks`: workers of a Ray cluster, which no signal reaches, are to stop."""
asked_to_stop = threading.Event()
"""Set in a process that no signal reaches, when its run is to stop."""


def started_by_launcher() -> bool:
    """Whether torchrun, or `on_this_machine`, started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def on_this_machine(count: int, arguments: Sequence[str], folder: Path) -> None:
    """Run this program in so many processes, and wait for them.

    Rank 0 speaks for all; the others write to `folder/ranks/rank-N.log`. Signals go to all. When one fails, the others
    are stopped.

    Args:
        arguments: of `datakit`.

    Raises:
        DatakitError: a process failed.
    """
    (folder / "ranks").mkdir(parents=True, exist_ok=True)
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(count)}
    processes: list[subprocess.Popen] = []
    logs = [_log(folder, rank) for rank in range(count)]
    asked: list[int] = []

    def stop(number: int, frame: Any) -> None:
        asked.append(number)
        _tell(processes, number)

    previous = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):  # before a process starts that a signal would not reach
            previous[number] = signal.signal(number, stop)
        for rank in range(count):
            environment = {
                "OMP_NUM_THREADS": str(threads),
                **os.environ,
                **meeting,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
            }
            with open(logs[rank] if rank else os.devnull, "w") as log:
                said = {} if rank == 0 else {"stdout": log, "stderr": log}
                # of its own session, so that Ctrl-C at the terminal comes once, from here
                command = [sys.executable, "-m", "datakit", *arguments]
                processes.append(subprocess.Popen(command, env=environment, start_new_session=True, **said))
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
        raise DatakitError(
            f"rank {rank} of {count} ended with code {code}"
            + (f": {said[0]} (all of it in {logs[rank]})" if said else "")
        )


def on_ray(count: int, address: str, function: Callable[[Any], None], argument: Any, folder: Path) -> None:
    """Run a function in so many workers of a Ray cluster (Ray Train), which meet in one process group first; each has a
    GPU, if the cluster has any.

    What a rank says is in `folder/ranks/rank-N.log`; what rank 0 says is shown here as well. SIGINT and SIGTERM set
    `asked_to_stop` in the workers; a second one ends all at once.

    Args:
        function: of one argument; both must be picklable. It is called in the folder that this process is in, on
            machines that have it.
        folder: of the run; all machines must see it.

    Raises:
        ConfigError: nobody answers at the address, or the cluster is too small.
        DatakitError: a worker failed; its last line.
    """
    from pipelines.executor.session import RaySession

    folder = folder.absolute()
    os.environ.setdefault(
        "RAY_TRAIN_ENABLE_PRINT_PATCH", "0"
    )  # for the workers: Ray would have all that is printed logged as well
    with RaySession(address) as session:
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        gpus = session.gpus() > 0
        have = session.gpus() if gpus else session.cpus()
        if have < count:
            raise ConfigError(f"--nproc {count}: the Ray cluster has {have:g} {'GPUs' if gpus else 'CPUs'}")
        trainer = TorchTrainer(
            _as_rank,
            train_loop_config={"function": function, "argument": argument, "folder": folder, "home": os.getcwd()},
            scaling_config=ScalingConfig(num_workers=count, use_gpu=gpus),
            run_config=RunConfig(storage_path=str(folder / "ranks")),
            torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpus else "gloo"),
        )
        for old in (
            *(_log(folder, rank) for rank in range(count)),
            folder / "ranks" / STOP,
        ):  # of an earlier life of the run
            old.unlink(missing_ok=True)
        try:
            with (
                _shown([(folder / "ranks" / SAID, sys.stdout), (_log(folder, 0), sys.stderr)]),
                _asking(folder / "ranks" / STOP),
            ):
                _aside(trainer.fit)  # in a main thread it would take Ctrl-C for itself
        except Exception as e:  # Ray's own, around whatever the workers raised
            raise DatakitError(_why(e, folder, count)) from e


def _as_rank(work: dict[str, Any]) -> None:
    """What a worker of Ray does."""
    rank, folder = int(os.environ["RANK"]), work["folder"]
    if os.path.isdir(work["home"]):
        os.chdir(work["home"])
    (folder / "ranks").mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(_log(folder, rank).open("w", buffering=1))
        said = log if rank else stack.enter_context((folder / "ranks" / SAID).open("w", buffering=1))
        stack.enter_context(contextlib.redirect_stderr(log))
        stack.enter_context(contextlib.redirect_stdout(said))
        threading.Thread(target=_listen, args=(folder / "ranks" / STOP,), daemon=True).start()
        try:
            work["function"](work["argument"])
        except DatakitError as e:
            print(f"{TOLD}{' '.join(str(e).split())}", file=log)
            raise
        except BaseException as e:
            traceback.print_exc(file=log)
            print(f"{RAISED}{type(e).__name__}: {' '.join(str(e).split())}", file=log)
            raise


def _aside(function: Callable[[], Any]) -> None:
    """Call it in a thread, and wait for it so that signals are handled meanwhile. An interrupt does not wait for it."""
    ended: Future[Any] = Future()

    def call() -> None:
        try:
            ended.set_result(function())
        except BaseException as e:
            ended.set_exception(e)

    threading.Thread(target=call, daemon=True).start()
    while not ended.done():
        wait([ended], FOLLOW_S)
    ended.result()


@contextlib.contextmanager
def _asking(file: Path) -> Iterator[None]:
    """Meanwhile, a signal makes the file, and a second one interrupts. (Only a main thread is sent any.)"""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        if file.exists():
            raise KeyboardInterrupt
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _listen(file: Path) -> None:
    while not file.exists():
        time.sleep(FOLLOW_S)
    asked_to_stop.set()


def _log(folder: Path, rank: int) -> Path:
    return folder / "ranks" / f"rank-{rank}.log"


def _why(error: Exception, folder: Path, count: int) -> str:
    """Which worker failed, and why: one that says what is wrong, if there is one; else one that raised anything
    (perhaps as it lost the others). Of workers that died, what Ray says."""
    lines: dict[int, str] = {}
    for rank in range(count):
        said = _log(folder, rank).read_text()[-TAIL:].strip().splitlines() if _log(folder, rank).exists() else []
        if said and said[-1].startswith((TOLD, RAISED)):
            lines[rank] = said[-1]
    if not getattr(error, "worker_failures", {}) or not lines:
        return (
            f"training on Ray failed: {' '.join(str(error).split())[:SHOWN]} … (the ranks' logs are in "
            f"{folder / 'ranks'})"
        )
    rank = min(lines, key=lambda rank: (not lines[rank].startswith(TOLD), rank))
    return (
        f"rank {rank} of {count} failed: {lines[rank].removeprefix(TOLD).removeprefix(RAISED)} (all of it in "
        f"{_log(folder, rank)})"
    )


@contextlib.contextmanager
def _shown(files: Sequence[tuple[Path, TextIO]]) -> Iterator[None]:
    """Meanwhile, what is written to files that do not exist yet is written on, too."""
    for path, _ in files:
        path.unlink(missing_ok=True)
    ended = threading.Event()
    threads = [threading.Thread(target=_follow, args=(path, to, ended)) for path, to in files]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def _follow(path: Path, to: TextIO, ended: threading.Event) -> None:
    place, last = 0, False
    while not last:
        last = ended.wait(FOLLOW_S)
        if not path.exists():
            continue
        with path.open() as file:
            file.seek(place)
            to.write(file.read())
            place = file.tell()
        to.flush()


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
