"""Hashes and draws that catalogs, plans and result folders were made with stay what they are: known answers, which the
code gave at version 0.1.0. One that changes makes old rows strangers, or moves clips between splits."""

from dataclasses import replace
from types import SimpleNamespace

import polars as pl
import pyarrow as pa
import pytest

from catalogs.query.selection import Selection
from catalogs.records.split import split_of
from catalogs.tables.catalog import Catalog
from datakit.hashing import uniform
from datakit.identity import caption_id, clip_id, unreadable_id
from pipelines.captioning.prompt_templates import Prompt
from pipelines.recipes.recipe import load_recipe
from pipelines.runs.caption import _source_mark
from sampler.evaluate.preference import _draw, _pair
from sampler.generation.artifact_store import key_of
from sampler.generation.sample_spec import Sample
from sampler.prompts.prompt import Reference
from sampler.prompts.references import content_hash
from support.catalog_rows import V, clip, video
from trainer.data.batch_sampler import _hash63, _random
from trainer.dit.task import fixed_seed
from trainer.planning.build_plan import GEOMETRY, _geometry
from trainer.planning.plan import WINDOWS, Bucket, Part, plan_hash


def test_identities():
    assert unreadable_id("/v/ü.mp4") == "30c3188049395fd1eb5788db2794a3c6"
    assert clip_id("ab" * 16, 1, -5, 10**12) == "b3acf7fa6e710135fc83e56127adb947"
    assert caption_id("cd" * 16, "dense", "model/ü") == "1e553fe51c71da72f0c6b19c569e7c5c"


def test_draws():
    splits = [split_of(f"video {i}", 0.2, 0.3) for i in range(8)]
    assert splits == "test train train train train val train test".split()
    draws = [uniform(f"7/level/{i}", byteorder="big") for i in range(3)]
    assert draws == [0.09072500848083974, 0.8674251317532831, 0.39589684600894526]
    assert [_hash63("crop", 7, -1, 2**40), _hash63("ü")] == [3772920875538006548, 7587428897685594193]
    order = _random("epoch", 3, 4).random_raw(3).tolist()
    assert order == [2043185562353191263, 13383067535558564602, 6873947407129581203]
    assert [fixed_seed("a cat, ü", 0.25), fixed_seed("", 1)] == [8110181767818430051, 4870272324664929128]
    sample = SimpleNamespace(seed=42, number=3, prompt="a cat, ü")
    assert Sample.random_seed(sample) == 1281121155289588106
    assert Sample.random_seed(sample, "picture") == 1782864221846084753
    assert [_draw(1, "order", "ab").hex(), _draw(1, "sides", "ab").hex()] == ["046d29d1e1a9f48c", "a2fbb0b1d17fbf10"]


def test_keys(tmp_path):
    assert key_of("ü", 1, 0.5, None, [1, {"b": 1, "a": 2}]) == "bbf60f8ec33873897de40e3217af8be9"
    a, b = (SimpleNamespace(sample_id=name) for name in ("first", "second"))
    pairs = [_pair("a cat", a, b, seed) for seed in range(4)]
    assert {pair.pair_id for pair in pairs} == {"3aae710bcd7ee664fb46b099"}
    assert [pair.left.sample_id for pair in pairs] == ["second", "second", "second", "first"]
    (tmp_path / "a.mp4").write_bytes(b"content")
    reference = Reference(str(tmp_path / "a.mp4"))
    assert content_hash(reference) == "c24a745575f4719ff4d7c41a19d258fb"
    assert content_hash(replace(reference, span=(5, 50), crop=(1, 2, 3, 4))) == "d60ca471e01b04d41ceb8d7112e23153"


def test_marks_of_texts(tmp_path):
    prompt = Prompt(name="x", text="Describe ü.", system="You are.", schema={"type": "object"})
    assert prompt.hash == "90166f8909781f53"
    recipe = tmp_path / "known.yaml"
    recipe.write_text("name: known\ndescription: ü\nrules:\n  - {name: blur, keep: blur >= 4, source: test}\n")
    assert load_recipe(str(recipe)).label == "known@ed014429"
    assert _source_mark("mark", "a text, ü") == "mark.ef0cd5bf4f1a"


@pytest.fixture
def catalog(tmp_path) -> Catalog:
    """Nulls, text beyond ASCII, lists, structs, floats, integers and truth values."""
    catalog = Catalog.create(tmp_path / "catalog")
    catalog.append("videos", [video(clip_count=3, license="ü", vfr=True)])
    errors = [{"stage": "ocr", "kind": "stage", "message": "ü"}]
    rows = [clip(start=i * 100, motion=m, num_frames=n) for i, (m, n) in enumerate([(1.5, 4), (None, None), (-0.0, 7)])]
    rows[1]["errors"], rows[2]["phash"] = errors, b"\0\xff"
    catalog.append("clips", rows)
    catalog.append(
        "decisions",
        [
            {"clip_id": row["clip_id"], "shard": V[0], "status": "kept", "reasons": reasons, "level": level}
            for row, reasons, level in zip(rows, (["a", "ü"], [], None), (1, None, 3))
        ],
    )
    return catalog


COLUMNS = ("clip_id", "motion", "num_frames", "errors", "phash", "license", "vfr", "status", "reasons", "level", "uri")


def test_content_of_a_selection(catalog):
    assert Selection(catalog, where=None, columns=COLUMNS).content_hash == "e51527a6049b5c09eed2d84ca89f2faa"
    few = Selection(catalog, where="motion > 1", columns=("motion",))
    assert few.content_hash == "89c014f06a372dba7b8ea05ff28ba97f"
    assert Selection(catalog, where="motion > 100", columns=COLUMNS).content_hash == "af137dbfd3e0f84519012f380ee14322"


def test_content_of_a_plan():
    rows = [
        {
            **{field.name: None for field in WINDOWS},
            **{"clip_id": f"clip {i}", "video_id": "ü", "part": 0, "bucket": 0, "first": i, "frames": 5, "stride": 1},
            **{"fps": 24.0, "geometry": "00" * 8, "caption": None if i % 2 else f"text {i}, ü", "motion_vmaf": 0.5},
            **{"stream": 0, "start_pts": i * 10**10, "uri": "/a"},
        }
        for i in range(5)
    ]
    table = pa.Table.from_pylist(rows, WINDOWS)
    buckets = [Bucket("64x96x5", 64, 96, 5, 2, 100, 0.5)]
    parts = [Part("a", 2.0, {}, "/c")]
    digest = plan_hash(buckets, parts, 3, table.to_batches())
    assert digest == "d84217455946b24b439da609c8b7372e"
    assert plan_hash(buckets, parts, 3, table.slice(1, 3).to_batches()) == "54ab5999f7e21271d7aef932a1f9bcb7"
    assert plan_hash(buckets, parts, 3, []) == "9b7e9c2addc922b84b9e10bb2823dc4a"


def test_geometry_of_windows():
    windows = pl.DataFrame({name: [1, 2] for name in GEOMETRY if name != "millifps"} | {"fps": [24.0, 29.97]})
    assert _geometry(windows).to_list() == ["db5ff521acb9ebff", "7ea19afbbff3dba9"]
