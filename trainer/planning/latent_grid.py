"""The sizes that an autoencoder takes: which numbers of frames, heights and widths have latents, and how many.

A causal autoencoder gives the first frame a latent of its own: videos of 4k + 1 frames, where 4 is its compression in
time; an image is one. Any other takes images, and multiples of 4 frames from 8 on: one latent frame is an image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, floor


@dataclass(frozen=True)
class LatentGrid:
    """Attributes:
    compression: in time, height and width.
    causal: whether the first frame has a latent of its own.
    """

    compression: tuple[int, int, int]
    causal: bool

    @property
    def rule(self) -> str:
        """Which numbers of frames there are, in words."""
        time = self.compression[0]
        return f"{time}k + 1 frames" if self.causal else f"1 frame, or multiples of {time} from {2 * time} on"

    def latent_frames(self, frames: int, rounding: Callable[[float], int] = floor) -> int:
        """Latent frames of a video.

        Args:
            rounding: what becomes of a number of frames that does not fit: `ceil` gives the latent frames that hold
                them all.
        """
        time = self.compression[0]
        if self.causal:
            return rounding((frames - 1) / time) + 1
        return 1 if frames <= 1 else max(2, rounding(frames / time))

    def frames_of(self, latent_frames: int) -> int:
        """Frames that so many latent frames decode to."""
        if self.causal or latent_frames == 1:
            return (latent_frames - 1) * self.compression[0] + 1
        return latent_frames * self.compression[0]

    def around(self, frames: int) -> tuple[int, int]:
        """The largest number of frames not above, and the smallest not below: both the number itself, if it fits."""
        above = max(1, self.frames_of(self.latent_frames(frames, ceil)))
        below = self.frames_of(max(1, self.latent_frames(frames, floor)))
        return below if below <= frames else 1, above

    def nearest(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(T', H', W'), the latents of the nearest size that fits."""
        sizes = zip((height, width), self.compression[1:])
        spatial = [max(1, round(size / by)) for size, by in sizes]
        return max(1, self.latent_frames(frames, round)), spatial[0], spatial[1]

    def size_of(self, latent: tuple[int, int, int]) -> tuple[int, int, int]:
        """Frames, height and width of a video with latents (T', H', W')."""
        return self.frames_of(latent[0]), latent[1] * self.compression[1], latent[2] * self.compression[2]
