"""Whether the libraries of an extra are there, before anything of theirs is imported."""

from __future__ import annotations

import importlib.util

from datakit.errors import MissingDependency


def require(what: str, extra: str, *modules: str) -> None:
    """Raises:
    MissingDependency: a module of the extra is not installed.

    Args:
        what: needs it, for people.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependency(f"{what} needs {', '.join(missing)}: uv sync --inexact --extra {extra}")
