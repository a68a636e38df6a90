"""From cuts to clips: what belongs to which clip, by construction."""

from fractions import Fraction

import pytest

from pipelines.shots.clip_splitter import Divider, FrameMark

TB = Fraction(1, 100)  # pts in hundredths of a second


def divide(marks: list[FrameMark], min_s=2.0, max_s=8.0, trim=0) -> list[tuple[int, int]]:
    divider = Divider(min_s, max_s, trim, TB)
    pieces = [piece for mark in marks for piece in divider.push(mark)] + divider.finish()
    for piece in pieces:
        assert piece.start_pts == marks[piece.start_frame].pts
        assert piece.end_pts == marks[piece.end_frame - 1].pts + marks[piece.end_frame - 1].duration
    return [(p.start_frame, p.end_frame) for p in pieces]


def marks(seconds: float, cuts=(), dark=(), blank=(), transition=(), fps=10) -> list[FrameMark]:
    step = 100 // fps

    def inside(i: int, spans) -> bool:
        return any(a <= i < b for a, b in spans)

    return [
        FrameMark(
            i,
            i * step,
            step,
            1.0,
            dark=inside(i, dark) or inside(i, blank),
            blank=inside(i, blank),
            cut=i in cuts,
            transition=inside(i, transition),
        )
        for i in range(round(seconds * fps))
    ]


def test_shots_are_clips():
    assert divide(marks(9, cuts=(30, 71))) == [(0, 30), (30, 71), (71, 90)]


def test_short_shots_stay_as_clips():
    assert divide(marks(5, cuts=(10, 15))) == [(0, 10), (10, 15), (15, 50)]


@pytest.mark.parametrize(
    "seconds, lengths",
    [
        (8, [80]),
        (8.1, [41, 40]),
        (9.9, [50, 49]),
        (10, [80, 20]),
        (17, [80, 45, 45]),
        (18, [80, 80, 20]),
        (26.5, [80, 80, 80, 25]),
    ],
)
def test_long_shots_divide_greedily_and_the_rest_is_never_too_short(seconds, lengths):
    clips = divide(marks(seconds))
    got = [b - a for a, b in clips]
    assert got == lengths
    assert clips[0][0] == 0 and clips[-1][1] == round(seconds * 10)
    assert all(a[1] == b[0] for a, b in zip(clips, clips[1:]))


def test_ends_are_trimmed_unless_nothing_would_be_left():
    assert divide(marks(6, cuts=(30,)), trim=3) == [(3, 27), (33, 57)]
    assert divide(marks(0.3), trim=3) == [(0, 3)]
    assert divide(marks(12), trim=2) == [(2, 82), (82, 118)]


def test_fades_belong_to_no_clip():
    assert divide(marks(9, dark=[(40, 52)])) == [(0, 40), (52, 90)]
    assert divide(marks(9, cuts=(46,), dark=[(40, 52)])) == [(0, 40), (52, 90)]  # with a cut in its middle
    assert divide(marks(5, dark=[(0, 8)], blank=[(0, 4)])) == [(8, 50)]  # fade in at the beginning
    assert divide(marks(5, dark=[(42, 50)], blank=[(46, 50)])) == [(0, 42)]  # fade out at the end


def test_black_between_fades_is_no_clip_however_long():
    clips = divide(marks(60, dark=[(40, 45), (500, 505)], blank=[(45, 500)]))
    assert clips[0] == (0, 40) and clips[1][0] == 505
    assert not any(a < 500 and b > 45 for a, b in clips)


def test_a_dark_scene_is_a_clip():
    assert divide(marks(12, dark=[(40, 80)])) == [(0, 40), (40, 80), (80, 120)]


def test_a_dark_shot_is_a_clip():
    assert divide(marks(6, cuts=(20, 35), dark=[(20, 35)])) == [(0, 20), (20, 35), (35, 60)]
    assert divide(marks(6, cuts=(20, 35), blank=[(20, 35)])) == [(0, 20), (20, 35), (35, 60)]
    assert divide(marks(3, blank=[(0, 30)])) == [(0, 30)]


def test_frames_inside_a_transition_belong_to_no_clip():
    assert divide(marks(6, cuts=(35,), transition=[(30, 35)])) == [(0, 30), (35, 60)]


def test_memory_is_bounded_by_the_longest_clip():
    divider = Divider(2.0, 8.0, 0, TB)
    held = []
    for mark in marks(600):
        divider.push(mark)
        held.append(mark.pts - (divider.open_pts if divider.open_pts is not None else mark.pts))
    assert max(held) <= 1000  # ten seconds


def test_change_is_the_mean_inside_the_clip():
    divider = Divider(2.0, 8.0, 0, TB)
    for i in range(30):
        divider.push(FrameMark(i, i * 10, 10, change=50.0 if i == 0 else 2.0, dark=False))
    (piece,) = divider.finish()
    assert piece.change == 2.0  # the change from the shot before does not count


def slow(*durations: int, **options) -> list[FrameMark]:
    """Frames of so many hundredths of a second each."""
    starts = [sum(durations[:i]) for i in range(len(durations))]
    return [FrameMark(i, pts, d, 1.0, dark=False, **options) for i, (pts, d) in enumerate(zip(starts, durations))]


def test_change_is_the_mean_of_all_frames_but_the_first():
    divider = Divider(2.0, 8.0, 0, TB)
    for i, change in enumerate([50.0, 1.0, 4.0, 7.0]):
        divider.push(FrameMark(i, i * 10, 10, change, dark=False))
    assert [piece.change for piece in divider.finish()] == [4.0]
    divider.push(FrameMark(4, 40, 10, 9.0, dark=False))
    assert [piece.change for piece in divider.finish()] == [None]


def test_frames_longer_than_a_clip_are_clips():
    assert divide(slow(1200)) == [(0, 1)]
    assert divide(slow(900, 900, 900)) == [(0, 1), (1, 2), (2, 3)]
    assert divide(slow(600, 600, 600)) == [(0, 1), (1, 2), (2, 3)]
    assert divide(slow(100, 800)) == [(0, 1), (1, 2)], "nine seconds are halved where there is a frame to halve at"


def test_a_clip_is_given_as_soon_as_nothing_later_can_change_it():
    """At the frame with which the part lasts ten seconds, the frames to trim not counted."""
    for trim, certain in ((0, 1), (1, 3)):  # one frame is taken off the start, and one is kept back for the end
        divider = Divider(2.0, 8.0, trim, TB)
        found = [
            (i, piece.start_frame, piece.end_frame) for i, m in enumerate(slow(*[600] * 6)) for piece in divider.push(m)
        ]
        assert found[0] == (certain, trim, trim + 1)
    divider = Divider(2.0, 8.0, 0, TB)
    assert [len(divider.push(mark)) for mark in marks(10)] == [0] * 99 + [1]


def test_open_pts_is_where_the_next_clip_begins_at_the_earliest():
    divider = Divider(2.0, 8.0, 2, TB)
    opened = [divider.open_pts]
    for mark in marks(0.5):
        divider.push(mark)
        opened.append(divider.open_pts)
    assert opened == [None, 0, 0, 0, 0, 0], "frames that are trimmed come back where nothing would be left"
    divider.push(FrameMark(5, 50, 10, 1.0, dark=False, cut=True))
    assert divider.open_pts == 50
    divider.finish()
    assert divider.open_pts is None


def test_open_pts_counts_frames_that_may_be_a_dark_scene():
    divider = Divider(2.0, 8.0, 0, TB)
    for mark in marks(3, dark=[(10, 30)]):
        divider.push(mark)
    assert divider.open_pts == 100


def test_a_part_that_trimming_would_leave_empty_keeps_its_end():
    assert divide(marks(0.6), trim=3) == [(3, 6)]
    assert divide(marks(0.7), trim=3) == [(3, 4)]
    assert divide(marks(0.4), trim=3) == [(3, 4)]


def test_two_seconds_of_dark_are_a_fade_and_more_are_a_scene():
    assert divide(marks(9, dark=[(40, 60)])) == [(0, 40), (60, 90)]
    assert divide(marks(9, dark=[(40, 61)])) == [(0, 40), (40, 61), (61, 90)]
    assert divide(marks(0.1) + marks(4, dark=[(1, 40)])[1:]) == [(0, 1), (1, 40)], "after a single frame too"


def test_black_after_a_dark_scene_is_no_clip():
    assert divide(marks(6, dark=[(0, 30)], blank=[(30, 60)])) == [(0, 30)]


def test_a_shot_that_is_black_throughout_divides_as_any_other():
    assert divide(marks(12, blank=[(0, 120)])) == [(0, 80), (80, 120)]
    assert divide(marks(10, blank=[(0, 100)])) == [(0, 80), (80, 100)]


def test_black_from_the_start_for_over_ten_seconds_is_a_clip_of_its_own():
    """As long as it may still be a fade in, nothing is certain."""
    assert divide(marks(12, blank=[(0, 100)])) == [(100, 120)]
    assert divide(marks(12, blank=[(0, 101)])) == [(0, 80), (80, 101), (101, 120)]


def test_dark_frames_show_something_unless_it_is_said_otherwise():
    dark = [FrameMark(i, i * 10, 10, 1.0, dark=40 <= i < 80) for i in range(120)]
    assert divide(dark) == [(0, 40), (40, 80), (80, 120)]
