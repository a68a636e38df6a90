"""Captions of a catalog: each on its own clip whatever fails, once whatever is killed, judged, chosen, rewritten."""

import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from endpoint import WORDS, describe, running
from makevideo import encode

from catalogs.check import problems
from catalogs.funnel import funnel
from catalogs.tables import Catalog
from datakit import config
from datakit.errors import ConfigError
from datakit.video.decode import VideoReader
from pipelines.backends import EngineDown
from pipelines.caption import caption, refine
from pipelines.ingest import ingest
from pipelines.settings import Settings

CLIPS = 24
EVERYWHERE = "num_frames > 0"
QUICK = ("ocr.enabled=false", "recipe=technical", "shots.min_s=0.5", "caption.side=64", "runner.commit_s=0.3")


@pytest.fixture(scope="module")
def walls(tmp_path_factory) -> Path:
    """Three videos of eight shots, each of a colour of its own."""
    folder = tmp_path_factory.mktemp("walls")
    levels = (40, 120, 200)
    colours = [(r, g, b) for r in levels for g in levels for b in levels][:CLIPS]
    random.Random(1).shuffle(colours)
    checks = np.add.outer(np.arange(96) // 12, np.arange(128) // 12) % 2 * 0.3 + 0.85
    for number in range(3):
        frames = [np.clip(checks[..., None] * colour, 0, 255).astype(np.uint8) for colour in colours[number::3] for _ in range(12)]
        encode(folder / f"w{number}.mp4", frames, 10, pix_fmt="yuv444p", options={"crf": "4", "preset": "ultrafast"})
    return folder


@pytest.fixture(scope="module")
def ingested(walls, tmp_path_factory, ray_address) -> Path:
    """Their catalog, to be copied."""
    root = tmp_path_factory.mktemp("ingested") / "c"
    ingest([str(walls)], str(root), settings(), ray_address)
    assert Catalog(root).clips().collect().height == CLIPS
    return root


@pytest.fixture
def root(ingested, tmp_path) -> str:
    subprocess.run(["cp", "-r", str(ingested), str(tmp_path / "c")], check=True)
    return str(tmp_path / "c")


def settings(*sets: str) -> Settings:
    return config.load(Settings, None, [*QUICK, *sets])


def at(url: str, *sets: str) -> Settings:
    return settings("caption.backend=openai", f"caption.base_url={url}", "caption.model=m", *sets)


def captions(root: str) -> pl.DataFrame:
    return Catalog(root).captions().sort("clip_id", "style", "model").collect()


def colours(root: str) -> dict[str, tuple[float, float, float]]:
    """What colour each clip really has: the mean of a frame in its middle."""
    found = {}
    for clip in Catalog(root).clips().collect().iter_rows(named=True):
        with VideoReader(clip["uri"], clip["stream"]) as reader:
            _, picture = next(reader.at([(clip["start_pts"] + clip["end_pts"]) // 2]))
            found[clip["clip_id"]] = tuple(picture.rgb().reshape(-1, 3).mean(axis=0))
    return found


def assert_on_their_clips(root: str) -> None:
    real = colours(root)
    for row in captions(root).iter_rows(named=True):
        said = tuple(map(int, WORDS.search(row["text"]).groups()))
        assert np.abs(np.subtract(said, real[row["clip_id"]])).max() < 6, row
        nearest = min(real, key=lambda clip: np.abs(np.subtract(said, real[clip])).sum())
        assert nearest == row["clip_id"]


def test_every_caption_is_on_its_clip_though_half_fail_and_all_are_shuffled(root, ray_address):
    chosen = ["caption.styles=[short, dense]", "caption.max_num_seqs=16", "caption.input=images"]
    with running(fails=0.5, delay_s=0.3) as server:
        done = caption(root, at(server.url, *chosen), EVERYWHERE, ray=ray_address)
        assert (done.clips, done.captions, done.failed) == (CLIPS, 2 * CLIPS, 0)
        assert server.failed > CLIPS / 2
        assert_on_their_clips(root)
        rows = captions(root)
        assert rows.height == 2 * CLIPS and set(rows["style"]) == {"short", "dense"} and set(rows["backend"]) == {"openai"}
        before = sum(server.answered.values())
        again = caption(root, at(server.url, *chosen), EVERYWHERE, ray=ray_address)
        assert (again.clips, sum(server.answered.values())) == (0, before)
        # a third style asks only for that; another temperature is another question
        assert caption(root, at(server.url, "caption.styles=[short, camera]", *chosen[1:]), EVERYWHERE, ray=ray_address).captions == CLIPS
        assert caption(root, at(server.url, "caption.temperature=0.5", *chosen), EVERYWHERE, ray=ray_address).captions == 2 * CLIPS
        assert captions(root).height == 3 * CLIPS
    view = Catalog(root).clips().collect()
    assert set(view["caption_style"]) == {"dense"} and view["caption"].null_count() == 0, "the recipe prefers dense"
    assert not list(problems(Catalog(root)))


def start(root: str, ray_address: str, *sets: str) -> subprocess.Popen:
    """`datakit run caption` through an endpoint, in a process of its own."""
    words = [word for line in (*QUICK, "caption.backend=openai", *sets) for word in ("--set", line)]
    command = ["run", "caption", "--catalog", root, "--where", EVERYWHERE, "--ray", ray_address, "--json", *words]
    return subprocess.Popen([sys.executable, "-m", "datakit.cli", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_at_random_moments_nothing_is_lost_or_entered_twice(root, ray_address):
    moments = random.Random(5)
    with running(delay_s=1.0) as server:
        sets = ("caption.model=m", f"caption.base_url={server.url}", "caption.max_num_seqs=2")
        progress = []
        for _ in range(4):
            run = start(root, ray_address, *sets)
            deadline, target = time.monotonic() + 60, len(captions(root)) + moments.randint(0, 5)
            while time.monotonic() < deadline and captions(root).height <= target and run.poll() is None:
                time.sleep(0.05)
            run.kill()
            run.wait()
            progress.append(captions(root).height)
        last = start(root, ray_address, *sets)
        out, err = last.communicate()
        assert last.returncode == 0, err
        assert json.loads(out)["captions"] == CLIPS - progress[-1]
        assert progress == sorted(progress) and progress[-1] > 0
        asked = sum(server.answered.values())
    rows = captions(root)
    assert rows.height == CLIPS == rows["clip_id"].n_unique()
    assert_on_their_clips(root)
    assert asked <= CLIPS + 4 * (8 + 2), "only what was under way or not committed is asked again"


def test_an_endpoint_that_goes_away_ends_the_run_and_what_was_answered_stays(root, ray_address):
    with running(delay_s=0.2) as server:
        count = 0

        def say(*arguments):
            nonlocal count
            count += 1
            if count > 18:
                time.sleep(30)
            return describe(*arguments)

        server.say = say
        chosen = at(server.url, "caption.max_num_seqs=2", "caption.timeout_s=1", "caption.patience_s=3")
        with pytest.raises(EngineDown, match="nothing answered for 3 s") as error:
            caption(root, chosen, EVERYWHERE, ray=ray_address)
        assert "\n" not in str(error.value)
    assert 8 <= captions(root).height <= 18
    assert_on_their_clips(root)
    run = Catalog(root).scan("runs").sort("started_at").collect().row(-1, named=True)
    assert run["status"] == "failed" and "nothing answered" in run["counts"]


def test_flags_repairs_errors_and_the_funnel(root, ray_address):
    """What the endpoint says depends on the clip: captions, refusals, loops, nothing, JSON that is none."""
    said = [
        lambda c: f"The video shows a wall of colour {c[0]} {c[1]} {c[2]}, lit from above by a lamp that nobody tends.",
        lambda c: "I'm sorry, but I can't help with describing this video.",
        lambda c: "a wall and a wall and a wall and " * 20,
        lambda c: "",
        lambda c: "Three women in red coats carry a long ladder across the empty square towards the fountain.",
    ]
    kind = lambda c: sum(round((v - 40) / 80) * 3**i for i, v in enumerate(c)) % len(said)  # the wall's own number
    with running(say=lambda c, messages: said[kind(c)](c)) as server:
        done = caption(root, at(server.url, "caption.styles=[short]"), EVERYWHERE, ray=ray_address)
    rows = captions(root)
    by_flag = {flag: {row["clip_id"] for row in rows.iter_rows(named=True) if flag in row["flags"]}
               for flag in ("boilerplate", "refusal", "repetition", "empty", "duplicate")}
    planted = Counter(kind(colour) for colour in colours(root).values())
    names = ("boilerplate", "refusal", "repetition", "empty")
    assert {name: len(by_flag[name]) for name in names} == {name: planted[i] for i, name in enumerate(names)}
    assert len(by_flag["duplicate"]) == planted[1] + planted[2] + planted[4], "all that is said of several videos alike"
    assert done.flags == dict(sorted(Counter(flag for flags in rows["flags"] for flag in flags).items()))
    repaired = rows.filter(pl.col("flags").list.contains("boilerplate"))
    assert repaired.height and all(t.startswith("A wall of colour") for t in repaired["text"])
    assert all(t.startswith("The video shows") for t in repaired["original"])
    counted = funnel(Catalog(root))
    assert counted.captions == {"short": CLIPS} and counted.caption_flags == dict(done.flags)
    view = Catalog(root).clips().collect()
    unusable = by_flag["refusal"] | by_flag["repetition"] | by_flag["empty"]
    assert set(view.filter(pl.col("caption").is_null())["clip_id"]) == unusable


def test_structured_captions_are_valid_or_asked_for_once_more(root, ray_address):
    tries: dict[tuple, int] = {}

    def say(colour, messages):
        tries[colour] = tries.get(colour, 0) + 1
        fields = {name: f"A wall of colour {colour[0]} {colour[1]} {colour[2]} under a lamp." for name in FIELDS}
        if sum(colour) % 3 == 0:  # never right
            return "no JSON at all"
        if sum(colour) % 3 == 1 and len(messages) < 4:  # right when told
            return json.dumps(dict(list(fields.items())[:-1]))
        return f"```json\n{json.dumps(fields)}\n```"

    with running(say=say) as server:
        caption(root, at(server.url, "caption.styles=[structured]"), EVERYWHERE, ray=ray_address)
    for row in captions(root).iter_rows(named=True):
        if "invalid_json" in row["flags"]:
            continue
        assert set(json.loads(row["text"])) == set(FIELDS)
    flagged = captions(root).filter(pl.col("flags").list.contains("invalid_json")).height
    assert flagged == sum(1 for colour in tries if sum(colour) % 3 == 0) > 0
    assert all(count == (1 if sum(colour) % 3 == 2 else 2) for colour, count in tries.items())


FIELDS = ("short_caption", "dense_caption", "main_object_caption", "background_caption", "camera_caption", "style_caption")


def test_refusals_of_the_endpoint_are_rows_that_can_be_asked_again(root, ray_address):
    with running() as server:
        chosen = at(server.url, "caption.styles=[short]")
        clip = Catalog(root).clips().collect()["clip_id"][0]
        caption(root, chosen, f"clip_id = '{clip}'", ray=ray_address)
        source = Path(Catalog(root).clips().collect()["uri"][0])
        moved = source.with_suffix(".away")
        source.rename(moved)  # one of the videos cannot be read
        try:
            done = caption(root, chosen, EVERYWHERE, ray=ray_address)
        finally:
            moved.rename(source)
        assert done.failed in (7, 8) and done.captions + done.failed == CLIPS - 1
        failed = captions(root).filter(pl.col("error").is_not_null())
        assert set(failed["error_kind"]) == {"unreadable"} and failed["text"].null_count() == failed.height
        assert caption(root, chosen, EVERYWHERE, ray=ray_address).clips == 0
        assert caption(root, chosen, EVERYWHERE, retry_failed=True, ray=ray_address).captions == done.failed
    assert_on_their_clips(root)
    assert captions(root).height == CLIPS


def test_a_refined_caption_keeps_its_original_and_follows_it(root, ray_address):
    def say(colour, messages):
        text = messages[-1]["content"]
        told = WORDS.search(text if isinstance(text, str) else json.dumps(text))
        return f"Rewritten: a calm interior with colour {told[1]} {told[2]} {told[3]}, and nothing else of note in it." if told else describe(colour, messages)

    with running(say=say) as server:
        caption(root, at(server.url), EVERYWHERE, ray=ray_address)
        refining = settings("refine.backend=openai", f"refine.base_url={server.url}", "refine.model=llm")
        assert refine(root, refining, EVERYWHERE, ray=ray_address).captions == CLIPS
        assert refine(root, refining, EVERYWHERE, ray=ray_address).clips == 0
        rows = captions(root)
        dense, refined = (rows.filter(style=style) for style in ("dense", "refined"))
        assert refined["made_from"].to_list() == dense["caption_id"].to_list()
        for a, b in zip(dense["text"], refined["text"]):
            assert WORDS.search(a).groups() == WORDS.search(b).groups()
        assert set(Catalog(root).clips().collect()["caption_style"]) == {"refined"}
        caption(root, at(server.url, "caption.temperature=0.1"), EVERYWHERE, ray=ray_address)  # the same texts anew
        assert refine(root, refining, EVERYWHERE, ray=ray_address).clips == 0


def test_a_small_real_model_rewrites_captions(root, smollm2, ray_address):
    """SmolLM2 (135 M) keeps to the subject; that is all that can be asked of it."""
    said = "The video shows a brown dog running along a wide sandy beach while waves roll in under a grey sky."
    clips = Catalog(root).clips().sort("clip_id").collect()["clip_id"].to_list()
    with running(say=lambda *_: said) as server:
        caption(root, at(server.url), f"clip_id = '{clips[0]}'", ray=ray_address)
    refining = settings("refine.backend=transformers", f"refine.model={smollm2}", "refine.dtype=float32", "refine.max_tokens=64")
    assert refine(root, refining, EVERYWHERE, ray=ray_address).captions == 1
    original, refined = (captions(root).filter(style=style).row(0, named=True) for style in ("dense", "refined"))
    assert refined["made_from"] == original["caption_id"] and original["original"] == said
    assert {"dog", "beach"} <= set(refined["text"].lower().replace(",", " ").replace(".", " ").split())
    assert refined["text"] != original["text"] and refined["model"] == "smollm2-135m-instruct"


def test_ingest_captions_what_it_keeps(walls, tmp_path, ray_address):
    root = str(tmp_path / "c")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("""{name: r, description: x, captions: [short], rules: [
        {name: early, keep: start_s < 5, source: x}, {name: captioned, keep: case when caption is null then null else true end, source: x}]}""")
    with running() as server:
        chosen = at(server.url, "caption.enabled=true", "caption.styles=[short]", f"recipe={recipe}")
        report = ingest([str(walls)], root, chosen, ray_address)
        asked = sum(server.answered.values())
        again = ingest([str(walls)], root, chosen, ray_address)
        assert sum(server.answered.values()) == asked == report.funnel.kept == again.funnel.kept
    assert 0 < report.funnel.kept < CLIPS and report.funnel.pending == 0 and report.funnel.rejected_by == {"early": (CLIPS - asked, CLIPS - asked)}
    assert report.funnel.captions == {"short": asked} and report.funnel.without_caption == 0
    assert_on_their_clips(root)
    assert not list(problems(Catalog(root)))


@pytest.mark.parametrize("sets, says", [
    (["caption.backend=openai"], "which model"),
    (["caption.backend=openai", "caption.model=m"], "which endpoint"),
    (["caption.backend=transformers", "caption.model=Qwen/Qwen2.5-VL-7B-Instruct", "models.folder=/nowhere"], "datakit models download"),
    (["caption.backend=openai", "caption.model=m", "caption.base_url=http://x/v1", "caption.styles=[desne]"], "did you mean dense"),
    (["caption.backend=openai", "caption.model=m", "caption.base_url=http://x/v1", "caption.styles=[refine]"], "rewrites captions"),
    (["caption.backend=openai", "caption.model=m", "caption.base_url=http://x/v1", "caption.language=klingon"], "no language"),
])
def test_what_cannot_work_is_refused_in_one_line_before_anything_starts(root, sets, says):
    with pytest.raises(ConfigError, match=says) as error:
        caption(root, settings(*sets))
    assert "\n" not in str(error.value)
    assert "caption" not in Catalog(root).scan("runs").collect()["pipeline"].to_list()


def test_real_vllm_in_process_at_an_endpoint_and_transformers_write_the_same(root, tiny_vlm, vllm_server, ray_address):
    """Greedy, in float32; the server is killed on the way and comes back."""
    common = ("caption.dtype=float32", "caption.max_tokens=24", "caption.max_num_seqs=4", "caption.input=images", "caption.frames=2",
              "caption.styles=[short]", "caption.max_model_len=2048", "caption.kv_cache_gb=0.0625", "caption.language=null")
    made = {}

    def write(backend: str) -> int:
        chosen = settings(f"caption.backend={backend}", f"caption.model={tiny_vlm}", *common)
        return caption(root, chosen, EVERYWHERE, ray=ray_address).captions

    assert write("vllm") == CLIPS
    made["vllm"] = captions(root)
    assert write("transformers") == 0, "the same question to the same weights is not asked twice"
    Catalog(root).delete("captions", "true")
    assert write("transformers") == CLIPS
    made["transformers"] = captions(root)
    Catalog(root).delete("captions", "true")
    served = (f"caption.base_url={vllm_server.url}", f"caption.model={vllm_server.name}", "caption.patience_s=200",
              "caption.requests_per_minute=300")  # slow enough to be killed in time
    run = start(root, ray_address, *served, *common)
    while captions(root).height < 3 and run.poll() is None:
        time.sleep(0.05)
    assert captions(root).height < CLIPS, "too late to kill"
    vllm_server.kill()
    vllm_server.start()
    out, err = run.communicate()
    assert run.returncode == 0, err
    assert json.loads(out)["captions"] == CLIPS == captions(root).height
    made["openai"] = captions(root)
    texts = {backend: rows.select("clip_id", "text", "output_tokens").rows() for backend, rows in made.items()}
    assert texts["vllm"] == texts["transformers"] == texts["openai"]
    assert len(set(made["vllm"]["text"])) > CLIPS / 2, "different clips, different texts"
