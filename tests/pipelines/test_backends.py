"""Language model backends: the same tokens from each, and what an endpoint may do to requests."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate

import numpy as np
import pytest
import vlm
from faulty_endpoint import RESET, FaultyEndpoint

from pipelines.backends import EngineDown, Reply, Request, make_engine, pace
from pipelines.backends.local import LocalModel
from pipelines.backends.messages import video_metadata
from pipelines.backends.pace import retry_after_s
from pipelines.backends.transformers_engine import BAD_VIDEO

TOKENS = 64


@pytest.fixture(scope="module")
def vllm(vllm_server, tiny_vlm):
    """vLLM in a thread of a process of its own; it starts while the server does."""
    engine = vlm.EngineApart(vlm.options("vllm", tiny_vlm, max_tokens=TOKENS))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def transformers(tiny_vlm):
    engine = make_engine(vlm.options("transformers", tiny_vlm, max_tokens=TOKENS))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def unbroken(vllm_server) -> dict[str, Reply]:
    """The server's replies to `questions`, when nothing goes wrong."""
    engine = _openai(vllm_server.url, max_tokens=TOKENS, max_num_seqs=8)
    replies = vlm.ask(engine, questions())
    engine.close()
    return replies


def questions() -> list[Request]:
    """Of text, of one image and of several; with and without a system message and a conversation after it."""
    asked = [
        Request(
            f"images {i}", f"Describe these images, number {i}.",
            frames=[vlm.picture((40 * i, 200, 60), seed=10 * i + j) for j in range(i % 4 + 1)],
            times=[0.5 * j for j in range(i % 4 + 1)], duration_s=3.0, system="You are a helpful assistant." if i % 2 else None,
        )
        for i in range(6)
    ]
    asked.append(Request("text", "Describe a lake at sunset.", system="You are a helpful assistant."))
    turns = (("assistant", "A red picture."), ("user", "Say more."))
    red = [vlm.picture((200, 10, 10), seed=3)]
    asked.append(Request("turns", "Describe this image.", frames=red, times=[0.0], duration_s=1.0, turns=turns))
    return asked


def film(key: str, times: list[float], duration_s: float) -> Request:
    frames = [vlm.picture((30 * i, 200, 60), seed=i) for i in range(len(times))]
    return Request(key, "Describe the video.", frames=frames, times=times, duration_s=duration_s, as_video=True)


def test_same_tokens_in_process_from_a_server_and_from_transformers(vllm, transformers, unbroken):
    by_vllm, by_transformers = vlm.ask(vllm, questions()), vlm.ask(transformers, questions())
    assert len({reply.text for reply in by_vllm.values()}) == len(by_vllm)  # each looked at its own pictures
    assert all(reply.error is None and reply.output_tokens == TOKENS and reply.finish == "length" for reply in by_vllm.values())
    assert by_vllm == unbroken == by_transformers


def test_same_tokens_of_video_which_knows_the_times(vllm, transformers):
    halves = [0.5 * i for i in range(8)]
    asked = [film("halves", halves, 4.0), film("slow", [0.1 + 1.25 * i for i in range(8)], 10.3), film("odd", halves[:7], 3.5)]
    assert vllm.takes_video and transformers.takes_video
    by_vllm = vlm.ask(vllm, asked)
    assert by_vllm == vlm.ask(transformers, asked)
    assert by_vllm["halves"].text != by_vllm["slow"].text


def test_requests_join_while_others_run(vllm):
    """A long prompt leaves room for 8 tokens: those who bring one come after the first request and are ready before it."""
    around = vlm.ask(vllm, [Request("around", "~")])["around"].input_tokens - 1
    first = Request("first", "Describe the lake.")
    short = [Request(f"late {i}", str(i) + "~" * (2039 - around)) for i in range(3)]  # a token each
    alone = {request.key: vlm.ask(vllm, [request])[request.key] for request in (first, *short)}
    assert [alone[request.key].output_tokens for request in (first, *short)] == [TOKENS, 8, 8, 8]

    replies = []
    vllm.add(first)
    for request in short:
        vllm.add(request)
        replies += vllm.step()
    replies += vlm.gather(vllm, 4 - len(replies)).values()
    assert [reply.key for reply in replies] == ["late 0", "late 1", "late 2", "first"]
    assert {reply.key: reply for reply in replies} == alone


@pytest.mark.parametrize("backend", ["vllm", "transformers"])
def test_a_request_that_is_too_long_is_refused_alone(backend, request):
    engine = request.getfixturevalue(backend)
    replies = vlm.ask(engine, [Request("long", "lake " * 3000), Request("short", "lake")])
    assert "2048" in replies["long"].error and replies["long"].text == ""
    assert replies["short"].error is None and replies["short"].output_tokens > 0


def test_video_metadata_says_the_times_exactly():
    from transformers.video_utils import VideoMetadata

    metadata = VideoMetadata(**video_metadata(film("f", [0.04, 0.54, 1.127, 4.0], 4.5)))
    assert metadata.timestamps == [0.04, 0.54, 1.127, 4.0]
    assert metadata.sampled_fps == pytest.approx(4 / 4.5)
    assert VideoMetadata(**video_metadata(film("f", [0.0, 2.0], 0.0))).duration == pytest.approx(2.0, abs=0.01)  # duration unknown


def test_what_models_take_is_read_off_template_and_processor(tiny_vlm, smollm2, tmp_path):
    without = shutil.copytree(tiny_vlm, tmp_path / "no-video")
    template = (without / "chat_template.jinja").read_text()
    (without / "chat_template.jinja").write_text(template.replace("<|vision_start|><|video_pad|><|vision_end|>", ""))
    folders = {"qwen3": tiny_vlm, "no video": without, "text": smollm2}
    for family in sorted(BAD_VIDEO):
        folders[family] = vlm.build_tiny_vlm(tmp_path / family, family)
    models = {name: LocalModel({"model": str(folder), "backend": "vllm"}) for name, folder in folders.items()}
    assert {name: (model.takes_pictures, model.takes_video) for name, model in models.items()} == {
        "qwen3": (True, True), "no video": (True, False), "text": (False, False), **{family: (True, True) for family in BAD_VIDEO},
    }
    for family in BAD_VIDEO:  # transformers places the text after a video wrongly
        assert not make_engine(vlm.options("transformers", folders[family])).takes_video


def test_models_that_cannot_start_say_why_in_one_line(tiny_vlm, smollm2, tmp_path):
    bare = shutil.copytree(tiny_vlm, tmp_path / "no-weights")
    (bare / "model.safetensors").unlink()
    wrong = {tmp_path / "nowhere": "no such folder", tmp_path: "no config.json", bare: "safetensors", smollm2: "takes text only"}
    for folder, cause in wrong.items():
        _assert_down(lambda: make_engine(vlm.options("transformers", folder)), str(folder), cause)
    _assert_down(lambda: vlm.EngineApart(vlm.options("vllm", tiny_vlm, kv_cache_gb=0.0001)), str(tiny_vlm), "kv_cache_gb")


def _assert_down(call, *said: str) -> None:
    with pytest.raises(EngineDown) as down:
        call()
    text = str(down.value)
    assert "\n" not in text and len(text) < 500
    assert all(part in text for part in said), text


def test_a_real_model_answers_sensibly(smollm2):
    options = vlm.options("transformers", smollm2, max_tokens=32)
    del options["frames"]  # a section without pictures, as `refine`
    engine = make_engine(options)
    replies = vlm.ask(engine, [Request("france", "What is the capital of France? Answer in one sentence.")])
    assert "Paris" in replies["france"].text and replies["france"].finish == "stop"


def test_sampling_repeats_with_its_seed(tiny_vlm):
    asked = questions()[:2]
    engines = [make_engine(vlm.options("transformers", tiny_vlm, temperature=1.0, seed=seed)) for seed in (1, 1, 2)]
    first, again, other = (_texts(vlm.ask(engine, asked)) for engine in engines)
    assert first == again != other


def test_a_server_that_is_killed_and_comes_back_costs_nothing(vllm_server, unbroken):
    engine = _openai(vllm_server.url, max_tokens=TOKENS, max_num_seqs=2)
    for request in questions():
        engine.add(request)
    replies: dict[str, Reply] = {}
    while len(replies) < 2:
        replies |= {reply.key: reply for reply in engine.step()}
    vllm_server.kill()
    vllm_server.start()
    rest = vlm.gather(engine, len(unbroken) - len(replies))
    assert rest and not rest.keys() & replies.keys()
    assert replies | rest == unbroken
    engine.close()


def _openai(url: str, **changes):
    name = vlm.VllmServer.name
    return make_engine(vlm.options("openai", name, base_url=url, **{"patience_s": 120.0, "timeout_s": 60.0, **changes}))


def colours(count: int) -> tuple[list[Request], dict[str, str]]:
    """Requests for the colour of a picture each, and the answers."""
    tones = [(5 * i % 256, 11 * i % 256, 17 * i % 256) for i in range(count)]
    asked = [
        Request(f"colour {i}", "Which colour?", frames=[vlm.picture(tone)], times=[0.0], duration_s=1.0) for i, tone in enumerate(tones)
    ]
    return asked, {f"colour {i}": "{} {} {}".format(*tone) for i, tone in enumerate(tones)}


def _texts(replies: dict[str, Reply]) -> dict[str, str]:
    assert all(reply.error is None for reply in replies.values())
    return {key: reply.text for key, reply in replies.items()}


def test_endpoint_replies_out_of_order_and_at_once():
    asked, answers = colours(40)
    with FaultyEndpoint(delay_s=lambda number, body: 0.4 - 0.04 * (number % 10)) as endpoint:
        engine = _openai(endpoint.url, max_num_seqs=10)
        replies = vlm.ask(engine, asked)
        engine.close()
    assert _texts(replies) == answers
    assert list(replies) != list(answers) and endpoint.most == 10
    assert (replies["colour 0"].input_tokens, replies["colour 0"].output_tokens, replies["colour 0"].finish) == (7, 3, "stop")


def test_endpoint_that_fails_half_of_the_time_loses_nothing(monkeypatch):
    monkeypatch.setattr(pace, "LONGEST_DELAY_S", 1.0)
    faults = [(500, {}), (429, {"Retry-After": "0.2"}), RESET, (503, {"Retry-After": formatdate(usegmt=True)}), (429, {}), (408, {})]
    asked, answers = colours(40)
    with FaultyEndpoint(fault=lambda number, body: faults[number // 2 % len(faults)] if number % 2 else None) as endpoint:
        engine = _openai(endpoint.url, max_num_seqs=8)
        assert _texts(vlm.ask(engine, asked)) == answers
        engine.close()
    assert len(endpoint.times) >= 79  # every other one failed


def test_one_429_lets_everybody_rest():
    asked, answers = colours(12)
    with FaultyEndpoint(fault=lambda number, body: (429, {"Retry-After": "2"}) if number == 4 else None) as endpoint:
        engine = _openai(endpoint.url, max_num_seqs=1)
        assert _texts(vlm.ask(engine, asked)) == answers
        engine.close()
    gaps = np.diff(endpoint.times)
    assert gaps[3] > 1.95 and np.delete(gaps, 3).max() < 1.0


@pytest.mark.parametrize(("headers", "seconds"), [
    ({"retry-after": "12"}, 12.0), ({"retry-after-ms": "250"}, 0.25), ({}, None), ({"retry-after": "soon"}, None),
    ({"retry-after": "-3"}, 0.0),
    ({"retry-after": formatdate(0, usegmt=True)}, 0.0), ({"retry-after": "inf"}, 86400.0),
])
def test_retry_after_is_seconds_or_a_date(headers, seconds):
    assert retry_after_s(headers) == seconds
    in_a_while = formatdate(time.time() + 30, usegmt=True)
    assert retry_after_s({"retry-after": in_a_while}) == pytest.approx(30, abs=2)


def test_requests_per_minute_are_held():
    asked, answers = colours(13)
    with FaultyEndpoint() as endpoint:
        engine = _openai(endpoint.url, max_num_seqs=8, requests_per_minute=240)
        assert _texts(vlm.ask(engine, asked)) == answers
        engine.close()
    gaps = np.diff(endpoint.times)
    assert endpoint.times[-1] - endpoint.times[0] >= 12 * 0.25 - 0.05 and np.median(gaps) > 0.2


def test_endpoint_refuses_one_request():
    asked, answers = colours(6)
    bad = Request("bad", "refuse me")
    with FaultyEndpoint(fault=lambda number, body: (400, {}) if body["messages"][-1]["content"] == "refuse me" else None) as endpoint:
        engine = _openai(endpoint.url)
        replies = vlm.ask(engine, [bad, *asked])
        engine.close()
    assert replies.pop("bad") == Reply("bad", error="400 Bad Request: told to fail with 400")
    assert _texts(replies) == answers and len(endpoint.times) == 7


def test_a_request_that_alone_breaks_the_endpoint_is_given_up():
    """The endpoint fails everything for as long as patience lasts, yet answers a small question: it is the request."""
    asked, answers = colours(6)
    bad = Request("bad", "break", frames=asked[0].frames, times=[0.0], duration_s=1.0)

    def fault(number, body):
        return (500, {}) if body["messages"][-1]["content"][-1]["text"] == "break" else None

    with FaultyEndpoint(fault) as endpoint:
        engine = _openai(endpoint.url, patience_s=2.0)
        replies = vlm.ask(engine, [bad, *asked])
        engine.close()
    assert "while others did not: 500" in replies.pop("bad").error
    assert _texts(replies) == answers


@pytest.mark.parametrize(("status", "said"), [(401, "OPENAI_API_KEY"), (403, "OPENAI_API_KEY"), (404, "tiny")])
def test_a_refused_key_or_model_ends_it_at_once(status, said):
    asked, _ = colours(3)
    with FaultyEndpoint(fault=lambda number, body: (status, {})) as endpoint:
        engine = _openai(endpoint.url, patience_s=60.0)
        started = time.monotonic()
        _assert_down(lambda: vlm.ask(engine, asked), endpoint.url, f"{status} ", "told to fail", said)
        assert time.monotonic() - started < 5
        engine.close()


def test_an_endpoint_that_is_gone_for_good_ends_it_after_patience():
    asked, answers = colours(4)
    endpoint = FaultyEndpoint()
    with endpoint:
        engine = _openai(endpoint.url, patience_s=3.0)
        assert _texts(vlm.ask(engine, asked)) == answers
    started = time.monotonic()
    _assert_down(lambda: vlm.ask(engine, asked), endpoint.url, "nothing answered for 3 s", "refused")
    assert 3.0 <= time.monotonic() - started < 8.0
    with pytest.raises(EngineDown):  # and stays down
        engine.step()
    engine.close()


def test_an_endpoint_that_comes_back_in_time_loses_nothing():
    asked, answers = colours(30)
    with FaultyEndpoint(delay_s=lambda number, body: 0.05) as endpoint, ThreadPoolExecutor(1) as aside:
        engine = _openai(endpoint.url, max_num_seqs=4, patience_s=30.0)
        replies = aside.submit(vlm.ask, engine, asked)
        while len(endpoint.times) < 10:
            time.sleep(0.01)
        endpoint.stop()
        time.sleep(2.0)
        with FaultyEndpoint(port=endpoint.port):
            assert _texts(replies.result()) == answers
            engine.close()


def test_closing_does_not_wait_for_requests_under_way(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret")
    with FaultyEndpoint(delay_s=lambda number, body: 20.0) as endpoint:
        engine = _openai(endpoint.url, api_key_env="SOME_KEY")
        for request in colours(8)[0]:
            engine.add(request)
        started = time.monotonic()
        assert engine.step() == [] and 0.9 < time.monotonic() - started < 2.0
        engine.close()
        assert time.monotonic() - started < 3.0
        assert endpoint.headers[0]["Authorization"] == "Bearer secret"


def test_an_idle_engine_does_not_wait(vllm, transformers):
    engine = _openai("http://127.0.0.1:9/v1")
    for idle in (vllm, transformers, engine):
        started = time.monotonic()
        assert idle.step() == [] and time.monotonic() - started < 0.5
    engine.close()


def test_an_endpoint_needs_address_and_model():
    _assert_down(lambda: make_engine(vlm.options("openai", "tiny")), "base_url")
    _assert_down(lambda: make_engine({**vlm.options("openai", "tiny", base_url="http://127.0.0.1:9/v1"), "model": None}), "model")
