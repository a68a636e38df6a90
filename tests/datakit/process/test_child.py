"""A child process that crashes, hangs or eats memory fails its payload, and only that one."""

import os
import time
from dataclasses import replace

import pytest

from datakit.errors import ErrorKind
from datakit.process.child import Child, wait_for
from datakit.process.messages import Done, Failed, ToolSpec

SPEC = ToolSpec("support.faulty_stages:echo", stall_s=2.0, memory_bytes=2 << 30)
CALCULATOR = ToolSpec("support.faulty_stages:Calculator", {"start": 7}, stall_s=20.0)


@pytest.fixture
def child():
    made = Child(SPEC)
    yield made
    made.stop()


@pytest.fixture
def child_of():
    made = []

    def make(spec: ToolSpec, **how) -> Child:
        made.append(Child(spec, **how))
        return made[-1]

    yield make
    for child in made:
        child.stop()


def finish(child: Child) -> list:
    """What it says until nothing is in hand."""
    said = []
    while child.in_hand:
        said += [ready.receive() for ready in wait_for([child], 30.0)]
    return said


@pytest.mark.parametrize(
    "payload, kind, words",
    [
        ("segv", ErrorKind.CRASH, "SIGSEGV"),
        ("loop", ErrorKind.TIMEOUT, "no progress"),
        ("memory", ErrorKind.OUT_OF_MEMORY, "memory"),
        ("raise", ErrorKind.STAGE, "planted"),
        ("exit", ErrorKind.CRASH, "code 3"),
    ],
)
def test_a_fault_fails_its_payload_and_the_next_one_works(child, payload, kind, words):
    items = list(child.stream(payload))
    assert items[0] == "before"
    assert isinstance(items[-1], Failed) and items[-1].kind == kind and words in items[-1].message
    assert [i for i in child.stream("fine") if not isinstance(i, Done)] == ["before", "fine"]


def test_a_tool_that_cannot_load_says_why(child):
    broken = Child(ToolSpec("support.faulty_stages:nothing_of_that_name"))
    (failure,) = broken.stream("x")
    assert isinstance(failure, Failed) and "nothing_of_that_name" in failure.message


def test_a_hang_is_given_up_in_time(child):
    list(child.stream("fine"))
    started = time.monotonic()
    list(child.stream("loop"))
    assert time.monotonic() - started < 30


def test_the_child_dies_with_its_parent():
    import subprocess
    import sys

    script = (
        "import sys, time\nfrom datakit.process.child import *\nc = Child(ToolSpec('support.faulty_stages:echo', "
        "stall_s=600))\n"
        "s = c.stream('loop'); next(s); print(c._process.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().split()[2] == "Z":
                    return
        except FileNotFoundError:
            return
        time.sleep(0.05)
    pytest.fail("the child outlived its parent")


def test_a_class_is_made_once_and_gives_one_answer(child_of):
    child = child_of(CALCULATOR)
    first, second = child.ask((1, 2)), child.ask((3, 4))
    assert (first.answer[0], second.answer[0]) == (3, 7)
    assert first.answer[1] == second.answer[1] != os.getpid() and (first.answer[2], second.answer[2]) == (8, 9)
    assert child.ask((13, 0)).death == "SIGSEGV"
    assert child.ask((1, 1)).answer[2] == 8  # a new process, a new instance


def test_payloads_in_hand_are_answered_in_order_and_those_after_a_death_stay(child_of):
    child = child_of(CALCULATOR)
    child.give((1, 2))
    child.give((3, 4))
    said = finish(child)
    assert said[0] is None and [end.answer[0] for end in said[1:]] == [3, 7]  # first that it has loaded
    child.give((13, 0))
    child.give((5, 6))
    while not isinstance(failure := child.receive(), Failed):
        pass
    assert failure.kind == ErrorKind.CRASH and failure.child_died and child.connection is None
    assert child.take_back() == [(5, 6)] and not child.in_hand
    child.give((5, 6))
    assert finish(child)[-1].answer[0] == 11


def test_a_process_that_dies_before_it_has_loaded_is_no_payloads_fault(child_of):
    child = child_of(replace(SPEC, target="support.faulty_stages:nothing_of_that_name"))
    child.give("fine")
    (said,) = [ready.receive() for ready in wait_for([child], 60.0)]
    assert isinstance(said, Failed) and not child.loaded and child.take_back() == ["fine"]


def test_whoever_watches_several_hears_of_the_one_that_is_late(child_of):
    slow, quick = child_of(SPEC), child_of(SPEC)
    assert slow.ready() is None and quick.ready() is None
    slow.give("loop")
    assert wait_for([slow, quick], 30.0) == [slow] and slow.receive() == "before"
    started = time.monotonic()
    assert wait_for([slow, quick], 30.0) == [slow] and 1.0 < time.monotonic() - started < 20.0
    assert slow.receive().kind == ErrorKind.TIMEOUT
    started = time.monotonic()
    assert wait_for([slow, quick], 0.2) == [] and time.monotonic() - started > 0.15


def test_a_process_is_replaced_after_so_many_payloads(child_of):
    child = child_of(replace(CALCULATOR, payloads=2))
    first, second, third = (child.ask((n, n)).answer[1] for n in range(3))
    assert first == second != third


def test_a_stream_that_is_left_early_leaves_nothing_for_the_next(child):
    stream = child.stream("fine")
    assert next(stream) == "before"
    stream.close()
    assert list(child.stream("other"))[:2] == ["before", "other"]


def test_a_forked_child_does_the_same(child_of):
    child = child_of(SPEC, fork=True)
    assert list(child.stream("fine"))[:2] == ["before", "fine"]
    failure = list(child.stream("exit"))[-1]
    assert failure.kind == ErrorKind.CRASH and failure.message.startswith("worker process exited with code 3")
    assert list(child.stream("fine"))[:2] == ["before", "fine"]


def test_threads_and_the_order_to_die_first_are_as_told(child_of):
    child = child_of(ToolSpec("support.faulty_stages:surroundings", threads=3))
    assert next(child.stream("OMP_NUM_THREADS")) == "3"
    assert next(child.stream("MKL_NUM_THREADS")) == "3"
    assert next(child.stream("oom_score_adj")) == 1000


def test_what_a_dying_process_printed_is_told(child_of):
    child = child_of(replace(SPEC, target="support.faulty_stages:shout"))
    failure = list(child.stream("the last words"))[-1]
    assert failure.message == "worker process exited with code 4: … the last words"
    silent = child_of(replace(SPEC, target="support.faulty_stages:shout"), log=False)
    assert list(silent.stream("the last words"))[-1].message == "worker process exited with code 4"
