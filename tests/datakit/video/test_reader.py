"""Sparse reading yields the frames that sequential reading yields, by timestamp and content."""

from fractions import Fraction

import av
import cv2
import numpy as np
import pytest

from datakit.errors import ErrorKind, MediaError
from datakit.identity import Span
from datakit.video.probe import probe
from datakit.video.reader import VideoReader
from support.drawn_videos import encode, texture


def numbered(count: int, height: int = 96, width: int = 128) -> list[np.ndarray]:
    """Frames that carry their index as a binary pattern of eight blocks: exact to read back."""
    frames = []
    for i in range(count):
        frame = texture(height, width, i % 5) // 4 + 60
        for bit in range(10):
            frame[:24, bit * 12 : bit * 12 + 12] = 230 if i >> bit & 1 else 20
        frames.append(frame)
    return frames


def number_of(rgb: np.ndarray) -> int:
    return sum(1 << bit for bit in range(10) if rgb[12, bit * 12 + 6].mean() > 128)


LOSSY = {"crf": "20", "preset": "veryfast", "g": "30", "bf": "3"}
RATES = {
    "23.976": dict(fps=Fraction(24000, 1001), time_base=Fraction(1, 24000)),
    "29.97": dict(fps=Fraction(30000, 1001), time_base=Fraction(1, 30000)),
    "60": dict(fps=60, time_base=Fraction(1, 15360)),
    "offset": dict(fps=25, time_base=Fraction(1, 12800), pts=[7000 + 512 * i for i in range(150)]),
    "vfr": dict(
        fps=25, time_base=Fraction(1, 1000), pts=list(np.cumsum([0] + [20, 40, 33, 110, 25] * 30)[:150].tolist())
    ),
}


@pytest.fixture(params=RATES)
def numbered_video(request, tmp_path):
    return encode(tmp_path / "n.mp4", numbered(150), pix_fmt="yuv420p", options=LOSSY, **RATES[request.param])


def test_frames_come_in_order_with_their_times(numbered_video):
    with VideoReader(str(numbered_video)) as reader:
        pictures = [(p.index, p.pts, number_of(p.rgb())) for p in reader.frames()]
        assert not reader.damage
    assert [n for _, _, n in pictures] == list(range(150))
    assert [i for i, _, _ in pictures] == list(range(150))
    assert all(b > a for (_, a, _), (_, b, _) in zip(pictures, pictures[1:]))


def test_spans_and_targets_find_exactly_their_frames(numbered_video):
    with VideoReader(str(numbered_video)) as reader:
        times = [p.pts for p in reader.frames()]
    for start, end in [(0, 1), (1, 2), (29, 31), (44, 90), (100, 150), (149, 150)]:
        end_pts = times[end] if end < 150 else times[-1] + 1
        with VideoReader(str(numbered_video)) as reader:
            got = [number_of(p.rgb()) for p in reader.span(Span(times[start], end_pts, reader.time_base))]
        assert got == list(range(start, end))
    with VideoReader(str(numbered_video)) as reader:
        wanted = [3, 4, 5, 31, 60, 61, 120, 149]
        got = [number_of(p.rgb()) for _, p in reader.at([times[i] for i in wanted])]
    assert got == wanted


def test_threads_change_nothing(numbered_video):
    def read(threads: int) -> list[tuple[int, bytes]]:
        with VideoReader(str(numbered_video), threads=threads) as reader:
            return [(p.pts, p.full_luma().tobytes()) for p in reader.frames()]

    assert read(1) == read(3)


@pytest.mark.parametrize(
    "name", ["plain.mp4", "with space.mp4", "-dash.mp4", "ünïcödé–名前.mp4", "a:b%03d?.mp4", "100%.mp4"]
)
def test_any_file_name_opens(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    encode(tmp_path / "x.mp4", numbered(5), 25, pix_fmt="yuv420p").rename(tmp_path / name)
    assert probe(name).width == 128


def test_object_stores_are_read_through_fsspec(tmp_path):
    import fsspec

    path = encode(tmp_path / "n.mp4", numbered(40), 25, pix_fmt="yuv420p", options=LOSSY)
    fsspec.filesystem("memory").pipe("/bucket/n.mp4", path.read_bytes())
    with VideoReader("memory:///bucket/n.mp4") as reader:
        times = [p.pts for p in reader.frames()]
    with VideoReader("memory:///bucket/n.mp4") as reader:
        got = [number_of(p.rgb()) for p in reader.span(Span(times[31], times[35], reader.time_base))]
    assert got == [31, 32, 33, 34]


def test_odd_sizes(tmp_path):
    path = encode(tmp_path / "odd.mkv", [texture(61, 83)] * 4, 25, pix_fmt="yuv444p")
    info = probe(str(path))
    assert (info.width, info.height) == (83, 61)
    with VideoReader(str(path)) as reader:
        picture = next(reader.frames())
        assert picture.rgb().shape == (61, 83, 3) and picture.detector_view()[0].shape == (61, 83, 3)


def test_pixel_aspect_is_part_of_the_display_size(tmp_path):
    path = tmp_path / "par.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(texture(64, 96), format="rgb24")))
        container.mux(stream.encode(None))
    info = probe(str(path))
    assert (info.width, info.height) == (192, 64)


@pytest.mark.parametrize(
    "content, name, kind",
    [
        (b"", "empty.mp4", ErrorKind.NOT_MEDIA),
        (b"This is a text file.\n" * 200, "text.mp4", ErrorKind.NOT_MEDIA),
        (np.random.default_rng(0).bytes(20_000), "random.mp4", None),
    ],
)
def test_what_is_no_video_is_named(tmp_path, content, name, kind):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MediaError) as error:
        probe(str(tmp_path / name))
    assert kind in (None, error.value.kind)


def test_audio_alone_is_no_video(tmp_path):
    with av.open(str(tmp_path / "sound.m4a"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(MediaError) as error:
        probe(str(tmp_path / "sound.m4a"))
    assert error.value.kind == ErrorKind.NO_VIDEO and "audio" in error.value.message


def test_missing_file_is_unreadable(tmp_path):
    with pytest.raises(MediaError) as error:
        probe(str(tmp_path / "nowhere.mp4"))
    assert error.value.kind == ErrorKind.UNREADABLE


def test_damage_is_noticed_and_bounded(tmp_path):
    path = encode(tmp_path / "n.mp4", numbered(150), 25, pix_fmt="yuv420p", options=LOSSY)
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + len(data) // 3
    data[start : start + 400] = np.random.default_rng(1).bytes(400)
    path.write_bytes(bytes(data))
    with VideoReader(str(path)) as reader:
        clean = [
            p.pts
            for p in reader.frames()
            if not any(d.touches(Span(p.pts, p.pts + 1, reader.time_base)) for d in reader.damage)
        ]
        assert reader.damage
        assert all(d.end_pts is not None for d in reader.damage[:-1])
    assert 60 <= len(clean) < 150


def test_still_images_are_videos_of_one_frame(tmp_path):
    for suffix in (".png", ".jpg", ".webp", ".bmp", ".tif"):
        path = tmp_path / f"still{suffix}"
        assert cv2.imwrite(str(path), texture(60, 80))
        info = probe(str(path))
        assert (info.kind, info.width, info.height, info.fps) == ("image", 80, 60, None), suffix
        with VideoReader(str(path)) as reader:
            assert len(list(reader.frames())) == 1


def test_the_best_of_several_streams_is_read(tmp_path):
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as container:
        small, large = container.add_stream("libx264", rate=25), container.add_stream("libx264", rate=25)
        for stream, size in ((small, (64, 48)), (large, (320, 240))):
            stream.width, stream.height = size
            stream.pix_fmt = "yuv420p"
        for i in range(10):
            for stream in (small, large):
                frame = av.VideoFrame.from_ndarray(texture(stream.height, stream.width, i), format="rgb24")
                container.mux(stream.encode(frame))
        for stream in (small, large):
            container.mux(stream.encode(None))
    info = probe(str(path))
    assert (info.stream, info.width) == (1, 320)
