"""`datakit eval prefer`: a page that shows two videos of one prompt and asks which is better. It serves this machine
only."""

from __future__ import annotations

import contextlib
import html
import mimetypes
import os
import socket
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Sequence
from functools import partial
from importlib import resources
from pathlib import Path

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from catalogs.browse.media import served
from catalogs.browse.routes import FAILURES
from catalogs.query.snapshots import author as current_author
from datakit.atomic import atomic_path
from datakit.errors import ConfigError
from datakit.identity import Span
from datakit.web.guard import Guard, new_token
from datakit.web.http_range import answer
from sampler.evaluate.preference import Pair, Shown, Votes, make_pairs, tally, votes_of
from sampler.evaluate.result_sets import SampleSet, read_sets
from sampler.video_files import is_played

HOST = "127.0.0.1"
STATIC = ("prefer.css", "prefer.js")


def serve(samples: Sequence[str], port: int = 0, seed: int = 0, author: str | None = None) -> None:
    """Serve the page until Ctrl-C, then print what the votes say.

    Args:
        samples: result catalogs; votes are kept in the first.
        port: 0: any that is free.
        author: whose votes they are; None: user@host.

    Raises:
        ConfigError: nothing to compare, or the port cannot be bound.
    """
    sets = read_sets(samples)
    pairs, votes = make_pairs(sets, seed), votes_of(sets)
    author = author or current_author()
    listening = _bind(port)
    port = listening.getsockname()[1]
    app = make_app(pairs, votes, author, port)
    left = len({pair.pair_id for pair in pairs} - votes.done(author))
    print(f"{left} of {len(pairs)} pairs to judge: http://{HOST}:{port}/ (Ctrl-C ends it)", flush=True)
    with listening, contextlib.suppress(KeyboardInterrupt):  # that is how it ends
        uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2, server_header=False)).run(
            sockets=[listening]
        )
    show(votes_of(sets), sets)


def show(votes: Votes, sets: Sequence[SampleSet]) -> None:
    """Print what the votes say."""
    found = tally(votes.all(), sets)
    print("\n".join(map(str, found)) if found else "no votes yet", file=sys.stdout)


def make_app(pairs: Sequence[Pair], votes: Votes, author: str, port: int) -> Starlette:
    """The app. `app.state.token` is what voting takes. Nothing that it serves says which checkpoint a video is of.

    Args:
        port: that it is bound to: requests to other addresses are refused.
    """
    token = new_token()
    api = _Api(pairs, votes, author)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        api.close()

    def page(request: Request) -> Response:
        text = _static("prefer.html").replace("{{token}}", html.escape(token, quote=True))
        return HTMLResponse(text, headers={"Cache-Control": "no-store"})

    app = Starlette(
        routes=[Route("/", page), Route("/favicon.ico", _icon), Route("/static/{name}", _asset), *api.routes()],
        middleware=[Middleware(Guard, token=token, host=HOST, port=port)],
        exception_handlers=FAILURES,
        lifespan=lifespan,
    )
    app.state.token = token
    return app


class _Api:
    def __init__(self, pairs: Sequence[Pair], votes: Votes, author: str):
        self._pairs = {pair.pair_id: pair for pair in pairs}
        self._votes, self._author = votes, author
        self._folder = tempfile.TemporaryDirectory(prefix="datakit-prefer-")
        self._encoding = threading.Lock()

    def close(self) -> None:
        self._folder.cleanup()

    def routes(self) -> list[Route]:
        return [
            Route("/api/pairs", self.pairs),
            Route("/video/{pair}/{side}", self.video),
            Route("/api/vote", self.vote, methods=["POST"]),
        ]

    def pairs(self, request: Request) -> Response:
        """What is left to judge, in order, and how many there are in all."""
        done = self._votes.done(self._author)
        left = [
            {"pair": pair.pair_id, "prompt": pair.prompt} for pair in self._pairs.values() if pair.pair_id not in done
        ]
        return JSONResponse({"pairs": left, "all": len(self._pairs)}, headers={"Cache-Control": "no-store"})

    def video(self, request: Request) -> Response:
        pair, side = self._pair(request.path_params["pair"]), request.path_params["side"]
        if side not in ("left", "right"):
            raise HTTPException(404, "a pair has a left and a right video")
        return answer(request, served(self._playable(getattr(pair, side)), f"{pair.pair_id}/{side}"))

    async def vote(self, request: Request) -> Response:
        """`{pair, choice: left|right|tie}`."""
        try:
            body = await request.json()
        except ValueError as e:
            raise HTTPException(400, "this is no JSON") from e
        if (
            not isinstance(body, dict)
            or not isinstance(body.get("pair"), str)
            or not isinstance(body.get("choice"), str)
        ):
            raise HTTPException(400, "send {pair, choice}")
        pair = self._pair(body["pair"])
        await anyio.to_thread.run_sync(partial(self._votes.add, pair, body["choice"], self._author))
        return JSONResponse({"done": len(self._votes.done(self._author))})

    def _pair(self, pair_id: str) -> Pair:
        if pair_id not in self._pairs:
            raise HTTPException(404, "no such pair")
        return self._pairs[pair_id]

    def _playable(self, shown: Shown) -> str:
        """A file that browsers play: the sample's own, or the same pictures as H.264."""
        from datakit.video.cut import cut
        from datakit.video.reader import VideoReader

        if is_played(shown.file):
            return shown.file
        path = Path(self._folder.name) / f"{shown.sample_id}.mp4"
        with self._encoding:
            if not path.exists():
                uri, stream, start, end = shown.place
                with atomic_path(path) as aside, VideoReader(uri, stream) as reader:
                    cut(reader, Span(start, end, reader.time_base), aside)
        return str(path)


def _asset(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in STATIC:
        return Response("no such file", 404)
    return Response(_static(name), media_type=mimetypes.guess_type(name)[0], headers={"Cache-Control": "no-cache"})


def _icon(request: Request) -> Response:
    return Response(status_code=204)


def _static(name: str) -> str:
    return (resources.files("sampler.evaluate") / "static" / name).read_text(encoding="utf-8")


def _bind(port: int) -> socket.socket:
    try:
        return socket.create_server((HOST, port))
    except OSError as e:
        raise ConfigError(
            f"cannot serve on {HOST} port {port}: {os.strerror(e.errno or 0)} (--port 0 takes any that is free)"
        ) from e
