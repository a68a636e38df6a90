"""Prompts written out, and motion scores guessed, by a language model (settings `llm`).

The model runs in a Ray actor that ends with the work, so that its memory is free for what comes after.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from datakit.process.messages import ToolSpec
from datakit.video.frame import fit
from pipelines.captioning import language_model
from pipelines.captioning.boilerplate import without_thoughts
from pipelines.captioning.caption_quality import UNUSABLE, judge
from pipelines.captioning.captioner import STALL_S, Desk
from pipelines.captioning.language_model import engine_options
from pipelines.captioning.prompt_templates import Prompt as Form
from pipelines.captioning.prompt_templates import load_prompt
from pipelines.executor.flow import Flow
from pipelines.executor.flow_setup import ROWS_ONLY, language_model_pool
from pipelines.executor.session import RaySession
from pipelines.llm.engine import Reply, Request
from pipelines.settings import LanguageModel
from pipelines.video_tasks.passthrough import RowJob

log = logging.getLogger("datakit")
FORMS = Path(__file__).parent / "rewriting"
PROMPTS_A_JOB = 8
SIDE = 448
"""Longer side of a picture that the model is shown, pixels: as in `caption.side`."""
MOTION = range(1, 8)
"""Scores that the model chooses from: those that Open-Sora 2.0's README shows videos of."""
DEFAULT_MOTION = 4
"""Open-Sora 2.0's (its README)."""
AGAIN = f"Answer with one whole number from {MOTION[0]} to {MOTION[-1]}, and nothing else."


def refine_prompts(
    prompts: Sequence[str],
    options: LanguageModel,
    pictures: Sequence[np.ndarray | None] = (),
    ray: str = "local",
) -> list[str]:
    """Each prompt as a detailed caption of the kind that video models are trained on. Those whose rewrite is empty, a
    refusal, goes round in circles or failed stay as they are, and their number is logged.

    Args:
        pictures: uint8 [h, w, 3] that a video goes on from, for each prompt one or None; empty: none at all.

    Raises:
        ConfigError: see `check_language_model`.
        EngineDown: the model cannot be started (for example because it takes no pictures), or the endpoint stays away.
    """
    shown = [None if p is None else _small(p) for p in pictures] or [None] * len(prompts)
    forms = [_form("refine_t2v" if picture is None else "refine_i2v") for picture in shown]
    asked = [_row(form, prompt, picture) for form, prompt, picture in zip(forms, prompts, shown, strict=True)]
    verdicts = [_rewrite(answer, form) for answer, form in zip(_ask(asked, options, ray), forms, strict=True)]
    kept = Counter(reason for text, reason in verdicts if text is None)
    if kept:
        log.warning("%d of %d prompts stay as they are: %s", kept.total(), len(prompts), _listed(kept))
    return [prompt if text is None else text for prompt, (text, _) in zip(prompts, verdicts)]


def motion_scores(prompts: Sequence[str], options: LanguageModel, ray: str = "local") -> list[int]:
    """How much should move in the video of each prompt, 1 to 7. A model that answers without such a number is asked
    once more; then it is `DEFAULT_MOTION`, and how often is logged.

    Raises:
        ConfigError, EngineDown: see `refine_prompts`.
    """
    form = _form("motion")
    answers = _ask([_row(form, prompt, None) for prompt in prompts], options, ray, insist=True)
    scores = [None if answer.error is not None else motion_in(answer.text) for answer in answers]
    lacking = Counter(
        "no number" if answer.error is None else answer.error for answer, score in zip(answers, scores) if score is None
    )
    if lacking:
        log.warning(
            "%d of %d prompts get the motion score %d: %s",
            lacking.total(),
            len(prompts),
            DEFAULT_MOTION,
            _listed(lacking),
        )
    return [DEFAULT_MOTION if score is None else score for score in scores]


def check_language_model(options: LanguageModel) -> None:
    """What can be seen to be missing before anything starts.

    Raises:
        ConfigError: which of library, model or endpoint, and how to bring it.
    """
    language_model.check_language_model(options, "llm", what="language model")


_SCALE = re.compile(r"\b1\s*(?:to|through|and|-|–|—|\.\.\.?|…)\s*7\b|(?:/|\bout\s+of)\s*7\b", re.I)
_FIGURE = r"(?<![\w.,-])\d+(?:\.0+)?(?![\w]|[.,]\d)"
_BESIDE_SCORE = re.compile(
    rf"\bscore\b\W*(?:(?:is|of|be|would|should|as)\W+)*({_FIGURE})|({_FIGURE})\W{{0,4}}motion\s+score", re.I
)
_WORDS = ("one", "two", "three", "four", "five", "six", "seven")
_WORD = re.compile(rf"\b(?:{'|'.join(_WORDS)})\b", re.I)


def motion_in(answer: str) -> int | None:
    """The score in a model's answer: the number beside the word score, else the only one that there is; None: there is
    none, there are several, or it lies outside of the scale."""
    text = _SCALE.sub(" ", without_thoughts(answer))
    for found in (
        {figure for match in _BESIDE_SCORE.findall(text) for figure in match if figure},
        set(re.findall(_FIGURE, text)),
        {str(_WORDS.index(word.lower()) + 1) for word in _WORD.findall(text)},
    ):
        values = {float(figure) for figure in found}
        if values:
            value = values.pop()
            return int(value) if not values and value in MOTION else None
    return None


@dataclass(frozen=True)
class Answer:
    """What came back. `error`: why nothing did."""

    text: str = ""
    finish: str = "stop"
    error: str | None = None


class Clerk:
    """Asks a language model; runs in an actor (`pipelines.executor.actors.EngineWorker`).

    Args:
        options: of the engine, see `pipelines.captioning.captioner.Captioner`.
        insist: ask again for a motion score where there is none.
        stall_s: see `Desk`.
    """

    def __init__(self, options: dict, insist: bool, stall_s: float):
        self._desk = Desk(options, stall_s)
        self._insist = insist

    def run(self, rows: Sequence[dict], images: Sequence) -> list[dict[str, Answer]]:
        """`answer` to each row.

        Args:
            rows: see `_row`.
            images: none: pictures are in the rows.
        """
        requests = [
            Request(
                row["key"], row["prompt"], row["system"], () if row["picture"] is None else (row["picture"],), (0.0,)
            )
            for row in rows
        ]
        replies = self._desk.ask(requests)
        second = self._ask_again(requests, replies) if self._insist else {}
        last = [second.get(reply.key, reply) for reply in replies]
        return [{"answer": Answer(reply.text, reply.finish, reply.error)} for reply in last]

    def _ask_again(self, requests: Sequence[Request], replies: Sequence[Reply]) -> dict[str, Reply]:
        again = {
            reply.key: replace(request, key=f"{request.key}/again", turns=(("assistant", reply.text), ("user", AGAIN)))
            for request, reply in zip(requests, replies)
            if reply.error is None and motion_in(reply.text) is None
        }
        return dict(zip(again, self._desk.ask(list(again.values()))))


def _ask(rows: Sequence[dict], options: LanguageModel, ray: str, insist: bool = False) -> list[Answer]:
    """An answer to each row, in their order."""
    check_language_model(options)
    if not rows:
        return []
    keyed = [{**row, "key": str(number)} for number, row in enumerate(rows)]
    session = RaySession(ray)
    with session:
        flow = _flow(session, options, insist, any(row["picture"] is not None for row in rows))
        try:
            outcomes = [outcome for outcome in flow.run(_jobs(keyed)) if outcome is not None]
        finally:
            flow.close()
    found = {
        row["key"]: row["answer"] or Answer(error=row["errors"][0]["message"])
        for outcome in outcomes
        for row in outcome.rows
    }
    lost = next((outcome.failure.message for outcome in outcomes if outcome.failure is not None), "lost")
    return [found.get(row["key"], Answer(error=lost)) for row in keyed]


def _flow(session: RaySession, options: LanguageModel, insist: bool, pictured: bool) -> Flow:
    engine = engine_options(options) | ({"frames": 1, "side": SIDE} if pictured else {})
    spec = ToolSpec("sampler.prompts.llm_rewrite:Clerk", {"options": engine, "insist": insist, "stall_s": STALL_S})
    return Flow(
        session, ROWS_ONLY, [language_model_pool("llm", spec, ("answer",), options, session.gpus(), False)], workers=1
    )


def _jobs(rows: Sequence[dict]) -> Iterator:
    for start in range(0, len(rows), PROMPTS_A_JOB):
        part = RowJob(tuple(rows[start : start + PROMPTS_A_JOB]))
        yield str(start), lambda threads, part=part: part


def _row(form: Form, prompt: str, picture: np.ndarray | None) -> dict:
    return {"prompt": form.render(caption=prompt.strip()), "system": form.system, "picture": picture}


def _rewrite(answer: Answer, form: Form) -> tuple[str | None, str]:
    """The rewritten prompt; or None, and why not."""
    if answer.error is not None:
        return None, answer.error
    verdict = judge(answer.text, answer.finish, form, None)
    unusable = [flag for flag in verdict.flags if flag in UNUSABLE]
    return (None, unusable[0]) if unusable else (" ".join(verdict.text.split()), "")


def _form(name: str) -> Form:
    return load_prompt(str(FORMS / f"{name}.md"))


def _small(picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape[:2]
    size = fit(width, height, SIDE)
    return (
        np.ascontiguousarray(picture)
        if size == (width, height)
        else cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    )


def _listed(reasons: Counter[str]) -> str:
    return "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3))
