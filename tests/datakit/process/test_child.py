"""A child process that crashes, hangs or eats memory fails its payload, and only that one."""

import time

import pytest

from datakit.errors import ErrorKind
from datakit.process.child import Child
from datakit.process.messages import Done, Failed, ToolSpec

SPEC = ToolSpec("support.faulty_stages:echo", stall_s=2.0, memory_bytes=2 << 30)


@pytest.fixture
def child():
    made = Child(SPEC)
    yield made
    made.stop()


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
