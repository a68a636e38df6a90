"""Snapshots and selections: what was read once can be read again, whatever was written since."""

import json
import time
from datetime import UTC, datetime

import polars as pl
import pytest

from catalogs.query.diff import diff
from catalogs.query.history import history, runs
from catalogs.query.selection import Selection
from catalogs.query.snapshots import resolve, restore, tag, tags, untag, vacuum
from catalogs.records.marks import mark
from catalogs.records.runs import RunRecord
from catalogs.tables.catalog import RESTORING, Catalog
from datakit.errors import CatalogError, ConfigError
from pipelines.recipes.decide import decide_and_record
from pipelines.recipes.recipe import load_recipe
from support.catalog_rows import V, clip, video

OTHER = "cd" + "0" * 30
MOTIONS = [1.0, 3.0, 5.0, 7.0, 9.0]


def key(row: dict) -> dict:
    return {name: row[name] for name in ("clip_id", "run_id", "shard")}


def recipe(tmp_path, least: float):
    path = tmp_path / f"r{least}.yaml"
    path.write_text(
        f"name: r\ndescription: d\nrules:\n  - {{name: motion, keep: motion >= {least}, source: test}}\n"
        "  - {name: blur, keep: blur >= 10, source: test}\n"
    )
    return load_recipe(str(path))


@pytest.fixture
def catalog(tmp_path):
    """Five clips of one video, motion 1 to 9, blur 20, two seconds each."""
    catalog = Catalog.create(tmp_path / "catalog")
    record = RunRecord(catalog, "ingest", {}).begin()
    catalog.append("videos", [video(clip_count=5)])
    catalog.append("clips", [clip(start=i * 100, motion=m, blur=20.0) for i, m in enumerate(MOTIONS)])
    record.end("finished", {})
    return catalog


def test_a_selection_that_a_training_run_recorded_outlives_ten_decisions_and_a_vacuum(catalog, tmp_path):
    decide_and_record(catalog, recipe(tmp_path, 4))
    selection = Selection(catalog, where="status = 'kept' and motion < 9")
    rows, record = selection.read(), RunRecord(catalog, "train", {}, selection=selection).begin()
    record.end("finished", {})
    assert rows["clip_id"].to_list() == sorted(clip(start=s)["clip_id"] for s in (200, 300)) and selection.size == (
        2,
        4 / 3600,
    )
    for least in range(10):
        decide_and_record(catalog, recipe(tmp_path, least))
    done = vacuum(catalog, keep_days=0)
    assert done.files >= 9 and done.bytes > 0
    with pytest.raises(CatalogError, match="missing"):
        Selection(catalog, "decisions=5").read()
    recorded = catalog.scan("runs").filter(pl.col("run_id") == record.run_id).collect()["selection"][0]
    again = Selection.from_dict(Catalog(catalog.root), json.loads(recorded))
    assert (
        again.read().equals(rows)
        and again.content_hash == selection.content_hash == json.loads(recorded)["content_hash"]
    )
    assert vacuum(catalog, keep_days=0).files <= 1  # its own row in `runs` replaced a file; nothing else is left over


def test_what_is_tagged_stays_and_what_is_untagged_goes(catalog, tmp_path):
    decide_and_record(catalog, recipe(tmp_path, 4))
    tag(catalog, "four", note="first")
    decide_and_record(catalog, recipe(tmp_path, 6))
    vacuum(catalog, keep_days=0)
    assert Selection(catalog, "four").size[0] == 3 and Selection(catalog).size[0] == 2
    with pytest.raises(CatalogError, match="there is a tag four already"):
        tag(catalog, "four")
    untag(catalog, "four")
    vacuum(catalog, keep_days=0)
    with pytest.raises(CatalogError, match="no snapshot 'four'"):
        Selection(catalog, "four")
    with pytest.raises(CatalogError, match="no tag 'four'"):
        untag(catalog, "four")


def test_young_versions_survive_a_vacuum_without_a_tag(catalog, tmp_path):
    for least in (2, 4, 6):
        decide_and_record(catalog, recipe(tmp_path, least))
    assert vacuum(catalog, keep_days=1).files == 0
    assert Selection(catalog, "decisions=1").size[0] == 4


@pytest.mark.parametrize("name", ["no w", "", "now", "a'b", "../x"])
def test_tags_have_plain_names(catalog, name):
    with pytest.raises(CatalogError, match="letters, digits"):
        tag(catalog, name)


def test_a_content_hash_is_of_the_rows_and_nothing_else(catalog, tmp_path):
    one = Selection(catalog, where="motion > 4", columns=["motion", "uri"])
    decide_and_record(catalog, recipe(tmp_path, 4))
    assert (
        Selection(catalog, where="motion > 4.5 and blur = 20", columns=["motion", "uri"]).content_hash
        == one.content_hash
    )
    assert Selection(catalog, where="motion > 6", columns=["motion", "uri"]).content_hash != one.content_hash
    assert Selection(catalog, where="motion > 4", columns=["motion"]).content_hash != one.content_hash
    catalog.upsert("clips", [{**key(clip(start=400)), "motion": 9.5}], only="update")
    assert Selection(catalog, where="motion > 4", columns=["motion", "uri"]).content_hash != one.content_hash
    assert Selection(
        catalog, where="motion > 4", columns=["errors", "stage_versions", "phash"]
    ).content_hash  # nested and binary
    empty = Selection(catalog, where="motion > 99", columns=["errors", "reasons"])
    assert empty.size == (0, 0.0) and len(empty.content_hash) == 32


def test_a_known_content_hash_stays_what_it_is(catalog):
    """Training runs record it: it may not change with versions of libraries."""
    assert (
        Selection(catalog, where="motion > 4", columns=["motion", "uri", "stage_versions", "end_pts"]).content_hash
        == KNOWN_HASH
    )


KNOWN_HASH = "7d661e3242825572c2ecd64b2912f17b"


@pytest.mark.parametrize(
    "where, words",
    [
        ("aestetic > 5", "no column 'aestetic': did you mean aesthetic"),
        ("motion >", "cannot read"),
        ("motion + 1", "not a condition"),
        ("frobnicate(motion)", "cannot read"),
        ("motion > 'fast'", "cannot read"),
    ],
)
def test_conditions_that_make_no_sense_are_named(catalog, where, words):
    with pytest.raises(ConfigError, match=words):
        Selection(catalog, where=where)


def test_unknown_columns_of_a_selection_are_named(catalog):
    with pytest.raises(CatalogError, match="no column 'captoin': did you mean caption"):
        Selection(catalog, columns=["captoin"])


def test_snapshots_are_found_by_run_time_and_versions(catalog, tmp_path):
    first = catalog.scan("runs").collect()["run_id"][0]
    time.sleep(0.01)
    between = datetime.now(UTC)
    decide_and_record(catalog, recipe(tmp_path, 4))
    assert (
        resolve(catalog, first)["decisions"]
        == resolve(catalog, first[:6])["decisions"]
        == resolve(catalog, between.isoformat())["decisions"]
        == 0
    )
    assert resolve(catalog, "decisions=0,clips=1")["decisions"] == 0 and resolve(catalog, "now")["decisions"] == 1
    assert Selection(catalog, between.isoformat(), "status = 'pending'").size[0] == 5
    for wrong, words in {
        "2001-01-01": "younger",
        "nope": "no snapshot 'nope'",
        "clips=x": "TABLE=NUMBER",
        "runs=1": "TABLE=NUMBER",
    }.items():
        with pytest.raises(CatalogError, match=words):
            resolve(catalog, wrong)
    with pytest.raises(CatalogError, match="version 99"):
        Selection(catalog, "clips=99").read()


def test_a_snapshot_is_read_only(catalog):
    past = catalog.at(catalog.versions())
    with pytest.raises(CatalogError, match="snapshot"):
        mark(past, ["x"], "keep")


def test_restore_brings_rows_back_and_can_itself_be_undone(catalog, tmp_path):
    decide_and_record(catalog, recipe(tmp_path, 4))
    tag(catalog, "before")
    catalog.append("videos", [video(OTHER)])
    catalog.append("clips", [clip(OTHER, motion=8.0, blur=20.0)])
    mark(catalog, [clip()["clip_id"]], "keep")
    decide_and_record(catalog, recipe(tmp_path, 8))
    tag(catalog, "after")
    rows = {
        name: Selection(catalog, name, where=None, columns=["status", "motion", "mark"]).read()
        for name in ("before", "after")
    }
    done = restore(catalog, "before")
    assert set(done.tables) == {"videos", "clips", "decisions", "marks"}
    now = Selection(catalog, where=None, columns=["status", "motion", "mark"])
    assert now.read().equals(rows["before"]) and not rows["before"].equals(rows["after"])
    restore(catalog, "after")
    assert Selection(catalog, where=None, columns=["status", "motion", "mark"]).read().equals(rows["after"])
    assert restore(catalog, "after").tables == {} and tags(catalog)["name"].to_list() == ["before", "after"]


def test_readers_see_the_state_before_until_a_restore_is_whole(catalog, tmp_path, monkeypatch):
    decide_and_record(catalog, recipe(tmp_path, 4))
    tag(catalog, "before")
    catalog.append("videos", [video(OTHER)])
    catalog.append("clips", [clip(OTHER, motion=8.0, blur=20.0)])
    decide_and_record(catalog, recipe(tmp_path, 8))
    seen = Selection(catalog, where=None).read()
    real, restored = Catalog.restore_table, []

    def killed(self, name, version):
        if restored:
            raise KeyboardInterrupt
        restored.append(name)
        real(self, name, version)

    monkeypatch.setattr(Catalog, "restore_table", killed)
    with pytest.raises(KeyboardInterrupt):
        restore(catalog, "before")
    monkeypatch.undo()
    assert restored and Selection(Catalog(catalog.root), where=None).read().equals(seen)
    with pytest.raises(CatalogError, match="catalog restore"):
        decide_and_record(catalog, recipe(tmp_path, 2))
    restore(catalog, "before")
    assert Selection(catalog, where=None).size[0] == 5 and RESTORING not in tags(catalog)["name"]
    decide_and_record(catalog, recipe(tmp_path, 2))


def test_a_mark_wins_over_the_recipe_and_survives_reruns(catalog, tmp_path):
    low, high = clip(start=0)["clip_id"], clip(start=400)["clip_id"]
    failed = clip(start=500, errors=[{"stage": "ocr", "kind": "crash", "message": "x"}])
    catalog.append("clips", [failed])
    catalog.upsert("videos", [{"video_id": V, "clip_count": 6}], only="update")
    mark(catalog, [low, failed["clip_id"]], "keep", "lovely")
    mark(catalog, [high], "reject")
    for least in (4, 6):
        decide_and_record(catalog, recipe(tmp_path, least))
        view = {
            row["clip_id"]: row
            for row in catalog.clips(columns=["clip_id", "status", "reasons", "level", "mark", "comment"])
            .collect()
            .to_dicts()
        }
        assert (
            view[low]["status"] == "kept"
            and view[low]["reasons"] == []
            and view[low]["level"] >= 1
            and view[low]["comment"] == "lovely"
        )
        assert view[high]["status"] == "rejected" and view[high]["reasons"] == ["mark"] and view[high]["level"] == 0
    assert view[failed["clip_id"]]["status"] == "quarantined"
    mark(catalog, [low], None)
    after = {
        row["clip_id"]: row
        for row in catalog.clips(columns=["clip_id", "status", "mark", "comment"]).collect().to_dicts()
    }
    assert after[low]["status"] == "rejected" and after[low]["mark"] is None and after[low]["comment"] is None
    with pytest.raises(ConfigError, match="keep or reject"):
        mark(catalog, [low], "love")


def test_history_says_who_wrote_what(catalog, tmp_path):
    decide_and_record(catalog, recipe(tmp_path, 4))
    tag(catalog, "decided")
    mark(catalog, [clip()["clip_id"]], "keep")
    seen = runs(catalog)
    assert seen["pipeline"].to_list() == ["ingest", "decide", None]
    assert seen["changes"].to_list()[:2] == ["videos +1, clips +5", "decisions rewritten (5)"]
    assert seen["kept"][1] == 3 and seen["tags"].to_list()[1] == ["decided"] and "@" in seen["author"][0]
    commits = history(catalog).filter(pl.col("operation") != "CREATE TABLE")
    assert commits.select("table", "added").rows() == [("videos", 1), ("clips", 5), ("decisions", 5), ("marks", 1)]
    for name in seen["snapshot"]:
        resolve(catalog, name)


def test_diff_says_what_changed_and_by_which_rule(catalog, tmp_path):
    decide_and_record(catalog, recipe(tmp_path, 2))
    a = catalog.versions()
    catalog.append("videos", [video(OTHER)])
    catalog.append("clips", [clip(OTHER, motion=8.0, blur=20.0)])
    changes = [{**key(clip(start=300)), "blur": 5.0}, {**key(clip(start=400)), "blur": 22.0}]
    catalog.upsert("clips", changes, only="update")
    mark(catalog, [clip()["clip_id"]], "keep")
    decide_and_record(catalog, recipe(tmp_path, 4))
    found = diff(catalog, a, catalog.versions())
    assert (found.videos_added, found.videos_removed, found.clips_added, found.clips_removed) == (1, 0, 1, 0)
    assert {(f.before, f.after): (f.clips, f.rules) for f in found.flips} == {
        ("kept", "rejected"): (2, {"blur": 1, "motion": 1}),
        ("rejected", "kept"): (1, {"motion": 1}),
    }
    drift = found.scores["blur"]
    assert set(found.scores) == {"blur"} and (
        drift.filled,
        drift.cleared,
        drift.changed,
        drift.mean,
        drift.largest,
    ) == (0, 0, 2, 8.5, 15.0)
    assert found.marks_changed == 1 and found.recipes[0] != found.recipes[1]
    back = diff(catalog, catalog.versions(), a)
    assert (back.clips_added, back.clips_removed) == (0, 1) and {(f.before, f.after) for f in back.flips} == {
        ("rejected", "kept"),
        ("kept", "rejected"),
    }


def test_the_view_reads_only_what_is_asked_for(catalog):
    plan = catalog.clips(columns=["clip_id", "motion"]).explain()
    assert "decisions" not in plan and "captions" not in plan and "marks" not in plan
    whole = catalog.clips().select("clip_id", "motion", "status", "uri").sort("clip_id").collect()
    assert catalog.clips(columns=["clip_id", "motion", "status", "uri"]).sort("clip_id").collect().equals(whole)
    assert catalog.count() == 5 and V in whole["uri"][0]
