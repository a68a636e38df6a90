"""Actors that work on lists of things: each takes the next list when it has none, a list whose actor dies is done again
in halves.

For work that is not a video's pass through stages (see `pipelines.executor.flow`): passes over samples, for one.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from datakit.errors import DatakitError, ErrorKind
from datakit.process.messages import Failed
from pipelines.executor.session import RaySession, end_actor

ATTEMPTS = 2
"""Tries of one thing whose actor died."""
T = TypeVar("T")


@dataclass(frozen=True)
class Member:
    """Place of an actor in a group that works on the same list together."""

    rank: int
    size: int
    address: str
    port: int


class ActorPool:
    """A number of actors, or of groups of actors that do each call together (then the first one's answer counts).

    Args:
        session: an entered `RaySession`.
        kind: class of the actors. Its methods take a list and give a list as long. With groups it has a method
            `join(member: Member)`, called once before any other, and one `free_port() -> (address, port)`.
        arguments: of its constructor.
        count: actors or groups.
        group: actors of a group.
        num_cpus, num_gpus: of an actor.
    """

    def __init__(
        self,
        session: RaySession,
        kind: type,
        arguments: tuple[Any, ...],
        count: int = 1,
        group: int = 1,
        num_cpus: float = 1.0,
        num_gpus: float = 0.0,
    ):
        self._ray = session.ray
        self._remote = self._ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, max_restarts=0)(kind)
        self._arguments, self._count, self._group = arguments, count, group
        self._idle: list[_Team] = []
        self._teams: list[_Team] = []

    def run(
        self,
        method: str,
        lists: Iterable[Sequence[T]],
        divide: bool = False,
        alone: bool = False,
    ) -> Iterator[tuple[list[T], list[Any]]]:
        """Have every list done by some actor, or group.

        Args:
            alone: by the first of a group, without the others.
            divide: the last lists are divided among actors that have nothing else to do.

        Yields:
            each list, or a part of it, with its answers, in the order in which they come. What was tried and killed its
            actor again and again has a `Failed` for an answer.

        Raises:
            DatakitError: one that an actor raised: the whole cannot go on.
        """
        queue = deque(_Task(list(items)) for items in lists if len(items))
        running: dict[Any, tuple[_Team, _Task]] = {}
        while queue or running:
            while queue and (team := self._free(len(running) + len(queue))) is not None:
                idle = 1 + len(self._idle) + self._count - len(self._teams)
                if divide and len(queue) < idle and len(queue[0].items) > 1:
                    queue.extendleft(reversed(queue.popleft().halves()))
                task = queue.popleft()
                running[team.call(method, task.items, alone=alone)] = team, task
            ready, _ = self._ray.wait(list(running), num_returns=1)
            team, task = running.pop(ready[0])
            try:
                answers = self._ray.get(ready[0])
            except self._ray.exceptions.RayActorError as e:
                self._lose(team)
                if len(task.items) > 1:
                    queue.extendleft(task.halves())
                elif task.tries < ATTEMPTS:
                    queue.append(_Task(task.items, task.tries + 1))
                else:
                    message = f"its process died ({ATTEMPTS} attempts): {' '.join(str(e).split())}"[:500]
                    yield task.items, [Failed(ErrorKind.CRASH, message)]
                continue
            except self._ray.exceptions.RayTaskError as e:
                if isinstance(e.cause, DatakitError):
                    raise e.cause from None
                raise
            self._idle.append(team)
            if len(answers) != len(task.items):
                raise AssertionError(f"{len(task.items)} went into {method}, {len(answers)} came out")
            yield task.items, answers

    def close(self) -> None:
        for team in self._teams:
            team.kill(self._ray)
        self._teams, self._idle = [], []

    def _free(self, wanted: int) -> _Team | None:
        """A team with nothing to do; a new one, if there is work for it."""
        if self._idle:
            return self._idle.pop()
        if len(self._teams) < min(self._count, wanted):
            self._teams.append(_Team.start(self._ray, self._remote, self._arguments, self._group))
            return self._teams[-1]
        return None

    def _lose(self, team: _Team) -> None:
        team.kill(self._ray)
        self._teams.remove(team)


@dataclass
class _Task:
    items: list[Any]
    tries: int = 1

    def halves(self) -> list[_Task]:
        middle = (len(self.items) + 1) // 2
        return [_Task(self.items[:middle]), _Task(self.items[middle:])]


@dataclass(eq=False)
class _Team:
    actors: list[Any] = field(default_factory=list)

    @classmethod
    def start(cls, ray: Any, remote: Any, arguments: tuple[Any, ...], size: int) -> _Team:
        team = cls([remote.remote(*arguments) for _ in range(size)])
        if size > 1:
            address, port = ray.get(team.actors[0].free_port.remote())
            ray.get([actor.join.remote(Member(rank, size, address, port)) for rank, actor in enumerate(team.actors)])
        return team

    def call(self, method: str, items: list[Any], alone: bool) -> Any:
        """The first actor's answer; the others do the same work, and theirs are dropped."""
        return [getattr(actor, method).remote(items) for actor in (self.actors[:1] if alone else self.actors)][0]

    def kill(self, ray: Any) -> None:
        for actor in self.actors:
            end_actor(ray, actor)


def free_port() -> tuple[str, int]:
    """This machine's address, and a port that nobody listens at."""
    with socket.socket() as s:
        s.bind(("", 0))
        return _own_address(), s.getsockname()[1]


def _own_address() -> str:
    import ray

    return ray.util.get_node_ip_address()
