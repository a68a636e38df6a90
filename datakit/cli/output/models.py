"""What `datakit models` prints and asks."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from datakit.errors import ConfigError, MissingDependency
from datakit.weights.download import Size, download, is_there, sizes
from datakit.weights.hubs import HUBS
from datakit.weights.registry import DEFAULT_FOLDER, MODELS, NON_COMMERCIAL, ModelInfo, find, locate

PIPED_WIDTH = 200


def show_models(kind: str | None, folder: str | None, as_json: bool) -> None:
    """The table of `datakit models list`; `where` is what `locate` finds.

    Raises:
        ConfigError: no models of that kind.
    """
    chosen = [info for info in MODELS.values() if kind in (None, info.kind)]
    if not chosen:
        raise ConfigError(
            f"there are no models of kind {kind!r}, but {', '.join(dict.fromkeys(m.kind for m in MODELS.values()))}"
        )
    found = {info.name: _where(info.name, folder or DEFAULT_FOLDER) for info in chosen}
    if as_json:
        print(
            json.dumps(
                [{**asdict(info), "where": found[info.name] and str(found[info.name])} for info in chosen], indent=1
            )
        )
        return
    table = Table("model", "kind", "size", "licence", "used by", "where")
    table.columns[2].justify = "right"
    table.columns[5].overflow = "fold"
    for info in chosen:
        size = Size(None if info.size_gb is None else round(info.size_gb * 1e9), False)
        where = found[info.name]
        cells = (info.name, info.kind, _size(size), info.licence, info.used_by, _short(where) if where else "–")
        table.add_row(*map(escape, cells))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)
    console.print(table)
    console.print(
        "Others work too: any Hugging Face id ORG/NAME, any ARCH/TAG of open_clip. To bring one: datakit models "
        "download NAME",
        soft_wrap=True,
    )


def ask_and_download(names: list[str], folder: str | None, source: str, revision: str | None, yes: bool) -> None:
    """The whole of `datakit models download`.

    Raises:
        ConfigError: not confirmed, and no terminal to ask on.
        DownloadError, MissingDependency: as `download`.
    """
    if revision and len(names) > 1:
        raise ConfigError("--revision is of one model: download the others by themselves")
    home = Path(folder or DEFAULT_FOLDER).expanduser()
    wanted = [find(name) for name in dict.fromkeys(names)]
    absent = [info for info in wanted if not is_there(info, home, revision)]
    if absent and not _agreed(absent, home, source, revision, yes):
        raise typer.Exit(1)
    for info in wanted:
        with _Bar(info.name) as bar:
            path = download(info, home, source, revision, bar.update)
        print(f"{info.name}: {path}")


def _agreed(models: list[ModelInfo], home: Path, source: str, revision: str | None, yes: bool) -> bool:
    measured = [sizes(info, source, revision) for info in models]
    for info, size in zip(models, measured):
        warning = " – not for commercial use" if NON_COMMERCIAL in info.licence else ""
        place = urlsplit(info.url).netloc if info.url and source in HUBS else source
        print(f"{info.name}: {_size(size)} from {place}, licence: {info.licence}{warning}")
    total = Size(sum(size.bytes or 0 for size in measured), all(size.exact for size in measured))
    print(f"{_size(total)} into {home}", flush=True)
    if yes:
        return True
    if not sys.stdin.isatty():
        raise ConfigError(
            "nothing downloaded: there is no terminal to ask on, --yes says that size and licence are agreed to"
        )
    return typer.confirm("Download?")


class _Bar:
    """Progress on stderr; silent without a terminal."""

    def __init__(self, name: str):
        console = Console(stderr=True)
        self._rich = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._rich.add_task(name, total=None)

    def __enter__(self) -> _Bar:
        self._rich.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._rich.__exit__(*raised)

    def update(self, done: int, of: int) -> None:
        self._rich.update(self._task, completed=done, total=of or None)


def _where(name: str, folder: str) -> Path | None:
    try:
        return locate(name, folder)
    except MissingDependency:
        return None


def _size(size: Size) -> str:
    if size.bytes is None:
        return "?"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size.bytes >= factor:
            return f"{'' if size.exact else '~'}{size.bytes / factor:.3g} {unit}"
    return f"{size.bytes} B"


def _short(path: Path) -> str:
    home = str(Path.home())
    return "~" + str(path)[len(home) :] if str(path).startswith(home + "/") else str(path)
