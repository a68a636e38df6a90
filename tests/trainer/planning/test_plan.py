"""Plans of hand-made catalogs: where every clip goes, or why it cannot train; the folder; the command."""

import json
import pickle
import shutil
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import typer
from typer.testing import CliRunner

from catalogs.interop import import_dataset
from catalogs.query.selection import Selection
from catalogs.tables.catalog import Catalog
from datakit.cli import plan as plan_command
from datakit.cli.plan import load_settings
from datakit.errors import CatalogError, ConfigError
from datakit.video.reader import VideoReader
from support.browser import until
from support.catalog_rows import V, clip
from support.drawn_videos import encode
from support.planned_films import SMALL, catalog, film, planned, settings
from trainer.planning.bucket_assignment import assign, first_frames
from trainer.planning.buckets import bucket_table
from trainer.planning.build_plan import make_plan
from trainer.planning.frame_rate import choose_frames
from trainer.planning.mixture import Member, read_mix
from trainer.planning.plan import ROWS, WINDOWS, Bucket, Part, Plan, plan_hash, write_plan


def where_to(plan: Plan) -> dict[int, list[tuple[str, int, int, float]] | str]:
    """By the number of the film: (bucket, first, stride, fps) of its windows, or why it has none."""
    found: dict = {}
    for row in plan.windows.to_pylist():
        found.setdefault(int(row["video_id"], 16), []).append(
            (plan.buckets[row["bucket"]].name, row["first"], row["stride"], row["fps"])
        )
    ids = {clip(f"{i:032x}")["clip_id"]: i for i in range(64)}
    return {**found, **{ids[row["clip_id"]]: row["reason"] for row in plan.left_out.to_pylist()}}


def test_where_every_clip_goes(tmp_path):
    films = [
        film(0),
        film(1, num_frames=20),
        film(2, width=360, height=640),
        film(3, fps=30.0, num_frames=33),
        film(4, fps=60.0, num_frames=65),
        film(5, fps=60.0, num_frames=64),
        film(6, fps=120.0, num_frames=240),
        film(7, kind="image", num_frames=1, fps=None),
        film(8, num_frames=16),
        film(9, width=192, height=108),
        film(10, width=1600, height=500),
        film(11, split="val"),
        film(12),
        film(13),
        film(14, num_frames=None),
        film(15, vfr=True, fps=27.3, num_frames=54),
        film(16, width=None, height=None),
        film(17, crop_x=0, crop_y=40, crop_width=640, crop_height=270),
        film(18, crop_x=140, crop_y=0, crop_width=360, crop_height=360),
        film(19, kind="image", num_frames=1, fps=None, width=300, height=300),
    ]
    plan = planned(tmp_path, films, where=None, captions={12: None}, statuses={13: "quarantined"})
    assert where_to(plan) == {
        0: [("192x336x33", 7, 1, 24.0)],
        1: [("192x336x17", 1, 1, 24.0)],
        2: [("336x192x33", 7, 1, 24.0)],
        3: [("192x336x33", 0, 1, 30.0)],
        4: [("192x336x33", 0, 2, 30.0)],
        5: [("192x336x17", 15, 2, 30.0)],
        6: [("192x336x33", 39, 5, 24.0)],
        7: [("192x336x1", 0, 1, 0.0)],
        8: "too short: 17 frames at 24.0 frames/s need 0.71 s (17 source frames), it has 0.67 s (16)",
        9: "too small: 192x108 would be enlarged 1.78 times for the smallest bucket, at most 1.1 times is allowed",
        10: "aspect: 1600x500 would lose 45.3 % of its picture in the nearest shape, at most 25 % may go",
        11: "split: it belongs to val",
        12: "no caption: `datakit run caption` writes them, plan.captions=optional does without",
        13: "quarantined: processing failed on it",
        14: "unknown frame rate: the catalog has no fps and frame count of it",
        15: [("192x336x33", 0, 0, 24.0)],
        16: "unknown size: the catalog has no width and height of it",
        17: "aspect: 640x270 would lose 26.2 % of its picture in the nearest shape, at most 25 % may go",
        18: [("256x256x33", 7, 1, 24.0)],
        19: [("256x256x1", 0, 1, 0.0)],
    }
    assert [(r["kind"], r["clips"]) for r in plan.counts["left_out"]][:3] == [
        ("aspect", 2),
        ("no caption", 1),
        ("quarantined", 1),
    ]
    assert (
        plan.counts["parts"][0]["clips"] == 20
        and plan.counts["parts"][0]["trained"] == 11
        and plan.counts["parts"][0]["left_out"] == 9
    )


def test_a_row_has_all_that_reading_takes(tmp_path):
    borders = {"crop_x": 2, "crop_y": 4, "crop_width": 600, "crop_height": 340}
    films = [
        film(0, path="clip_files/a.mp4", lost_start=0, lost_end=0, motion_vmaf=3.5, **borders),
        film(1, path="clip_files/b.mp4", lost_start=3, lost_end=0),
    ]
    plan = planned(tmp_path, films)
    a, b = plan.rows([0, 1])
    geometry = a.pop("geometry")
    assert len(geometry) == 16 and int(geometry, 16) and geometry != b["geometry"]
    assert a == {
        "clip_id": films[0][1]["clip_id"],
        "video_id": f"{0:032x}",
        "part": 0,
        "uri": f"/v/{0:032x}.mp4",
        "path": f"{tmp_path}/c/clip_files/a.mp4",
        "stream": 0,
        "time_base": "1/24",
        "start_pts": 0,
        "end_pts": 100,
        "crop_x": 2,
        "crop_y": 4,
        "crop_width": 600,
        "crop_height": 340,
        "width": 640,
        "height": 360,
        "kind": "video",
        "bucket": 0,
        "first": 7,
        "frames": 33,
        "stride": 1,
        "fps": 24.0,
        "caption": "clip 0",
        "motion_vmaf": 3.5,
        "split": "train",
    }
    assert b["path"] is None  # the file lacks three frames: the source is read
    assert (b["crop_x"], b["crop_y"], b["crop_width"], b["crop_height"]) == (0, 0, 640, 360)
    assert plan.rows([1], ["caption"]) == [{"caption": "clip 1"}]
    with pytest.raises(IndexError, match="no window 2: the plan has 2"):
        plan.rows([2])


def test_long_clips_give_windows_evenly_spaced(tmp_path):
    films = [
        film(0, num_frames=400),
        film(1, num_frames=66),
        film(2, num_frames=65),
        film(3, num_frames=400, vfr=True, fps=30.0),
    ]
    found = where_to(planned(tmp_path, films, "windows=4"))
    assert [first for _, first, _, _ in found[0]] == [0, 122, 244, 367]
    assert [first for _, first, _, _ in found[1]] == [0, 33]
    assert [first for _, first, _, _ in found[2]] == [16]
    assert found[3] == [("192x336x33", 0, 0, 24.0)]
    shutil.rmtree(tmp_path / "plan")
    one = make_plan(Selection(Catalog(tmp_path / "c")), settings(*SMALL, "windows=1"), tmp_path / "plan")
    assert [first for _, first, _, _ in where_to(one)[0]] == [183]


def test_resolutions_and_enlargement(tmp_path):
    """768px takes what reaches 576 x 1024 within 1.1 times; what is too short for it goes down."""
    films = [
        film(0, width=1920, height=1080),
        film(1, width=932, height=524),
        film(2, width=930, height=523),
        film(3, width=1920, height=1080, num_frames=20),
    ]
    found = where_to(planned(tmp_path, films, "bucket_config={768px: {33: [1, 1]}, 256px: {17: [1, 1], 33: [1, 1]}}"))
    assert {i: windows[0][0] for i, windows in found.items()} == {
        0: "576x1024x33",
        1: "576x1024x33",
        2: "192x336x33",
        3: "192x336x17",
    }


def test_a_quarter_may_be_cut_off_but_not_more(tmp_path):
    shape = ("resolutions=[768px]", "aspects=['16:9']", "max_upscale=4", "tokens=30000")
    found = where_to(planned(tmp_path, [film(0, width=640, height=480), film(1, width=639, height=480)], *shape))
    assert found[0][0][0] == "576x1024x33"
    assert found[1] == "aspect: 639x480 would lose 25.1 % of its picture in the nearest shape, at most 25 % may go"


def test_pictures_of_videos_only_if_asked(tmp_path):
    films = [film(0), film(1, num_frames=5)]
    assert where_to(planned(tmp_path / "a", films))[1].startswith("too short")
    asked = where_to(planned(tmp_path / "b", films, "images_from_video=true"))
    assert asked[0][0][0] == "192x336x33"
    assert asked[1] == [("192x336x1", first, 1, 0.0) for first in (0, 1, 2, 4)]
    only = planned(tmp_path / "c", films, "images_from_video=true", "frames=[1]", "windows=1")
    assert {row["fps"] for row in only.windows.to_pylist()} == {0.0} and only.windows["first"].to_pylist() == [23, 2]


def test_no_bucket_for_a_kind(tmp_path):
    films = [film(0), film(1, kind="image", num_frames=1, fps=None)]
    assert (
        where_to(planned(tmp_path / "a", films, "frames=[33]"))[1]
        == "no bucket for images: none of its size has one frame"
    )
    found = where_to(planned(tmp_path / "b", films, "frames=[1, 33]", "tokens=1000"))
    assert (
        found[0] == "no bucket for videos: none of its size has more than one frame and fits the budget of 1000 tokens"
    )


@pytest.fixture(scope="module")
def many() -> pl.DataFrame:
    """50,000 clips of every shape, rate and length."""
    rng = np.random.default_rng(3)
    n = 50_000
    fps = np.where(rng.random(n) < 0.5, rng.choice([23.976, 24, 25, 29.97, 30, 50, 60, 120], n), rng.uniform(5, 250, n))
    image = rng.random(n) < 0.1
    width, height = rng.integers(60, 2500, (2, n))
    bars = rng.random(n) < 0.3
    return pl.DataFrame(
        {
            "clip_id": [f"{i:032x}" for i in range(n)],
            "kind": np.where(image, "image", "video"),
            "fps": np.where(image, np.nan, fps),
            "vfr": rng.random(n) < 0.1,
            "num_frames": np.where(image, 1, np.maximum((rng.gamma(2, 2, n) * fps).astype(int), 1)),
            "width": width,
            "height": height,
            "crop_width": np.where(bars, width * 4 // 5, width),
            "crop_height": height,
            "caption": np.where(rng.random(n) < 0.95, "a", " "),
            "split": rng.choice(["train", "val"], n, p=[0.95, 0.05]),
            "status": rng.choice(["kept", "quarantined"], n, p=[0.97, 0.03]),
        }
    ).with_columns(fps=pl.col("fps").fill_nan(None), caption=pl.when(pl.col("caption") == "a").then("caption"))


@pytest.mark.parametrize(
    "sets",
    [
        (),
        ("images_from_video=true", "windows=3"),
        ("time_error=0.5", "fps=16"),
        ("bucket_config={256px: {1: [0.5, 4], 33: [[0.7, 0.5], 2], 65: [0.2, 2]}, 768px: {33: [0.3, 1]}}",),
    ],
)
def test_every_clip_is_accounted_for_and_every_window_lies_inside(many, sets):
    chosen = settings("resolutions=[256px, 480p]", "frames=[1, 17, 65]", *sets)
    table = bucket_table(chosen)
    found = assign(many, table, chosen)
    placed = found.bucket >= 0
    assert (placed == found.reasons.is_null().to_numpy()).all() and (placed == (found.windows > 0)).all()
    assert 0.2 < placed.mean() < 0.9 and found.windows.max() <= chosen.windows
    rows = np.flatnonzero(placed)
    frames = np.array([b.frames for b in table.buckets])[found.bucket[rows]]
    image = (many["kind"] == "image").to_numpy()[rows]
    has = np.where(image, 1, many["num_frames"].to_numpy()[rows])
    assert ((frames == 1) == image).all() or chosen.images_from_video
    by_time = (found.stride[rows] == 0) & many["vfr"].to_numpy()[rows]
    owner, first = first_frames(found.windows[rows], found.needed[rows], has, by_time)
    assert (np.bincount(owner) == found.windows[rows]).all()
    assert (first >= 0).all() and (first + found.needed[rows][owner] <= has[owner]).all()
    strided = found.stride[rows] > 0
    assert (found.needed[rows] == (frames - 1) * found.stride[rows] + 1)[strided].all() and (
        found.needed[rows] >= frames
    ).all()
    same = owner[1:] == owner[:-1]
    assert (first[1:] - first[:-1] >= found.needed[rows][owner[1:]])[same].all()
    # The picture: never enlarged or cropped by more than is allowed.
    size = np.array([(b.height, b.width) for b in table.buckets])[found.bucket[rows]]
    box = many.select("crop_height", "crop_width").to_numpy()[rows]
    scale = (size / box).max(axis=1)
    assert scale.max() <= 1.1 + 1e-9 and found.crop[rows].max() <= 0.25 + 1e-9
    assert found.crop[rows] == pytest.approx(1 - size.prod(axis=1) / (box.prod(axis=1) * scale**2))


def test_no_better_bucket_is_left_unused(many):
    """A clip that fills a longer window at its size, or reaches the next resolution, would be there."""
    chosen = settings("resolutions=[256px, 480p]", "frames=[17, 33, 65]", "captions=optional", "tokens=200000")
    table = bucket_table(chosen)
    found = assign(many, table, chosen)
    buckets = [(b.frames, b.height * b.width) for b in table.buckets]
    even = many.with_row_index().filter((pl.col("kind") == "video") & (pl.col("fps") == 24) & ~pl.col("vfr"))
    for row in even.head(400).iter_rows(named=True):
        if found.bucket[row["index"]] < 0:
            continue
        frames, area = buckets[found.bucket[row["index"]]]
        assert frames == max(n for n in (17, 33, 65) if n <= row["num_frames"])
        fits = [
            h * w
            for level in table.levels
            for h, w in level.sizes
            if max(h / row["crop_height"], w / row["crop_width"]) <= 1.1
            and 1
            - h * w / (row["crop_height"] * row["crop_width"] * max(h / row["crop_height"], w / row["crop_width"]) ** 2)
            <= 0.1
        ]
        assert not fits or area >= max(fits) * 0.85


def test_keep_probabilities_are_drawn_once_for_each_clip(many):
    """Open-Sora's meaning: p of the clips stay at a resolution, the others go down; q take a length."""
    config = "bucket_config={768px: {33: [0.3, 1]}, 256px: {33: [[1.0, 0.25], 2], 17: [1.0, 4]}}"
    large = many.with_columns(
        width=1920,
        height=1080,
        crop_width=1920,
        crop_height=1080,
        kind=pl.lit("video"),
        fps=24.0,
        vfr=False,
        num_frames=100,
        caption=pl.lit("a"),
        split=pl.lit("train"),
        status=pl.lit("kept"),
    ).head(8000)
    chosen = settings(config)
    found = assign(large, bucket_table(chosen), chosen)
    names = np.array([b.name for b in bucket_table(chosen).buckets])[found.bucket]
    shares = {name: (names == name).mean() for name in np.unique(names)}
    assert shares == pytest.approx({"576x1024x33": 0.3, "192x336x33": 0.175, "192x336x17": 0.525}, abs=0.02)
    shuffled = large.sample(fraction=1, shuffle=True, seed=1).head(4000)
    again = assign(shuffled, bucket_table(chosen), chosen)
    assert (
        dict(zip(shuffled["clip_id"], again.bucket.tolist())).items()
        <= dict(zip(large["clip_id"], found.bucket.tolist())).items()
    )
    other = assign(large, bucket_table(chosen), settings(config, "seed=1"))
    assert 0.3 < (other.bucket != found.bucket).mean() < 0.7
    none = settings("bucket_config={256px: {33: [0, 1]}}")
    assert set(assign(large.head(5), bucket_table(none), none).reasons) == {"keep probability: drawn for no bucket"}


def test_many_clips_are_assigned_in_no_time(many):
    """A million take 3 s of two cores; here it is a quarter of it, and slack for slow machines."""
    clips = pl.concat([many] * 5)
    chosen = settings("resolutions=[256px, 768px]")
    before = time.process_time()
    found = assign(clips, bucket_table(chosen), chosen)
    assert len(found.bucket) == 250_000 and time.process_time() - before < 5


@pytest.mark.parametrize("n", [1, 3, 7])
def test_small_sets_yield_batches(tmp_path, n):
    plan = planned(tmp_path, [film(i) for i in range(n)], "global_batch=4")
    (bucket,) = plan.buckets
    assert bucket == Bucket("192x336x33", 192, 336, 33, 3, 2780)
    assert plan.counts["buckets"][0]["micro_batches"] == -(-n // 3) and plan.counts["epoch"]["samples"] == n
    assert plan.counts["epoch"]["steps"] >= 1 and plan.windows.num_rows == n


def test_steps_of_an_epoch(tmp_path):
    """7 of one bucket in micro-batches of 3, 4 of another in micro-batches of 6: 3 + 1; two a step: 1 whole, the rest
    together."""
    films = [*(film(i) for i in range(7)), *(film(i, num_frames=20) for i in range(7, 11))]
    plan = planned(tmp_path, films, "global_tokens=13000")
    assert {b.name: b.batch for b in plan.buckets} == {"192x336x33": 3, "192x336x17": 5} and plan.global_batches == 2
    epoch = plan.counts["epoch"]
    assert (epoch["micro_batches"], epoch["steps"], epoch["samples"]) == (4, 2, 11)
    assert epoch["tokens"] == 7 * 2780 + 4 * (5 * 252 + 512) and epoch["hours"] == pytest.approx(
        (7 * 33 + 4 * 17) / 24 / 3600
    )
    by_name = {r["name"]: r for r in plan.counts["buckets"]}
    assert by_name["192x336x33"]["fill"] == pytest.approx(7 / 9) and by_name["192x336x17"]["steps"] == 0.5
    assert by_name["192x336x33"]["used"] == pytest.approx(33 / 48)
    assert by_name["192x336x33"]["crop"] == pytest.approx(1 - 336 / 192 / (640 / 360))
    assert sum(r["cost_share"] for r in plan.counts["buckets"]) == pytest.approx(1)


def test_weights_of_images(tmp_path):
    films = [*(film(i) for i in range(4)), *(film(i, kind="image", num_frames=1, fps=None) for i in range(4, 14))]
    plan = planned(tmp_path, films, "weights={1: 0.3}")
    by_name = {r["name"]: r for r in plan.counts["buckets"]}
    assert by_name["192x336x1"]["samples"] == pytest.approx(3) and by_name["192x336x33"]["samples"] == 4
    assert {b.name: plan.repeat(0, i) for i, b in enumerate(plan.buckets)} == {"192x336x1": 0.3, "192x336x33": 1.0}


def test_the_same_gives_the_same(tmp_path):
    films = [film(i, num_frames=10 + 3 * i) for i in range(12)]
    made = catalog(tmp_path / "c", films)
    one = make_plan(Selection(made), settings(), tmp_path / "a")
    two = make_plan(Selection(made), settings(), tmp_path / "b")
    assert one.hash == two.hash and len(one.hash) == 32
    for name in ("windows.arrow", "left_out.arrow", "plan.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    other = make_plan(Selection(made), settings(*SMALL, "windows=1", "frames=[17]"), tmp_path / "d")
    assert other.hash != one.hash
    weighted = make_plan(Member("a", Selection(made), repeat=2.0), settings(), tmp_path / "e")
    assert (
        weighted.hash != one.hash
        and (tmp_path / "e" / "windows.arrow").read_bytes() == (tmp_path / "a" / "windows.arrow").read_bytes()
    )


def test_files_that_move_leave_the_plan_the_same(tmp_path):
    films = [film(i) for i in range(3)]
    moved = [
        ({**v, "uris": [{"uri": f"/elsewhere/{i}.mp4", "size": 1, "etag": "e"}]}, c) for i, (v, c) in enumerate(films)
    ]
    one, two = planned(tmp_path / "a", films), planned(tmp_path / "b", moved)
    assert (
        one.hash == two.hash
        and one.windows["uri"] != two.windows["uri"]
        and one.windows["geometry"] == two.windows["geometry"]
    )
    assert planned(tmp_path / "d", films, captions={1: "another"}).hash != one.hash


def test_windows_are_sorted_for_reading(tmp_path):
    films = [film(0, num_frames=200), film(1, num_frames=18), film(2, num_frames=200)]
    second = [clip(f"{2:032x}", 500, num_frames=40, fps=24.0, width=640, height=360, time_base="1/24", split="train")]
    made = catalog(tmp_path / "c", films)
    made.append("clips", second)
    made.append("decisions", [{"clip_id": second[0]["clip_id"], "shard": "0", "status": "kept", "recipe": "r"}])
    plan = make_plan(Selection(made), settings(*SMALL, "captions=optional"), tmp_path / "plan")
    keys = [(r["bucket"], r["video_id"], r["start_pts"], r["first"]) for r in plan.windows.to_pylist()]
    assert keys == sorted(keys) and [k[2] for k in keys if int(k[1], 16) == 2] == [0, 0, 0, 0, 500]


def test_a_mix_by_weight_and_by_repeat(tmp_path):
    """12 samples of 10 windows and 4 of 4: three to one, and every window at least once."""
    catalog(tmp_path / "a", [film(i) for i in range(10)])
    catalog(tmp_path / "b", [film(i + 100) for i in range(4)])
    (tmp_path / "mix.yaml").write_text("parts:\n- {catalog: a, weight: 3}\n- {catalog: b, name: second, weight: 1}\n")
    plan = make_plan(read_mix(tmp_path / "mix.yaml"), settings(), tmp_path / "plan")
    assert [(p.name, p.weight) for p in plan.parts] == [("a", 1.2), ("second", 1.0)]
    assert [p["share"] for p in plan.counts["parts"]] == [pytest.approx(0.75), pytest.approx(0.25)]
    assert [p["epochs"] for p in plan.counts["parts"]] == [pytest.approx(1.2), pytest.approx(1.0)]
    assert plan.counts["epoch"]["samples"] == pytest.approx(16) and plan.parts[1].catalog == str(tmp_path / "b")
    (tmp_path / "mix.yaml").write_text("parts:\n- {catalog: a, repeat: 0.5}\n- {catalog: b}\n")
    again = make_plan(read_mix(tmp_path / "mix.yaml"), settings(), tmp_path / "plan2")
    assert [p.weight for p in again.parts] == [0.5, 1.0] and again.counts["epoch"]["samples"] == 9
    recorded = Selection.from_dict(Catalog(again.parts[0].catalog), again.parts[0].selection)
    assert recorded.content_hash == again.parts[0].selection["content_hash"] and recorded.size[0] == 10


def test_a_clip_in_two_parts_has_windows_in_both(tmp_path):
    made = catalog(tmp_path / "c", [film(i) for i in range(4)])
    members = [
        Member("all", Selection(made)),
        Member("some", Selection(made, where=f"status = 'kept' and video_id < '{2:032x}'")),
    ]
    plan = make_plan(members, settings(), tmp_path / "plan")
    assert plan.windows["part"].to_pylist() == [0, 1, 0, 1, 0, 0] and plan.counts["in_several_parts"] == 2


@pytest.mark.parametrize(
    "text, why",
    [
        ("parts: []", "at least 1 item"),
        ("parts: [{catalog: a, weight: 1}, {catalog: b}]", "give every part a weight, or none"),
        ("parts: [{catalog: a, weight: 1, repeat: 2}]", "give every part a weight, or none"),
        (
            "parts: [{catalog: a, wieght: 1}]",
            r"parts.0.wieght: .* \(a part has catalog, name, where, snapshot, weight, repeat\)",
        ),
        ("parts: [{catalog: a, weight: 0}]", "greater than 0"),
        ("parts: [{catalog: a}, {catalog: a}]", "two parts are named 'a'"),
        ("parts: [{catalog: nowhere}]", "no catalog at"),
    ],
)
def test_mixes_that_make_no_sense(tmp_path, text, why):
    catalog(tmp_path / "a", [film(0)])
    catalog(tmp_path / "b", [film(1)])
    (tmp_path / "mix.yaml").write_text(text)
    with pytest.raises((ConfigError, CatalogError), match=why):
        read_mix(tmp_path / "mix.yaml")


def test_nothing_to_plan_says_why(tmp_path):
    made = catalog(tmp_path / "c", [film(0, num_frames=3), film(1, num_frames=4), film(2, split="test")])
    why = (
        r"none of the 3 clips of .*/c where status = 'kept' can train \(2: too short: 17 frames .*; 1: split: .* test\)"
    )
    with pytest.raises(ConfigError, match=why):
        make_plan(Selection(made), settings(), tmp_path / "plan")
    with pytest.raises(ConfigError, match="no clip of .* where width > 5000 is selected"):
        make_plan(Selection(made, where="width > 5000"), settings(), tmp_path / "plan")
    with pytest.raises(ConfigError, match="did you mean width"):
        Selection(made, where="widht > 5000")
    assert not (tmp_path / "plan").exists()
    held = make_plan(Selection(made), settings(*SMALL, "split=test"), tmp_path / "plan")
    assert held.windows["split"].to_pylist() == ["test"]


def window(index: int) -> dict:
    return {
        name: {"clip_id": f"{index:032x}", "video_id": V, "geometry": "0" * 16}.get(name, None if field.nullable else 0)
        for name, field in zip(WINDOWS.names, WINDOWS)
    }


def small(folder: Path, count: int = 1, **options) -> Plan:
    one = pa.Table.from_pylist([window(0)], WINDOWS).take(np.zeros(count, np.int64))
    table = one.set_column(0, WINDOWS.field("clip_id"), pa.array([f"{i:032x}" for i in range(count)])).combine_chunks()
    batches = table.to_batches(max_chunksize=ROWS)
    return write_plan(
        folder, [Bucket("a", 16, 16, 1, 1, 1)], [Part("p", 1.0, {}, "/c")], {}, 1, {}, batches, [], **options
    )


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    def broken():
        yield pa.RecordBatch.from_pylist([window(0)], WINDOWS)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_plan(tmp_path / "p", [], [], {}, 1, {}, broken(), [])
    assert list(tmp_path.iterdir()) == []
    first = small(tmp_path / "p")
    small(tmp_path / "p")  # the same again
    with pytest.raises(ConfigError, match="holds another plan, and a run may be at work on it"):
        small(tmp_path / "p", 2)
    assert Plan.open(tmp_path / "p").hash == first.hash
    second = small(tmp_path / "p", 2, overwrite=True)
    assert Plan.open(tmp_path / "p").hash == second.hash != first.hash
    assert first.windows.num_rows == 1 and second.windows.num_rows == 2  # one that is open stays what it was
    assert [path.name for path in tmp_path.iterdir()] == ["p"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    for folder in (tmp_path / "other", tmp_path / "other" / "file"):
        with pytest.raises(ConfigError, match="is there and is no plan"):
            small(folder, overwrite=True)
    with pytest.raises(ConfigError, match="the plan cannot be written to .*file/p"):
        small(tmp_path / "other" / "file" / "p")


def test_damage_is_told(tmp_path):
    plan = small(tmp_path / "p", 3)
    with pytest.raises(ConfigError, match="no plan at .*nowhere: `datakit plan --catalog DIR --out"):
        Plan.open(tmp_path / "nowhere")
    whole = (tmp_path / "p" / "plan.json").read_text()
    cases = [
        ("{", "damaged"),
        ("[]", "format None, this datakit reads 1"),
        (whole.replace('"format": 1', '"format": 9'), "has format 9"),
        (whole.replace('"buckets"', '"bukcets"'), "damaged"),
        (whole.replace('"windows": 3', '"windows": 4'), "does not belong to its plan.json"),
    ]
    for text, why in cases:
        (tmp_path / "p" / "plan.json").write_text(text)
        with pytest.raises(ConfigError, match=why):
            Plan.open(tmp_path / "p")
    (tmp_path / "p" / "plan.json").write_text(whole)
    plan.verify()
    arrow = bytearray((tmp_path / "p" / "windows.arrow").read_bytes())
    at = arrow.index(b"%032x" % 1)
    arrow[at] = ord("f")
    (tmp_path / "p" / "windows.arrow").write_bytes(arrow)
    with pytest.raises(ConfigError, match="windows.arrow was changed after planning"):
        Plan.open(tmp_path / "p").verify()
    (tmp_path / "p" / "windows.arrow").write_bytes(arrow[:-300])
    with pytest.raises(ConfigError, match="windows.arrow is missing or damaged"):
        Plan.open(tmp_path / "p")
    (tmp_path / "p" / "windows.arrow").unlink()
    with pytest.raises(ConfigError, match="windows.arrow is missing or damaged"):
        Plan.open(tmp_path / "p")


def test_many_windows_are_mapped_and_cross_processes(tmp_path):
    plan = small(tmp_path / "p", ROWS + 5)
    before = pa.total_allocated_bytes()
    assert plan.rows([ROWS + 4, 0], ["clip_id"]) == [{"clip_id": f"{ROWS + 4:032x}"}, {"clip_id": f"{0:032x}"}]
    assert pa.total_allocated_bytes() - before < 10_000
    sent = pickle.dumps(plan)
    assert len(sent) < 1000 and pickle.loads(sent).hash == plan.hash


def test_the_hash_is_of_values_not_of_buffers(tmp_path):
    told = [{"caption": None if i % 3 else f"text {i}" * i, "motion_vmaf": None if i % 2 else 1.5} for i in range(9)]
    rows = pa.RecordBatch.from_pylist([{**window(i), **columns} for i, columns in enumerate(told)], WINDOWS)
    again = pa.RecordBatch.from_pylist(rows.slice(2, 5).to_pylist(), WINDOWS)
    assert plan_hash([], [], 1, [rows.slice(2, 5)]) == plan_hash([], [], 1, [again]) != plan_hash([], [], 1, [rows])


def app() -> typer.Typer:
    made = typer.Typer(pretty_exceptions_enable=False)
    made.command("plan")(plan_command.plan)
    made.command("other")(lambda: None)
    return made


def command(*arguments) -> str:
    done = CliRunner().invoke(app(), ["plan", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_command_prints_what_it_planned(tmp_path):
    films = [film(0), film(1), film(2, num_frames=3), film(3, kind="image", num_frames=1, fps=None)]
    catalog(tmp_path / "c", films, statuses={1: "rejected"})
    sets = [part for s in SMALL for part in ("--set", f"plan.{s}")]
    said = command("--catalog", tmp_path / "c", "--out", tmp_path / "p", *sets, "--where", "width > 3")
    for text in (
        "192x336x33",
        "too short",
        "17 frames at 24.0 frames/s need 0.71 s",
        "4 clips: 3 train, in 3 windows; 1 left out",
        "a step: 1 micro-batch",
        "1 rejected: the condition selects them",
        "picture in plan.html",
    ):
        assert text in said
    told = json.loads(
        command("--catalog", tmp_path / "c", "--out", tmp_path / "p", *sets, "--where", "width > 3", "--json")
    )
    assert told["plan_hash"] == Plan.open(tmp_path / "p").hash and told["counts"]["epoch"]["samples"] == 3
    assert told["settings"]["budget"] == 9000 and told["parts"][0]["selection"]["where"] == "width > 3"
    mix = tmp_path / "mix.yaml"
    mix.write_text("parts:\n- {catalog: c, name: one}\n- {catalog: c, name: two, repeat: 3}\n")
    said = command("--mix", mix, "--out", tmp_path / "m", *sets)
    assert "times seen in an epoch" in said and "clips train in more than one part" in said


@pytest.mark.parametrize(
    "arguments, why",
    [
        ([], "give --catalog DIR, or --mix FILE"),
        (["--catalog", "c", "--mix", "m.yaml"], "give --catalog DIR, or --mix FILE"),
        (["--mix", "m.yaml", "--where", "width > 3"], "leave --where and --snapshot out"),
        (["--catalog", "c", "--set", "windows=3"], "here it is plan.OPTION=value"),
        (["--catalog", "c", "--set", "plan.window=3"], "unknown setting plan.window: did you mean windows"),
        (["--catalog", "c", "--preset", "nonesuch"], "no preset nonesuch: there are"),
        (["--catalog", "c", "--set", "plan.gpu=tpu"], "no GPU 'tpu'"),
        (["--catalog", "c", "--where", "widht > 3"], "did you mean width"),
        (["--catalog", "c", "--snapshot", "v9"], "no snapshot 'v9'"),
        (["--catalog", "nowhere"], "no catalog at nowhere"),
    ],
)
def test_what_makes_no_sense_is_one_line(tmp_path, monkeypatch, arguments, why):
    monkeypatch.chdir(tmp_path)
    catalog(tmp_path / "c", [film(0)])
    with pytest.raises((ConfigError, CatalogError), match=why):
        command(*arguments, "--out", "p")
    assert not (tmp_path / "p").exists()


def test_settings_come_from_presets_files_and_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_command, "PRESETS", tmp_path)
    (tmp_path / "mine.yaml").write_text("model: {depth: 3}\nplan: {frames: [17], tokens: 5000, memory: {width: 64}}\n")
    (tmp_path / "file.yaml").write_text("engine: {plugin: ddp}\nplan: {tokens: 6000}\n")
    found = load_settings("mine", tmp_path / "file.yaml", ["plan.memory.shards=2"])
    assert (found.frames, found.tokens, found.memory.width, found.memory.shards) == ([17], 6000, 64, 2)


def test_every_shipped_preset_has_a_plan():
    for file in plan_command.PRESETS.glob("*.yaml"):
        found = load_settings(file.stem, None, ["plan.gpu=null", "plan.tokens=50000"])
        assert bucket_table(found).buckets


def test_the_planned_frames_are_there_in_real_files(tmp_path):
    """Each frame's grey is its number: what is chosen by the plan and the file's own timestamps shows the right
    moments."""

    def frames(count: int) -> list[np.ndarray]:
        return [np.full((72, 128, 3), 20 + 3 * i, np.uint8) for i in range(count)]

    (tmp_path / "v").mkdir()
    for rate in (25, 30, 50, 60):
        encode(tmp_path / "v" / f"{rate}.mp4", frames(60), rate)
    uneven = [round(i * 1000 / 30) for i in range(60) if i % 7]
    encode(tmp_path / "v" / "vfr.mp4", frames(len(uneven)), 30, pts=uneven, time_base=Fraction(1, 1000))
    table = tmp_path / "table.csv"
    table.write_text("path,text\n" + "".join(f"{path},a\n" for path in sorted((tmp_path / "v").iterdir())))
    import_dataset(str(table), str(tmp_path / "c"))
    chosen = settings("resolutions=[64px]", "aspects=['16:9']", "frames=[17]", "windows=1", "captions=optional")
    plan = make_plan(Selection(Catalog(tmp_path / "c"), where=None), chosen, tmp_path / "plan")
    shown = {}
    for row in plan.windows.to_pylist():
        with VideoReader(row["uri"], row["stream"]) as reader:
            pictures = list(reader.frames())
        moments = [(p.pts - pictures[0].pts) * Fraction(row["time_base"]) for p in pictures]
        picked = choose_frames(moments, row["first"], row["frames"], row["stride"], row["fps"])
        greys = [round((float(pictures[i].rgb().mean()) - 20) / 3) for i in picked]
        assert greys == picked  # frame n of the file shows n
        shown[Path(row["uri"]).stem] = (picked, row["fps"], moments)
    assert shown["25"][0] == list(range(21, 38)) and shown["25"][1] == 25.0
    assert shown["30"][0] == list(range(21, 38)) and shown["30"][1] == 30.0
    assert shown["50"][0] == list(range(13, 46, 2)) and shown["50"][1] == 25.0
    assert shown["60"][0] == list(range(13, 46, 2)) and shown["60"][1] == 30.0
    picked, fps, moments = shown["vfr"]
    assert fps == 24.0 and all(abs(moments[i] - n / fps) <= 1 / fps for n, i in enumerate(picked))


def test_the_picture_opens_without_a_network(browser, tmp_path):
    films = [
        *(film(i, num_frames=17 + 8 * (i % 3)) for i in range(9)),
        film(9, width=360, height=640),
        film(10, num_frames=2),
    ]
    catalog(tmp_path / "c", films)
    (tmp_path / "mix.yaml").write_text("parts:\n- {catalog: c, name: '<b>&'}\n- {catalog: c, name: again, repeat: 2}\n")
    make_plan(read_mix(tmp_path / "mix.yaml"), settings(), tmp_path / "plan")
    tab = browser.new_context(viewport={"width": 1000, "height": 800}).new_page()
    trouble = []
    tab.on("console", lambda message: trouble.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: trouble.append(str(error)))
    tab.on(
        "request",
        lambda request: trouble.append(request.url) if not request.url.startswith(("file:", "data:")) else None,
    )
    tab.goto((tmp_path / "plan" / "plan.html").as_uri())
    until(tab, "document.documentElement.dataset.drawn !== undefined")
    text = tab.inner_text("main")
    drawn = tab.evaluate(
        "[...document.querySelectorAll('.plot')].map((p) => p.querySelectorAll('.bars path, .hm image').length)"
    )
    assert trouble == [] and len(drawn) == 3 and all(drawn)
    assert "<b>&" in text and "too short" in text and "192x336x33" in text and "20 of" not in text
