"""vLLM in this process: requests of all clips share its batches, joining and leaving at every step."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from pipelines.llm.chat_messages import one_line, video_metadata
from pipelines.llm.engine import EngineDown, Reply, Request
from pipelines.llm.local_model import LocalModel

STEP_S = 1.0
FEED_S = 0.5
"""Longest time for preparing requests before the model goes on."""
CPU_CACHE_GB = 1.0
GIB = 2**30


class VllmEngine:
    """Continuous batching through vLLM's own engine. Made, used and closed in one thread, any thread.

    Raises:
        EngineDown: the model is not there, is not one for vLLM, or does not fit.
    """

    def __init__(self, options: Mapping[str, Any]):
        _prepare_process(options)
        self._model = LocalModel(options)
        self.takes_video = self._model.takes_video
        self._seats = options["max_num_seqs"]
        self._waiting: deque[Request] = deque()
        self._running: set[str] = set()
        self._llm: Any = _start(options, self._model)
        self._sampling = self._sampling_params(options)

    def add(self, request: Request) -> None:
        self._waiting.append(request)

    def step(self) -> list[Reply]:
        deadline = time.monotonic() + STEP_S
        replies = self._feed()
        while self._running and not replies and time.monotonic() < deadline:
            replies = self._advance() + self._feed()
        return replies

    def close(self) -> None:
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None

    def _feed(self) -> list[Reply]:
        """Hand requests to vLLM while it has seats; no more, since prepared pictures take much memory.

        Returns:
            Replies to the requests that it refused.
        """
        refused = []
        deadline = time.monotonic() + FEED_S
        while self._waiting and len(self._running) < self._seats and time.monotonic() < deadline:
            request = self._waiting.popleft()
            try:
                self._llm.llm_engine.add_request(
                    request.key,
                    self._prompt(request),
                    self._sampling.clone(),
                    tokenization_kwargs={"add_special_tokens": False},  # the template has put them in
                )
                self._running.add(request.key)
            except Exception as e:  # ValueError, or whatever the model's own processor raises
                if _is_fatal(e):
                    raise self._down(e) from e
                refused.append(Reply(request.key, error=one_line(e)))
        return refused

    def _advance(self) -> list[Reply]:
        """One step of the model: one token, or a piece of prompt, for every running request."""
        try:
            outputs = self._llm.llm_engine.step()
        except Exception as e:  # whatever it is, the state of the batch is lost
            raise self._down(e) from e
        finished = [output for output in outputs if output.finished]
        self._running.difference_update(output.request_id for output in finished)
        return [_reply(output) for output in finished]

    def _prompt(self, request: Request) -> dict[str, Any]:
        prompt: dict[str, Any] = {"prompt": self._model.prompt(request)}
        if request.as_video:
            import numpy as np

            metadata = {**video_metadata(request), "do_sample_frames": False}
            prompt["multi_modal_data"] = {"video": [(np.stack(request.frames), metadata)]}
        elif len(request.frames):
            from PIL import Image

            prompt["multi_modal_data"] = {"image": [Image.fromarray(frame) for frame in request.frames]}
        return prompt

    def _sampling_params(self, options: Mapping[str, Any]):
        """Ours, on top of what the model's folder asks for (repetition penalty …), as vLLM's server has it."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        own = self._llm.model_config.get_diff_sampling_param()
        ours = {name: options[name] for name in ("temperature", "top_p", "max_tokens", "seed")}
        return SamplingParams(**{**own, **ours}, output_kind=RequestOutputKind.FINAL_ONLY)

    def _down(self, error: Exception) -> EngineDown:
        return EngineDown(f"vLLM with model {self._model.folder} broke down: {type(error).__name__}: {one_line(error)}")


def _prepare_process(options: Mapping[str, Any]) -> None:
    """Environment that torch and vLLM read when they are imported."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # a killed actor then leaves no process behind that holds a GPU
    os.environ["OMP_NUM_THREADS"] = str(options["threads"])
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if options["tensor_parallel"] > 1:  # workers beside a thread, and maybe beside CUDA, must not be forked
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")


def _start(options: Mapping[str, Any], model: LocalModel):
    """The `vllm.LLM`."""
    try:
        import torch
        from vllm import LLM
        from vllm.platforms import current_platform

        on_cpu = current_platform.is_cpu()
        if on_cpu:
            torch.set_num_threads(options["threads"])  # where torch was imported before us
        return LLM(**_arguments(options, model, on_cpu))
    except Exception as e:
        raise EngineDown(f"vLLM cannot start with model {model.folder}: {_in_our_words(one_line(e))}") from e


def _arguments(options: Mapping[str, Any], model: LocalModel, on_cpu: bool) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "model": model.folder,
        "dtype": options["dtype"],
        "seed": options["seed"],
        "max_num_seqs": options["max_num_seqs"],
        "max_model_len": options["max_model_len"] or -1,  # -1: the model's own, or what the cache has room for
        "limit_mm_per_prompt": _limits(options, model),
        "mm_processor_cache_gb": 0,  # no picture comes twice
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if options["tensor_parallel"] > 1:  # vLLM's own worker processes, also where it would find a placement group of Ray
        arguments |= {"tensor_parallel_size": options["tensor_parallel"], "distributed_executor_backend": "mp"}
    cache_gb = options["kv_cache_gb"]
    if on_cpu:  # without a size vLLM wants 92 % of the memory; without eager, a compiler
        return arguments | {"enforce_eager": True, "kv_cache_memory_bytes": int((cache_gb or CPU_CACHE_GB) * GIB)}
    arguments |= {"gpu_memory_utilization": options["gpu_memory"], "enforce_eager": not options["compile"]}
    return arguments | ({"kv_cache_memory_bytes": int(cache_gb * GIB)} if cache_gb else {})


def _limits(options: Mapping[str, Any], model: LocalModel) -> dict[str, Any]:
    """Most pictures per request, with their size: vLLM sets memory aside for the largest ones it may get."""
    if not model.takes_pictures:
        return {}
    frames, side = options.get("frames", 0), options.get("side", 0)
    limits: dict[str, Any] = {"image": {"count": frames, "width": side, "height": side} if frames else 0}
    if model.takes_video:
        limits["video"] = {"count": 1, "num_frames": frames, "width": side, "height": side} if frames else 0
    return limits


def _in_our_words(problem: str) -> str:
    """vLLM's advice names options of its own."""
    problem = problem.replace("--kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE,", "kv_cache_gb")
    if "KV cache" not in problem:
        return problem
    return (
        problem.split(" Try increasing")[0].rstrip(". ")
        + ". Raise kv_cache_gb (on a GPU also gpu_memory) or lower max_model_len"
    )


def _is_fatal(error: Exception) -> bool:
    from vllm.v1.engine.exceptions import EngineDeadError

    return isinstance(error, (EngineDeadError, MemoryError))


def _reply(output) -> Reply:
    answer = output.outputs[0]
    if answer.finish_reason not in ("stop", "length"):
        return Reply(output.request_id, error=f"vLLM ended it: {answer.finish_reason}")
    return Reply(
        output.request_id,
        text=answer.text,
        input_tokens=len(output.prompt_token_ids or ()),
        output_tokens=len(answer.token_ids),
        finish=answer.finish_reason,
    )
