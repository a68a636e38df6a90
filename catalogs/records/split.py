"""The holdout: which split a video, later a group of duplicates, belongs to."""

from __future__ import annotations

from datakit.hashing import uniform

VAL = TEST = 0.05
"""Shares of the splits val and test where nothing else is set."""


def split_of(group: str, val: float, test: float) -> str:
    """train, val or test, by a hash of the group (a video, later a group of duplicates): fixed for ever."""
    position = uniform(group, "datakit-split")
    return "val" if position < val else "test" if position < val + test else "train"
