"""Which frames a window takes: exact lists for known rates, bounds for all of them."""

from fractions import Fraction

import numpy as np
import pytest

from datakit.errors import MediaError
from trainer.planning.frame_rate import choose_frames, frame_rate, frame_rates, frames_needed

NTSC = Fraction(1000, 1001)


def times(rate, count: int, base: Fraction | None = None) -> list[Fraction]:
    """Of an even source; on a time base, as the file would hold them."""
    exact = [Fraction(i) / Fraction(rate) for i in range(count)]
    return [round(t / base) * base for t in exact] if base else exact


def chosen(
    rate, frames: int = 9, target: float = 24, count: int = 200, base: Fraction | None = None, **options
) -> tuple[list[int], float]:
    found = frame_rate(float(rate), target, **options)
    return choose_frames(times(rate, count, base), 0, frames, found.stride, found.fps), found.fps


EVERY, SECOND, FIFTH = list(range(9)), list(range(0, 18, 2)), list(range(0, 45, 5))


@pytest.mark.parametrize(
    "rate, indices, fps",
    [
        (24, EVERY, 24.0),
        (24 * NTSC, EVERY, 23.976),
        (25, EVERY, 25.0),
        (30 * NTSC, EVERY, 29.97),
        (30, EVERY, 30.0),
        (12, EVERY, 12.0),
        (15, EVERY, 15.0),
        (48, SECOND, 24.0),
        (48 * NTSC, SECOND, 23.976),
        (50, SECOND, 25.0),
        (60 * NTSC, SECOND, 29.97),
        (60, SECOND, 30.0),
        (Fraction("60.02"), SECOND, 30.01),
        (120, FIFTH, 24.0),
        (120 * NTSC, FIFTH, 23.976),
        (240, list(range(0, 90, 10)), 24.0),
        (100, list(range(0, 36, 4)), 25.0),
        (Fraction("45.6"), SECOND, 22.8),
        (125, [0, 5, 10, 16, 21, 26, 31, 36, 42], 24.0),  # by timestamps: 4 ms off at most
    ],
)
def test_frames_for_a_target_of_24(rate, indices, fps):
    assert chosen(rate) == (indices, fps)
    assert chosen(rate, base=Fraction(1, 90_000))[0] == indices  # as MPEG holds times
    assert chosen(rate, base=Fraction(1, 1000))[0] == indices  # as Matroska does


@pytest.mark.parametrize(
    "rate, indices",
    [
        (30, [0, 1, 2, 4, 5, 6, 7, 9, 10]),
        (25, [*range(13), *range(13, 25)][:9]),
        (50, [0, 2, 4, 6, 8, 10, 12, 15, 17]),
        (60, [0, 2, 5, 7, 10, 12, 15, 17, 20]),
    ],
)
def test_a_wider_limit_takes_frames_by_timestamp(rate, indices):
    assert chosen(rate, time_error=0.5) == (indices, 24.0)


def test_25_to_24_by_timestamp_leaves_out_one_frame_a_second():
    indices, _ = chosen(25, frames=49, time_error=0.5)
    assert indices[-1] == 50 and len(set(range(51)) - set(indices)) == 2


def test_a_target_of_12():
    assert frame_rate(24, 12) == frame_rate(24, 12, time_error=0.0)
    assert [(frame_rate(f, 12).stride, frame_rate(f, 12).fps) for f in (24, 25, 30, 60)] == [
        (2, 12.0),
        (2, 12.5),
        (2, 15.0),
        (5, 12.0),
    ]


@pytest.mark.parametrize(
    "mean, fps", [(24.2, 24.2), (23.6, 23.6), (30, 24.0), (27, 24.0), (22, 12.0), (15, 12.0), (8.5, 8.0), (60, 24.0)]
)
def test_a_variable_rate_goes_by_timestamp(mean, fps):
    assert frame_rate(mean, 24, vfr=True).stride == 0
    assert frame_rate(mean, 24, vfr=True).fps == fps


def test_a_variable_rate_on_real_times():
    """A phone's 30 frames/s without frames 5 and 11, at a target of 24."""
    moments = [Fraction(i, 30) for i in range(40) if i not in (5, 11)]
    indices = choose_frames(moments, 0, 13, 0, 24.0)
    assert [moments[i] * 30 for i in indices] == [0, 1, 2, 4, 6, 7, 8, 9, 10, 12, 13, 14, 15]
    late = [abs(moments[i] - Fraction(n, 24)) * 1000 for n, i in enumerate(indices)]
    assert max(late) == Fraction(100, 3) and sorted(late)[-2] <= 25  # ms: the missing frame 5 would have been exact


def test_jitter_does_not_repeat_a_frame():
    rng = np.random.default_rng(0)
    moments = [Fraction(i, 24) + Fraction(int(rng.integers(-10, 11)), 1000) for i in range(100)]
    assert choose_frames(moments, 0, 100, 0, 24.0) == list(range(100))


def test_a_gap_that_no_frame_fills_is_told():
    moments = [Fraction(i, 30) for i in range(60) if not 20 <= i < 40]
    with pytest.raises(MediaError, match=r"too unevenly for 24 frames/s: the nearest left at 0\.\d+ s is \d+ ms away"):
        choose_frames(moments, 0, 30, 0, 24.0)


def test_a_clip_with_fewer_frames_than_its_row_says():
    with pytest.raises(MediaError, match="the clip has 16 frames, the window needs frame 16") as told:
        choose_frames(times(24, 16), 0, 17, 1, 24.0)
    assert told.value.kind == "truncated"
    with pytest.raises(MediaError, match="needs frame 30"):
        choose_frames(times(24, 20), 10, 11, 2, 12.0)


def test_a_picture_is_one_frame():
    assert choose_frames([Fraction(0)], 0, 1, 1, 0.0) == [0]
    assert choose_frames(times(24, 50), 31, 1, 1, 0.0) == [31]


@pytest.mark.parametrize("time_error", [0.0, 0.1, 0.25, 0.5])
def test_every_rate_keeps_the_promises(time_error):
    """No frame twice, as many source frames as `frames_needed` says, the stated rate is the true one, errors within the
    limit."""
    rng = np.random.default_rng(1)
    rates = np.concatenate([rng.uniform(3, 250, 300), [23.976, 24, 25, 29.97, 30, 50, 59.94, 60, 120]])
    strides, fps = frame_rates(rates, np.zeros(len(rates), bool), 24.0, time_error)
    needed = frames_needed(33, strides, fps, rates)
    for rate, stride, stated, need in zip(rates, strides, fps, needed):
        moments = [i / rate for i in range(int(need))]
        indices = choose_frames(moments, 0, 33, int(stride), float(stated))
        assert len(indices) == 33 and all(a < b for a, b in zip(indices, indices[1:])) and indices[-1] == need - 1
        off = [abs(moments[i] - n / stated) for n, i in enumerate(indices)]
        if stride:
            assert max(off) < 0.003 and stated == pytest.approx(rate / stride, abs=5e-4)
            assert stride == 1 or abs(stated / 24 - 1) <= 0.35  # the nearest that a whole fraction comes to
        else:
            assert stated == 24.0 and max(off) <= time_error / 24 + 1e-9 and rate > 24
    if time_error == 0:
        assert (strides > 0).all()


def test_rates_within_two_per_cent_are_one_to_one():
    for k in (1, 2, 3, 5):
        for off in (-0.0199, 0.0, 0.0199):
            assert frame_rate(24 * k * (1 + off), 24).stride == k


def test_two_per_cent_are_the_same_rate_and_three_are_not():
    """Seen where frames come unevenly: the clip's own mean rate, or the target."""
    assert [frame_rate(24 * f, 24, vfr=True).fps for f in (1.019, 1.021, 1.03, 0.981)] == [24.456, 24.0, 24.0, 23.544]
    assert [frame_rate(mean, 24, vfr=True).fps for mean in (12.0, 6.0, 12 * (1 - 2e-10))] == [12.0, 6.0, 12.0]


def test_a_limit_that_is_met_but_for_rounding_is_met():
    """60 to 24 by timestamp is off by a fifth of an interval."""
    rates = [60.0, 60 * (1 - 5e-10), 60 * (1 - 1e-7)]
    assert [frame_rate(rate, 24, time_error=0.2).stride for rate in rates] == [0, 0, 2]
    assert frame_rate(24.6, 24, time_error=0.5).stride == 0 and frame_rate(23.0, 24, time_error=0.5).stride == 1


def test_rates_have_three_decimals_and_are_those_of_their_clips():
    strides, fps = frame_rates(np.array([25.12345, 60.0]), np.array([False, False]), 24.0)
    assert (strides.tolist(), fps.tolist(), strides.dtype) == ([1, 2], [25.123, 30.0], np.int64)


def test_frames_needed():
    """By stride: n - 1 strides and one. By time: to the frame nearest to the last moment, the earlier of two."""
    cases = [
        # frames, stride, fps, native: needed
        (9, 1, 12.0, 24.0, 9),
        (9, 3, 8.0, 24.0, 25),
        (2, 0, 24.0, 60.0, 3),  # 2.5 intervals on: the third frame
        (3, 0, 24.0, 60.0, 6),
        (3, 0, 0.5, 1.0, 5),
        (9, 0, 24.0, 20.0, 9),  # never less than one for each
        (1, 1, 0.0, 24.0, 1),
    ]
    for frames, stride, fps, native, needed in cases:
        found = frames_needed(frames, np.array([stride]), np.array([fps]), np.array([native]))
        assert found.tolist() == [needed], (frames, stride, fps, native)


def test_two_frames_by_timestamp():
    """41.7 ms on, frames lie at 33.3 and 50 ms: as near as each other, the earlier is taken."""
    assert choose_frames(times(60, 20), 0, 2, 0, 24.0) == [0, 2]
    assert choose_frames(times(60, 20), 5, 2, 0, 24.0) == [5, 7]
    assert choose_frames(times(24, 20), 3, 1, 0, 24.0) == [3]


def test_enough_frames_are_left_for_the_rest_of_the_window():
    """The third moment is nearest to the last frame, which the fourth needs."""
    moments = [Fraction(n, 1000) for n in (0, 20, 45, 125)]
    assert choose_frames(moments, 0, 4, 0, 24.0) == [0, 1, 2, 3]
    with pytest.raises(MediaError, match="the clip has 4 frames, the window needs frame 4"):
        choose_frames(moments, 0, 5, 0, 24.0)


def test_a_frame_may_be_an_interval_late_and_not_later():
    assert choose_frames([Fraction(0), Fraction(2, 24)], 0, 2, 0, 24.0) == [0, 1]
    with pytest.raises(MediaError, match="the nearest left at 0.042 s is 46 ms away"):
        choose_frames([Fraction(0), Fraction(21, 240)], 0, 2, 0, 24.0)
