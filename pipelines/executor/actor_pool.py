"""Actors of one kind: started as there is work for them, placed before they get any, replaced when they die.

A flow (`pipelines.executor.flow`) takes them one by one. Passes over lists of things go through `ActorPool.run`: a list
whose actor dies is done again in halves.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from datakit.errors import ConfigError, DatakitError, ErrorKind
from datakit.process.messages import Failed
from datakit.version import __version__
from pipelines.executor.session import RaySession, end_actor

NODE_ATTEMPTS = 3
"""Tries of what lost its Ray worker or its node: a video, a batch, an actor that is to start."""
ATTEMPTS = 2
"""Tries of one thing of a list whose actor died."""
T = TypeVar("T")


@dataclass(frozen=True)
class Member:
    """Place of an actor in a group that works on the same list together."""

    rank: int
    size: int
    address: str
    port: int


@dataclass(eq=False)
class Team:
    """An actor, or a group of actors that do each call together (then the first one's answer counts)."""

    actors: list[Any]

    @property
    def leader(self) -> Any:
        return self.actors[0]

    def join(self, ray: Any) -> None:
        """Make the actors of a group know each other."""
        if len(self.actors) > 1:
            place = ray.get(self.leader.free_port.remote())
            members = [Member(rank, len(self.actors), *place) for rank in range(len(self.actors))]
            ray.get([actor.join.remote(member) for actor, member in zip(self.actors, members, strict=True)])

    def call(self, method: str, items: list[Any], alone: bool) -> Any:
        """The leader's answer; the others do the same work, unless it is to do so alone, and their answers are
        dropped."""
        return [getattr(actor, method).remote(items) for actor in (self.actors[:1] if alone else self.actors)][0]

    def kill(self, ray: Any) -> None:
        for actor in self.actors:
            end_actor(ray, actor)


class ActorPool:
    """Actors, or groups of actors, of one kind.

    Args:
        session: an entered `RaySession`.
        kind: class of the actors. Its method `version` gives datakit's, once the actor can work. With groups it has
            methods `free_port() -> (address, port)` and `join(member: Member)`, which is called once before any other.
        arguments: of its constructor.
        most: actors or groups.
        slots: calls that an actor works on at once.
        group: actors of a group.
        num_cpus, num_gpus: of an actor.

    Attributes:
        idle: who has nothing to do; an actor with several slots may be in it several times.
        starting: who has no place yet, by a reference that is ready once it has.
    """

    def __init__(
        self,
        session: RaySession,
        kind: type,
        arguments: tuple[Any, ...],
        most: int = 1,
        slots: int = 1,
        group: int = 1,
        num_cpus: float = 1.0,
        num_gpus: float = 0.0,
    ):
        self._ray: Any = session.ray
        self._remote = self._ray.remote(
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            max_restarts=0,
            max_concurrency=slots,
            scheduling_strategy="SPREAD" if group == 1 else "DEFAULT",  # a group talks much: on few nodes
        )(kind)
        self._arguments, self._most, self._group = arguments, most, group
        self.slots = slots
        self.idle: deque[Team] = deque()
        self.starting: dict[Any, Team] = {}
        self._teams: list[Team] = []
        self._lost_starts = 0  # in a row

    @property
    def size(self) -> int:
        """How many can work; at least one, for who divides work among them."""
        return max(1, len(self._teams) - len(self.starting))

    def want(self, work: int) -> None:
        """Start actors for pieces of work that nobody is free for."""
        lacking = -(-(work - len(self.idle)) // self.slots) - len(self.starting)
        for _ in range(min(lacking, self._most - len(self._teams))):
            team = Team([self._remote.remote(*self._arguments) for _ in range(self._group)])
            self._teams.append(team)
            self.starting[team.leader.version.remote()] = team

    def started(self, reference: Any) -> None:
        """To be called when a reference of `starting` is ready.

        Raises:
            ConfigError: one after the other dies before it has started, or it runs another datakit.
            DatakitError: one that an actor raised: the whole cannot go on.
        """
        team = self.starting.pop(reference)
        try:
            version = self.answer(reference)
            team.join(self._ray)
        except self._ray.exceptions.RayActorError as e:  # its node went, or Ray lost it before it ran
            self.lose(team)
            self._lost_starts += 1
            if self._lost_starts < NODE_ATTEMPTS:
                return  # another takes its place
            raise ConfigError(f"a Ray worker could not start, {NODE_ATTEMPTS} times: {' '.join(str(e).split())}") from e
        self._lost_starts = 0
        if version != __version__:
            raise ConfigError(f"a Ray worker runs datakit {version}, this is {__version__}: install the same")
        self.idle.extend([team] * self.slots)

    def answer(self, reference: Any) -> Any:
        """What an actor answered.

        Raises:
            DatakitError: one that it raised, which is meant for the user: the whole cannot go on.
            ray.exceptions.RayError: the actor, or what it was given, is lost; or it has a fault.
        """
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as e:
            if isinstance(e.cause, DatakitError):
                raise e.cause from None
            raise

    def lose(self, team: Team) -> None:
        """Do without one that died, wholly or in part."""
        team.kill(self._ray)
        if team in self._teams:
            self._teams.remove(team)
        self.idle = deque(other for other in self.idle if other is not team)

    def close(self) -> None:
        for team in self._teams:
            team.kill(self._ray)
        self._teams, self.idle, self.starting = [], deque(), {}

    def run(
        self, method: str, lists: Iterable[Sequence[T]], divide: bool = False, alone: bool = False
    ) -> Iterator[tuple[list[T], list[Any]]]:
        """Have every list done by some actor, or group.

        Args:
            method: takes a list and gives a list as long.
            divide: the last lists are divided among actors that have nothing else to do.
            alone: by the first of a group, without the others.

        Yields:
            each list, or a part of it, with its answers, in the order in which they come. What was tried `ATTEMPTS`
            times and killed its actor each time has a `Failed` for an answer.

        Raises:
            ConfigError: actors cannot start.
            DatakitError: one that an actor raised: the whole cannot go on.
        """
        queue = deque(_Task(list(items)) for items in lists if len(items))
        running: dict[Any, tuple[Team, _Task]] = {}
        while queue or running:
            self.want(sum(len(task.items) for task in queue) if divide else len(queue))
            while queue and self.idle:
                could_work = len(self.idle) + len(self.starting) + self._most - len(self._teams)
                if divide and len(queue) < could_work and len(queue[0].items) > 1:
                    queue.extendleft(reversed(queue.popleft().halves()))
                team, task = self.idle.pop(), queue.popleft()
                running[team.call(method, task.items, alone)] = team, task
            (ready,), _ = self._ray.wait([*self.starting, *running], num_returns=1)
            if ready in self.starting:
                self.started(ready)
                continue
            team, task = running.pop(ready)
            try:
                answers = self.answer(ready)
            except self._ray.exceptions.RayActorError as e:
                self.lose(team)
                if len(task.items) > 1:
                    queue.extendleft(task.halves())
                elif task.tries < ATTEMPTS:
                    queue.append(_Task(task.items, task.tries + 1))
                else:
                    message = f"its process died ({ATTEMPTS} attempts): {' '.join(str(e).split())}"[:500]
                    yield task.items, [Failed(ErrorKind.CRASH, message)]
                continue
            self.idle.append(team)
            if len(answers) != len(task.items):
                raise AssertionError(f"{len(task.items)} went into {method}, {len(answers)} came out")
            yield task.items, answers


@dataclass
class _Task:
    items: list[Any]
    tries: int = 1

    def halves(self) -> list[_Task]:
        middle = (len(self.items) + 1) // 2
        return [_Task(self.items[:middle]), _Task(self.items[middle:])]


def free_port() -> tuple[str, int]:
    """This machine's address, and a port that nobody listens at."""
    import ray

    with socket.socket() as s:
        s.bind(("", 0))
        return ray.util.get_node_ip_address(), s.getsockname()[1]
