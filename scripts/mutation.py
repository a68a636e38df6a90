"""Mutation testing: changes one operator or constant of a module at a time and asks whether its quick tests notice.

    uv run --inexact scripts/mutation.py                      # every module of `TESTS`: about half an hour
    uv run --inexact scripts/mutation.py quality flops        # modules whose path contains a word
    uv run --inexact scripts/mutation.py quality --tests tests/pipelines/test_stages.py   # what other tests notice
    uv run --inexact scripts/mutation.py quality --list       # the mutants

Why not mutmut or cosmic-ray: mutmut 3 mutates no decorated function (here `lru_cache`, `torch.no_grad`, `property`) and
no constant of a module, but every message; cosmic-ray writes each mutant over the source and starts a new interpreter
for it, which takes seconds to import torch and polars. Here a process per module imports the libraries once, and a fork
of it runs a mutant that exists in memory only, on those tests that call the mutated function: most take half a second.

Mutants: arithmetic, comparison and logical operators exchanged; integers ± 1, other numbers doubled and halved, those
below 1e-3 (tolerances) set to 0; booleans turned; `not`, `-` and `~` removed; conditions turned; `return None`; `min`
for `max` and the like (`SWAPS`). Not mutated: docstrings, annotations, decorators, imports, texts, errors, logs.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.abc
import importlib.util
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TESTS = {
    "datakit/video/color.py": ["tests/datakit/video/test_color.py"],
    "pipelines/stages/quality.py": ["tests/pipelines/stages/test_quality.py"],
    "pipelines/stages/phash.py": ["tests/pipelines/stages/test_picture_hash.py"],
    "pipelines/stages/motion.py": ["tests/pipelines/stages/test_motion.py"],
    "pipelines/shots/clip_splitter.py": ["tests/pipelines/shots/test_clip_splitter.py"],
    "pipelines/recipes/recipe.py": ["tests/pipelines/recipes/test_recipe.py"],
    "pipelines/recipes/decide.py": ["tests/pipelines/recipes/test_decide.py"],
    "pipelines/recipes/what_if.py": ["tests/pipelines/recipes/test_what_if.py"],
    "pipelines/duplicates/grouping.py": ["tests/pipelines/duplicates/test_grouping_rules.py"],
    "pipelines/duplicates/similarity.py": ["tests/pipelines/duplicates/test_similarity.py"],
    "trainer/diffusion/rectified_flow.py": ["tests/trainer/diffusion/test_rectified_flow.py"],
    "trainer/diffusion/conditioning.py": ["tests/trainer/diffusion/test_conditioning.py"],
    "trainer/diffusion/sample_randomness.py": ["tests/trainer/diffusion/test_sample_randomness.py"],
    "trainer/models/mmdit/flops.py": ["tests/trainer/models/test_flops.py"],
    "trainer/planning/bucket_assignment.py": ["tests/trainer/planning/test_bucket_assignment.py"],
    "trainer/planning/buckets.py": ["tests/trainer/planning/test_buckets.py"],
    "trainer/planning/memory_budget.py": ["tests/trainer/planning/test_memory_budget.py"],
    "trainer/planning/frame_rate.py": ["tests/trainer/planning/test_frame_rate.py"],
    "trainer/planning/mixture.py": ["tests/trainer/planning/test_mixture.py"],
    "trainer/planning/build_plan.py": ["tests/trainer/planning/test_build_plan.py"],
    "trainer/planning/plan.py": ["tests/trainer/planning/test_plan_folder.py"],
    "trainer/data/batch_sampler.py": ["tests/trainer/data/test_batch_sampler.py"],
    "sampler/generation/video_size.py": ["tests/sampler/generation/test_video_size.py"],
}
"""Module -> the quick tests that state what it does."""
LEAST_SHARE = 0.85
"""Of all mutants that the tests must notice."""
SLOWEST_S = 10.0
"""A mutant that takes longer than this and five times the tests' own time is stuck: noticed."""
MOST_BYTES = 12 << 30
"""Of memory that a mutant may take."""
PASSED, NONE_LEFT = 0, 5
"""Exit codes of pytest; the second where a mutant changes the names of the tests: not noticed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("modules", nargs="*", help="words that the paths of modules contain; none: all")
    parser.add_argument("--tests", nargs="+", help="test files in place of those of the table")
    parser.add_argument("--every", type=int, default=1, help="only every so-manieth mutant: a quick look")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    parser.add_argument("--list", action="store_true", help="print the mutants and run none")
    parser.add_argument("--quiet", action="store_true", help="print no survivors")
    options = parser.parse_args()
    chosen = [path for path in TESTS if not options.modules or any(word in path for word in options.modules)]
    if not chosen:
        sys.exit(f"no module of the table contains {' or '.join(options.modules)}: it has {', '.join(TESTS)}")
    if options.list:
        for path in chosen:
            print(*Module(path, options.every).mutants, sep="\n")
        return
    results = []
    for path in chosen:
        module = Module(path, options.every)
        results.append((path, in_a_new_process(module, options.tests or TESTS[path], options.jobs)))
        print_result(*results[-1], with_survivors=not options.quiet)
    mutants, survivors = sum(r.mutants for _, r in results), sum(len(r.survivors) for _, r in results)
    killed = 1 - survivors / max(mutants, 1)
    print(
        f"{'total':<36} {mutants:>4} mutants  {mutants - survivors:>4} killed  {survivors:>3} survived  {killed:6.1%}"
    )
    sys.exit(killed < LEAST_SHARE)


def print_result(path: str, result: Result, with_survivors: bool) -> None:
    if with_survivors:
        for survivor in result.survivors:
            print(f"  {survivor}")
    killed = result.mutants - len(result.survivors)
    print(
        f"{path:<36} {result.mutants:>4} mutants  {killed:>4} killed  {len(result.survivors):>3} survived  "
        f"{killed / max(result.mutants, 1):6.1%}  {result.seconds:5.0f} s (tests {result.tests_s:.1f} s)",
        flush=True,
    )


@dataclass
class Result:
    mutants: int
    survivors: list[str]
    tests_s: float
    """Seconds that the tests take on the module as it is."""
    seconds: float = 0.0


# Mutants


def pairs(text: str) -> dict[str, str]:
    """`a>b` and `a=b` (both ways), divided by blanks."""
    found = {}
    for pair in text.split():
        a, both, b = pair.partition("=" if "=" in pair else ">")
        found |= {a: b} | ({b: a} if both == "=" else {})
    return found


OPERATORS = pairs(
    "Add=Sub Mult=Div FloorDiv>Mult Mod>FloorDiv Pow>Mult LShift=RShift BitAnd=BitOr BitXor>BitAnd "
    "Lt=LtE Gt=GtE Eq=NotEq Is=IsNot In=NotIn And=Or"
)
"""By the names of the classes of `ast`."""
SWAPS = pairs(
    "min=max any=all floor=ceil minimum=maximum zeros=ones zeros_like=ones_like argmin=argmax "
    "all_horizontal=any_horizontal min_horizontal=max_horizontal"
)
TOLERANCE = 1e-3
LOGGERS = ("log", "logger", "logging", "warnings", "print", "console")


@dataclass(frozen=True)
class Mutant:
    """A node of a module's tree and what takes its place.

    Attributes:
        holder, name, index: where the node hangs: `holder.name`, or `holder.name[index]`.
        line: of the source.
        function: line where the innermost enclosing `def` begins (with its decorators); 0: none, it runs on import.
        text: the source before and after.
    """

    path: str
    holder: ast.AST
    name: str
    index: int | None
    node: ast.AST
    line: int
    function: int
    text: str = field(compare=False)

    def apply(self) -> None:
        if self.index is None:
            setattr(self.holder, self.name, self.node)
        else:
            getattr(self.holder, self.name)[self.index] = self.node

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


class Module:
    """A source file and its mutants."""

    def __init__(self, path: str, every: int = 1):
        self.path, self.name = path, path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        self.source = (ROOT / path).read_text()
        self.tree = ast.parse(self.source)
        self.mutants = [self._mutant(*place) for place in list(self._places(self.tree, 0))[::every]]

    def _places(self, parent: ast.AST, function: int) -> Iterator[tuple[ast.AST, str, int | None, ast.AST, int]]:
        for name, value in ast.iter_fields(parent):
            if name in ("annotation", "returns", "decorator_list", "type_params"):
                continue
            for index, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if not isinstance(node, ast.AST) or is_left_alone(node):
                    continue
                for new in replacements(parent, name, node):
                    yield parent, name, index, new, function
                yield from self._places(node, first_line(node) if isinstance(node, ast.FunctionDef) else function)

    def _mutant(self, holder: ast.AST, name: str, index: int | None, node: ast.AST, function: int) -> Mutant:
        old = getattr(holder, name) if index is None else getattr(holder, name)[index]
        shown = old if isinstance(old, ast.expr | ast.stmt) else holder  # operators have no place in the source
        assert isinstance(shown, ast.expr | ast.stmt)
        ast.fix_missing_locations(ast.copy_location(node, shown))
        before = ast.unparse(shown)
        mutant = Mutant(self.path, holder, name, index, node, shown.lineno, function, "")
        mutant.apply()
        after = ast.unparse(node if shown is old else shown)
        replace(mutant, node=old).apply()
        return replace(mutant, text=self._shown(shown, before, after))

    def _shown(self, node: ast.expr | ast.stmt, before: str, after: str) -> str:
        """The line of source with the change in its place."""
        before, after = (" ".join(text.split()) for text in (before, after))
        change = f"⟨{before if len(before) < 60 else before[:57] + '…'} → {after}⟩"
        if node.lineno != node.end_lineno:
            return change
        line = self.source.splitlines()[node.lineno - 1].encode()
        return (line[: node.col_offset].decode() + change + line[node.end_col_offset :].decode()).strip()


def first_line(node: ast.FunctionDef) -> int:
    return min([node.lineno, *(d.lineno for d in node.decorator_list)])


def is_left_alone(node: ast.AST) -> bool:
    """Texts, what is raised or logged, imports."""
    if isinstance(node, (ast.Import, ast.ImportFrom, ast.Raise, ast.JoinedStr, ast.Assert)):
        return True
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return True
    if isinstance(node, ast.Expr):
        call = node.value
        while isinstance(call, (ast.Call, ast.Attribute)):
            call = call.func if isinstance(call, ast.Call) else call.value
        return isinstance(node.value, ast.Constant) or (isinstance(call, ast.Name) and call.id in LOGGERS)
    return False


def replacements(parent: ast.AST, name: str, node: ast.AST) -> Iterator[ast.AST]:
    """What may take the place of a node."""
    if type(node).__name__ in OPERATORS and not joins_texts(parent):
        yield getattr(ast, OPERATORS[type(node).__name__])()
    elif isinstance(node, ast.UnaryOp) and not isinstance(node.op, ast.UAdd):
        yield node.operand
    elif isinstance(node, ast.Constant):
        yield from map(ast.Constant, other_values(node.value))
    elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):
        yield from swapped(node, called=name == "func")
    bare = isinstance(node, (ast.Name, ast.Attribute, ast.Call))
    if isinstance(node, ast.expr) and (name == "ifs" or (name == "test" and bare)):
        yield ast.UnaryOp(ast.Not(), node)
    if isinstance(node, ast.Return) and node.value is not None and not is_none(node.value):
        yield ast.Return(ast.Constant(None))
    if isinstance(node, (ast.Break, ast.Continue)):
        yield ast.Continue() if isinstance(node, ast.Break) else ast.Break()


def swapped(node: ast.Name | ast.Attribute, called: bool) -> Iterator[ast.AST]:
    if isinstance(node, ast.Attribute) and node.attr in SWAPS:
        yield ast.Attribute(node.value, SWAPS[node.attr], ast.Load())
    elif isinstance(node, ast.Name) and node.id in SWAPS and called:
        yield ast.Name(SWAPS[node.id], ast.Load())


def other_values(value: Any) -> Sequence[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1]
    if isinstance(value, float):
        return [1.0] if value == 0 else [0.0] if abs(value) < TOLERANCE else [2 * value, value / 2]
    return []


def joins_texts(node: ast.AST) -> bool:
    """Whether an operation joins or formats texts."""
    if isinstance(node, ast.BinOp):
        return any(is_text(side) or joins_texts(side) for side in (node.left, node.right))
    return isinstance(node, ast.AugAssign) and (is_text(node.value) or joins_texts(node.value))


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes)))


def is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


# Running: one process a module, a fork of it a mutant


def in_a_new_process(module: Module, tests: Sequence[str], jobs: int) -> Result:
    """Results of a module. The libraries that its tests import do not stay in this process."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutation-") as scratch:
        answer = Path(scratch) / "answer.json"
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ["TMPDIR"] = scratch
                tempfile.tempdir = None
                result = run_mutants(module, tests, jobs, Path(scratch))
                answer.write_text(json.dumps(result.__dict__))
                code = 0
            except RuntimeError as e:
                print(e, file=sys.stderr)
            finally:
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        if status:
            sys.exit(f"{module.path}: not measured")
        result = Result(**json.loads(answer.read_text()))
    result.seconds = time.monotonic() - started
    return result


def run_mutants(module: Module, tests: Sequence[str], jobs: int, scratch: Path) -> Result:
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "POLARS_MAX_THREADS", "RAYON_NUM_THREADS"):
        os.environ[name] = "1"
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    known = as_it_is(module, tests, scratch)
    for name in known["libraries"]:
        try:
            importlib.import_module(name)
        except ImportError:  # part of a library that only its own code imports
            continue
    waiting, running, survived = list(enumerate(module.mutants)), {}, []
    while waiting or running:
        while waiting and len(running) < jobs:
            number, mutant = waiting.pop(0)
            noticing = [test for test, lines in known["calls"].items() if mutant.function in lines]
            noticing = noticing or list(known["calls"])  # it runs on import, or in a thread of a library
            noticing.sort(key=known["seconds"].__getitem__)  # most are noticed by the first
            limit = SLOWEST_S + 5 * sum(known["seconds"][test] for test in noticing)
            folder = scratch / str(number)
            running[fork(run_one, module, mutant, noticing, folder)] = (number, time.monotonic() + limit, folder)
        time.sleep(0.01)
        for child in list(running):
            number, deadline, folder = running[child]
            done, status = os.waitpid(child, os.WNOHANG)
            if not done and time.monotonic() < deadline:
                continue
            kill(child)
            if not done:
                os.waitpid(child, 0)
            elif os.waitstatus_to_exitcode(status) in (PASSED, NONE_LEFT):
                survived.append((number, str(module.mutants[number])))
            shutil.rmtree(folder, ignore_errors=True)
            del running[child]
    return Result(len(module.mutants), [text for _, text in sorted(survived)], sum(known["seconds"].values()))


def as_it_is(module: Module, tests: Sequence[str], scratch: Path) -> dict[str, Any]:
    """Of the module as it is: the lines of the functions that each test calls, seconds of each test, and the libraries.

    Raises:
        RuntimeError: the tests fail.
    """
    child = fork(watch, module, tests, scratch)
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(f"{module.path}: its tests fail as it is:\n{(scratch / 'log').read_text()[-4000:]}")
    return json.loads((scratch / "known.json").read_text())


def fork(do: Callable[..., int], *arguments: Any) -> int:
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        os.setsid()
        code = do(*arguments)
    finally:
        os._exit(code)


def kill(child: int) -> None:
    """End a child and all that it started."""
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        return


def run_pytest(module: Module, tests: Sequence[str], folder: Path, plugin: object, *options: str) -> int:
    import pytest

    sys.meta_path.insert(0, InMemory(module))
    log = os.open(folder.parent / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    fixed = ["-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]
    return int(pytest.main([*fixed, f"--basetemp={folder}", *options, *tests], plugins=[plugin]))


def run_one(module: Module, mutant: Mutant, tests: Sequence[str], folder: Path) -> int:
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))
    mutant.apply()
    return run_pytest(module, sorted({test.split("::")[0] for test in tests}), folder, Only(tests), "--tb=no")


def watch(module: Module, tests: Sequence[str], scratch: Path) -> int:
    watcher = Watcher(str(ROOT / module.path))
    sys.settrace(watcher.trace)
    code = run_pytest(module, tests, scratch / "tests", watcher)
    sys.settrace(None)
    places = {name: getattr(module, "__file__", None) or "" for name, module in sys.modules.items()}
    libraries = [name for name, place in places.items() if "site-packages" in place]
    calls = {
        test: sorted(watcher.calls.get(test, set()) | watcher.shared.get(test.split("::")[0], set()))
        for test in watcher.seconds
    }
    (scratch / "known.json").write_text(
        json.dumps({"libraries": libraries, "calls": calls, "seconds": watcher.seconds})
    )
    return code


class InMemory(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports a module from its tree."""

    def __init__(self, module: Module):
        self.module = module

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.module.name:
            return None
        place = str(ROOT / self.module.path)
        return importlib.util.spec_from_file_location(fullname, place, loader=self)

    def exec_module(self, module) -> None:
        exec(compile(self.module.tree, str(ROOT / self.module.path), "exec", dont_inherit=True), module.__dict__)


class Only:
    """A plugin of pytest that runs certain tests, in this order."""

    def __init__(self, tests: Sequence[str]):
        self.places = {test: place for place, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items) -> None:
        chosen = [item for item in items if item.nodeid in self.places]
        items[:] = sorted(chosen, key=lambda item: self.places[item.nodeid])


class Watcher:
    """A plugin of pytest that notes which functions of a file each test calls.

    What fixtures call is shared by all tests of a file: they may keep it.
    """

    def __init__(self, file: str):
        self.file = file
        self.calls: dict[str, set[int]] = {}
        self.shared: dict[str, set[int]] = {}
        self.seconds: dict[str, float] = {}
        self._into: set[int] = set()

    def trace(self, frame, event, argument) -> None:
        if frame.f_code.co_filename == self.file:
            self._into.add(frame.f_code.co_firstlineno)

    def pytest_runtest_setup(self, item) -> None:
        self._into = self.shared.setdefault(item.nodeid.split("::")[0], set())

    def pytest_runtest_call(self, item) -> None:
        self._into = self.calls.setdefault(item.nodeid, set())

    def pytest_runtest_teardown(self, item) -> None:
        self._into = self.shared[item.nodeid.split("::")[0]]

    def pytest_runtest_logreport(self, report) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration


if __name__ == "__main__":
    main()
