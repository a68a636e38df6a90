"""What an endpoint may do to requests: none is lost, none is answered by another's answer."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate

import numpy as np
import pytest

from pipelines.llm import rate_limit
from pipelines.llm.engine import EngineDown, Reply, Request, make_engine
from pipelines.llm.rate_limit import retry_after_s
from support import vlm
from support.faulty_endpoint import RESET, FaultyEndpoint


def colours(count: int) -> tuple[list[Request], dict[str, str]]:
    """Requests for the colour of a picture each, and the answers."""
    tones = [(5 * i % 256, 11 * i % 256, 17 * i % 256) for i in range(count)]
    asked = [
        Request(f"colour {i}", "Which colour?", frames=[vlm.picture(tone)], times=[0.0], duration_s=1.0)
        for i, tone in enumerate(tones)
    ]
    return asked, {f"colour {i}": "{} {} {}".format(*tone) for i, tone in enumerate(tones)}


def test_endpoint_replies_out_of_order_and_at_once():
    asked, answers = colours(40)
    ten = threading.Barrier(10, timeout=60)

    def delay(number, body):
        if number <= 10:
            ten.wait()
        return 0.4 - 0.04 * (number % 10)

    with FaultyEndpoint(delay_s=delay) as endpoint:
        engine = vlm.at_endpoint(endpoint.url, max_num_seqs=10)
        replies = vlm.ask(engine, asked)
        engine.close()
    assert vlm.texts(replies) == answers
    assert list(replies) != list(answers) and endpoint.most == 10
    assert (replies["colour 0"].input_tokens, replies["colour 0"].output_tokens, replies["colour 0"].finish) == (
        7,
        3,
        "stop",
    )


def test_endpoint_that_fails_half_of_the_time_loses_nothing(monkeypatch):
    monkeypatch.setattr(rate_limit, "LONGEST_DELAY_S", 1.0)
    faults = [
        (500, {}),
        (429, {"Retry-After": "0.2"}),
        RESET,
        (503, {"Retry-After": formatdate(usegmt=True)}),
        (429, {}),
        (408, {}),
    ]
    asked, answers = colours(40)
    with FaultyEndpoint(
        fault=lambda number, body: faults[number // 2 % len(faults)] if number % 2 else None
    ) as endpoint:
        engine = vlm.at_endpoint(endpoint.url, max_num_seqs=8)
        assert vlm.texts(vlm.ask(engine, asked)) == answers
        engine.close()
    assert len(endpoint.times) >= 79  # every other one failed


def test_one_429_lets_everybody_rest():
    asked, answers = colours(12)
    with FaultyEndpoint(fault=lambda number, body: (429, {"Retry-After": "2"}) if number == 4 else None) as endpoint:
        engine = vlm.at_endpoint(endpoint.url, max_num_seqs=1)
        assert vlm.texts(vlm.ask(engine, asked)) == answers
        engine.close()
    gaps = np.diff(endpoint.times)
    assert gaps[3] > 1.95 and np.delete(gaps, 3).max() < 1.0


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "12"}, 12.0),
        ({"retry-after-ms": "250"}, 0.25),
        ({}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": formatdate(0, usegmt=True)}, 0.0),
        ({"retry-after": "inf"}, 86400.0),
    ],
)
def test_retry_after_is_seconds_or_a_date(headers, seconds):
    assert retry_after_s(headers) == seconds
    in_a_while = formatdate(time.time() + 30, usegmt=True)
    assert retry_after_s({"retry-after": in_a_while}) == pytest.approx(30, abs=2)


def test_requests_per_minute_are_held():
    asked, answers = colours(13)
    with FaultyEndpoint() as endpoint:
        engine = vlm.at_endpoint(endpoint.url, max_num_seqs=8, requests_per_minute=240)
        assert vlm.texts(vlm.ask(engine, asked)) == answers
        engine.close()
    gaps = np.diff(endpoint.times)
    assert endpoint.times[-1] - endpoint.times[0] >= 12 * 0.25 - 0.05 and np.median(gaps) > 0.2


def test_endpoint_refuses_one_request():
    asked, answers = colours(6)
    bad = Request("bad", "refuse me")
    with FaultyEndpoint(
        fault=lambda number, body: (400, {}) if body["messages"][-1]["content"] == "refuse me" else None
    ) as endpoint:
        engine = vlm.at_endpoint(endpoint.url)
        replies = vlm.ask(engine, [bad, *asked])
        engine.close()
    assert replies.pop("bad") == Reply("bad", error="400 Bad Request: told to fail with 400")
    assert vlm.texts(replies) == answers and len(endpoint.times) == 7


def test_a_request_that_alone_breaks_the_endpoint_is_given_up():
    """The endpoint fails everything for as long as patience lasts, yet answers a small question: it is the request."""
    asked, answers = colours(6)
    bad = Request("bad", "break", frames=asked[0].frames, times=[0.0], duration_s=1.0)

    def fault(number, body):
        return (500, {}) if body["messages"][-1]["content"][-1]["text"] == "break" else None

    with FaultyEndpoint(fault) as endpoint:
        engine = vlm.at_endpoint(endpoint.url, patience_s=2.0)
        replies = vlm.ask(engine, [bad, *asked])
        engine.close()
    assert "while others did not: 500" in replies.pop("bad").error
    assert vlm.texts(replies) == answers


@pytest.mark.parametrize(("status", "said"), [(401, "OPENAI_API_KEY"), (403, "OPENAI_API_KEY"), (404, "tiny")])
def test_a_refused_key_or_model_ends_it_at_once(status, said):
    asked, _ = colours(3)
    with FaultyEndpoint(fault=lambda number, body: (status, {})) as endpoint:
        engine = vlm.at_endpoint(endpoint.url, patience_s=60.0)
        started = time.monotonic()
        vlm.assert_down(lambda: vlm.ask(engine, asked), endpoint.url, f"{status} ", "told to fail", said)
        assert time.monotonic() - started < 30
        engine.close()


def test_an_endpoint_that_is_gone_for_good_ends_it_after_patience():
    asked, answers = colours(4)
    endpoint = FaultyEndpoint()
    with endpoint:
        engine = vlm.at_endpoint(endpoint.url, patience_s=3.0)
        assert vlm.texts(vlm.ask(engine, asked)) == answers
    started = time.monotonic()
    vlm.assert_down(lambda: vlm.ask(engine, asked), endpoint.url, "nothing answered for 3 s", "refused")
    assert 3.0 <= time.monotonic() - started < 30.0
    with pytest.raises(EngineDown):  # and stays down
        engine.step()
    engine.close()


def test_an_endpoint_that_comes_back_in_time_loses_nothing():
    asked, answers = colours(30)
    with FaultyEndpoint(delay_s=lambda number, body: 0.05) as endpoint, ThreadPoolExecutor(1) as aside:
        engine = vlm.at_endpoint(endpoint.url, max_num_seqs=4, patience_s=30.0)
        replies = aside.submit(vlm.ask, engine, asked)
        while len(endpoint.times) < 10:
            time.sleep(0.01)
        endpoint.stop()
        time.sleep(2.0)
        with FaultyEndpoint(port=endpoint.port):
            assert vlm.texts(replies.result()) == answers
            engine.close()


def test_closing_does_not_wait_for_requests_under_way(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret")
    with FaultyEndpoint(delay_s=lambda number, body: 20.0) as endpoint:
        engine = vlm.at_endpoint(endpoint.url, api_key_env="SOME_KEY")
        for request in colours(8)[0]:
            engine.add(request)
        started = time.monotonic()
        assert engine.step() == [] and 0.9 < time.monotonic() - started < 10.0
        engine.close()
        assert time.monotonic() - started < 15.0
        assert endpoint.headers[0]["Authorization"] == "Bearer secret"


def test_an_idle_engine_does_not_wait():
    engine = vlm.at_endpoint("http://127.0.0.1:9/v1")
    started = time.monotonic()
    assert engine.step() == [] and time.monotonic() - started < 0.9
    engine.close()


def test_an_endpoint_needs_address_and_model():
    vlm.assert_down(lambda: make_engine(vlm.options("openai", "tiny")), "base_url")
    vlm.assert_down(
        lambda: make_engine({**vlm.options("openai", "tiny", base_url="http://127.0.0.1:9/v1"), "model": None}), "model"
    )
