"""A library that is missing is one line with the command that brings it: uv's in a checkout, pip's elsewhere."""

import platform
import sys
import tomllib
from pathlib import Path

import pytest

from datakit import dependencies, doctor
from datakit.dependencies import install_command, require
from datakit.errors import MissingDependency

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())


@pytest.fixture
def wheel(monkeypatch, tmp_path):
    """As if installed from a wheel: no pyproject.toml beside the packages."""
    monkeypatch.setattr(dependencies, "PYPROJECT", tmp_path / "pyproject.toml")


def test_what_is_missing_is_named_with_its_command():
    require("this", "none", "json", "numpy")
    with pytest.raises(
        MissingDependency, match=r"^copies needs no_such_library, nor_this: uv sync --inexact --extra dedup$"
    ):
        require("copies", "dedup", "json", "no_such_library", "nor_this")


def test_in_a_checkout_colossalai_is_a_group():
    assert install_command("train") == "uv sync --inexact --extra train --group colossalai"
    assert install_command() == "uv sync"
    assert PROJECT["dependency-groups"]["colossalai"] == ["colossalai==0.5.0"]


def test_a_wheel_is_extended_by_pip(wheel):
    assert install_command() == "pip install datakit"
    assert install_command("dedup") == "pip install 'datakit[dedup]'"
    [colossalai] = PROJECT["dependency-groups"]["colossalai"]
    assert install_command("train") == f"pip install 'datakit[train]' && pip install --no-deps {colossalai}"
    [brisque] = PROJECT["project"]["optional-dependencies"]["quality"]
    assert install_command("quality") == f"pip install --no-deps '{brisque}'"
    with pytest.raises(
        MissingDependency,
        match=r"^training needs no_such_library: pip install 'datakit\[train\]' && pip install --no-deps",
    ):
        require("training", "train", "no_such_library")


def test_the_doctor_prints_the_commands_of_extras_that_exist(wheel, monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    findings = doctor.examine(start_ray=False)
    details = {(f.area, f.name): f.detail for f in findings}
    assert details["base", "av"] == "missing: pip install datakit"
    assert details["extra train", "colossalai"] == f"missing: {install_command('train')}"
    extras = {extra for name in doctor.extras() for extra in name.split(" or ")}
    assert extras | {"demo", "smollm2"} == set(PROJECT["project"]["optional-dependencies"])


@pytest.mark.parametrize(("version", "runs"), [((3, 10), False), ((3, 11), True), ((3, 13), True), ((3, 14), False)])
def test_the_doctor_takes_the_pythons_that_the_package_takes(monkeypatch, version, runs):
    monkeypatch.setattr(sys, "version_info", (*version, 0, "final", 0))
    monkeypatch.setattr(platform, "platform", lambda: "Linux")
    [python] = [f for f in doctor.examine(start_ray=False) if f.name == "python"]
    assert python.ok is runs
    assert PROJECT["project"]["requires-python"] == ">=3.11,<3.14"
