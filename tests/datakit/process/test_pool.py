"""Tasks through processes: each ends once, with its results before, whatever dies."""

from datakit.errors import ErrorKind
from datakit.process.pool import End, Pool, Result


def run(tasks, workers: int = 2, target: str = "support.faulty_stages:echo", **how) -> dict[str, tuple[list, object]]:
    """Results and end of each task."""
    found: dict[str, tuple[list, object]] = {task: ([], None) for task in tasks}
    ended = []
    with Pool(target, workers, **how) as pool:
        for event in pool.run(tasks):
            if isinstance(event, Result):
                assert event.task not in ended
                found[event.task][0].append(event.value)
            else:
                assert isinstance(event, End)
                ended.append(event.task)
                found[event.task] = (found[event.task][0], event.error)
    assert sorted(ended) == sorted(tasks)
    return found


def test_a_task_that_kills_its_process_costs_only_itself():
    found = run(["a", "segv", "b", "raise", "exit", "c"])
    for name in "abc":
        assert found[name] == (["before", name], None)
    words = {name: (found[name][0], found[name][1].kind, found[name][1].message) for name in ("segv", "raise", "exit")}
    assert words == {
        "segv": (["before"], ErrorKind.CRASH, "the process that read it died (SIGSEGV)"),
        "raise": (["before"], ErrorKind.STAGE, "RuntimeError: planted"),
        "exit": (["before"], ErrorKind.CRASH, "the process that read it died (exit code 3)"),
    }


def test_a_task_without_a_sign_of_life_is_given_up():
    found = run(["loop", "a"], stall_s=1.5)
    assert found["a"] == (["before", "a"], None)
    assert found["loop"][1].kind == ErrorKind.TIMEOUT and found["loop"][1].message == "no progress for 1.5 s"


def test_a_tool_that_cannot_be_imported_ends_every_task():
    found = run(["a", "b"], target="support.faulty_stages:nothing_of_that_name")
    assert all("nothing_of_that_name" in error.message and not results for results, error in found.values())


def test_tasks_may_come_while_others_are_done():
    class Growing:
        """More tasks after its first end."""

        def __init__(self):
            self.waiting = ["a"]

        def __iter__(self):
            return self

        def __next__(self):
            if not self.waiting:
                raise StopIteration
            return self.waiting.pop()

    tasks, ended = Growing(), []
    with Pool("support.faulty_stages:echo", 1) as pool:
        for event in pool.run(tasks):
            if isinstance(event, End):
                ended.append(event.task)
                if event.task == "a":
                    tasks.waiting.append("b")
    assert ended == ["a", "b"]
