"""What the report says about training: means and errors known by hand, kinds and clips that were made hard, one run at
a time."""

import json
import math
import re
import subprocess
import sys
from datetime import UTC, datetime

import numpy as np
import polars as pl
import pytest

from catalogs.query.selection import Selection
from catalogs.records.losses import MEANS
from catalogs.report import charts, report
from catalogs.report.collect import gather
from catalogs.report.training_losses import Training, sliced, training
from catalogs.tables.catalog import Catalog
from datakit.errors import CatalogError
from support.catalog_rows import clip, video

EVIL = "<script>alert('x')</script>"
OLD, NEW = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 2, 1, tzinfo=UTC)
VIDEOS = ["ab" + "0" * 30, "cd" + "0" * 30]

LEVELS = {"b": [0.5] + [None] * 8 + [0.25], "w": [1.0] * 10}


def loss(
    row: dict, excess: float, count: int, run: str = "new-run", bucket: str = "b", level: int = 0, step: int = 0
) -> dict:
    return {
        "clip_id": row["clip_id"],
        "shard": row["shard"],
        "run_id": run,
        "bucket": bucket,
        "noise_level": level,
        "excess": excess,
        "count": count,
        "from_step": step,
        "to_step": step + 10,
    }


def catalog_of(
    root,
    clips: list[dict],
    losses: list[dict],
    captions: dict[str, tuple[str, str]] = {},
    runs: dict[str, dict] = {},
) -> Catalog:
    catalog = Catalog.create(root)
    catalog.append("videos", [video(v, license=name, clip_count=len(clips)) for v, name in zip(VIDEOS, ("CC0", "BY"))])
    catalog.append("clips", clips)
    catalog.append(
        "captions",
        [
            {
                "caption_id": i,
                "clip_id": i,
                "shard": "a",
                "style": style,
                "model": "m",
                "text": words,
                "flags": [],
                "created_at": OLD,
            }
            for i, (style, words) in captions.items()
        ],
    )
    catalog.append(
        "decisions",
        [
            {
                "clip_id": c["clip_id"],
                "shard": c["shard"],
                "status": "kept",
                "reasons": [],
                "recipe": "r",
                "level": 1,
                "caption_id": c["clip_id"] if c["clip_id"] in captions else None,
            }
            for c in clips
        ],
    )
    catalog.append("losses", losses)
    catalog.append(
        "runs", [{"run_id": run, "pipeline": "train dit", "config": "{}", **columns} for run, columns in runs.items()]
    )
    return catalog


def found(catalog: Catalog, run: str | None = None, where: str | None = None, thumbnails: int = 2) -> Training:
    t = training(Selection(catalog, None, where, ("clip_id",)), run, thumbnails)
    assert t is not None
    return t


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Catalog:
    """Three clips of one video, one of another, in three ranges of a run; an older run; one that nobody recorded."""
    clips = [clip(VIDEOS[0], n * 100, motion=float(n), width=640, height=360) for n in range(3)]
    clips.append(clip(VIDEOS[1], motion=9.0, width=360, height=640))
    a, b, c, d = clips
    losses = [
        loss(a, 1.0, 2),
        loss(a, 0.5, 1, level=9, step=10),
        loss(b, -2.0, 4),
        loss(c, 0.5, 1, bucket="w"),
        loss(d, 4.0, 4, level=9, step=20),
        *(loss(row, -7.0, 1, run="old-run") for row in clips[:2]),
        loss(a, 3.0, 1, run="lost-run"),
    ]
    captions = {
        a["clip_id"]: ("dense", "one two three"),
        b["clip_id"]: ("short", "word " * 40),
        d["clip_id"]: ("dense", EVIL),
    }
    return catalog_of(
        tmp_path_factory.mktemp("small") / "c",
        clips,
        losses,
        captions,
        {
            "old-run": {"status": "finished", "started_at": OLD},
            "new-run": {"status": "running", "started_at": NEW, "counts": json.dumps({"steps": 30, MEANS: LEVELS})},
        },
    )


def test_means_and_errors_by_hand(small):
    t = found(small)
    assert (t.run.run_id, t.run.from_step, t.run.to_step, t.clips, t.samples) == ("new-run", 0, 30, 4, 12)
    assert t.mean == pytest.approx(4 / 12)
    licences = {row[0]: row[1:] for row in t.kinds["Licence"].iter_rows()}
    # CC0: clips of 1.5 of 3, -2 of 4, 0.5 of 1: together nothing of 8. Residuals are the sums themselves.
    error = math.sqrt(3 / 2 * (1.5**2 + 2**2 + 0.5**2)) / 8
    assert licences["CC0"] == (3, 8, pytest.approx(0 - 1 / 3), pytest.approx(error))
    assert licences["BY"] == (1, 4, pytest.approx(1 - 1 / 3), None)  # of one clip there is no telling
    assert t.kinds["Licence"]["name"].to_list() == ["BY", "CC0"]  # the worst first
    assert t.kinds["Caption length, words"].select("name", "clips").rows() == [
        ("1 … 9", 2),
        ("30 … 79", 1),
        ("none", 1),
    ]
    assert t.kinds["Caption style"].sort("name").select("name", "samples").rows() == [
        ("dense", 7),
        ("none", 1),
        ("short", 4),
    ]
    assert t.kinds["Aspect ratio"]["name"].to_list() == ["9:16", "16:9"] and t.kinds["Motion, thirds"][
        "samples"
    ].to_list() == [3, 4, 5]
    assert "Shorter side, px" not in t.kinds and "Duration" not in t.kinds  # all the same


def test_places_are_of_samples(small):
    """Plain excess: level 0 has 1 of 2, -2 of 4 and 0.5 of 1; level 9 has 0.5 of 1 and 4 of 4."""
    places = found(small).places
    assert places["Noise level"].select("name", "clips", "samples", "mean").rows() == [
        ("0.0 … 0.1", 3, 7, pytest.approx(-0.5 / 7)),
        ("0.9 … 1.0", 2, 5, pytest.approx(4.5 / 5)),
    ]
    assert places["Bucket"].select("name", "samples", "mean").rows() == [
        ("w", 1, pytest.approx(0.5)),
        ("b", 11, pytest.approx(3.5 / 11)),
    ]


def test_the_surest_clips_come_first(small):
    """Over the mean of 1/3: a 0.5 of 3 (0.29 standard deviations), b -3.33 of 4 (-1.67), c 0.17 of 1 (0.17), d 2.67 of
    4 (1.33)."""
    a, b, c, d = (
        row["clip_id"] for row in small.clips(columns=["clip_id", "motion"]).sort("motion").collect().to_dicts()
    )
    t = found(small)
    assert [(h.clip_id, h.samples, h.mean) for h in t.worst] == [
        (d, 4, pytest.approx(2 / 3)),
        (a, 3, pytest.approx(1 / 6)),
        (c, 1, pytest.approx(1 / 6)),
    ]
    assert [h.clip_id for h in t.best] == [b] and t.worst[0].caption == EVIL and t.worst[2].caption == ""
    assert found(small, thumbnails=0).worst == []
    content = gather(Selection(small, None, None, ("clip_id",)), (), None, None, 2)
    assert {a, b, c, d} <= set(content.pictured())


def test_which_run(small):
    assert [(r.run_id, r.status, r.samples) for r in found(small).runs] == [
        ("new-run", "running", 12),
        ("old-run", "finished", 2),
        ("lost-run", "", 1),
    ]
    old = found(small, "old")
    assert (old.run.run_id, old.clips, old.mean, old.levels) == ("old-run", 2, -7.0, {})
    assert found(small).levels == LEVELS
    with pytest.raises(CatalogError, match="no run nothing has entered losses: there are new-run, old-run, lost-run"):
        found(small, "nothing")
    assert found(small, where="motion = 9").clips == 1 and found(small, where="motion > 99").clips == 0


def test_names_of_several_runs(tmp_path):
    row = clip()
    catalog = catalog_of(tmp_path / "c", [row], [loss(row, 1.0, 1, run="ab"), loss(row, 1.0, 1, run="abc")])
    assert found(catalog, "ab").run.run_id == "ab"  # a whole name is no beginning
    with pytest.raises(CatalogError, match="several runs begin with a: there are"):
        found(catalog, "a")
    empty = Catalog.create(tmp_path / "empty")
    assert training(Selection(empty, None, None, ("clip_id",)), None, 2) is None
    with pytest.raises(CatalogError, match="no run has entered losses"):
        training(Selection(empty, None, None, ("clip_id",)), "ab", 2)


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Catalog:
    """300 clips with five samples each: fast ones harder by half of the spread of single losses, five hard by three
    times that spread."""
    rng = np.random.default_rng(3)
    clips = [
        clip(VIDEOS[n % 2], n * 100, motion=float(n % 30), camera_motion=["static", "pan left", "zoom in"][n % 3])
        for n in range(300)
    ]
    losses = [
        loss(
            c,
            float(rng.normal(0.5 * (c["motion"] >= 20) - 0.1 + 3.0 * (n in (7, 77, 177, 277, 299)), 1, 5).sum()),
            5,
            level=n % 10,
        )
        for n, c in enumerate(clips)
    ]
    return catalog_of(tmp_path_factory.mktemp("planted") / "c", clips, losses, runs={"new-run": {"started_at": NEW}})


def test_planted_kinds_and_clips_are_found_and_no_others(planted):
    t = found(planted, thumbnails=4)
    assert t.worse.select("slice", "name").rows() == [("Motion, thirds", "high: from 20")]
    assert {row[:2] for row in t.better.iter_rows()} <= {
        ("Motion, thirds", "low: below 10"),
        ("Motion, thirds", "middle: 10 … 20"),
    }
    hard = {clip(VIDEOS[n % 2], n * 100)["clip_id"] for n in (7, 77, 177, 277, 299)}
    assert hard <= {h.clip_id for h in t.worst} and len(t.worst) == 8 and len(t.best) == 4


def test_errors_are_those_of_repeated_draws():
    """40 clips that differ, some seen more often than others."""
    rng = np.random.default_rng(8)
    counts = rng.integers(1, 9, 40)
    draws = []
    for _ in range(400):
        own = rng.normal(0.2, 0.5, 40)
        excess = [float(rng.normal(m, 1, n).sum()) for m, n in zip(own, counts)]
        draws.append(sliced(pl.DataFrame({"excess": excess, "count": counts}), pl.lit("all")).row(0, named=True))
    assert np.mean([d["mean"] for d in draws]) == pytest.approx(0.2, abs=0.03)
    assert np.mean([d["error"] for d in draws]) == pytest.approx(np.std([d["mean"] for d in draws]), rel=0.1)


def test_the_section(small, tmp_path):
    report(small, tmp_path / "r.html", thumbnails=2, pictures_s=1)
    html = (tmp_path / "r.html").read_text()
    part = re.search(r'<section id="loss">(.*?)</section>', html, re.S).group(1)
    assert "<h2>What training found</h2>" in part and "run <b>new-run</b>" in part and "steps <b>0 … 30</b>" in part
    assert "3 runs" in part and "new-run (shown)" in part and "&lt;script&gt;alert" in part and "<script" not in part
    assert "<b>+0.667</b>" in part and "no caption" in part and "No kind trains worse" in part
    found = json.loads(re.search(r'<script id="charts" type="application/json">(.*?)</script>', html, re.S).group(1))
    (lines,) = [c for c in found if c["data"][0].get("mode") == "lines+markers"]
    assert [(d["name"], d["y"][9]) for d in lines["data"]] == [
        ("b", 0.25),
        ("w", 1.0),
    ]  # the most frequent bucket first
    report(small, tmp_path / "r.html", thumbnails=0, where="motion > 99")
    part = re.search(r'<section id="loss">(.*?)</section>', (tmp_path / "r.html").read_text(), re.S).group(1)
    assert "Run new-run has trained on none of these clips." in part


def test_dots_lie_on_top_in_the_order_of_the_table(small):
    rows = found(small).kinds["Licence"]
    figure = charts.loss_dots(rows)
    assert figure["layout"]["yaxis"]["ticktext"][::-1] == rows["name"].to_list()
    assert figure["data"][0]["x"][::-1] == rows["mean"].to_list() and figure["data"][0]["error_x"]["array"][::-1] == [
        0.0,
        rows["error"][1],
    ]


def test_the_command_takes_a_run(small, tmp_path):
    arguments = [
        sys.executable,
        "-m",
        "datakit",
        "catalog",
        "report",
        small.root,
        "-o",
        str(tmp_path / "r.html"),
        "--thumbnails",
        "0",
    ]
    done = subprocess.run([*arguments, "--run", "old"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "run <b>old-run</b>" in (tmp_path / "r.html").read_text()
    done = subprocess.run([*arguments, "--run", "xyz"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no run xyz has entered losses" in done.stderr
