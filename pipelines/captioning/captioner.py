"""Texts about clips: builds the questions, sends them through a language model, judges the answers.

Runs in an actor of its own, in which many calls ask at once while one thread works the engine: so requests
of different clips are batched continuously, and a slow answer holds back only its own clip.
"""

from __future__ import annotations

import itertools
import os
import queue
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

import numpy as np

from datakit.errors import ErrorKind
from pipelines.captioning.caption_quality import judge, parse_structured, retry_message
from pipelines.captioning.prompt_templates import Prompt
from pipelines.llm.engine import Engine, EngineDown, Reply, Request, make_engine

STALL_S = 900.0
"""Seconds without one answer after which a language model is started anew; loading and compiling are before."""


@dataclass(frozen=True)
class Question:
    """One text wanted of every clip.

    Attributes:
        style: under which it is kept.
        prompt: what is asked.
        fingerprint: of prompt, model, frames and sampling; kept with the answer.
    """

    style: str
    prompt: Prompt
    fingerprint: str


class Captioner:
    """Answers clips.

    Args:
        options: of the engine (`settings.LanguageModel`); `model` is where it lies, `name` what it is called.
        questions: by style.
        language: that answers must be in; None: any.
        as_video: whether frames go in as video where the engine takes it.
        stall_s: seconds without any progress after which the process gives itself up.
    """

    def __init__(
        self, options: dict, questions: dict[str, Question], language: str | None, as_video: bool, stall_s: float
    ):
        self._name, self._backend = options["name"], options["backend"]
        self._questions = questions
        self._language = language
        self._desk = Desk(options, stall_s)
        self._as_video = as_video and self._desk.takes_video
        self._numbers = itertools.count()

    def run(self, rows: Sequence[dict], images: Sequence[Sequence[np.ndarray]]) -> list[dict[str, object]]:
        """`captions` of each clip: for each of the row's `styles` a dict of columns of the table; None for a clip that
        came with errors.

        Args:
            rows: clip_id, styles, errors, and what the prompts have places for.
            images: uint8 RGB [h, w, 3] of each clip, in order of time.
        """
        asked = [
            (number, self._questions[style], self._request(row, frames, self._questions[style]))
            for number, (row, frames) in enumerate(zip(rows, images))
            if not row["errors"]
            for style in row["styles"]
        ]
        replies = self._desk.ask([request for _, _, request in asked])
        answers: list[dict] = [{"captions": None if row["errors"] else []} for row in rows]
        second = self._ask_again(asked, replies)
        for (number, question, request), reply in zip(asked, replies, strict=True):
            answers[number]["captions"].append(self._caption(question, second.get(request.key, reply), rows[number]))
        return answers

    def _request(self, row: dict, frames: Sequence[np.ndarray], question: Question) -> Request:
        return Request(
            key=f"{row['clip_id']}/{question.style}/{next(self._numbers)}",
            prompt=question.prompt.render(**row["facts"]),
            system=question.prompt.system,
            frames=tuple(frames),
            times=tuple(row.get("times", ())),
            duration_s=row.get("duration_s", 0.0),
            as_video=self._as_video and len(frames) > 1,
        )

    def _ask_again(self, asked: list[tuple[int, Question, Request]], replies: list[Reply]) -> dict[str, Reply]:
        """Structured answers that do not fit the schema get one more try, with the error."""
        again: dict[str, Request] = {}
        for (_, question, request), reply in zip(asked, replies):
            if question.prompt.schema and reply.error is None:
                _, problem = parse_structured(reply.text, question.prompt.schema)
                if problem:
                    turns = (("assistant", reply.text), ("user", retry_message(problem)))
                    again[request.key] = replace(request, key=f"{request.key}/again", turns=turns)
        answers = dict(zip(again, self._desk.ask(list(again.values()))))
        return {key: reply for key, reply in answers.items() if reply.error is None}

    def _caption(self, question: Question, reply: Reply, row: dict) -> dict[str, object]:
        common = {
            "style": question.style,
            "model": self._name,
            "backend": self._backend,
            "prompt_hash": question.prompt.hash,
            "fingerprint": row.get("fingerprint") or question.fingerprint,
            "made_from": row.get("made_from"),
            "input_tokens": reply.input_tokens,
            "output_tokens": reply.output_tokens,
        }
        if reply.error is not None:
            return {
                **common,
                "text": None,
                "original": None,
                "flags": [],
                "error_kind": str(ErrorKind.STAGE),
                "error": reply.error[:500],
            }
        verdict = judge(reply.text, reply.finish, question.prompt, self._language)
        return {
            **common,
            "text": verdict.text,
            "original": verdict.original,
            "flags": sorted(verdict.flags),
            "error_kind": None,
            "error": None,
        }


class Desk:
    """Where calls leave requests and wait for replies, while one thread makes and works the engine.

    Raises:
        EngineDown: the engine cannot be made (here), or can answer nothing any more (from `ask`).
    """

    def __init__(self, options: dict, stall_s: float):
        self._inbox: queue.SimpleQueue[tuple[Request, Future]] = queue.SimpleQueue()
        self._waiting: dict[str, Future] = {}
        self._down: BaseException | None = None
        self._progress = time.monotonic()
        self._stall_s = stall_s
        made: Future = Future()
        threading.Thread(target=self._work, args=(options, made), name="engine", daemon=True).start()
        self.takes_video: bool = made.result()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def ask(self, requests: Iterable[Request]) -> list[Reply]:
        """Replies in the order of the requests; waits for all."""
        futures = []
        for request in requests:
            if self._down is not None:
                raise self._down
            futures.append(Future())
            self._inbox.put((request, futures[-1]))
        return [future.result() for future in futures]

    def _work(self, options: dict, made: Future) -> None:
        try:
            engine = make_engine(options)
        except BaseException as e:  # whatever it is, the caller of the constructor gets it
            made.set_exception(e)
            return
        made.set_result(engine.takes_video)
        try:
            while True:
                self._take_in(engine)
                for reply in engine.step() if self._waiting else ():
                    self._progress = time.monotonic()
                    self._waiting.pop(reply.key).set_result(reply)
        except BaseException as e:  # every call that waits gets it
            self._down = (
                e
                if isinstance(e, EngineDown)
                else EngineDown(f"the language model failed: {type(e).__name__}: {e}"[:500])
            )
            self._refuse_all()

    def _take_in(self, engine: Engine) -> None:
        """Hand new requests to the engine; wait for one when there is nothing else to do."""
        while not self._waiting or not self._inbox.empty():
            request, future = self._inbox.get()
            self._progress = time.monotonic()
            self._waiting[request.key] = future
            engine.add(request)

    def _refuse_all(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            future.set_exception(self._down)
        while True:  # also those that come after this
            _, future = self._inbox.get()
            future.set_exception(self._down)

    def _watch(self) -> None:
        """An engine that hangs takes its process with it: the actor's calls are then made again elsewhere."""
        while True:
            time.sleep(1.0)
            if self._waiting and time.monotonic() - self._progress > self._stall_s:
                os._exit(70)
