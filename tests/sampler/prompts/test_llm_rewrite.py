"""Prompts rewritten and motion scores asked for: by an endpoint that answers as it is told, and by a small real
model."""

from __future__ import annotations

import contextlib
import logging
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest

from datakit.errors import ConfigError
from pipelines.llm.engine import EngineDown
from pipelines.settings import LanguageModel
from sampler.prompts.llm_rewrite import AGAIN, check_language_model, motion_in, motion_scores, refine_prompts
from support.faulty_endpoint import FaultyEndpoint, colour_of

pytestmark = pytest.mark.slow

LONG = "A brown dog runs along a wide sandy beach at dawn while low waves roll in and the camera follows beside it."


@pytest.mark.parametrize(
    "answer, score",
    [
        ("5", 5),
        ("5.", 5),
        ("**6**", 6),
        ("Motion score: 3", 3),
        ("I'd give it a 4 out of 7.", 4),
        ("On a scale of 1 to 7, this is a 6.", 6),
        ("4/7", 4),
        ("five", 5),
        ("The score is five", 5),
        ("Score: 5. Two dogs run.", 5),
        ("5 motion score", 5),
        ("“4 motion score”", 4),
        ("<think>maybe 3 or 4</think>5", 5),
        ("The motion score would be 7, since 2 cars crash", 7),
        ("4.0", 4),
        ("score 2, 2", 2),
        ("", None),
        ("lively", None),
        ("4.5", None),
        ("0", None),
        ("8", None),
        ("12", None),
        ("1-7", None),
        ("3,5", None),
        ("-3", None),
        ("It is 3 or 4", None),
        ("one or two", None),
        ("2024", None),
    ],
)
def test_scores_in_answers(answer, score):
    assert motion_in(answer) == score


def at(endpoint: FaultyEndpoint, **options) -> LanguageModel:
    return LanguageModel(backend="openai", model="m", base_url=endpoint.url, patience_s=5, timeout_s=5, **options)


def asked_of(body: dict) -> str:
    """The prompt in a question."""
    content = next(m["content"] for m in body["messages"] if m["role"] == "user")
    text = content if isinstance(content, str) else content[-1]["text"]
    return text.split("<prompt>\n")[-1].split("<description>\n")[-1].split("\n</")[0]


def refusing(number: int, body: dict):
    return (400, {}) if asked_of(body) == "refused" else None


def test_prompts_are_rewritten_or_stay(ray_address, caplog):
    """In the order of the prompts; what the answer has around it goes; braces in a prompt are text."""
    answers = {
        "a dog": f'Here is the rewritten prompt description:\n\n"{LONG}"',
        "a {caption} {cat}": "A cat sits.\n\nIt looks up at {a} bird.",
        "weapons": "I'm sorry, but I can't help with that.",
        "nothing": " ",
        "around": "the sea, " * 80,
        "refused": "never said",
        "same": "same",
    }
    seen = []

    def answer(body):
        seen.append(body)
        return answers[asked_of(body)]

    prompts = list(answers)
    with FaultyEndpoint(refusing, lambda n, body: 0.05 * (n % 3), answer=answer) as endpoint:
        with caplog.at_level(logging.WARNING, "datakit"):
            found = refine_prompts(prompts, at(endpoint), ray=ray_address)
    assert found == [LONG, "A cat sits. It looks up at {a} bird.", *prompts[2:]]
    assert "4 of 7 prompts stay as they are" in caplog.text
    assert all(why in caplog.text for why in ("refusal (1)", "empty (1)", "repetition (1)"))
    assert all("a model that makes videos from text" in body["messages"][0]["content"] for body in seen)
    assert refine_prompts([], at(endpoint), ray=ray_address) == []


def test_prompts_with_pictures_show_them(ray_address):
    """Small, whole, and only those that have one."""
    blue = np.broadcast_to(np.array((10, 40, 200), np.uint8), (576, 1024, 3))
    seen = {}

    def answer(body):
        prompt = asked_of(body)
        seen[prompt] = colour_of(body), body["messages"][0]["content"]
        return f"{LONG} {prompt}."

    with FaultyEndpoint(answer=answer) as endpoint:
        found = refine_prompts(["goes on", "alone"], at(endpoint), [blue, None], ray_address)
    assert found == [f"{LONG} goes on.", f"{LONG} alone."]
    assert seen["goes on"][0] == (10, 40, 200) and "from a picture and a text" in seen["goes on"][1]
    assert seen["alone"][0] == (0, 0, 0) and "from a picture" not in seen["alone"][1]
    with pytest.raises(ValueError):
        refine_prompts(["one", "two"], at(endpoint), [blue], ray_address)


def test_scores_are_asked_for_twice_and_then_taken_as_four(ray_address, caplog):
    first = {"a race": "It races!", "a stone": "1", "a song": "hm", "refused": "", "a walk": "Motion score: 4"}
    second = {"a race": "7", "a song": "really"}
    turns = []

    def answer(body):
        if len(body["messages"]) > 2:
            turns.append([m["content"] for m in body["messages"][2:]])
            return second[asked_of(body)]
        return first[asked_of(body)]

    with FaultyEndpoint(refusing, answer=answer) as endpoint:
        with caplog.at_level(logging.WARNING, "datakit"):
            found = motion_scores(list(first), at(endpoint), ray_address)
    assert found == [7, 1, 4, 4, 4]
    assert sorted(turns) == [["It races!", AGAIN], ["hm", AGAIN]]
    assert "2 of 5 prompts get the motion score 4: no number (1); 400 Bad Request" in caplog.text


def engines() -> set[psutil.Process]:
    """Processes of this test's Ray in which a language model may live."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= {process} if "EngineWorker" in " ".join(process.cmdline()) else set()
    return found


def test_a_real_model_rewrites_and_leaves_nothing_behind(smollm2, ray_address):
    """SmolLM2 (135 M) keeps to the subject; that is all that can be asked of it."""
    options = LanguageModel(backend="transformers", model=str(smollm2), dtype="float32", max_tokens=24, threads=1)
    before, during = engines(), set()
    with ThreadPoolExecutor() as pool:
        work = pool.submit(refine_prompts, ["a brown dog runs along the beach"], options, (), ray_address)
        while not work.done():
            during |= engines() - before
            time.sleep(0.2)
    (found,) = work.result()
    assert "dog" in found.lower() and found != "a brown dog runs along the beach" and "\n" not in found
    assert during
    psutil.wait_procs(during, timeout=10)
    assert not [process for process in during if process.is_running()], "its memory is free"
    (score,) = motion_scores(["a stone lies on a table"], options, ray_address)
    assert score in range(1, 5)


def test_a_model_that_takes_no_pictures_says_so(smollm2, ray_address):
    options = LanguageModel(backend="transformers", model=str(smollm2))
    with pytest.raises(EngineDown, match="takes text only"):
        refine_prompts(["a dog"], options, [np.zeros((32, 32, 3), np.uint8)], ray_address)


def test_what_is_missing_is_told_before_anything_starts(tmp_path):
    for options, said in (
        ({}, "llm.model=NAME"),
        ({"backend": "openai", "model": "m"}, "llm.base_url="),
        ({"model": str(tmp_path / "no")}, "cannot start: .*datakit models"),
    ):
        chosen = LanguageModel(**{"backend": "transformers", **options})
        with pytest.raises(ConfigError, match=said):
            check_language_model(chosen)
        with pytest.raises(ConfigError, match=said):
            refine_prompts(["a dog"], chosen, ray="local")
