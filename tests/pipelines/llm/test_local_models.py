"""Models in this process, in an actor and behind vLLM's server: the same tokens from each, the same captions."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import polars as pl
import pytest

from catalogs.tables.catalog import Catalog
from pipelines.llm.chat_messages import video_metadata
from pipelines.llm.engine import Reply, Request, make_engine
from pipelines.llm.local_model import LocalModel
from pipelines.llm.transformers_engine import BAD_VIDEO
from pipelines.runs.caption import caption, refine
from support import vlm, wall_videos
from support.caption_endpoint import running
from support.wall_videos import CLIPS, EVERYWHERE, captions, settings

pytestmark = pytest.mark.slow

TOKENS = 64
SAME = (
    "caption.dtype=float32",
    "caption.max_tokens=24",
    "caption.max_num_seqs=4",
    "caption.input=images",
    "caption.frames=2",
    "caption.styles=[short]",
    "caption.max_model_len=2048",
    "caption.kv_cache_gb=0.0625",
    "caption.language=null",
)
"""What the captions of all backends are made with."""


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
    engine = vlm.at_endpoint(vllm_server.url, max_tokens=TOKENS, max_num_seqs=8)
    replies = vlm.ask(engine, questions())
    engine.close()
    return replies


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """Three videos."""
    return wall_videos.make(tmp_path_factory.mktemp("walls"))


@pytest.fixture(scope="module")
def ingested(sources, tmp_path_factory, ray_address) -> Path:
    """Their catalog, to be copied."""
    return wall_videos.ingested(sources, tmp_path_factory.mktemp("ingested") / "c", ray_address)


@pytest.fixture
def root(ingested, tmp_path) -> str:
    return str(shutil.copytree(ingested, tmp_path / "c"))


def questions() -> list[Request]:
    """Of text, of one image and of several; with and without a system message and a conversation after it."""
    asked = [
        Request(
            f"images {i}",
            f"Describe these images, number {i}.",
            frames=[vlm.picture((40 * i, 200, 60), seed=10 * i + j) for j in range(i % 4 + 1)],
            times=[0.5 * j for j in range(i % 4 + 1)],
            duration_s=3.0,
            system="You are a helpful assistant." if i % 2 else None,
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
    assert all(
        reply.error is None and reply.output_tokens == TOKENS and reply.finish == "length" for reply in by_vllm.values()
    )
    assert by_vllm == unbroken == by_transformers


def test_same_tokens_of_video_which_knows_the_times(vllm, transformers):
    halves = [0.5 * i for i in range(8)]
    asked = [
        film("halves", halves, 4.0),
        film("slow", [0.1 + 1.25 * i for i in range(8)], 10.3),
        film("odd", halves[:7], 3.5),
    ]
    assert vllm.takes_video and transformers.takes_video
    by_vllm = vlm.ask(vllm, asked)
    assert by_vllm == vlm.ask(transformers, asked)
    assert by_vllm["halves"].text != by_vllm["slow"].text


def test_requests_join_while_others_run(vllm):
    """A long prompt leaves room for 8 tokens: those who bring one come after the first request and are ready before
    it."""
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
    assert VideoMetadata(**video_metadata(film("f", [0.0, 2.0], 0.0))).duration == pytest.approx(
        2.0, abs=0.01
    )  # duration unknown


def test_what_models_take_is_read_off_template_and_processor(tiny_vlm, smollm2, tmp_path):
    without = shutil.copytree(tiny_vlm, tmp_path / "no-video")
    template = (without / "chat_template.jinja").read_text()
    (without / "chat_template.jinja").write_text(template.replace("<|vision_start|><|video_pad|><|vision_end|>", ""))
    folders = {"qwen3": tiny_vlm, "no video": without, "text": smollm2}
    for family in sorted(BAD_VIDEO):
        folders[family] = vlm.build_tiny_vlm(tmp_path / family, family)
    models = {name: LocalModel({"model": str(folder), "backend": "vllm"}) for name, folder in folders.items()}
    assert {name: (model.takes_pictures, model.takes_video) for name, model in models.items()} == {
        "qwen3": (True, True),
        "no video": (True, False),
        "text": (False, False),
        **{family: (True, True) for family in BAD_VIDEO},
    }
    for family in BAD_VIDEO:  # transformers places the text after a video wrongly
        assert not make_engine(vlm.options("transformers", folders[family])).takes_video


def test_models_that_cannot_start_say_why_in_one_line(tiny_vlm, smollm2, tmp_path):
    bare = shutil.copytree(tiny_vlm, tmp_path / "no-weights")
    (bare / "model.safetensors").unlink()
    wrong = {
        tmp_path / "nowhere": "no such folder",
        tmp_path: "no config.json",
        bare: "safetensors",
        smollm2: "takes text only",
    }
    for folder, cause in wrong.items():
        vlm.assert_down(lambda: make_engine(vlm.options("transformers", folder)), str(folder), cause)
    vlm.assert_down(
        lambda: vlm.EngineApart(vlm.options("vllm", tiny_vlm, kv_cache_gb=0.0001)), str(tiny_vlm), "kv_cache_gb"
    )


def test_a_real_model_answers_sensibly(smollm2):
    options = vlm.options("transformers", smollm2, max_tokens=32)
    del options["frames"]  # a section without pictures, as `refine`
    engine = make_engine(options)
    replies = vlm.ask(engine, [Request("france", "What is the capital of France? Answer in one sentence.")])
    assert "Paris" in replies["france"].text and replies["france"].finish == "stop"


def test_sampling_repeats_with_its_seed(tiny_vlm):
    asked = questions()[:2]
    engines = [make_engine(vlm.options("transformers", tiny_vlm, temperature=1.0, seed=seed)) for seed in (1, 1, 2)]
    first, again, other = (vlm.texts(vlm.ask(engine, asked)) for engine in engines)
    assert first == again != other


def test_an_idle_engine_does_not_wait(vllm, transformers):
    for idle in (vllm, transformers):
        started = time.monotonic()
        assert idle.step() == [] and time.monotonic() - started < 0.9


class Killed(NamedTuple):
    """What clients of the server got that was killed.

    Attributes:
        before, after: replies to `questions` before and since.
        captions: the table that a caption run made meanwhile.
        returncode, out, err: of that run.
    """

    before: dict[str, Reply]
    after: dict[str, Reply]
    captions: pl.DataFrame
    returncode: int
    out: str
    err: str


@pytest.fixture(scope="module")
def killed(vllm_server, unbroken, ingested, tmp_path_factory, ray_address) -> Killed:
    """An engine and a caption run in a process of its own, both with requests under way when the server is killed; it
    comes back."""
    root = str(shutil.copytree(ingested, tmp_path_factory.mktemp("killed") / "c"))
    run = wall_videos.start(
        root,
        ray_address,
        f"caption.base_url={vllm_server.url}",
        f"caption.model={vllm_server.name}",
        "caption.patience_s=200",
        "caption.requests_per_minute=200",
        *SAME,
    )  # slow enough to be killed in time
    while captions(root).height < 3 and run.poll() is None:
        time.sleep(0.2)
    engine = vlm.at_endpoint(vllm_server.url, max_tokens=TOKENS, max_num_seqs=2, patience_s=200.0)
    for request in questions():
        engine.add(request)
    before: dict[str, Reply] = {}
    while len(before) < 2:
        before |= {reply.key: reply for reply in engine.step()}
    assert captions(root).height < CLIPS, "too late to kill"
    vllm_server.kill()
    vllm_server.start()
    after = vlm.gather(engine, len(unbroken) - len(before), wait_s=200.0)
    engine.close()
    out, err = run.communicate()
    return Killed(before, after, captions(root), run.returncode, out, err)


def test_a_server_that_is_killed_and_comes_back_costs_nothing(killed, unbroken):
    assert killed.after and not killed.after.keys() & killed.before.keys()
    assert killed.before | killed.after == unbroken


def test_real_vllm_in_process_at_an_endpoint_and_transformers_write_the_same(root, tiny_vlm, killed, ray_address):
    """Greedy, in float32; the server was killed on the way and came back."""
    made = {}

    def write(backend: str) -> int:
        chosen = settings(f"caption.backend={backend}", f"caption.model={tiny_vlm}", *SAME)
        return caption(root, chosen, EVERYWHERE, ray=ray_address).captions

    assert write("vllm") == CLIPS
    made["vllm"] = captions(root)
    assert write("transformers") == 0, "the same question to the same weights is not asked twice"
    Catalog(root).delete("captions", "true")
    assert write("transformers") == CLIPS
    made["transformers"] = captions(root)
    assert killed.returncode == 0, killed.err
    assert json.loads(killed.out)["captions"] == CLIPS == killed.captions.height
    made["openai"] = killed.captions
    texts = {backend: rows.select("clip_id", "text", "output_tokens").rows() for backend, rows in made.items()}
    assert texts["vllm"] == texts["transformers"] == texts["openai"]
    assert len(set(made["vllm"]["text"])) > CLIPS / 2, "different clips, different texts"


def test_a_small_real_model_rewrites_captions(root, smollm2, ray_address):
    """SmolLM2 (135 M) keeps to the subject; that is all that can be asked of it."""
    said = "The video shows a brown dog running along a wide sandy beach while waves roll in under a grey sky."
    clips = Catalog(root).clips().sort("clip_id").collect()["clip_id"].to_list()
    with running(say=lambda *_: said) as server:
        asking = settings("caption.backend=openai", f"caption.base_url={server.url}", "caption.model=m")
        caption(root, asking, f"clip_id = '{clips[0]}'", ray=ray_address)
    refining = settings(
        "refine.backend=transformers", f"refine.model={smollm2}", "refine.dtype=float32", "refine.max_tokens=64"
    )
    assert refine(root, refining, EVERYWHERE, ray=ray_address).captions == 1
    original, refined = (captions(root).filter(style=style).row(0, named=True) for style in ("dense", "refined"))
    assert refined["made_from"] == original["caption_id"] and original["original"] == said
    assert {"dog", "beach"} <= set(refined["text"].lower().replace(",", " ").replace(".", " ").split())
    assert refined["text"] != original["text"] and refined["model"] == "smollm2-135m-instruct"
