"""The rows of the browse app in memory: counted, ordered, marked, as the catalog's view has them."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import polars as pl
import pytest

from catalogs.browse import Index
from catalogs.browse.facets import facets
from catalogs.browse.mark_writer import Marker
from catalogs.records.marks import mark
from catalogs.tables.catalog import Catalog
from datakit.errors import CatalogError, ConfigError
from datakit.identity import clip_id


def made_up(root, clips: int = 3000, videos: int = 60) -> Catalog:
    """A catalog of random rows, some columns with nulls, half of the clips with captions, some marked."""
    catalog, rng = Catalog.create(root), np.random.default_rng(5)
    ids = [rng.bytes(16).hex() for _ in range(videos)]
    of = rng.integers(0, videos - 1, clips)  # the last video has no clips
    catalog.append(
        "videos",
        [
            {
                "video_id": v,
                "shard": v[0],
                "status": "ok" if i else "quarantined",
                "run_id": "r",
                "kind": "video",
                "codec": ["h264", "hevc"][i % 2],
                "license": ["CC0", None, "CC BY 3.0"][i % 3],
                "duration_s": 100.0,
                "clip_count": int((of == i).sum()),
                "uris": [{"uri": f"/nowhere/{i}.mp4", "size": 1, "etag": ""}],
            }
            for i, v in enumerate(ids)
        ],
    )
    rows = []
    for i, video in enumerate(of):
        start, length = 1000 * i, float(rng.uniform(0.5, 9))
        rows.append(
            {
                "clip_id": clip_id(ids[video], 0, start, start + 500),
                "video_id": ids[video],
                "shard": ids[video][0],
                "stream": 0,
                "run_id": "r",
                "start_pts": start,
                "end_pts": start + 500,
                "time_base": "1/100",
                "start_s": float(i),
                "end_s": i + length,
                "width": 640,
                "height": 360,
                "motion": None if rng.random() < 0.1 else float(np.float32(rng.lognormal(1, 1))),
                "ocr_boxes": int(rng.integers(0, 5)),
                "camera_motion": [None, "static", "pan left", "zoom in"][rng.integers(0, 4)],
                "errors": [],
                "stage_versions": [],
            }
        )
    catalog.append("clips", rows)
    status = rng.choice(["kept", "rejected", "pending", "quarantined"], clips, p=[0.5, 0.3, 0.1, 0.1])
    captions = [
        {
            "caption_id": f"c{i}",
            "clip_id": r["clip_id"],
            "shard": r["shard"],
            "style": "dense",
            "model": "m",
            "flags": [],
            "text": f"{['a dog runs', 'its a Cat', 'a 100% red car'][i % 3]} {i}",
        }
        for i, r in enumerate(rows)
        if i % 2
    ]
    catalog.append("captions", captions)
    chosen = {c["clip_id"]: c["caption_id"] for c in captions}
    catalog.append(
        "decisions",
        [
            {
                "clip_id": r["clip_id"],
                "shard": r["shard"],
                "status": s,
                "reasons": ["motion", "ocr"][: i % 3] if s == "rejected" else [],
                "recipe": "x@1",
                "level": int(s == "kept"),
                "caption_id": chosen.get(r["clip_id"]),
            }
            for i, (r, s) in enumerate(zip(rows, status))
            if i % 50
        ],
    )
    mark(catalog, [r["clip_id"] for r in rows[:40]], "keep")
    mark(catalog, [r["clip_id"] for r in rows[30:70]], "reject", "blurred")
    mark(catalog, [r["clip_id"] for r in rows[60:65]], None)
    return catalog


@pytest.fixture(scope="module")
def rows_catalog(tmp_path_factory):
    return made_up(tmp_path_factory.mktemp("rows") / "catalog")


@pytest.fixture(scope="module")
def index(rows_catalog):
    return Index(rows_catalog)


CONDITIONS = [
    None,
    "motion > 2.5",
    "motion BETWEEN 1 AND 4 AND status = 'kept'",
    "motion IS NULL",
    "NOT motion > 3",
    "camera_motion IN ('static', 'nonsense') OR camera_motion IS NULL",
    "camera_motion LIKE 'pan%'",
    "camera_motion < 'p'",
    "upper(camera_motion) = 'STATIC'",
    "codec = 'hevc' AND license = 'CC0'",
    "license IS NULL",
    "mark = 'keep'",
    "mark IS NOT NULL AND comment = 'blurred'",
    "status = 'quarantined' AND mark IS NOT NULL",
    "level > 0",
    "caption ILIKE '%DOG%'",
    "strpos(lower(caption), '100% red') > 0",
    "array_contains(reasons, 'mark')",
    "array_contains(reasons, 'ocr') AND ocr_boxes >= 2",
    "(end_s - start_s) > 5",
    "uri LIKE '%/7.mp4'",
    "video_id > '8' AND shard <> 'f'",
    "motion > avg(motion)",
    "1 = 1",
    "duplicate_of IS NULL",
    "aesthetic > 1",
]


@pytest.mark.parametrize("where", CONDITIONS)
def test_counts_are_those_of_the_view(rows_catalog, index, where):
    view = rows_catalog.clips().collect()
    matching = view.filter(pl.sql_expr(where)) if where else view
    found = index.query(where, limit=5000)
    assert found.total.clips == matching.height
    assert found.total.hours == pytest.approx((matching["end_s"] - matching["start_s"]).sum() / 3600)
    by_status = matching.group_by("status").agg(pl.len(), (pl.col("end_s") - pl.col("start_s")).sum() / 3600).rows()
    assert {name: amount.clips for name, amount in found.statuses.items() if amount.clips} == {
        name: clips for name, clips, _ in by_status
    }
    assert all(found.statuses[name].hours == pytest.approx(hours) for name, _, hours in by_status)
    shown = index.take(
        found.rows, ["clip_id", "status", "level", "mark", "comment", "reasons", "uri", "codec", "motion"]
    ).sort("clip_id")
    wanted = matching.select(shown.columns).sort("clip_id")
    assert shown.with_columns(pl.col(pl.Categorical, pl.Enum).cast(pl.String)).equals(wanted)


@pytest.mark.parametrize("sort", ["motion", "duration", "camera_motion", "level", "caption", "codec", "clip_id"])
@pytest.mark.parametrize("descending", [False, True])
def test_pages_follow_the_order_nulls_last(rows_catalog, index, sort, descending):
    key = pl.col("end_s") - pl.col("start_s") if sort == "duration" else pl.col(sort)
    view = rows_catalog.clips().collect().filter(pl.col("ocr_boxes") > 1)
    wanted = view.select(key.alias("key")).to_series().sort(descending=descending, nulls_last=True)
    pages = [index.query("ocr_boxes > 1", sort, descending, offset, 100).rows for offset in range(0, view.height, 100)]
    rows = np.concatenate(pages)
    assert len(set(rows)) == view.height
    assert index.take(rows, [sort])[sort].cast(wanted.dtype).equals(wanted, check_names=False)


def test_the_default_order_keeps_videos_together(index):
    shown = index.take(index.query(limit=5000).rows, ["video_id", "start_s"])
    assert shown["video_id"].rle().len() == shown["video_id"].n_unique()
    assert all(part["start_s"].is_sorted() for part in shown.partition_by("video_id"))


@pytest.mark.parametrize(
    "where, words",
    [
        ("motoin > 3", "did you mean motion"),
        ("motion >", "cannot read"),
        ("motion", "not a condition"),
        ("motion > 'x'", "--where"),
    ],
)
def test_conditions_that_make_no_sense_are_told(index, where, words):
    with pytest.raises(ConfigError, match=words):
        index.query(where)


@pytest.mark.parametrize("sort", ["moshun", "reasons", "phash"])
def test_orders_that_make_no_sense_are_told(index, sort):
    with pytest.raises(ConfigError, match="cannot sort"):
        index.query(sort=sort)


def test_histograms_count_every_value(rows_catalog, index):
    found = facets(index)
    motion = next(r for r in found["ranges"] if r["name"] == "motion")
    values = rows_catalog.clips(columns=["motion"]).collect()["motion"]
    assert sum(motion["counts"]) == values.count() and motion["missing"] == values.null_count()
    below = int(((values - motion["low"]) / (motion["high"] - motion["low"]) * 40 < 20).sum())
    assert sum(motion["counts"][:20]) == pytest.approx(below, abs=2)
    status = next(c for c in found["choices"] if c["name"] == "status")
    assert dict(status["values"]) == dict(
        rows_catalog.clips(columns=["status"]).collect()["status"].value_counts().rows()
    )
    assert {"aesthetic", "nsfw", "stream"}.isdisjoint(r["name"] for r in found["ranges"])


# ---- marks --------------------------------------------------------------------------------------------------------


def test_marks_show_at_once_and_as_the_view_has_them(tmp_path):
    catalog = made_up(tmp_path / "c", 300, 10)
    index = Index(catalog)
    marker, rows = Marker(index), np.arange(100, 160)
    marker.mark(rows, "reject")
    marker.comment(rows[:10], "too dark")
    marker.mark(rows[:5], "keep")  # comments stay
    marker.comment(rows[5:20], None)  # marks stay
    marker.mark(rows[40:], None)
    columns = ["clip_id", "status", "level", "mark", "comment", "reasons"]
    shown = index.take(np.arange(index.size), columns).with_columns(pl.col(pl.Enum).cast(pl.String)).sort("clip_id")
    assert shown.equals(catalog.clips(columns=columns).collect().sort("clip_id"))
    assert shown.equals(
        Index(catalog)
        .take(np.arange(index.size), columns)
        .with_columns(pl.col(pl.Enum).cast(pl.String))
        .sort("clip_id")
    )
    assert index.versions == catalog.versions()


def test_writers_at_the_same_time_lose_nothing(tmp_path):
    catalog = made_up(tmp_path / "c", 200, 10)
    before = catalog.scan("marks").collect().height
    markers = [Marker(Index(Catalog(catalog.root))) for _ in range(4)]

    def work(number: int) -> None:
        for i in range(8):
            markers[number].mark(np.array([40 * number + 90 // 4 + i]), "keep")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert catalog.scan("marks").collect().height == before + 32
    for marker in markers:  # the next mark brings those of the others
        marker.mark(np.array([0]), "keep")
    last = markers[-1].index
    assert (
        last.query("mark = 'keep'").total.clips
        == catalog.clips(columns=["mark"]).filter(pl.col("mark") == "keep").collect().height
    )


def test_a_snapshot_is_not_marked(rows_catalog):
    pinned = Index(rows_catalog.at(rows_catalog.versions()))
    with pytest.raises(CatalogError, match="snapshot"):
        Marker(pinned).mark(np.array([1]), "keep")
