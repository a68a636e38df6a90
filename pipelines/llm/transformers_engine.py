"""A model in this process through transformers, one request at a time: runs what vLLM does not know."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from pipelines.llm.chat_messages import one_line, video_metadata
from pipelines.llm.engine import EngineDown, Reply, Request
from pipelines.llm.local_model import LocalModel

BAD_VIDEO = frozenset({"qwen2_vl", "qwen2_5_vl"})
"""Models whose video transformers 5.3 to 5.19 gets wrong: text after a video of more time steps than its picture has
rows or columns gets positions inside the video (`get_rope_index`). They see frames as images here."""


class TransformersEngine:
    """The reference: slow, and with every model that transformers has.

    Raises:
        EngineDown: the model is not there or does not load.
    """

    def __init__(self, options: Mapping[str, Any]):
        self._model = LocalModel(options)
        self._options = options
        self._waiting: deque[Request] = deque()
        self._network: Any = _load(options, self._model)
        self.takes_video = self._model.takes_video and self._network.config.model_type not in BAD_VIDEO
        self._ends = _ends(self._network, self._model)
        self._longest = min(filter(None, (options["max_model_len"], _own_length(self._network))), default=None)

    def add(self, request: Request) -> None:
        self._waiting.append(request)

    def step(self) -> list[Reply]:
        return [self._answer(self._waiting.popleft())] if self._waiting else []

    def close(self) -> None:
        self._network = None

    def _answer(self, request: Request) -> Reply:
        import torch

        try:
            inputs = self._inputs(request)
            room = self._room(inputs["input_ids"].shape[1])
        except Exception as e:  # whatever a model's own processor raises
            return Reply(request.key, error=one_line(e))
        try:
            return self._generate(request.key, inputs, room)
        except torch.OutOfMemoryError as e:
            torch.cuda.empty_cache()
            return Reply(request.key, error=f"out of memory: {one_line(e)}")
        except torch.AcceleratorError as e:  # the device takes no further work
            raise EngineDown(f"model {self._model.folder}: {one_line(e)}") from e
        except Exception as e:  # memory of a CPU that ran out is a RuntimeError
            return Reply(request.key, error=one_line(e))

    def _inputs(self, request: Request):
        """Tensors for the network."""
        if self._model.processor is self._model.tokenizer:
            tokens = self._model.tokenizer([self._model.prompt(request)], return_tensors="pt", add_special_tokens=False)
            return tokens.to(self._network.device)
        pictures: dict[str, Any] = {}
        if request.as_video:
            import numpy as np

            pictures = {
                "videos": [np.stack(request.frames)],
                "video_metadata": [video_metadata(request)],
                "do_sample_frames": False,
            }
        elif len(request.frames):
            from PIL import Image

            pictures = {"images": [[Image.fromarray(frame) for frame in request.frames]]}
        inputs = self._model.processor(
            text=[self._model.prompt(request)],
            **pictures,
            return_tensors="pt",
            add_special_tokens=False,  # the template has put them in
        )
        return inputs.to(self._network.device, dtype=self._network.dtype)

    def _room(self, length: int) -> int:
        """Tokens of answer that a prompt leaves room for.

        Raises:
            ValueError: none.
        """
        if self._longest and length >= self._longest:
            raise ValueError(f"the prompt has {length} tokens, the model takes {self._longest} with the answer")
        return min(
            self._options["max_tokens"], self._longest - length if self._longest else self._options["max_tokens"]
        )

    def _generate(self, key: str, inputs, room: int) -> Reply:
        import torch

        torch.manual_seed(self._options["seed"])
        with torch.inference_mode():
            output = self._network.generate(
                **inputs,
                **_sampling(self._options, self._network),
                max_new_tokens=room,
                eos_token_id=self._ends,
                pad_token_id=self._ends[0] if self._ends else None,
            )
        length = inputs["input_ids"].shape[1]
        tokens = output[0, length:].tolist()
        finish = "stop" if tokens and tokens[-1] in self._ends else "length"
        text = self._model.tokenizer.decode(tokens, skip_special_tokens=True).rstrip(
            "\ufffd"
        )  # half a character, as vLLM leaves it out
        return Reply(key, text=text, input_tokens=length, output_tokens=len(tokens), finish=finish)


def _load(options: Mapping[str, Any], model: LocalModel) -> Any:
    """The network, ready to generate, on the GPU if there is one."""
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

        on_gpu = torch.cuda.is_available()
        if not on_gpu:
            torch.set_num_threads(options["threads"])
        sees = type(AutoConfig.from_pretrained(model.folder)) in AutoModelForImageTextToText._model_mapping
        auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        network: Any = auto.from_pretrained(model.folder, dtype=options["dtype"])
        return network.to("cuda" if on_gpu else "cpu").eval()
    except Exception as e:  # missing files, unknown architecture, too little memory …
        raise EngineDown(f"transformers cannot load model {model.folder}: {one_line(e)}") from e


def _ends(network, model: LocalModel) -> list[int]:
    """Tokens that end an answer: those of the generation config and the tokenizer's, as in vLLM."""
    own = network.generation_config.eos_token_id
    own = [own] if isinstance(own, int) else list(own or ())
    return list(dict.fromkeys([*own, *filter(lambda token: token is not None, [model.tokenizer.eos_token_id])]))


def _own_length(network) -> int | None:
    return getattr(network.config.get_text_config(), "max_position_embeddings", None)


def _sampling(options: Mapping[str, Any], network) -> dict[str, Any]:
    """Ours; what it does not say (repetition penalty …) is the model's generation config's."""
    if options["temperature"] == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    top_k = network.generation_config.top_k or 0  # transformers' own default would be 50
    return {"do_sample": True, "temperature": options["temperature"], "top_p": options["top_p"], "top_k": top_k}
