"""A missing or torn file is named, with the snapshot to go back to; and going back works."""

import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import polars as pl
import pytest
from deltalake import DeltaTable

from catalogs.maintenance.validate import problems
from catalogs.query.funnel import funnel
from catalogs.query.selection import Selection
from catalogs.query.snapshots import resolve, restore
from catalogs.query.sql import query
from catalogs.tables.catalog import Catalog
from catalogs.tables.integrity import damaged, newest_whole, set_aside
from catalogs.tables.object_store import Storage
from datakit.errors import CatalogError
from support.catalog_rows import clip, video

IDS = [f"{n:x}" * 32 for n in range(4)]


@pytest.fixture
def catalog(tmp_path) -> Catalog:
    """Four videos of a clip each, in a commit each to clips and videos; decided after each."""
    catalog = Catalog.create(tmp_path / "catalog")
    for n, v in enumerate(IDS):
        catalog.append("clips", [clip(v, motion=float(n))])
        catalog.append("videos", [video(v)])
        catalog.replace("decisions", pl.DataFrame([decision(w) for w in IDS[: n + 1]]))
    return catalog


def decision(video_id: str) -> dict:
    return {
        "clip_id": clip(video_id)["clip_id"],
        "shard": video_id[0],
        "status": "kept",
        "reasons": [],
        "recipe": "hand",
        "level": 1,
    }


def file_of(catalog: Catalog, table: str, version: int) -> Path:
    """The data file that a version brought."""
    added = set(DeltaTable(f"{catalog.root}/{table}", version=version).file_uris())
    added -= set(DeltaTable(f"{catalog.root}/{table}", version=version - 1).file_uris())
    return Path(added.pop())


def entry(catalog: Catalog, table: str, version: int) -> Path:
    return Path(catalog.root, table, "_delta_log", f"{version:020d}.json")


def tear(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def scribble(path: Path) -> None:
    """As long as before, and no footer that can be read."""
    path.write_bytes(path.read_bytes()[:-400] + bytes(392) + path.read_bytes()[-8:])


def datakit(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "datakit", *arguments], capture_output=True, text=True)


@pytest.mark.parametrize(
    "harm,word", [(Path.unlink, "missing"), (tear, "torn"), (empty, "torn"), (scribble, "damaged")]
)
def test_a_broken_file_is_named_with_the_way_back(catalog, harm, word):
    path = file_of(catalog, "decisions", 4)
    harm(path)
    told = (
        rf"decisions/{re.escape(path.name)} is {word}.* decisions=3; `datakit catalog restore "
        rf"{re.escape(catalog.root)} decisions=3`"
    )
    for read in (
        funnel,
        lambda c: query(c, "SELECT status FROM clips"),
        lambda c: Selection(c).read(),
        lambda c: restore(c, "decisions=4"),
    ):
        with pytest.raises(CatalogError, match=told):
            read(catalog)
    lines = list(problems(catalog))
    assert lines[0].startswith(f"decisions/{path.name} is {word}") and "restore" in lines[1] and len(lines) == 2
    assert [d.table for d in damaged(catalog, catalog.versions())] == ["decisions"]
    past = catalog.at(resolve(catalog, "decisions=3"))
    assert funnel(past).clips == 4 and funnel(past).pending == 1  # meanwhile
    restore(catalog, "decisions=3")
    assert funnel(catalog).kept == 3 and list(problems(catalog, sources=False)) == []


def test_clips_and_videos_go_back_to_one_moment(catalog):
    file_of(catalog, "clips", 3).unlink()
    with pytest.raises(CatalogError, match="clips=2,videos=2; "):
        funnel(catalog)
    restore(catalog, "clips=2,videos=2")
    assert (funnel(catalog).clips, funnel(catalog).videos) == (2, 2)


def test_a_broken_video_table_takes_the_clips_along_only_as_far_as_needed(catalog):
    tear(file_of(catalog, "videos", 4))
    assert newest_whole(Storage(catalog.root), {"videos"}) == {"clips": 4, "videos": 3} or newest_whole(
        Storage(catalog.root), {"videos"}
    ) == {"videos": 3}
    restore(catalog, "videos=3")
    assert (funnel(catalog).clips, funnel(catalog).videos) == (3, 3)


def test_without_a_whole_version_the_sources_remain(catalog):
    file_of(catalog, "clips", 1).unlink()
    with pytest.raises(CatalogError, match=r"is missing: the newest snapshot .* clips=0,videos=0;"):
        funnel(catalog)
    entry(catalog, "clips", 0).unlink()
    with pytest.raises(
        CatalogError,
        match="_delta_log/0{20}.json is missing: no older version is whole; the sources can be ingested again",
    ):
        funnel(catalog)


def test_other_errors_stay_as_they_are(catalog):
    with pytest.raises(ZeroDivisionError), catalog.reading():
        1 / 0
    with pytest.raises(pl.exceptions.ComputeError), catalog.reading():
        _raise(pl.exceptions.ComputeError("x"))


def _raise(error):
    raise error


@pytest.mark.parametrize(
    "harm,word,table,back",
    [
        (tear, "torn", "decisions", "decisions=3"),
        (empty, "empty", "decisions", "decisions=3"),
        (tear, "torn", "clips", "clips=3,videos=3"),
        (empty, "empty", "clips", "clips=3,videos=2"),  # when it was written cannot be known
        (tear, "torn", "videos", "videos=3"),
        (empty, "empty", "videos", "clips=3,videos=3"),
    ],
)
def test_a_broken_newest_log_entry(catalog, harm, word, table, back):
    harm(entry(catalog, table, 4))
    with pytest.raises(
        CatalogError,
        match=rf"{table}/_delta_log/0+4.json is {word}: .*restore {re.escape(catalog.root)} {back}` goes back",
    ) as told:
        funnel(Catalog(catalog.root))
    assert ("--snapshot" in str(told.value)) == (table != "videos")
    clips = {"decisions=3": 4, "clips=3,videos=2": 2}.get(back, 3)
    if table != "videos":
        assert funnel(catalog.at(resolve(catalog, back))).clips == clips
    done = datakit("catalog", "restore", catalog.root, back)
    assert done.returncode == 0 and f"given up: {table}/_delta_log/{4:020d}.json" in done.stderr
    assert (
        entry(catalog, table, 4).with_suffix(".json.torn").exists()
        and Catalog(catalog.root).table(table).version() >= 4
    )
    assert list(problems(Catalog(catalog.root), sources=False)) == []
    counted = funnel(Catalog(catalog.root))
    assert (counted.clips, counted.kept) == (clips, min(clips, 3))


@pytest.mark.parametrize("harm,word", [(tear, "torn"), (empty, "empty"), (Path.unlink, "missing")])
def test_a_broken_log_entry_in_the_middle(catalog, harm, word):
    harm(entry(catalog, "decisions", 2))
    with pytest.raises(CatalogError, match=rf"decisions/_delta_log/0+2.json is {word}: .* decisions=1;"):
        funnel(catalog)
    assert len(set_aside(catalog.root)) == 3 and set_aside(catalog.root) == []
    assert restore(catalog, "decisions=1").tables == {} and catalog.table("decisions").version() == 4
    assert funnel(catalog).kept == 1 and list(problems(catalog, sources=False)) == []


def test_giving_up_entries_can_be_interrupted_anywhere(catalog, monkeypatch):
    tear(entry(catalog, "decisions", 2))
    for kill_after in range(3):
        with killed_after(kill_after, monkeypatch):
            set_aside(catalog.root)
    set_aside(catalog.root)
    assert funnel(catalog).kept == 1 and catalog.table("decisions").version() == 4


@contextmanager
def killed_after(changes: int, monkeypatch):
    """Dies before the next change to a file, after so many."""
    left = [changes]
    for name in ("move", "replace", "delete"):

        def change(self, *arguments, original=getattr(Storage, name)):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return original(self, *arguments)

        monkeypatch.setattr(Storage, name, change)
    with pytest.raises(KeyboardInterrupt):
        yield
    monkeypatch.undo()


def test_lost_newest_entries_are_found_by_what_was_recorded(catalog):
    from catalogs.query.snapshots import tag

    tag(catalog, "good")
    entry(catalog, "decisions", 4).unlink()
    assert any("decisions had version 4 once, its newest is 3" in line for line in problems(catalog, sources=False))


def test_tables_about_the_catalog_say_what_to_do(catalog):
    from catalogs.query.snapshots import tag

    tag(catalog, "good")
    tear(file_of(catalog, "tags", 1))
    with pytest.raises(CatalogError, match="move .*/tags to another place"):
        funnel(catalog)
    os.rename(f"{catalog.root}/tags", f"{catalog.root}-tags")
    with pytest.raises(CatalogError, match="no table tags any more"):
        funnel(catalog)
    assert funnel(Catalog.create(catalog.root)).clips == 4


def test_a_version_that_is_not_there(catalog):
    with pytest.raises(CatalogError, match="clips has no version 99: the newest is 4"):
        Selection(catalog, "clips=99")


@pytest.mark.parametrize("command", [["funnel"], ["show"], ["query", "SELECT * FROM clips"], ["select"], ["validate"]])
def test_commands_end_in_one_line(catalog, command):
    tear(file_of(catalog, "clips", 4))
    done = datakit("catalog", command[0], catalog.root, *command[1:])
    told = done.stdout if command == ["validate"] else done.stderr
    assert "is torn" in told and "restore" in told and "Traceback" not in done.stderr and "panicked" not in done.stderr
    assert (done.returncode, len(done.stderr.splitlines())) == ((1, 0) if command == ["validate"] else (2, 1))


def test_deciding_on_a_damaged_catalog_changes_nothing(catalog):
    file_of(catalog, "clips", 4).unlink()
    done = datakit("run", "decide", "--catalog", catalog.root)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "clips=3,videos=3" in done.stderr
    assert catalog.table("decisions").version() == 4
