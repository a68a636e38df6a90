"""A row of somebody's data set: a file, and what is said of it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from datakit.errors import MediaError
from datakit.video.uri import is_remote, local_path


@dataclass(frozen=True)
class Row:
    """Args:
    address: absolute path or URL of the file.
    where: file and line, for messages.
    text: its caption.
    columns: everything else that the row says.
    ours: our names mean what they mean here: datakit exported the row.
    problem: why there is no file.
    """

    address: str
    where: str
    text: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    ours: bool = False
    problem: MediaError | None = None


def address(path: str, base: str) -> str:
    """A path or URL; relative ones start from `base`."""
    if is_remote(path):
        return path
    return os.path.normpath(os.path.join(os.path.abspath(base), local_path(path)))
