"""Duplicates among real films and their copies, and what a search for them writes into a catalog."""

import json
import subprocess
import sys

import polars as pl
import pytest
from compare import differences
from copies import clips_of, make_copies, remux, same_footage, scores
from films import part_of

from catalogs.check import problems
from catalogs.tables import Catalog
from datakit import config
from datakit.errors import ConfigError
from pipelines.decide import decide
from pipelines.dedup import COLUMNS, dedup
from pipelines.ingest import ingest
from pipelines.recipe import load_recipe
from pipelines.runs import RunRecord
from pipelines.score import score
from pipelines.settings import Settings

RECIPE = """
name: plain
description: Clips of two seconds, each once.
rules:
  - name: duration
    keep: end_s - start_s >= 2
    source: tests
  - name: duplicate
    keep: case when duplicate_group is null then null else duplicate_of is null end
    source: tests
"""
ASSERTED = ("half", "crf35", "grey", "logo")


def settings(*sets: str) -> Settings:
    return config.load(Settings, None, list(sets))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "plain.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def films(film, footage, recipe, tmp_path_factory, ray_address):
    """A catalog of two minutes of a film and a street scene with all their copies, of another minute of the film, of a
    face that the package has twice, and of the street in another container."""
    folder = tmp_path_factory.mktemp("films")
    originals = [part_of(film, 60, 120, folder / "bunny.mp4"), folder / "bikes.mp4"]
    originals[1].write_bytes(footage["bikes.mp4"].read_bytes())
    for original in originals:
        make_copies(original, folder)
    part_of(film, 300, 60, folder / "rest.mp4")
    for name in ("carphone_pristine.mp4", "carphone_distorted.mp4"):
        (folder / name).write_bytes((footage["bikes.mp4"].parent / name).read_bytes())
    remux(originals[1], folder / "bikes-remuxed.mkv")
    root = str(tmp_path_factory.mktemp("catalog") / "c")
    ingest([str(folder)], root, settings("ocr.enabled=false", "motion.enabled=false", f"recipe={recipe}"), ray_address)
    assert set(Catalog(root).clips().collect()["status"]) == {"pending", "rejected"}  # nothing was compared yet
    return root, dedup(root)


def test_copies_of_real_films_are_found(films):
    clips = clips_of(Catalog(films[0]).clips().collect())
    found = scores(clips)
    table = "\n".join(
        f"{kind:<9} recall {s.recall:.3f}  precision {s.precision:.3f} (strictly {s.strict:.3f})  {s.pairs} pairs" for kind, s in found.items())
    print(f"\n{len(clips)} clips compared\n{table}")
    assert all(min(found[kind].recall, found[kind].precision) >= 0.95 for kind in ASSERTED), table
    assert sum(found[kind].pairs for kind in ASSERTED) > 100
    assert len({c.group for c in clips if c.footage.startswith("carphone")}) == 1  # the package's own copy


def test_what_is_dropped_repeats_what_stays(films):
    """Leaving out whatever has duplicate_of leaves, for each clip left out, one of the same footage."""
    root, counts = films
    view = Catalog(root).clips().filter(pl.col("duplicate_group").is_not_null()).collect()
    clips = {c.clip_id: c for c in clips_of(view)}
    kept = set(view.filter(pl.col("duplicate_of").is_null())["clip_id"])
    dropped = view.filter(pl.col("duplicate_of").is_not_null()).select("clip_id", "duplicate_of", "duplicate_group").rows()
    assert all(of in kept and clips[of].group == group for _, of, group in dropped)
    copies = [(clips[a], clips[b]) for a, b, _ in dropped if not clips[a].footage.startswith("carphone")]
    wrong = [pair for pair in copies if not same_footage(*pair)]
    assert len(wrong) <= 0.02 * len(copies), wrong
    assert counts.clips == view.height and sum(counts.duplicates.values()) == len(dropped)
    assert counts.hours_saved == pytest.approx(sum(clips[a].end_s - clips[a].start_s for a, _, _ in dropped) / 3600)
    large = view.filter(pl.col("uri").str.ends_with("bunny.mp4") | pl.col("uri").str.ends_with("rest.mp4"))
    assert large["duplicate_of"].null_count() == large.height  # the original in full size is the best


def test_a_video_packed_anew_is_an_exact_copy(films):
    view = Catalog(films[0]).clips().filter(pl.col("duplicate_kind") == "exact").collect()
    clips = {row["clip_id"]: row for row in Catalog(films[0]).clips().collect().to_dicts()}
    assert view.height == 3 and set(view["duplicate_similarity"]) == {1.0}
    for row in view.to_dicts():
        other = clips[row["duplicate_of"]]
        assert {row["uri"][-4:], other["uri"][-4:]} == {".mkv", ".mp4"} and row["content_hash"] == other["content_hash"]
        assert row["num_frames"] == other["num_frames"] and row["phash"] == other["phash"]


def test_a_second_run_writes_nothing(films, capsys):
    from pipelines.console import show_dedup

    catalog = Catalog(films[0])
    before = {name: version for name, version in catalog.versions().items() if name != "runs"}
    again = dedup(films[0])
    show_dedup(again, False)
    assert again.changed == 0 and "nothing was written" in capsys.readouterr().out
    assert {name: version for name, version in catalog.versions().items() if name != "runs"} == before
    assert again.duplicates == films[1].duplicates and not list(problems(catalog))


def test_hashes_are_the_same_when_made_again(films, ray_address):
    catalog = Catalog(films[0])
    some = pl.col("uri").str.contains("bikes")
    columns = ["clip_id", "phash", "content_hash", "crop_height"]
    before = catalog.clips().filter(some).sort("clip_id").select(columns).collect()
    assert set(before["crop_height"]) >= {204, 272}
    score(films[0], settings(), ["phash"], "uri LIKE '%bikes%'", redo=True, ray=ray_address)
    assert catalog.clips().filter(some).sort("clip_id").select(columns).collect().equals(before)


def test_the_recipe_rejects_duplicates_and_stays_with_it(films, recipe):
    catalog = Catalog(films[0])
    view = catalog.clips().collect()
    compared = view.filter(pl.col("duplicate_group").is_not_null())
    assert set(compared["status"]) == {"kept", "rejected"}
    repeats = compared.filter(pl.col("duplicate_of").is_not_null())
    assert set(repeats["status"]) == {"rejected"} and set(repeats.explode("reasons")["reasons"]) == {"duplicate"}
    statuses = dict(view.select("clip_id", "status").iter_rows())
    decide(catalog, load_recipe(str(recipe), catalog.view_columns()))
    dedup(films[0])
    assert dict(catalog.clips().select("clip_id", "status").collect().iter_rows()) == statuses
