"""Feeding columns of tables to a hash: as bytes that depend on the values alone, not on where Arrow put them or on the
version of a library."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import pyarrow as pa


def feed_nulls(digest: blake2b, column: pa.Array) -> None:
    """Which values are null: a byte each."""
    digest.update(np.ascontiguousarray(column.is_null().to_numpy(zero_copy_only=False)).view(np.uint8).data)


def feed_values(digest: blake2b, column: pa.Array) -> None:
    """Values: texts and bytes with their lengths (4 bytes each) before them, numbers little-endian (truth
    values as 4 bytes), null as 0 or empty.

    Raises:
        TypeError: a column of lists or structs.
    """
    kind = column.type
    if pa.types.is_nested(kind):
        raise TypeError(f"{kind} has columns inside: feed those")
    if not (pa.types.is_string(kind) or pa.types.is_binary(kind) or _is_large(kind)):
        if pa.types.is_boolean(kind):
            column = column.cast(pa.int32())
        numbers = column.fill_null(0).to_numpy(zero_copy_only=False)
        digest.update(np.ascontiguousarray(numbers, numbers.dtype.newbyteorder("<")).data)
        return
    filled = column.fill_null(b"" if "binary" in str(kind) else "")
    if not len(filled):
        return
    _, starts, content = filled.buffers()
    width = 8 if _is_large(kind) else 4
    offsets = np.frombuffer(starts, f"<i{width}", len(filled) + 1, filled.offset * width)
    digest.update(np.diff(offsets).astype("<u4").data)
    if offsets[-1] > offsets[0]:
        digest.update(memoryview(content)[offsets[0] : offsets[-1]])


def _is_large(kind: pa.DataType) -> bool:
    return pa.types.is_large_string(kind) or pa.types.is_large_binary(kind)
