"""Weights in files: read from wherever they lie on this machine, loaded with nothing left out in silence, saved whole
or not at all."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from datakit.atomic import atomic_path, sync
from datakit.errors import ConfigError, DatakitError
from datakit.weights.registry import DEFAULT_FOLDER, locate

Shape = tuple[int, ...]

SAFETENSORS = ".safetensors"
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
INDEX_SUFFIX = ".index.json"
INDEX = "model.safetensors.index.json"
"""Names of shards and of their index are those of Hugging Face's libraries, which read such a folder too."""
SHARD = re.compile(r".*-\d{5}-of-\d{5}\.\w+")
SHOWN = 8
"""So many keys of a kind are in the message of an error; all of them are on the exception."""


class WeightsError(ConfigError):
    """Weights that do not fit a model. Its text shows the first keys of each kind and says how many there are.

    Attributes:
        missing: name to shape of what the model has and the weights have not; unexpected: the other way round.
        mismatched: name to (shape found, shape wanted).
    """

    def __init__(
        self,
        what: str,
        missing: Mapping[str, Shape],
        unexpected: Mapping[str, Shape],
        mismatched: Mapping[str, tuple[Shape, Shape]],
    ):
        self.what, self.missing, self.unexpected, self.mismatched = (
            what,
            dict(missing),
            dict(unexpected),
            dict(mismatched),
        )
        kinds = [
            _some("missing", [f"{name} {_sizes(shape)}" for name, shape in missing.items()]),
            _some("unexpected", [f"{name} {_sizes(shape)}" for name, shape in unexpected.items()]),
            _some(
                "of another shape",
                [f"{name} {_sizes(found)}, wanted {_sizes(wanted)}" for name, (found, wanted) in mismatched.items()],
            ),
        ]
        super().__init__(f"{what}: " + "; ".join(filter(None, kinds)))

    def __reduce__(self):  # crosses process boundaries
        return WeightsError, (self.what, self.missing, self.unexpected, self.mismatched)


def read_weights(
    source: str | Path, dtype: torch.dtype | None = None, folder: str | Path = DEFAULT_FOLDER
) -> dict[str, Tensor]:
    """Tensors by name, on the CPU. Those of safetensors files are views of the file (pages are read when they are used,
    and writing to a tensor does not change the file), so reading takes next to no memory, unless `dtype` asks for
    copies.

    Args:
        source: a .safetensors file; a .pt, .pth, .bin or .ckpt file of tensors (nothing in it is executed); a folder
            with an index of shards or one file of weights; a name that `datakit models list` knows, or a Hugging Face
            id `org/name` or `org/name:file`, which is looked for in `folder` and in Hugging Face's cache. Nothing is
            downloaded.
        dtype: of floating-point tensors; None leaves them as they are.

    Raises:
        MissingDependency: weights that are not on this machine, with the way to bring them.
        ConfigError: what is there is damaged, incomplete, ambiguous or holds no state dict.
    """
    place = find_weights(source, folder)
    state: dict[str, Tensor] = {}
    for file, names in _files(place).items():
        state.update(_read(file, names))
    if not state:
        raise ConfigError(f"{place} holds no tensors")
    return {name: cast(tensor, dtype) for name, tensor in state.items()}


def read_metadata(source: str | Path, folder: str | Path = DEFAULT_FOLDER) -> dict[str, str]:
    """What a safetensors file, or the first of the shards, says of itself; {} for other files. Raises as
    `read_weights`."""
    file = next(iter(_files(find_weights(source, folder))))
    if file.suffix != SAFETENSORS:
        return {}
    with _opened(file) as opened:
        return dict(opened.metadata() or {})


def find_weights(source: str | Path, folder: str | Path = DEFAULT_FOLDER) -> Path:
    """The file or folder that a source names. Raises as `read_weights`."""
    named = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*):(.+)", str(source))
    if named is None or Path(source).exists():
        return locate(str(source), folder)
    home = locate(named[1], folder)
    file = (home.parent if home.is_file() else home) / named[2]
    if not file.exists():
        raise ConfigError(f"{named[1]} is at {home}, but holds no {named[2]}")
    return file


def load_weights(
    model: nn.Module,
    source: str | Path | Mapping[str, Tensor],
    rename: Callable[[str], str] | None = None,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    folder: str | Path = DEFAULT_FOLDER,
) -> None:
    """Give a model all of its weights, or change nothing.

    A model on the meta device takes the tensors themselves (no second copy; it then shares them with `source`), with
    their dtype or `dtype`; any other keeps its device and dtype, and values are copied.

    Args:
        source: see `read_weights`, or the tensors.
        rename: a name in the source to the name in the model.
        allow_missing, allow_unexpected: patterns (`guidance_in.*`) of names that may be so. What is missing keeps its
            value; so nothing may be missing from a model on the meta device, which has none.
        dtype: of floating-point weights of a model on the meta device.

    Raises:
        WeightsError: every other missing or unexpected key and every other shape.
        MissingDependency, ConfigError: see `read_weights`.
    """
    given = isinstance(source, Mapping)
    state = _renamed(source if given else read_weights(source, folder=folder), rename)
    what = f"weights{'' if given else f' in {source}'} do not fit {type(model).__name__}"
    values = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    on_meta = any(tensor.is_meta for tensor in values.values())
    check_weights(values, state, what, () if on_meta else allow_missing, allow_unexpected)
    fitting = {name: cast(state[name], dtype) if on_meta else state[name] for name in values if name in state}
    model.load_state_dict(fitting, strict=False, assign=on_meta)


def check_weights(
    wanted: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    what: str,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> None:
    """Raises:
    WeightsError: names or shapes of `state` that are not those `wanted`.
    """
    missing = {n: tuple(t.shape) for n, t in wanted.items() if n not in state and not _matches(n, allow_missing)}
    unexpected = {n: tuple(t.shape) for n, t in state.items() if n not in wanted and not _matches(n, allow_unexpected)}
    mismatched = {
        n: (tuple(state[n].shape), tuple(t.shape))
        for n, t in wanted.items()
        if n in state and state[n].shape != t.shape
    }
    if missing or unexpected or mismatched:
        raise WeightsError(what, missing, unexpected, mismatched)


def save_weights(
    state: Mapping[str, Tensor],
    path: str | Path,
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int | None = None,
) -> None:
    """Write safetensors: aside, then on disk for certain (fsync), then under their name; so a reader meets the old
    weights or the new ones, or, while the shards of an older set are replaced, an error, but never some of each.

    Args:
        state: dense tensors on any device.
        path: of the file, `.safetensors`; with `shard_bytes`, of a folder.
        metadata: strings, kept in every file.
        shard_bytes: most bytes of tensors in a file (a larger tensor has a file of its own); the folder gets
            model-00001-of-0000N.safetensors and an index.

    Raises:
        ConfigError: a path that does not fit, tensors without values.
        DatakitError: the disk does not take them.
    """
    path = Path(path)
    if (path.suffix == SAFETENSORS) != (shard_bytes is None):
        raise ConfigError(
            f"cannot save weights as {path}: one file has the suffix {SAFETENSORS}, shards go into a folder"
        )
    if without := [name for name, tensor in state.items() if tensor.is_meta]:
        raise ConfigError(f"cannot save {path}: {_some('without values', without)}")
    about = {"format": "pt", **(metadata or {})}
    ready = _separate(state)
    try:
        if shard_bytes is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path, durable=True) as aside:
                save_file(ready, aside, about)
        else:
            _save_shards(ready, path, about, shard_bytes)
    except (OSError, SafetensorError) as e:
        raise DatakitError(f"cannot write {path}: {_line(e)}") from e


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """In another dtype, if there is one and the tensor is of floating-point numbers."""
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def _files(place: Path) -> dict[Path, list[str] | None]:
    """Files that hold weights, and which names to take from each (None: all)."""
    if place.is_file():
        return _indexed(place) if place.name.endswith(INDEX_SUFFIX) else {place: None}
    files = sorted(f for f in place.iterdir() if f.is_file() and not f.name.startswith("."))
    indices = [f for f in files if f.name.endswith(INDEX_SUFFIX)]
    for kind in ((SAFETENSORS,), TORCH_SUFFIXES):
        of_kind = [f for f in files if f.suffix in kind]
        index = [i for i in indices if Path(i.name.removesuffix(INDEX_SUFFIX)).suffix in kind]
        found = index or [f for f in of_kind if not SHARD.fullmatch(f.name)]
        if len(found) == 1:
            return _files(found[0])
        if found:
            raise ConfigError(
                f"{place} holds several weights ({', '.join(f.name for f in found[:SHOWN])}): give the path of one "
                f"of them"
            )
        if of_kind:
            raise ConfigError(
                f"{place} holds shards ({of_kind[0].name} …) without their index: it was not written to the end"
            )
    raise ConfigError(f"{place} holds no weights: no {SAFETENSORS}, {', '.join(TORCH_SUFFIXES)}, and no {INDEX}")


def _indexed(index: Path) -> dict[Path, list[str] | None]:
    try:
        names = dict(json.loads(index.read_text())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"{index} is not a readable index of shards ({_line(e)})") from e
    shards: dict[Path, list[str] | None] = {}
    for name, file in sorted(names.items(), key=lambda item: str(item[1])):
        shards.setdefault(index.parent / file, []).append(name)
    if gone := [shard.name for shard in shards if not shard.is_file()]:
        raise ConfigError(f"{index} names shards that are not there: {_some('missing', gone)}")
    return shards


def _read(file: Path, names: list[str] | None) -> dict[str, Tensor]:
    state = _read_safetensors(file) if file.suffix == SAFETENSORS else _read_torch(file)
    if names is None:
        return state
    if lost := [name for name in names if name not in state]:
        raise ConfigError(f"{file} does not hold what its index says: {_some('missing', lost)}")
    return {name: state[name] for name in names}


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    with _opened(file) as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}


def _opened(file: Path):
    try:
        return safe_open(file, "pt")
    except (OSError, SafetensorError) as e:
        raise ConfigError(f"{file} cannot be read as safetensors, it is damaged or not whole ({_line(e)})") from e


def _read_torch(file: Path) -> dict[str, Tensor]:
    """A state dict that torch saved, bare or under `state_dict`. Old files (before 1.6) cannot be mapped and are read
    whole."""
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as e:
        raise ConfigError(
            f"{file} holds more than tensors (reading that could run code: convert it where you trust it), or damage"
        ) from e
    except Exception as e:  # a damaged pickle raises whatever its bytes lead to
        raise ConfigError(f"{file} cannot be read as a file of torch's, it is damaged or not whole ({_line(e)})") from e
    state = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else None
    if state is None or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()):
        held = (
            f"under {', '.join(map(str, list(loaded)[:SHOWN]))}"
            if isinstance(loaded, Mapping)
            else f"a {type(loaded).__name__}"
        )
        raise ConfigError(f"{file} is no state dict: it holds {held}; save the tensors by name alone")
    return dict(state)


def _renamed(state: Mapping[str, Tensor], rename: Callable[[str], str] | None) -> Mapping[str, Tensor]:
    if rename is None:
        return state
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if (new := rename(name)) in renamed:
            raise ConfigError(f"renaming gives two weights the name {new}, the second of them {name}")
        renamed[new] = tensor
    return renamed


def _separate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As safetensors takes them: contiguous, and no two with the same memory."""
    ready: dict[str, Tensor] = {}
    taken: dict[tuple[torch.device, int], list[tuple[int, int]]] = {}
    for name, tensor in state.items():
        tensor = tensor.detach().contiguous()
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        others = taken.setdefault((tensor.device, tensor.untyped_storage().data_ptr()), [])
        shared = any(start < to and since < end for since, to in others)
        ready[name] = tensor.clone() if shared else tensor
        others.append((start, end))
    return ready


def _save_shards(state: dict[str, Tensor], folder: Path, about: dict[str, str], shard_bytes: int) -> None:
    """The old index goes before the first new shard is in place, the new one comes last: no index ever names shards of
    two sets."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(state, shard_bytes)
    names = [f"model-{i:05d}-of-{len(shards):05d}{SAFETENSORS}" for i in range(1, len(shards) + 1)]
    with ExitStack() as files:
        for name, shard in zip(names, shards):
            file = files.enter_context(atomic_path(folder / name, durable=True))
            save_file(shard, file, about)
            sync(file)
        (folder / INDEX).unlink(missing_ok=True)
        sync(folder)
    size = sum(tensor.nbytes for tensor in state.values())
    index = {
        "metadata": {**about, "total_size": size},
        "weight_map": {key: name for name, shard in zip(names, shards) for key in shard},
    }
    with atomic_path(folder / INDEX, durable=True) as file:
        file.write_text(json.dumps(index, indent=2))
    for old in folder.glob(f"model-*{SAFETENSORS}"):
        if SHARD.fullmatch(old.name) and old.name not in names:
            old.unlink()


def _shards(state: dict[str, Tensor], most: int) -> list[dict[str, Tensor]]:
    shards, size = [{}], 0
    for name, tensor in state.items():
        if shards[-1] and size + tensor.nbytes > most:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _some(kind: str, entries: list[str]) -> str:
    if not entries:
        return ""
    more = f", and {len(entries) - SHOWN:,} more" if len(entries) > SHOWN else ""
    return f"{len(entries):,} {kind} ({', '.join(entries[:SHOWN])}{more})"


def _sizes(shape: Shape) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
