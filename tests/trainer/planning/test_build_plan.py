"""From catalogs to the rows of a plan."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from catalogs.query.selection import Selection
from catalogs.tables.catalog import Catalog
from datakit.errors import ConfigError
from datakit.video.sparse_reader import SCALER
from support.planned_films import SMALL, catalog, film, planned, settings
from trainer.planning import build_plan
from trainer.planning.build_plan import make_plan
from trainer.planning.mixture import Member

IMAGE = {"kind": "image", "num_frames": 1, "fps": None}


def number(row: dict) -> int:
    return int(row["video_id"], 16)


def test_windows_of_every_kind_of_clip(tmp_path):
    """An even rate lies in the middle, a variable one at the start, an image is one frame; buckets by size."""
    films = [film(0), film(1, vfr=True, fps=30.0, num_frames=60), film(2, **IMAGE), film(3, width=360, height=640)]
    plan = planned(
        tmp_path, [*films, film(4, num_frames=70, fps=23.976), film(5, vfr=True, fps=24.0, num_frames=4)], "windows=2"
    )
    rows = [(number(r), r["bucket"], r["first"], r["frames"], r["stride"], r["fps"]) for r in plan.windows.to_pylist()]
    assert rows == [
        (0, 0, 7, 33, 1, 24.0),
        (1, 0, 0, 33, 0, 24.0),
        (4, 0, 0, 33, 1, 23.976),
        (4, 0, 37, 33, 1, 23.976),
        (3, 1, 7, 33, 1, 24.0),
        (2, 2, 0, 1, 1, 0.0),
    ]
    assert [b.name for b in plan.buckets] == ["192x336x33", "336x192x33", "192x336x1"], "no bucket without windows"
    assert [r["reason"].split(":")[0] for r in plan.left_out.to_pylist()] == ["too short"]


def test_windows_lie_as_they_are_read(tmp_path):
    """By bucket, video, start, first frame and part: here two parts of one catalog."""
    made = catalog(tmp_path / "c", [film(2, num_frames=70), film(1), film(0, num_frames=20)])
    members = [Member("all", Selection(made)), Member("long", Selection(made, where="num_frames > 60"))]
    plan = make_plan(members, settings(), tmp_path / "plan")
    rows = [(r["bucket"], number(r), r["first"], r["part"]) for r in plan.windows.to_pylist()]
    assert rows == [(0, 1, 7, 0), (0, 2, 0, 0), (0, 2, 0, 1), (0, 2, 37, 0), (0, 2, 37, 1), (1, 0, 1, 0)]
    assert [p.name for p in make_plan([Selection(made)] * 2, settings(), tmp_path / "two").parts] == [
        "part 1",
        "part 2",
    ]


def test_rows_come_from_their_own_part(tmp_path):
    """Also where they are written in several batches."""
    for name, films in (("a", [film(0), film(1, num_frames=3)]), ("b", [film(i, num_frames=100) for i in range(2, 5)])):
        catalog(tmp_path / name, films)
    selections = [Selection(Catalog(tmp_path / name)) for name in ("a", "b")]
    plan = make_plan(selections, settings(), tmp_path / "plan")
    assert [p.catalog for p in plan.parts] == [str(tmp_path / "a"), str(tmp_path / "b")]
    rows = plan.windows.to_pylist()
    assert [(number(r), r["part"], r["uri"]) for r in rows] == [
        (n, int(n > 1), f"/v/{n:032x}.mp4") for n in (0, 2, 2, 2, 3, 3, 3, 4, 4, 4)
    ]
    assert {(r["caption"], number(r)) for r in rows} == {("clip 0", 0), ("clip 0", 2), ("clip 1", 3), ("clip 2", 4)}
    assert [(r["part"], r["reason"][:9]) for r in plan.left_out.to_pylist()] == [(0, "too short")]


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_batches_do_not_change_the_rows(tmp_path, monkeypatch, rows):
    films = [film(i, num_frames=100) for i in range(3)] + [film(i, num_frames=3) for i in range(3, 10)]
    selection = Selection(catalog(tmp_path / "c", films))
    whole = make_plan(selection, settings(), tmp_path / "whole")
    monkeypatch.setattr(build_plan, "ROWS", rows)
    parts = make_plan(selection, settings(), tmp_path / "parts")
    assert parts.windows.equals(whole.windows) and parts.left_out.equals(whole.left_out)
    assert [len(b) for b in parts.windows.to_batches()] == [rows] * (9 // rows) + [9 % rows] * (9 % rows > 0)
    assert [len(b) for b in parts.left_out.to_batches()] == [rows] * (7 // rows) + [7 % rows] * (7 % rows > 0)
    ids = whole.left_out["clip_id"].to_pylist()
    assert ids == sorted(ids) and len(ids) == 7


def test_the_picture_is_the_crop_box_or_all_of_it(tmp_path):
    box = {"crop_x": 2, "crop_y": 4, "crop_width": 600, "crop_height": 340}
    films = [film(0, **box)] + [film(1 + i, **{**box, name: None}) for i, name in enumerate(box)]
    rows = planned(tmp_path, films).windows.to_pylist()
    boxes = [tuple(row[name] for name in box) for row in rows]
    assert boxes == [(2, 4, 600, 340)] + [(0, 0, 640, 360)] * 4


def test_a_clip_file_that_lacks_frames_is_not_read(tmp_path):
    lost = [(0, 0), (None, None), (1, 0), (0, 2), (None, 1), (1, 1)]
    films = [film(i, path=f"clip_files/{i}.mp4", lost_start=a, lost_end=b) for i, (a, b) in enumerate(lost)]
    rows = planned(tmp_path, [*films, film(9)]).windows.to_pylist()
    whole = [f"{tmp_path}/c/clip_files/{i}.mp4" for i in (0, 1)]
    assert [row["path"] for row in rows] == [*whole, None, None, None, None, None]


def test_the_geometry_is_of_all_that_decides_the_pixels(tmp_path):
    """Clip, window, rate in thousandths, box, size, and how they are resized and converted."""
    plan = planned(
        tmp_path, [film(0, fps=23.976, crop_x=2, crop_y=4, crop_width=600, crop_height=340), film(1, **IMAGE)]
    )
    for row, (height, width) in zip(plan.windows.to_pylist(), ((192, 336), (192, 336)), strict=True):
        box = [row[f"crop_{name}"] for name in ("x", "y", "width", "height")]
        window = [
            row["start_pts"],
            row["end_pts"],
            row["first"],
            row["frames"],
            row["stride"],
            round(row["fps"] * 1000),
        ]
        key = "/".join(map(str, [row["clip_id"], *window, *box, height, width, SCALER, 1]))
        digest = hashlib.blake2b(key.encode(), digest_size=8, person=b"datakit-geometry")
        assert row["geometry"] == digest.hexdigest()


def test_weights_of_a_mix_count_the_weights_of_buckets(tmp_path):
    """Four videos drawn once, and four images drawn half as often, are six samples; of the other part, three."""
    catalog(tmp_path / "a", [film(i) for i in range(4)] + [film(i, **IMAGE) for i in range(4, 8)])
    catalog(tmp_path / "b", [film(i) for i in range(3)])
    members = [Member(name, Selection(Catalog(tmp_path / name)), weight=1.0) for name in ("a", "b")]
    plan = make_plan(members, settings(*SMALL, "weights={1: 0.5}"), tmp_path / "plan")
    assert [p.weight for p in plan.parts] == [1.0, 2.0]
    with_repeats = make_plan([Member("a", members[0].selection, repeat=3.0)], settings(), tmp_path / "repeats")
    assert [p.weight for p in with_repeats.parts] == [3.0]


@pytest.mark.parametrize(
    "sets, expected",
    [
        ((), 1),
        (("global_batch=1",), 1),
        (("global_batch=3",), 1),
        (("global_batch=4",), 1),  # 4 of 3 a micro-batch on average: 1.33
        (("global_batch=7",), 2),
        (("global_batch=30",), 10),
        (("global_tokens=8340",), 1),  # three of 2,780
        (("global_tokens=16680",), 2),
        (("global_tokens=10",), 1),
    ],
)
def test_a_step_has_the_micro_batches_that_come_nearest(tmp_path, sets, expected):
    plan = planned(tmp_path, [film(i) for i in range(6)], *sets)
    assert plan.buckets[0].batch == 3 and plan.global_batches == expected


def test_settings_are_recorded_as_they_were_resolved(tmp_path):
    plan = planned(tmp_path, [film(0)], "max_crop=0.2")
    assert plan.settings["budget"] == 9000 and plan.settings["max_crop"] == 0.2
    assert (plan.settings["resize_filter"], plan.settings["colour_version"]) == (SCALER, 1)
    assert plan.parts[0].selection["where"] == "status = 'kept'" and (plan.folder / "plan.html").exists()
    assert plan.counts["epoch"]["samples"] == 1


def test_nothing_to_plan_gives_the_three_most_frequent_reasons(tmp_path):
    films = [film(i, num_frames=3) for i in range(4)] + [film(4 + i, split="val") for i in range(3)]
    films += [film(7, width=5), film(8, width=5), film(9, width=None)]
    with pytest.raises(ConfigError) as raised:
        planned(tmp_path, films)
    text = str(raised.value)
    assert f"none of the 10 clips of {tmp_path}/c where status = 'kept' can train (4: too short" in text
    assert text.count("; ") == 2 and "; 3: split" in text and "; 2: aspect" in text and "unknown size" not in text
    made = Selection(Catalog(tmp_path / "c"), where="width > 9000")
    with pytest.raises(ConfigError, match="nothing to plan: no clip of .* where width > 9000 is selected"):
        make_plan(made, settings(), tmp_path / "plan")
    with pytest.raises(ConfigError, match="where anything can train"):
        make_plan(Selection(Catalog(tmp_path / "c"), where=None), settings(), tmp_path / "plan")


def test_every_member_must_have_windows(tmp_path):
    made = catalog(tmp_path / "c", [film(0), film(1, num_frames=3)])
    members = [Member("good", Selection(made)), Member("short", Selection(made, where="num_frames = 3"))]
    with pytest.raises(ConfigError, match="none of the 1 clips of .* where num_frames = 3 can train"):
        make_plan(members, settings(), tmp_path / "plan")


def test_frames_by_timestamp_of_an_even_source_lie_in_the_middle(tmp_path):
    """60 frames/s at a target of 24 by timestamp: 33 of them span 81 of 100. Pictures of a video lie anywhere in it."""
    plan = planned(
        tmp_path / "a",
        [film(0, fps=60.0, num_frames=100), film(1, vfr=False, fps=60.0, num_frames=100)],
        "time_error=0.5",
    )
    assert [(r["stride"], r["first"]) for r in plan.windows.to_pylist()] == [(0, 9), (0, 9)]
    pictures = planned(tmp_path / "b", [film(0, vfr=True, num_frames=5)], "images_from_video=true")
    assert pictures.windows["first"].to_pylist() == [0, 1, 2, 4]


def test_another_plan_is_replaced_only_if_asked(tmp_path):
    selection = Selection(catalog(tmp_path / "c", [film(0, num_frames=100)]))
    make_plan(selection, settings(), tmp_path / "plan")
    with pytest.raises(ConfigError, match="holds another plan"):
        make_plan(selection, settings(*SMALL, "windows=1"), tmp_path / "plan")
    assert make_plan(selection, settings(*SMALL, "windows=1"), tmp_path / "plan", overwrite=True).windows.num_rows == 1


def test_a_folder_that_is_something_else_is_told_first(tmp_path):
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "mine").write_text("")
    with pytest.raises(ConfigError, match="is there and is no plan"):
        planned(Path(tmp_path), [film(0, num_frames=3)])
