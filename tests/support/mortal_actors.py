"""Actors for `pipelines.executor.actor_pool` that die, and that tell who did what. Imported by name in workers."""

from __future__ import annotations

import os

from datakit.errors import ConfigError
from datakit.version import __version__
from pipelines.executor.actor_pool import Member, free_port

FATAL = 13
REFUSED = -1


class Squarer:
    """Dies of `FATAL`, and says that nothing makes sense any more on `REFUSED`."""

    def __init__(self, where: str = ""):
        self._where = where
        self._member: Member | None = None

    def version(self) -> str:
        if self._where and len(os.listdir(self._where)) < 2:  # the first two do not get as far as to work
            open(os.path.join(self._where, str(os.getpid())), "x").close()
            os._exit(1)
        return __version__

    def free_port(self) -> tuple[str, int]:
        return free_port()

    def join(self, member: Member) -> None:
        self._member = member

    def square(self, numbers: list[int]) -> list[int]:
        if FATAL in numbers:
            os._exit(1)
        if REFUSED in numbers:
            raise ConfigError("refused")
        return [number**2 for number in numbers]

    def lose_one(self, numbers: list[int]) -> list[int]:
        return numbers[1:]

    def who(self, numbers: list[int]) -> list[tuple[int, int]]:
        """This process, and how many are in its group."""
        return [(os.getpid(), self._member.size if self._member else 1) for _ in numbers]


class Unstartable:
    def version(self) -> str:
        os._exit(1)


class Stranger:
    def version(self) -> str:
        return "0.0.0"
