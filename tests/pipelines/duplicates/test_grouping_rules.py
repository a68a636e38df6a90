"""Rules of groups, links and stars, on links made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from pipelines.duplicates.grouping import (
    Clips,
    best_per_video,
    complete,
    components,
    exact_classes,
    find_duplicates,
    perceptual_links,
    semantic_links,
    stars,
)
from pipelines.duplicates.similarity import Links


def links(*rows: tuple[int, int, float] | tuple[int, int, float, float]) -> Links:
    """(a, b, similarity, share of b that a shows: all of it)."""
    table = np.array([(*row, 1.0)[:4] for row in rows], np.float32).reshape(-1, 4)
    return Links(table[:, 0].astype(np.int64), table[:, 1].astype(np.int64), table[:, 2], table[:, 3])


def pairs(found: Links) -> list[tuple[int, int]]:
    return sorted(zip(*found.ends()))


def test_the_first_clip_of_each_content():
    assert exact_classes([b"a", b"b", None, b"a", b"b", None]).tolist() == [0, 1, 2, 0, 1, 5]
    assert exact_classes([]).dtype == np.int64


def test_components_are_named_by_their_lowest_index():
    edges = [(np.array([5, 2]), np.array([4, 6])), (np.array([4]), np.array([2])), (np.array([0]), np.array([0]))]
    assert components(8, edges).tolist() == [0, 1, 2, 3, 2, 2, 2, 7]
    assert components(3, []).tolist() == [0, 1, 2]
    chain = [(np.arange(99), np.arange(1, 100)[::-1].copy()[::-1])]
    assert set(components(100, chain).tolist()) == {0}


VIDEO = np.array([0, 1, 1])
SAME = np.array([8, 8, 8])


@pytest.mark.parametrize("second, kept", [(0.5, 1), (0.73, 1), (0.734375, 2), (0.74, 2), (0.75, 2)])
def test_only_the_best_match_in_another_video_counts(second, kept):
    """Half a bit of 32, 0.015625, is a tie."""
    assert pairs(best_per_video(links((0, 1, 0.75), (0, 2, second)), VIDEO, SAME)) == [(0, 1), (0, 2)][:kept]


def test_matches_in_several_videos_all_count():
    found = best_per_video(links((0, 1, 0.9), (0, 2, 0.1), (1, 2, 0.1)), np.arange(3), SAME)
    assert pairs(found) == [(0, 1), (0, 2), (1, 2)]
    crossing = links((0, 2, 0.9), (1, 3, 0.5))  # of 0 in video 1, and of 1 in video 0
    assert pairs(best_per_video(crossing, np.array([0, 1, 1, 0]), np.full(4, 8))) == [(0, 2), (1, 3)]


def test_a_match_is_the_best_for_both_clips():
    """2 is the best for 0, but 1 is the best for 2."""
    found = best_per_video(links((0, 2, 0.8), (1, 2, 0.9)), np.array([0, 0, 1]), SAME)
    assert pairs(found) == [(1, 2)]


@pytest.mark.parametrize(
    "lengths, kept",
    [
        # 1 and 2 are fragments of 0: its best is one of them, but both have their place in it
        ((8, 4, 4), [(0, 1), (0, 2)]),
        ((8, 4, 8), [(0, 1)]),
        ((8, 4, 5), [(0, 1), (0, 2)]),
        ((8, 4, 6), [(0, 1)]),  # three quarters are no fragment
        # 0 is a fragment of 1 or of 2: it has one place
        ((3, 4, 4), [(0, 1)]),
        ((2, 4, 4), [(0, 1)]),
    ],
)
def test_fragments_count_by_their_own_best(lengths, kept):
    assert pairs(best_per_video(links((0, 1, 0.9), (0, 2, 0.5)), VIDEO, np.array(lengths))) == kept


def test_a_long_clip_after_its_fragments():
    """The preferred clips are the fragments here: 0 and 1 of 2."""
    two = links((0, 2, 0.9), (1, 2, 0.5))
    for lengths, kept in (((4, 4, 8), [(0, 2), (1, 2)]), ((6, 6, 8), [(0, 2)]), ((5, 5, 8), [(0, 2), (1, 2)])):
        assert pairs(best_per_video(two, np.array([0, 0, 1]), np.array(lengths))) == kept


class Compare:
    """Notes what is compared; clips are alike where their numbers are of one parity, from a number on."""

    def __init__(self, alike: Sequence[tuple[int, int]] = ()):
        self.alike, self.calls = set(alike), []

    def __call__(self, a: np.ndarray, b: np.ndarray) -> Links:
        self.calls.append(sorted(zip(a.tolist(), b.tolist())))
        return links(*((i, j, 0.5) for i, j in zip(a.tolist(), b.tolist()) if (i, j) in self.alike))


def chain(*clips: int) -> Links:
    return links(*((a, b, 0.9) for a, b in zip(clips, clips[1:])))


def test_a_group_is_compared_with_its_best_clips_in_four_rounds():
    compare = Compare()
    assert pairs(complete(chain(1, 2, 3, 4, 5, 6, 7), 8, compare)) == pairs(chain(1, 2, 3, 4, 5, 6, 7))
    assert compare.calls == [[(best, other) for other in range(best + 1, 8)] for best in (1, 2, 3, 4)]


def test_what_is_like_the_best_clip_is_not_compared_again():
    compare = Compare([(0, 1), (0, 2), (0, 4), (3, 5)])
    found = complete(chain(0, 1, 2, 3, 4, 5), 6, compare)
    assert pairs(found) == sorted([*pairs(chain(0, 1, 2, 3, 4, 5)), (0, 2), (0, 4), (3, 5)])
    assert compare.calls == [[(0, 1), (0, 2), (0, 3), (0, 4), (0, 5)], [(3, 5)]]
    assert found.similarity[pairs(found).index((0, 1))] == np.float32(0.9), "links that are there stay as they are"


def test_groups_are_compared_beside_each_other_and_pairs_not_at_all():
    compare = Compare()
    complete(chain(0, 2, 4).joined(chain(1, 3, 5)).joined(chain(6, 7)), 9, compare)
    assert compare.calls == [[(0, 2), (0, 4), (1, 3), (1, 5)], [(2, 4), (3, 5)]]
    none = Compare()
    assert len(complete(chain(0, 1), 3, none)) == 1 and len(complete(links(), 3, none)) == 0 and none.calls == []


def test_stars_take_their_direct_neighbours():
    """1 is taken by 0; 2, a neighbour of 1 alone, stands for itself and takes 3."""
    of, kind, like = stars(np.arange(5), {"perceptual": links((0, 1, 0.9), (1, 2, 0.9), (2, 3, 0.75))})
    assert of.tolist() == [-1, 0, -1, 2, -1] and kind.tolist() == [-1, 1, -1, 1, -1]
    assert like[[1, 3]].tolist() == [np.float32(0.9), 0.75] and np.isnan(like[[0, 2, 4]]).all()
    assert (of.dtype, kind.dtype, like.dtype) == (np.int64, np.int8, np.float32)


def test_a_star_shows_at_least_half_of_what_it_takes():
    for covered, taken in ((0.5, 0), (0.49, -1)):
        assert stars(np.arange(2), {"perceptual": links((0, 1, 0.9, covered))})[0].tolist() == [-1, taken]


def test_the_first_star_takes_and_the_strongest_reason_is_told():
    """Perceptual before semantic, whatever the order they come in."""
    both = {"semantic": links((0, 2, 0.99), (1, 2, 0.99)), "perceptual": links((0, 2, 0.8), (1, 2, 0.9), (1, 3, 0.7))}
    of, kind, like = stars(np.arange(4), both)
    assert of.tolist() == [-1, -1, 0, 1] and kind.tolist() == [-1, -1, 1, 1]
    assert like[2:].tolist() == [np.float32(0.8), np.float32(0.7)]
    of, kind, like = stars(np.arange(2), {"semantic": links((0, 1, 0.99))})
    assert (of[1], kind[1], like[1]) == (0, 2, np.float32(0.99))


def test_the_same_pictures_repeat_the_same():
    """1 and 3 are 0 again, 4 is 2 again, which repeats 0."""
    of, kind, like = stars(np.array([0, 0, 2, 0, 2]), {"perceptual": links((0, 2, 0.75))})
    assert of.tolist() == [-1, 0, 0, 0, 0] and kind.tolist() == [-1, 0, 1, 0, 1]
    assert like[1:].tolist() == [1.0, 0.75, 1.0, 0.75]


def hashes(*clips: Sequence[int]) -> list[bytes]:
    return [np.array(clip, "<u8").tobytes() for clip in clips]


FAR = (2**64 - 1) // 3
"""32 bits from 0."""


def test_perceptual_links_of_clips_of_several_videos():
    """Four frames are needed for the whole radius; one moment of a still video is linked to its own."""
    near = hashes([0] * 4, [63] * 4, [FAR] * 4, [FAR ^ 7] * 4)
    assert pairs(perceptual_links(near, np.arange(4))) == [(0, 1), (2, 3)]
    assert pairs(perceptual_links(near, np.arange(4), radius=3)) == [(2, 3)]
    assert pairs(perceptual_links(near, np.array([0, 0, 1, 1]))) == []
    assert pairs(perceptual_links(near, np.zeros(4, int), within_video=True)) == [(0, 1), (2, 3)]
    halves = hashes([0, 0, FAR, FAR], [0, 0, ~FAR & (2**64 - 1), ~FAR & (2**64 - 1)])
    assert len(perceptual_links(halves, np.arange(2))) == 1
    assert len(perceptual_links(halves, np.arange(2), share=0.51)) == 0
    still = hashes(*[[0] * 4] * 2, *[[1] * 4] * 2)
    assert len(perceptual_links(still, np.array([0, 0, 1, 1]))) == 4 and len(perceptual_links(still, np.arange(4))) == 6


def unit(*degrees: float) -> np.ndarray:
    return np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], 1).astype(np.float32)


def test_semantic_links_of_clips_of_several_videos():
    vectors = unit(0, 5, 12, 90)
    assert pairs(semantic_links(vectors, np.arange(4), 0.99)) == [(0, 1), (1, 2)]
    assert pairs(semantic_links(vectors, np.array([0, 1, 0, 1]), 0.9)) == [(0, 1), (1, 2)]
    assert pairs(semantic_links(unit(0, 5, 20), np.array([0, 1, 1]), 0.9)) == [(0, 1)]
    assert pairs(semantic_links(unit(0, 5, 20), np.zeros(3), 0.9, within_video=True)) == [(0, 1), (0, 2), (1, 2)]


def test_clips_are_compared_by_what_is_known_of_them():
    """0 and 2 have the same pictures, 1 nearly those of 0; 3 and 4 near embeddings; 5 nothing in common."""
    phash = hashes([0] * 4, [1] * 4, [0] * 4, [FAR] * 4, [FAR ^ ((1 << 20) - 1)] * 4, [(1 << 32) - 1] * 4)
    content = [b"x", b"y", b"x", None, None, None]
    embedded, vectors = np.array([2, 3, 4, 5]), unit(0, 90, 92, 180)
    found = find_duplicates(Clips(np.arange(6), content, phash, embedded, vectors), threshold=0.99)
    assert found.group.tolist() == [0, 0, 0, 3, 3, 5] and found.of.tolist() == [-1, 0, 0, -1, 3, -1]
    assert found.kind.tolist() == [-1, 1, 0, -1, 2, -1]
    assert found.similarity[[1, 2, 4]].tolist() == pytest.approx([31 / 32, 1.0, np.cos(np.radians(2))], abs=1e-6)
    only = find_duplicates(Clips(np.arange(6), content))
    assert only.group.tolist() == [0, 1, 0, 3, 4, 5] and only.kind.tolist() == [-1, -1, 0, -1, -1, -1]
    assert find_duplicates(Clips(np.arange(6), phash=phash), radius=0).group.tolist() == [0, 1, 0, 3, 4, 5]
    assert find_duplicates(Clips(np.arange(6), phash=phash), share=1.1).group.tolist() == list(range(6))
    one_video = Clips(np.zeros(6, int), content, phash)
    assert find_duplicates(one_video).group.tolist() == [0, 1, 0, 3, 4, 5]
    assert find_duplicates(one_video, within_video=True).group.tolist() == [0, 0, 0, 3, 4, 5]
    assert find_duplicates(Clips(np.arange(6), None, None, embedded, vectors)).group.tolist() == list(range(6))


def test_the_first_of_the_same_pictures_has_the_embedding_of_any():
    """0 has none, but its copy 2 has; 1 is near to that."""
    clips = Clips(np.arange(3), [b"x", None, b"x"], None, np.array([1, 2]), unit(3, 0))
    found = find_duplicates(clips, threshold=0.99)
    assert found.of.tolist() == [-1, 0, 0] and found.kind.tolist() == [-1, 2, 0]
