"""Prompts: every form that they come in, what is refused and how it is told, and their references."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from catalogs.interop import export
from catalogs.tables.catalog import Catalog
from datakit.errors import CatalogError, ConfigError
from sampler.prompts.prompt import Prompt, check_references, prompts_of_catalog, read_prompts
from sampler.prompts.references import Reference, frames_of
from support.clip_rows import TICKS, enter
from support.drawn_videos import encode

PIG = 'A plump pig wallows in a muddy pond, its "pink" snout poking out.\nThe camera captures it.'


def texts(*sources: str | Path, **options) -> list[str]:
    return [p.text for p in read_prompts([str(s) for s in sources], **options)]


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_prompts_as_they_are_and_lines_of_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sea").mkdir()
    lines = written(
        tmp_path / "Lines.TXT", "\ufeff# a comment\n raining, sea \n\n  \nein Käfer im März\n#another\nlast"
    )
    assert texts("raining, sea", lines, " sea ", "a/b testing of waves") == [
        "raining, sea",
        "raining, sea",
        "ein Käfer im März",
        "last",
        "sea",
        "a/b testing of waves",
    ]
    first, second = read_prompts(["raining, sea", str(lines)], limit=2)
    assert first == Prompt("raining, sea", where="prompt 'raining, sea'") and second.where == f"{lines} line 2"
    assert texts("x" * 5000) == ["x" * 5000]


def table(folder: Path, kind: str, rows: list[dict]) -> Path:
    path = folder / f"prompts.{kind}"
    if kind == "jsonl":
        return written(path, "\n".join(json.dumps(row) for row in rows) + "\n\n")
    frame = pl.DataFrame(rows, infer_schema_length=None)
    frame.write_csv(path) if kind == "csv" else frame.write_parquet(path)
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_tables_with_open_soras_columns(kind, tmp_path):
    rows = [
        {
            "text": PIG,
            "ref": "a.png;sub/b.png",
            "name": "pig",
            "neg": "blur",
            "motion": 6,
            "seed": 2**63 - 1,
            "aspect_ratio": "2.39:1",
            "num_frames": 33,
        },
        {
            "text": " second ",
            "ref": None,
            "name": "",
            "neg": None,
            "motion": None,
            "seed": None,
            "aspect_ratio": None,
            "num_frames": None,
        },
        {
            "text": "third",
            "ref": "s3://bucket/c.mp4",
            "name": "c d",
            "neg": " ",
            "motion": 0,
            "seed": 0,
            "aspect_ratio": "",
            "num_frames": None,
        },
    ]
    path = table(tmp_path, kind, rows)
    first, second, third = read_prompts([str(path)])
    both = Reference(f"{tmp_path}/a.png"), Reference(f"{tmp_path}/sub/b.png")
    assert first == Prompt(PIG, "pig", both, "blur", 6, 2**63 - 1, "2.39:1", 33, where=first.where)
    place = [
        f"{path} {'row' if kind == 'parquet' else 'line'} {n}" for n in ((2, 4, 5) if kind == "csv" else (1, 2, 3))
    ]
    assert second == Prompt("second", where=place[1]) and [p.where for p in (first, second, third)] == place
    assert third == Prompt("third", "c d", (Reference("s3://bucket/c.mp4"),), None, 0, 0, where=place[2])
    assert texts(path, "and this", limit=1) == [PIG]
    assert len(texts(path, "and this")) == 4


def test_lists_and_whole_numbers_as_tables_have_them(tmp_path):
    rows = [{"text": "a", "ref": ["x.png", "y.png"], "motion": 4.0}, {"text": "b", "ref": [], "motion": None}]
    for kind in ("jsonl", "parquet"):
        first, second = read_prompts([str(table(tmp_path, kind, rows))])
        assert [Path(r.uri).name for r in first.references] == ["x.png", "y.png"] and first.motion == 4
        assert second.references == () and second.motion is None
    (told,) = read_prompts([str(written(tmp_path / "a.csv", "text,motion,seed\nx,4.0,\n"))])
    assert (told.motion, told.seed) == (4, None)


def test_references_start_from_the_file_else_from_here(tmp_path, monkeypatch):
    """Open-Sora's assets/texts/i2v.csv names assets/texts/i2v.png."""
    lists = tmp_path / "assets" / "texts"
    lists.mkdir(parents=True)
    (lists / "i2v.png").touch()
    monkeypatch.chdir(tmp_path)
    csv = written(
        lists / "i2v.csv", "text,ref\npig,assets/texts/i2v.png\npig,i2v.png\npig,nowhere.png\npig,/abs/x.png\n"
    )
    found = [p.references[0].uri for p in read_prompts([os.path.relpath(csv)])]
    assert found == [str(lists / "i2v.png"), str(lists / "i2v.png"), str(lists / "nowhere.png"), "/abs/x.png"]


def test_vbenchs_list(tmp_path):
    rows = [{"prompt_en": f"a {name}", "dimension": ["color"]} for name in ("cat", "dog", "cat")]
    path = written(tmp_path / "VBench_full_info.json", json.dumps(rows))
    assert read_prompts([str(path)]) == [
        Prompt("a cat", where=f"{path} prompt 1"),
        Prompt("a dog", where=f"{path} prompt 2"),
    ]


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.csv", "text,ref\none,a.png\n,b.png\n", "a.csv line 3: no text"),
        ("a.csv", 'text,ref\n"one\ntwo",a.png\nthree\n', "a.csv line 4: 1 fields, the header has 2"),
        ("a.csv", "text\nraining, sea\n", "line 2: 2 fields, the header has 1 (quote texts that have commas)"),
        ("a.csv", "text,prompt\nx,y\n", "no column 'prompt' is known: there are text, ref, name, neg, motion, seed"),
        ("a.csv", "text,text\nx,y\n", "line 1: a column name occurs twice"),
        ("a.csv", "ref\na.png\n", "line 2: no text"),
        ("a.csv", "text\n", "holds no prompts"),
        ("a.csv", "", "holds no prompts"),
        ("a.txt", "# only\n", "holds no prompts"),
        ("a.csv", 'text\n"open', "line 2: unexpected end of data"),
        ("a.csv", "text,motion\nx,much\n", "motion is a whole number from 0 on, not 'much'"),
        ("a.csv", "text,seed\nx,-1\n", "seed is a whole number from 0 on, not '-1'"),
        ("a.csv", "text,seed\nx,9223372036854775808\n", "seed is a whole number"),
        ("a.csv", "text,motion\nx,4.5\n", "motion is a whole number"),
        ("a.csv", "text,name\nx,../up\n", "'../up' cannot be the name of a file"),
        ("a.csv", "text,name\nx,.hidden\n", "cannot be the name"),
        ("a.csv", "text,ref\nx,a.png;;b.png\n", "ref is a path or URL"),
        ("a.jsonl", '{"text": "x"}\n[1]\n', "a.jsonl line 2: a list, not an object"),
        ("a.jsonl", "\n{x}\n", "a.jsonl line 2: no JSON"),
        ("a.jsonl", '{"text": 5}\n', "line 1: the text is no text"),
        ("a.jsonl", '{"text": "x", "motion": true}', "motion is a whole number"),
        ("a.jsonl", '{"text": "x", "seed": 1e999}', "seed is a whole number"),
        ("a.jsonl", '{"text": "x", "ref": [1]}', "ref is a path"),
        ("a.parquet", "nothing of the kind", "cannot read"),
        ("a.json", "[]", "of .json files only VBench's"),
        ("a.md", "# x", "is a file of no known kind"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(name, content, said, tmp_path):
    path = written(tmp_path / name, content)
    with pytest.raises(ConfigError) as found:
        read_prompts(["fine", str(path)])
    assert said in str(found.value) and str(path) in str(found.value) and "\n" not in str(found.value)


def test_what_is_no_prompt(tmp_path):
    for source, said in (
        ("prompts.csv", "there is no file prompts.csv"),
        ("  ", "an empty prompt"),
        (f"{tmp_path}/", "is a folder"),
    ):
        with pytest.raises(ConfigError, match=said):
            read_prompts([source])
    with pytest.raises(ConfigError, match="no prompts"):
        read_prompts([])
    (tmp_path / "latin.txt").write_bytes("Käfer".encode("latin-1"))
    with pytest.raises(ConfigError, match="cannot read .*latin.txt"):
        read_prompts([str(tmp_path / "latin.txt")])


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> Path:
    """long.mp4 of 40 frames at 25 frames/s; fast.mp4 of 80 at 60; a picture; a file that is none of these."""
    folder = tmp_path_factory.mktemp("films")
    for name, count, fps in (("long", 40, 25), ("fast", 80, 60)):
        encode(
            folder / f"{name}.mp4",
            [np.full((96, 128, 3), 20 + 2 * i, np.uint8) for i in range(count)],
            fps,
            pix_fmt="yuv420p",
        )
    Image.new("RGB", (128, 96), (90, 90, 90)).save(folder / "a.png")
    written(folder / "text.png", "this is no picture")
    return folder


@pytest.fixture
def catalog(films, tmp_path) -> Catalog:
    catalog = Catalog.create(tmp_path / "catalog")
    enter(catalog, films / "long.mp4", [(0, 35, {}), (35, 40, {})])
    enter(catalog, films / "a.png", [(0, 1, {})], kind="image")
    enter(catalog, films / "fast.mp4", [(0, 40, {"motion_vmaf": None})], caption=None)
    return catalog


def test_captions_of_clips_with_the_clips(catalog, films, caplog):
    with caplog.at_level(logging.WARNING, "datakit"):
        found = prompts_of_catalog(catalog.root, "status = 'kept'", "t2v")
    assert "1 of 4 clips" in caplog.text and "have no caption and are left out: `datakit run caption`" in caplog.text
    ids = [p.source_clip for p in found]
    assert ids == sorted(ids) and {p.text for p in found} == {"clip 0", "clip 35"} and len(ids) == 3
    assert all(
        p.name == p.source_clip[:12] and p.references == () and p.motion == 3 and p.where == f"clip {p.name}"
        for p in found
    )
    assert [p.source_clip for p in prompts_of_catalog(catalog.root, "status = 'kept'", "t2v", limit=2)] == ids[:2]
    (late,) = prompts_of_catalog(catalog.root, "start_s > 1 AND caption IS NOT NULL", "i2v_loop")
    assert late.references == (Reference(str(films / "long.mp4"), (35 * TICKS, 40 * TICKS), 0, (0, 0, 128, 96), False),)
    caplog.clear()
    (long,) = prompts_of_catalog(catalog.root, "caption IS NOT NULL", "v2v_head")
    assert (
        "2 of 3 clips" in caplog.text and "fewer than 33 frames at 24 frames/s" in caplog.text and long.text == "clip 0"
    )
    check_references([long], "v2v_head")


def test_clips_that_give_nothing(catalog, films):
    for where, mode, said in (
        ("fps = 1", "t2v", "no clip of .* is there"),
        ("caption IS NULL", "t2v", "of 1 clips .* none has a caption"),
        ("caption IS NOT NULL", "v2v_tail_easy", "of 3 clips .* none has 65 frames at 24 frames/s"),
    ):
        with pytest.raises(CatalogError, match=said):
            prompts_of_catalog(catalog.root, where, mode)
    with pytest.raises(ConfigError, match="column"):
        prompts_of_catalog(catalog.root, "nonsense = 1", "t2v")


def test_a_source_that_changed_is_no_reference(tmp_path):
    file = tmp_path / "a.mp4"
    encode(file, [np.zeros((96, 128, 3), np.uint8)] * 5, 25)
    catalog = Catalog.create(tmp_path / "catalog")
    enter(catalog, file, [(0, 5, {})])
    encode(file, [np.full((96, 128, 3), 200, np.uint8)] * 5, 25)
    assert len(prompts_of_catalog(catalog.root, "status = 'kept'", "t2v")) == 1
    with pytest.raises(ConfigError, match="holds other content than when it was ingested"):
        prompts_of_catalog(catalog.root, "status = 'kept'", "i2v_head")
    file.unlink()
    with pytest.raises(ConfigError, match="cannot read"):
        prompts_of_catalog(catalog.root, "status = 'kept'", "i2v_head")


@pytest.mark.parametrize("form", ["open-sora-csv", "open-sora-parquet"])
def test_a_list_of_clips_for_training_gives_its_texts(form, catalog, tmp_path, caplog):
    out = tmp_path / f"meta.{'csv' if form.endswith('csv') else 'parquet'}"
    export(catalog.root, str(out), form, where="caption IS NOT NULL", media="cut")
    with caplog.at_level(logging.WARNING, "datakit"):
        found = read_prompts([str(out)])
    assert sorted(p.text for p in found) == ["clip 0", "clip 0", "clip 35"] and all(
        p.motion is None and not p.references for p in found
    )
    (said,) = [r.getMessage() for r in caplog.records]
    assert "ignored: path, " in said and "motion" in said and "num_frames" in said


def given(*files: Path) -> Prompt:
    return Prompt("a prompt", references=tuple(Reference(str(f)) for f in files), where="a.csv line 3")


def test_references_are_as_many_as_the_mode_takes(films):
    picture, film = films / "a.png", films / "long.mp4"
    for mode, files in {
        "t2v": (),
        "i2v_head": (picture,),
        "i2v_tail": (film,),
        "i2v_loop": (picture, film),
        "v2v_tail": (film,),
    }.items():
        check_references([given(*files)], mode)
    check_references([given(picture)], "i2v_loop")
    for mode, files, said in (
        ("t2v", (picture,), "mode t2v takes no reference.*--mode i2v_head"),
        ("i2v_head", (), "takes one picture, there are none"),
        ("i2v_tail", (picture, picture), "takes one picture, there are 2"),
        ("i2v_loop", (), "a picture, or two .head;tail., there are none"),
        ("i2v_loop", (picture,) * 3, "there are 3"),
        ("v2v_head", (), "takes one video, there are none"),
    ):
        with pytest.raises(ConfigError, match="^a.csv line 3: " + f".*{said}"):
            check_references([given(*files)], mode)


def test_references_are_seen_to_be_readable(films, caplog):
    for mode, file, said in (
        ("i2v_head", "nowhere.png", "nowhere.png: No such file"),
        ("i2v_head", "text.png", "text.png: no frame could be decoded"),
        ("v2v_head", "a.png", "a.png is a picture, 33 frames are needed"),
        ("v2v_tail_easy", "long.mp4", "long.mp4 has 40 frames, 65 are needed"),
    ):
        prompts = [given(films / file), given(films / file)]
        with pytest.raises(ConfigError, match=f"^a.csv line 3: .*{said}") as found:
            check_references(prompts, mode)
        assert "more" not in str(found.value), "each reference is looked at once"
    with pytest.raises(ConfigError, match="and 1 more references"):
        check_references(
            [given(films / "nowhere.png"), given(films / "long.mp4"), given(films / "text.png")], "i2v_head"
        )
    with caplog.at_level(logging.WARNING, "datakit"):
        check_references([given(films / "long.mp4")], "v2v_head", fps=25)
        assert not caplog.records
        check_references([given(films / "fast.mp4"), given(films / "long.mp4")], "v2v_head")
    assert "2 of the references do not come at 24 frames/s" in caplog.text and "fast.mp4 at 30" in caplog.text
    assert frames_of(Reference(str(films / "fast.mp4")), 33, 16, 16, 24.0).shape == (33, 16, 16, 3)
