"""Rules give every clip exactly one status, with its reasons."""

import hashlib
import json

import polars as pl
import pytest
from pydantic import ValidationError

from catalogs.tables.arrow_types import polars_schema
from datakit.errors import ConfigError
from pipelines.recipes.recipe import RecipeFile, build, load_recipe, shipped_recipes


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


def recipe_of(rules: dict[str, str | dict[str, str]], **options):
    listed = [{"name": name, "keep": keep, "source": "test"} for name, keep in rules.items()]
    return build(RecipeFile.model_validate({"name": "mine", "description": "d", "rules": listed, **options}))


NESTED = {"top": {"high": "aesthetic >= 5"}, "m": {"low": "motion >= 1", "high": "motion >= 3"}, "b": "blur >= 5"}


def test_the_label_is_the_name_and_a_hash_of_all_of_the_file():
    recipe = recipe_of({"a": "motion >= 1"}, levels=["x"])
    rules = [{"keep": "motion >= 1", "name": "a", "source": "test"}]
    captions = ["refined", "dense", "short", "imported"]
    by_key = {"captions": captions, "description": "d", "levels": ["x"], "name": "mine", "rules": rules}
    assert recipe.label == f"mine@{hashlib.blake2b(json.dumps(by_key).encode(), digest_size=4).hexdigest()}"


def test_recipes_do_not_change():
    recipe = recipe_of({"a": "motion >= 1"})
    for part, name in ((recipe.file, "name"), (recipe.file.rules[0], "keep"), (recipe, "levels")):
        with pytest.raises((ValidationError, AttributeError), match="frozen|cannot assign"):
            setattr(part, name, "other")


def test_columns_stages_and_what_is_left_without_them():
    recipe = recipe_of({**NESTED, "both": "motion > 1 or ocr_area < 1"}, levels=["low", "high"])
    assert recipe.columns() == {"aesthetic", "motion", "blur", "ocr_area"}
    assert recipe.waits_for(set()) == {"top": "aesthetic", "m": "motion", "b": "quality", "both": "ocr"}
    assert recipe.waits_for({"motion", "ocr", "aesthetic"}) == {"b": "quality"}
    assert [list(level) for level in recipe.without({"ocr", "aesthetic"}).levels] == [["m", "b"], ["m", "b"]]
    assert [list(level) for level in recipe.without(set()).levels] == [["m", "b", "both"], ["top", "m", "b", "both"]]


def test_what_the_view_and_ingest_fill_is_never_waited_for():
    assert recipe_of({"a": "width > 5", "b": "uri is not null"}).waits_for(set()) == {}


def test_reasons_are_rules_of_the_first_level():
    """Also where a rule of a deeper one stands before them."""
    recipe = recipe_of(NESTED, levels=["low", "high"])
    frame = clips(
        motion=[0.0, 2.0, 4.0, 4.0, None], blur=[9.0, 1.0, 9.0, 9.0, 9.0], aesthetic=[9.0, 9.0, 4.0, 6.0, 9.0]
    )
    assert decided(recipe, frame) == [
        ("rejected", ["m"], 0),
        ("rejected", ["b"], 0),
        ("kept", [], 1),
        ("kept", [], 2),
        ("pending", ["m"], 0),
    ]


def test_a_deeper_level_is_reached_through_those_before_it():
    recipe = recipe_of(
        {"a": {"one": "motion > 0", "two": "blur > 0", "three": "ocr_area > 0"}}, levels=["one", "two", "three"]
    )
    frame = clips(motion=[1.0] * 4, blur=[0.0, 1.0, 1.0, 0.0], ocr_area=[0.0, 0.0, 1.0, 1.0])
    assert [level for _, _, level in decided(recipe, frame)] == [1, 2, 3, 1]


def test_stages_that_failed_are_named_once_in_their_order():
    def failures(*stages: str) -> list[dict]:
        return [{"stage": stage, "kind": "crash", "message": "x"} for stage in stages]

    order = ["z", "b", "y", "a", "x", "c"]
    frame = clips(motion=[5.0, None, 5.0], errors=[failures(*order, *order), failures("b"), None])
    assert decided(recipe_of({"a": "motion > 1"}), frame) == [
        ("quarantined", order, 0),
        ("quarantined", ["b"], 0),
        ("kept", [], 1),
    ]


def test_decisions_are_rows_of_their_table():
    recipe = recipe_of({"a": "motion > 1"})
    rows = recipe.decide(clips(motion=[2.0])).collect()
    assert rows.row(0, named=True) == {
        "clip_id": "0", "shard": "0", "status": "kept", "reasons": [], "recipe": recipe.label, "level": 1
    }  # fmt: skip
    assert rows.schema["level"] == pl.Int32


def test_63_rules_are_the_most():
    """The last bit of the masks is that of the 63rd."""
    rules = {f"r{i}": "motion >= 5" for i in range(62)}
    recipe = recipe_of({**rules, "last": "blur > 1"})
    assert decided(recipe, clips(motion=[9.0, 9.0, 0.0], blur=[0.0, None, 9.0])) == [
        ("rejected", ["last"], 0),
        ("pending", ["last"], 0),
        ("rejected", list(rules), 0),
    ]
    with pytest.raises(ConfigError, match="64 rules, 63 is the most"):
        recipe_of({**rules, "last": "blur > 1", "over": "blur > 2"})
    deeper = {"over": {"high": "blur > 2"}, "more": {"high": "blur > 3"}}
    assert len(recipe_of({**rules, **deeper}, levels=["low", "high"]).levels[1]) == 64


def test_a_recipe_has_rules_at_its_first_level():
    for rules, levels in (({}, ["kept"]), ({"a": "motion > 1"}, []), ({"a": {"high": "motion > 1"}}, ["low", "high"])):
        with pytest.raises(ConfigError, match="recipe mine has no rules at its first level"):
            recipe_of(rules, levels=levels)


@pytest.mark.parametrize("text", ["motion", "=motion > 1", "motion=", "a b=motion > 1", ""])
def test_a_rule_is_a_name_and_a_condition(text):
    with pytest.raises(ConfigError, match="--rule takes NAME=CONDITION"):
        load_recipe("default", [text])


def test_rules_are_left_out_replaced_and_added(tmp_path):
    path = write(tmp_path, rule("a", "motion >= 1") + rule("b", "blur >= 5") + rule("c", "blur >= 6"))
    file = load_recipe(path, ["c = codec = 'h264'", "d=motion >= 7"], ["a"]).file
    assert [(r.name, r.keep, r.source) for r in file.rules] == [
        ("b", "blur >= 5", "test"),
        ("c", "codec = 'h264'", "the command line"),
        ("d", "motion >= 7", "the command line"),
    ]
    with pytest.raises(ConfigError, match="recipe mine has no rule 'x': it has a, b, c"):
        load_recipe(path, [], ["x"])
    with pytest.raises(ConfigError, match="has no rule 'a': it has b, c"):
        load_recipe(path, [], ["a", "a"])
