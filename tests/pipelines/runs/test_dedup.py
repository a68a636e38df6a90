"""Duplicates among real films and their copies, and what a search for them writes into a catalog."""

import json
import shutil
import subprocess
import sys

import numpy as np
import polars as pl
import pytest

from catalogs.maintenance.validate import problems
from catalogs.records.runs import RunRecord
from catalogs.tables.catalog import Catalog
from datakit import config
from datakit.errors import ConfigError
from datakit.identity import clip_id
from pipelines.recipes.decide import decide
from pipelines.recipes.recipe import load_recipe
from pipelines.runs.dedup import COLUMNS, dedup
from pipelines.runs.ingest import ingest
from pipelines.runs.score import score
from pipelines.settings import Settings
from support.compare_catalogs import differences
from support.long_footage import part_of
from support.video_copies import KINDS, clips_of, make_copies, remux, same_footage, score_of

pytestmark = pytest.mark.slow

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


def test_copies_of_real_films_are_found(films, tmp_path):
    """Each kind of copy among the originals and everything else that is no copy of them."""
    root = str(tmp_path / "c")
    shutil.copytree(films[0], root)
    found = {}
    for kind in KINDS:
        others = " or ".join(f"uri like '%.{other}.mp4'" for other in KINDS if other != kind)
        dedup(root, settings(), f"end_s - start_s >= 2 and not ({others})")
        found[kind] = score_of(clips_of(Catalog(root).clips().collect()), kind)
    table = "\n".join(
        f"{kind:<9} recall {s.recall:.3f}  precision {s.precision:.3f}  {s.pairs} pairs" for kind, s in found.items()
    )
    print(f"\n{table}")
    assert all(min(found[kind].recall, found[kind].precision) >= 0.95 for kind in ASSERTED), table
    assert sum(found[kind].pairs for kind in ASSERTED) > 100


def test_copies_are_found_among_each_other(films):
    clips = clips_of(Catalog(films[0]).clips().collect())
    assert all(score_of(clips, kind).recall >= 0.95 for kind in ASSERTED)
    assert len({c.group for c in clips if c.footage.startswith("carphone")}) == 1  # the package's own copy


def test_what_is_dropped_repeats_what_stays(films):
    """Leaving out whatever has duplicate_of leaves, for each clip left out, one of the same footage."""
    root, counts = films
    view = Catalog(root).clips().filter(pl.col("duplicate_group").is_not_null()).collect()
    clips = {c.clip_id: c for c in clips_of(view)}
    kept = set(view.filter(pl.col("duplicate_of").is_null())["clip_id"])
    dropped = (
        view.filter(pl.col("duplicate_of").is_not_null()).select("clip_id", "duplicate_of", "duplicate_group").rows()
    )
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
    from datakit.cli.output.runs import show_dedup

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
    decide(catalog, load_recipe(str(recipe)))
    dedup(films[0])
    assert dict(catalog.clips().select("clip_id", "status").collect().iter_rows()) == statuses


LENGTH_S = 5


def made_up(
    root: str, hashes: list[bytes | None], splits: list[str], *, content: list[bytes | None] | None = None, order=None
) -> Catalog:
    """A catalog of one clip in each video; `order`: in which the rows are appended."""
    catalog = Catalog.create(root)
    videos, clips = [], []
    for i, (phash, split) in enumerate(zip(hashes, splits)):
        video = f"{i * 7919 % 16:x}{i:031x}"
        videos.append(
            {
                "video_id": video,
                "shard": video[0],
                "status": "ok",
                "run_id": "r",
                "clip_count": 1,
                "duration_s": float(LENGTH_S),
                "uris": [{"uri": f"/nowhere/{i}.mp4", "size": 1, "etag": "e"}],
                "bit_rate": 1000 - i,
            }
        )
        clips.append(
            {
                "clip_id": clip_id(video, 0, 0, 100),
                "video_id": video,
                "shard": video[0],
                "run_id": "r",
                "stream": 0,
                "start_pts": 0,
                "end_pts": 100,
                "start_s": 0.0,
                "end_s": float(LENGTH_S),
                "width": 64,
                "height": 64,
                "resolution": 4096,
                "split": split,
                "phash": phash,
                "content_hash": content[i] if content else None,
                "errors": [],
            }
        )
    order = range(len(videos)) if order is None else order
    catalog.append("clips", [clips[i] for i in order])
    catalog.append("videos", [videos[i] for i in order])
    return catalog


def looks(seed: int, like: bytes | None = None) -> bytes:
    """Ten frame hashes; near those of another clip if given."""
    rng = np.random.default_rng(seed)
    if like is None:
        return rng.integers(0, 256, 80, dtype=np.uint8).tobytes()
    return (np.frombuffer(like, np.uint8) ^ np.packbits(rng.random(640) < 0.02)).tobytes()


def rows(catalog: Catalog) -> list[dict]:
    """The columns in question, in the order of the videos' numbers."""
    return (
        catalog.finished_clips().sort(pl.col("video_id").str.slice(1)).select("clip_id", *COLUMNS).collect().to_dicts()
    )


def test_a_group_goes_to_one_split_towards_train(tmp_path):
    a, b, c, d = (looks(i) for i in range(4))
    hashes = [a, looks(10, a), looks(11, a), b, looks(12, b), c, looks(13, c), d]
    catalog = made_up(str(tmp_path / "c"), hashes, ["test", "train", "val", "test", "val", "test", "test", "val"])
    found = dedup(catalog.root)
    after = rows(catalog)
    assert [r["split"] for r in after] == ["train"] * 3 + ["val"] * 2 + ["test"] * 2 + ["val"]
    assert (
        found.splits_moved == 3
        and found.groups == 3
        and found.duplicates == {"exact": 0, "perceptual": 4, "semantic": 0}
    )
    ids = [r["clip_id"] for r in after]
    assert [r["duplicate_group"] for r in after] == [min(ids[:3])] * 3 + [min(ids[3:5])] * 2 + [min(ids[5:7])] * 2 + [
        ids[7]
    ]
    assert [r["duplicate_of"] for r in after] == [None, ids[0], ids[0], None, ids[3], None, ids[5], None]  # by bit rate
    assert found.hours_saved == pytest.approx(4 * LENGTH_S / 3600) and found.statuses is None
    assert dedup(catalog.root).changed == 0 and not list(problems(catalog, sources=False))


def test_the_order_of_rows_in_the_catalog_changes_nothing(tmp_path):
    hashes = [looks(i) for i in range(20)]
    hashes += [looks(100 + i, hashes[i]) for i in range(12)] + [looks(200 + i, hashes[i]) for i in range(6)]
    results = []
    for number in range(2):
        order = np.random.default_rng(number).permutation(len(hashes))
        catalog = made_up(str(tmp_path / f"{number}"), hashes, ["train"] * len(hashes), order=order)
        assert dedup(catalog.root).groups == 12
        results.append(rows(catalog))
    assert results[0] == results[1]


def test_only_what_is_asked_for_takes_part_and_the_rest_is_cleared(tmp_path, capsys):
    from datakit.cli.output.runs import show_dedup

    a = looks(1)
    catalog = made_up(str(tmp_path / "c"), [a, looks(2, a), looks(3, a), None], ["train"] * 4)
    first = dedup(catalog.root)
    assert (first.clips, first.of, first.without_phash) == (4, 4, 1) and sum(first.duplicates.values()) == 2
    show_dedup(first, False)
    assert "`datakit run score --stages phash` makes it" in capsys.readouterr().out
    second = dedup(catalog.root, where="bit_rate < 1000 AND phash IS NOT NULL")
    assert (second.clips, second.changed, sum(second.duplicates.values())) == (2, 4, 1)
    after = rows(catalog)
    assert (
        all(after[i][c] is None for i in (0, 3) for c in COLUMNS if c != "split")
        and after[2]["duplicate_of"] == after[1]["clip_id"]
    )
    with pytest.raises(ConfigError, match="no column 'nonsense'"):
        dedup(catalog.root, where="nonsense > 1")
    with pytest.raises(ConfigError, match="dedup.model: no clip has an embedding of nothing"):
        dedup(catalog.root, settings("dedup.model=nothing"))
    statuses = catalog.scan("runs").sort("started_at").collect()["status"].to_list()
    assert statuses == ["finished", "finished", "failed"]


def test_kinds_can_be_switched_off(tmp_path):
    a = looks(1)
    catalog = made_up(str(tmp_path / "c"), [a, looks(2, a), a], ["train"] * 3, content=[b"x", b"y", b"x"])
    for sets, expected in (
        (["dedup.perceptual=false"], (1, 0)),
        (["dedup.exact=false"], (0, 2)),
        ([], (1, 1)),
        (["dedup.perceptual_radius=0"], (1, 0)),
    ):
        found = dedup(catalog.root, settings(*sets)).duplicates
        assert (found["exact"], found["perceptual"]) == expected, sets


def test_embeddings_of_one_model_are_compared(tmp_path):
    catalog = made_up(str(tmp_path / "c"), [looks(i) for i in range(6)], ["train"] * 6)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(6, 32))
    vectors[4], vectors[5] = vectors[0] + 0.1 * rng.normal(size=32), vectors[1] + 0.4 * rng.normal(size=32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    clips = catalog.finished_clips().sort(pl.col("video_id").str.slice(1)).collect()
    clips = clips.select("clip_id", "video_id", "shard", "run_id").to_dicts()
    catalog.append("embeddings", [{**c, "model": "big", "vector": v.tolist()} for c, v in zip(clips, vectors)])
    catalog.append("embeddings", [{**c, "model": "small", "vector": [1.0, 0.0]} for c in clips[:3]])
    found = dedup(catalog.root)
    assert (found.model, found.threshold, found.duplicates["semantic"]) == ("big", 0.97, 1)
    (copy,) = [r for r in rows(catalog) if r["duplicate_kind"] == "semantic"]
    assert copy["duplicate_similarity"] == pytest.approx(vectors[0] @ vectors[4], abs=1e-6)
    assert dedup(catalog.root, settings("dedup.semantic_threshold=0.8")).duplicates["semantic"] == 2
    assert dedup(catalog.root, settings("dedup.model=small")).duplicates["semantic"] == 2
    assert dedup(catalog.root, settings("dedup.semantic=false")).model is None


def test_an_ingest_can_compare_at_its_end(footage, recipe, tmp_path, ray_address):
    folder = tmp_path / "in"
    folder.mkdir()
    remux(footage["bikes.mp4"], folder / "bikes.mkv")
    (folder / "bikes.mp4").write_bytes(footage["bikes.mp4"].read_bytes())
    sets = settings("ocr.enabled=false", "motion.enabled=false", f"recipe={recipe}", "dedup.enabled=true")
    report = ingest([str(folder)], str(tmp_path / "c"), sets, ray_address)
    assert (report.funnel.kept, report.funnel.pending) == (3, 0) and report.funnel.rejected_by["duplicate"][0] == 3
    again = ingest([str(folder)], str(tmp_path / "c"), sets, ray_address)
    assert again.funnel.kept == 3 and again.funnel.rejected_by == report.funnel.rejected_by


KILL = (
    "import os, signal\nfrom pipelines.runs import dedup\ndie = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)\n"
)


@pytest.fixture(scope="module")
def quiet(tmp_path_factory, recipe):
    """A catalog that was compared without interruption."""
    catalog = decided(tmp_path_factory.mktemp("quiet"), recipe)
    dedup(catalog.root)
    return catalog


def decided(folder, recipe) -> Catalog:
    """A made-up catalog with decisions, as a run would leave it that only scored."""
    hashes = [looks(i) for i in range(30)]
    hashes += [looks(100 + i, hashes[i]) for i in range(20)]
    catalog = made_up(str(folder / "c"), hashes, ["train", "test"] * 25)
    rules = load_recipe(str(recipe))
    RunRecord(catalog, "decide", {"recipe_rules": rules.file.model_dump()}).begin().end("finished", {})
    decide(catalog, rules)
    return catalog


def start(root: str, code: str = "") -> subprocess.CompletedProcess:
    """`datakit run dedup` in a process of its own, after `code`."""
    arguments = ["datakit", "run", "dedup", "--catalog", root, "--json"]
    script = f"import sys\n{code}\nsys.argv = {arguments!r}\nfrom datakit.cli.app import main\nmain()"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


@pytest.mark.parametrize(
    "moment",
    [
        "dedup._write = die",  # all found, nothing written
        "write = dedup._write\ndedup._write = lambda *a: (write(*a), die())",  # written, not decided
        "dedup.decide = die",
        "dedup.RunRecord.end = die",
    ],
)
def test_killed_and_started_again_is_the_same(quiet, tmp_path, recipe, moment):
    catalog = decided(tmp_path, recipe)
    for _ in range(2):
        assert start(catalog.root, KILL + moment).returncode == -9
    last = start(catalog.root)
    assert last.returncode == 0, last.stderr
    assert differences(catalog, quiet) == [] and not list(problems(catalog, sources=False))
    found = json.loads(last.stdout)
    assert found["duplicates"]["perceptual"] == 20 and found["statuses"] == {"kept": 30, "rejected": 20}


def test_a_missing_library_is_named_before_anything_is_done(tmp_path, monkeypatch):
    import importlib.util

    catalog = made_up(str(tmp_path / "c"), [looks(1)], ["train"], content=[b"x"])
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "faiss" else found(name, *a))
    with pytest.raises(ConfigError, match="uv sync --inexact --extra dedup"):
        dedup(catalog.root)
    assert catalog.scan("runs").collect().height == 0
    assert dedup(catalog.root, settings("dedup.perceptual=false", "dedup.semantic=false")).clips == 1
