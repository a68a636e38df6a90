"""Who may ask: the page that this app served, from the machine that it serves. Every request passes here.

A web page of somebody else, open in the same browser, can send requests to 127.0.0.1 too, directly or by giving its own
name that address (DNS rebinding). So: the `Host` must be one of ours; requests for data must not come from another
origin; writing takes, besides, a token that only our page knows, in a form that no HTML form can send.
"""

from __future__ import annotations

import ipaddress
import secrets
import socket

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

TOKEN_HEADER = "x-datakit-token"
MOST_BODY = 32 << 20
OPEN_PATHS = ("/", "/favicon.ico")
"""The page itself: links to it may come from anywhere. It holds nothing of the catalog."""
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def new_token() -> str:
    """A secret of this process."""
    return secrets.token_urlsafe(32)


class Guard:
    """Refuses requests that did not come from our page; adds headers that keep the page to itself.

    Args:
        host, port: that the app is bound to. Bound to every address of the machine, its names and plain addresses are
            ours: a name that somebody else controls is neither.
    """

    def __init__(self, app: ASGIApp, token: str, host: str, port: int):
        self.app, self.token = app, token
        self.port = port
        self.names = {"localhost", "127.0.0.1", "::1", host.lower()}
        self.any_address = host in ("0.0.0.0", "::", "")
        if self.any_address:
            self.names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError(f"no {scope['type']} here")

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refusal = self.refusal(scope["method"], scope["path"], Headers(scope=scope))
        if refusal is not None:
            status, reason = refusal
            await JSONResponse({"error": reason}, status)(scope, receive, send_guarded)
            return
        await self.app(scope, receive, send_guarded)

    def refusal(self, method: str, path: str, headers: Headers) -> tuple[int, str] | None:
        """Status and reason; None: the request may pass."""
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._ours(hosts[0]):
            return 403, "this app answers to its own address only"
        if method not in ("GET", "HEAD", "POST"):
            return 405, "GET, HEAD and POST only"
        if path in OPEN_PATHS and method != "POST":
            return None
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return 403, "requests of other sites are refused"
        if headers.get("origin", f"http://{hosts[0]}") != f"http://{hosts[0]}":
            return 403, "requests of other origins are refused"
        return self._refused_write(headers) if method == "POST" else None

    def _refused_write(self, headers: Headers) -> tuple[int, str] | None:
        if headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            return 415, "send JSON"
        if not secrets.compare_digest(headers.get(TOKEN_HEADER, "").encode(), self.token.encode()):
            return 403, "the page is older than this process: reload it"
        if not headers.get("content-length", "").isdigit() or int(headers["content-length"]) > MOST_BODY:
            return 413, f"at most {MOST_BODY >> 20} MiB"
        return None

    def _ours(self, host: str) -> bool:
        name, port = _split(host.lower())
        if port != self.port:
            return False
        return name in self.names or (self.any_address and _is_address(name))


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what is bound to `host`."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _split(host: str) -> tuple[str, int | None]:
    """Name and port of a Host header; [::1]:80 -> ("::1", 80)."""
    name, colon, port = host.rpartition(":")
    if not colon or host.endswith("]"):
        name, port = host, "80"
    return name.strip("[]"), int(port) if port.isascii() and port.isdigit() else None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
