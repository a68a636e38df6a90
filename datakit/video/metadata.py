"""What decoding a whole video tells of it, as columns of `videos` and `clips`."""

from __future__ import annotations

from fractions import Fraction

from datakit.errors import ErrorKind, MediaError
from datakit.identity import Span, clip_id
from datakit.video.frame import Picture
from datakit.video.probe import VideoInfo
from datakit.video.reader import Damage

SHORTFALL = 0.05
"""A video whose last frame comes this share (and a second) before the header's end is truncated."""
VFR_TOLERANCE = 0.1
"""Frame intervals that differ by more than this share of their mean make a video variable-rate."""


class Rhythm:
    """Counts frames and watches their spacing."""

    def __init__(self) -> None:
        self.count = 0
        self.last = 0
        self.step = 0
        self._first = 0
        self._shortest = None
        self._longest = 0

    def add(self, pts: int) -> None:
        if self.count:
            self.step = pts - self.last
            self._longest = max(self._longest, self.step)
            self._shortest = self.step if self._shortest is None else min(self._shortest, self.step)
        else:
            self._first = pts
        self.last = pts
        self.count += 1

    def rate(self, time_base: Fraction) -> float | None:
        """Average frames per second."""
        return float((self.count - 1) / ((self.last - self._first) * time_base)) if self.count > 1 else None

    def varies(self) -> bool:
        """Whether intervals differ by more than rounding to the time base and `VFR_TOLERANCE` explain."""
        if self.count < 3 or self._shortest is None:
            return False
        mean = (self.last - self._first) / (self.count - 1)
        return self._longest - self._shortest > max(2, VFR_TOLERANCE * mean)


def nominal_step(info: VideoInfo, time_base: Fraction) -> int:
    """PTS units from a frame to the next by the header's rate."""
    return max(1, round(1 / (Fraction(info.fps or 25.0).limit_denominator(1001) * time_base)))


def video_columns(info: VideoInfo, rhythm: Rhythm, first_pts: int, time_base: Fraction) -> dict[str, object]:
    """Technical facts of a video, as columns of `videos`."""
    end = rhythm.last + (rhythm.step or nominal_step(info, time_base))
    duration = float((end - first_pts) * time_base)
    fps = info.fps or (None if info.kind == "image" else rhythm.rate(time_base))
    pixels_per_s = info.width * info.height * (fps or 0)
    return {
        "kind": info.kind,
        "container": info.container,
        "codec": info.codec,
        "profile": info.profile,
        "pix_fmt": info.pix_fmt,
        "bit_depth": info.bit_depth,
        "color_space": info.color_space,
        "color_range": info.color_range,
        "color_transfer": info.color_transfer,
        "color_primaries": info.color_primaries,
        "width": info.width,
        "height": info.height,
        "rotation": info.rotation,
        "fps": fps,
        "vfr": rhythm.varies(),
        "time_base": f"{time_base.numerator}/{time_base.denominator}",
        "start_pts": first_pts,
        "num_frames": rhythm.count,
        "duration_s": duration,
        "bit_rate": info.bit_rate,
        "bits_per_pixel": info.bit_rate / pixels_per_s if info.bit_rate and pixels_per_s else None,
        "has_audio": info.has_audio,
    }


def clip_columns(
    video_id: str, shard: str, info: VideoInfo, span: Span, frames: tuple[int, int], first_pts: int
) -> dict[str, object]:
    """Identity and technical facts of a clip, as columns of `clips`.

    Args:
        frames: index of its first frame, and the index after its last.
        first_pts: of the video's first frame.
    """
    count = frames[1] - frames[0]
    base = span.time_base
    return {
        "clip_id": clip_id(video_id, info.stream, span.start_pts, span.end_pts),
        "video_id": video_id,
        "shard": shard,
        "stream": info.stream,
        "start_pts": span.start_pts,
        "end_pts": span.end_pts,
        "time_base": f"{base.numerator}/{base.denominator}",
        "start_s": float((span.start_pts - first_pts) * base),
        "end_s": float((span.end_pts - first_pts) * base),
        "start_frame": frames[0],
        "end_frame": frames[1],
        "num_frames": count,
        "fps": None if info.kind == "image" else count / span.seconds,
        "width": info.width,
        "height": info.height,
        "aspect_ratio": info.height / info.width,
        "resolution": info.height * info.width,
    }


def check_whole(info: VideoInfo, duration_s: float) -> None:
    """Raises:
    MediaError: `truncated`, when much less could be decoded than the header promises.
    """
    expected = info.expected_s
    if info.kind == "video" and expected and expected - duration_s > SHORTFALL * expected + 1.0:
        raise MediaError(
            ErrorKind.TRUNCATED, f"the header promises {expected:.1f} s of video, {duration_s:.1f} s could be decoded"
        )


def damage_errors(damage: list[Damage], span: Span) -> list[dict[str, str]]:
    """An entry of the `errors` column when a clip lies on damaged data."""
    touching = [d for d in damage if d.touches(span)]
    return (
        [{"stage": "decode", "kind": str(ErrorKind.DECODE), "message": touching[0].message[:500]}] if touching else []
    )


def frame_end(picture: Picture, nominal: int) -> int:
    """Where the last frame of a video ends."""
    return picture.pts + (picture.duration or nominal)
