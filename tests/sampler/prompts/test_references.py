"""References: the frames that training sees of the same clip, of any file, from either end."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from catalogs.query.selection import Selection
from catalogs.tables.catalog import Catalog
from datakit.errors import ErrorKind, MediaError
from datakit.identity import Span
from datakit.video.cut import cut
from datakit.video.reader import VideoReader
from sampler.prompts.prompt import prompts_of_catalog
from sampler.prompts.references import Reference, check, content_hash, frames_of
from support.clip_rows import TICKS, enter
from support.drawn_videos import encode, moving
from support.plan_folders import bucket, plan_of, window
from trainer.data.sample_reader import SampleReader, Spec, frames_shape
from trainer.planning.build_plan import make_plan
from trainer.planning.mixture import COLUMNS
from trainer.planning.plan import Plan
from trainer.planning.settings import PlanSettings

FRAMES = 60


@pytest.fixture(scope="module")
def film(tmp_path_factory) -> Path:
    """60 frames at 25 frames/s of a moving picture, with B-frames and a key frame every 20."""
    frames = moving(96, 128, 25, FRAMES / 25, lambda t: [[1, 0.1 * t, 0.3 * t], [0, 1, 0.1 * t]])
    options = {"crf": "12", "preset": "veryfast", "g": "20"}
    return encode(tmp_path_factory.mktemp("film") / "film.mp4", frames, 25, pix_fmt="yuv420p", options=options)


@pytest.fixture(scope="module")
def grey(tmp_path_factory) -> Path:
    """140 frames at 25 frames/s, a key frame every 20."""
    return greys(
        tmp_path_factory.mktemp("grey") / "grey.mp4", 140, options={"qp": "0", "preset": "ultrafast", "g": "20"}
    )


def greys(path: Path, count: int, fps: float = 25, **how) -> Path:
    """Frame i is grey 20 + 3 i, after seventy from 20 again."""
    return encode(path, [np.full((48, 64, 3), 20 + 3 * (i % 70), np.uint8) for i in range(count)], fps, **how)


def numbers(frames: np.ndarray) -> list[int]:
    """Which frames they are."""
    return [round((level - 20) / 3) for level in levels(frames)]


def levels(frames: np.ndarray) -> list[float]:
    assert frames.dtype == np.uint8 and frames.ndim == 4 and frames.std(axis=(1, 2, 3)).max() < 2
    return [float(frame.mean()) for frame in frames]


def planned(plan: Plan, row: int) -> np.ndarray:
    """What training reads with `augment: none`, uint8 [frames, height, width, 3]."""
    shape = frames_shape(plan.buckets[plan.windows["bucket"][row].as_py()])
    out = np.zeros(shape, np.uint8)
    found = SampleReader(Spec(str(plan.folder), None, False, False, True, 1 << 20)).read(row, 0, out.reshape(-1))
    assert found.window == row and not found.broken
    return out.transpose(1, 2, 3, 0)


@pytest.fixture(scope="module")
def catalog(film, tmp_path_factory) -> Catalog:
    """Three clips of the film, the second inside black borders, the third with a file of its own; and a picture."""
    root = tmp_path_factory.mktemp("catalog")
    catalog = Catalog.create(root / "catalog")
    box = {"crop_x": 10, "crop_y": 6, "crop_width": 101, "crop_height": 81}
    picture = root / "picture.png"
    Image.fromarray(moving(96, 128, 1, 1, lambda t: [[1, 0, 0], [0, 1, 0]], seed=4)[0]).save(picture)
    with VideoReader(str(film)) as reader:
        (root / "catalog" / "files").mkdir()
        cut(reader, Span(40 * TICKS, 60 * TICKS, reader.time_base), root / "catalog" / "files" / "third.mp4")
    enter(catalog, film, [(0, 20, {}), (21, 40, box), (40, 60, {"path": "files/third.mp4"})])
    enter(catalog, picture, [(0, 1, {})], kind="image")
    return catalog


@pytest.mark.parametrize("fps", [25, 12])
def test_frames_of_a_clip_are_those_that_training_sees(catalog, fps, tmp_path):
    """The first window of every clip begins with it, the last one ends with it."""
    settings = PlanSettings(
        fps=fps, resolutions=["64px"], aspects=["16:9", "1:1"], frames=[1, 5], windows=2, max_crop=0.5
    )
    plan = make_plan(Selection(catalog, where=None, columns=COLUMNS), settings, tmp_path / "plan")
    prompts = {p.source_clip: p for p in prompts_of_catalog(catalog.root, "status = 'kept'", "i2v_head")}
    assert len(prompts) == 4 and {p.motion for p in prompts.values()} == {3}
    seen = 0
    for row, (clip, first) in enumerate(plan.windows.select(["clip_id", "first"]).to_pandas().itertuples(index=False)):
        frames = planned(plan, row)
        reference = prompts[clip].references[0]
        ours = frames_of(reference, *frames.shape[:3], fps, end=first > 0)
        assert np.array_equal(ours, frames), (clip, first)
        assert check(reference, len(frames), fps) == (0 if len(frames) == 1 else 25 / round(25 / fps))
        seen += 1
    assert seen == 7 and len({p.references[0].uri for p in prompts.values()}) == 3, (
        "two windows a clip, one of the picture"
    )


def test_a_variable_rate_is_read_as_the_catalog_has_it(tmp_path):
    """The clip itself is even; training goes by timestamps, as its video is not."""
    film = greys(tmp_path / "v.mkv", 50, 50)
    with VideoReader(str(film)) as reader:
        base = reader.time_base
    end = round(1 / base)
    row = window(0, uri=str(film), time_base=str(base), end_pts=end, stride=0, fps=24.0, frames=9)
    plan = plan_of(tmp_path / "plan", [row], [bucket(1, frames=9, height=16, width=16)])
    reference = Reference(str(film), (0, end), vfr=True)
    ours = frames_of(reference, 9, 16, 16, 24.0)
    assert np.array_equal(ours, planned(plan, 0))
    assert numbers(ours) == [round(50 / 24 * i) for i in range(9)] and check(reference, 9, 24.0) == 24.0
    assert numbers(frames_of(Reference(str(film), (0, end)), 9, 16, 16, 24.0)) == list(range(0, 18, 2)), (
        "every second of an even one"
    )
    assert numbers(frames_of(reference, 9, 16, 16, 24.0, end=True)) == [
        49 - round(50 / 24 * i) for i in reversed(range(9))
    ]


@pytest.mark.parametrize("fps, step", [(25, 1), (24, 1), (12.5, 2), (8, 3), (30, 1)])
def test_either_end_of_a_file_at_a_rate(grey, fps, step):
    assert numbers(frames_of(Reference(str(grey)), 7, 16, 32, fps)) == [step * i for i in range(7)]
    assert numbers(frames_of(Reference(str(grey)), 7, 16, 32, fps, end=True)) == [
        69 - step * i for i in reversed(range(7))
    ]


def test_spans_and_single_frames(grey):
    part = Reference(str(grey), (50 * TICKS, 70 * TICKS))
    assert numbers(frames_of(part, 20, 16, 16, 25)) == list(range(50, 70))
    assert [numbers(frames_of(part, 1, 16, 16, 24, end)) for end in (False, True)] == [[50], [69]]
    whole = Reference(str(grey))
    assert [numbers(frames_of(whole, 1, 16, 16, 24, end)) for end in (False, True)] == [[0], [69]]
    assert numbers(frames_of(whole, 140, 16, 16, 24, True)) == [*range(70), *range(70)]


def test_a_file_that_does_not_begin_at_nought(tmp_path):
    late = greys(tmp_path / "late.ts", 60, container_options={"output_ts_offset": "3600"})
    with VideoReader(str(late)) as reader:
        assert reader.stream.start_time * reader.time_base >= 3600
    assert numbers(frames_of(Reference(str(late)), 3, 16, 16, 25)) == [0, 1, 2]
    assert numbers(frames_of(Reference(str(late)), 3, 16, 16, 25, end=True)) == [57, 58, 59]


class Counting:
    """A container that notes the packets that are taken out of it."""

    def __init__(self, container, packets: list[int]):
        self._container, self._packets = container, packets

    def __getattr__(self, name):
        return getattr(self._container, name)

    def demux(self, *streams):
        for packet in self._container.demux(*streams):
            self._packets.append(packet.pts)
            yield packet


def test_only_the_end_that_is_needed_is_read(grey, monkeypatch):
    """A film is not gone through for its first frame, nor for its last."""
    packets, enter_reader = [], VideoReader.__enter__

    def counted(reader):
        found = enter_reader(reader)
        reader.container = Counting(reader.container, packets)
        return found

    monkeypatch.setattr(VideoReader, "__enter__", counted)
    frames_of(Reference(str(grey)), 1, 16, 16, 25)
    assert 0 < len(packets) < 60, "of 140"
    packets.clear()
    frames_of(Reference(str(grey)), 1, 16, 16, 25, end=True)
    assert 0 < len(packets) < 100, "its head, and from a key frame to its end"


@pytest.mark.parametrize(
    "name, how",
    [
        ("a.png", {}),
        ("a b%d.png", {}),
        ("a.jpg", {"quality": 98}),
        ("a.webp", {"quality": 98}),
        ("lossless.webp", {"lossless": True}),
        ("a.bmp", {}),
    ],
)
@pytest.mark.parametrize("height", [96, 800])
def test_pictures_show_their_colours_in_the_middle(name, how, height, tmp_path):
    """Twice as wide as high, and shown square: the outer quarters go. Untagged 800 lines are no reason to take them for
    BT.709."""
    picture = np.zeros((height, 2 * height, 3), np.uint8)
    picture[:, : height // 2], picture[:, height // 2 : height] = (255, 255, 255), (200, 30, 60)
    picture[:, height : 3 * height // 2], picture[:, 3 * height // 2 :] = (20, 180, 90), (0, 0, 0)
    Image.fromarray(picture).save(tmp_path / name, **how)
    (frame,) = frames_of(Reference(str(tmp_path / name)), 1, 48, 48, 24)
    assert frame.shape == (48, 48, 3)
    assert (
        np.abs(frame[:, 2:20].astype(int) - (200, 30, 60)).max() <= 6
        and np.abs(frame[:, 28:46].astype(int) - (20, 180, 90)).max() <= 6
    )


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "LA", "I;16"])
def test_pictures_of_other_kinds(mode, tmp_path):
    if mode == "I;16":
        Image.fromarray(np.full((32, 32), 100 * 257, np.uint16)).save(tmp_path / "a.png")
    else:
        Image.new("RGB", (32, 32), (100, 100, 100)).convert(mode, palette=Image.Palette.ADAPTIVE).save(
            tmp_path / "a.png"
        )
    assert levels(frames_of(Reference(str(tmp_path / "a.png")), 1, 16, 16, 24)) == pytest.approx([100], abs=1)


def test_a_crop_is_taken_out(tmp_path):
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[16:32, 32:64] = 150
    Image.fromarray(picture).save(tmp_path / "a.png")
    assert levels(frames_of(Reference(str(tmp_path / "a.png"), crop=(32, 16, 32, 16)), 1, 16, 32, 24)) == pytest.approx(
        [150], abs=1
    )


def test_what_cannot_be_shown(grey, tmp_path):
    still = tmp_path / "still.png"
    Image.new("RGB", (32, 32)).save(still)
    (tmp_path / "text.mp4").write_text("this is no video " * 100)
    (tmp_path / "empty.png").write_bytes(b"")
    short = greys(tmp_path / "short.mp4", 30, 50)
    cases = {
        (tmp_path / "nowhere.png", 1): (ErrorKind.UNREADABLE, "nowhere.png"),
        (tmp_path / "text.mp4", 1): (ErrorKind.NOT_MEDIA, "not a media"),
        (still, 33): (ErrorKind.TRUNCATED, "is a picture, 33 frames are needed"),
        (grey, 141): (ErrorKind.TRUNCATED, "has 140 frames, 141 are needed"),
        (short, 20): (ErrorKind.TRUNCATED, "has 30 frames at 50 frames/s, 20 at 25 frames/s take 39"),
    }
    for (path, count), (kind, said) in cases.items():
        for end in (False, True):
            with pytest.raises(MediaError, match=said) as found:
                check(Reference(str(path)), count, 24, end)
            assert found.value.kind == kind
    with pytest.raises(MediaError) as found:
        content_hash(Reference(str(tmp_path / "empty.png")))
    assert found.value.kind == ErrorKind.EMPTY


def test_the_hash_is_of_what_is_shown(grey, film, tmp_path):
    moved = str(shutil.copy(grey, tmp_path / "elsewhere.mp4"))
    same = content_hash(Reference(str(grey)))
    assert content_hash(Reference(moved)) == same and len(same) == 32
    assert content_hash(Reference(f"file://{moved}", vfr=False)) == same, "a fact about it, not a part"
    others = [
        Reference(str(film)),
        Reference(moved, (0, 512)),
        Reference(moved, (0, 1024)),
        Reference(moved, (0, 512), 1),
        Reference(moved, crop=(0, 0, 8, 8)),
        Reference(moved, (0, 512), crop=(0, 0, 8, 8)),
    ]
    assert len({same, *map(content_hash, others)}) == 1 + len(others)
