"""Still pictures of clips: thumbnails for people to look at."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2

from datakit.errors import ErrorKind, MediaError
from datakit.video.reader import VideoReader

JPEG_QUALITY = 82


def thumbnail(
    uri: str,
    stream: int | None,
    start_pts: int,
    end_pts: int,
    side: int = 320,
    at: float = 0.5,
) -> bytes:
    """A JPEG of one frame of a span.

    Args:
        uri: path or URL of the source.
        stream: its stream index.
        side: longer side, px.
        at: where in the span, 0..1.

    Raises:
        MediaError: the source cannot be read, or has no frame there.
    """
    with VideoReader(uri, stream) as reader:
        wanted = start_pts + int((end_pts - start_pts) * at)
        _, picture = next(reader.at([wanted]), (None, None))
        if picture is None:  # the last frame began before
            _, picture = next(reader.at([start_pts]), (None, None))
        if picture is None:
            raise MediaError(ErrorKind.TRUNCATED, f"{uri} has no frame at {start_pts}")
        rgb = picture.rgb(side)
    _, data = cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return data.tobytes()


def clip_thumbnail(root: str, clip: Mapping[str, Any], side: int = 320) -> bytes:
    """A JPEG of the middle of a clip.

    Args:
        root: of the catalog.
        clip: row of the view with uri, path, stream, start_pts, end_pts.

    Raises:
        MediaError: see `thumbnail`.
    """
    file = os.path.join(root, clip["path"]) if clip.get("path") and not Path(clip["uri"] or "").exists() else None
    if file is not None:
        return thumbnail(file, None, 0, 0, side)
    return thumbnail(clip["uri"], clip["stream"], clip["start_pts"], clip["end_pts"], side)
