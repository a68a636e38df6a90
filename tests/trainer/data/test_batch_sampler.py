"""The order of samples: nothing lost, nothing twice, the same for everybody."""

from __future__ import annotations

import hashlib
import math
import random
import struct
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from datakit.errors import ConfigError
from support.plan_folders import bucket, plan_of, window
from trainer.data.batch_sampler import FILES_AT_ONCE, MicroBatch, Order, _changes, draw, share, stand_in
from trainer.planning.plan import ROWS, WINDOWS, Part, write_plan


def drawn(order: Order, epoch: int) -> list[int]:
    return [w for i in range(order.steps(epoch)) for batch in order.step(epoch, i) for w in batch.windows]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Three buckets of 50, 23 and 1 windows in micro-batches of 4, 3 and 2; steps of 5."""
    rows = (
        [window(0, f"v{i // 3:03d}", first=i) for i in range(50)]
        + [window(1, f"v{i:03d}", first=i) for i in range(23)]
        + [window(2)]
    )
    buckets = [bucket(4, tokens=10), bucket(3, frames=9, tokens=70), bucket(2, frames=1, tokens=3)]
    return plan_of(tmp_path_factory.mktemp("plans") / "mixed", rows, buckets, global_batches=5)


def test_every_window_once_an_epoch_in_whole_steps_of_one_bucket(mixed):
    order = Order(mixed, 1)
    for epoch in range(3):
        assert sorted(drawn(order, epoch)) == list(range(74))
        steps = [order.step(epoch, i) for i in range(order.steps(epoch))]
        buckets = mixed.windows.column("bucket").to_pylist()
        assert all(buckets[w] == batch.bucket for step in steps for batch in step for w in batch.windows)
        # 13, 8 and 1 micro-batches: 2 + 1 whole steps of one bucket, what remains (3 + 3 + 1) makes one whole and one
        # of 2.
        assert sorted(len(step) for step in steps) == [2, 5, 5, 5, 5]
        assert len(steps[-1]) == 2
        assert sum(len({b.bucket for b in step}) == 1 for step in steps[:-1]) == 3
        assert [len(b.windows) for step in steps for b in step if b.bucket == 0].count(2) == 1  # 50 = 12 * 4 + 2


def test_another_epoch_and_another_seed_are_another_order(mixed):
    orders = [tuple(drawn(Order(mixed, seed), epoch)) for seed in (1, 2) for epoch in (0, 1)]
    assert len(set(orders)) == 4


def test_random_access_is_sequential_access(mixed):
    order = Order(mixed, 7)
    places = [(epoch, i) for epoch in range(4) for i in range(order.steps(epoch))]
    steps = {place: order.step(*place) for place in places}
    random.Random(0).shuffle(places)
    again = Order(mixed, 7)
    assert {place: again.step(*place) for place in places} == steps
    with pytest.raises(IndexError, match="epoch 0 has 5 steps, no step 5"):
        order.step(0, 5)


def test_known_numbers(mixed):
    """Of no meaning: they change when resuming an old run would give other samples."""
    first = Order(mixed, 1).step(0, 0)[0]
    assert (first.bucket, first.windows) == (0, (38, 6, 8, 22))
    assert first.seeds[0] == 1185052164533459097
    assert draw(first.seeds[0], "crop across") == 0.11210555457666328
    assert stand_in(first.seeds[0], 0, range(100, 150)) == 130


def test_seeds_differ(mixed):
    order = Order(mixed, 1)
    seeds = [s for epoch in (0, 1) for i in range(order.steps(epoch)) for b in order.step(epoch, i) for s in b.seeds]
    assert len(set(seeds)) == len(seeds) == 148
    assert all(0 <= s < 2**63 for s in seeds)
    assert abs(np.mean([s / 2**63 for s in seeds]) - 0.5) < 0.1


@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize("group", [1, 4])
def test_small_sets_lose_nothing(tmp_path, count, group):
    plan = plan_of(tmp_path / "plan", [window(first=i) for i in range(count)], [bucket(2)], global_batches=group)
    order = Order(plan, 3)
    for epoch in range(3):
        assert sorted(drawn(order, epoch)) == list(range(count))
        assert order.steps(epoch) == math.ceil(math.ceil(count / 2) / group)
        assert all(order.step(epoch, i) for i in range(order.steps(epoch)))


@pytest.mark.parametrize("weight", [0.3, 1.0, 2.5])
def test_repeats_walk_through_everything(tmp_path, weight):
    plan = plan_of(tmp_path / "plan", [window(first=i) for i in range(7)], [bucket(2)], weights=[weight])
    order = Order(plan, 3)
    total: list[int] = []
    for epoch in range(8):
        total += drawn(order, epoch)
        assert len(total) == int((epoch + 1) * round(weight * 10) * 7 // 10)
        assert set(Counter(total + list(range(7))).values()) <= {k + 1 for k in (len(total) // 7, len(total) // 7 + 1)}


def test_parts_are_mixed_by_their_weights(tmp_path):
    rows = [window(part=part, first=i, clip_id=f"{part}") for part in range(3) for i in range(40)]
    plan = plan_of(tmp_path / "plan", rows, [bucket(4)], weights=[1.0, 0.5, 0.0])
    order = Order(plan, 0)
    parts = plan.windows.column("part").to_numpy()
    of_epoch = parts[drawn(order, 0)]
    assert [int((of_epoch == p).sum()) for p in range(3)] == [40, 20, 0]
    assert 4 < (of_epoch[:30] == 1).sum() < 16  # 10 expected: from beginning to end
    times = Counter(drawn(order, 0) + drawn(order, 1))
    assert times == {row: {0: 2, 1: 1}[part] for row, part in enumerate(parts.tolist()) if part != 2}


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no window to train on"):
        Order(plan_of(tmp_path / "plan", [window()], [bucket()], weights=[0.0]), 0)


def test_reads_stay_near_each_other(tmp_path):
    """Within FILES_AT_ONCE files at a time, but not in their order."""
    rows = [window(video=f"v{v:04d}", first=i) for v in range(100) for i in range(40)]
    order = Order(plan_of(tmp_path / "plan", rows, [bucket(8)]), 0)
    files = np.array(drawn(order, 0)) // 40
    for start in range(0, 4000, 40 * FILES_AT_ONCE):
        assert len(set(files[start : start + 40 * FILES_AT_ONCE])) == min(FILES_AT_ONCE, 100 - start // 40)
    assert len(set(files[: 40 * FILES_AT_ONCE]) - set(range(FILES_AT_ONCE))) > FILES_AT_ONCE // 2
    assert len(set(files[:40])) > FILES_AT_ONCE * 2 / 3
    # Clips of a file each are shuffled well all the same: neighbours in the plan lie apart.
    single = Order(plan_of(tmp_path / "single", [window(video=f"v{v:04d}") for v in range(2000)], [bucket(8)]), 0)
    assert np.mean(np.abs(np.diff(drawn(single, 0))) < 8) < 0.06


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_ranks_share_a_step(mixed, world):
    order = Order(mixed, 1)
    for epoch in range(2):
        for i in range(order.steps(epoch)):
            step = order.step(epoch, i)
            shares = [share(step, rank, world) for rank in range(world)]
            assert {len(s) for s in shares} == {-(-len(step) // world)}
            given = [b for s in shares for b in s if b is not None]
            assert sorted(given, key=repr) == sorted(step, key=repr)


def test_shares_cost_the_same():
    rng = random.Random(0)
    step = [MicroBatch(0, (i,), (i,), rng.choice([10, 20, 70, 300])) for i in range(64)]
    work = [[b.tokens if b else 0 for b in share(step, rank, 4)] for rank in range(4)]
    assert max(map(sum, work)) <= 1.05 * min(map(sum, work))
    assert all(ranks == sorted(ranks, reverse=True) for ranks in work)  # rounds of the same time cost about the same


def test_a_large_plan(tmp_path):
    """Half a million windows: over record batches, in a fraction of a second, in a few MB."""
    count = 500_000
    row = window()
    names = [f"{i // 5:032d}" for i in range(count)]
    columns = {f.name: pa.repeat(pa.scalar(row[f.name], f.type), count) for f in WINDOWS} | {
        "video_id": pa.array(names)
    }
    table = pa.table(columns, WINDOWS)
    plan = write_plan(
        Path(tmp_path) / "plan", [bucket(4)], [Part("p", 1.0, {}, "")], {}, 8, {}, table.to_batches(ROWS), []
    )
    started = time.process_time()
    order = Order(plan, 0)
    assert order.steps(5) == count // 32
    step = order.step(5, 15_000)
    assert time.process_time() - started < 3.0  # 0.1 s on an idle core
    assert len(step) == 8
    laid = order._epoch(5)
    assert laid.drawn[0].nbytes == 4 * count
    assert (np.bincount(laid.drawn[0], minlength=count) == 1).all()


def seed_of(what: str, *numbers: int) -> int:
    """63 bits of BLAKE2b of the numbers and the purpose."""
    text = struct.pack(f"<{len(numbers)}q", *numbers) + what.encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, person=b"datakit-order").digest(), "little") >> 1


def test_the_seed_of_a_sample_is_of_its_place_in_the_epoch(mixed):
    """Steps, whole or not, follow each other without gap: micro-batches of 4, 3 and 2, some of them smaller."""
    order = Order(mixed, 9)
    for epoch in (0, 3):
        steps = [order.step(epoch, i) for i in range(order.steps(epoch))]
        seeds = [seed for step in steps for batch in step for seed in batch.seeds]
        assert seeds == [seed_of("sample", 9, epoch, position) for position in range(74)]
    assert draw(5, "crop") == seed_of("crop", 5) / 2**63
    assert stand_in(5, 2, [7, 8, 9]) == [7, 8, 9][seed_of("stand-in", 5, 2) % 3]


def test_a_micro_batch_costs_the_tokens_of_its_samples(mixed):
    order = Order(mixed, 1)
    tokens = {0: 10, 1: 70, 2: 3}
    batches = [batch for i in range(order.steps(0)) for batch in order.step(0, i)]
    assert all(batch.tokens == tokens[batch.bucket] * len(batch.windows) for batch in batches)
    assert {len(batch.windows) for batch in batches} == {4, 3, 2, 1}
    for wrong in (-1, 5):
        with pytest.raises(IndexError, match=f"no step {wrong}"):
            order.step(0, wrong)


def test_parts_and_buckets_without_each_other(tmp_path):
    """Part 1 has no window in bucket 1, bucket 2 is never drawn."""
    rows = [window(0, part=0), window(0, part=1), window(1, part=0, first=1), window(2, part=0)]
    plan = plan_of(
        tmp_path / "plan", rows, [bucket(), bucket(frames=9), bucket(frames=1, weight=0.0)], weights=[1.0, 2.0]
    )
    order = Order(plan, 0)
    for epoch in range(3):
        assert sorted(drawn(order, epoch)) == [0, 1, 1, 2]


def test_an_epoch_may_draw_nothing(tmp_path):
    """A tenth of five windows is half a window: one in every second epoch."""
    plan = plan_of(tmp_path / "plan", [window(first=i) for i in range(5)], [bucket()], weights=[0.1])
    order = Order(plan, 0)
    assert [order.steps(epoch) for epoch in range(6)] == [0, 1, 0, 1, 0, 1]
    assert sorted(sum((drawn(order, epoch) for epoch in range(10)), [])) == list(range(5))


def test_repeats_are_taken_to_six_decimals(tmp_path):
    """0.333333 of three windows is not quite one; 1/3 is."""
    for weight, steps in ((0.333333, [0, 1, 1]), (1 / 3, [1, 1, 1])):
        plan = plan_of(tmp_path / str(weight), [window(first=i) for i in range(3)], [bucket()], weights=[weight])
        assert [Order(plan, 0).steps(epoch) for epoch in range(3)] == steps


def test_two_long_files_are_drawn_whole(tmp_path):
    rows = [window(video=f"v{i // 20}", first=i) for i in range(40)]
    order = Order(plan_of(tmp_path / "plan", rows, [bucket(4)]), 0)
    assert sorted(drawn(order, 0)) == list(range(40))


def test_sixteen_files_are_shuffled_together(tmp_path):
    """Twenty files of 16 windows: the first 256 windows drawn are those of sixteen of them. Ten of 8 count as five."""
    rows = [window(video=f"v{v:02}", first=i) for v in range(20) for i in range(16)]
    files = np.array(drawn(Order(plan_of(tmp_path / "a", rows, [bucket(8)]), 3), 0)) // 16
    assert len(set(files[:256])) == 16 and len(set(files[:128])) > 12 and len(set(files[256:])) == 4
    rows = [window(video=f"v{v:02}", first=i) for v in range(80) for i in range(8)]
    files = np.array(drawn(Order(plan_of(tmp_path / "b", rows, [bucket(8)]), 3), 0)) // 8
    assert len(set(files[:256])) == 32 and len(set(files[:256] // 2)) == 16


def test_files_are_told_apart_across_batches_of_rows():
    chunks = pa.chunked_array([["a", "a", "b"], [], ["b", "c", "c"], ["d"], ["d"]])
    assert _changes(chunks).tolist() == [True, False, True, False, True, False, True, False]


def test_shares_go_from_the_dearest_to_whoever_has_least():
    """Costs 9, 7, 5, 4, 2 on two ranks in three rounds: 9 + 4, 7 + 5 + 2."""
    step = [MicroBatch(0, (i,), (i,), tokens) for i, tokens in enumerate([2, 9, 4, 7, 5])]
    shares = [[batch.tokens if batch else None for batch in share(step, rank, 2)] for rank in (0, 1)]
    assert shares == [[9, 4, None], [7, 5, 2]]
    assert [[b and b.tokens for b in share(step, rank, 8)] for rank in (0, 5)] == [[9], [None]]
