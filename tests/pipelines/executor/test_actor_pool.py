"""Lists through actors: every thing has one answer, whatever dies; what cannot work at all says so."""

import pytest

from datakit.errors import ConfigError, ErrorKind
from datakit.process.messages import Failed
from pipelines.executor.actor_pool import ATTEMPTS, NODE_ATTEMPTS, ActorPool
from pipelines.executor.session import RaySession
from support.mortal_actors import FATAL, REFUSED, Squarer, Stranger, Unstartable


@pytest.fixture
def session(ray_address):
    with RaySession(ray_address) as entered:
        yield entered


@pytest.fixture
def pool_of(session):
    pools = []

    def make(kind, arguments=(), **options):
        pools.append(ActorPool(session, kind, arguments, num_cpus=0.1, **options))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def answers(pool: ActorPool, lists, method: str = "square", **how) -> dict:
    """By item; each has exactly one."""
    pairs = [pair for items, found in pool.run(method, lists, **how) for pair in zip(items, found, strict=True)]
    assert sorted(item for item, _ in pairs) == sorted(item for items in lists for item in items)
    return dict(pairs)


def test_every_item_has_its_answer(pool_of):
    assert answers(pool_of(Squarer, most=2), [[1, 2, 3], [], [4], [5, 6]]) == {n: n * n for n in range(1, 7)}


def test_what_kills_its_actor_fails_alone_and_the_others_are_done(pool_of):
    pool = pool_of(Squarer, most=2)
    found = answers(pool, [list(range(10, 18)), [1, 2]])
    failure = found.pop(FATAL)
    assert isinstance(failure, Failed) and failure.kind == ErrorKind.CRASH
    assert failure.message.startswith(f"its process died ({ATTEMPTS} attempts)")
    assert found == {n: n * n for n in (1, 2, *range(10, 13), *range(14, 18))}
    assert answers(pool, [[3]]) == {3: 9}  # those that died have been replaced


def test_the_last_lists_are_divided_among_those_that_have_nothing_to_do(pool_of):
    parts = [items for items, _ in pool_of(Squarer, most=2).run("square", [[1, 2, 3]], divide=True)]
    assert sorted(parts) == [[1, 2], [3]]
    assert [items for items, _ in pool_of(Squarer, most=2).run("square", [[1, 2, 3]])] == [[1, 2, 3]]


def test_a_group_knows_its_members_and_answers_once(pool_of):
    found = answers(pool_of(Squarer, group=2), [[1, 2], [3]], "who")
    assert {size for _, size in found.values()} == {2} and len({pid for pid, _ in found.values()}) == 1


def test_an_error_meant_for_the_user_ends_all(pool_of):
    with pytest.raises(ConfigError, match="^refused$"):
        answers(pool_of(Squarer), [[1], [REFUSED], [2]])


def test_an_answer_that_is_too_short_is_a_fault(pool_of):
    with pytest.raises(AssertionError, match="2 went into lose_one, 1 came out"):
        answers(pool_of(Squarer), [[1, 2]], "lose_one")


def test_an_actor_that_dies_before_it_has_started_is_replaced(pool_of, tmp_path):
    assert answers(pool_of(Squarer, (str(tmp_path),)), [[1, 2]]) == {1: 1, 2: 4}
    assert len(list(tmp_path.iterdir())) == NODE_ATTEMPTS - 1


def test_actors_that_never_start_are_an_error(pool_of):
    with pytest.raises(ConfigError, match=f"could not start, {NODE_ATTEMPTS} times"):
        answers(pool_of(Unstartable), [[1]])


def test_an_actor_of_another_datakit_is_an_error(pool_of):
    with pytest.raises(ConfigError, match="runs datakit 0.0.0"):
        answers(pool_of(Stranger), [[1]])


def test_a_pool_that_is_closed_while_its_actors_die_does_not_complain(pool_of, session):
    pool = pool_of(Squarer, most=2)
    work = pool.run("square", [[1], [2], [3]])
    next(work)
    for team in pool._teams:
        session.ray.kill(team.leader)
    pool.close()
    pool.close()
