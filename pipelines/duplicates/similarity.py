"""Which clips look alike: candidates from an index, then compared. On arrays, clips in order of preference (index 0
is the best).

Perceptual: sequences of frame hashes (`pipelines.stages.phash`) that agree where they overlap at their best time
offset. Semantic: near embeddings of one model.

Comparing all with all is quadratic, so candidates come from indexes of faiss (MIT, maintained by Meta since 2017,
wheels for every Python we support): hash tables over parts of a hash for frames; inverted lists around k-means centres
for embeddings. Both grow near-linearly. What very many clips share (a title card) does not bring the square back: a
frame is linked to at most `NEIGHBOURS` other frames, each standing for the `STANDING` best clips that have it;
`duplicates.complete` then compares everything in a group with the group's best clips, so that what these limits left
out is found through them.

Memory: 8 bytes a frame hash and about 200 in its index, so 1 kB for a clip of 8 s; for embeddings 4 bytes a
dimension, twice (6 kB at 768); a few hundred bytes a clip for links.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RADIUS = 6
"""Bits of 64 by which hashes of the same picture may differ. Of 1215 frames of 12 films 99.8 % lay within it after
scaling, CRF 35 and grey, 97 after cropping and 94 with a large opaque logo. Of pictures that have nothing in common
about one pair in a million does (700 pictures and parts of them, 33 M pairs; one in 100 000 at 10 bits), so where
there are millions of clips 4 is the better choice."""
SHARE = 0.5
"""Share of the frames that both clips show which must lie within the radius."""
OVERLAP = 0.5
"""Share of the shorter clip that the other must show."""
SURE = 4
"""Frames; a clip of fewer has less to agree in, so the radius shrinks in proportion."""
UNRELATED = 32
"""Mean distance of unrelated hashes, bits: similarity 0."""
THRESHOLDS = {"efficientnet-lite0": 0.90}
"""Least cosine of embeddings that count as copies, by model. efficientnet-lite0: over 12 films and their copies 98 % of
cropped and trimmed clips, 90 % of those at half size, 2 % of grey ones reach it; clips of different films at most
0.60, of one film 10 s apart 1.5 %."""
OTHER_THRESHOLD = 0.97
"""CLIPs and others. Not measured here, for want of weights: between the 0.90 and 0.99 of NeMo Curator's examples."""

NEIGHBOURS = 32
STANDING = 8
CANDIDATES = 32
"""Clips that a clip is compared with, at most: those with which it shares the most frames."""
ALIKE = 3
"""Bits: a frame nearer to one before it in the clip is not looked up, being nearly the same picture."""
LIST_LENGTH = 64
PROBES = 8
"""Embeddings per inverted list, and lists looked into: near-duplicates lie in the same or the next list."""
MOST_NEIGHBOURS = 1024


def threshold_of(model: str) -> float:
    """Least cosine of two embeddings by `model` that count as copies."""
    return THRESHOLDS.get(model, OTHER_THRESHOLD)


@dataclass(frozen=True)
class Links:
    """Pairs of clips that show the same.

    Attributes:
        a, b: indices, int64 [p]; a < b: a is preferred.
        similarity: 0..1, float32 [p].
        covered: share of b that a shows, float32 [p].
    """

    a: np.ndarray
    b: np.ndarray
    similarity: np.ndarray
    covered: np.ndarray

    def __getitem__(self, chosen: np.ndarray) -> Links:
        return Links(self.a[chosen], self.b[chosen], self.similarity[chosen], self.covered[chosen])

    def __len__(self) -> int:
        return len(self.a)

    def joined(self, more: Links) -> Links:
        """These links, then more."""
        pairs = zip(vars(self).values(), vars(more).values())
        return Links(*(np.concatenate(pair) for pair in pairs))

    def ends(self) -> tuple[list[int], list[int]]:
        return self.a.tolist(), self.b.tolist()

    def of(self, clips: np.ndarray) -> Links:
        """Links among a subset of the clips as links among all; `clips` are the subset's indices, rising."""
        return Links(clips[self.a], clips[self.b], self.similarity, self.covered)


class Perceptual:
    """Clips compared by their frame hashes.

    Args:
        phash: 8 bytes for every frame, in order of time.
        video: which video each clip is of, integers [n].
        radius, share: see `RADIUS`, `SHARE`.
        within_video: also compare clips of one video.
    """

    def __init__(
        self,
        phash: Sequence[bytes],
        video: np.ndarray,
        radius: int = RADIUS,
        share: float = SHARE,
        within_video: bool = False,
    ):
        self._frames = np.frombuffer(b"".join(phash), "<u8")
        self._lengths = np.array([len(p) // 8 for p in phash], np.int64)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._video, self._radius, self._share, self._within = np.asarray(video), radius, share, within_video

    def compare(self, a: np.ndarray, b: np.ndarray) -> Links:
        """Links among the given pairs (a < b): those that agree at their best offset."""
        usable = (np.minimum(self._lengths[a], self._lengths[b]) > 0) & (
            self._within | (self._video[a] != self._video[b])
        )
        a, b = a[usable], b[usable]
        similarity, covered = np.zeros(len(a), np.float32), np.zeros(len(a), np.float32)
        for some in self._batches(a, b):
            similarity[some], covered[some] = self._align(a[some], b[some])
        return Links(a, b, similarity, covered)[similarity > 0]

    def candidates(self) -> tuple[np.ndarray, np.ndarray]:
        """Pairs that share a frame, a < b, each once."""
        import faiss

        clip, value = self._key_frames()
        if not len(value):
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        distinct, standing = _standing(value, clip)
        bits = min(21, max(8, math.ceil(math.log2(len(distinct) + 1))))
        index = faiss.IndexBinaryMultiHash(64, 64 // bits, bits)
        index.nflip = 1
        index.add(_as_bytes(distinct))
        pairs = [np.zeros(0, np.int64)]
        for some in _whole_clips(clip, 1 << 14):
            distance, near = index.search(_as_bytes(value[some]), min(NEIGHBOURS, len(distinct)))
            near[(distance > self._radius + ALIKE)] = -1
            pairs.append(self._most_shared(clip[some], near, standing))
        n = len(self._lengths)
        key = np.unique(np.concatenate(pairs))
        return key // n, key % n

    def _most_shared(self, clip: np.ndarray, near: np.ndarray, standing: np.ndarray) -> np.ndarray:
        """For each clip the others that share most frames with it, as keys a · n + b.

        Args:
            clip: of every frame looked up [q].
            near: places in `standing` of the frames found near [q, k], −1: none.
            standing: the clips that stand for each distinct frame [u, STANDING], −1: none.
        """
        n = len(self._lengths)
        frame, place = np.nonzero(near >= 0)
        other = standing[near[frame, place]]
        key = np.unique((frame[:, None] * n + other)[other >= 0])  # a frame counts once per clip
        mine, other = clip[key // n], key % n
        wanted = (mine != other) & (self._within | (self._video[mine] != self._video[other]))
        key, votes = np.unique(mine[wanted] * n + other[wanted], return_counts=True)
        mine, other = key // n, key % n
        order = np.lexsort((other, -votes, mine))
        order = order[_place_in_run(mine[order]) < CANDIDATES]
        mine, other = mine[order], other[order]
        return np.minimum(mine, other) * n + np.maximum(mine, other)

    def _key_frames(self) -> tuple[np.ndarray, np.ndarray]:
        """Frames that are not nearly the same as one before them in their clip: clip [q] and hash [q]."""
        left = np.arange(len(self._frames))
        owner = np.repeat(np.arange(len(self._lengths)), self._lengths)
        chosen = []
        while len(left):
            first = left[np.concatenate([[True], owner[left][1:] != owner[left][:-1]])]
            chosen.append(first)
            leader = np.zeros(len(self._lengths), "<u8")
            leader[owner[first]] = self._frames[first]
            left = left[np.bitwise_count(self._frames[left] ^ leader[owner[left]]) > ALIKE]
        chosen = np.sort(np.concatenate(chosen)) if chosen else left
        return owner[chosen], self._frames[chosen]

    def _batches(self, a: np.ndarray, b: np.ndarray) -> Iterator[np.ndarray]:
        """Indices of pairs of about equal length, as many at a time as take 32 MB."""
        longest = np.maximum(self._lengths[a], self._lengths[b])
        order = np.argsort(longest, kind="stable")
        start = 0
        while start < len(order):
            size = max(1, (1 << 21) // int(longest[order[min(start + 4096, len(order)) - 1]]) ** 2)
            yield order[start : start + min(size, 4096)]
            start += min(size, 4096)

    def _align(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Similarity and covered share of b at the best offset; 0 where they do not agree."""
        la, lb = self._lengths[a], self._lengths[b]
        x, y = self._padded(a, la), self._padded(b, lb)[:, ::-1]
        both = (np.arange(x.shape[1]) < la[:, None])[:, :, None] & (np.arange(y.shape[1])[::-1] < lb[:, None])[
            :, None, :
        ]
        distance = np.bitwise_count(x[:, :, None] ^ y[:, None, :])
        shorter = np.minimum(la, lb)
        radius = self._radius * np.minimum(1.0, shorter / SURE)
        frames = _offset_sums(both)
        same = _offset_sums(both & (distance <= radius[:, None, None]))
        apart = _offset_sums(np.where(both, distance, 0)) / np.maximum(frames, 1)
        possible = (frames >= np.maximum(1, OVERLAP * shorter)[:, None]) & (same >= self._share * frames)
        score = np.where(possible, same - apart / 64, -1.0)
        best = score.argmax(axis=1)[:, None]
        similarity = np.maximum(1 - np.take_along_axis(apart, best, 1)[:, 0] / UNRELATED, 1e-3)
        agree = np.take_along_axis(score, best, 1)[:, 0] > 0
        return np.where(agree, similarity, 0), np.take_along_axis(frames, best, 1)[:, 0] / lb

    def _padded(self, clips: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        place = np.minimum(self._starts[clips][:, None] + np.arange(lengths.max()), len(self._frames) - 1)
        return self._frames[place]


class Semantic:
    """Clips compared by embeddings of one model.

    Args:
        vectors: float32 [n, d], of unit length.
        video: which video each clip is of, integers [n].
        threshold: least cosine of copies.
        within_video: also compare clips of one video.
    """

    def __init__(self, vectors: np.ndarray, video: np.ndarray, threshold: float, within_video: bool = False):
        self._vectors = np.ascontiguousarray(vectors, np.float32)
        self._video, self._threshold, self._within = np.asarray(video), threshold, within_video

    def compare(self, a: np.ndarray, b: np.ndarray) -> Links:
        """Links among the given pairs (a < b)."""
        other = self._within | (self._video[a] != self._video[b])
        a, b = a[other], b[other]
        cosine = np.empty(len(a), np.float32)
        for start in range(0, len(a), 1 << 14):
            some = slice(start, start + (1 << 14))
            cosine[some] = np.einsum("pd,pd->p", self._vectors[a[some]], self._vectors[b[some]])
        return Links(a, b, np.minimum(cosine, 1), np.ones(len(a), np.float32))[cosine >= self._threshold]

    def candidates(self) -> tuple[np.ndarray, np.ndarray]:
        """Near pairs, a < b, each once. A clip all of whose neighbours are near enough is asked for more."""
        n = len(self._vectors)
        if n < 2:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        index = _inverted_lists(self._vectors)
        asked, k = np.arange(n), min(n, NEIGHBOURS)
        pairs = []
        while len(asked):
            full = []
            for start in range(0, len(asked), 1 << 12):
                some = asked[start : start + (1 << 12)]
                cosine, near = index.search(self._vectors[some], k)
                row, place = np.nonzero((cosine >= self._threshold - 1e-4) & (near >= 0) & (near != some[:, None]))
                mine, other = some[row], near[row, place]
                pairs.append(np.unique(np.minimum(mine, other) * n + np.maximum(mine, other)))
                full.append(some[cosine[:, -1] >= self._threshold])
            most = min(n, MOST_NEIGHBOURS)
            asked, k = np.concatenate(full) if k < most else asked[:0], min(4 * k, most)
        key = np.unique(np.concatenate(pairs))
        return key // n, key % n


def _inverted_lists(vectors: np.ndarray) -> Any:
    """An index of inner products over unit vectors.

    Centres are compared with one by one: a graph over them (HNSW) would be a little quicker from millions of clips on,
    but faiss builds it in parallel, another one each time, and a second run would find other pairs.
    """
    import faiss

    n, d = vectors.shape
    lists = max(1, min(n // LIST_LENGTH, round(4 * math.sqrt(n))))  # beyond 65 000 as faiss's guidelines say
    index: Any = faiss.index_factory(d, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    index.cp.niter, index.cp.max_points_per_centroid, index.cp.min_points_per_centroid = 2, 16, 1  # more finds no more
    index.train(vectors)
    index.add(vectors)
    index.nprobe = min(lists, PROBES)
    return index


def _standing(value: np.ndarray, clip: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct hashes [u] and, for each, the best clips that have it [u, STANDING] (−1: no more)."""
    order = np.lexsort((clip, value))
    value, clip = value[order], clip[order]
    again = np.concatenate([[False], (value[1:] == value[:-1]) & (clip[1:] == clip[:-1])])
    value, clip = value[~again], clip[~again]
    distinct, group = np.unique(value, return_inverse=True)
    place = _place_in_run(value)
    standing = np.full((len(distinct), STANDING), -1, np.int64)
    few = place < STANDING
    standing[group[few], place[few]] = clip[few]
    return distinct, standing


def _place_in_run(values: np.ndarray) -> np.ndarray:
    """0, 1, 2 … within each run of equal values."""
    starts = np.concatenate([[True], values[1:] != values[:-1]]) if len(values) else np.zeros(0, bool)
    begin = np.flatnonzero(starts)
    return np.arange(len(values)) - np.repeat(begin, np.diff(np.append(begin, len(values))))


def _whole_clips(clip: np.ndarray, size: int) -> Iterator[slice]:
    """Slices of about `size` frames that divide no clip."""
    start = 0
    while start < len(clip):
        end = int(np.searchsorted(clip, clip[min(start + size, len(clip)) - 1], "right"))
        yield slice(start, end)
        start = end


def _as_bytes(hashes: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(hashes).view(np.uint8).reshape(-1, 8)


def _offset_sums(values: np.ndarray) -> np.ndarray:
    """Sums of [p, x, y] over places with equal x + y: [p, x + y − 1]. (y runs backwards: equal time offsets.)"""
    p, x, y = values.shape
    wide = np.zeros((p, x, x + y), np.int32)
    wide[:, :, :y] = values
    return wide.reshape(p, -1)[:, : x * (x + y - 1)].reshape(p, x, x + y - 1).sum(axis=1)
