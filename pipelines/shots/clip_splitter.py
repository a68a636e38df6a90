"""From cuts to clips: fades out, ends trimmed, long shots divided. Pure, streaming, bounded memory.

Rules, in order:

1. A shot is what lies between two cuts; frames inside a gradual transition belong to none.
2. Dark frames (mean of B, G, R below `fade_level`) next to brighter frames of the same shot are those of a
   *fade*: they belong to no clip and part what lies on either side. But dark frames that show something
   (luma spread of `BLANK_SPREAD` codes) for longer than `LONGEST_FADE_S` are a dark scene, and a shot that is
   dark throughout is a shot: these make clips of their own (recipes judge them by brightness).
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

LONGEST_FADE_S = 2.0
BLANK_SPREAD = 4.0
"""Standard deviation of luma codes (16..235 scale) below which a dark frame shows nothing."""


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
    blank: bool = False  # dark, and showing nothing
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
        self._dark: list[FrameMark] = []  # a dark run that may turn out a scene of its own
        self._longest_fade = LONGEST_FADE_S / time_base
        self._shot_has_picture = False

    @property
    def open_pts(self) -> int | None:
        """No piece still to come starts before this timestamp; None: before that of the next frame."""
        starts = [marks[0].pts for marks in (self._part, self._lead, self._dark) if marks]
        return min(starts) if starts else None

    def push(self, mark: FrameMark) -> list[Piece]:
        """Take the next frame; give the pieces that became certain, in order."""
        pieces = self._end_shot() if mark.cut else []
        if mark.transition:
            return pieces + self._end_part()
        if mark.dark:
            return pieces + self._push_dark(mark)
        if self._part and self._part[-1].dark:  # a dark scene is over
            pieces += self._end_part()
        self._dark = []  # it was a fade
        self._shot_has_picture = True
        return pieces + self._extend(mark)

    def finish(self) -> list[Piece]:
        return self._end_shot()

    def _push_dark(self, mark: FrameMark) -> list[Piece]:
        in_dark_scene = bool(self._part) and self._part[-1].dark
        if in_dark_scene and not (mark.blank and self._shot_has_picture):
            return self._extend(mark)
        pieces = self._end_part()
        if mark.blank and self._shot_has_picture:
            self._dark = []
            return pieces
        if not mark.blank:
            self._dark = [m for m in self._dark if not m.blank]
        self._dark.append(mark)
        lasting = _end(mark) - self._dark[0].pts
        if lasting > (self._horizon if mark.blank else self._longest_fade):
            self._shot_has_picture = not mark.blank
            pieces += self._dark_scene()
        return pieces

    def _dark_scene(self) -> list[Piece]:
        run, self._dark = self._dark, []
        return [piece for mark in run for piece in self._extend(mark)]

    def _end_shot(self) -> list[Piece]:
        pieces = self._end_part()
        if self._dark and not self._shot_has_picture:  # dark throughout
            pieces += self._dark_scene() + self._end_part()
        self._dark = []
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
