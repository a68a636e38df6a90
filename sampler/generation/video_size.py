"""Sizes of videos: height and width by resolution and aspect ratio, and how many frames there can be."""

from __future__ import annotations

from pydantic import TypeAdapter, ValidationError

from datakit.errors import ConfigError
from trainer.planning.buckets import area_of, sizes_of
from trainer.planning.latent_grid import LatentGrid
from trainer.planning.settings import Aspect

_ASPECT: TypeAdapter[str] = TypeAdapter(Aspect)


def size_of(resolution: str, aspect_ratio: str, multiples: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of videos, as buckets of training have it: 256px at 16:9 is 192 × 336, 768px is 576 × 1024.

    Args:
        resolution: 256px is the area of a square of that side, 480p that of 480 lines at 16:9.
        aspect_ratio: width to height, 16:9, 9:16, 1:1, 2.39:1 …
        multiples: that height and width are of: the autoencoder's compression times the model's patch.

    Raises:
        ConfigError: neither is one.
    """
    try:
        aspect = _ASPECT.validate_python(aspect_ratio)
    except ValidationError as e:
        raise ConfigError(
            f"no aspect ratio {aspect_ratio!r}: write width:height, for example 16:9, 9:16, 1:1 or 2.39:1"
        ) from e
    if 0 in map(float, aspect.split(":")):
        raise ConfigError(f"no aspect ratio {aspect!r}: neither side can be 0")
    return sizes_of(area_of(resolution), [aspect], multiples)[0]


def check_frames(num_frames: int, grid: LatentGrid, most: int | None) -> None:
    """Whether an autoencoder decodes to so many frames.

    Args:
        most: that the model makes; None: any number.

    Raises:
        ConfigError: with the nearest numbers that there can be.
    """
    fits = _fitting(num_frames, grid, most)
    if num_frames in fits:
        return
    nearest = " and ".join(map(str, fits))
    if most is not None and num_frames > most:
        raise ConfigError(
            f"{num_frames} frames are more than the {most} that can be made: the nearest is {nearest} "
            f"(video.num_frames)"
        )
    are = "is" if len(fits) == 1 else "are"
    raise ConfigError(
        f"{num_frames} frames: this autoencoder takes {grid.rule}; the nearest {are} {nearest} (video.num_frames)"
    )


def _fitting(num_frames: int, grid: LatentGrid, most: int | None) -> list[int]:
    """The nearest below and above (the number itself, if it fits), none above `most`."""
    below, above = grid.around(num_frames)
    if most is not None and below > most:
        below = above = grid.around(most)[0]
    return sorted({n for n in (below, above) if most is None or n <= most})
