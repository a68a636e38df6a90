"""Decisions written into a catalog, and the caption that a recipe prefers."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from catalogs.records.marks import mark
from catalogs.records.runs import RunRecord
from catalogs.tables.catalog import Catalog
from pipelines.recipes.decide import (
    current_recipe,
    decide,
    decide_and_record,
    judged,
    preferred_captions,
    redecide,
    verdicts,
)
from pipelines.recipes.recipe import Recipe, RecipeFile, build
from support.catalog_rows import clip, video


def recipe(keep: str = "motion >= 1", name: str = "mine", **options: Any) -> Recipe:
    rules = [{"name": "a", "keep": keep, "source": "test"}]
    return build(RecipeFile.model_validate({"name": name, "description": "d", "rules": rules, **options}))


def add(catalog: Catalog, first: int, *motions: float | None) -> list[str]:
    """Finished videos of one clip each; the clips' ids."""
    ids = [f"{i:032x}" for i in range(first, first + len(motions))]
    clips = [clip(video_id, motion=motion) for video_id, motion in zip(ids, motions)]
    catalog.append("videos", [video(video_id) for video_id in ids])
    catalog.append("clips", clips)
    return [c["clip_id"] for c in clips]


def decisions(catalog: Catalog) -> dict[str, str]:
    return dict(catalog.scan("decisions").select("clip_id", "status").collect().iter_rows())


@pytest.fixture
def catalog(tmp_path) -> Catalog:
    return Catalog.create(tmp_path / "c")


def test_clips_are_counted_by_status_with_marks(catalog):
    ids = add(catalog, 0, 2.0, 0.0, None, 0.5)
    mark(catalog, [ids[3]], "keep")
    assert decide(catalog, recipe()) == {"kept": 2, "rejected": 1, "pending": 1}
    assert decisions(catalog) == dict(zip(ids, ["kept", "rejected", "pending", "rejected"])), "marks win in the view"


class Arriving:
    """Stands for other ingests: while decisions are written, clips arrive."""

    def __init__(self, catalog: Catalog, rounds: int, monkeypatch: pytest.MonkeyPatch):
        self.calls = 0
        replace = catalog.replace

        def replace_as_clips_arrive(table: str, rows) -> None:
            replace(table, rows)
            self.calls += 1
            if self.calls <= rounds:
                add(Catalog(catalog.root), 100 + self.calls, 5.0)

        monkeypatch.setattr(catalog, "replace", replace_as_clips_arrive)


@pytest.mark.parametrize("arriving, rounds, pending", [(0, 1, 0), (1, 2, 0), (4, 5, 0), (9, 5, 1)])
def test_clips_that_arrive_meanwhile_are_decided_in_five_rounds(catalog, monkeypatch, arriving, rounds, pending):
    """What arrives later is left to the ingest that brings it."""
    add(catalog, 0, 2.0)
    others = Arriving(catalog, arriving, monkeypatch)
    counts = decide(catalog, recipe())
    assert others.calls == rounds and counts.get("pending", 0) == pending
    assert counts["kept"] == 1 + min(arriving, 4)


def test_deciding_is_a_run_whose_recipe_is_in_force(catalog):
    add(catalog, 0, 2.0, 0.0)
    assert current_recipe(catalog) is None and redecide(catalog) is None
    counted = decide_and_record(catalog, recipe())
    assert counted.as_dict()["clips"] == 2 and counted.as_dict()["kept"] == 1
    (run,) = catalog.scan("runs").collect().iter_rows(named=True)
    assert run["pipeline"] == "decide" and json.loads(run["config"])["recipe"] == recipe().label
    assert json.loads(run["counts"])["funnel"] == json.loads(json.dumps(counted.as_dict()))
    found = current_recipe(catalog)
    assert found is not None and found.label == recipe().label
    add(catalog, 5, 3.0)
    assert redecide(catalog) == {"kept": 2, "rejected": 1}


def run(catalog: Catalog, config: dict[str, Any]) -> None:
    with RunRecord(catalog, "ingest", config).running():
        pass


def test_the_recipe_in_force_is_that_of_the_decisions(catalog):
    """Not the newest of the runs: runs without rules, with rules that fit no more, and of other recipes are passed
    over."""
    add(catalog, 0, 2.0)
    decide_and_record(catalog, recipe(name="old"))
    decide_and_record(catalog, recipe("motion >= 3"))
    rules = recipe("motion >= 9", name="other").file.model_dump()
    misspelt = {**rules, "rules": [{"name": "a", "keep": "motoin > 1", "source": "test"}]}
    for config in ({}, {"recipe_rules": {"name": "bad"}}, {"recipe_rules": rules}, {"recipe_rules": misspelt}):
        run(catalog, config)
    found = current_recipe(catalog)
    assert found is not None and found.label == recipe("motion >= 3").label


def test_a_recipe_that_fits_no_more_is_none(catalog):
    add(catalog, 0, 2.0)
    decide(catalog, recipe())
    run(catalog, {"recipe_rules": {"name": "mine"}})
    assert current_recipe(catalog) is None and redecide(catalog) is None


def write_captions(catalog: Catalog, clip_id: str, *captions: dict[str, Any]) -> None:
    usual = {"clip_id": clip_id, "shard": "0", "style": "dense", "model": "m", "text": "t", "flags": []}
    catalog.append("captions", [{**usual, "created_at": day(1), **caption} for caption in captions])


def day(number: int) -> datetime:
    return datetime(2025, 1, number, tzinfo=UTC)


USELESS = ("empty", "refusal", "invalid_json", "repetition", "language")


@pytest.mark.parametrize(
    "captions",
    [
        # The first is the one that is preferred, by style, then
        [{"style": "refined"}, {"style": "dense"}],
        [{"style": "dense"}, {"style": "short"}, {"style": "imported"}],
        [{"style": "dense", "flags": ["truncated", "meta", "x"]}, {"style": "short"}],
        # by fewest flags, then
        [{"flags": ["meta"], "created_at": day(1)}, {"flags": ["meta", "truncated"], "created_at": day(2)}],
        [{"created_at": day(1)}, {"flags": ["truncated"], "created_at": day(2)}],
        # the newest, then by id.
        [{"created_at": day(3)}, {"created_at": day(2)}, {"created_at": day(1)}],
        [{}, {}, {}],
        # What is of no use is never preferred.
        [{"style": "short"}, {"style": "refined", "text": None}],
        *([{"style": "short"}, {"style": "refined", "flags": ["meta", flag]}] for flag in USELESS),
        *([{"style": "short"}, {"style": "refined", "flags": [flag]}] for flag in USELESS),
        [{"style": "short"}, {"style": "poem"}],
        [{"style": "short", "flags": None}],
    ],
)  # fmt: skip
@pytest.mark.parametrize("backwards", [False, True])
def test_the_preferred_caption(catalog, captions, backwards):
    (clip_id,) = add(catalog, 0, 2.0)
    numbered = [{"caption_id": f"{i}", **caption} for i, caption in enumerate(captions)]
    write_captions(catalog, clip_id, *(numbered[::-1] if backwards else numbered))
    assert preferred_captions(catalog, recipe()).collect().rows() == [(clip_id, "0")]


def test_styles_are_preferred_as_the_recipe_says(catalog):
    ids = add(catalog, 0, 2.0, 2.0, 2.0)
    write_captions(catalog, ids[0], {"caption_id": "d"}, {"caption_id": "p", "style": "poem"})
    write_captions(catalog, ids[1], {"caption_id": "e"})
    chosen = preferred_captions(catalog, recipe(captions=["poem", "dense"])).collect()
    assert dict(chosen.iter_rows()) == {ids[0]: "p", ids[1]: "e"}
    assert dict(preferred_captions(catalog, recipe(captions=["poem"])).collect().iter_rows()) == {ids[0]: "p"}


def test_verdicts_have_the_caption_and_write_nothing(catalog):
    ids = add(catalog, 0, 2.0, 0.0)
    write_captions(catalog, ids[1], {"caption_id": "x"})
    versions = catalog.versions()
    rows = verdicts(catalog, recipe()).select("clip_id", "status", "reasons", "caption_id").collect()
    assert sorted(rows.rows()) == sorted([(ids[0], "kept", [], None), (ids[1], "rejected", ["a"], "x")])
    assert catalog.versions() == versions


def test_rules_look_at_the_caption_that_is_preferred(catalog):
    """Not at the one that was chosen before."""
    ids = add(catalog, 0, 2.0, 2.0, 2.0)
    write_captions(
        catalog, ids[0], {"caption_id": "0", "text": "a cat"}, {"caption_id": "1", "style": "refined", "text": "a dog"}
    )
    write_captions(catalog, ids[1], {"caption_id": "2", "text": "a dog", "model": "n"})
    chosen = recipe("caption = 'a dog'")
    assert decide(catalog, chosen) == {"kept": 2, "pending": 1}
    rows = judged(catalog, chosen, {"shard", "caption_model"}).collect()
    assert set(rows.columns) == {"clip_id", "errors", "shard", "caption", "caption_model"}
    texts = {row["clip_id"]: (row["caption"], row["caption_model"]) for row in rows.iter_rows(named=True)}
    assert texts == {ids[0]: ("a dog", "m"), ids[1]: ("a dog", "n"), ids[2]: (None, None)}
    assert decide(catalog, recipe("caption = 'a dog'", captions=["dense"])) == {"kept": 1, "rejected": 1, "pending": 1}
    plain = judged(catalog, recipe(), {"shard"}).collect()
    assert set(plain.columns) == {"clip_id", "errors", "shard", "motion"} and plain.height == 3
