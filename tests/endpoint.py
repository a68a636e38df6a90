"""An endpoint of OpenAI's form that says what colour the pictures have, late, out of order, and after failures."""

from __future__ import annotations

import base64
import json
import random
import re
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Iterator

import cv2
import numpy as np

WORDS = re.compile(r"colour (\d+) (\d+) (\d+)")


class Endpoint(ThreadingHTTPServer):
    """Answers a question with the mean colour of its first picture and the number of pictures.

    Args:
        fails: share of questions whose first try fails: by status 500, by 429, or by hanging up.
        delay_s: longest time for an answer; each takes a random part of it.
        say: makes the answer from the colour (three ints), the pictures and the messages.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, fails: float = 0.0, delay_s: float = 0.0, say=None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.fails, self.delay_s, self.say = fails, delay_s, say or describe
        self.answered: Counter[str] = Counter()
        self.failed = 0
        self.seen: set[str] = set()
        self.lock = threading.Lock()
        self.random = random.Random(3)

    def handle_error(self, request, client_address) -> None:
        """A client that was killed is no news."""


def describe(colour: tuple[int, int, int], pictures: list[np.ndarray], messages: list[dict]) -> str:
    return (f"A wall of colour {colour[0]} {colour[1]} {colour[2]} fills the frame while a lamp in the corner flickers and the camera "
            f"stays where it is, seen {len(pictures)} times.")


@contextmanager
def running(**options) -> Iterator[Endpoint]:
    server = Endpoint(**options)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        messages = json.loads(body)["messages"]
        key = json.dumps(messages)[-4000:] + str(hash(body))
        with self.server.lock:
            chance, wait = self.server.random.random(), self.server.random.random() * self.server.delay_s
            first = key not in self.server.seen
            self.server.seen.add(key)
        time.sleep(wait)
        if first and chance < self.server.fails:
            self.server.failed += 1
            self._fail(chance / self.server.fails)
            return
        pictures = [_picture(part["image_url"]["url"]) for message in messages if isinstance(message["content"], list)
                    for part in message["content"] if part["type"] == "image_url"]
        colour = tuple(int(v) for v in pictures[0].reshape(-1, 3).mean(axis=0).round()) if pictures else (0, 0, 0)
        text = self.server.say(colour, pictures, messages)
        self.server.answered[text] += 1
        self._send(200, {
            "id": "x", "object": "chat.completion", "created": 0, "model": "m",
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30},
        })

    def _fail(self, how: float) -> None:
        if how < 0.33:
            self._send(500, {"error": {"message": "planted"}})
        elif how < 0.66:
            self._send(429, {"error": {"message": "slow down"}}, {"Retry-After": "0.2"})
        else:
            self.connection.close()

    def _send(self, status: int, body: dict, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", "content-length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments) -> None:
        pass


def _picture(url: str) -> np.ndarray:
    data = np.frombuffer(base64.b64decode(url.split(",", 1)[1]), np.uint8)
    return cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1]
