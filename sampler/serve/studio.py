"""`datakit sample serve`: a page to try a checkpoint on. It serves this machine only; what it makes is in a result
catalog like any other.

The models are loaded once, in this process. Requests are done one after another, by a thread that goes on when a
browser leaves.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import uvicorn
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from catalogs.tables.catalog import Catalog
from datakit.atomic import atomic_path
from datakit.cli.output.sample import PASSES
from datakit.errors import ConfigError
from datakit.web.guard import Guard
from sampler.generation.artifact_store import Store
from sampler.generation.cost_estimate import estimate
from sampler.generation.model_source import open_checkpoint
from sampler.generation.passes import Worker
from sampler.generation.result_catalog import Results
from sampler.generation.run import checked_samples
from sampler.generation.run_passes import Making, Perform, Sampled, lists_of, recorded, run_passes
from sampler.generation.sample_spec import FILES, Sample
from sampler.prompts.prompt import Prompt
from sampler.prompts.references import Reference, content_hash
from sampler.settings import SampleSettings

if TYPE_CHECKING:
    import gradio

HOST = "127.0.0.1"
REFERENCES = "references"
"""Folder of a page's results: what was uploaded, by content."""
WORK = "page_work"
"""Like `sampler.generation.run.WORK`, which a command in the same folder clears at its end."""
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; base-uri 'self'; form-action 'none'; "
    "frame-ancestors 'none'; "
    "object-src 'none'"
)
"""What Gradio's page needs, and nothing of another host."""
MOST_UPLOAD = 4 << 30


def serve(ckpt: str, out: Path, settings: SampleSettings, port: int, ray: str = "local") -> None:
    """Serve the page until Ctrl-C; a request that is under way then ends at its next step.

    Args:
        ckpt, out: see `sampler.generation.run.sample`.
        settings: what the page's fields begin with, and everything that it has no field for.
        port: 0: any that is free.
        ray: where prompts are refined and motion scores asked for; nothing else here needs Ray.

    Raises:
        ConfigError, MissingDependency, WeightsError: as `sampler.generation.run.sample`; or the port cannot be bound.
    """
    with _bind(port) as listening, tempfile.TemporaryDirectory(prefix="datakit-serve-") as scratch:
        studio = Studio(ckpt, out, settings, ray)
        print(f"loading {ckpt} …", flush=True)
        studio.load()
        port = listening.getsockname()[1]
        app = make_app(studio, Path(scratch), port)
        server = _Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1, server_header=False))
        print(f"http://{HOST}:{port}/ makes videos in {studio.results.folder} (Ctrl-C ends it)", flush=True)
        try:
            with contextlib.suppress(KeyboardInterrupt):  # that is how it ends
                server.run(sockets=[listening])
        finally:
            print("closing (Ctrl-C again: at once)", flush=True)
            studio.stop()


def make_app(studio: Studio, scratch: Path, port: int) -> ASGIApp:
    """The page's app.

    Args:
        scratch: folder for uploads and previews.
        port: that it is bound to: requests to other addresses are refused.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(
        scratch
    )  # the only way to tell Gradio where uploads go; read when components are made
    import gradio
    from fastapi import FastAPI

    from sampler.serve.page import CSS, make_page, theme

    page: gradio.Blocks = make_page(studio, scratch)
    app = gradio.mount_gradio_app(
        FastAPI(openapi_url=None),
        page,
        "/",
        HOST,
        port,
        footer_links=[],
        run_history=False,
        allowed_paths=studio.shown_folders(),
        max_file_size=MOST_UPLOAD,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme(),
        css=CSS,
    )
    page.has_launched = True  # else Gradio does not check that files which a browser names are its uploads
    return _PageGuard(app, token="", host=HOST, port=port)


@dataclass(frozen=True)
class Event:
    """What a request is at: `done` of `of` steps; `made`: a sample that has just been finished."""

    text: str
    done: int
    of: int
    made: Sample | None = None


class Work:
    """A request that waits, is under way, or is over."""

    def __init__(self, samples: list[Sample], settings: SampleSettings):
        self.samples, self.settings = samples, settings
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._future: Future[Sampled] | None = None

    def begin(self, future: Future[Sampled]) -> None:
        self._future = future
        future.add_done_callback(lambda _: self._events.put(None))

    def tell(self, event: Event) -> None:
        self._events.put(event)

    def events(self) -> Iterator[Event]:
        """As they come, until it is over."""
        while (event := self._events.get()) is not None:
            yield event

    def result(self) -> Sampled:
        """Raises whatever ended it."""
        assert self._future is not None
        return self._future.result()


class _Stopped(KeyboardInterrupt):
    """By the user: a run's row says so."""


class Studio:
    """A worker that stays, and the result catalog that it fills.

    Raises:
        ConfigError, MissingDependency: see `serve`. Nothing is written then.
    """

    def __init__(self, ckpt: str, out: Path, settings: SampleSettings, ray: str = "local"):
        if settings.work.tensor_parallel * settings.work.sequence_parallel > 1:
            raise ConfigError(
                "the page works in one process: leave work.tensor_parallel and work.sequence_parallel at 1"
            )
        self.settings, self.ray = settings, ray
        self.results = Results(out)
        self.checkpoint = open_checkpoint(ckpt, settings)
        self.autoencoder = self.checkpoint.describe_autoencoder()
        self._store = Store(self.results.folder / WORK)
        gpu = torch.cuda.is_available() if settings.work.num_gpus is None else settings.work.num_gpus > 0
        self._worker = Worker(
            self.checkpoint,
            settings,
            str(self.results.folder),
            str(self._store.root),
            gpu,
            None if gpu else settings.work.threads,
        )
        self._stopping = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sampling")

    def load(self) -> None:
        """Load the models and make the catalog.

        Raises:
            ConfigError, MissingDependency, WeightsError: weights that are not there or do not fit.
        """
        for name in ("text", "autoencoder", "dit"):
            getattr(self._worker.models, name)
        self.results.open()

    def catalog(self) -> Catalog:
        """To read from; the one that is written through belongs to the sampling thread."""
        return Catalog(self.results.folder)

    @property
    def references(self) -> Path:
        """Folder of what was uploaded."""
        return self.results.folder / REFERENCES

    def shown_folders(self) -> list[str]:
        """Those whose files the page may show."""
        return [str(self.results.folder / FILES), str(self.references)]

    def submit(self, prompt: Prompt, settings: SampleSettings) -> Work:
        """Put a request at the end of the queue. Its references are kept, since uploads do not outlive the page.

        Args:
            settings: those of the page, but for what its fields say.

        Raises:
            ConfigError: options, references or a prompt that make no sense; nothing is changed.
        """
        samples = checked_samples([prompt], settings, self.checkpoint, self.autoencoder)
        kept = tuple(self._keep(reference) for reference in prompt.references)
        work = Work([replace(sample, references=kept) for sample in samples], settings)
        if self._stopping.is_set():
            raise ConfigError("the page is about to close")
        work.begin(self._thread.submit(self._do, work))
        return work

    def stop(self) -> None:
        """End the request that is under way at its next step, drop those that wait."""
        self._stopping.set()
        self._thread.shutdown(cancel_futures=True)

    def _keep(self, reference: Reference) -> Reference:
        source = Path(reference.uri)
        target = self.references / f"{content_hash(reference)}{source.suffix.lower()}"
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            with atomic_path(target) as aside:
                shutil.copyfile(source, aside)
        return Reference(str(target))

    def _do(self, work: Work) -> Sampled:
        known = self.results.known()
        todo = [sample for sample in work.samples if not self.results.is_done(known.get(sample.sample_id))]
        done = Sampled(len(work.samples), len(work.samples) - len(todo))
        if todo:
            estimate(
                work.samples, todo, work.settings, self.checkpoint, self.autoencoder, self.results.folder
            ).check_space()
            self._make(work, todo, known, done)
        return done

    def _make(self, request: Work, todo: list[Sample], known: dict[str, dict[str, Any]], done: Sampled) -> None:
        """Sample by sample: the first is there soon, and nobody waits for many."""
        settings = request.settings
        if settings.prompt.refine or settings.prompt.motion == "auto":
            request.tell(Event("asking the language model", 0, 1))

        def one_after_another(todo: list[Sample], run_id: str) -> None:
            self._worker.settings = settings
            together = settings.work.batch or 1
            at = 0
            for samples in lists_of(todo, together):
                teller = _Teller(request, at, len(todo), settings.sampling.steps, self._stopping)
                made = run_passes(making, samples, together, run_id, self._perform(teller), teller.passes)
                for sample in made:
                    teller.made(sample)
                at += len(samples)

        making = Making(self.results, self.checkpoint, settings, self._store, done)
        recorded(making, todo, known, self.ray, one_after_another)

    def _perform(self, teller: _Teller) -> Perform:
        """Passes by the worker that stays; denoising tells its steps."""

        def perform(name: str, lists: Iterable[list[Sample]]) -> Iterator[tuple[list[Sample], list[Any]]]:
            for samples in lists:
                if name == "denoise":
                    yield samples, self._worker.denoise(samples, teller.step)
                else:
                    yield samples, getattr(self._worker, name)(samples)

        return perform


@dataclass
class _Teller:
    """Says how far a request is: samples from `at` on, of `of`, `steps` each. Ends it when the page is to close."""

    request: Work
    at: int
    of: int
    steps: int
    stopping: threading.Event
    _step: int = 0

    def passes(self, name: str, count: int, of: int) -> None:
        if not count:
            self._say(PASSES[name])

    def step(self, step: int, forwards: int) -> None:
        self._step = step + 1
        self._say(f"step {self._step} of {self.steps}")

    def made(self, sample: Sample) -> None:
        self._say("done", sample)

    def _say(self, text: str, made: Sample | None = None) -> None:
        if self.stopping.is_set():
            raise _Stopped("the page was closed")
        which = f"video {self.at + 1} of {self.of}: " if self.of > 1 else ""
        self.request.tell(Event(which + text, self.at * self.steps + self._step, self.of * self.steps, made))


class _Server(uvicorn.Server):
    """Open pages hold streams that never end: cutting those off at the end is no error to tell of."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)


class _PageGuard(Guard):
    """Writing takes no token here: Gradio's page knows none. That a request comes from our page is checked as
    everywhere."""

    def _refused_write(self, headers: Any) -> tuple[int, str] | None:
        return None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = POLICY
            await send(message)

        await super().__call__(scope, receive, send_with_policy)


def _bind(port: int) -> socket.socket:
    try:
        return socket.create_server((HOST, port))
    except OSError as e:
        raise ConfigError(
            f"cannot serve on {HOST} port {port}: {os.strerror(e.errno or 0)} (--port 0 takes any that is free)"
        ) from e
