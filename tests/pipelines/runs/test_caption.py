"""Captions of a catalog: each on its own clip whatever fails, once whatever is killed, judged, chosen, rewritten."""

import json
import random
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from catalogs.maintenance.validate import problems
from catalogs.query.funnel import funnel
from catalogs.tables.catalog import Catalog
from datakit.errors import ConfigError
from datakit.video.reader import VideoReader
from pipelines.llm.engine import EngineDown
from pipelines.runs.caption import caption, refine
from pipelines.runs.ingest import ingest
from pipelines.settings import Settings
from support import wall_videos
from support.caption_endpoint import WORDS, describe, running
from support.wall_videos import CLIPS, EVERYWHERE, captions, settings, start

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    return wall_videos.make(tmp_path_factory.mktemp("walls"))


@pytest.fixture(scope="module")
def ingested(sources, tmp_path_factory, ray_address) -> Path:
    """Their catalog, to be copied."""
    return wall_videos.ingested(sources, tmp_path_factory.mktemp("ingested") / "c", ray_address)


@pytest.fixture
def root(ingested, tmp_path) -> str:
    return str(shutil.copytree(ingested, tmp_path / "c"))


def at(url: str, *sets: str) -> Settings:
    return settings("caption.backend=openai", f"caption.base_url={url}", "caption.model=m", *sets)


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
        assert (
            rows.height == 2 * CLIPS and set(rows["style"]) == {"short", "dense"} and set(rows["backend"]) == {"openai"}
        )
        before = sum(server.answered.values())
        again = caption(root, at(server.url, *chosen), EVERYWHERE, ray=ray_address)
        assert (again.clips, sum(server.answered.values())) == (0, before)
        # a third style asks only for that; another temperature is another question
        assert (
            caption(
                root, at(server.url, "caption.styles=[short, camera]", *chosen[1:]), EVERYWHERE, ray=ray_address
            ).captions
            == CLIPS
        )
        assert (
            caption(root, at(server.url, "caption.temperature=0.5", *chosen), EVERYWHERE, ray=ray_address).captions
            == 2 * CLIPS
        )
        assert captions(root).height == 3 * CLIPS
    view = Catalog(root).clips().collect()
    assert set(view["caption_style"]) == {"dense"} and view["caption"].null_count() == 0, "the recipe prefers dense"
    assert not list(problems(Catalog(root)))


def test_killed_at_random_moments_nothing_is_lost_or_entered_twice(root, ray_address):
    moments = random.Random(5)
    with running(delay_s=1.0) as server:
        sets = ("caption.model=m", f"caption.base_url={server.url}", "caption.max_num_seqs=2")
        progress = []
        for _ in range(4):
            run = start(root, ray_address, *sets)
            deadline, target = time.monotonic() + 60, len(captions(root)) + moments.randint(0, 5)
            while time.monotonic() < deadline and captions(root).height <= target and run.poll() is None:
                time.sleep(0.15)  # looking costs the run processor time
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

    def kind(c):
        return sum(round((v - 40) / 80) * 3**i for i, v in enumerate(c)) % len(said)  # the wall's own number

    with running(say=lambda c, messages: said[kind(c)](c)) as server:
        done = caption(root, at(server.url, "caption.styles=[short]"), EVERYWHERE, ray=ray_address)
    rows = captions(root)
    by_flag = {
        flag: {row["clip_id"] for row in rows.iter_rows(named=True) if flag in row["flags"]}
        for flag in ("boilerplate", "refusal", "repetition", "empty", "duplicate")
    }
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


FIELDS = (
    "short_caption",
    "dense_caption",
    "main_object_caption",
    "background_caption",
    "camera_caption",
    "style_caption",
)


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
        return (
            f"Rewritten: a calm interior with colour {told[1]} {told[2]} {told[3]}, and nothing else of note in it."
            if told
            else describe(colour, messages)
        )

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


def test_ingest_captions_what_it_keeps(sources, tmp_path, ray_address):
    root = str(tmp_path / "c")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("""{name: r, description: x, captions: [short], rules: [
        {name: early, keep: start_s < 5, source: x},
        {name: captioned, keep: case when caption is null then null else true end, source: x}]}""")
    with running() as server:
        chosen = at(server.url, "caption.enabled=true", "caption.styles=[short]", f"recipe={recipe}")
        report = ingest([str(sources)], root, chosen, ray_address)
        asked = sum(server.answered.values())
        again = ingest([str(sources)], root, chosen, ray_address)
        assert sum(server.answered.values()) == asked == report.funnel.kept == again.funnel.kept
    assert (
        0 < report.funnel.kept < CLIPS
        and report.funnel.pending == 0
        and report.funnel.rejected_by == {"early": (CLIPS - asked, CLIPS - asked)}
    )
    assert report.funnel.captions == {"short": asked} and report.funnel.without_caption == 0
    assert_on_their_clips(root)
    assert not list(problems(Catalog(root)))


@pytest.mark.parametrize(
    "sets, says",
    [
        (["caption.backend=openai"], "which model"),
        (["caption.backend=openai", "caption.model=m"], "which endpoint"),
        (
            ["caption.backend=transformers", "caption.model=Qwen/Qwen2.5-VL-7B-Instruct", "models.folder=/nowhere"],
            "datakit models download",
        ),
        (
            ["caption.backend=openai", "caption.model=m", "caption.base_url=http://x/v1", "caption.styles=[desne]"],
            "did you mean dense",
        ),
        (
            ["caption.backend=openai", "caption.model=m", "caption.base_url=http://x/v1", "caption.styles=[refine]"],
            "rewrites captions",
        ),
        (
            ["caption.backend=openai", "caption.model=m", "caption.base_url=http://x/v1", "caption.language=klingon"],
            "no language",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_one_line_before_anything_starts(root, sets, says):
    with pytest.raises(ConfigError, match=says) as error:
        caption(root, settings(*sets))
    assert "\n" not in str(error.value)
    assert "caption" not in Catalog(root).scan("runs").collect()["pipeline"].to_list()
