"""Exports load with the libraries they are for, and come back without loss; other data sets come in whole or
quarantined."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest

from catalogs.interop import EXPORT_FORMATS, export, import_dataset
from catalogs.interop.exchange.column_mapping import OPEN_SORA, SCORES
from catalogs.interop.media import clip_files
from catalogs.interop.media.cut_worker import CutJob, Wanted, cut_clips
from catalogs.maintenance.validate import problems
from catalogs.query.funnel import funnel
from catalogs.records.marks import mark
from catalogs.tables.catalog import Catalog
from datakit import config
from datakit.errors import CatalogError, ConfigError, MissingDependency
from datakit.identity import caption_id
from datakit.process.pool import Pool, Result
from datakit.video.reader import VideoReader
from pipelines.recipes.decide import decide_and_record
from pipelines.recipes.recipe import load_recipe
from pipelines.runs.ingest import ingest
from pipelines.settings import Settings
from support import tiny_videos

TEXTS = [
    'a "quoted", comma',
    "two\nlines, and\r\nmore",
    "ünïcode 名 😀🎬",
    "=1+1; 'x'",
    " spaces ",
    "tab\there",
    "plain",
]
FAST = config.load(Settings, None, ["ocr.enabled=false", "recipe=technical"])
ALL = "status in ('kept', 'rejected')"
FILE_FORMS = ("open-sora-csv", "open-sora-parquet", "webdataset", "huggingface")


@pytest.fixture(scope="module")
def root(tmp_path_factory, footage, ray_address) -> str:
    """A catalog of two real videos, with awkward captions, a mark, scores that need models, licences."""
    folder = tmp_path_factory.mktemp("interop")
    listing = folder / "list.csv"
    listing.write_text(
        "path,license,camera\n" + "".join(f"{path},CC-BY,{name[:4]}\n" for name, path in footage.items())
    )
    ingest([str(listing)], str(folder / "catalog"), FAST, ray_address)
    catalog = Catalog(folder / "catalog")
    clips = catalog.finished_clips().select("clip_id", "shard").sort("clip_id").collect()
    catalog.append(
        "captions", [caption(clip, shard, text) for (clip, shard), text in zip(clips.iter_rows(), TEXTS, strict=True)]
    )
    ids = clips.with_columns(aesthetic=pl.int_range(pl.len()).cast(pl.Float32) / 7 + 4)
    catalog.upsert("clips", ids, keys=("clip_id",), only="update")
    mark(catalog, [clips["clip_id"][0]], "keep", "good, really")
    decide_and_record(catalog, load_recipe("technical"))
    return catalog.root


def caption(clip: str, shard: str, text: str, style: str = "dense") -> dict:
    return {
        "caption_id": caption_id(clip, style, "m"),
        "clip_id": clip,
        "shard": shard,
        "style": style,
        "model": "m",
        "text": text,
        "flags": ["boilerplate"],
        "created_at": datetime.now(UTC),
    }


@pytest.fixture(scope="module")
def view(root) -> pl.DataFrame:
    return Catalog(root).clips().sort("video_id", "start_pts").collect()


@pytest.fixture(scope="module")
def exported(root, tmp_path_factory) -> dict[str, Path]:
    """Every form, of every clip."""
    folder = tmp_path_factory.mktemp("exports")
    made = {}
    for form in EXPORT_FORMATS:
        done = export(root, str(folder / form), form, ALL, shard_size="3")
        assert (done.clips, done.failed) == (7, [])
        made[form] = folder / form
    return made


@pytest.fixture
def tiny(tmp_path) -> Path:
    return tiny_videos.make(tmp_path / "in")


def frames_of(path: str) -> int:
    with VideoReader(str(path)) as reader:
        return sum(1 for _ in reader.frames())


def alike(ours: object, theirs: object) -> bool:
    if isinstance(theirs, float) and isinstance(ours, (int, float)):
        return math.isclose(ours, theirs, rel_tol=1e-5)
    return (ours is None and theirs != theirs) or ours == theirs or (isinstance(ours, bytes) and ours.hex() == theirs)


def assert_same_rows(expected: pl.DataFrame, found: pl.DataFrame, columns, key: str = "clip_id") -> None:
    ours = {row[key]: row for row in expected.to_dicts()}
    theirs = {row[key]: row for row in found.to_dicts()}
    assert set(ours) == set(theirs) and len(ours) == expected.height == found.height
    wrong = [
        (name, ours[k][name], theirs[k][name])
        for k in ours
        for name in columns
        if not alike(ours[k][name], theirs[k][name])
    ]
    assert not wrong, wrong[:5]


# Consumers


def test_open_sora_reads_its_csv_and_parquet(exported, view):
    """As opensora/datasets/utils.py does: pandas.read_csv, pandas.read_parquet; videos by their path."""
    import pandas

    tables = (
        pandas.read_csv(exported["open-sora-csv"] / "meta.csv"),
        pandas.read_parquet(exported["open-sora-parquet"] / "meta.parquet"),
    )
    for table in tables:
        assert list(table.columns[:9]) == [*OPEN_SORA, "aes"]
        rows = pl.DataFrame(table.to_dict("records"), infer_schema_length=None)
        renamed = rows.rename({"text": "caption", "aes": "aesthetic"})
        assert_same_rows(
            view,
            renamed,
            [
                "caption",
                "num_frames",
                "height",
                "width",
                "aspect_ratio",
                "resolution",
                "fps",
                "aesthetic",
                "motion",
                "blur",
                "split",
                "license",
                "start_s",
                "uri",
            ],
        )
        for row in rows.to_dicts():
            assert os.path.isabs(row["path"]) and frames_of(row["path"]) == row["num_frames"]


def test_webdataset_reads_its_shards(exported, view):
    import webdataset

    shards = sorted(str(path) for path in exported["webdataset"].glob("*.tar"))
    assert [Path(path).name for path in shards] == [f"shard-{i:06d}.tar" for i in range(3)]
    pattern = str(exported["webdataset"] / "shard-{000000..000002}.tar")
    samples = list(webdataset.WebDataset(pattern, shardshuffle=False).decode())
    assert [s["__key__"] for s in samples] == view["clip_id"].to_list()
    by_id = {row["clip_id"]: row for row in view.to_dicts()}
    for sample in samples:
        row = by_id[sample["__key__"]]
        assert sample["txt"] == row["caption"] and sample["mp4"][4:8] == b"ftyp"
        assert sample["json"]["num_frames"] == row["num_frames"] and sample["json"]["phash"] == row["phash"].hex()
        assert sample["json"]["stage_versions"] == row["stage_versions"] and alike(
            row["motion"], sample["json"]["motion"]
        )


def test_hugging_face_reads_its_folder(root, exported, view, tmp_path):
    import datasets

    loaded = datasets.load_dataset(
        "videofolder", data_dir=str(exported["huggingface"]), cache_dir=str(tmp_path / "cache")
    )
    names = {"train": "train", "val": "validation", "test": "test"}
    assert set(loaded) == {names[split] for split in view["split"]}
    for split, rows in loaded.items():
        rows = rows.cast_column("video", datasets.Video(decode=False))
        for row in rows:
            ours = view.filter(clip_id=row["clip_id"]).row(0, named=True)
            assert names[ours["split"]] == split and row["text"] == ours["caption"] and row["phash"] == ours["phash"]
            assert frames_of(row["video"]["path"]) == ours["num_frames"] == row["num_frames"]
    decoded = datasets.load_dataset(
        "videofolder", data_dir=str(exported["huggingface"]), cache_dir=str(tmp_path / "cache")
    )
    assert decoded["train"].features["video"] == datasets.Video()


def test_parquet_jsonl_and_lance_hold_the_whole_view(exported, view):
    import duckdb
    import lance
    import pyarrow.parquet

    path = exported["parquet"] / "clips.parquet"
    found = {
        "pyarrow": pl.from_arrow(pyarrow.parquet.read_table(path)),
        "polars": pl.read_parquet(path),
        "duckdb": pl.from_arrow(duckdb.sql(f"SELECT * FROM read_parquet('{path}')").arrow().read_all()),
        "lance": pl.from_arrow(lance.dataset(str(exported["lance"] / "clips.lance")).to_table()),
    }
    for rows in found.values():
        assert rows.columns == [*Catalog.view_columns(), "source"]
        assert_same_rows(view, rows, view.columns)
    lines = (exported["jsonl"] / "clips.jsonl").read_text().splitlines()
    rows = {row["clip_id"]: row for row in map(json.loads, lines)}
    for row in view.to_dicts():
        assert all(alike(row[name], rows[row["clip_id"]][name]) for name in view.columns)
    assert duckdb.sql(f"SELECT count(*) FROM read_json('{exported['jsonl'] / 'clips.jsonl'}')").fetchall() == [(7,)]


def test_the_summary_says_what_was_exported(root, exported):
    from catalogs.query.selection import Selection

    for folder in exported.values():
        told = json.loads((folder / "datakit_export.json").read_text())
        assert (told["form"], told["clips"], told["failed"]) == (folder.name, 7, [])
        again = Selection.from_dict(Catalog(root), told["selection"])
        assert again.content_hash == told["selection"]["content_hash"] and again.where == ALL


# Round trips


@pytest.mark.parametrize("form", ["jsonl", "parquet", "lance"])
def test_our_own_tables_restore_the_very_clips(root, exported, view, tmp_path, form):
    back = tmp_path / "back"
    done = import_dataset(str(exported[form]), str(back))
    assert (done.form, done.rows, done.entered, done.captions) == (form, 7, 7, 7)
    catalog = Catalog(back)
    assert not list(problems(catalog))
    decide_and_record(catalog, load_recipe("technical"))
    differ = {"run_id", "caption_flags"}  # the import's own; see below
    restored = catalog.clips().sort("video_id", "start_pts").collect()
    assert_same_rows(view, restored, [name for name in view.columns if name not in differ])
    assert restored["caption_flags"].to_list() == view["caption_flags"].to_list()
    facts = [
        "video_id",
        "start_pts",
        "num_frames",
        "duration_s",
        "fps",
        "width",
        "height",
        "codec",
        "time_base",
        "vfr",
        "uris",
    ]
    videos = Catalog(root).scan("videos").select(facts).collect()
    assert_same_rows(videos, catalog.scan("videos").select(facts).collect(), facts, key="video_id")

    again = import_dataset(str(exported[form]), str(back))
    assert (again.entered, again.in_catalog, again.captions) == (0, 7, 0)
    assert catalog.clips().collect().height == 7 and catalog.scan("marks").collect().height == 1


@pytest.mark.parametrize("form", FILE_FORMS)
def test_files_come_back_with_frames_scores_and_captions(root, exported, view, tmp_path, form):
    back = str(tmp_path / "back")
    done = import_dataset(str(exported[form]), back)
    assert (done.rows, done.entered, done.captions, done.discrepancies) == (7, 7, 7, 0)
    catalog = Catalog(back)
    assert not list(problems(catalog)) and set(catalog.clips().collect()["status"]) == {"pending"}
    decide_and_record(catalog, load_recipe("technical"))
    rows = catalog.clips().collect()
    origin = [json.loads(extra)["exported"]["clip_id"] for extra in rows["extra"]]
    rows = rows.with_columns(pl.Series("clip_id", origin))
    held = [name for name in SCORES if form in ("webdataset", "huggingface") or name != "phash"]
    assert_same_rows(
        view,
        rows,
        [
            *held,
            "caption",
            "caption_style",
            "caption_model",
            "num_frames",
            "width",
            "height",
            "aspect_ratio",
            "resolution",
            "license",
        ],
    )
    assert all(
        math.isclose(a, b, rel_tol=0.03) for a, b in zip(rows.sort("clip_id")["fps"], view.sort("clip_id")["fps"])
    )
    assert all(json.loads(extra)["camera"] in ("bike", "bigb") for extra in rows["extra"])
    assert rows["start_frame"].to_list() == [0] * 7 and frames_of(rows["uri"][0]) == rows["num_frames"][0]
    assert import_dataset(str(exported[form]), back).in_catalog == 7


def test_few_columns_and_sources_that_are_gone(exported, view, tmp_path):
    """What a table does not say is decoded; clips of a missing or another source are quarantined, and come when it is
    back."""
    rows = pl.read_parquet(exported["parquet"] / "clips.parquet")
    few = rows.select(
        "video_id",
        "stream",
        "start_pts",
        "end_pts",
        "time_base",
        "uri",
        "start_frame",
        "end_frame",
        "num_frames",
        "fps",
    )
    few.write_parquet(tmp_path / "few.parquet")
    assert import_dataset(str(tmp_path / "few.parquet"), str(tmp_path / "few")).entered == 7
    found = Catalog(tmp_path / "few").clips().collect()
    assert_same_rows(
        view, found, ["start_s", "end_s", "width", "height", "codec", "bit_rate", "clip_id", "aspect_ratio"]
    )

    bikes, bunny = (view.filter(pl.col("uri").str.ends_with(name))["uri"][0] for name in ("bikes.mp4", "bunny.mp4"))
    media_root = tmp_path / "moved"
    media_root.mkdir()
    shutil.copy(bikes, media_root / "bigbuckbunny.mp4")
    done = import_dataset(str(exported["parquet"]), str(tmp_path / "c"), media_root=str(media_root))
    assert (done.entered, done.quarantined, done.kinds) == (0, 7, {"unreadable": 6, "source_changed": 1})
    assert funnel(Catalog(tmp_path / "c")).videos_quarantined == 2
    for source in (bikes, bunny):
        shutil.copy(source, media_root)
    back = import_dataset(str(exported["parquet"]), str(tmp_path / "c"), media_root=str(media_root))
    assert (back.entered, back.quarantined) == (7, 0) and not list(problems(Catalog(tmp_path / "c")))
    assert funnel(Catalog(tmp_path / "c")).videos == 2


def test_cut_files_show_the_clip(exported, view):
    import pandas

    paths = dict(pandas.read_csv(exported["open-sora-csv"] / "meta.csv")[["clip_id", "path"]].itertuples(index=False))
    clip = view.filter(pl.col("start_frame") > 0).row(0, named=True)
    with VideoReader(clip["uri"]) as source, VideoReader(paths[clip["clip_id"]]) as cut:
        expected = [p.rgb().astype(int) for p, _ in zip(source.since(clip["start_pts"]), range(20))]
        got = [p.rgb().astype(int) for p, _ in zip(cut.frames(), range(20))]
    assert all(abs(a - b).mean() < 3 for a, b in zip(expected, got, strict=True))


# Export: media, places, failures


def test_whole_sources_are_linked_and_spans_are_not(root, tmp_path):
    with pytest.raises(ConfigError, match="6 of 7 clips have no file of their own.*--media cut"):
        export(root, str(tmp_path / "x.csv"), "open-sora-csv", ALL, media="link")
    with pytest.raises(ConfigError, match="6 of 7"):
        export(root, str(tmp_path / "x.csv"), "open-sora-csv", ALL, media="none")
    with pytest.raises(ConfigError, match="--media none does not go with webdataset"):
        export(root, str(tmp_path / "x"), "webdataset", ALL, media="none")
    assert not list(tmp_path.iterdir())
    whole = "start_frame = 0 and num_frames > 100"
    done = export(root, str(tmp_path / "x.csv"), "open-sora-csv", whole, media="link")
    row = pl.read_csv(tmp_path / "x.csv").row(0, named=True)
    assert (done.clips, done.made, row["path"]) == (1, 0, row["uri"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.csv", "x.csv.datakit_export.json"]
    export(root, str(tmp_path / "hf"), "huggingface", whole, media="link")
    assert [path.is_symlink() for path in (tmp_path / "hf").rglob("*.mp4")] == [True]


def test_a_file_with_clips_beside_it_and_overwriting(root, tmp_path):
    out = tmp_path / "set.csv"
    export(root, str(out), "open-sora-csv", "start_frame > 0 and num_frames < 50", columns=["motion", "reasons"])
    table = pl.read_csv(out)
    assert table.columns == [*OPEN_SORA, "motion", "reasons"] and all(
        path.startswith(f"{tmp_path}/set-clips/") for path in table["path"]
    )
    assert json.loads(table["reasons"][0]) is not None
    with pytest.raises(ConfigError, match="set.csv exists.*--overwrite"):
        export(root, str(out), "open-sora-csv", ALL)
    export(root, str(out), "open-sora-csv", "start_frame = 0 and num_frames < 50", overwrite=True)
    assert len(list((tmp_path / "set-clips").rglob("*.mp4"))) == 1 == pl.read_csv(out).height
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_nothing_but_exports_is_overwritten(root, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="a folder that no export made"):
        export(root, str(tmp_path / "own"), "jsonl", ALL, overwrite=True)
    for place in (root, str(Path(root).parent), f"{root}/clips/x"):
        with pytest.raises(ConfigError, match="no export made|lie in each other"):
            export(root, place, "jsonl", ALL, overwrite=True)
    assert (tmp_path / "own" / "thesis.txt").exists() and not list(problems(Catalog(root)))


def test_stream_copies_say_what_they_hold(root, view, tmp_path):
    done = export(root, str(tmp_path / "x"), "open-sora-parquet", ALL, media="copy")
    rows = pl.read_parquet(tmp_path / "x" / "meta.parquet")
    assert rows.height == 7 and not done.failed and done.made == 6
    assert all(frames_of(path) == frames for path, frames in rows.select("path", "num_frames").iter_rows())
    clip = view.filter(num_frames=61).row(
        0, named=True
    )  # begins at a key frame; from its second frame on there is none
    wanted = Wanted(
        "x",
        clip["start_pts"] + 1,
        clip["start_pts"] + (clip["end_pts"] - clip["start_pts"]) // 8,
        7,
        str(tmp_path / "x"),
    )
    (written,) = cut_clips(CutJob(clip["uri"], None, clip["video_id"], clip["stream"], "copy", (wanted,)))
    assert written.path is None and "no key frame" in written.reason


def test_clips_of_a_changed_source_are_left_out_and_named(root, tiny, tmp_path):
    catalog = tiny_videos.imported(tiny, tmp_path / "catalog")
    (tiny / "b.mp4").write_bytes((tiny / "a.mp4").read_bytes())
    done = export(catalog.root, str(tmp_path / "wds"), "webdataset", None)
    assert done.clips == 2 and [(f.kind, f.uri) for f in done.failed] == [("source_changed", str(tiny / "b.mp4"))]
    assert json.loads((tmp_path / "wds" / "datakit_export.json").read_text())["failed"][0]["kind"] == "source_changed"
    for name in "ac":
        (tiny / f"{name}.mp4").unlink()
    with pytest.raises(CatalogError, match="none of 3 clips could be exported"):
        export(catalog.root, str(tmp_path / "none"), "webdataset", None)
    assert not (tmp_path / "none").exists()


def test_a_process_that_dies_costs_one_clip(root, tmp_path, monkeypatch):
    monkeypatch.setattr(clip_files, "CUTTER", "support.dying_workers:cut_clips")
    done = export(root, str(tmp_path / "x"), "open-sora-csv", ALL)
    assert done.clips == 6 and [(f.kind, "SIGKILL" in f.reason) for f in done.failed] == [("crash", True)]
    with Pool("support.dying_workers:modules", 1) as pool:
        found = [event.value for event in pool.run(["t"]) if isinstance(event, Result)]
    assert found == [[]]  # neither deltalake nor polars


def test_a_killed_export_leaves_nothing_at_its_place(root, tmp_path):
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "datakit",
        "catalog",
        "export",
        root,
        "--format",
        "open-sora-csv",
        "--out",
        str(out),
    ]
    command += ["--where", ALL]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".*-out/clips/*/*.mp4")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists() and list(tmp_path.iterdir())
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_makes_no_sense_is_told(root, tmp_path, monkeypatch):
    with pytest.raises(CatalogError, match="no clip of .* matches"):
        export(root, str(tmp_path / "x"), "jsonl", "num_frames > 100000")
    with pytest.raises(ConfigError, match="no form"):
        export(root, str(tmp_path / "x"), "tfrecord")
    with pytest.raises(ConfigError, match="--shard-size"):
        export(root, str(tmp_path / "x"), "webdataset", shard_size="big")
    with pytest.raises(CatalogError, match="no captions of style 'short': the catalog has dense"):
        export(root, str(tmp_path / "x"), "jsonl", style="short")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="uv sync --inexact --extra lance"):
        export(root, str(tmp_path / "x"), "lance")
    assert not list(tmp_path.iterdir())


def test_captions_of_a_style(root, tmp_path):
    catalog = Catalog(root)
    clip = catalog.finished_clips().select("clip_id", "shard").collect().row(0)
    catalog.append("captions", [caption(*clip, "in short", style="brief")])
    export(root, str(tmp_path / "x.jsonl"), "jsonl", ALL, style="brief")
    rows = {row["clip_id"]: row for row in map(json.loads, (tmp_path / "x.jsonl").read_text().splitlines())}
    assert (rows[clip[0]]["caption"], rows[clip[0]]["caption_style"]) == ("in short", "brief")
    assert sum(row["caption"] is not None for row in rows.values()) == 1
    catalog.delete("captions", "style = 'brief'")


def test_a_video_that_was_ingested_keeps_its_clips(root, view, footage, tmp_path):
    own = str(tmp_path / "own")
    shutil.copytree(root, own)
    (tmp_path / "x.csv").write_text("path,text\n" + "".join(f"{path},says\n" for path in footage.values()))
    done = import_dataset(str(tmp_path / "x.csv"), own)
    assert (done.entered, done.in_catalog, done.divided_otherwise) == (0, 1, 1)  # bigbuckbunny is one clip, whole
    assert Catalog(own).clips().collect().height == 7 and not list(problems(Catalog(own)))
    captions = Catalog(own).scan("videos").select("source_caption").drop_nulls().collect()["source_caption"].to_list()
    assert captions == ["says"]


def test_the_commands(root, view, tiny, tmp_path):
    def run(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "datakit", "catalog", *words], capture_output=True, text=True)

    done = run(
        "export", root, "--format", "jsonl", "--out", str(tmp_path / "x.jsonl"), "--columns", "motion,caption", "--json"
    )
    assert json.loads(done.stdout)["clips"] == view.filter(status="kept").height
    assert set(json.loads((tmp_path / "x.jsonl").read_text().splitlines()[0])) == {"clip_id", "motion", "caption"}
    (tmp_path / "m.csv").write_text("path\nin/a.mp4\nin/none.mp4\n")
    done = run("import", str(tmp_path / "m.csv"), "--catalog", str(tmp_path / "c"))
    assert (
        done.returncode == 0
        and "1 entered, 1 quarantined" in done.stdout
        and "datakit run decide" in done.stdout.splitlines()[-1]
    )
    done = run("export", str(tmp_path / "c"), "--format", "webdataset", "--out", str(tmp_path / "x"))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "matches" in done.stderr
