"""A file over HTTP, whole or in ranges, as players ask for it (RFC 9110, sections 13 and 14)."""

from __future__ import annotations

import mimetypes
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import formatdate
from typing import BinaryIO, Literal

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from datakit.hashing import hash_hex

CHUNK = 256 << 10
RANGE = re.compile(r"bytes=(\d*)-(\d*)")
TYPES = {
    ".mkv": "video/x-matroska",
    ".webm": "video/webm",
    ".mp4": "video/mp4",
    ".m4v": "video/mp4",
    ".mov": "video/quicktime",
    ".avif": "image/avif",
    ".webp": "image/webp",
}


@dataclass(frozen=True)
class Served:
    """Bytes to serve.

    Attributes:
        tag: changes when the content does.
        modified: seconds since 1970, where it is known.
        open: gives a seekable file; called once per answer.
    """

    name: str
    size: int
    tag: str
    modified: float | None
    open: Callable[[], BinaryIO]


def answer(request: Request, file: Served) -> Response:
    """200, 206 (one range), 304 or 416. Several ranges at once are answered with the whole, as the standard allows."""
    etag = f'"{hash_hex(file.tag, 12)}"'
    headers = {"Accept-Ranges": "bytes", "ETag": etag, "Cache-Control": "private, max-age=3600"}
    if file.modified is not None:
        headers["Last-Modified"] = formatdate(file.modified, usegmt=True)
    if etag in [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]:
        return Response(status_code=304, headers=headers)
    wanted = _range(request, file, headers)
    if wanted == "unsatisfiable":
        return Response(status_code=416, headers={**headers, "Content-Range": f"bytes */{file.size}"})
    first, end = wanted or (0, file.size)
    headers["Content-Length"] = str(end - first)
    if wanted:
        headers["Content-Range"] = f"bytes {first}-{end - 1}/{file.size}"
    status, kind = 206 if wanted else 200, _type(file.name)
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=kind)
    return StreamingResponse(_pieces(file, first, end), status, headers, media_type=kind)


def _range(
    request: Request, file: Served, headers: dict[str, str]
) -> tuple[int, int] | Literal["unsatisfiable"] | None:
    """Half-open byte range; None: the whole file."""
    text = request.headers.get("range")
    if text is None:
        return None
    if (known := request.headers.get("if-range")) is not None and known not in (
        headers["ETag"],
        headers.get("Last-Modified"),
    ):
        return None
    found = RANGE.fullmatch(text.replace(" ", ""))
    if found is None or found.groups() == ("", ""):
        return None
    first, last = found.groups()
    if not first:  # the last so many bytes
        start, end = max(0, file.size - int(last)), file.size
    else:
        start, end = int(first), min(int(last) + 1 if last else file.size, file.size)
        if last and int(last) < start:
            return None
    return (start, end) if start < end else "unsatisfiable"


def _pieces(file: Served, first: int, end: int) -> Iterator[bytes]:
    with file.open() as source:
        source.seek(first)
        left = end - first
        while left > 0:
            piece = source.read(min(CHUNK, left))
            if not piece:
                raise OSError(f"{file.name} became shorter while it was served")
            left -= len(piece)
            yield piece


def _type(name: str) -> str:
    """What a browser may take it for: never a page or a script, whatever it is called."""
    suffix = name[name.rfind(".") :].lower() if "." in name else ""
    kind = TYPES.get(suffix) or mimetypes.guess_type(name)[0] or ""
    return kind if kind.startswith(("video/", "image/")) and kind != "image/svg+xml" else "application/octet-stream"
