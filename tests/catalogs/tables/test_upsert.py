"""`Catalog.upsert`: which rows change, which are added, in how many commits, and what a conflict does."""

import polars as pl
import pytest

from catalogs.tables.catalog import Catalog
from catalogs.tables.schema import KEYS, PARTITIONED, TABLES
from datakit.errors import CatalogError
from support.catalog_rows import clip, video

A, B, C = ("a" + "0" * 31, "b" + "0" * 31, "c" + "0" * 31)


@pytest.fixture
def catalog(tmp_path) -> Catalog:
    """Two videos with a clip each, in two shards."""
    catalog = Catalog.create(tmp_path / "catalog")
    catalog.append("videos", [video(A, license="CC0"), video(B, status="pending")])
    catalog.append("clips", [clip(A, motion=1.0, blur=10.0), clip(B, motion=2.0, blur=20.0)])
    return catalog


def scored(video_id: str, /, **columns) -> dict:
    return {name: clip(video_id)[name] for name in ("clip_id", "run_id", "shard")} | columns


def column(catalog: Catalog, name: str, column: str) -> list:
    key = {"videos": "video_id", "clips": "video_id", "tags": "name"}[name]
    return catalog.scan(name).sort(key).select(column).collect()[column].to_list()


def test_every_table_declares_its_keys():
    assert set(KEYS) == set(TABLES)
    for name, columns in TABLES.items():
        assert set(KEYS[name]) <= {c.name for c in columns}, name


def test_known_rows_change_and_new_ones_are_added(catalog):
    rows = [scored(A, motion=5.0, video_id=A), scored(C, motion=7.0, video_id=C)]
    assert catalog.upsert("clips", rows) == 2
    assert column(catalog, "clips", "motion") == [5.0, 2.0, 7.0]
    assert column(catalog, "clips", "blur") == [10.0, 20.0, None]  # columns that the rows do not have stay


@pytest.mark.parametrize(("only", "motion"), [("update", [5.0, 2.0]), ("insert", [1.0, 2.0, 7.0])])
def test_only(catalog, only, motion):
    rows = [scored(A, motion=5.0, video_id=A), scored(C, motion=7.0, video_id=C)]
    assert catalog.upsert("clips", rows, only=only) == 1
    assert column(catalog, "clips", "motion") == motion


def test_when_change_and_fill(catalog):
    rows = [{"video_id": v, "license": "BY", "codec": "h264", "clip_count": 9} for v in (A, B)]
    assert catalog.upsert("videos", rows, when={"status": ("pending",)}, change=("codec",)) == 1
    assert column(catalog, "videos", "codec") == [None, "h264"]
    assert catalog.upsert("videos", rows, fill=("license",), change=("license",)) == 2
    assert column(catalog, "videos", "license") == ["CC0", "BY"]
    assert column(catalog, "videos", "clip_count") == [1, 1]


def test_a_row_of_another_run_is_another_row(catalog):
    assert catalog.upsert("clips", [scored(A, motion=5.0) | {"run_id": "killed"}], only="update") == 0
    assert catalog.upsert("clips", [scored(A, motion=5.0) | {"run_id": "killed"}], keys=("clip_id",)) == 1
    assert sorted(column(catalog, "clips", "motion")) == [2.0, 5.0]


def test_a_commit_for_every_shard_or_one_for_all(catalog):
    rows = [scored(A, motion=5.0), scored(B, motion=6.0)]
    before = catalog.table("clips").version()
    catalog.upsert("clips", rows)
    assert catalog.table("clips").version() == before + 2
    catalog.upsert("clips", rows, at_once=True)
    assert catalog.table("clips").version() == before + 3
    assert catalog.upsert("clips", []) == 0
    assert catalog.table("clips").version() == before + 3


def test_values_are_quoted(catalog):
    name = "it's `quoted`"
    for note in ("first", "second"):
        catalog.upsert("tags", [{"name": name, "note": note}])
    assert column(catalog, "tags", "note") == ["second"]


def test_revise_sees_the_partition_and_is_asked_again_on_conflict(catalog):
    seen = []

    def add(rows: pl.DataFrame, table: pl.LazyFrame) -> pl.DataFrame:
        now = table.select("clip_id", "motion").collect()
        seen.append(now["motion"].to_list())
        if len(seen) == 1:  # another writer, between reading and writing
            catalog.upsert("clips", [scored(A, motion=100.0)])
        return rows.join(now, on="clip_id").with_columns(motion=pl.col("motion") + pl.col("more")).drop("more")

    rows = pl.DataFrame([scored(A, more=1.0)])
    assert catalog.upsert("clips", rows, only="update", revise=add) == 1
    assert seen == [[1.0], [100.0]]
    assert column(catalog, "clips", "motion") == [101.0, 2.0]


def test_writers_of_other_shards_do_not_conflict(catalog):
    calls = []

    def slowly(rows: pl.DataFrame, table: pl.LazyFrame) -> pl.DataFrame:
        calls.append(table.collect().height)
        if len(calls) == 1:
            catalog.upsert("clips", [scored(B, motion=100.0)])
        return rows

    assert PARTITIONED["clips"] == ["shard"]
    catalog.upsert("clips", [scored(A, motion=5.0)], revise=slowly)
    assert calls == [1]
    assert column(catalog, "clips", "motion") == [5.0, 100.0]


def test_what_revise_leaves_out_is_not_written(catalog):
    before = catalog.table("videos").version()
    assert catalog.upsert("videos", [video(A)], revise=lambda rows, table: rows.clear()) == 0
    assert catalog.table("videos").version() == before


def test_mistakes_are_named(catalog):
    with pytest.raises(CatalogError, match="table clips has no column colour"):
        catalog.upsert("clips", [scored(A, colour=3)])
    with pytest.raises(CatalogError, match="table clips has no column colour"):
        catalog.upsert("clips", pl.DataFrame([scored(A, colour=3)]))
    with pytest.raises(CatalogError, match="rows for table clips have different columns: motion in some only"):
        catalog.upsert("clips", [scored(A, motion=1.0), scored(B)])
    with pytest.raises(CatalogError, match="rows for table clips must say their shard"):
        catalog.upsert("clips", [{"clip_id": clip(A)["clip_id"], "motion": 1.0}])
