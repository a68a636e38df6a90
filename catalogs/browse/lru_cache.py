"""A bounded memory of what was made or looked up lately. Safe to use from several threads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

V = TypeVar("V")


class Recent(Generic[V]):
    """The newest values, up to a total size.

    Args:
        bound: of the sum of sizes.
        size: of a value; 1 each unless given.
        dropped: called with what has to go.
    """

    def __init__(
        self, bound: int, size: Callable[[V], int] = lambda value: 1, dropped: Callable[[V], None] = lambda value: None
    ):
        self._bound, self._size, self._dropped = bound, size, dropped
        self._values: OrderedDict[Hashable, V] = OrderedDict()
        self._total = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> V | None:
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key]

    def put(self, key: Hashable, value: V) -> V:
        with self._lock:
            if key in self._values:
                self._total -= self._size(self._values.pop(key))
            self._values[key] = value
            self._total += self._size(value)
            while self._total > self._bound and len(self._values) > 1:
                _, old = self._values.popitem(last=False)
                self._total -= self._size(old)
                self._dropped(old)
        return value

    def get_or(self, key: Hashable, make: Callable[[], V]) -> V:
        """What is remembered; else what `make` gives (two threads may both make it)."""
        found = self.get(key)
        return found if found is not None else self.put(key, make())
