"""Writing video files: H.264 in MP4, BT.709 limited range and tagged so; or another encoding, such as lossless RGB.
Timestamps are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import av.error
import numpy as np

from datakit.errors import ErrorKind, MediaError
from datakit.video.frame import Picture

_BT709 = 1  # AVColorSpace, AVColorPrimaries and AVColorTransferCharacteristic agree on it
_LIMITED = 1  # AVColorRange


@dataclass(frozen=True)
class Encoding:
    """How pictures become bits.

    Attributes:
        codec: FFmpeg's name of the encoder.
        rgb: R'G'B' is encoded as it is, of every size; else BT.709 4:2:0, of even sides.
        muxer: options of the container.
        encoder: options of the encoder, besides the constant rate factor.
        takes_crf: whether it has such a factor.
    """

    codec: str
    rgb: bool
    muxer: Mapping[str, str]
    encoder: Mapping[str, str]
    takes_crf: bool


H264 = Encoding("libx264", False, {"movflags": "+faststart"}, {"preset": "veryfast"}, True)
FFV1 = Encoding("ffv1", True, {"fflags": "+bitexact"}, {}, False)
"""No colour is lost. Matroska, told to be exact, leaves out the random numbers by which it names files: the same
pictures give the same file."""


class VideoWriter:
    """Encodes pictures to a file; as a context manager, which finishes the file.

    Args:
        path: its suffix is the container's: `.mp4`; `.mkv` of FFV1.
        width, height: in pixels; an odd last column or row is dropped (4:2:0 has none).
        time_base: seconds per unit of the timestamps given to `write`.
        rate: average frames per second, a hint for rate control.
        crf: constant rate factor; of x264, 16 is visually lossless.
    """

    def __init__(
        self,
        path: str | Path,
        width: int,
        height: int,
        time_base: Fraction,
        rate: float,
        crf: int = 16,
        encoding: Encoding = H264,
    ):
        self._container = av.open(str(path), "w", options=dict(encoding.muxer))
        stream = self._container.add_stream(encoding.codec, rate=Fraction(rate).limit_denominator(1001))
        assert isinstance(stream, av.VideoStream), f"{encoding.codec} encodes no pictures"
        stream.width, stream.height = (width, height) if encoding.rgb else (width // 2 * 2, height // 2 * 2)
        stream.pix_fmt = "bgr0" if encoding.rgb else "yuv420p"
        stream.time_base = time_base
        context = stream.codec_context
        context.time_base = time_base
        context.thread_count = 1
        context.options = {**({"crf": str(crf)} if encoding.takes_crf else {}), **encoding.encoder}
        if not encoding.rgb:
            context.colorspace = context.color_primaries = context.color_trc = _BT709
            context.color_range = _LIMITED
        self._stream, self._rgb = stream, encoding.rgb
        self._time_base = time_base

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._container.mux(self._stream.encode(None))
        finally:
            self._container.close()

    def write(self, picture: Picture, pts: int) -> None:
        """Add a decoded picture, oriented for display, at `pts`."""
        frame = picture.frame if _is_bt709(picture) and not self._rgb else None
        if frame is None or (frame.width, frame.height) != (self._stream.width, self._stream.height):
            self.write_rgb(picture.rgb(), pts)
        else:
            self._encode(frame, pts)

    def write_rgb(self, rgb: np.ndarray, pts: int) -> None:
        """Add a full-range R'G'B' picture, uint8 [h, w, 3], at `pts`."""
        rgb = np.ascontiguousarray(rgb[: self._stream.height, : self._stream.width])
        frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
        if self._rgb:
            frame = frame.reformat(format="bgr0")
        else:
            frame = frame.reformat(format="yuv420p", dst_colorspace=_BT709, dst_color_range=_LIMITED)
        self._encode(frame, pts)

    def _encode(self, frame: av.VideoFrame, pts: int) -> None:
        frame.pts, frame.time_base = pts, self._time_base
        frame.pict_type = 0  # the encoder chooses
        try:
            self._container.mux(self._stream.encode(frame))
        except av.error.FFmpegError as e:
            raise MediaError(ErrorKind.ENCODE, f"cannot encode: {e}", "clips") from e


def _is_bt709(picture: Picture) -> bool:
    """Whether the stored codes can be encoded as they are."""
    g = picture.geometry
    plain = picture.frame.format.name == "yuv420p" and g.rotation == 0 and g.width == g.stored_width
    return plain and g.colour.matrix == "bt709" and not g.colour.full_range
