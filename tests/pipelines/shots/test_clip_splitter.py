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
