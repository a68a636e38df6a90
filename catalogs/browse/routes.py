"""What the page asks for: JSON, and files to download. Every answer about clips is of one state of the index."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import numpy as np
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from catalogs.browse.clip_detail import captions_of, plain, record
from catalogs.browse.clip_index import DURATION, SOURCE, Index
from catalogs.browse.download import FORMATS, export
from catalogs.browse.facets import described, facets
from catalogs.browse.mark_writer import Marker
from catalogs.browse.media import SIDES, Media, NotHere
from catalogs.query.selection import COLUMNS, Selection
from catalogs.query.snapshots import author, tag
from catalogs.query.sql import query
from catalogs.records.marks import MARKS
from datakit.errors import ConfigError, DatakitError
from datakit.web import http_range

MOST_PAGE = 240
MOST_ROWS = 1000
"""Rows of an answer in the SQL box."""
THUMB_WORKERS = max(1, min(4, (os.cpu_count() or 2) - 1))
CARD = ("clip_id", "video_id", "status", "mark", "comment", DURATION, "start_s", "width", "height", "kind")
FILE_READERS = re.compile(r"\b(read|scan)_\w+", re.IGNORECASE)
"""polars' SQL can read files by name; the page must not. Refused even inside quotes, so that no quoting hides it."""


class Api:
    """Endpoints over an index.

    Args:
        where: condition that the page starts with.
        snapshot: name of what is shown, if it is not the catalog as it is now.
    """

    def __init__(self, index: Index, where: str | None, snapshot: str | None):
        self.index, self.where, self.snapshot = index, where, snapshot
        self.media, self.marker = Media(index), Marker(index)
        self._facets: tuple[dict[str, int], dict] | None = None
        self._decoders = ThreadPoolExecutor(THUMB_WORKERS, "thumbnails", initializer=_step_back)
        self._thumb_workers: anyio.CapacityLimiter | None = None

    def close(self) -> None:
        self._decoders.shutdown(wait=False, cancel_futures=True)
        self.media.close()
        self.marker.close()

    def routes(self) -> list[Route]:
        gets: dict[str, Callable] = {
            "/api/info": self.info,
            "/api/facets": self.facets,
            "/api/clips": self.clips,
            "/api/captions": self.captions,
            "/api/clip/{clip_id}": self.clip,
            "/api/sql": self.sql,
            "/api/changes": self.changes,
            "/api/export": self.export,
            "/video/{video_id}": self.video,
            "/file/{clip_id}": self.file,
            "/play/{clip_id}.mp4": self.play,
            "/thumb/{clip_id}.jpg": self.thumb,
        }
        posts = {"/api/marks": self.mark, "/api/tag": self.tag, "/api/reload": self.reload}
        return [Route(path, endpoint, methods=["GET", "HEAD"]) for path, endpoint in gets.items()] + [
            Route(path, partial(_post, handler), methods=["POST"]) for path, handler in posts.items()
        ]

    def info(self, request: Request) -> Response:
        """What is shown, and every column."""
        index = self.index
        return JSONResponse(
            {
                "root": index.catalog.root,
                "clips": index.size,
                "versions": index.versions,
                "snapshot": self.snapshot,
                "read_only": index.read_only,
                "where": self.where,
                "author": author(),
                "load_s": index.load_s,
                "columns": described(),
                "orders": [SOURCE, DURATION],
                "formats": list(FORMATS),
                "export_columns": list(COLUMNS),
            }
        )

    def facets(self, request: Request) -> Response:
        """Ranges, histograms and values of the filters; marks do not change them until a reload."""
        data = {name: version for name, version in self.index.versions.items() if name != "marks"}
        if self._facets is None or self._facets[0] != data:
            self._facets = data, facets(self.index)
        return JSONResponse(plain(self._facets[1]))

    def clips(self, request: Request) -> Response:
        """Counts, and a page of cards; `value` is what they are sorted by."""
        ask = request.query_params
        sort = ask.get("sort") or SOURCE
        offset, limit = _number(ask, "offset", 0), _number(ask, "limit", 60, MOST_PAGE)
        found = self.index.query(_where(request), sort, ask.get("desc") == "1", offset, limit)
        cards = self.index.take(found.rows, list(dict.fromkeys([*CARD, *([sort] if sort != SOURCE else [])])))
        self.index.remember(cards["clip_id"].to_list(), found.rows)
        rows = [{**{name: card[name] for name in CARD}, "value": card.get(sort)} for card in cards.to_dicts()]
        counts = {name: {"clips": amount.clips, "hours": amount.hours} for name, amount in found.statuses.items()}
        return JSONResponse(
            plain(
                {
                    "total": {"clips": found.total.clips, "hours": found.total.hours},
                    "statuses": counts,
                    "clips": rows,
                    "seconds": found.seconds,
                }
            )
        )

    def captions(self, request: Request) -> Response:
        """The captions of a page; apart from it, as they are read from the tables."""
        ids = [clip for clip in request.query_params.get("ids", "").split(",") if clip][:MOST_PAGE]
        return JSONResponse(captions_of(self.index, ids) if ids else {})

    def clip(self, request: Request) -> Response:
        clip_id = request.path_params["clip_id"]
        row = self.index.row_of(clip_id)
        if row is None:
            raise NotHere("no such clip")
        return JSONResponse({**record(self.index, row), "media": self.media.of_clip(clip_id)})

    def sql(self, request: Request) -> Response:
        text = request.query_params.get("q", "")
        if FILE_READERS.search(text):
            raise ConfigError("a query here reads the catalog's tables only, no files (functions read_… are refused)")
        rows = query(self.index.catalog.at(self.index.versions), text, MOST_ROWS + 1)
        shown = rows.head(MOST_ROWS)
        return JSONResponse({"columns": shown.columns, "rows": plain(shown.rows()), "more": rows.height > MOST_ROWS})

    def changes(self, request: Request) -> Response:
        """Tables that somebody wrote to since they were read: name -> versions shown and there now."""
        shown, now = self.index.versions, self.index.catalog.versions()
        return JSONResponse({name: [shown[name], now[name]] for name in now if now[name] != shown.get(name)})

    def export(self, request: Request) -> Response:
        ask = request.query_params
        form = ask.get("format", "csv")
        columns = [name for name in ask.get("columns", "").split(",") if name] or list(COLUMNS)
        path = export(self.index, _where(request), columns, form)
        return FileResponse(
            path,
            media_type=FORMATS[form],
            filename=f"clips.{form}",
            headers={"Cache-Control": "no-store"},
            background=BackgroundTask(path.unlink, missing_ok=True),
        )

    def video(self, request: Request) -> Response:
        return http_range.answer(request, self.media.video(request.path_params["video_id"]))

    def file(self, request: Request) -> Response:
        return http_range.answer(request, self.media.clip_file(request.path_params["clip_id"]))

    def play(self, request: Request) -> Response:
        from catalogs.browse.media import served

        clip_id = request.path_params["clip_id"]
        return http_range.answer(request, served(str(self.media.film(clip_id)), clip_id))

    async def thumb(self, request: Request) -> Response:
        """Few at a time, and none for who has scrolled on."""
        side = request.query_params.get("side", str(SIDES[0]))
        if self._thumb_workers is None:
            self._thumb_workers = anyio.CapacityLimiter(THUMB_WORKERS)
        async with self._thumb_workers:
            if await request.is_disconnected():
                return Response(status_code=499)
            make = partial(self.media.thumbnail, request.path_params["clip_id"], int(side) if side.isdigit() else 0)
            picture = await asyncio.get_running_loop().run_in_executor(self._decoders, make)
        return Response(
            picture, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=86400, immutable"}
        )

    def mark(self, body: dict) -> dict:
        """`{ids | where + expected, mark: keep|reject|null}` or `{…, comment: text}`."""
        rows = self._chosen(body)
        if "comment" in body:
            marked = self.marker.comment(rows, _text(body, "comment"))
        elif body.get("mark", "") in (None, *MARKS):
            marked = self.marker.mark(rows, body["mark"])
        else:
            raise ConfigError(f"a mark is {', '.join(MARKS)} or null")
        return {
            "marked": marked,
            "clips": self.index.take(rows[:MOST_PAGE], ["clip_id", "status", "mark", "comment"]).to_dicts(),
        }

    def tag(self, body: dict) -> dict:
        """`{name, where, columns, note}`: name the selection that is shown."""
        columns = body.get("columns") or list(COLUMNS)
        selection = Selection(self.index.catalog, dict(self.index.versions), _text(body, "where") or None, columns)
        versions = tag(
            self.index.catalog, _text(body, "name") or "", selection=selection, note=_text(body, "note") or ""
        )
        return {
            "versions": versions,
            "clips": selection.size[0],
            "hours": selection.size[1],
            "content_hash": selection.content_hash,
        }

    def reload(self, body: dict) -> dict:
        self.index.reload()
        return {"seconds": self.index.load_s}

    def _chosen(self, body: dict) -> np.ndarray:
        """The rows that a request names, one by one or by a condition whose count somebody confirmed."""
        ids = body.get("ids")
        if isinstance(ids, list) and all(isinstance(i, str) for i in ids):
            return self.index.rows_of(ids) if ids else np.empty(0, np.int64)
        if ids is not None or "expected" not in body:
            raise ConfigError("name clips by `ids`, a list, or by `where` with the number `expected`")
        rows = self.index.rows(_text(body, "where") or None)
        if len(rows) != body["expected"]:
            raise ConfigError(f"{len(rows)} clips match by now, not {body['expected']}: look again")
        return rows


async def _post(handler: Callable[[dict], dict], request: Request) -> Response:
    try:
        body = await request.json()
    except ValueError as e:
        raise HTTPException(400, "this is no JSON") from e
    if not isinstance(body, dict):
        raise HTTPException(400, "send a JSON object")
    return JSONResponse(plain(await anyio.to_thread.run_sync(handler, body)))


def failed(request: Request, error: Exception) -> Response:
    """Errors for people, as JSON; the page shows their text."""
    from datakit.errors import MediaError

    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code)
    status = 404 if isinstance(error, NotHere) else 422 if isinstance(error, MediaError) else 400
    return JSONResponse({"error": str(error)}, status, headers={"Cache-Control": "no-store"})


FAILURES = {DatakitError: failed, HTTPException: failed}


def _step_back() -> None:
    """Let queries go before pictures where threads have priorities of their own (Linux)."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def _where(request: Request) -> str | None:
    return request.query_params.get("where", "").strip() or None


def _number(ask: Any, name: str, default: int, most: int | None = None) -> int:
    text = ask.get(name, str(default))
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(f"{name} is a number, not {text!r}")
    return int(text) if most is None else min(int(text), most)


def _text(body: dict, name: str) -> str | None:
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{name} is a text")
    return value
