"""A small server that speaks /v1/chat/completions, and fails as it is told to."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import cv2
import numpy as np

Fault = tuple[int, dict[str, str]]
RESET: Fault = (0, {})
"""The connection is reset instead of an answer."""


class FaultyEndpoint:
    """Answers with the mean colour of the first picture, `R G B`, or the text in upper case where there is none.

    Args:
        fault: called with the number of the request (from 1) and its JSON; status and headers to fail with, or None.
        delay_s: called like `fault`: seconds until the answer.
        answer: called with the request's JSON: the text.
        port: to come back at the address of one that was stopped.

    Attributes:
        times: `time.monotonic` of every request's arrival.
        most: largest number of requests that were under way at once.
    """

    def __init__(
        self,
        fault: Callable[[int, dict], Fault | None] = lambda number, body: None,
        delay_s: Callable[[int, dict], float] = lambda number, body: 0.0,
        port: int = 0,
        answer: Callable[[dict], str] | None = None,
    ):
        self.fault, self.delay_s, self.answer = fault, delay_s, answer or _answer
        self.times: list[float] = []
        self.headers: list[Message] = []
        self.most = self._now = 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> FaultyEndpoint:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc) -> None:
        self.stop()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def arrived(self, headers: Message) -> int:
        with self._lock:
            self.times.append(time.monotonic())
            self.headers.append(headers)
            self._now += 1
            self.most = max(self.most, self._now)
            return len(self.times)

    def left(self) -> None:
        with self._lock:
            self._now -= 1


def _handler(endpoint: FaultyEndpoint) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            number = endpoint.arrived(self.headers)
            try:
                time.sleep(endpoint.delay_s(number, body))
                fault = endpoint.fault(number, body)
                with contextlib.suppress(OSError):  # who asked may be gone
                    self._send(fault if self.path == "/v1/chat/completions" else (404, {}), body)
            finally:
                endpoint.left()

        def _send(self, fault: Fault | None, body: dict[str, Any]) -> None:
            if fault == RESET:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                return
            status, headers = fault or (200, {})
            data = json.dumps(
                {"error": {"message": f"told to fail\nwith {status}"}}
                if fault
                else _completion(body, endpoint.answer(body))
            ).encode()
            self.send_response(status)
            for name, value in {
                **headers,
                "Content-Type": "application/json",
                "Content-Length": str(len(data)),
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_) -> None:
            pass

    return Handler


def _completion(body: dict[str, Any], text: str) -> dict[str, Any]:
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": body["model"],
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
    }


def _answer(body: dict[str, Any]) -> str:
    content = next(message["content"] for message in body["messages"] if message["role"] == "user")
    if isinstance(content, str):
        return content.upper()
    return "{} {} {}".format(*colour_of(body))


def colour_of(body: dict[str, Any]) -> tuple[int, int, int]:
    """Mean R, G, B of the first picture of a request; zeros where there is none."""
    content = next(message["content"] for message in body["messages"] if message["role"] == "user")
    urls = (
        [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
        if isinstance(content, list)
        else []
    )
    if not urls:
        return 0, 0, 0
    png = np.frombuffer(base64.b64decode(urls[0].removeprefix("data:image/png;base64,")), np.uint8)
    blue, green, red = cv2.imdecode(png, cv2.IMREAD_COLOR).mean((0, 1)).round().astype(int).tolist()
    return red, green, blue
