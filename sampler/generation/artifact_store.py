"""What passes leave for each other: texts, conditions and latents in files under a folder, each written whole or not at
all.

A file's name says what it holds (a hash of all that decides it), so that what is there need not be made again, whoever
made it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from datakit.atomic import atomic_path
from datakit.hashing import hash_hex

Kind = Literal["texts", "given", "latents"]
KINDS: tuple[Kind, ...] = ("texts", "given", "latents")


def key_of(*parts: Any) -> str:
    """32 hex digits of values that JSON can say."""
    return hash_hex(json.dumps(parts, sort_keys=True, ensure_ascii=False), 16, "datakit-sample")


class Store:
    """Files `root/KIND/KEY.safetensors`. Any number of processes may write; the last one's file counts, and all are
    equal."""

    def __init__(self, root: str | Path):
        self.root = Path(root)

    def has(self, kind: Kind, key: str) -> bool:
        return self._path(kind, key).exists()

    def put(self, kind: Kind, key: str, tensors: dict[str, Tensor]) -> None:
        from safetensors.torch import save_file

        path = self._path(kind, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as aside:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, aside)

    def get(self, kind: Kind, key: str) -> dict[str, Tensor]:
        """On the CPU."""
        from safetensors.torch import load_file

        return load_file(self._path(kind, key))

    def drop(self, kind: Kind, key: str) -> None:
        self._path(kind, key).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove everything, with what a killed process has left half-written."""
        for path in self._files():
            path.unlink(missing_ok=True)
        for folder in (*(self.root / kind for kind in KINDS), self.root):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def _files(self) -> Iterator[Path]:
        for kind in KINDS:
            yield from (self.root / kind).glob("*.safetensors")
            yield from (self.root / kind).glob(".*.safetensors")

    def _path(self, kind: Kind, key: str) -> Path:
        return self.root / kind / f"{key}.safetensors"
