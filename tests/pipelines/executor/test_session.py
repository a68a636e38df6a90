"""Ray, started here and joined, one after the other in one process."""

import os

import pytest

from pipelines.executor.session import AUTH_MODE, RaySession

pytestmark = pytest.mark.slow


def ask(address: str) -> int:
    """What an actor answers."""
    with RaySession(address) as session:

        @session.ray.remote(num_cpus=0)
        class Actor:
            def answer(self) -> int:
                return 42

        return session.ray.get(Actor.remote().answer.remote())


def test_a_ray_that_was_started_here_is_no_hindrance_to_joining_one(ray_cluster):
    """Ray protects one that it starts by a token, and goes on asking for it in this process; the cluster has none."""
    before = os.environ.get(AUTH_MODE)
    assert [ask(address) for address in ("local", ray_cluster.address, "local", ray_cluster.address)] == [42] * 4
    assert os.environ.get(AUTH_MODE) == before
