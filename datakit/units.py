"""Quantities for people."""

from __future__ import annotations


def readable(size: float) -> str:
    """Bytes in MB, GB or TB (powers of ten), three digits."""
    unit, name = (1e6, "MB") if size < 1e8 else (1e9, "GB") if size < 1e12 else (1e12, "TB")
    return f"{size / unit:.3g} {name}"
