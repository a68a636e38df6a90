"""Comparisons and candidates against all pairs, one by one, among few clips."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest

from pipelines.duplicates import similarity
from pipelines.duplicates.similarity import (
    Links,
    Perceptual,
    Semantic,
    _offset_sums,
    _place_in_run,
    _standing,
    _whole_clips,
    threshold_of,
)

Clip = list[int]
"""Frame hashes as numbers."""


def perceptual(clips: Sequence[Clip], videos: Sequence[int] | None = None, **options) -> Perceptual:
    hashes = [np.array(clip, "<u8").tobytes() for clip in clips]
    return Perceptual(hashes, np.array(range(len(clips)) if videos is None else videos), **options)


def candidates(matcher: Perceptual | Semantic) -> set[tuple[int, int]]:
    a, b = (side.tolist() for side in matcher.candidates())
    assert len(set(zip(a, b))) == len(a) and all(x < y for x, y in zip(a, b))
    return set(zip(a, b))


def ones(count: int, first: int = 0) -> int:
    """A hash with so many bits set, from a bit on."""
    return ((1 << count) - 1) << first


def aligned(x: Clip, y: Clip, radius: float = 6, share: float = 0.5) -> tuple[float, float]:
    """Similarity and share of y that x shows, at the offset where most frames agree (then the nearest; the earliest).

    Frames agree within the radius, which shrinks for clips of fewer than four frames; half of the shorter clip must
    overlap, and the share of the overlap must agree. Similarity falls from 1 to 0 at 32 bits of mean distance.
    """
    shorter, best, found = min(len(x), len(y)), 0.0, (0.0, 0.0)
    for offset in range(-len(y) + 1, len(x)):
        distances = [(x[i] ^ y[i - offset]).bit_count() for i in range(len(x)) if 0 <= i - offset < len(y)]
        agree = sum(d <= radius * min(1, shorter / 4) for d in distances)
        mean = sum(distances) / len(distances)
        if len(distances) >= max(1, shorter / 2) and agree >= share * len(distances) and agree - mean / 64 > best:
            best, found = agree - mean / 64, (max(1 - mean / 32, 1e-3), len(distances) / len(y))
    return found


def made_up(rng: np.random.Generator, count: int) -> list[Clip]:
    """Pieces of one film with some bits turned: every pair overlaps somewhere or nowhere."""
    film = [int(h) for h in rng.integers(0, 2**64, 14, np.uint64)]
    clips = []
    for _ in range(count):
        start, length = int(rng.integers(0, 10)), int(rng.integers(1, 9))
        clip = film[start : start + length]
        clips.append([h ^ sum(1 << int(b) for b in rng.choice(64, rng.integers(0, 6), False)) for h in clip])
    return clips


@pytest.mark.parametrize("options", [{}, {"radius": 3}, {"share": 0.9}, {"radius": 10, "share": 0.25}])
def test_clips_are_compared_at_their_best_offset(options):
    clips = made_up(np.random.default_rng(1), 40)
    links = perceptual(clips, **options).compare(*np.triu_indices(40, 1))
    found = dict(zip(zip(*links.ends()), zip(links.similarity.tolist(), links.covered.tolist())))
    expected = {(a, b): aligned(clips[a], clips[b], **options) for a, b in combinations(range(40), 2)}
    expected = {pair: values for pair, values in expected.items() if values[0] > 0}
    assert 60 < len(expected) < 600 and found.keys() == expected.keys()
    for pair, values in expected.items():
        assert found[pair] == pytest.approx(values, rel=1e-5), pair


def test_known_distances():
    """Four frames at 0, 2, 4 and 8 bits: three agree, 3.5 bits on average. Clips of two frames must agree within 3."""
    frames = [0, ones(30), ones(30, 30), ones(60)]
    turned = [frames[0], frames[1] ^ ones(2), frames[2] ^ ones(4), frames[3] ^ ones(8)]
    links = perceptual([frames, turned]).compare(np.array([0]), np.array([1]))
    assert links.similarity.tolist() == [1 - 3.5 / 32] and links.covered.tolist() == [1.0]
    for bits, agree in ((3, True), (4, False)):
        pair = perceptual([[ones(bits)] * 2, [0, 0]]).compare(np.array([0]), np.array([1]))
        assert len(pair) == agree
    far = perceptual([[ones(40)], [0]], radius=200).compare(np.array([0]), np.array([1]))
    assert far.similarity.tolist() == [np.float32(1e-3)], "what agrees is never of no similarity"


def test_the_radius_and_the_thresholds_are_those_that_were_measured():
    assert (similarity.RADIUS, similarity.SHARE, similarity.OVERLAP, similarity.UNRELATED) == (6, 0.5, 0.5, 32)
    assert threshold_of("efficientnet-lite0") == 0.90 and threshold_of("other") == 0.97


def test_clips_of_one_video_and_clips_that_show_nothing_are_not_compared():
    pairs = np.triu_indices(3, 1)
    clips = [[5], [5], []]
    assert len(perceptual(clips, [0, 0, 1]).compare(*pairs)) == 0
    assert list(zip(*perceptual(clips, [0, 0, 1], within_video=True).compare(*pairs).ends())) == [(0, 1)]
    assert list(zip(*perceptual(clips).compare(*pairs).ends())) == [(0, 1)]


def test_thousands_of_pairs_are_compared_in_batches():
    """Of all lengths: 5,050 pairs, each clip like itself from its start on."""
    lengths = [1 + i % 7 for i in range(101)] + [1500]
    clips = [[(k * 0x9E3779B97F4A7C15) % 2**64 for k in range(n)] for n in lengths]
    a, b = np.triu_indices(102, 1)
    links = perceptual(clips).compare(a, b)
    assert len(links) == len(a) == 5151 and set(links.similarity.tolist()) == {1.0}
    order = np.lexsort((links.b, links.a))
    assert np.array_equal(links.a[order], a) and np.array_equal(links.b[order], b)
    covered = [min(lengths[i], lengths[j]) / lengths[j] for i, j in zip(a, b)]
    assert links.covered[order].tolist() == pytest.approx(covered)


def test_candidates_share_a_frame_within_nine_bits():
    """The radius of 6 and 3 for frames that were not looked up."""
    clips = [[0], [ones(9)], [ones(10)], [ones(9, 40)], [ones(30, 10)]]
    expected = {(a, b) for a, b in combinations(range(5), 2) if (clips[a][0] ^ clips[b][0]).bit_count() <= 9}
    assert candidates(perceptual(clips)) == expected == {(0, 1), (0, 3), (1, 2)}
    assert candidates(perceptual(clips, radius=7)) == {(0, 1), (0, 2), (0, 3), (1, 2)}
    assert candidates(perceptual(clips, [0, 0, 1, 2, 3])) == {(0, 3), (1, 2)}
    assert candidates(perceptual(clips, [0, 0, 0, 0, 0], within_video=True)) == expected
    for nothing in ([], [[], []], [[1], []]):
        assert candidates(perceptual(nothing)) == set()


def test_candidates_are_those_of_all_pairs():
    clips = made_up(np.random.default_rng(2), 25)

    def near(x: Clip, y: Clip) -> bool:
        return any((f ^ g).bit_count() <= 9 for f in keys(x) for g in keys(y))

    def keys(clip: Clip) -> Clip:
        """Frames more than 3 bits away from every such frame before."""
        kept: Clip = []
        for frame in clip:
            if all((frame ^ k).bit_count() > 3 for k in kept):
                kept.append(frame)
        return kept

    assert candidates(perceptual(clips)) == {(a, b) for a, b in combinations(range(25), 2) if near(clips[a], clips[b])}


def test_a_frame_within_three_bits_of_one_before_it_is_not_looked_up():
    """9 bits from the second frame and 12 or 13 from the first: found where the second differs by more than 3."""
    for bits, found in ((3, set()), (4, {(0, 1)})):
        assert candidates(perceptual([[0, ones(bits)], [ones(bits) | ones(9, 20)]])) == found
        assert candidates(perceptual([[0, ones(40, 24), ones(bits)], [ones(bits) | ones(9, 20)]])) == found, (
            "not the last"
        )
    assert candidates(perceptual([[0], [ones(3)], [ones(3) | ones(9, 20)]])) == {(0, 1), (1, 2)}, "in its own clip"


def test_eight_clips_stand_for_a_frame():
    """Of twelve clips with one frame, every pair that has one of the eight best."""
    expected = {(a, b) for a, b in combinations(range(12), 2) if a < 8}
    assert candidates(perceptual([[7]] * 12)) == expected


def test_a_clip_is_compared_with_the_32_that_share_most_frames():
    """Clip 40 shares one frame with each of 0 to 31, and two with 32 to 39."""
    rng = np.random.default_rng(3)
    frames = [int(h) for h in rng.integers(0, 2**64, 6, np.uint64)]
    clips = [[frames[i // 8]] + ([frames[5]] if i >= 32 else []) for i in range(40)] + [frames]
    others = {a for a, b in candidates(perceptual(clips)) if b == 40}
    assert others == {*range(24), *range(32, 40)}


def test_the_best_clips_of_each_distinct_hash():
    value, clip = np.array([5, 3, 5, 5, 3, 9], "<u8"), np.array([2, 1, 0, 2, 7, 4])
    distinct, standing = _standing(value, clip)
    assert distinct.tolist() == [3, 5, 9]
    assert standing.tolist() == [[1, 7] + [-1] * 6, [0, 2] + [-1] * 6, [4] + [-1] * 7]


def test_places_within_runs():
    assert _place_in_run(np.array([4, 4, 4, 2, 4, 4])).tolist() == [0, 1, 2, 0, 0, 1]
    assert _place_in_run(np.array([], int)).tolist() == []


def test_slices_divide_no_clip():
    clip = np.array([0, 0, 0, 1, 1, 2, 3, 3])
    assert [(s.start, s.stop) for s in _whole_clips(clip, 2)] == [(0, 3), (3, 5), (5, 8)]
    assert [(s.start, s.stop) for s in _whole_clips(clip, 3)] == [(0, 3), (3, 6), (6, 8)]
    assert [(s.start, s.stop) for s in _whole_clips(clip, 100)] == [(0, 8)] and not list(_whole_clips(clip[:0], 2))


def test_sums_over_offsets():
    values = np.arange(24).reshape(2, 3, 4)
    sums = _offset_sums(values)
    for p in range(2):
        for offset in range(6):
            assert sums[p, offset] == sum(values[p, x, y] for x in range(3) for y in range(4) if x + y == offset)
    assert sums.shape == (2, 6)


def links(*rows: tuple[int, int, float, float]) -> Links:
    a, b, like, covered = zip(*rows)
    return Links(np.array(a), np.array(b), np.array(like, np.float32), np.array(covered, np.float32))


def test_links():
    some = links((0, 1, 0.5, 1.0), (1, 2, 0.75, 0.5))
    assert len(some) == 2 and some.ends() == ([0, 1], [1, 2])
    assert some[np.array([False, True])].ends() == ([1], [2]) and some[np.array([1])].similarity.tolist() == [0.75]
    joined = some.joined(links((3, 4, 0.25, 0.125)))
    assert joined.ends() == ([0, 1, 3], [1, 2, 4]) and joined.covered.tolist() == [1.0, 0.5, 0.125]
    among_all = some.of(np.array([10, 20, 30]))
    assert among_all.ends() == ([10, 20], [20, 30]) and among_all.similarity.tolist() == [0.5, 0.75]
    assert among_all.covered.tolist() == [1.0, 0.5]


def units(*degrees: float) -> np.ndarray:
    angle = np.radians(degrees)
    return np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)


def test_embeddings_are_alike_from_the_threshold_on():
    """cos 60° is a half; here exact: 0.6 · 1 and 0.8 · 1."""
    vectors = np.array([[1, 0], [0.6, 0.8], [0, 1], [1, 0]], np.float32)
    matcher = Semantic(vectors, np.arange(4), np.float32(0.6))
    found = matcher.compare(*np.triu_indices(4, 1))
    assert list(zip(*found.ends())) == [(0, 1), (0, 3), (1, 2), (1, 3)]
    assert found.similarity.tolist() == pytest.approx([0.6, 1, 0.8, 0.6]) and found.covered.tolist() == [1.0] * 4
    one_video = Semantic(vectors, np.array([0, 1, 0, 0]), np.float32(0.6)).compare(*np.triu_indices(4, 1))
    assert list(zip(*one_video.ends())) == [(0, 1), (1, 2), (1, 3)]
    within = Semantic(vectors, np.zeros(4), np.float32(0.6), within_video=True).compare(*np.triu_indices(4, 1))
    assert within.ends() == found.ends()
    longer = Semantic(vectors * 1.5, np.arange(4), 0.5).compare(np.array([0]), np.array([3]))
    assert longer.similarity.tolist() == [1.0], "never above 1"


def test_many_pairs_of_embeddings():
    """20,100 pairs, more than are compared at a time."""
    vectors, (a, b) = units(*np.linspace(0, 300, 201)), np.triu_indices(201, 1)
    found = Semantic(vectors, np.arange(201), 0.5).compare(a, b)
    near = (b - a) * 1.5 <= 60.0001
    near |= (b - a) * 1.5 >= 299.9999
    assert abs(len(found) - near.sum()) <= 201  # those at 60 degrees are either side of it
    assert found.similarity.tolist() == pytest.approx(np.cos(np.radians((found.b - found.a) * 1.5)), abs=1e-5)


def test_near_pairs_of_embeddings():
    """All within 10 degrees of each other, whatever their video; of few clips none is missed."""
    degrees = [0, 4, 11, 15, 30, 39, 41, 200]
    matcher = Semantic(units(*degrees), np.zeros(8), float(np.cos(np.radians(10))))
    expected = {(a, b) for a, b in combinations(range(8), 2) if abs(degrees[a] - degrees[b]) <= 10}
    assert candidates(matcher) == expected == {(0, 1), (1, 2), (2, 3), (4, 5), (5, 6)} | {(1, 2)}
    for few in (0, 1):
        assert candidates(Semantic(units(*degrees[:few]), np.zeros(few), 0.5)) == set()
    assert candidates(Semantic(units(0, 1), np.zeros(2), 0.5)) == {(0, 1)}


def test_a_clip_with_many_near_ones_is_asked_for_all_of_them():
    """More than the 32 neighbours that are looked for at first."""
    matcher = Semantic(units(*np.linspace(0, 1, 100), 90), np.arange(101), 0.9)
    assert candidates(matcher) == set(combinations(range(100), 2))
    few = Semantic(units(*np.linspace(0, 1, 33), 90), np.arange(34), 0.9)
    assert candidates(few) == set(combinations(range(33), 2))


def test_near_pairs_are_found_in_neighbouring_lists():
    """2,000 pairs far from each other: 31 lists of about 64, of which eight are looked into."""
    rng = np.random.default_rng(5)
    centres = rng.normal(size=(1000, 16))
    vectors = np.concatenate([centres, centres + 0.05 * rng.normal(size=centres.shape)])
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    found = candidates(Semantic(vectors, np.arange(2000), 0.97))
    truth = {(a, b) for a, b in np.argwhere(np.triu(vectors @ vectors.T >= 0.97, 1)).tolist()}
    assert len(truth) >= 1000 and len(found & truth) > 0.995 * len(truth) and found - truth == set()
