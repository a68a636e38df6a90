"""The app: its page, its endpoints, the guard around both; and serving it."""

from __future__ import annotations

import contextlib
import html
import os
import socket
import sys
import time
import webbrowser
from collections.abc import AsyncIterator
from importlib import resources

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from catalogs.browse.clip_index import Index
from catalogs.browse.routes import FAILURES, Api
from catalogs.query.where import parse_where
from catalogs.tables.catalog import Catalog
from datakit.errors import ConfigError
from datakit.web.guard import Guard, is_loopback, new_token

HOST, PORT = "127.0.0.1", 8642
STATIC = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def serve(
    catalog: Catalog,
    host: str = HOST,
    port: int = PORT,
    where: str | None = None,
    snapshot: str | None = None,
    open_browser: bool = False,
) -> None:
    """Serve the app until Ctrl-C.

    Args:
        catalog: to show; one of `Catalog.at` is shown, not marked.
        port: 0: any that is free.
        where: condition that the page starts with.
        snapshot: name of what `catalog` was pinned to, to show.

    Raises:
        ConfigError: the condition makes no sense, or the address cannot be bound.
    """
    began = time.monotonic()
    parse_where(where)
    listening = _bind(host, port)
    port = listening.getsockname()[1]
    app = make_app(catalog, host, port, where, snapshot)
    url = f"http://{_shown(host)}:{port}/"
    clips, seconds = app.state.api.index.size, time.monotonic() - began
    print(f"{clips:,} clips of {catalog.root} after {seconds:.1f} s: {url} (Ctrl-C ends it)", flush=True)
    if not is_loopback(host):
        print(
            f"datakit: anybody who reaches port {port} of this machine can see these videos and mark clips",
            file=sys.stderr,
            flush=True,
        )
    if open_browser:
        webbrowser.open(url)
    with listening, contextlib.suppress(KeyboardInterrupt):  # that is how it ends
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2, server_header=False)
        uvicorn.Server(config).run(sockets=[listening])


def make_app(
    catalog: Catalog,
    host: str = HOST,
    port: int = PORT,
    where: str | None = None,
    snapshot: str | None = None,
) -> Starlette:
    """The app over a catalog, its rows read. `app.state.api` holds what it works with, `app.state.token` what writing
    takes.

    Args:
        host, port: that it is bound to: requests to others are refused.
    """
    api, token = Api(Index(catalog), where, snapshot), new_token()

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        api.close()

    def page(request: Request) -> Response:
        text = _static("index.html").replace("{{token}}", html.escape(token, quote=True))
        return HTMLResponse(text, headers={"Cache-Control": "no-store"})

    app = Starlette(
        routes=[Route("/", page), Route("/favicon.ico", _icon), Route("/static/{name}", _asset), *api.routes()],
        middleware=[Middleware(Guard, token=token, host=host, port=port)],
        exception_handlers=FAILURES,
        lifespan=lifespan,
    )
    app.state.api, app.state.token = api, token
    return app


def _asset(request: Request) -> Response:
    name = request.path_params["name"]
    known = {entry.name for entry in resources.files("catalogs.browse.static").iterdir()}
    suffix = name[name.rfind(".") :]
    if name not in known or suffix not in STATIC or suffix == ".html":
        return Response("no such file", 404)
    return Response(_static(name), media_type=STATIC[suffix], headers={"Cache-Control": "no-cache"})


def _icon(request: Request) -> Response:
    return Response(
        _static("icon.svg"), media_type="image/svg+xml", headers={"Cache-Control": "private, max-age=86400"}
    )


def _static(name: str) -> str:
    return (resources.files("catalogs.browse.static") / name).read_text(encoding="utf-8")


def _bind(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as e:
        reason = e.strerror if isinstance(e, socket.gaierror) else os.strerror(e.errno or 0)
        raise ConfigError(f"cannot serve on {host} port {port}: {reason} (--port 0 takes any that is free)") from e


def _shown(host: str) -> str:
    """A host as it stands in an address."""
    if host in ("0.0.0.0", "::", ""):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host
