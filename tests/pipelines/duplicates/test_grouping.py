"""Duplicates among made-up clips whose copies are known."""

import time

import numpy as np
import pytest

from pipelines.duplicates import similarity
from pipelines.duplicates.grouping import (
    Clips,
    best_per_video,
    components,
    exact_classes,
    find_duplicates,
    perceptual_links,
    semantic_links,
    stars,
)
from pipelines.duplicates.similarity import Links, Perceptual, Semantic
from pipelines.settings import Dedup


def flipped(rng: np.random.Generator, hashes: np.ndarray, share: float) -> np.ndarray:
    """Hashes, uint8 [..., 8], with about this share of their bits turned."""
    return hashes ^ np.packbits(rng.random((*hashes.shape[:-1], 64)) < share, axis=-1)


def sequences(rng: np.random.Generator, n: int, frames: int = 8, drift: float = 0.04) -> np.ndarray:
    """Frame hashes of n clips that change slowly, uint8 [n, frames, 8]; bits are as uneven as real ones."""
    rows = [np.packbits(rng.random((n, 64)) < rng.beta(2, 2, 64), axis=1)]
    for _ in range(frames - 1):
        rows.append(flipped(rng, rows[-1], drift))
    return np.stack(rows, axis=1)


def as_bytes(hashes) -> list[bytes]:
    return [h.tobytes() for h in hashes]


def units(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def with_copies(rng: np.random.Generator, n: int, originals: np.ndarray, copy) -> tuple[np.ndarray, np.ndarray]:
    """n rows, the last ones copies of random ones before; and for each which original it is."""
    made = len(originals)
    source = rng.integers(0, made, n - made)
    return np.concatenate([originals, copy(originals[source])]), np.concatenate([np.arange(made), source])


def pairs_of(labels: np.ndarray) -> set[tuple[int, int]]:
    groups: dict[int, list[int]] = {}
    for i, label in enumerate(labels.tolist()):
        groups.setdefault(label, []).append(i)
    return {(a, b) for group in groups.values() for k, a in enumerate(group) for b in group[k + 1 :]}


def pairs(links: Links) -> set[tuple[int, int]]:
    return set(zip(*links.ends()))


def test_settings_have_the_defaults_that_were_measured():
    assert (Dedup().perceptual_radius, Dedup().perceptual_share) == (similarity.RADIUS, similarity.SHARE)


def test_known_copies_are_grouped_whatever_the_order():
    rng = np.random.default_rng(1)
    hashes, truth = with_copies(rng, 600, sequences(rng, 400), lambda h: flipped(rng, h, 0.03))
    vectors = units(rng.normal(size=(600, 64)))
    found = []
    for order in (np.arange(600), rng.permutation(600)):
        clips = Clips(np.arange(600), phash=as_bytes(hashes[order]), embedded=np.arange(600), vectors=vectors[order])
        result = find_duplicates(clips, threshold=0.9)
        assert pairs_of(result.group) == pairs_of(truth[order])
        again = find_duplicates(clips, threshold=0.9)
        assert all(np.array_equal(value, getattr(again, name), equal_nan=True) for name, value in vars(result).items())
        found.append({frozenset((order[a], order[b])) for a, b in pairs_of(result.group)})
    assert found[0] == found[1]


@pytest.mark.slow
def test_perceptual_candidates_miss_next_to_nothing():
    """Against a comparison of all with all."""
    rng = np.random.default_rng(2)
    hashes, _ = with_copies(rng, 2000, sequences(rng, 1200), lambda h: flipped(rng, h, 0.06))
    matcher = Perceptual(as_bytes(hashes), np.arange(2000))
    every = pairs(matcher.compare(*np.triu_indices(2000, 1)))
    found = pairs(matcher.compare(*matcher.candidates()))
    assert len(every) > 900 and found <= every and len(found) >= 0.99 * len(every)


@pytest.mark.slow
def test_semantic_candidates_miss_next_to_nothing_among_ten_thousand():
    rng = np.random.default_rng(3)
    centres = rng.normal(size=(50, 128)) * 0.8
    originals = units(centres[rng.integers(0, 50, 7000)] + rng.normal(size=(7000, 128)))
    vectors, _ = with_copies(
        rng, 10_000, originals, lambda v: units(v + 0.25 * rng.normal(size=v.shape) / np.sqrt(128))
    )
    near = np.argwhere(np.triu(vectors @ vectors.T >= 0.95, 1))
    matcher = Semantic(vectors, np.arange(10_000), 0.95)
    found = pairs(matcher.compare(*matcher.candidates()))
    assert len(near) > 3000 and len(found & set(map(tuple, near.tolist()))) >= 0.99 * len(near)
    links = semantic_links(vectors, np.arange(10_000), 0.95)
    together = components(10_000, [(links.a, links.b)])
    assert sum(together[a] == together[b] for a, b in near) >= 0.995 * len(near)


@pytest.mark.slow
def test_a_title_card_in_thousands_of_clips_costs_little_and_joins_nothing():
    rng = np.random.default_rng(4)
    hashes = sequences(rng, 6000)
    card = rng.integers(0, 256, 8, dtype=np.uint8)
    hashes[:5000, :2] = flipped(rng, np.broadcast_to(card, (5000, 2, 8)), 0.01)
    hashes[5000:5100] = flipped(rng, hashes[:100], 0.02)  # clips with the card that are copies all the same
    matcher = Perceptual(as_bytes(hashes), np.arange(6000))
    started = time.process_time()
    a, b = matcher.candidates()
    assert len(a) <= 6000 * similarity.CANDIDATES and time.process_time() - started < 20
    links = perceptual_links(as_bytes(hashes), np.arange(6000))
    assert pairs(links) == {(i, 5000 + i) for i in range(100)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["perceptual", "semantic"])
def test_thousands_of_copies_of_one_clip_become_one_star(kind):
    rng = np.random.default_rng(5)
    n = 2000
    hashes = np.broadcast_to(sequences(rng, 1), (n, 8, 8)).copy()
    hashes[1:] = flipped(rng, hashes[1:], 0.01)
    vectors = units(np.ones((n, 64)) + 0.05 * rng.normal(size=(n, 64)))
    columns = {"phash": as_bytes(hashes)} if kind == "perceptual" else {"embedded": np.arange(n), "vectors": vectors}
    result = find_duplicates(Clips(np.arange(n), **columns), threshold=0.9)
    assert set(result.group.tolist()) == {0} and result.of.tolist() == [-1] + [0] * (n - 1)


def test_clips_match_at_their_best_offset_over_half_of_the_shorter():
    rng = np.random.default_rng(6)
    (film,) = sequences(rng, 1, frames=40, drift=0.2)
    spans = [(0, 16), (4, 20), (10, 26), (5, 9), (30, 40)]  # shared with the first: 12 of 16, 6 of 16, 4 of 4, none
    links = Perceptual([film[a:b].tobytes() for a, b in spans], np.arange(5)).compare(*np.triu_indices(5, 1))
    assert pairs(links) == {(0, 1), (0, 3), (1, 2), (1, 3)}  # 1 and 2 share 10 of 16
    assert links.covered[0] == 12 / 16 and links.covered[1] == 1.0 and set(links.similarity) == {1.0}


def test_a_fragment_does_not_stand_for_the_whole():
    rng = np.random.default_rng(7)
    (film,) = sequences(rng, 1, frames=16, drift=0.2)
    better_fragment = find_duplicates(Clips(np.arange(2), phash=[film[:5].tobytes(), film.tobytes()]))
    assert better_fragment.group.tolist() == [0, 0] and better_fragment.of.tolist() == [-1, -1]
    better_whole = find_duplicates(Clips(np.arange(2), phash=[film.tobytes(), film[:5].tobytes()]))
    assert better_whole.of.tolist() == [-1, 0]


def test_a_chain_is_one_group_and_keeps_what_has_no_direct_copy():
    links = Links(np.array([0, 1, 2]), np.array([1, 2, 3]), np.full(3, 0.9, np.float32), np.ones(3, np.float32))
    of, kind, similarity = stars(np.arange(4), {"perceptual": links})
    assert components(4, [(links.a, links.b)]).tolist() == [0, 0, 0, 0]
    assert of.tolist() == [-1, 0, -1, 2]  # 2 is like 1 only, which is left out: it stays
    assert kind.tolist() == [-1, 1, -1, 1] and similarity[1] == pytest.approx(0.9) and np.isnan(similarity[0])


def test_the_strongest_reason_counts_and_copies_share_their_firsts():
    one, more = np.array([0]), np.full(1, 0.8, np.float32)
    links = {"semantic": Links(one, one + 2, more, more), "perceptual": Links(one, one + 2, more + 0.1, more)}
    of, kind, similarity = stars(np.array([0, 0, 2, 2]), links)
    assert of.tolist() == [-1, 0, 0, 0] and kind.tolist() == [-1, 0, 1, 1]
    assert similarity[1:].tolist() == pytest.approx([1.0, 0.9, 0.9])


def test_moments_of_one_video_are_not_compared_and_copies_meet_their_own_moment():
    rng = np.random.default_rng(8)
    still = rng.integers(0, 256, 8, dtype=np.uint8)
    moments = flipped(rng, np.broadcast_to(still, (3, 1, 8)), 0.03).repeat(10, axis=1)  # one shot, three clips of it
    hashes = as_bytes(np.concatenate([moments, moments]))
    video = np.array([0, 0, 0, 1, 1, 1])
    assert pairs(perceptual_links(hashes, video)) == {(0, 3), (1, 4), (2, 5)}
    assert len(perceptual_links(hashes, video, within_video=True)) == 15


def test_fragments_all_find_their_whole():
    links = Links(np.array([0, 0]), np.array([1, 2]), np.array([0.99, 0.9], np.float32), np.ones(2, np.float32))
    video = np.array([0, 1, 1])
    assert pairs(best_per_video(links, video, np.array([16, 8, 8]))) == {(0, 1), (0, 2)}
    assert pairs(best_per_video(links, video, np.array([8, 8, 8]))) == {(0, 1)}


def test_short_clips_must_agree_better():
    rng = np.random.default_rng(9)
    hashes = rng.integers(0, 256, (1, 1, 8), dtype=np.uint8)
    near = hashes.copy()
    near[..., 0] ^= 0b1111  # four bits
    for frames, same in ((1, 0), (2, 0), (4, 1)):
        links = perceptual_links(as_bytes(np.concatenate([hashes, near]).repeat(frames, axis=1)), np.arange(2))
        assert len(links) == same, frames


def test_what_shows_nothing_is_nobodys_copy():
    result = find_duplicates(Clips(np.arange(4), content=[None, None, b"x", b"x"], phash=[b"", b"", b"", b""]))
    assert (
        result.group.tolist() == [0, 1, 2, 2]
        and result.of.tolist() == [-1, -1, -1, 2]
        and result.kind.tolist() == [-1, -1, -1, 0]
    )
    no = np.zeros(0, np.int64)
    assert (
        len(find_duplicates(Clips(no, content=[], phash=[], embedded=no, vectors=np.zeros((0, 4), np.float32))).group)
        == 0
    )
    assert exact_classes([b"a", b"b", b"a", None, None]).tolist() == [0, 1, 0, 3, 4]
