"""Which clips repeat others: pure functions on arrays, clips in order of preference (index 0 is the best).

Exact: the same pictures in another file. Perceptual and semantic: see `pipelines.duplicates.similarity`. Clips of one
    video are
compared with each other only for exact copies unless `within_video` is set: different moments of one static shot
look alike and are not copies. For the same reason a clip is linked only to its best match in another video.

A group is a connected component: what must not be divided between training and test. What a clip repeats is
decided by greedy stars: clip after clip in order of preference, whatever is not taken yet stands for itself and
takes its direct neighbours, those of which it shows at least half. So leaving out everything that repeats
something never loses a picture without a like that stays, and a long clip never goes in favour of a fragment of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.duplicates.similarity import RADIUS, SHARE, UNRELATED, Links, Perceptual, Semantic

KINDS = ("exact", "perceptual", "semantic")
"""Why a clip repeats another, the strongest reason first."""
COVERED = 0.5
"""Least share of a clip that another must show to stand for it."""
ROUNDS = 4
"""Best clips of a group that everything in it is compared with."""
TIE = 0.5 / UNRELATED
"""Similarities that differ by less than half a bit are taken as equal."""
FRAGMENT = 0.75
"""A clip shorter than this share of another may be a fragment of it."""


@dataclass(frozen=True)
class Clips:
    """What clips are compared by.

    Attributes:
        video: which video each is of, integers [n].
        content: hash of its pictures, None: unknown.
        phash: its frame hashes, 8 bytes each in order of time.
        embedded: indices of the clips that have an embedding, int64 [m].
        vectors: these embeddings, of one model and of unit length, float32 [m, d].
    """

    video: np.ndarray
    content: Sequence[bytes | None] | None = None
    phash: Sequence[bytes] | None = None
    embedded: np.ndarray | None = None
    vectors: np.ndarray | None = None


@dataclass(frozen=True)
class Duplicates:
    """What repeats what.

    Attributes:
        group: the first clip of each clip's group, int64 [n].
        of: the clip that it repeats, −1: none; int64 [n].
        kind: place in `KINDS` of the reason, −1: none; int8 [n].
        similarity: of the two, NaN: none; float32 [n].
    """

    group: np.ndarray
    of: np.ndarray
    kind: np.ndarray
    similarity: np.ndarray


def find_duplicates(
    clips: Clips, radius: int = RADIUS, share: float = SHARE, threshold: float = 1.0, within_video: bool = False
) -> Duplicates:
    """Compare clips in every way that the columns given allow.

    Args:
        radius, share: of perceptual copies (see `pipelines.duplicates.similarity`).
        threshold: least cosine of semantic copies.
        within_video: also compare the clips of one video by more than their pictures' hash.
    """
    n = len(clips.video)
    same = np.arange(n) if clips.content is None else exact_classes(clips.content)
    links: dict[str, Links] = {}
    if clips.phash is not None:
        first = np.flatnonzero(same == np.arange(n))
        links["perceptual"] = perceptual_links(
            [clips.phash[i] for i in first], clips.video[first], radius, share, within_video
        ).of(first)
    if clips.vectors is not None:
        first, place = np.unique(same[clips.embedded], return_index=True)
        links["semantic"] = semantic_links(clips.vectors[place], clips.video[first], threshold, within_video).of(first)
    group = components(n, [*((found.a, found.b) for found in links.values()), (same, np.arange(n))])
    return Duplicates(group, *stars(same, links))


def exact_classes(content: Sequence[bytes | None]) -> np.ndarray:
    """For every clip the first one with the same content hash (itself where there is none): int64 [n]."""
    first: dict[bytes, int] = {}
    return np.array([i if c is None else first.setdefault(c, i) for i, c in enumerate(content)], np.int64)


def perceptual_links(
    phash: Sequence[bytes], video: np.ndarray, radius: int = RADIUS, share: float = SHARE, within_video: bool = False
) -> Links:
    """Clips that look the same over half of the shorter one.

    Args:
        phash: frame hashes of every clip, 8 bytes each in order of time.
        video: which video each clip is of, integers [n].
    """
    matcher = Perceptual(phash, video, radius, share, within_video)
    links = complete(matcher.compare(*matcher.candidates()), len(phash), matcher.compare)
    return links if within_video else best_per_video(links, video, np.array([len(p) for p in phash]))


def semantic_links(vectors: np.ndarray, video: np.ndarray, threshold: float, within_video: bool = False) -> Links:
    """Clips whose embeddings are near.

    Args:
        vectors: float32 [n, d], of unit length.
        video: which video each clip is of, integers [n].
        threshold: least cosine.
    """
    matcher = Semantic(vectors, video, threshold, within_video)
    links = complete(matcher.compare(*matcher.candidates()), len(vectors), matcher.compare)
    return links if within_video else best_per_video(links, video, np.ones(len(vectors)))


def complete(links: Links, n: int, compare: Callable[[np.ndarray, np.ndarray], Links]) -> Links:
    """The links and those that the limits on candidates left out: everything in a group is compared with the
    group's best clip, then what does not match that one with the best of the rest, and so on.

    Args:
        compare: gives the links among pairs a, b.
    """
    group = components(n, [(links.a, links.b)])
    left = np.flatnonzero(np.bincount(group, minlength=n)[group] > 2)
    for _ in range(ROUNDS):
        best = np.full(n, n)
        np.minimum.at(best, group[left], left)
        others = left[best[group[left]] != left]
        if not len(others):
            break
        found = compare(best[group[others]], others)
        links = links.joined(found[~np.isin(found.a * n + found.b, links.a * n + links.b)])
        left = np.setdiff1d(others, found.b)
    return links


def best_per_video(links: Links, video: np.ndarray, length: np.ndarray) -> Links:
    """Only links to the best match in the other video: the best for the shorter clip (a fragment has one place in
    the whole), for both where they are about equally long. Near ties count: the same shot may come twice.

    Args:
        video, length: of every clip [n].
    """
    videos = int(video.max(initial=0)) + 1
    to = np.concatenate([links.a * videos + video[links.b], links.b * videos + video[links.a]])
    _, place = np.unique(to, return_inverse=True)
    best = np.zeros(len(place), np.float32)
    np.maximum.at(best, place, np.tile(links.similarity, 2))
    best_of_a, best_of_b = (np.tile(links.similarity, 2) >= best[place] - TIE).reshape(2, -1)
    ratio = length[links.a] / length[links.b]
    return links[(best_of_a | (ratio > 1 / FRAGMENT)) & (best_of_b | (ratio < FRAGMENT))]


def components(n: int, edges: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The lowest index in each index's connected component: int64 [n]."""
    parent = list(range(n))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for a, b in edges:
        for i, j in zip(a.tolist(), b.tolist()):
            i, j = root(i), root(j)
            parent[max(i, j)] = min(i, j)
    return np.array([root(i) for i in range(n)], np.int64)


def stars(same: np.ndarray, links: dict[str, Links]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What each clip repeats, why, and how similar it is: `of`, `kind` and `similarity` of `Duplicates`.

    Args:
        same: the first clip with the very pictures of each, int64 [n].
        links: kind -> links among those first clips.
    """
    n = len(same)
    of, why, similarity = np.full(n, -1), np.full(n, -1, np.int8), np.full(n, np.nan, np.float32)
    strong = [(KINDS.index(kind), found[found.covered >= COVERED]) for kind, found in links.items()]
    every = sorted(
        edge for kind, found in strong for edge in zip(*found.ends(), [kind] * len(found), found.similarity.tolist())
    )
    for i, j, kind, like in every:
        if of[i] < 0 and of[j] < 0:  # i stands for itself: whatever could take it came before
            of[j], why[j], similarity[j] = i, kind, like
    for i in np.flatnonzero(same != np.arange(n)):  # the same pictures repeat the same
        first = same[i]
        of[i], why[i], similarity[i] = (first, 0, 1.0) if of[first] < 0 else (of[first], why[first], similarity[first])
    return of, why, similarity
