"""A new score is one file: everything that knows of scores finds it in a copy of the code with that file added."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from deltalake import DeltaTable

from catalogs.tables.catalog import Catalog
from datakit import config
from pipelines.runs.ingest import ingest
from pipelines.settings import Settings
from support.drawn_videos import encode, texture

ROOT = Path(__file__).parents[3]
QUICK = ["ocr.enabled=false", "recipe=technical"]
RULE = "redness=redness <= 0.5"
RECIPE = f"name: no-red\ndescription: d\nrules:\n  - {{name: redness, keep: {RULE.partition('=')[2]}, source: test}}\n"
ASKED = """
import io, json, sys
from contextlib import redirect_stdout
from catalogs.browse.clip_index import Index
from catalogs.browse.facets import described, facets
from catalogs.tables.catalog import Catalog
from datakit.cli.app import app

def run(*words):
    out = io.StringIO()
    with redirect_stdout(out):
        app(list(words), standalone_mode=False)
    return out.getvalue()

root, recipe, report = sys.argv[1:]
answers = {
    "show": json.loads(run("catalog", "show", root, "--json"))["columns"]["clips"],
    "what_if": json.loads(run("run", "decide", "--catalog", root, "--rule", "RULE", "--what-if", "--json")),
    "settings": json.loads(run("settings", "redness", "--json")),
    "scores": json.loads(run("scores", "--json")),
    "table": run("scores", "--markdown"),
}
run("run", "decide", "--catalog", root, "--recipe", recipe)
run("catalog", "report", root, "--out", report)
answers["statuses"] = json.loads(run("catalog", "funnel", root, "--json"))
answers["facets"] = facets(Index(Catalog(root)))
answers["described"] = described()
print(json.dumps(answers))
""".replace("RULE", RULE)


def tinted(red: float) -> list[np.ndarray]:
    """A second of a still texture whose upper part, this share of it, is red."""
    picture = np.repeat(texture(90, 160)[..., :1] // 2 + 60, 3, axis=2)
    picture[: round(90 * red), :, 1:] = 0
    picture[: round(90 * red), :, 0] = 200
    return [picture] * 25


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("films")
    return {name: encode(folder / f"{name}.mp4", tinted(red)) for name, red in (("pale", 0.2), ("red", 0.8))}


@pytest.fixture(scope="module")
def catalog(tmp_path_factory, films, ray_address) -> Catalog:
    """Made before there was the score, with one film."""
    root = str(tmp_path_factory.mktemp("catalog") / "c")
    ingest([str(films["pale"])], root, config.load(Settings, None, QUICK), ray_address)
    assert "redness" not in {field.name for field in DeltaTable(f"{root}/clips").schema().fields}
    return Catalog(root)


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Runs Python in a copy of the code with the new file."""
    copy = tmp_path_factory.mktemp("code")
    for package in ("datakit", "catalogs", "pipelines", "trainer", "sampler"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    shutil.copy(ROOT / "tests" / "support" / "redness.py", copy / "pipelines" / "stages")
    environment = {**os.environ, "PYTHONPATH": str(copy)}

    def run(*arguments: object) -> str:
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="module")
def answers(python, catalog, films, tmp_path_factory) -> dict:
    """What is said of a catalog after an ingest of both films with the new score."""
    sets = [word for each in QUICK for word in ("--set", each)]
    python("-m", "datakit", "run", "ingest", *films.values(), "--catalog", catalog.root, *sets)
    folder = tmp_path_factory.mktemp("answers")
    (folder / "no-red.yaml").write_text(RECIPE)
    told = json.loads(
        python("-c", ASKED, catalog.root, folder / "no-red.yaml", folder / "report.html").splitlines()[-1]
    )
    return {**told, "report": (folder / "report.html").read_text()}


def test_ingest_measures_it_and_fills_it_into_the_catalog_that_lacked_it(answers, catalog, python, films):
    rows = Catalog(catalog.root).clips().collect()
    assert "redness" not in rows.columns  # this process does not know of it
    table = Catalog(catalog.root).scan("clips").select("redness", "reddest", "motion", "errors").collect()
    found = sorted(table.rows())
    assert [round(row[0], 1) for row in found] == [0.2, 0.8] and [row[1] for row in found] == ["pale", "red"]
    assert all(row[2] is not None and row[3] == [] for row in found)


def test_catalog_show_says_what_it_is(answers):
    column = next(c for c in answers["show"] if c["column"] == "redness")
    assert column == {
        "column": "redness",
        "type": "float",
        "unit": "0..1",
        "meaning": "share of pixels whose red stands out, mean over frames",
        "filled_by": "redness",
        "filled": 1.0,
    }


def test_rules_look_at_it(answers):
    assert [rule for rule in answers["what_if"]["rules"] if rule["rule"] == "redness"][0]["rejects"]["clips"] == 1
    assert answers["statuses"]["clips"] == 2 and answers["statuses"]["rejected"] == 1


def test_the_browser_filters_by_it(answers):
    slider = next(r for r in answers["facets"]["ranges"] if r["name"] == "redness")
    assert slider["score"] and slider["unit"] == "0..1" and slider["missing"] == 0
    boxes = next(c for c in answers["facets"]["choices"] if c["name"] == "reddest")
    assert sorted(boxes["values"]) == [["pale", 1], ["red", 1]]
    assert next(c for c in answers["described"] if c["name"] == "redness")["good"] == -1


def test_the_report_draws_it_and_knows_which_end_is_good(answers):
    assert "redness" in answers["report"] and "share of pixels whose red stands out" in answers["report"]


def test_settings_and_the_list_of_scores_have_it(answers):
    assert any("above" in json.dumps(setting) for setting in answers["settings"]["run"])
    assert "| `redness` | `redness`, `reddest` | How much of the picture is red |" in answers["table"]
    assert next(s for s in answers["scores"] if s["stage"] == "redness")["columns"][0]["good"] == -1
