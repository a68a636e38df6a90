"""One file a format of other tools, found by its name: how it is written and how it is read. This table says which
there are; nothing of them is imported before it is used."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

NAMED = ("none", "link", "cut", "copy")
FILES = ("link", "cut", "copy")
"""What `--media` may be where clips may be spans of their sources, and where every clip needs a file."""


@dataclass(frozen=True)
class Format:
    """Attributes:
    module: of this package.
    write: function of it that writes an export and gives the number of clips written; "": there is no export.
    suffix: of its file; "": a folder always. file: name of that file in a folder.
    media: what `--media` may be. links: `--media none` is `link`, for no file is made and every clip must have one.
    columns: function of the module that gives those of the view where none are chosen; "": all.
    check: function of the module that says what is missing here; "": nothing can be.
    read: whether it can be imported. ours: by rows that are clips of a catalog.
    """

    module: str
    write: str = ""
    suffix: str = ""
    file: str = ""
    media: tuple[str, ...] = FILES
    links: bool = False
    columns: str = ""
    check: str = ""
    read: bool = False
    ours: bool = False

    def function(self, name: str) -> Callable[..., Any]:
        """One of the functions that are named above."""
        return getattr(importlib.import_module(f"{__name__}.{self.module}"), name)


def _ours(name: str, check: str = "") -> Format:
    return Format("tabular", f"write_{name}", f".{name}", f"clips.{name}", NAMED, check=check, read=True, ours=True)


def _open_sora(name: str) -> Format:
    return Format("open_sora", f"write_{name}", f".{name}", f"meta.{name}", links=True, columns="default_columns")


FORMATS: dict[str, Format] = {
    "open-sora": Format("open_sora", read=True),
    "open-sora-csv": _open_sora("csv"),
    "open-sora-parquet": _open_sora("parquet"),
    "webdataset": Format("webdataset", "write", media=("cut", "copy"), read=True),
    "huggingface": Format("huggingface", "write", read=True),
    "jsonl": _ours("jsonl"),
    "parquet": _ours("parquet"),
    "lance": _ours("lance", check="need_lance"),
}
EXPORT_FORMATS = tuple(name for name, form in FORMATS.items() if form.write)
IMPORT_FORMATS = ("auto", *(name for name, form in FORMATS.items() if form.read))
