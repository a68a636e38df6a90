"""The table of video formats, and a new row of it: everything that a format needs is there."""

from functools import partial

import numpy as np
import pytest

from datakit.config import load
from datakit.errors import ConfigError
from datakit.video.reader import VideoReader
from datakit.video.writer import Encoding
from sampler import video_files
from sampler.settings import SampleSettings
from sampler.video_files import FORMATS, VideoFormat, is_played, write


def moving(frames: int = 6) -> np.ndarray:
    picture = np.zeros((32, 48, 3), np.uint8)
    picture[8:24, 8:16] = 200
    return np.stack([np.roll(picture, 4 * t, 1) for t in range(frames)])


def test_a_new_format_is_a_new_row(tmp_path, monkeypatch):
    vp9 = Encoding("libvpx-vp9", False, {}, {"deadline": "realtime"}, True)
    row = VideoFormat(".webm", partial(video_files._video, encoding=vp9), 0.2, catalogued=True, played=True)
    monkeypatch.setitem(FORMATS, "webm", row)
    settings = load(SampleSettings, None, ["output.format=webm"])
    path = write(moving(), tmp_path / "one", 12.0, settings.output.format, settings.output.crf)
    assert path == tmp_path / "one.webm" and is_played(path)
    with VideoReader(str(path)) as reader:
        assert len(list(reader.frames())) == 6 and reader.stream.codec_context.codec.canonical_name == "vp9"
    with pytest.raises(
        ConfigError, match="output.format: Input should be 'mp4', 'lossless', 'gif', 'frames' or 'webm'"
    ):
        load(SampleSettings, None, ["output.format=avi"])


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_writes_what_it_says(form, tmp_path):
    path = write(moving(), tmp_path / "a", 12.0, form)
    size = sum(f.stat().st_size for f in path.iterdir()) if path.is_dir() else path.stat().st_size
    assert path.name == "a" + FORMATS[form].suffix and size > 0
    assert is_played(path) == (form == "mp4") and not list(tmp_path.glob(".*"))
    again = write(moving(3), tmp_path / "a", 12.0, form)
    assert again == path, "another takes its place"


def test_what_browsers_play():
    assert is_played("A.MP4") and not is_played("a.mkv") and not is_played("a")
