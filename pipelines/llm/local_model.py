"""A model's folder, as the backends that run models in this process read it: checks, chat template, what it sees."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.llm.chat_messages import conversation, one_line
from pipelines.llm.engine import EngineDown, Request


class LocalModel:
    """Tokenizer, processor and chat template of a model.

    Attributes:
        processor: of transformers; the tokenizer where the model takes text only.
        takes_pictures, takes_video: what its template and processor know.

    Raises:
        EngineDown: not a model's folder, no chat template, or asked to look at frames and cannot.
    """

    def __init__(self, options: Mapping[str, Any]):
        self.folder = _checked_folder(options)
        from transformers import AutoProcessor
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            self.processor = AutoProcessor.from_pretrained(self.folder)
        except Exception as e:  # transformers raises whatever its parts do
            raise EngineDown(f"model {self.folder}: its processor or tokenizer does not load: {one_line(e)}") from e
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        self._templated = self.processor if getattr(self.processor, "chat_template", None) else self.tokenizer
        if not getattr(self._templated, "chat_template", None):
            raise EngineDown(
                f"model {self.folder} has no chat template: a model tuned to follow instructions is needed"
            )
        self.takes_pictures = self._shows("image")
        self.takes_video = getattr(self.processor, "video_processor", None) is not None and self._shows("video")
        if options.get("frames") and not self.takes_pictures:
            raise EngineDown(f"model {self.folder} takes text only; choose one that takes pictures")

    def prompt(self, request: Request) -> str:
        """The text that the model continues, with one placeholder per picture or video."""
        pictures = [{"type": "video"}] if request.as_video else [{"type": "image"} for _ in request.frames]
        return self._render(conversation(request, pictures, in_parts=self.processor is not self.tokenizer))

    def _shows(self, kind: str) -> bool:
        """Whether the template leaves a trace of a picture or a video."""
        if self.processor is self.tokenizer:
            return False
        text = {"type": "text", "text": "text"}
        try:
            shown = self._render([{"role": "user", "content": [{"type": kind}, text]}])
        except Exception:  # jinja's TemplateError: the template refuses what it does not know
            return False
        return shown != self._render([{"role": "user", "content": [text]}])

    def _render(self, messages: list[dict[str, Any]]) -> str:
        return self._templated.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _checked_folder(options: Mapping[str, Any]) -> str:
    """Checked before the libraries are imported, which takes longer than any of their answers should."""
    model = options["model"]
    if not model:
        raise EngineDown(f"backend {options['backend']} needs a model: a folder, or a name that `datakit models` knows")
    if not Path(model).is_dir():
        raise EngineDown(f"model {model}: no such folder")
    if not (Path(model) / "config.json").is_file():
        raise EngineDown(f"model {model}: no config.json in this folder")
    return str(model)
