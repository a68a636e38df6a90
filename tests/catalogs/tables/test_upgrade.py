"""A catalog of an earlier schema version opens after an upgrade, with its rows as they were."""

import json
import shutil

import pytest
from deltalake import DeltaTable, write_deltalake

from catalogs.maintenance.validate import problems
from catalogs.tables import schema
from catalogs.tables.arrow_types import as_arrow
from catalogs.tables.catalog import Catalog, create_table
from catalogs.tables.upgrade import upgrade
from datakit.errors import CatalogError
from datakit.identity import clip_id

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
