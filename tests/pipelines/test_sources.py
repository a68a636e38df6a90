"""What the user names becomes a stream of sources; what is wrong is said."""

import json

import fsspec
import polars as pl
import pytest

from datakit.errors import ConfigError, ErrorKind
from datakit.source import identify
from pipelines.sources import Listing, check, sources


@pytest.fixture
def tree(tmp_path):
    for name in ("b.mp4", "a.MOV", "sub/c.webm", "sub/pic.jpg", "notes.docx", ".hidden.mp4", "sub/.git/x.mp4"):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path / "tree"


def names(found) -> list[str]:
    return [s.uri.rsplit("/", 1)[1] for s in found]


def test_folders_are_walked_in_order_and_other_files_counted(tree):
    listing = Listing()
    assert names(sources([str(tree)], listing)) == ["a.MOV", "b.mp4", "c.webm", "pic.jpg"]
    assert (listing.found, listing.ignored) == (4, 2)


def test_files_globs_and_file_urls(tree):
    assert names(sources([str(tree / "notes.docx")])) == ["notes.docx"]  # named outright: taken
    assert names(sources([str(tree / "*.mp4")])) == ["b.mp4"]
    assert names(sources([str(tree / "**" / "*.webm")])) == ["c.webm"]
    assert names(sources([f"file://{tree}/b.mp4"])) == ["b.mp4"]


def test_listing_streams(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.mp4").write_bytes(b"x")
    stream = sources([str(tmp_path)])
    next(stream)
    (tmp_path / "1.mp4").unlink()
    assert names(stream) == ["1.mp4", "2.mp4"]  # gone meanwhile: reported, not lost


def test_lists_carry_their_columns_through(tree, tmp_path):
    rows = [
        {"path": "b.mp4", "licence": "CC0", "text": "a bear", "score": 3},
        {"path": str(tree / "a.MOV"), "licence": "", "text": None, "score": 4},
    ]
    (tree / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pl.DataFrame(rows).write_csv(tree / "list.csv")
    pl.DataFrame(rows).write_parquet(tree / "list.parquet")
    (tree / "list.txt").write_text("b.mp4\n\n" + str(tree / "a.MOV") + "\n")
    for name in ("list.jsonl", "list.csv", "list.parquet"):
        first, second = sources([str(tree / name)])
        assert first.uri == str(tree / "b.mp4") and first.attributes["license"] == "CC0"
        assert (
            first.attributes["source_caption"] == "a bear"
            and float(json.loads(first.attributes["extra"])["score"]) == 3
        )
        assert "license" not in second.attributes
    assert names(sources([str(tree / "list.txt")])) == ["b.mp4", "a.MOV"]


def test_missing_files_of_a_list_are_problems_of_their_own(tree):
    (tree / "list.txt").write_text("b.mp4\nnowhere.mp4\n")
    good, bad = sources([str(tree / "list.txt")])
    assert good.problem is None and bad.problem.kind == ErrorKind.UNREADABLE


@pytest.mark.parametrize(
    "text, words", [("a,b\n1,2\n", "no path column"), ("path\n\nx\n", None), ("path,b\n,2\n", "empty path")]
)
def test_lists_without_paths_are_errors(tmp_path, text, words):
    (tmp_path / "l.csv").write_text(text)
    if words is None:
        return
    with pytest.raises(ConfigError, match=words):
        list(sources([str(tmp_path / "l.csv")]))


def test_nothing_and_nowhere_are_errors(tmp_path):
    for specs in ([], [str(tmp_path / "nowhere")], [str(tmp_path / "*.mp4")]):
        with pytest.raises(ConfigError):
            check(specs)


def test_identity_is_content(tmp_path):
    big = bytes(range(256)) * 20_000  # 5 MB: sampled, not read whole
    paths = [tmp_path / n for n in ("a.mp4", "copy.mp4", "other.mp4")]
    for path, data in zip(paths, (big, big, big[:-1] + b"!")):
        path.write_bytes(data)
    (a, _), (b, _), (c, _) = (identify(s) for s in sources(map(str, paths)))
    assert a == b != c


def test_empty_and_unreadable_sources(tmp_path):
    (tmp_path / "empty.mp4").write_bytes(b"")
    (source,) = sources([str(tmp_path / "empty.mp4")])
    assert identify(source)[1].kind == ErrorKind.EMPTY
    (tmp_path / "dangling.mp4").symlink_to(tmp_path / "nowhere")
    (source,) = sources([str(tmp_path / "dangling.mp4")])
    assert identify(source)[1].kind == ErrorKind.UNREADABLE


def test_object_stores_through_fsspec():
    fs = fsspec.filesystem("memory")
    for name in ("bucket/x/a.mp4", "bucket/x/b.mkv", "bucket/x/readme.txt2"):
        fs.pipe(name, b"data of " + name.encode())
    found = list(sources(["memory://bucket/x"]))
    assert [s.uri for s in found] == ["memory:///bucket/x/a.mp4", "memory:///bucket/x/b.mkv"]
    assert found[0].size == len(b"data of bucket/x/a.mp4") and identify(found[0])[1] is None
    fs.pipe("bucket/list.txt", b"x/a.mp4\nmemory://bucket/x/b.mkv\n")
    assert [s.uri for s in sources(["memory://bucket/list.txt"])] == [
        "memory://bucket/x/a.mp4",
        "memory://bucket/x/b.mkv",
    ]


@pytest.mark.parametrize(
    "name, content",
    [
        ("l.jsonl", b'{"path": "a"}\n{"path": \n'),
        ("l.jsonl", b'"a.mp4"\n'),
        ("l.csv", b"path\n\xff\xfe\xe9.mp4\n"),
        ("l.parquet", b"not parquet"),
    ],
)
def test_broken_lists_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=name):
        list(sources([str(tmp_path / name)]))


def test_links_that_lead_back_end(tree):
    (tree / "sub" / "again").symlink_to(tree)
    assert names(sources([str(tree)])) == ["a.MOV", "b.mp4", "c.webm", "pic.jpg"]
