"""`decide --what-if` counts what deciding would do, clip for clip."""

import random

import polars as pl
import pytest

from catalogs.records.marks import mark
from catalogs.tables.catalog import Catalog
from datakit.errors import ConfigError
from pipelines.recipes.decide import decide, decide_and_record
from pipelines.recipes.recipe import build, load_recipe
from pipelines.recipes.what_if import Amount, what_if
from support.catalog_rows import clip, video

RULES = """name: mine
description: a test
levels: [low, high]
rules:
  - {name: motion, keep: {low: motion >= 3, high: motion >= 6}, source: test}
  - {name: blur, keep: "blur >= quantile_cont(blur, 0.25)", source: test}
  - {name: text, keep: ocr_area <= 0.5, source: test}
  - {name: codec, keep: codec = 'h264', source: test}
"""
SPARE = "name: x\ndescription: d\nrules:\n  - {name: motion, keep: motion >= 5, source: test}\n"


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    """200 clips of 20 videos with random scores, some null, some failed, some marked; decided by one rule."""
    folder, draw = tmp_path_factory.mktemp("what_if"), random.Random(3)
    catalog = Catalog.create(folder / "c")
    ids = [f"{i:02x}" * 16 for i in range(20)]
    catalog.append("videos", [video(v, clip_count=10, codec=draw.choice(["h264", "hevc"])) for v in ids])
    failure = [{"stage": "ocr", "kind": "crash", "message": "x"}]
    clips = [
        clip(
            v,
            start=i * 500,
            motion=draw.uniform(0, 10),
            blur=draw.uniform(0, 100),
            ocr_area=draw.choice([None, 0.1, 0.9]),
            end_s=i * 10 + draw.uniform(1, 8),
            errors=failure if draw.random() < 0.05 else [],
        )
        for v in ids
        for i in range(10)
    ]
    catalog.append("clips", [{**c, "start_s": i % 10 * 10.0} for i, c in enumerate(clips)])
    (folder / "spare.yaml").write_text(SPARE)
    decide_and_record(catalog, load_recipe(str(folder / "spare.yaml")))
    mark(catalog, [c["clip_id"] for c in clips[:10]], "keep")
    mark(catalog, [c["clip_id"] for c in clips[10:15]], "reject")
    (folder / "mine.yaml").write_text(RULES)
    return catalog, str(folder / "mine.yaml")


def view(catalog) -> dict[str, tuple]:
    rows = catalog.clips(columns=["clip_id", "status", "level", "start_s", "end_s", "codec"]).collect()
    return {row["clip_id"]: row for row in rows.iter_rows(named=True)}


def amount(rows) -> Amount:
    rows = list(rows)
    return Amount(len(rows), pytest.approx(sum(r["end_s"] - r["start_s"] for r in rows) / 3600))


def decided(catalog, tmp_path, recipe) -> dict[str, dict]:
    """What really deciding makes of a copy."""
    import shutil

    root = tmp_path / "copy"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(catalog.root, root)
    decide(Catalog(root), recipe)
    return view(Catalog(root))


@pytest.mark.parametrize("where", [None, "codec = 'h264' and motion > 2"])
def test_it_counts_what_deciding_then_does(catalog, tmp_path, where):
    catalog, path = catalog
    before, recipe = view(catalog), load_recipe(path)
    versions = catalog.versions()
    found = what_if(catalog, recipe, where)
    assert catalog.versions() == versions  # nothing was written
    chosen = set(before) if where is None else set(catalog.clips().filter(pl.sql_expr(where)).collect()["clip_id"])
    after = decided(catalog, tmp_path, recipe)
    for status in ("kept", "rejected", "pending", "quarantined"):
        assert found.outcome[status] == amount(after[c] for c in chosen if after[c]["status"] == status), status
        assert found.now[status] == amount(before[c] for c in chosen if before[c]["status"] == status), status
    assert found.gained == amount(after[c] for c in chosen if after[c]["status"] == "kept" != before[c]["status"])
    assert found.lost == amount(after[c] for c in chosen if before[c]["status"] == "kept" != after[c]["status"])
    for depth, name in enumerate(("low", "high"), 1):
        assert found.levels[name] == amount(
            after[c] for c in chosen if after[c]["status"] == "kept" and after[c]["level"] >= depth
        ), name
    assert (
        found.gained.clips
        and found.lost.clips
        and found.outcome["pending"].clips
        and found.outcome["quarantined"].clips
    )


def test_the_effect_of_a_rule_is_that_of_leaving_it_out(catalog, tmp_path):
    catalog, path = catalog
    found = what_if(catalog, load_recipe(path))
    for effect in found.rules:
        without = decided(catalog, tmp_path, load_recipe(path, without=[effect.rule]))
        assert effect.kept_without == amount(r for r in without.values() if r["status"] == "kept"), effect.rule
        alone = load_recipe(path, without=[r.rule for r in found.rules if r.rule != effect.rule])
        rejected = (
            catalog.clips(columns=["clip_id", "start_s", "end_s", "errors", *alone.columns()])
            .filter(~alone.levels[0][effect.rule], pl.col("errors").list.len() == 0)
            .collect()
        )
        assert effect.rejects == amount(rejected.iter_rows(named=True)), effect.rule
    assert sum(effect.only.clips for effect in found.rules) <= found.outcome["rejected"].clips + 15


def test_rules_on_the_command_line_replace_and_add(catalog):
    catalog, path = catalog
    recipe = load_recipe(path, ["motion=motion between 2 and 9", "new = blur > 1"], ["codec"])
    assert [r.name for r in recipe.file.rules] == ["motion", "blur", "text", "new"]
    assert recipe.file.rules[0].keep == "motion between 2 and 9" and recipe.label != load_recipe(path).label
    for rules, without, words in [
        (["motion"], [], "NAME=CONDITION"),
        ([], ["nope"], "no rule 'nope': it has motion"),
        (["a=motoin > 1"], [], "did you mean motion"),
    ]:
        with pytest.raises(ConfigError, match=words):
            load_recipe(path, rules, without)


def test_more_rules_than_a_mask_has_bits_are_refused(catalog):
    file = load_recipe(catalog[1]).file
    many = file.model_copy(update={"rules": [file.rules[1].model_copy(update={"name": f"r{i}"}) for i in range(64)]})
    with pytest.raises(ConfigError, match="64 rules, 63 is the most"):
        build(many)


HAND = """name: hand
description: a test
levels: [low, high]
rules:
  - {name: top, keep: {high: ocr_area <= 0.5}, source: test}
  - {name: motion, keep: {low: motion >= 3, high: motion >= 6}, source: test}
  - {name: blur, keep: blur >= 50, source: test}
"""
CLIPS: dict[str, tuple[dict, str | None]] = {
    # motion, blur, ocr_area; a person's mark
    "kept, low": ({"motion": 4.0, "blur": 60.0, "ocr_area": 0.1}, None),
    "kept, high": ({"motion": 7.0, "blur": 60.0, "ocr_area": 0.1}, None),
    "kept, its level unknown": ({"motion": 7.0, "blur": 60.0}, None),
    "rejected by both": ({"motion": 1.0, "blur": 1.0}, None),
    "rejected by blur": ({"motion": 7.0, "blur": 1.0}, "reject"),
    "rejected by blur, motion unknown": ({"blur": 1.0}, None),
    "pending on blur": ({"motion": 7.0}, None),
    "pending on both": ({}, None),
    "kept by a person": ({"motion": 1.0, "blur": 60.0}, "keep"),
    "rejected by a person": ({"motion": 7.0, "blur": 60.0, "ocr_area": 0.1}, "reject"),
    "failed": ({"motion": 1.0, "errors": [{"stage": "ocr", "kind": "crash", "message": "x"}]}, "keep"),
}


def test_known_clips_are_counted(tmp_path):
    """Clip i lasts 2^i hours: sums tell which clips they are of."""
    made = Catalog.create(tmp_path / "c")
    ids = {name: f"{i:032x}" for i, name in enumerate(CLIPS)}
    made.append("videos", [video(v) for v in ids.values()])
    clips = {
        name: clip(ids[name], **{"errors": None if i else [], **columns}, start_s=0.0, end_s=3600.0 * 2**i)
        for i, (name, (columns, _)) in enumerate(CLIPS.items())
    }
    made.append("clips", list(clips.values()))
    for name, (_, value) in CLIPS.items():
        if value:
            mark(made, [clips[name]["clip_id"]], value)
    (tmp_path / "spare.yaml").write_text(SPARE)
    decide(made, load_recipe(str(tmp_path / "spare.yaml")))  # keeps what moves by 5
    (tmp_path / "hand.yaml").write_text(HAND)
    found = what_if(made, load_recipe(str(tmp_path / "hand.yaml")))

    def of(*names: str) -> Amount:
        chosen = [i for i, name in enumerate(CLIPS) if name in names]
        return Amount(len(chosen), sum(2.0**i for i in chosen))

    kept = ("kept, low", "kept, high", "kept, its level unknown", "kept by a person")
    pending = ("pending on blur", "pending on both")
    by_blur = ("rejected by blur", "rejected by blur, motion unknown")
    rejected = ("rejected by both", *by_blur, "rejected by a person")
    assert found.outcome == {
        "kept": of(*kept),
        "rejected": of(*rejected),
        "pending": of(*pending),
        "quarantined": of("failed"),
    }
    assert found.levels == {"low": of(*kept), "high": of("kept, high")}
    assert found.marked == of("rejected by blur", "kept by a person", "rejected by a person")
    assert found.now["kept"] == of(*kept[1:], "pending on blur") and found.now["quarantined"] == of("failed")
    assert found.gained == of("kept, low") and found.lost == of("pending on blur")
    motion, blur = found.rules
    assert (motion.rule, motion.keep, blur.rule, blur.keep) == ("motion", "motion >= 3", "blur", "blur >= 50")
    assert motion.rejects == of("rejected by both", "kept by a person") and motion.only == of("kept by a person")
    assert motion.waits == of("rejected by blur, motion unknown", "pending on both") and motion.kept_without == of(
        *kept
    )
    assert blur.rejects == of("rejected by both", *by_blur) and blur.only == of(*by_blur)
    assert blur.waits == of(*pending) and blur.kept_without == of(*kept, "pending on blur")
    written = found.as_dict()
    assert (
        written["outcome"]["kept"] == {"clips": 4, "hours": of(*kept).hours} and written["rules"][1]["rule"] == "blur"
    )
    assert Amount() == Amount(0, 0.0) and found.recipe.startswith("hand@")
