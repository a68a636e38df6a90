"""What of each parameter a rank holds, and files of it that any number of ranks can put together again.

A parameter has a name, a shape and float32 values. Tensor parallelism cuts it along a dimension; of what is left,
flattened, a rank holds a slice (ZeRO) or everything. A file has, for one rank, its slices of the master weights, of
Adam's moments and of the EMA.

torch.distributed.checkpoint stores boxes of a tensor (offsets and sizes): a flat slice of rows that were cut out of
several sections, which is what ZeRO with tensor parallelism leaves to a rank, is none.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from datakit.atomic import atomic_path, sync
from datakit.errors import ConfigError

FORMAT = 1
CHUNK = 1 << 24


@dataclass(frozen=True)
class Cut:
    """Of a parameter: the indices along one dimension, as half-open ranges, that are kept."""

    dim: int
    ranges: tuple[tuple[int, int], ...]

    def take(self, whole: Tensor) -> Tensor:
        return torch.cat([whole.narrow(self.dim, a, b - a) for a, b in self.ranges], self.dim)

    def put(self, part: Tensor, whole: Tensor) -> None:
        for piece, (a, b) in zip(part.split([b - a for a, b in self.ranges], self.dim), self.ranges):
            whole.narrow(self.dim, a, b - a).copy_(piece)

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        kept = list(whole)
        kept[self.dim] = sum(b - a for a, b in self.ranges)
        return tuple(kept)


@dataclass(frozen=True)
class Piece:
    """A rank's part of a parameter.

    Attributes:
        shape: of the whole parameter.
        cut: by tensor parallelism; None: not cut.
        start, stop: of the cut parameter, flattened: what this rank holds.
        owned: which of that this rank writes and averages, so that every value is some rank's, once.
        tensors: gives master weights and Adam's moments, [stop - start] float32, as they are kept: to read and to
            write.
    """

    name: str
    shape: tuple[int, ...]
    cut: Cut | None
    start: int
    stop: int
    owned: tuple[int, int]
    tensors: Callable[[], dict[str, Tensor]]

    def own(self, tensor: Tensor) -> Tensor:
        """Of a tensor of what is held, what is owned."""
        return tensor[self.owned[0] - self.start : self.owned[1] - self.start]


def share(start: int, stop: int, index: int, count: int) -> tuple[int, int]:
    """The index-th of so many nearly equal parts of a range."""
    size = stop - start
    return start + size * index // count, start + size * (index + 1) // count


def shard_file(rank: int, world: int) -> str:
    return f"shard-{rank:05d}-of-{world:05d}.safetensors"


def describe(pieces: Iterable[Piece], parameters: Mapping[str, Sequence[int]], updates: int) -> dict[str, str]:
    """Metadata of a rank's file."""
    held = {
        p.name: {"cut": [p.cut.dim, p.cut.ranges] if p.cut else None, "start": p.owned[0], "stop": p.owned[1]}
        for p in pieces
    }
    shapes = {name: list(shape) for name, shape in parameters.items()}
    return {"about": json.dumps({"format": FORMAT, "updates": updates, "parameters": shapes, "pieces": held})}


def write_shard(path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Write a rank's file, then beside it, when it is on the disk, its size and checksum."""
    save_file(tensors, path, about)
    sync(path)
    write_json(path.with_suffix(".json"), {"bytes": path.stat().st_size, "crc32": checksum(path)})


def write_json(path: Path, value: Any) -> None:
    """Atomic: whoever sees the file sees all of it."""
    with atomic_path(path, durable=True) as partial:
        partial.write_text(json.dumps(value, indent=1))


def checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def check_shard(path: Path) -> None:
    """Raises ConfigError where a file is not what was written."""
    try:
        expected = json.loads(path.with_suffix(".json").read_text())
        if path.stat().st_size != expected["bytes"]:
            raise ConfigError(
                f"{path} is damaged: {path.stat().st_size} bytes of {expected['bytes']}; resume from another checkpoint"
            )
        if checksum(path) != expected["crc32"]:
            raise ConfigError(f"{path} is damaged: its checksum is not the one written; resume from another checkpoint")
    except (OSError, ValueError, KeyError) as e:
        raise ConfigError(f"{path} is damaged: {e}; resume from another checkpoint") from e


@dataclass(frozen=True)
class _Stored:
    file: int
    cut: Cut | None
    start: int
    stop: int


class Shards:
    """A folder of all ranks' files, read piece by piece; a file is opened when something of it is asked for."""

    def __init__(self, folder: Path):
        """Raises ConfigError: no files there, some missing, or not readable."""
        self.folder = folder
        self.files = find_shards(folder)
        self._open: dict[int, Any] = {}
        self._pieces: dict[str, list[_Stored]] = {}
        for index, path in enumerate(self.files):
            about = self._about(index)
            if about.get("format") != FORMAT:
                raise ConfigError(f"{path} has format {about.get('format')}, this version reads {FORMAT}")
            self.updates, self.parameters = (
                about["updates"],
                {name: tuple(shape) for name, shape in about["parameters"].items()},
            )
            for name, p in about["pieces"].items():
                cut = Cut(p["cut"][0], tuple((a, b) for a, b in p["cut"][1])) if p["cut"] else None
                self._pieces.setdefault(name, []).append(_Stored(index, cut, p["start"], p["stop"]))

    def check_model(self, parameters: Mapping[str, Sequence[int]]) -> None:
        """Raises ConfigError, naming some, where the parameters are others or have other shapes."""
        wanted = {name: tuple(shape) for name, shape in parameters.items()}
        differences = [f"{name} is not in it" for name in wanted if name not in self.parameters]
        differences += [f"{name} is not in the model" for name in self.parameters if name not in wanted]
        differences += [
            f"{name} is {list(self.parameters[name])} in it and {list(shape)} in the model"
            for name, shape in wanted.items()
            if self.parameters.get(name, shape) != shape
        ]
        if differences:
            rest = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
            what = f"{'; '.join(differences[:3])}{rest}"
            raise ConfigError(
                f"{self.folder} is a checkpoint of another model (or of other trained parameters): {what}"
            )

    def has(self, kind: str) -> bool:
        return any(
            f"{kind}/{name}" in self._file(s.file).keys() for name, stored in self._pieces.items() for s in stored[:1]
        )

    def read(self, kind: str, piece: Piece, start: int, stop: int) -> Tensor:
        """Values start to stop of a parameter cut as the piece is; [stop - start] float32.

        Raises:
            ConfigError: not all of them are in the files.
        """
        stored = self._pieces.get(piece.name, [])
        if all(s.cut == piece.cut for s in stored):
            return self._join(kind, piece.name, stored, start, stop)
        whole = torch.empty(piece.shape)
        for cut in {s.cut for s in stored}:
            shape = cut.shape(piece.shape) if cut else piece.shape
            part = self._join(kind, piece.name, [s for s in stored if s.cut == cut], 0, prod(shape)).view(shape)
            cut.put(part, whole) if cut else whole.copy_(part)
        return (piece.cut.take(whole) if piece.cut else whole).flatten()[start:stop].clone()

    def buffer(self, name: str) -> Tensor:
        """Raises ConfigError: there is none."""
        try:
            return self._file(0).get_tensor(f"buffer/{name}")
        except SafetensorError as e:
            raise ConfigError(f"{self.files[0]} has no buffer {name}: it is of another model") from e

    def _join(self, kind: str, name: str, stored: list[_Stored], start: int, stop: int) -> Tensor:
        values, reached = torch.empty(stop - start), start
        for s in sorted(stored, key=lambda s: s.start):
            a, b = max(start, s.start), min(stop, s.stop)
            if a < b and a <= reached:
                try:
                    values[a - start : b - start] = self._file(s.file).get_slice(f"{kind}/{name}")[
                        a - s.start : b - s.start
                    ]
                except SafetensorError as e:
                    raise ConfigError(f"{self.files[s.file]} has no {kind} of {name}: {e}") from e
                reached = max(reached, b)
        if reached < stop:
            raise ConfigError(
                f"{self.folder} lacks values {reached} to {stop} of {name}: its files do not belong together"
            )
        return values

    def _file(self, index: int):
        if index not in self._open:
            try:
                self._open[index] = safe_open(self.files[index], "pt")
            except (OSError, SafetensorError) as e:
                raise ConfigError(f"{self.files[index]} is damaged: {e}; resume from another checkpoint") from e
        return self._open[index]

    def _about(self, index: int) -> dict[str, Any]:
        metadata = self._file(index).metadata() or {}
        if "about" not in metadata:
            raise ConfigError(f"{self.files[index]} is not a checkpoint of this trainer")
        return json.loads(metadata["about"])


def find_shards(folder: Path) -> list[Path]:
    """The files of all ranks, in order. Raises ConfigError: there are none, or some are missing."""
    found = sorted(folder.glob("shard-*-of-*.safetensors"))
    if not found:
        raise ConfigError(f"{folder} has no checkpoint in it")
    world = int(found[0].stem.rpartition("-")[2])
    wanted = [folder / shard_file(rank, world) for rank in range(world)]
    for path in wanted:
        if not path.exists():
            raise ConfigError(f"{path} is missing; resume from another checkpoint")
    return wanted
