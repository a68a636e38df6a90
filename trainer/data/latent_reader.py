"""Reading encoded windows: an Arrow index says where each lies, Parquet files hold them.

The index (`latents.arrow`, an Arrow IPC file that the main process writes for a run) has the columns `window` (int32,
row of the plan), `file` (address of a Parquet file), `row_group` (int32) and `row` (int32, in the group).
The Parquet files have `mean` and `std` (binary, little-endian, C order), `dtype` (`bfloat16`, `float16`, `float32`),
`shape` (list<int32>, [c, T', H', W']) and `geometry` (of the window that was encoded, see `trainer.planning.plan`).

A row group is read whole and kept for its neighbours: make them a few MB.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from datakit.errors import ConfigError, DatakitError, ErrorKind, MediaError
from datakit.video.uri import open_bytes

INDEX = pa.schema({"window": pa.int32(), "file": pa.string(), "row_group": pa.int32(), "row": pa.int32()})
COLUMNS = ["mean", "std", "dtype", "shape", "geometry"]
SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of a number."""
FILES_OPEN = 16


class Place(NamedTuple):
    """Where a latent lies."""

    file: str
    row_group: int
    row: int


class Latent(NamedTuple):
    """Mean and spread of an encoded window: numbers as stored, C order."""

    mean: memoryview
    std: memoryview
    dtype: str
    shape: tuple[int, ...]


class LatentReader:
    """Args:
        index: see the module.
        cache_bytes: of row groups that are kept; at least one is.

    Raises:
        ConfigError: the index is missing, damaged or something else.
    """

    def __init__(self, index: Path, cache_bytes: int):
        self._index = _open_index(index)
        windows = self._index.column("window").to_numpy()
        self._order = None if np.all(windows[1:] > windows[:-1]) else np.argsort(windows, kind="stable")
        self._windows = windows if self._order is None else windows[self._order]
        self._cache_bytes = cache_bytes
        self._groups: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()
        self._files: OrderedDict[str, pq.ParquetFile] = OrderedDict()

    def find(self, window: int) -> Place | None:
        """Where the latent of a row of the plan lies; None: it has none."""
        return self.first(range(window, window + 1))

    def first(self, windows: range) -> Place | None:
        """Of the first of some consecutive rows of the plan that has one."""
        at = int(np.searchsorted(self._windows, windows.start))
        if at == len(self._windows) or self._windows[at] >= windows.stop:
            return None
        row = at if self._order is None else int(self._order[at])
        return Place(*(self._index.column(name)[row].as_py() for name in ("file", "row_group", "row")))

    def form(self, place: Place) -> tuple[str, tuple[int, ...]]:
        """dtype and shape of a latent, without reading its numbers."""
        with _reading(place):
            table = self._file(place.file).read_row_group(place.row_group, columns=["dtype", "shape"])
            return table.column("dtype")[place.row].as_py(), tuple(table.column("shape")[place.row].as_py())

    def read(self, place: Place, geometry: str, clip: str) -> Latent:
        """A latent.

        Args:
            geometry: of the window that is trained on.
            clip: for messages.

        Raises:
            DatakitError: it was encoded with another geometry, or the file is damaged.
            MediaError: the file cannot be read; that may pass.
        """
        with _reading(place):
            table = self._group(place)
            found = {name: table.column(name)[place.row] for name in COLUMNS}
        if found["geometry"].as_py() != geometry:
            raise DatakitError(
                f"the latent of clip {clip} in {place.file} is stale: it has geometry {found['geometry']}, the plan "
                f"wants {geometry}; "
                "run `datakit run encode` for this plan"
            )
        dtype, shape = found["dtype"].as_py(), tuple(found["shape"].as_py())
        mean, std = (memoryview(found[name].as_buffer()) for name in ("mean", "std"))
        if dtype not in SIZES or not len(mean) == len(std) == prod(shape) * SIZES[dtype]:
            raise DatakitError(
                f"the latent of clip {clip} in {place.file} is damaged: {len(mean)} bytes for {shape} of {dtype}"
            )
        return Latent(mean, std, dtype, shape)

    def _group(self, place: Place) -> pa.Table:
        key = place.file, place.row_group
        if key in self._groups:
            self._groups.move_to_end(key)
            return self._groups[key]
        table = self._file(place.file).read_row_group(place.row_group, columns=COLUMNS, use_threads=False)
        self._groups[key] = table
        while len(self._groups) > 1 and sum(t.nbytes for t in self._groups.values()) > self._cache_bytes:
            self._groups.popitem(last=False)
        return table

    def _file(self, address: str) -> pq.ParquetFile:
        if address in self._files:
            self._files.move_to_end(address)
            return self._files[address]
        file = self._files[address] = pq.ParquetFile(open_bytes(address))
        while len(self._files) > FILES_OPEN:
            self._files.popitem(last=False)[1].close(force=True)
        return file


@contextmanager
def _reading(place: Place) -> Iterator[None]:
    """Errors of reading a Parquet file, in the user's words."""
    try:
        yield
    except pa.ArrowException as e:
        raise DatakitError(f"{place.file} is damaged or holds no latents ({e}): encode again") from e
    except OSError as e:
        raise MediaError(ErrorKind.UNREADABLE, f"cannot read {place.file}: {e.strerror or e}") from e
    except (IndexError, KeyError) as e:
        raise DatakitError(
            f"{place.file} has no row {place.row} in row group {place.row_group} ({e}): encode again"
        ) from e


def _open_index(path: Path) -> pa.Table:
    try:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
    except (OSError, pa.ArrowInvalid) as e:
        raise ConfigError(f"no index of latents at {path}: {e}") from e
    missing = [name for name in INDEX.names if name not in table.column_names]
    if missing:
        raise ConfigError(f"{path} is no index of latents: it has no column {', '.join(missing)}")
    return table
