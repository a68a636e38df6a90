"""Hashes and draws that depend on a text alone: the same on every machine, in every process and version.

Identities, splits and seeds in catalogs and plans are made of them, so what they give never changes. All are BLAKE2b;
`person` (at most 16 bytes) keeps equal texts of different kinds apart.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Literal


def hash_bytes(content: str | bytes, size: int, person: str = "") -> bytes:
    """Hash of a text (as UTF-8) or of bytes: `size` bytes."""
    data = content.encode() if isinstance(content, str) else content
    return blake2b(data, digest_size=size, person=person.encode()).digest()


def hash_hex(content: str | bytes, size: int, person: str = "") -> str:
    """Hash of a text or of bytes: 2 · `size` hex digits."""
    return hash_bytes(content, size, person).hex()


def seed_of(content: str | bytes, person: str = "") -> int:
    """63 bits, for random generators that take a signed integer."""
    return int.from_bytes(hash_bytes(content, 8, person), "little") >> 1


def uniform(content: str | bytes, person: str = "", byteorder: Literal["little", "big"] = "little") -> float:
    """A number in [0, 1)."""
    return int.from_bytes(hash_bytes(content, 8, person), byteorder) / 2**64
