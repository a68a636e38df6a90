"""Hashes of texts and columns; answers that must stay are in tests/test_known_hashes.py."""

from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pytest

from datakit.column_hash import feed_nulls, feed_values
from datakit.hashing import hash_bytes, hash_hex, seed_of, uniform
from datakit.units import readable


def test_a_hash_is_blake2b_of_utf_8():
    expected = blake2b("ü".encode(), digest_size=5, person=b"kind").digest()
    assert hash_bytes("ü", 5, "kind") == hash_bytes("ü".encode(), 5, "kind") == expected
    assert hash_hex("ü", 5, "kind") == expected.hex()
    assert hash_hex("ü", 5) != hash_hex("ü", 5, "kind")


def test_draws_are_spread_evenly():
    """8,000 draws in 8 bins: each within four standard deviations (30) of 1,000."""
    for byteorder in ("little", "big"):
        draws = [uniform(f"{i}", "test", byteorder) for i in range(8000)]
        assert np.abs(np.histogram(draws, 8, (0, 1))[0] - 1000).max() < 4 * 30
    seeds = [seed_of(f"{i}") / 2**63 for i in range(8000)]
    assert max(seeds) < 1 and np.abs(np.histogram(seeds, 8, (0, 1))[0] - 1000).max() < 4 * 30


def hashed(column: pa.Array) -> str:
    digest = blake2b(digest_size=8)
    feed_nulls(digest, column)
    feed_values(digest, column)
    return digest.hexdigest()


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["a", None, "", "ü"]),
        pa.array([b"a", None, b"", b"\xff"], pa.large_binary()),
        pa.array([1, None, 3, 4], pa.int32()),
        pa.array([1.5, None, -0.0, 4]),
        pa.array([True, None, False, True]),
    ],
    ids=lambda column: str(column.type),
)
def test_a_column_is_hashed_by_its_values(column):
    """Not by where they lie: as a slice of a longer one, or joined from two."""
    expected = hashed(column)
    longer = pa.concat_arrays([column[1:], column, column[:1]])
    assert hashed(longer[3:7]) == expected
    assert hashed(pa.concat_arrays([column[:2], column[2:]])) == expected
    others = (pa.concat_arrays([column[:1], column[:1], column[2:]]), column[::-1], column[:3])
    assert len({expected, *map(hashed, others)}) == 4


def test_a_text_is_told_from_the_next_one():
    assert hashed(pa.array(["ab", "c"])) != hashed(pa.array(["a", "bc"]))
    assert hashed(pa.array(["a", "b"])) == hashed(pa.array(["a", "b"], pa.large_string()))
    with pytest.raises(TypeError, match="has columns inside"):
        feed_values(blake2b(), pa.array([[1]]))


def test_bytes_for_people():
    assert [readable(size) for size in (0, 1.25e6, 99e6, 1e8, 1.2345e11, 3e12)] == [
        "0 MB",
        "1.25 MB",
        "99 MB",
        "0.1 GB",
        "123 GB",
        "3 TB",
    ]
