"""`datakit eval samples`, whole: the stages really run on both sides, and the page is looked at in a browser."""

import json
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from catalogs.tables.catalog import Catalog
from catalogs.tables.sql_text import sql_list
from datakit import config
from datakit.cli.app import app
from datakit.errors import CatalogError, ConfigError
from pipelines.catalog_sync.embeddings import mark_of
from pipelines.recipes.decide import decide_and_record
from pipelines.recipes.recipe import RecipeFile, Rule, build
from pipelines.runs.score import score
from pipelines.settings import Settings
from sampler.evaluate import Evaluation, evaluate_samples
from sampler.evaluate.preference import make_pairs, votes_of
from sampler.evaluate.result_sets import read_sets
from support.browser import until
from support.drawn_videos import texture
from support.sample_catalogs import FRAMES, HEIGHT, WIDTH, import_all, result_catalog, sample, with_split, write
from support.tiny_clip import build as build_tiny_clip

pytestmark = pytest.mark.slow

NOWHERE = "127.0.0.1:1"
"""A Ray that nobody reaches: who asks for it fails."""
STAGES = ["motion", "motion_vmaf", "letterbox", "quality", "embed", "caption_match"]
COPIED = 3


def scene(seed: int, shift: float = 2.0) -> list[np.ndarray]:
    """A tinted texture that drifts."""
    rng = np.random.default_rng(seed)
    picture = (texture(HEIGHT, WIDTH, seed, rng.uniform(0.5, 3)) * rng.uniform(0.3, 1.0, 3)).astype(np.uint8)
    return [np.roll(picture, -round(shift * i), 1) for i in range(FRAMES)]


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory) -> Path:
    return build_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny-clip")


@pytest.fixture(scope="module")
def training(tmp_path_factory, tiny_clip, ray_address) -> Catalog:
    """Thirty captioned clips, scored under settings of their own."""
    folder = tmp_path_factory.mktemp("training")
    catalog = import_all([write(folder / "src" / f"{i:02d}.mp4", scene(i)) for i in range(30)], folder / "train")
    with_split(catalog, "train")
    clips = catalog.clips(columns=["clip_id", "shard"]).collect()
    catalog.append(
        "captions",
        [
            {
                "caption_id": f"c{i}",
                "clip_id": c,
                "shard": s,
                "style": "dense",
                "model": "hand",
                "text": f"scene {i}",
                "flags": [],
            }
            for i, (c, s) in enumerate(clips.iter_rows())
        ],
    )
    decide_and_record(
        catalog,
        build(
            RecipeFile(
                name="all",
                description="",
                captions=["dense"],
                rules=[Rule(name="all", keep="num_frames > 0", source="")],
            )
        ),
    )
    chosen = config.load(Settings, None, ["motion.method=farneback", f"embed.model={tiny_clip}"])
    score(catalog.root, chosen, STAGES, "num_frames > 0", ray=ray_address)
    return catalog


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> str:
    """A model that learned (and repeats a training clip), and the same one earlier: nearly noise."""
    folder = tmp_path_factory.mktemp("samples") / "s"
    learned = {f"a <scene> {i}": scene(100 + i) for i in range(9)}
    learned["a <scene> 0"] = [np.clip(frame.astype(int) + 1, 0, 255).astype(np.uint8) for frame in scene(COPIED)]
    rng = np.random.default_rng(0)
    early = {
        prompt: [np.clip(frame * 0.2 + rng.normal(100, 50, frame.shape), 0, 255).astype(np.uint8) for frame in frames]
        for prompt, frames in learned.items()
    }
    made = {"runs/x/step-1000": early, "runs/x/step-2000": learned}
    catalog = result_catalog(folder, made, None)
    catalog.append(
        "samples",
        [sample("never finished", status="queued"), sample("in pictures", "runs/x/step-2000", path="files/pictures")],
    )
    return catalog.root


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("page") / "evaluation.html"


@pytest.fixture(scope="module")
def found(training, root, page, ray_address) -> Evaluation:
    sets = read_sets([root])
    for pair in make_pairs(sets, 0)[:3]:
        votes_of(sets).add(pair, "left" if pair.left.label == "step-2000" else "right", "ann")
    return evaluate_samples([root], training.root, page, ray=ray_address)


def marks(root: str, stage: str) -> set[str]:
    rows = Catalog(root).clips(columns=["stage_versions"]).select(mark_of(stage).alias("mark")).collect()
    return {mark.split(".")[0] for mark in rows["mark"]}


def test_the_same_stages_ran_on_both_sides_under_the_settings_of_the_training_catalog(found, training, root):
    for stage in STAGES:
        assert len(marks(training.root, stage)) == 1 and marks(root, stage) == marks(training.root, stage), stage
    compared = {c.column.name for c in found.scores}
    assert compared == {
        "motion",
        "motion_vmaf",
        "blur",
        "brightness",
        "contrast",
        "saturation",
        "interlaced",
        "caption_match",
    }
    assert found.not_compared == [] and found.stages_not_run == []
    assert [(s.label, s.rows.height, s.videos.height) for s in found.sets] == [
        ("step-1000", 9, 9),
        ("step-2000", 10, 9),
    ]
    assert all(len(c.real) == 30 and [len(s.values) for s in c.sets] == [9, 9] for c in found.scores)
    assert Catalog(root).scan("runs").filter(pl.col("pipeline") == "score").collect().height == 1, (
        "one run for all stages"
    )


def test_scores_that_differ_stand_out_of_the_floor_and_others_do_not(found):
    by_name = {c.column.name: c for c in found.scores}
    early, late = by_name["blur"].sets
    assert early.ks.value.mean == 1.0 and early.shift.value.mean > early.shift.floor.mean + 20 * early.shift.floor.std
    assert late.ks.value.mean < late.ks.floor.mean + 3 * late.ks.floor.std
    values = {s.label: s.median for s in by_name["brightness"].sets}
    assert values["step-2000"] == pytest.approx(float(np.median(by_name["brightness"].sets[1].values)))


def test_samples_are_nearer_to_the_footage_than_noise_and_a_still(found):
    by_label = {d.label: d for d in found.features.distances}
    assert (
        set(by_label) == {"step-1000", "step-2000", "noise", "the mean frame"} and found.features.model == "tiny-clip"
    )
    assert found.features.nearer("step-2000") == {"noise": True, "the mean frame": True}
    for read in (lambda d: d.frechet.value.mean, lambda d: d.kernel.mean):
        assert read(by_label["step-2000"]) < min(
            read(by_label[name]) for name in ("step-1000", "noise", "the mean frame")
        )
    assert all(d.count == d.frechet.count == 9 and d.frechet.others == 21 for d in found.features.distances)
    assert len({d.frechet.floor for d in found.features.distances}) == 1, "equal counts have one floor"
    near = by_label["step-2000"]
    assert (
        near.frechet.value.mean
        < near.frechet.floor.mean + 4 * near.frechet.floor.std
        < by_label["noise"].frechet.value.mean
    )


def test_the_copy_is_found(found, training):
    nearest = found.memorisation.neighbours[0]
    assert (
        nearest.flagged and nearest.label == "step-2000" and "a <scene> 0" in bytes.fromhex(nearest.sample_id).decode()
    )
    uri = training.clips(columns=["clip_id", "uri"]).filter(pl.col("clip_id") == nearest.clip_id).collect()["uri"][0]
    assert uri.endswith(f"{COPIED:02d}.mp4")
    assert not any(n.flagged for n in found.memorisation.neighbours if n.label == "step-1000")


def test_prompts_are_the_captions_that_caption_match_judged(found, root):
    rows = Catalog(root).clips(columns=["caption", "caption_style", "caption_match"]).collect()
    assert set(rows["caption"]) == {f"a <scene> {i}" for i in range(9)} and set(rows["caption_style"]) == {"prompt"}
    assert rows["caption_match"].is_not_null().all()


def test_again_nothing_is_scored_and_the_same_is_found(found, training, root):
    again = evaluate_samples([root], training.root, ray=NOWHERE, with_baselines=False)
    first, second = found.as_dict(), again.as_dict()
    baselines = first["features"]["distances"][2:]
    assert [d["kind"] for d in baselines] == ["noise", "still"] and second["features"]["distances"] == first[
        "features"
    ]["distances"][:2]
    assert second["scores"] == first["scores"] and second["memorisation"] == first["memorisation"]
    assert second["preferences"] == [
        {
            "a": "step-1000",
            "b": "step-2000",
            "wins_a": 0,
            "wins_b": 3,
            "ties": 0,
            "rate": 0.0,
            "low": 0.0,
            "high": pytest.approx(0.5615, abs=1e-4),
        }
    ]
    json.dumps(first, allow_nan=False)


def copy_of(catalog: str, folder: Path) -> Catalog:
    return Catalog(shutil.copytree(catalog, folder / Path(catalog).name))


def test_numbers_of_another_fingerprint_are_never_compared(found, training, root, tmp_path):
    other = copy_of(training.root, tmp_path)
    rows = other.scan("clips").collect()
    every = rows["stage_versions"].to_list()
    few = {"quality": len(every), "motion_vmaf": 2}  # clips whose stage is of another fingerprint
    changed = [
        [{**v, "fingerprint": "other"} if i < few.get(v["stage"], 0) else v for v in versions]
        for i, versions in enumerate(every)
    ]
    other.replace("clips", rows.with_columns(pl.Series("stage_versions", changed, rows.schema["stage_versions"])))
    seen = evaluate_samples([root], other.root, ray=NOWHERE, with_baselines=False)
    assert {c.column.name for c in seen.scores} == {"motion", "motion_vmaf", "caption_match"}
    assert {(n.column, n.label) for n in seen.not_compared} == {
        (name, label)
        for name in ("blur", "brightness", "contrast", "saturation", "interlaced")
        for label in ("step-2000", "step-1000")
    }
    assert all("training clips at other" in n.why for n in seen.not_compared)
    assert {c.column.name: len(c.real) for c in seen.scores} == {"motion": 30, "motion_vmaf": 28, "caption_match": 30}
    assert seen.left_out == [("motion_vmaf", 2)]
    assert [stage for stage, _ in seen.stages_not_run] == [
        "quality"
    ] and "another version of the stage" in seen.stages_not_run[0][1]


def test_a_few_samples_are_shown_and_not_judged(found, training, root, tmp_path):
    one = copy_of(root, tmp_path)
    kept = (
        one.scan("samples")
        .filter((pl.col("prompt") == "a <scene> 4") & (pl.col("checkpoint") == "runs/x/step-2000"))
        .collect()
    )
    one.delete("samples", f"sample_id NOT IN {sql_list(kept['sample_id'].to_list())}")
    seen = evaluate_samples([one.root], training.root, tmp_path / "one.html", ray=NOWHERE, with_baselines=False)
    [distance] = seen.features.distances
    assert (distance.count, distance.frechet, distance.kernel) == (1, None, None) and len(
        seen.memorisation.neighbours
    ) == 1
    assert all(len(c.sets[0].values) == 1 for c in seen.scores)
    assert "Not enough for a Fréchet distance" in (tmp_path / "one.html").read_text()
    one.delete("samples", "status = 'done'")
    pictures = sample("a", path="files/pictures")
    one.append("samples", [pictures])
    none = evaluate_samples([one.root], training.root, tmp_path / "none.html", ray=NOWHERE)
    assert {n.why for n in none.not_compared} == {"none of these samples is a video file"}
    assert (
        "none is a video" in none.features.problem
        and none.scores == []
        and "none is a video" in none.memorisation.problem
    )
    assert "not a video file" in (tmp_path / "none.html").read_text()


def test_what_cannot_be_compared_is_one_clear_line(training, root, tmp_path):
    def ask(samples=(root,), catalog=training.root, **how):
        return evaluate_samples(samples, catalog, ray=NOWHERE, **how)

    empty = Catalog.create(tmp_path / "empty")
    empty.append("samples", [sample("a", status="queued"), sample("b", status="failed")])
    for error, words, ask_for in (
        (CatalogError, "no clip of .*train matches 'motion > 1e9'", lambda: ask(where="motion > 1e9")),
        (ConfigError, "did you mean motion", lambda: ask(where="motoin > 1")),
        (CatalogError, "no finished samples .1 failed, 1 queued.", lambda: ask([empty.root])),
        (CatalogError, "no catalog at .*nowhere", lambda: ask([str(tmp_path / "nowhere")])),
        (CatalogError, "has no clips", lambda: ask(catalog=empty.root, where=None)),
        (CatalogError, "there is no folder", lambda: ask(out=tmp_path / "missing" / "page.html")),
    ):
        with pytest.raises(error, match=words) as raised:
            ask_for()
        assert "\n" not in str(raised.value)


def test_the_command_says_what_it_found(found, training, root, tmp_path):
    command = ["eval", "samples", "--samples", root, "--catalog", training.root, "--no-baselines", "--ray", NOWHERE]
    done = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "e.html")], catch_exceptions=False)
    assert done.exit_code == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == f"19 samples of step-1000, step-2000, beside 30 clips of {training.root}"
    assert any(re.match(r"step-2000 +9  0\.\d{4} ± \S+ +0\.\d{4} ± ", line) for line in lines)
    assert any(re.match(r"blur +step-1000 +median .* KS 1\.000 \(floor", line) for line in lines)
    assert "step-1000 against step-2000: 0 wins, 3 losses, 0 ties; win rate 0% [0%, 56%]" in lines
    assert re.fullmatch(r"\S+e\.html: [\d.]+ MiB", lines[-1])


def opened(browser, path: Path):
    tab = browser.new_context(viewport={"width": 1300, "height": 900}).new_page()
    trouble: list[str] = []
    tab.on("console", lambda message: trouble.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: trouble.append(str(error)))
    tab.on(
        "request",
        lambda request: trouble.append(request.url) if not request.url.startswith(("file:", "data:")) else None,
    )
    tab.goto(path.as_uri())
    until(tab, "document.documentElement.dataset.drawn !== undefined")
    return tab, trouble


def test_the_page_shows_all_of_it(found, browser, page, root):
    tab, trouble = opened(browser, page)
    plots = tab.evaluate(
        "[...document.querySelectorAll('.plot')].map((p) => p.querySelectorAll('.bars path, .scatterlayer "
        "path').length)"
    )
    assert len(plots) == len(found.scores) + 2 and all(plots)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 1300
    told = tab.inner_text("#distances")
    assert (
        "Samples of step-2000 are nearer to the training footage than noise and the mean frame." in told
        and "tiny-clip" in told
    )
    assert "noise floor" in told and "10 seeded splits" in told
    assert "a <scene> 0" in tab.inner_text("#memorisation") and "flagged" in tab.inner_text("#memorisation")
    shown = tab.evaluate("[...document.querySelectorAll('#memorisation .thumb')].map((t) => t.className)")
    assert len(shown) >= 2 and not any("missing" in name for name in shown)
    cells = tab.evaluate(
        "[...document.querySelectorAll('#prompts img')].map((i) => i.complete && i.naturalWidth > 200)"
    )
    assert len(cells) == 18 and all(cells)
    links = tab.evaluate("[...document.querySelectorAll('#prompts a')].map((a) => a.getAttribute('href'))")
    files = {(page.parent / unquote(link)).resolve() for link in links}
    assert files == {Path(root, "files", f"{i:02d}.mp4").resolve() for i in range(18)}
    assert "not a video file" in tab.inner_text("#prompts") and "not sampled" in tab.inner_text("#prompts")
    assert "56%" in tab.inner_text("#preferences")
    tab.set_viewport_size({"width": 420, "height": 800})  # a phone
    until(tab, "document.querySelector('.plot .main-svg').clientWidth < 400")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 420
    assert trouble == []
    tab.context.close()
