"""Data sets of others come in whole or quarantined; done again, nothing is doubled."""

import io
import json
import math
import shutil
import tarfile
from pathlib import Path

import polars as pl
import pytest

from catalogs.interop import export, import_dataset
from catalogs.interop.formats.webdataset import braces
from catalogs.maintenance.validate import problems
from catalogs.query.funnel import funnel
from catalogs.tables import schema
from catalogs.tables.catalog import Catalog
from datakit import config
from datakit.errors import ConfigError
from pipelines.recipes.decide import decide_and_record
from pipelines.recipes.recipe import load_recipe
from pipelines.runs.score import score
from pipelines.settings import Settings
from support import tiny_videos

FAST = config.load(Settings, None, ["ocr.enabled=false", "recipe=technical"])


@pytest.fixture
def tiny(tmp_path) -> Path:
    return tiny_videos.make(tmp_path / "in")


def test_rows_of_every_kind(tiny, tmp_path):
    """Relative paths, a missing file, a broken one, the same content twice, wrong numbers, columns of others."""
    shutil.copy(tiny / "a.mp4", tiny / "again.mp4")
    (tiny / "broken.mp4").write_bytes(b"no video" * 1000)
    (tiny / "empty.mp4").write_bytes(b"")
    table = tmp_path / "meta.csv"
    table.write_text(
        "path,text,num_frames,height,width,aspect_ratio,fps,resolution,aes,flow,motion,license\n"
        "in/a.mp4,first,20,96,128,0.75,25,12288,5.5,1.25,9,MIT\n"
        'in/b.mp4,"with, comma ""and"" quotes\nin two lines",999,96,128,0.75,25,12288,,,,\n'
        "in/c.mp4,,,,,,,,,,,\nin/again.mp4,again,,,,,,,,,,\nin/none.mp4,x,,,,,,,,,,\n"
        "in/broken.mp4,x,,,,,,,,,,\nin/empty.mp4,x,,,,,,,,,,\n"
    )
    done = import_dataset(str(table), str(tmp_path / "catalog"))
    assert (done.rows, done.entered, done.same_content, done.quarantined, done.discrepancies, done.captions) == (
        7,
        3,
        1,
        3,
        1,
        2,
    )
    assert done.kinds == {"unreadable": 1, "not_media": 1, "empty": 1}
    catalog = Catalog(tmp_path / "catalog")
    assert not list(problems(catalog)) and funnel(catalog).videos_quarantined == 3
    rows = {Path(row["uri"]).stem: row for row in catalog.clips().collect().to_dicts()}
    assert [rows[n]["num_frames"] for n in "abc"] == [20, 21, 22] and math.isclose(rows["a"]["fps"], 25)
    assert (rows["a"]["aesthetic"], rows["a"]["motion"], rows["a"]["license"]) == (
        5.5,
        None,
        "MIT",
    )  # their motion is not ours
    assert json.loads(rows["a"]["extra"]) == {"flow": "1.25", "motion": "9"} and rows["c"]["extra"] is None
    assert json.loads(rows["b"]["extra"]) == {"stated": {"num_frames": "999"}}
    assert len(catalog.scan("videos").filter(video_id=rows["a"]["video_id"]).collect()["uris"][0]) == 2
    told = catalog.captions().join(catalog.clips().select("clip_id", "uri"), on="clip_id")
    texts = dict(told.select("uri", "text").collect().iter_rows())
    assert texts == {str(tiny / "a.mp4"): "first", str(tiny / "b.mp4"): 'with, comma "and" quotes\nin two lines'}
    assert set(catalog.captions().collect()["model"]) == {"imported"}


def test_done_again_nothing_is_doubled_and_captions_follow(tiny, tmp_path):
    (tmp_path / "meta.csv").write_text("path,text\nin/a.mp4,one\nin/b.mp4,two\nin/none.mp4,three\n")
    import_dataset(str(tmp_path / "meta.csv"), str(tmp_path / "c"))
    catalog = Catalog(tmp_path / "c")
    before = {name: catalog.table(name).version() for name in ("videos", "clips", "captions")}
    again = import_dataset(str(tmp_path / "meta.csv"), str(tmp_path / "c"))
    assert (again.entered, again.in_catalog, again.quarantined, again.captions) == (0, 2, 1, 0)
    assert before == {name: catalog.table(name).version() for name in before}
    shutil.move(tiny / "c.mp4", tiny / "none.mp4")
    (tmp_path / "meta.csv").write_text("path,text\nin/a.mp4,other\nin/b.mp4,two\nin/none.mp4,three\n")
    third = import_dataset(str(tmp_path / "meta.csv"), str(tmp_path / "c"))
    assert (third.entered, third.in_catalog, third.quarantined, third.captions) == (1, 2, 0, 2)
    assert sorted(catalog.captions().collect()["text"]) == ["other", "three", "two"]
    assert catalog.scan("videos").collect()["status"].to_list() == ["ok"] * 3 and not list(problems(catalog))


def test_what_was_forgotten_does_not_come_back(tiny, tmp_path):
    catalog = tiny_videos.imported(tiny, tmp_path / "catalog")
    clips = catalog.clips().sort("uri").select("video_id", "stream", "start_pts", "end_pts").collect()
    export(catalog.root, str(tmp_path / "x.parquet"), "parquet", None)
    own = Catalog.create(tmp_path / "own")
    own.append(
        "forgotten",
        [{"video_id": clips["video_id"][0]}, {**clips.row(1, named=True), "end_pts": clips["start_pts"][1] + 1}],
    )
    done = import_dataset(str(tmp_path / "table.csv"), own.root)
    assert (done.rows, done.forgotten, done.entered) == (3, 2, 1) and not list(problems(own))
    again = Catalog.create(tmp_path / "again")
    again.append(
        "forgotten",
        [{"video_id": clips["video_id"][0]}, {**clips.row(1, named=True), "end_pts": clips["start_pts"][1] + 1}],
    )
    restored = import_dataset(str(tmp_path / "x.parquet"), again.root)
    assert (restored.rows, restored.forgotten, restored.entered) == (3, 2, 1) and not list(problems(again))


def test_malformed_tables_are_told_before_anything_is_written(tmp_path):
    cases = {
        "few.csv": ("path,text\na.mp4,x\nb.mp4\n", "few.csv, line 3: 1 fields, the header has 2"),
        "quote.csv": ('path,text\na.mp4,"x\n', "quote.csv, line 2: "),
        "bytes.csv": (b"path\n\xff\xfe\n", "bytes.csv, line"),
        "nopath.csv": ("text\nx\n", "no column with paths"),
        "blank.csv": ("path,text\n,x\n", "blank.csv, line 2: the column path is empty"),
        "x.jsonl": ('{"path": "a.mp4"}\n{"path"\n', "x.jsonl, line 2: no JSON"),
        "x.parquet": (b"PAR1 nothing", "cannot read .*x.parquet"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ConfigError, match=message):
            import_dataset(str(tmp_path / name), str(tmp_path / "c"))
    span = {
        "video_id": "ab" * 16,
        "stream": 0,
        "start_pts": 5,
        "end_pts": 5,
        "time_base": "1/25",
        "uri": "/a.mp4",
        "start_frame": 0,
        "end_frame": 1,
        "num_frames": 1,
        "fps": None,
    }
    (tmp_path / "x.jsonl").write_text(json.dumps(span) + "\n")
    with pytest.raises(ConfigError, match="row 1: an empty span"):
        import_dataset(str(tmp_path / "x.jsonl"), str(tmp_path / "c"))
    with pytest.raises(ConfigError, match="no such file or folder"):
        import_dataset(str(tmp_path / "nowhere"), str(tmp_path / "c"))
    assert not (tmp_path / "c").exists()


def test_only_paths_and_a_media_root_and_a_limit(tiny, tmp_path):
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "p.csv").write_text("path\na.mp4\nb.mp4\nc.mp4\n")
    done = import_dataset(str(tmp_path / "lists" / "p.csv"), str(tmp_path / "c"), media_root=str(tiny), limit=2)
    assert (done.rows, done.entered) == (2, 2)
    pl.DataFrame({"path": [str(tiny / "c.mp4")], "text": ["x"]}).write_parquet(tmp_path / "p.parquet")
    assert import_dataset(str(tmp_path / "p.parquet"), str(tmp_path / "c")).entered == 1


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def test_shards_of_others(tiny, tmp_path):
    """Members that lead out are not written, broken shards are quarantined, samples need no text."""
    folder = tmp_path / "shards"
    folder.mkdir()
    with tarfile.open(folder / "s-0.tar", "w") as tar:
        add(tar, "x/one.mp4", (tiny / "a.mp4").read_bytes())
        add(tar, "x/one.txt", b"a caption")
        add(tar, "x/one.json", json.dumps({"aes": 5.25, "clip_score": 0.3}).encode())
        add(tar, "../../out.mp4", (tiny / "b.mp4").read_bytes())
        add(tar, "/abs.mp4", (tiny / "b.mp4").read_bytes())
        link = tarfile.TarInfo("link.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        add(tar, "two.mp4", (tiny / "c.mp4").read_bytes())
    whole = (folder / "s-0.tar").read_bytes()
    (folder / "s-1.tar").write_bytes(whole[: len(whole) // 2 + 100])
    done = import_dataset(str(folder / "s-{0..1}.tar"), str(tmp_path / "c"))
    files = sorted(str(path.relative_to(tmp_path)) for path in (tmp_path / "c-media").rglob("*") if path.is_file())
    assert files == ["c-media/s-0/two.mp4", "c-media/s-0/x/one.mp4", "c-media/s-1/x/one.mp4"]
    assert not list(tmp_path.rglob("out.mp4")) + list(tmp_path.rglob("abs.mp4"))
    assert (
        done.entered == 2 and done.kinds["unreadable"] >= 3 and done.kinds["truncated"] == 1 and done.same_content == 1
    )
    catalog = Catalog(tmp_path / "c")
    one = catalog.clips().filter(pl.col("uri").str.ends_with("one.mp4")).collect().row(0, named=True)
    assert one["aesthetic"] == 5.25 and json.loads(one["extra"]) == {
        "clip_score": 0.3,
        "key": "x/one",
        "shard": "s-0.tar",
    }
    assert catalog.captions().collect()["text"].to_list() == ["a caption"] and not list(problems(catalog))
    again = import_dataset(str(folder), str(tmp_path / "c"))
    assert (again.entered, again.in_catalog) == (0, 2)
    with pytest.raises(ConfigError, match="lies in a table of the catalog"):
        import_dataset(str(folder), str(tmp_path / "c"), extract_to=str(tmp_path / "c" / "clips" / "x"))
    assert braces("a-{08..10}-{x,y}.tar")[:3] == ["a-08-x.tar", "a-08-y.tar", "a-09-x.tar"]


def test_folders_of_hugging_face(tiny, tmp_path):
    (tmp_path / "hf" / "train").mkdir(parents=True)
    shutil.copy(tiny / "a.mp4", tmp_path / "hf" / "train")
    shutil.copy(tiny / "b.mp4", tmp_path / "hf" / "train")
    bare = import_dataset(str(tmp_path / "hf"), str(tmp_path / "bare"))
    assert (bare.form, bare.entered) == ("huggingface", 2)
    assert [json.loads(e) for e in Catalog(tmp_path / "bare").clips().collect()["extra"]] == [{"folder": "train"}] * 2
    (tmp_path / "hf" / "train" / "metadata.jsonl").write_text(
        '{"file_name": "a.mp4", "caption": "hello", "tags": ["x", 1]}\n'
    )
    told = import_dataset(str(tmp_path / "hf"), str(tmp_path / "told"))
    row = Catalog(tmp_path / "told").clips().collect().row(0, named=True)
    assert (told.entered, told.captions, json.loads(row["extra"])) == (1, 1, {"tags": ["x", 1]})


def test_imported_clips_are_scored_and_decided_like_others(tiny, tmp_path, ray_address):
    catalog = tiny_videos.imported(tiny, tmp_path / "catalog")
    counts = score(catalog.root, FAST, ["motion", "quality"], ray=ray_address)
    assert counts["clips"] == 3 and counts["clips_with_errors"] == 0
    rows = catalog.clips().collect()
    assert rows["motion"].null_count() == rows["brightness"].null_count() == 0
    counted = decide_and_record(catalog, load_recipe("technical"))
    assert counted.kept + counted.rejected == 3
    runs = catalog.scan("runs").sort("started_at").collect()
    assert runs["pipeline"].to_list() == ["import", "score", "decide"] and set(runs["status"]) == {"finished"}
    assert set(catalog.finished_clips().collect().columns) == {c.name for c in schema.CLIPS}
