"""Rules give every clip exactly one status, with its reasons."""

import polars as pl
import pytest

from catalogs.tables.catalog import polars_schema
from datakit.errors import ConfigError
from pipelines.recipes.recipe import load_recipe, shipped_recipes


def write(tmp_path, rules: str, levels: str = "") -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(f"name: mine\ndescription: a test\n{levels}rules:\n{rules}")
    return str(path)


def rule(name: str, keep: str) -> str:
    return f"  - {{name: {name}, keep: '{keep}', source: test}}\n"


def clips(**columns) -> pl.LazyFrame:
    n = len(next(iter(columns.values())))
    base = {"clip_id": [str(i) for i in range(n)], "shard": ["0"] * n, "errors": [[]] * n}
    types = polars_schema("clips")
    frame = pl.DataFrame({**base, **columns}, schema_overrides={k: types[k] for k in (*base, *columns) if k in types})
    return frame.lazy()


def decided(recipe, frame) -> list[tuple]:
    return recipe.decide(frame).select("status", "reasons", "level").collect().rows()


def test_each_status_and_its_reasons(tmp_path):
    recipe = load_recipe(write(tmp_path, rule("a", "motion >= 1") + rule("b", "blur >= 5")))
    failed = {"stage": "ocr", "kind": "crash", "message": "x"}
    frame = clips(
        motion=[2.0, 0.0, 0.0, 2.0, None, 2.0], blur=[9.0, 9.0, 1.0, None, 1.0, 9.0], errors=[[]] * 5 + [[failed]]
    )
    assert decided(recipe, frame) == [
        ("kept", [], 1),
        ("rejected", ["a"], 0),
        ("rejected", ["a", "b"], 0),
        ("pending", ["b"], 0),
        ("rejected", ["b"], 0),
        ("quarantined", ["ocr"], 0),
    ]


def test_nested_levels(tmp_path):
    rules = (
        "  - name: m\n    keep: {low: motion >= 1, high: motion >= 3}\n    source: test\n"
        + rule("b", "blur >= 5")
        + "  - name: top\n    keep: {high: aesthetic >= 5}\n    source: test\n"
    )
    recipe = load_recipe(write(tmp_path, rules, "levels: [low, high]\n"))
    frame = clips(motion=[0.0, 2.0, 4.0, 4.0, 4.0], blur=[9.0] * 5, aesthetic=[9.0, 9.0, 6.0, 4.0, None])
    assert [(s, level) for s, _, level in decided(recipe, frame)] == [
        ("rejected", 0),
        ("kept", 1),
        ("kept", 2),
        ("kept", 1),
        ("kept", 1),
    ]
    assert recipe.waits_for({"motion", "quality"}) == {"top": "aesthetic"}


def test_quantiles_are_over_the_catalog(tmp_path):
    recipe = load_recipe(write(tmp_path, rule("q", "motion >= quantile_cont(motion, 0.25)")))
    statuses = [s for s, _, _ in decided(recipe, clips(motion=[float(i) for i in range(1, 9)]))]
    assert statuses == ["rejected"] * 2 + ["kept"] * 6


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_load_and_name_their_sources(name):
    recipe = load_recipe(name)
    assert recipe.name == name and all(len(r.source) >= 4 for r in recipe.file.rules)


def test_the_promised_recipes_are_shipped():
    assert {"default", "open-sora-v2", "svd", "pyramid"} <= set(shipped_recipes())
    assert len(load_recipe("pyramid").levels) == 3


def test_technical_is_default_without_its_rule_on_text():
    default, technical = (load_recipe(n).file.rules for n in ("default", "technical"))
    assert [r for r in default if r.name != "text"] == technical


@pytest.mark.parametrize(
    "keep, words",
    [("motoin > 1", "did you mean motion"), ("motion >", "cannot read"), ("frobnicate(motion) > 1", "cannot read")],
)
def test_bad_rules_are_named(tmp_path, keep, words):
    with pytest.raises(ConfigError, match=words):
        load_recipe(write(tmp_path, rule("bad", keep)))


def test_unknown_recipes_and_keys_are_errors(tmp_path):
    with pytest.raises(ConfigError, match="no recipe 'nope'"):
        load_recipe("nope")
    (tmp_path / "m.yaml").write_text("name: m\ndescription: d\nrule: []\nrules: []\n")
    with pytest.raises(ConfigError, match="malformed"):
        load_recipe(str(tmp_path / "m.yaml"))
