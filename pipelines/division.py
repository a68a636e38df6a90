"""From cuts to clips: fades out, ends trimmed, long shots divided. Pure, streaming, bounded memory.

Rules, in order:

1. A shot is what lies between two cuts; frames inside a gradual transition belong to none.
2. A *fade* is a run of dark frames (mean of B, G, R below `fade_level`) next to brighter frames of the same
   shot, no longer than `max_s + min_s`. Its frames belong to no clip and part what lies on either side. A
   longer dark run is a dark scene, and a shot that is dark throughout is a shot: both make clips of
   their own (recipes reject them by brightness).
3. `trim_frames` are taken off both ends of each part, unless nothing would be left.
4. What lasts at most `max_s` is a clip. Longer parts give clips of at most `max_s` each, greedily from the
   front, as long as at least `min_s` remain; a rest between `max_s` and `max_s + min_s` is halved. So
   only a part that is itself shorter than `min_s` gives a clip shorter than `min_s`.
5. A pause of more than `max_s` between two frames ends the shot: the stream has a gap there.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class FrameMark:
    """One frame as the divider sees it.

    `duration` in pts units reaches to the next frame (to the end of the gap's first frame before a gap);
    `change` as in `FrameNote`; `cut`: a new shot begins here; `transition`: inside a gradual one.
    """

    index: int
    pts: int
    duration: int
    change: float
    dark: bool
    cut: bool = False
    transition: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """A clip to be: frames `[start_frame, end_frame)`, timestamps `[start_pts, end_pts)`.

    `change` is the mean frame-to-frame change inside (None for a single frame).
    """

    start_frame: int
    end_frame: int
    start_pts: int
    end_pts: int
    change: float | None


class Divider:
    """Takes frame marks in order, gives pieces as soon as nothing later can change them.

    Args:
        min_s, max_s: seconds.
        trim_frames: frames taken off each end of a part.
        time_base: seconds per pts unit.
    """

    def __init__(self, min_s: float, max_s: float, trim_frames: int, time_base: Fraction):
        self._max = max_s / time_base
        self._horizon = (max_s + min_s) / time_base
        self._trim = trim_frames
        self._part: deque[FrameMark] = deque()  # the open part, its start already trimmed
        self._lead: list[FrameMark] = []  # frames trimmed off its start
        self._dark: list[FrameMark] = []  # a dark run that may be a fade
        self._shot_has_picture = False

    @property
    def open_pts(self) -> int | None:
        """No piece still to come starts before this timestamp (None: before the next mark's)."""
        marks = [m[0].pts for m in (self._part, self._lead, self._dark) if m]
        return min(marks) if marks else None

    def push(self, mark: FrameMark) -> list[Piece]:
        pieces = []
        if mark.cut:
            pieces += self._end_shot()
        if mark.transition:
            pieces += self._end_part()
        elif mark.dark:
            pieces += self._push_dark(mark)
        else:
            if self._dark:  # the fade is over; what was before it ended where it began
                pieces += self._end_part()
                self._dark = []
            elif self._part and self._part[-1].dark:  # a dark scene is over
                pieces += self._end_part()
            self._shot_has_picture = True
            pieces += self._extend(mark)
        return pieces

    def finish(self) -> list[Piece]:
        return self._end_shot()

    def _push_dark(self, mark: FrameMark) -> list[Piece]:
        if self._part and self._part[-1].dark:
            return self._extend(mark)
        self._dark.append(mark)
        if mark.pts + mark.duration - self._dark[0].pts <= self._horizon:
            return []
        return self._dark_scene()

    def _dark_scene(self) -> list[Piece]:
        """The dark run was no fade: it becomes a part of its own."""
        run, self._dark = self._dark, []
        pieces = self._end_part()
        for mark in run:
            pieces += self._extend(mark)
        return pieces

    def _end_shot(self) -> list[Piece]:
        pieces = []
        if self._dark:
            if self._shot_has_picture:
                pieces += self._end_part()
                self._dark = []
            else:
                pieces += self._dark_scene()
        pieces += self._end_part()
        self._shot_has_picture = False
        return pieces

    def _extend(self, mark: FrameMark) -> list[Piece]:
        if not self._part and len(self._lead) < self._trim:
            self._lead.append(mark)
            return []
        self._part.append(mark)
        usable = len(self._part) - self._trim
        if usable < 2 or _end(self._part[usable - 1]) - self._part[0].pts < self._horizon:
            return []
        count = 1
        while count < usable and _end(self._part[count]) - self._part[0].pts <= self._max:
            count += 1
        return [self._take(count)]

    def _end_part(self) -> list[Piece]:
        """Close the open part, trim its end and divide the rest."""
        part, lead = self._part, self._lead
        if not part:
            part.extend(lead)  # too short to trim
        elif len(part) > self._trim:
            for _ in range(self._trim):
                part.pop()
        self._lead = []
        if not part:
            return []
        pieces = []
        start, end = part[0].pts, _end(part[-1])
        if end - start > self._max and len(part) > 1:
            middle = (start + end) / 2
            pieces.append(self._take(next((i for i, m in enumerate(part) if i and m.pts >= middle), len(part) - 1)))
        pieces.append(self._take(len(part)))
        return pieces

    def _take(self, count: int) -> Piece:
        marks = [self._part.popleft() for _ in range(count)]
        inner = [m.change for m in marks[1:]]
        change = sum(inner) / len(inner) if inner else None
        return Piece(marks[0].index, marks[-1].index + 1, marks[0].pts, _end(marks[-1]), change)


def _end(mark: FrameMark) -> int:
    return mark.pts + mark.duration
