"""An endpoint that describes walls by their colour: late, out of order, and after failures."""

from __future__ import annotations

import json
import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from support.faulty_endpoint import RESET, Fault, FaultyEndpoint, colour_of

WORDS = re.compile(r"colour (\d+) (\d+) (\d+)")
FAULTS: tuple[Fault, ...] = ((500, {}), (429, {"Retry-After": "0.2"}), RESET)
Colour = tuple[int, int, int]


def describe(colour: Colour, messages: list[dict]) -> str:
    return (
        f"A wall of colour {colour[0]} {colour[1]} {colour[2]} fills the frame while a lamp in the corner flickers "
        f"and the camera "
        "stays where it is."
    )


class Describer:
    """What the endpoint does.

    Args:
        fails: share of questions whose first try fails, in one of three ways.
        delay_s: longest time for an answer; each takes a random part of it.
        say: makes the answer from the colour of the first picture and the messages.
    """

    def __init__(self, fails: float, delay_s: float, say: Callable[[Colour, list[dict]], str]):
        self.say = say
        self.answered: Counter[str] = Counter()
        self.failed = 0
        self._fails, self._delay_s = fails, delay_s
        self._seen: set[str] = set()
        self._random = random.Random(3)
        self._lock = threading.Lock()

    def delay(self, number: int, body: dict) -> float:
        with self._lock:
            return self._random.random() * self._delay_s

    def fault(self, number: int, body: dict) -> Fault | None:
        with self._lock:
            question, chance = json.dumps(body), self._random.random()
            first = question not in self._seen
            self._seen.add(question)
            if not first or chance >= self._fails:
                return None
            self.failed += 1
            return FAULTS[self.failed % len(FAULTS)]

    def answer(self, body: dict) -> str:
        text = self.say(colour_of(body), body["messages"])
        self.answered[text] += 1
        return text


@contextmanager
def running(
    fails: float = 0.0, delay_s: float = 0.0, say: Callable[[Colour, list[dict]], str] = describe
) -> Iterator[Describer]:
    """The endpoint, at its `url`."""
    describer = Describer(fails, delay_s, say)
    with FaultyEndpoint(describer.fault, describer.delay, answer=describer.answer) as server:
        describer.url = server.url
        yield describer
