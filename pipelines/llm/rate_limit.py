"""When the next request to an endpoint may go, and how long to believe in an endpoint that fails."""

from __future__ import annotations

import random
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 15.0
LONGEST_REST_S = 24 * 3600.0


class Pace:
    """Shared by all requests to an endpoint; the caller locks. Times are those of `time.monotonic`.

    Args:
        per_minute: requests, spread evenly; None: as many as there are.
        patience_s: how long everything may fail.
    """

    def __init__(self, per_minute: float | None, patience_s: float):
        self._interval_s = 60.0 / per_minute if per_minute else 0.0
        self._patience_s = patience_s
        self._next = 0.0
        self._failing_since: float | None = None
        self.problem = ""
        """What failed last."""

    def wait_s(self, now: float) -> float:
        """Until a request may go."""
        return max(0.0, self._next - now)

    def took(self, now: float) -> None:
        """A request goes now."""
        self._next = max(self._next, now + self._interval_s)

    def pause(self, until: float) -> None:
        """The endpoint wants rest: from everybody, since its limits are on the sum of all requests."""
        self._next = max(self._next, until)

    def answered(self) -> None:
        self._failing_since = None

    def failed(self, now: float, problem: str) -> None:
        self.problem = problem
        if self._failing_since is None:
            self._failing_since = now

    def is_over(self, now: float) -> bool:
        """Whether nothing was answered for longer than patience lasts."""
        return self._failing_since is not None and now - self._failing_since >= self._patience_s


def delay_s(tries: int) -> float:
    """Before the next try of what has failed so often: exponential, with jitter that keeps retries from marching in
    step."""
    return min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(tries - 1, 16)) * random.uniform(0.5, 1.0)


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """The wait that a reply asks for: `Retry-After` in seconds or as a date (RFC 9110, 10.2.3), `retry-after-ms`."""
    try:
        seconds = (
            float(headers["retry-after-ms"]) / 1000 if "retry-after-ms" in headers else float(headers["retry-after"])
        )
    except KeyError:
        return None
    except ValueError:
        seconds = _until(headers.get("retry-after", ""))
    return seconds if seconds is None else min(max(0.0, seconds), LONGEST_REST_S)


def _until(text: str) -> float | None:
    """Seconds until an HTTP date; None: it is none."""
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return (date - datetime.now(UTC)).total_seconds()
