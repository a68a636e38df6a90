"""A catalog of an earlier schema version opens after an upgrade, with its rows as they were."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from deltalake import DeltaTable, write_deltalake

from catalogs.maintenance.validate import problems
from catalogs.tables import schema
from catalogs.tables.arrow_types import as_arrow
from catalogs.tables.catalog import Catalog, create_table
from catalogs.tables.upgrade import upgrade
from datakit.columns import Column
from datakit.errors import CatalogError
from datakit.identity import clip_id
from pipelines.catalog_sync.score_writer import write_columns
from support.catalog_rows import V, clip, video

NEW = {
    "clips": {"content_hash", "duplicate_kind", "duplicate_similarity"},
    "decisions": {"caption_id"},
    "videos": set(),
    "runs": {"author", "snapshot", "selection", "checkpoints"},
}
"""Columns that version 1 did not have."""
NEW_TABLES = set(schema.TABLES) - set(NEW)


@pytest.fixture
def old(tmp_path) -> str:
    """A catalog as version 1 left it: one video with one clip."""
    root = str(tmp_path / "c")
    video = "ab" * 16
    clip = clip_id(video, 0, 0, 100)
    rows = {
        "videos": {
            "video_id": video,
            "shard": "a",
            "status": "ok",
            "run_id": "r",
            "clip_count": 1,
            "uris": [{"uri": "/x.mp4"}],
        },
        "clips": {
            "clip_id": clip,
            "video_id": video,
            "shard": "a",
            "stream": 0,
            "start_pts": 0,
            "end_pts": 100,
            "run_id": "r",
            "motion": 4.0,
        },
        "decisions": {"clip_id": clip, "shard": "a", "status": "kept", "recipe": "default@0", "level": 1},
    }
    for name in NEW:
        text = json.dumps({"schema": 1, "shard_digits": 1})
        full = as_arrow(name, [rows[name]] if name in rows else [])
        table = full.select([c for c in full.column_names if c not in NEW[name]])
        write_deltalake(f"{root}/{name}", table, description=text, partition_by=schema.PARTITIONED.get(name))
    return root


def test_an_old_catalog_says_what_to_do_and_opens_after_it(old):
    with pytest.raises(CatalogError, match="has schema version 1.*catalog upgrade"):
        Catalog(old)
    added = upgrade(old)
    assert {line for line in added if line.startswith("column")} == {
        f"column {t}.{c}" for t, columns in NEW.items() for c in columns
    }
    assert {line for line in added if line.startswith("table")} == {f"table {name}" for name in NEW_TABLES}
    view = Catalog(old).clips().collect()
    assert (view["motion"][0], view["status"][0], view["content_hash"][0], view["caption"][0]) == (
        4.0,
        "kept",
        None,
        None,
    )
    assert not list(problems(Catalog(old), sources=False))
    assert upgrade(old) == []


def test_version_3_lacks_latents_and_samples_only(old):
    upgrade(old)
    for name in ("latents", "samples"):
        shutil.rmtree(f"{old}/{name}")
    for name in schema.TABLES:
        if name not in ("latents", "samples"):
            DeltaTable(f"{old}/{name}").alter.set_table_description(json.dumps({"schema": 3, "shard_digits": 1}))
    with pytest.raises(CatalogError, match="has schema version 3.*catalog upgrade"):
        Catalog(old)
    before = {name: DeltaTable(f"{old}/{name}").version() for name in ("clips", "captions")}
    assert upgrade(old) == ["table latents", "table samples"]
    catalog = Catalog(old)
    assert catalog.scan("latents").collect().is_empty()
    assert catalog.table("latents").metadata().partition_columns == ["autoencoder", "bucket"]
    assert catalog.at(before).clips(before, ["clip_id"]).collect().height == 1  # snapshots from before the upgrade
    assert not list(problems(catalog, sources=False)) and upgrade(old) == []


def test_an_upgrade_that_was_interrupted_goes_on(old):
    """All but the marker is done: the table `videos`, which says which version the catalog has, comes last."""
    upgrade(old)
    DeltaTable(f"{old}/videos").alter.set_table_description(json.dumps({"schema": 1, "shard_digits": 1}))
    assert upgrade(old) == []
    assert Catalog(old).clips().collect().height == 1


def test_what_cannot_be_upgraded_is_said(tmp_path):
    with pytest.raises(CatalogError, match="no catalog at"):
        upgrade(str(tmp_path))
    create_table(str(tmp_path), "videos", json.dumps({"schema": 99}))
    with pytest.raises(CatalogError, match="schema version 99"):
        upgrade(str(tmp_path))


NOVEL = Column("novel", "float32", "0..1", "a score that there was not when the catalog was made", "novelty")


@pytest.fixture
def without_novel(tmp_path, monkeypatch) -> Catalog:
    """A catalog of the present version, made before a score was declared that there is now."""
    catalog = Catalog.create(tmp_path / "c")
    catalog.append("videos", [video()])
    catalog.append("clips", [clip()])
    monkeypatch.setitem(schema.TABLES, "clips", (*schema.TABLES["clips"], NOVEL))
    return catalog


def columns_of(catalog: Catalog) -> set[str]:
    return {field.name for field in catalog.table("clips").schema().fields}


def test_a_new_score_is_null_in_a_catalog_until_the_first_write_brings_its_column(without_novel):
    catalog = Catalog(without_novel.root)
    assert catalog.scan("clips").select("novel").collect()["novel"].to_list() == [None]
    row = {"clip_id": clip()["clip_id"], "run_id": "r", "shard": V[0], "errors": [], "novel": 0.5}
    write_columns(catalog, [row], {"novelty": "f"})
    assert catalog.scan("clips").select("novel").collect()["novel"].to_list() == [0.5]
    assert "novel" in columns_of(catalog) and upgrade(catalog.root) == []


def test_upgrade_brings_a_new_score_s_column_too(without_novel):
    assert any("clips.novel is missing" in line for line in problems(without_novel, sources=False))
    assert upgrade(without_novel.root) == ["column clips.novel"]
    assert "novel" in columns_of(without_novel) and not list(problems(without_novel, sources=False))


def test_writers_that_bring_the_same_column_at_once_all_land(without_novel):
    rows = [clip(start=1000 + i * 100, novel=i / 10) for i in range(6)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda row: Catalog(without_novel.root).append("clips", [row]), rows))
    found = without_novel.scan("clips").select("start_pts", "novel").collect()
    assert found["start_pts"].sort().to_list() == sorted([clip()["start_pts"], *(row["start_pts"] for row in rows)])
    assert found["novel"].drop_nulls().len() == len(rows)


def test_a_score_that_is_gone_leaves_its_numbers_and_stops_no_writer(without_novel, monkeypatch):
    without_novel.append("clips", [clip(start=500, novel=0.25)])
    monkeypatch.setitem(schema.TABLES, "clips", tuple(c for c in schema.TABLES["clips"] if c is not NOVEL))
    without_novel.append("clips", [clip(start=900)])
    row = {"clip_id": clip()["clip_id"], "run_id": "r", "shard": V[0], "errors": [], "motion": 2.0}
    write_columns(without_novel, [row], {"motion": "f"})
    found = without_novel.scan("clips").sort("start_pts").select("motion", "novel").collect()
    assert found["motion"].to_list()[0] == 2.0 and found["novel"].drop_nulls().to_list() == [0.25]
    assert found.height == 3
