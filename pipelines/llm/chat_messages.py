"""What a request says, in the forms that chat templates and endpoints take; and errors in one line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pipelines.llm.engine import Request

CLOCK_HZ = 1000
"""Frame numbers of a clip are told to models as milliseconds, so that any times can be said exactly."""


def conversation(
    request: Request, pictures: Sequence[dict[str, Any]] = (), in_parts: bool = False
) -> list[dict[str, Any]]:
    """The messages: system, the question (pictures first, as the models were trained), what was said since.

    Args:
        pictures: the content parts that stand for the frames.
        in_parts: say texts as lists of parts too (some processors' templates know nothing else).
    """

    def content(text: str, before: Sequence[dict[str, Any]] = ()) -> str | list[dict[str, Any]]:
        return [*before, {"type": "text", "text": text}] if before or in_parts else text

    messages = [{"role": "system", "content": content(request.system)}] if request.system else []
    messages.append({"role": "user", "content": content(request.prompt, pictures)})
    return messages + [{"role": role, "content": content(text)} for role, text in request.turns]


def video_metadata(request: Request) -> dict[str, Any]:
    """The frames as samples of a video, as transformers' `VideoMetadata` says it.

    Models read two things out of it, which both come out right: the time of each frame (`frames_indices / fps`:
    Qwen3-VL) and the rate of the samples (`len(frames_indices) / total_num_frames * fps`: Qwen2.5-VL).
    """
    ticks = [round(time * CLOCK_HZ) for time in request.times]
    total = max(round(request.duration_s * CLOCK_HZ), ticks[-1] + 1)
    return {
        "fps": float(CLOCK_HZ),
        "duration": total / CLOCK_HZ,
        "total_num_frames": total,
        "frames_indices": ticks,
        "video_backend": "opencv",
    }


def one_line(error: object, most: int = 300) -> str:
    """What an error says, on one line: the cause first, without pydantic's frame around it."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    framed = re.search(r"Value error, (.*?)( \[type=|$)", text)
    text = (framed.group(1) if framed else text) or type(error).__name__
    return text if len(text) <= most else text[: most - 2] + " …"
