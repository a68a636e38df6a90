"""Mixes read from a file, and how often windows are drawn."""

from pathlib import Path

import pytest

from catalogs.query.snapshots import tag
from catalogs.tables.catalog import Catalog
from datakit.errors import ConfigError
from support.planned_films import catalog, film
from trainer.planning.mixture import Member, read_mix, repeats, selected


def mix(folder: Path, text: str) -> list[Member]:
    (folder / "mix.yaml").write_text(text)
    return read_mix(folder / "mix.yaml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two catalogs, of two clips and of three; the first was tagged when it had one."""
    folder = tmp_path_factory.mktemp("mixes")
    for name, count in (("a", 1), ("b", 3)):
        catalog(folder / name, [film(i) for i in range(count)])
    first = Catalog(folder / "a")
    tag(first, "v1")
    video, clip = film(7, width=99)
    first.append("videos", [video])
    first.append("clips", [clip])
    return folder


def members(draws: dict[str, tuple[float | None, float]]) -> list[Member]:
    return [Member(name, None, weight, repeat) for name, (weight, repeat) in draws.items()]  # pyright: ignore[reportArgumentType] - no selection is read


def test_weights_are_shares_of_the_samples():
    """3 : 1 of 100 and 50 windows: 150 and 50 samples. The part that needs fewest draws is drawn once."""
    assert repeats(members({"a": (3.0, 1.0), "b": (1.0, 1.0)}), [100, 50]) == [1.5, 1.0]
    assert repeats(members({"a": (1.0, 1.0), "b": (3.0, 1.0)}), [7, 9]) == [1.0, 2.333333]


def test_without_weights_parts_are_repeated_as_they_say():
    assert repeats(members({"a": (None, 0.5), "b": (None, 2.0)}), [100, 50]) == [0.5, 2.0]
    assert Member("a", None).repeat == 1.0 and Member("a", None).weight is None  # pyright: ignore[reportArgumentType]


def test_parts_lie_beside_the_file_and_are_named_by_their_folders(folder):
    first, second = mix(folder, "parts:\n- {catalog: a, repeat: 0.5}\n- {catalog: b, name: second}\n")
    assert (first.name, first.weight, first.repeat) == ("a", None, 0.5)
    assert (second.name, second.weight, second.repeat) == ("second", None, 1.0)
    assert first.selection.catalog.root == str(folder / "a") and first.selection.where == "status = 'kept'"
    first, second = mix(folder, f"parts:\n- {{catalog: {folder}/b, weight: 3}}\n- {{catalog: a, weight: 0.5}}\n")
    assert [(m.name, m.weight, m.repeat) for m in (first, second)] == [("b", 3.0, 1.0), ("a", 0.5, 1.0)]


def test_parts_have_conditions_and_snapshots(folder):
    (now,) = mix(folder, "parts: [{catalog: a, where: null}]")
    (then,) = mix(folder, "parts: [{catalog: a, where: null, snapshot: v1}]")
    (wide,) = mix(folder, "parts: [{catalog: a, where: 'width > 100'}]")
    assert [len(m.selection.read()) for m in (now, then, wide)] == [2, 1, 1]
    assert "caption" in now.selection.columns and "crop_width" in now.selection.columns
    assert selected(str(folder / "b"), None, None).name == "b"
    assert selected(str(folder / "b"), None, None, "mine").name == "mine"


@pytest.mark.parametrize(
    "text, why",
    [
        ("parts: []", "at least 1 item"),
        ("parts: [{catalog: a, weight: 1}, {catalog: b}]", "give every part a weight, or none"),
        ("parts: [{catalog: a}, {catalog: b, weight: 1}]", "give every part a weight, or none"),
        ("parts: [{catalog: a, weight: 1}, {catalog: b, weight: 1, repeat: 2}]", "give every part a weight, or none"),
        ("parts: [{catalog: a}, {catalog: b, repeat: 0}]", r"mix.yaml: parts.1.repeat: .* greater than 0"),
        ("parts: [{catalog: a, weight: 0}]", r"parts.0.weight: .* greater than 0"),
        ("parts: [{name: a}]", r"parts.0.catalog: .* \(a part has catalog, name, where, snapshot, weight, repeat\)"),
        ("parts: [{catalog: a}, {catalog: b}, {catalog: b}]", "two parts are named 'b'"),
        ("parts: [{catalog: 's3:/x'}]", "no catalog at .*s3:/x"),
    ],
)
def test_mixes_that_make_no_sense(folder, text, why):
    with pytest.raises(Exception, match=why) as raised:
        mix(folder, text)
    assert isinstance(raised.value, ConfigError) or why.startswith("no catalog")
