"""Writing: nothing is lost when several write at once, nothing half-written is seen."""

import multiprocessing

import polars as pl
import pytest

from catalogs.maintenance.validate import problems
from catalogs.query.funnel import funnel
from catalogs.query.sql import query
from catalogs.tables import schema
from catalogs.tables.catalog import Catalog
from datakit.errors import CatalogError
from pipelines.catalog_sync.score_writer import write_columns
from pipelines.stages.registry import STAGES
from support.catalog_rows import V, clip, video


@pytest.fixture
def catalog(tmp_path):
    return Catalog.create(tmp_path / "catalog")


def test_a_new_catalog_has_the_whole_schema(catalog):
    for name, columns in schema.TABLES.items():
        assert catalog.scan(name).collect_schema().names() == [c.name for c in columns]
        assert catalog.table(name).version() == 0
    assert catalog.clips().collect_schema().names() and set(Catalog.view_columns()) == set(
        catalog.clips().collect_schema().names()
    )
    assert all(c.meaning and c.filled_by for columns in schema.TABLES.values() for c in columns)


def test_the_schema_names_the_stage_of_every_score():
    for name, stage in STAGES.items():
        assert set(c.name for c in schema.CLIPS if c.filled_by == name) == set(stage.column_names()), name


def test_no_catalog_is_an_error_that_says_how_to_make_one(tmp_path):
    with pytest.raises(CatalogError, match="datakit run ingest"):
        Catalog(tmp_path)


def test_unknown_columns_are_errors(catalog):
    with pytest.raises(CatalogError, match="no column colour"):
        catalog.append("clips", [clip(colour=3)])


def test_clips_count_only_for_the_run_that_finished_their_video(catalog):
    catalog.append(
        "videos",
        [video(), video("cd" + "0" * 30, status="pending", run_id=None), video("ef" + "0" * 30, status="quarantined")],
    )
    catalog.append("clips", [clip(), clip(run_id="killed", start=500), clip("cd" + "0" * 30), clip("ef" + "0" * 30)])
    assert catalog.finished_clips().collect()["clip_id"].to_list() == [clip()["clip_id"]]
    view = catalog.clips().collect()
    assert view.height == 1 and view["uri"][0] == f"/v/{V}.mp4" and view["status"][0] == "pending"


def test_other_readers_see_plain_delta_tables(catalog):
    catalog.append("videos", [video()])
    assert pl.read_delta(f"{catalog.root}/videos")["video_id"].to_list() == [V]
    assert pl.read_delta(f"{catalog.root}/videos", version=0).is_empty()


def _fill(root: str, column: str, stage: str, ids: list[str], barrier) -> None:
    catalog = Catalog(root)
    barrier.wait()
    rows = [{"clip_id": c, "run_id": "r", "shard": V[0], "errors": [], column: float(i)} for i, c in enumerate(ids)]
    write_columns(catalog, rows, {stage: f"{stage}-fingerprint"})


@pytest.mark.slow
def test_two_writers_filling_different_columns_of_one_shard_both_land(catalog):
    rows = [clip(start=i * 100) for i in range(300)]
    catalog.append("videos", [video(clip_count=300)])
    catalog.append("clips", rows)
    ids = [row["clip_id"] for row in rows]
    context = multiprocessing.get_context("spawn")
    for _ in range(2):
        barrier = context.Barrier(3)
        columns = [("motion", "motion"), ("blur", "quality"), ("aesthetic", "aesthetic")]
        writers = [context.Process(target=_fill, args=(catalog.root, c, s, ids, barrier)) for c, s in columns]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join(120)
            assert writer.exitcode == 0
    filled = catalog.finished_clips().select("clip_id", "motion", "blur", "aesthetic", "stage_versions").collect()
    by_id = {row[0]: row for row in filled.iter_rows()}
    for i, c in enumerate(ids):
        assert by_id[c][1:4] == (i, i, i)
        assert sorted(v["stage"] for v in by_id[c][4]) == ["aesthetic", "motion", "quality"]


def test_errors_of_a_stage_are_replaced_by_its_next_run(catalog):
    other = {"stage": "ocr", "kind": "crash", "message": "x"}
    catalog.append("videos", [video()])
    catalog.append("clips", [clip(errors=[other, {"stage": "motion", "kind": "stage", "message": "y"}])])
    row = {"clip_id": clip()["clip_id"], "run_id": "r", "shard": V[0], "errors": [], "motion": 1.0}
    write_columns(catalog, [row], {"motion": "f"})
    assert catalog.finished_clips().collect()["errors"].to_list() == [[other]]


def test_the_funnel_fails_when_a_video_has_other_clips_than_it_says(catalog):
    catalog.append("videos", [video(clip_count=2)])
    catalog.append("clips", [clip()])
    with pytest.raises(CatalogError, match="2 expected, 1 found"):
        funnel(catalog)
    assert any("2 expected" in line for line in problems(catalog, sources=False))


def test_validate_finds_what_is_wrong(catalog, tmp_path):
    catalog.append("videos", [video(clip_count=3), video("cd" + "0" * 30, clip_count=0)])
    catalog.append(
        "clips", [clip(), clip(start=50), {**clip(start=900), "clip_id": "f" * 32, "path": "clips/ff/none.mp4"}]
    )
    found = "\n".join(problems(catalog))
    for words in ("overlap", "not the hash of their span", "clip files are missing", "is not at /v/"):
        assert words in found


def test_queries_run_over_the_view_and_the_tables(catalog):
    catalog.append("videos", [video()])
    catalog.append("clips", [clip(motion=3.0)])
    assert query(catalog, "SELECT count(*) AS n, max(motion) AS m FROM clips WHERE status = 'pending'").rows() == [
        (1, 3.0)
    ]
    assert query(catalog, "SELECT v.kind FROM clips c JOIN videos v ON c.video_id = v.video_id").rows() == [("video",)]
    with pytest.raises(CatalogError, match="did you mean motion"):
        query(catalog, "SELECT motoin FROM clips")
    with pytest.raises(CatalogError):
        query(catalog, "SELEKT 1")


def test_create_is_safe_to_repeat(catalog):
    catalog.append("videos", [video()])
    again = Catalog.create(catalog.root, shard_digits=3)
    assert again.shard_digits == 1 and again.scan("videos").collect().height == 1
