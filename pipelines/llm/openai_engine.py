"""Any endpoint that speaks OpenAI's /v1/chat/completions: many requests at once, and patience with its failures."""

from __future__ import annotations

import base64
import heapq
import os
import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.llm.chat_messages import conversation, one_line
from pipelines.llm.engine import EngineDown, Reply, Request
from pipelines.llm.rate_limit import Pace, delay_s, retry_after_s

STEP_S = 1.0
FATAL = (401, 403, 404)
"""Key refused, key not allowed to, no such model or address: the next request would fare no better."""
PASSING = (408, 409, 429)
"""Besides all 5xx: statuses that another try may change."""


@dataclass(order=True)
class _Job:
    """A request that waits for its turn; the order is that of turns."""

    due: float
    number: int
    request: Request = field(compare=False)
    tries: int = field(default=0, compare=False)
    last: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class _Failure:
    """A try that came to nothing.

    Attributes:
        rest_s: rest that the endpoint asks for.
        throttled: too many requests; asks for rest even if it does not say how long.
        own: whether it may be the request's own fault.
    """

    problem: str
    rest_s: float | None = None
    throttled: bool = False
    own: bool = True


class OpenaiEngine:
    """One thread per request under way, `max_num_seqs` at most; requests that failed wait outside of the threads.

    A request is tried again as long as the endpoint answers others. When for `patience_s` it has answered nothing, it
    gets one small question: if it fails that too, the engine is down; if not, what keeps failing has one last try.

    Raises:
        EngineDown: address or name of the model are missing.
    """

    takes_video = False

    def __init__(self, options: Mapping[str, Any]):
        for name, example in (("base_url", "http://HOST:8000/v1"), ("model", "the endpoint's name for it")):
            if not options[name]:
                raise EngineDown(f"backend openai needs {name} ({example})")
        from openai import OpenAI

        self._options = options
        key = os.environ.get(options["api_key_env"]) or "EMPTY"  # servers of one's own want none, the client does
        self._client = OpenAI(base_url=options["base_url"], api_key=key, max_retries=0, timeout=options["timeout_s"])
        self._pace = Pace(options["requests_per_minute"], options["patience_s"])
        self._changed = threading.Condition()
        self._jobs: list[_Job] = []
        self._threads: list[threading.Thread] = []
        self._probe: threading.Thread | None = None
        self._closed = False
        self._added = self._returned = 0
        self._outbox: queue.SimpleQueue[Reply | EngineDown] = queue.SimpleQueue()

    def add(self, request: Request) -> None:
        with self._changed:
            self._added += 1
            heapq.heappush(self._jobs, _Job(time.monotonic(), self._added, request))
            self._changed.notify()
        if len(self._threads) < self._options["max_num_seqs"]:
            self._threads.append(self._spawn(self._work))

    def step(self) -> list[Reply]:
        replies = self._collect()
        if not replies:
            self._check_patience()
        return replies

    def close(self) -> None:
        """Returns at once: requests under way end with their threads, which nothing waits for."""
        with self._changed:
            self._closed = True
            self._jobs.clear()
            self._changed.notify_all()
        self._client.close()

    def _collect(self) -> list[Reply]:
        """Replies that are ready; waits for the first one if there is something to wait for."""
        replies: list[Reply] = []
        try:
            while True:
                wait_s = 0.0 if replies or self._returned == self._added else STEP_S
                reply = self._outbox.get(timeout=wait_s) if wait_s else self._outbox.get_nowait()
                if isinstance(reply, EngineDown):
                    self._outbox.put(reply)  # for the steps to come
                    if not replies:
                        raise reply
                    return replies
                replies.append(reply)
                self._returned += 1
        except queue.Empty:
            return replies

    def _spawn(self, target) -> threading.Thread:
        thread = threading.Thread(
            target=target, daemon=True, name="openai"
        )  # daemon: the process may end before the reply
        thread.start()
        return thread

    def _work(self) -> None:
        """A thread's life: take the next job, ask, settle."""
        while (job := self._next_job()) is not None:
            outcome = self._ask(job.request)
            with self._changed:
                self._settle(job, outcome)

    def _next_job(self) -> _Job | None:
        """The next one, when its time has come; None: closed."""
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                wait_s = max(self._jobs[0].due - now, self._pace.wait_s(now)) if self._jobs else None
                if wait_s is not None and wait_s <= 0:
                    self._pace.took(now)
                    return heapq.heappop(self._jobs)
                self._changed.wait(wait_s)
        return None

    def _settle(self, job: _Job, outcome: Reply | _Failure | EngineDown) -> None:
        if self._closed:
            return
        if not isinstance(outcome, _Failure):
            if isinstance(outcome, Reply):
                self._pace.answered()
            else:
                self._jobs.clear()
            self._outbox.put(outcome)
        elif job.last and outcome.own:
            self._outbox.put(
                Reply(job.request.key, error=f"failed {job.tries + 1} times, while others did not: {outcome.problem}")
            )
        else:
            self._put_off(job, outcome)

    def _put_off(self, job: _Job, failure: _Failure) -> None:
        """Another try, later."""
        now = time.monotonic()
        job.tries += 1
        job.due = now + delay_s(job.tries)
        job.last = False
        self._pace.failed(now, failure.problem)
        if failure.rest_s is not None:
            self._pace.pause(now + failure.rest_s)
        elif failure.throttled:
            self._pace.pause(job.due)
        heapq.heappush(self._jobs, job)
        self._changed.notify()

    def _check_patience(self) -> None:
        with self._changed:
            if self._probe is None and self._pace.is_over(time.monotonic()):
                self._probe = self._spawn(self._ask_small)

    def _ask_small(self) -> None:
        """Is it the endpoint, or is it the requests?"""
        with self._changed:
            failing = [job for job in self._jobs if job.tries]
        pictured = any(len(job.request.frames) for job in failing)
        outcome = self._ask(_small_question(pictured), max_tokens=8)
        with self._changed:
            if isinstance(outcome, Reply) and outcome.error is None:
                self._pace.answered()
                for job in self._jobs:
                    if job.tries:
                        job.due, job.last = time.monotonic(), True
                heapq.heapify(self._jobs)
                self._probe = None
                self._changed.notify_all()
            else:
                self._outbox.put(
                    self._down(f"nothing answered for {self._options['patience_s']:g} s; last: {self._pace.problem}")
                )

    def _ask(self, request: Request, **changes: Any) -> Reply | _Failure | EngineDown:
        """One try."""
        import openai

        try:
            options: Any = {"messages": _messages(request), **_sampling(self._options), **changes}
            completion = self._client.chat.completions.create(model=self._options["model"], **options)
            return _reply(request.key, completion)
        except openai.APIStatusError as e:
            return self._refusal(request.key, e)
        except openai.APIConnectionError as e:  # timeouts too
            cause = f" ({one_line(e.__cause__)})" if e.__cause__ else ""
            return _Failure(one_line(e).rstrip(".") + cause, own=isinstance(e, openai.APITimeoutError))
        except Exception as e:  # a reply that is none: a proxy's web page, half a text
            return _Failure(f"{type(e).__name__}: {one_line(e)}")

    def _refusal(self, key: str, error) -> Reply | _Failure | EngineDown:
        """What a status other than 200 means."""
        status = error.status_code
        problem = f"{status} {error.response.reason_phrase}: {_said(error)}"
        if status in FATAL:
            with_key = (
                f" (key from {self._options['api_key_env']})" if status != 404 else f" (model {self._options['model']})"
            )
            return self._down(problem + with_key)
        if status not in PASSING and status < 500:
            return Reply(key, error=problem)
        return _Failure(
            problem, retry_after_s(error.response.headers), throttled=status == 429, own=status not in (429, 503)
        )

    def _down(self, problem: str) -> EngineDown:
        return EngineDown(f"endpoint {self._options['base_url']}: {problem}")


def _messages(request: Request) -> list[dict[str, Any]]:
    return conversation(
        request, [{"type": "image_url", "image_url": {"url": _data_url(frame)}} for frame in request.frames]
    )


def _data_url(frame) -> str:
    """A frame as PNG, which is lossless: the endpoint sees the pixels that other backends see."""
    import cv2

    done, png = cv2.imencode(".png", frame[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])
    assert done
    return f"data:image/png;base64,{base64.b64encode(png.tobytes()).decode()}"


def _sampling(options: Mapping[str, Any]) -> dict[str, Any]:
    sampling = {"max_tokens": options["max_tokens"], "temperature": options["temperature"]}
    if options["temperature"] > 0:  # greedy needs no more, and not every endpoint knows a seed
        sampling |= {"top_p": options["top_p"], "seed": options["seed"]}
    return sampling


def _reply(key: str, completion) -> Reply:
    choice = completion.choices[0]
    text, refusal = choice.message.content, getattr(choice.message, "refusal", None)
    if choice.finish_reason not in ("stop", "length") or refusal:
        return Reply(key, error=f"the endpoint ended it: {refusal or choice.finish_reason}")
    usage = completion.usage
    return Reply(
        key,
        text=text or "",
        finish=choice.finish_reason,
        input_tokens=usage.prompt_tokens if usage else 0,
        output_tokens=usage.completion_tokens if usage else 0,
    )


def _said(error) -> str:
    """The endpoint's own words; servers wrap them differently."""
    body = error.body
    inner = body.get("error", body) if isinstance(body, dict) else body
    said = inner.get("message", inner) if isinstance(inner, dict) else inner
    return one_line(said or "no message")


def _small_question(pictured: bool) -> Request:
    import numpy as np

    frames = (np.full((64, 64, 3), 128, np.uint8),) if pictured else ()
    return Request("small", "Describe this in one word.", frames=frames, times=(0.0,) * len(frames))
