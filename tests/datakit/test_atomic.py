"""Files and folders are whole or not at all: what a failed, a killed and a second writer leave."""

import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from datakit.atomic import atomic_folder, atomic_path, beside, put, remove, sweep

WRITERS = 8


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_takes_its_name_when_it_is_whole(tmp_path, durable):
    target = tmp_path / "a.json"
    target.write_text("old")
    with atomic_path(target, durable) as path:
        assert (path.parent, path.suffix, path.name[0]) == (tmp_path, ".json", ".")
        path.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new" and names(tmp_path) == ["a.json"]


def test_a_failure_leaves_the_old_file(tmp_path):
    target = tmp_path / "a.json"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_path(target) as path:
        path.write_text("half")
        1 / 0
    assert target.read_text() == "old" and names(tmp_path) == ["a.json"]


def test_a_block_may_keep_what_is_there(tmp_path):
    target = tmp_path / "a"
    target.write_text("old")
    with atomic_path(target) as path:
        path.unlink()
    assert target.read_text() == "old" and names(tmp_path) == ["a"]


def test_everybody_may_read_what_was_written(tmp_path):
    """As with any file that is made by `open`, even if the writer makes it its owner's alone."""
    before = os.umask(0o022)
    try:
        with atomic_path(tmp_path / "a") as path:
            path.unlink()
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
        with atomic_folder(tmp_path / "b"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o755


def test_a_long_name_and_a_missing_folder(tmp_path):
    target = tmp_path / ("ü" * 120 + ".mp4")
    with atomic_path(target) as path:
        path.write_text("new")
    assert target.read_text() == "new"
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "no" / "a"):
        pytest.fail("there is no folder to write to")


def test_a_killed_writer_leaves_the_old_file_and_is_swept(tmp_path):
    target = tmp_path / "a.json"
    target.write_text("old")
    script = (
        "import os, sys, signal\nfrom datakit.atomic import atomic_path, atomic_folder\n"
        "with atomic_path(sys.argv[1]) as path, atomic_folder(sys.argv[1]) as folder:\n"
        "    path.write_text('half')\n    (folder / 'x').write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(target)]).returncode == -signal.SIGKILL
    assert target.read_text() == "old" and len(names(tmp_path)) == 3
    mine, other = beside(target), beside(tmp_path / "b.json")
    mine.touch(), other.touch()
    sweep(target)
    assert names(tmp_path) == sorted(["a.json", mine.name, other.name]), "living writers and other targets stay"
    assert target.read_text() == "old"


def test_writers_at_once_do_not_meet(tmp_path):
    """Each sees its own file until the end; the target is always one of theirs, whole."""
    targets, size = (tmp_path / "file", tmp_path / "folder"), 200_000
    start, failures = threading.Barrier(WRITERS), []

    def write(number: int) -> None:
        try:
            start.wait()
            for _ in range(10):
                with atomic_path(targets[0]) as path, atomic_folder(targets[1]) as folder:
                    for made in (path, folder / "x"):
                        made.write_bytes(bytes([number]) * size)
                    assert path.read_bytes() == bytes([number]) * size
                content = targets[0].read_bytes()
                assert len(content) == size and len(set(content)) == 1
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(WRITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert names(tmp_path) == ["file", "folder"] and names(targets[1]) == ["x"]
    assert len((targets[1] / "x").read_bytes()) == size


def test_a_folder_replaces_what_has_its_name(tmp_path):
    target = tmp_path / "out"
    for content in ("first", "second"):
        with atomic_folder(target) as folder:
            (folder / content).touch()
            assert not (target / content).exists()
        assert names(target) == [content]
    with pytest.raises(ZeroDivisionError), atomic_folder(target) as folder:
        (folder / "third").touch()
        1 / 0
    assert names(target) == ["second"] and names(tmp_path) == ["out"]


def test_put_and_remove_take_files_folders_and_links(tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "x").touch()
    target = tmp_path / "target"
    for before in ("nothing", "file", "folder", "link"):
        for after in ("file", "folder"):
            source = tmp_path / "source"
            source.write_text("new") if after == "file" else source.mkdir()
            if before == "file":
                target.write_text("old")
            elif before == "folder":
                target.mkdir()
                (target / "old").touch()
            elif before == "link":
                target.symlink_to(kept)
            put(source, target)
            assert target.is_file() == (after == "file") and not target.is_symlink()
            assert names(tmp_path) == ["kept", "target"] and names(kept) == ["x"]
            remove(target)
            remove(target)
            assert names(tmp_path) == ["kept"]
