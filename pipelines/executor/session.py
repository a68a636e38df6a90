"""Starting Ray here, or joining one that runs."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from typing import Any

from datakit.errors import ConfigError

REACH_S = 10.0
"""Patience with an address that does not answer."""
AUTH_MODE = "RAY_AUTH_MODE"
"""Set by Ray itself as well, where it starts a cluster."""


class RaySession:
    """Ray, started or joined: `local` starts it in this process, `auto` or an address joins a cluster. A Ray
    that this process is connected to already is used as it is.

    Args:
        leave: do not stop a local Ray at the end; it dies with this process, which is about to exit.

    Raises:
        ConfigError: nobody answers at the address (here already), or Ray does not start (on entry).
    """

    def __init__(self, address: str = "local", leave: bool = False):
        # Read when Ray is imported. The first silences a FutureWarning; without the second, under `uv run`,
        # Ray would pack up the working folder and build an environment for each worker.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        self.address = address
        if address != "local":
            _check_reachable(address)
        self._leave = leave and address == "local"

    def __enter__(self) -> RaySession:
        import ray

        self.ray: Any = ray
        self._auth_mode = os.environ.get(AUTH_MODE)
        if ray.is_initialized():  # by the program that calls us: its Ray, its business
            self._leave = True
            return self
        logging.getLogger("ray").setLevel(logging.ERROR)
        common: dict[str, Any] = dict(logging_level=logging.ERROR, log_to_driver=False, configure_logging=False)
        try:
            if self.address == "local":
                cpus = len(os.sched_getaffinity(0))
                ray.init(
                    address="local",
                    num_cpus=cpus,
                    include_dashboard=False,
                    object_store_memory=_store_bytes(cpus),
                    **common,
                )
            else:
                ray.init(address=self.address, **common)
        except (OSError, ValueError, RuntimeError, self.ray.exceptions.RayError) as e:
            raise ConfigError(f"cannot reach Ray at {self.address!r}: {' '.join(str(e).split())}") from e
        return self

    def __exit__(self, *exc) -> None:
        if not self._leave:
            self.ray.shutdown()
            if self._auth_mode is None and os.environ.pop(AUTH_MODE, None) is not None:
                # Ray, started here, asks for its token from then on: this process could join no cluster any more that
                # has none.
                self.ray._raylet.Config.initialize("")
                self.ray._raylet.AuthenticationTokenLoader.instance().reset_cache()

    def cpus(self) -> float:
        return self.ray.cluster_resources().get("CPU", 1.0)

    def gpus(self) -> float:
        return self.ray.cluster_resources().get("GPU", 0.0)


def end_actor(ray: Any, actor: Any) -> None:
    """Kill an actor, if Ray has not given it up before it ever ran."""
    with contextlib.suppress(ray.exceptions.RaySystemError):
        ray.kill(actor)


def _check_reachable(address: str) -> None:
    """Ray itself tries for many minutes to reach an address where nobody listens."""
    if address.startswith("ray://"):
        raise ConfigError(f"--ray {address}: give the cluster's own address (HOST:6379); Ray Client is not supported")
    try:
        found = _running_here() if address == "auto" else address
        host, separator, port = found.rpartition(":")
        if not separator or not port.isdigit():
            raise ConfigError(f"--ray is local, auto or HOST:PORT, not {address!r}")
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
    except OSError as e:
        raise ConfigError(f"cannot reach Ray at {address!r}: {e.strerror or e}") from e


def _running_here() -> str:
    """The address that Ray's `auto` stands for.

    Raises:
        ConnectionError: there is none.
    """
    from ray._private import services

    found = services.canonicalize_bootstrap_address("auto")
    if found is None:
        raise ConnectionError("no Ray is running here")
    return found


def _store_bytes(cpus: int) -> int:
    """Room for the pictures under way: a few batches of 30 MB a worker."""
    return min(8 << 30, max(256 << 20, cpus * (256 << 20)))
