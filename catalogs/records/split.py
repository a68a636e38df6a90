"""The holdout: which split a video, later a group of duplicates, belongs to."""

from __future__ import annotations

import hashlib

VAL = TEST = 0.05
"""Shares of the splits val and test where nothing else is set."""


def split_of(group: str, val: float, test: float) -> str:
    """train, val or test, by a hash of the group (a video, later a group of duplicates): fixed for ever."""
    digest = hashlib.blake2b(group.encode(), digest_size=8, person=b"datakit-split").digest()
    position = int.from_bytes(digest, "little") / 2**64
    return "val" if position < val else "test" if position < val + test else "train"
