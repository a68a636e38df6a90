"""Which of two videos people prefer, not knowing whose they are: the pairs, the votes, and what they say."""

from __future__ import annotations

import json
import math
import os
import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Literal, cast, get_args

from datakit.errors import CatalogError, ConfigError
from datakit.hashing import hash_bytes, hash_hex
from sampler.evaluate.result_sets import SampleSet, file_of, key_of

FILE = "preferences.jsonl"
"""In the first of the result catalogs, beside the folders of its tables."""
Choice = Literal["left", "right", "tie"]
Z = 1.959963984540054
"""Of 95 %."""


@dataclass(frozen=True)
class Shown:
    """One side of a pair. `place`: uri, stream and span of its pixels."""

    sample_id: str
    label: str
    file: str
    place: tuple[str, int, int, int]


@dataclass(frozen=True)
class Pair:
    """Two samples of the same prompt, seed and number by different checkpoints; which is left is drawn."""

    pair_id: str
    prompt: str
    left: Shown
    right: Shown


@dataclass(frozen=True)
class Vote:
    """What somebody said of a pair; their newest counts. Labels are of then: samples say for ever whose they are."""

    pair: str
    left: str
    right: str
    choice: Choice
    author: str
    time: str


@dataclass(frozen=True)
class Tally:
    """Votes on the pairs of two checkpoints.

    Attributes:
        rate: share of a's wins among wins (ties left out), None without any; `low`, `high`: its 95 % Wilson interval.
    """

    a: str
    b: str
    wins_a: int
    wins_b: int
    ties: int
    rate: float | None
    low: float | None
    high: float | None

    def __str__(self) -> str:
        rate = "no wins yet" if self.rate is None else f"win rate {self.rate:.0%} [{self.low:.0%}, {self.high:.0%}]"
        return f"{self.a} against {self.b}: {self.wins_a} wins, {self.wins_b} losses, {self.ties} ties; {rate}"


def make_pairs(sets: Sequence[SampleSet], seed: int) -> list[Pair]:
    """All pairs of samples that differ in nothing but the checkpoint, in a drawn order, sides drawn.

    Raises:
        ConfigError: there is none.
    """
    groups: dict[tuple, list[Shown]] = defaultdict(list)
    for s in sets:
        for row in s.videos.iter_rows(named=True):
            place = (row["uri"], row["stream"], row["start_pts"], row["end_pts"])
            groups[key_of(row)].append(Shown(row["sample_id"], s.label, file_of(s.root, row), place))
    pairs = [
        _pair(key[0] or "", a, b, seed)
        for key, shown in groups.items()
        for a, b in combinations(shown, 2)
        if a.label != b.label
    ]
    if not pairs:
        raise ConfigError(
            "no two checkpoints have a video of the same prompt, seed and number: sample both with the same prompts"
        )
    return sorted(pairs, key=lambda pair: _draw(seed, "order", pair.pair_id))


class Votes:
    """A file of votes, one JSON object a line; each is on the disk before `add` returns. Threads may share it.

    Raises:
        CatalogError: a line of it cannot be read. One without an end was cut off by a crash and does not count.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._lock = threading.Lock()
        self._votes = _read(self.path)

    def add(self, pair: Pair, choice: str, author: str) -> Vote:
        """Raises:
        ConfigError: no such choice.
        CatalogError: the disk does not take it.
        """
        if choice not in get_args(Choice):
            raise ConfigError(f"a choice is {', '.join(get_args(Choice))}, not {choice!r}")
        vote = Vote(
            pair.pair_id,
            pair.left.sample_id,
            pair.right.sample_id,
            cast(Choice, choice),
            author,
            datetime.now(UTC).isoformat(),
        )
        with self._lock:
            self._append(json.dumps(asdict(vote), ensure_ascii=False))
            self._votes.append(vote)
        return vote

    def all(self) -> list[Vote]:
        """The newest of each author on each pair."""
        with self._lock:
            return list({(vote.pair, vote.author): vote for vote in self._votes}.values())

    def done(self, author: str) -> set[str]:
        """Pairs that somebody has voted on."""
        return {vote.pair for vote in self.all() if vote.author == author}

    def _append(self, line: str) -> None:
        try:
            with open(self.path, "ab+") as file:
                if file.seek(0, os.SEEK_END) and _last_byte(file) != b"\n":
                    line = f"\n{line}"
                file.write(f"{line}\n".encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as e:
            raise CatalogError(f"the vote cannot be written to {self.path}: {e.strerror}") from e


def votes_of(sets: Sequence[SampleSet]) -> Votes:
    """Those in the first result catalog.

    Raises:
        ConfigError: it does not lie on this machine.
    """
    root = sets[0].root
    if "://" in root:
        raise ConfigError(f"votes are kept in the first folder of samples, and {root} is not on this machine")
    return Votes(Path(root) / FILE)


def tally(votes: Iterable[Vote], sets: Sequence[SampleSet]) -> list[Tally]:
    """Votes by pair of checkpoints, in the order of the sets; votes on other samples do not count."""
    labels = {sample: s.label for s in sets for sample in s.rows["sample_id"]}
    rank = {s.label: i for i, s in enumerate(sets)}
    counts: dict[tuple[str, str], dict[str | None, int]] = defaultdict(lambda: defaultdict(int))
    for vote in votes:
        left, right = labels.get(vote.left), labels.get(vote.right)
        if left is None or right is None:
            continue
        a, b = sorted((left, right), key=rank.__getitem__)
        counts[a, b][{"left": left, "right": right, "tie": None}[vote.choice]] += 1
    order = sorted(counts, key=lambda pair: (rank[pair[0]], rank[pair[1]]))
    return [_tally(a, b, counts[a, b][a], counts[a, b][b], counts[a, b][None]) for a, b in order]


def wilson(wins: int, trials: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    share, spread = wins / trials, Z * Z / trials
    centre = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / trials + spread / (4 * trials)) / (1 + spread)
    return 0.0 if wins == 0 else centre - half, 1.0 if wins == trials else centre + half


def _tally(a: str, b: str, wins_a: int, wins_b: int, ties: int) -> Tally:
    decided = wins_a + wins_b
    low, high = wilson(wins_a, decided) if decided else (None, None)
    return Tally(a, b, wins_a, wins_b, ties, wins_a / decided if decided else None, low, high)


def _pair(prompt: str, a: Shown, b: Shown, seed: int) -> Pair:
    a, b = sorted((a, b), key=lambda shown: shown.sample_id)
    pair_id = hash_hex(f"{a.sample_id}/{b.sample_id}", 12, "datakit-prefer")
    return Pair(pair_id, prompt, *((b, a) if _draw(seed, "sides", pair_id)[0] & 1 else (a, b)))


def _draw(seed: int, what: str, pair_id: str) -> bytes:
    return hash_bytes(f"{seed}/{what}/{pair_id}", 8, "datakit-prefer")


def _read(path: Path) -> list[Vote]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as e:
        raise CatalogError(f"cannot read {path}: {e.strerror}") from e
    votes = []
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        try:
            if line.strip():
                votes.append(Vote(**json.loads(line)))
        except (ValueError, TypeError) as e:
            if line.startswith(b"{") and not line.endswith(b"}"):
                continue  # what a crash cut off; the next vote began a new line
            raise CatalogError(
                f"{path}, line {number} is no vote: {str(e)[:100]}; remove it or move the file away"
            ) from e
    return votes


def _last_byte(file) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)
