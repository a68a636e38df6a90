"""The registry of videos: identity, addresses, the two commits, what another run or a person did meanwhile."""

from pathlib import Path

import pytest

from catalogs.query.funnel import funnel
from catalogs.records.video_registry import Video, VideoRegistry
from catalogs.tables.catalog import Catalog
from datakit.errors import ErrorKind, MediaError
from datakit.identity import clip_id, unreadable_id
from datakit.source import look_at
from support.catalog_rows import clip as clip_row

FAILED = MediaError(ErrorKind.DECODE, "no frame", "decode")


@pytest.fixture
def catalog(tmp_path) -> Catalog:
    return Catalog.create(tmp_path / "catalog")


@pytest.fixture
def files(tmp_path) -> list[str]:
    """Three files, the last of the content of the first."""
    for name, content in (("a", b"one"), ("b", b"two"), ("c", b"one")):
        (tmp_path / name).write_bytes(content)
    return [str(tmp_path / name) for name in "abc"]


def found(registry: VideoRegistry, *paths: str, **attributes) -> list[Video]:
    """Sources as videos, one for each content."""
    sources = [look_at(path) for path in paths]
    videos: dict[str, Video] = {}
    for source, (identity, failure) in zip(sources, registry.identify(sources), strict=True):
        video = videos.setdefault(identity, Video(identity, attributes=dict(attributes), failure=failure))
        video.sources.append(source)
    return list(videos.values())


def finished(video: Video, clips: int = 1) -> Video:
    rows = [clip_row(video.video_id, n * 100, start_frame=n * 100, num_frames=100) for n in range(clips)]
    made = [{name: value for name, value in row.items() if name not in ("run_id", "shard")} for row in rows]
    return Video(video.video_id, columns={"kind": "video", "num_frames": 100}, clips=made)


def videos(catalog: Catalog, *columns: str) -> list:
    rows = catalog.scan("videos").sort("video_id").select(columns).collect().rows()
    return [row[0] for row in rows] if len(columns) == 1 else rows


def uris(catalog: Catalog) -> dict[str, list[str]]:
    return {v: [Path(u["uri"]).name for u in some] for v, some in videos(catalog, "video_id", "uris")}


def test_content_is_the_identity(catalog, files):
    registry = VideoRegistry(catalog, "r")
    registry.register(found(registry, *files[:2]))
    assert sorted(uris(catalog).values()) == [["a"], ["b"]]
    registry.register(found(registry, files[2], license="CC0"))
    assert sorted(uris(catalog).values()) == [["a", "c"], ["b"]]
    assert sorted(videos(catalog, "license"), key=str) == ["CC0", None]
    registry.register(found(registry, files[0], license="another"))  # what is known stays
    assert sorted(videos(catalog, "license"), key=str) == ["CC0", None]
    assert set(videos(catalog, "status")) == {"pending"}


def test_what_is_known_makes_no_commit_and_is_not_read_again(catalog, files, monkeypatch):
    registry = VideoRegistry(catalog, "r")
    registry.register(found(registry, *files))
    version = catalog.table("videos").version()
    monkeypatch.setattr("catalogs.records.video_registry.identify", lambda source: pytest.fail("the etag is known"))
    again = VideoRegistry(catalog, "r2")
    again.register(found(again, *files))
    again.note(found(again, *files))
    assert catalog.table("videos").version() == version


def test_clips_count_with_the_second_commit(catalog, files, monkeypatch):
    """Killed between the two, and done again by another run: the clips of the first are never seen, and swept."""
    first = VideoRegistry(catalog, "killed")
    registered = found(first, *files[:2])
    first.register(registered)
    monkeypatch.setattr(catalog, "upsert", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        first.finish([finished(v, 3) for v in registered])
    monkeypatch.undo()
    assert catalog.scan("clips").collect().height == 6 and catalog.count() == 0
    second = VideoRegistry(catalog, "second")
    assert second.sweep() == 0  # the first may be alive
    assert second.finish([finished(v, 2) for v in registered]) == {v.video_id: 2 for v in registered}
    assert catalog.finished_clips().collect()["run_id"].to_list() == ["second"] * 4 and catalog.count() == 4
    assert first.finish([finished(v, 3) for v in registered]) == {}, "another run was first"
    assert second.sweep() == 12 and catalog.scan("clips").collect().height == 4
    assert funnel(catalog).clips == 4


def test_embeddings_go_with_their_clips(catalog, files):
    registry = VideoRegistry(catalog, "r")
    registered = found(registry, files[0])
    registry.register(registered)
    video = finished(registered[0])
    video.embeddings = [
        {"clip_id": video.clips[0]["clip_id"], "video_id": video.video_id, "run_id": run, "shard": video.video_id[0]}
        for run in ("r", "killed")
    ]
    registry.finish([video])
    assert registry.sweep() == 0
    assert catalog.scan("embeddings").collect()["run_id"].to_list() == ["r"]


def test_failures_are_rows(catalog, files):
    registry = VideoRegistry(catalog, "r")
    registered = found(registry, *files[:2])
    registry.register(registered)
    a, b = registered
    registry.finish([Video(a.video_id, failure=FAILED), finished(b)])
    states = registry.states([a.video_id, b.video_id])
    assert states[a.video_id].status == "quarantined" and states[a.video_id].error_kind == "decode"
    assert states[b.video_id].status == "ok" and not states[b.video_id].is_open
    assert registry.unfinished([a, b]) == []
    registry.reopen([a.video_id])
    assert registry.unfinished([a, b]) == [a] and set(videos(catalog, "error")) == {None}
    registry.finish([Video(a.video_id, failure=MediaError(ErrorKind.CRASH, "killed", "decode"))])
    assert registry.unfinished([a, b]) == [a], "another run may not crash"


def test_changed_content_is_a_problem_or_a_new_video(catalog, files):
    registry = VideoRegistry(catalog, "r")
    registry.register(found(registry, *files))
    one = look_at(files[0])
    Path(files[0]).write_bytes(b"three!")
    careful = VideoRegistry(catalog, "r2", step="scan", advice=": put it back")
    (changed,) = found(careful, files[0])
    assert changed.failure is not None
    assert (changed.failure.kind, changed.failure.stage) == (ErrorKind.SOURCE_CHANGED, "scan")
    assert changed.failure.message.endswith(f"holds {changed.video_id} now: put it back")
    willing = VideoRegistry(catalog, "r3", take_changed=True)
    (changed,) = found(willing, files[0])
    assert changed.failure is None
    willing.register([changed])
    assert sorted(uris(catalog).values()) == [["a"], ["a", "c"], ["b"]]
    willing.move_addresses({one.uri: changed.video_id})
    assert sorted(uris(catalog).values()) == [["a"], ["b"], ["c"]]


def test_a_placeholder_goes_when_its_address_can_be_read(catalog, tmp_path):
    path = str(tmp_path / "late")
    registry = VideoRegistry(catalog, "r")
    registry.register(found(registry, path))
    assert videos(catalog, "video_id", "status") == [(unreadable_id(path), "quarantined")]
    Path(path).write_bytes(b"here now")
    registry = VideoRegistry(catalog, "r2")
    (video,) = found(registry, path)
    assert video.failure is None
    registry.enter([video])
    assert videos(catalog, "video_id", "status") == [(video.video_id, "ok")]


def test_entering_takes_addresses_attributes_and_captions_along(catalog, files):
    ingest, registry = VideoRegistry(catalog, "i", fingerprint="shots"), VideoRegistry(catalog, "r")
    ingest.register(found(ingest, *files[:2]))
    entries = found(registry, files[2], license="CC0")
    made = finished(entries[0])
    clip = made.clips[0]["clip_id"]
    caption = {"text": "one", "style": "dense", "model": "m", "flags": [], "shard": made.video_id[0]}
    entry = Video(made.video_id, entries[0].sources, made.columns, {"license": "CC0"}, made.clips, {clip: caption})
    assert registry.enter([entry]) == {made.video_id: 1}
    assert uris(catalog)[made.video_id] == ["a", "c"]
    assert registry.states([made.video_id])[made.video_id].fingerprint == "imported"
    assert catalog.captions().collect()["text"].to_list() == ["one"] and registry.captions == 1
    another = VideoRegistry(catalog, "another")
    assert another.enter([entry]) == {} and another.captions == 0
    entry.captions[clip] = {**caption, "text": "two"}
    another.note([entry])
    another.note([entry])
    assert catalog.captions().collect()["text"].to_list() == ["two"] and another.captions == 1
    assert another.clips_of([made.video_id]).rows() == [(clip, made.video_id, True)]


def test_what_was_forgotten_does_not_come_back(catalog, files):
    registry = VideoRegistry(catalog, "r")
    a, b = found(registry, *files[:2])
    span = {"video_id": b.video_id, "stream": 0, "start_pts": 50, "end_pts": 60}
    catalog.append("forgotten", [{"video_id": a.video_id}, span])
    entries = [finished(a, 2), finished(b, 2)]
    for entry in entries:
        clips = [row["clip_id"] for row in entry.clips]
        caption = {"text": "t", "style": "s", "model": "m", "flags": [], "shard": entry.video_id[0]}
        entry.captions = dict.fromkeys(clips, caption)
        key = {"video_id": entry.video_id, "run_id": "r", "shard": entry.video_id[0]}
        entry.embeddings = [{"clip_id": clip, **key} for clip in clips]
    assert registry.enter(entries) == {b.video_id: 1}
    left = clip_id(b.video_id, 0, 100, 200)
    assert videos(catalog, "video_id", "clip_count") == [(b.video_id, 1)]
    for table in ("clips", "captions", "embeddings"):
        assert catalog.scan(table).collect()["clip_id"].to_list() == [left], table
