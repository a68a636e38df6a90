"""Chosen frames: the very ones that reading everything gives, for less; cropped and scaled with colours kept."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import av
import cv2
import fsspec
import numpy as np
import pytest

import datakit.video.container
from datakit.errors import ErrorKind, MediaError
from datakit.identity import Span
from datakit.video import sparse_reader
from datakit.video.frame import Picture
from datakit.video.reader import VideoReader
from datakit.video.sparse_reader import Box, ChosenFrames, Scaler
from support.drawn_videos import encode, moving

FILMS = {
    "closed.mp4": {"options": {"x264-params": "keyint=15:bframes=4"}},
    "open.mp4": {"options": {"x264-params": "open-gop=1:keyint=20:bframes=3:b-pyramid=normal:scenecut=0"}},
    "refresh.mp4": {"options": {"x264-params": "intra-refresh=1:keyint=20:bframes=2"}},  # key frames that are none
    "stream.ts": {"options": {"x264-params": "keyint=15:bframes=3"}},  # seeks past what it is asked for
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "keyint=20:bframes=4:open-gop=1:log-level=none"}},
    "vp9.webm": {
        "codec": "libvpx-vp9",
        "options": {"g": "25", "lag-in-frames": "16", "deadline": "realtime", "cpu-used": "8"},
    },
    "vp8.webm": {
        "codec": "libvpx",
        "options": {"g": "25", "auto-alt-ref": "1", "lag-in-frames": "16"},
    },  # frames never shown
    "packed.avi": {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}},  # packets without a time
}


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    frames = moving(48, 64, 25, 2.4, lambda t: np.array([[1, 0, t * 0.4], [0, 1, 0.2 * t]]))

    def make(name: str) -> Path:
        return (
            folder / name
            if (folder / name).exists()
            else encode(folder / name, frames, 25, pix_fmt="yuv420p", **FILMS[name])
        )

    return make


def content(picture: Picture) -> tuple[int, bytes]:
    return picture.pts, b"".join(plane.tobytes() for plane in picture.planes())


def chosen(
    film: Path, span: Span | None, indices: Sequence[int] | slice, until: int | None = None
) -> list[tuple[int, bytes]]:
    found: dict[int, tuple[int, bytes]] = {}
    with ChosenFrames(str(film)) as reader:
        for place, picture in reader.chosen(span, lambda times: list(range(len(times)))[indices], until):
            found[place] = content(picture)
    return [found[place] for place in range(len(found))]


@pytest.mark.parametrize("name", FILMS)
def test_they_are_those_that_reading_everything_gives(film, name, monkeypatch):
    with VideoReader(str(film(name))) as reader:
        everything, base = [content(picture) for picture in reader.frames()], reader.time_base
    assert len(everything) == 60
    slow = []
    by_decoding = ChosenFrames._by_decoding
    monkeypatch.setattr(ChosenFrames, "_by_decoding", lambda self, *a: slow.append(name) or by_decoding(self, *a))
    rng = random.Random(0)
    for _ in range(8):
        first = rng.randrange(50)
        end = rng.randrange(first + 8, 61)
        span = Span(everything[first][0], everything[end][0] if end < 60 else everything[-1][0] + 1, base)
        part = slice(rng.randrange(4), None, rng.randrange(1, 5))
        assert chosen(film(name), span, part) == everything[first:end][part]
    assert chosen(film(name), None, slice(5, 30, 5)) == everything[5:30:5]
    quick = {"closed.mp4", "open.mp4", "stream.ts", "hevc.mp4", "vp9.webm"}
    assert (len(slow) == 0) if name in quick else (len(slow) > 2)


def test_no_more_is_decoded_than_needed(film, monkeypatch):
    given = []
    decode = sparse_reader._decode
    monkeypatch.setattr(
        sparse_reader,
        "_decode",
        lambda packets, wanted: (given.append(frame.pts) or frame for frame in decode(packets, wanted)),
    )
    path = film("closed.mp4")
    step = 512
    # Key frames every 15: the last one before frame 32 is 30.
    assert [pts // step for pts, _ in chosen(path, None, slice(32, 35))] == [32, 33, 34]
    assert min(given) // step >= 30 and len(given) <= 6
    given.clear()
    assert len(chosen(path, None, slice(0, 60, 6))) == 10
    assert len(given) < 40  # most of the other frames are referred to by none


def test_packets_far_behind_are_not_looked_at(film):
    times: list[int] = []
    with ChosenFrames(str(film("closed.mp4"))) as reader:
        span = Span(0, 60 * 512, reader.time_base)
        list(reader.chosen(span, lambda seen: times.extend(seen) or [0, 1], until=20 * 512))
    assert 20 <= len(times) < 30


def test_damage_is_told_where_it_matters(film, tmp_path):
    """A packet in the middle is overwritten; with the frames that refer to it, its key frame's group is lost."""
    data = bytearray(film("closed.mp4").read_bytes())
    with av.open(str(film("closed.mp4"))) as container:
        packet = next(
            p for p in container.demux(video=0) if p.pts is not None and p.pts >= 33 * 512 and not p.is_keyframe
        )
        data[packet.pos + 8 : packet.pos + packet.size] = b"\xff" * (packet.size - 8)
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(data)
    assert chosen(damaged, None, slice(0, 25)) == chosen(film("closed.mp4"), None, slice(0, 25))
    with pytest.raises(MediaError, match="damaged data") as error:
        chosen(damaged, None, slice(30, 40))
    assert error.value.kind == ErrorKind.DECODE


class Failing:
    """A file of an object store whose connection breaks."""

    def __init__(self, file, limit: int):
        self.file, self.limit = file, limit

    def read(self, size: int = -1) -> bytes:
        if self.file.tell() > self.limit:
            raise ConnectionResetError("connection reset by peer")
        return self.file.read(min(size, 4096))

    def __getattr__(self, name: str):
        return getattr(self.file, name)


@pytest.mark.parametrize("name", ["vp9.webm", "vp8.webm"])
def test_a_connection_that_breaks_is_not_damage(film, name, monkeypatch):
    """Read by packets, and decoded whole."""
    fsspec.filesystem("memory").pipe(f"/{name}", film(name).read_bytes())
    limit = film(name).stat().st_size // 2
    monkeypatch.setattr(datakit.video.container, "open_bytes", lambda uri: Failing(fsspec.open(uri).open(), limit))
    with (
        pytest.raises(MediaError, match="connection reset by peer") as error,
        ChosenFrames(f"memory://{name}") as reader,
    ):
        list(reader.chosen(None, lambda times: list(range(len(times)))))
    assert error.value.kind == ErrorKind.UNREADABLE


COLOURS = {
    "top left": (200, 60, 40),
    "top right": (40, 180, 70),
    "bottom left": (60, 70, 190),
    "bottom right": (190, 190, 40),
}


def quadrants(height: int, width: int) -> np.ndarray:
    picture = np.zeros((height, width, 3), np.uint8)
    for name, colour in COLOURS.items():
        rows = slice(0, height // 2) if "top" in name else slice(height // 2, None)
        picture[rows, : width // 2] = colour if "left" in name else picture[rows, : width // 2]
        picture[rows, width // 2 :] = colour if "right" in name else picture[rows, width // 2 :]
    return picture


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"matrix": "bt601"},
        {"matrix": "bt2020"},
        {"full_range": True},
        {"full_range": True, "pix_fmt": "yuv420p"},
        {"pix_fmt": "yuv444p10le"},
        {"pix_fmt": "yuv420p"},
        {"tagged": False, "matrix": "bt601"},
        {"rotation": 90},
        {"rotation": 180},
        {"rotation": 270},
    ],
)
def test_colours_and_places_survive(tmp_path, how):
    """Of a picture that is red, green, blue and yellow in its corners as displayed; the middle of it, scaled by a
    half."""
    displayed = quadrants(96, 128)
    film = encode(tmp_path / "film.mp4", [np.rot90(displayed, -how.get("rotation", 0) // 90).copy()] * 2, 25, **how)
    out = np.zeros((3, 2, 40, 56), np.uint8)
    with ChosenFrames(str(film)) as reader:
        for _, picture in reader.chosen(None, lambda times: [0]):
            assert (picture.geometry.height, picture.geometry.width) == (96, 128)
            Scaler(Box(8, 8, 112, 80), 40, 56).rgb(picture, out[:, 1])
    assert out[:, 0].max() == 0
    for name, colour in COLOURS.items():
        rows = slice(0, 16) if "top" in name else slice(24, 40)
        columns = slice(0, 24) if "left" in name else slice(32, 56)
        assert np.abs(out[:, 1, rows, columns].astype(int) - np.array(colour)[:, None, None]).max() <= 3, name


def test_a_box_is_cut_where_it_is(tmp_path):
    """A ramp tells columns and lines; far edges of odd pictures stay."""
    ramp = np.zeros((75, 101, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(101)[None] * 2, np.arange(75)[:, None] * 3
    assert cv2.imwrite(str(tmp_path / "ramp.png"), ramp[..., ::-1])

    def seen(box: Box, height: int, width: int) -> np.ndarray:
        out = np.zeros((3, height, width), np.uint8)
        with ChosenFrames(str(tmp_path / "ramp.png")) as reader:
            for _, picture in reader.chosen(None, lambda times: [0]):
                Scaler(box, height, width).rgb(picture, out)
        return out

    assert (seen(Box(0, 0, 101, 75), 75, 101) == ramp.transpose(2, 0, 1)).all()
    assert (seen(Box(20, 10, 40, 30), 30, 40) == ramp[10:40, 20:60].transpose(2, 0, 1)).all()
    assert (seen(Box(61, 45, 40, 30), 30, 40) == ramp[45:, 61:].transpose(2, 0, 1)).all()
    assert (seen(Box(20.4, 9.6, 39.9, 30.3), 30, 40) == ramp[10:40, 20:60].transpose(2, 0, 1)).all()
    half = seen(Box(20, 10, 40, 30), 15, 20)
    assert np.abs(half[0].astype(float) - (np.arange(20) * 4 + 41)[None]).max() <= 2


def test_shrinking_does_not_alias(tmp_path):
    """Lines of one pixel, black and white, become grey; nothing else would."""
    stripes = np.zeros((96, 128, 3), np.uint8)
    stripes[:, ::2] = 255
    film = encode(tmp_path / "film.mp4", [stripes] * 2, 25)
    for width, height in ((64, 48), (48, 36), (30, 24)):
        out = np.zeros((3, height, width), np.uint8)
        with ChosenFrames(str(film)) as reader:
            for _, picture in reader.chosen(None, lambda times: [0]):
                Scaler(Box(0, 0, 128, 96), height, width).rgb(picture, out)
        assert np.abs(out[:, :, 3:-3].astype(int) - 127).max() <= 16, (width, height)
