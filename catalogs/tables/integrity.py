"""What to say when files of a catalog are missing or torn: which, and the snapshot to go back to.

deltalake's `repair` (1.6) finds missing files only, no torn ones, and gives up their rows in place of a way back.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import unquote

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from catalogs.tables.delta_log import ENTRY, Log
from catalogs.tables.object_store import Storage, Stored
from catalogs.tables.schema import RECORDS, TABLES
from datakit.errors import CatalogError, DatakitError, MissingDependency

if TYPE_CHECKING:
    from catalogs.tables.catalog import Catalog

TOGETHER = ("videos", "clips")
"""A video says how many clips it has: these go back to one moment."""
MAGIC = b"PAR1"
FILE_ERRORS = (OSError, DeltaError, pl.exceptions.PolarsError, pa.ArrowException)
ABOUT_THE_QUESTION = (pl.exceptions.ColumnNotFoundError, pl.exceptions.SQLSyntaxError, pl.exceptions.SQLInterfaceError)
"""Errors that no file is to blame for."""
ASIDE = ".torn"
GIVEN_UP = re.compile(r"/(\d{20})\.json\.torn$")


@dataclass(frozen=True)
class Damage:
    """A file that a version of a table needs and that is not as it was written.

    Attributes:
        path: below the catalog.
        what: `missing`, `torn`, or what its footer says.
    """

    table: str
    path: str
    what: str


@contextmanager
def explained(catalog: Catalog) -> Generator[None]:
    """Around what reads: an error that a missing or torn file is to blame for becomes a CatalogError that names the
    file and the way back; others go on unchanged."""
    try:
        yield
    except (DatakitError, *ABOUT_THE_QUESTION):
        raise
    except BaseException as e:
        # What polars calls a panic is a BaseException, and not one that can be imported.
        if not isinstance(e, FILE_ERRORS) and type(e).__name__ != "PanicException":
            raise
        with suppress(MissingDependency):  # what it takes to look into this object store
            require_whole(catalog, catalog.versions(), e)
        raise


def damaged(catalog: Catalog, versions: dict[str, int] | dict[str, None]) -> list[Damage]:
    """Every file that these versions (None: the newest) need and that is missing or torn. Reads the footers of all
    files."""
    storage = Storage(catalog.root)
    found: list[Damage] = []
    for name, version in versions.items():
        try:
            table = catalog.table(name, version)
        except CatalogError:
            found += [Damage(name, b.path, b.what) for b in Log(storage, name).broken()] or [
                Damage(name, f"{name}/_delta_log", "missing")
            ]
            continue
        stored = storage.list(name)
        for path, size in files_of(table).items():
            what = _what_is_wrong(storage, f"{name}/{path}", size, stored)
            found += [Damage(name, f"{name}/{path}", what)] if what else []
    return found


def require_whole(
    catalog: Catalog, versions: dict[str, int] | dict[str, None], cause: BaseException | None = None
) -> None:
    """Raises:
    CatalogError: files that these versions need are missing or torn; which, and the snapshot to go back to.
    """
    found = damaged(catalog, versions)
    if found:
        raise _error(catalog.root, found) from cause


def check_files(root: str, name: str, table: DeltaTable) -> None:
    """A quick look, before a local table is read, whether its files are there and as long as they were: a reader that
    meets a file that is too short may panic instead of telling.

    Raises:
        CatalogError: which is not, and the snapshot to go back to.
    """
    wrong = []
    for path, size in files_of(table).items():
        try:
            found = os.stat(f"{root}/{name}/{path}").st_size
        except FileNotFoundError:
            wrong.append(Damage(name, f"{name}/{path}", "missing"))
        else:
            wrong += [Damage(name, f"{name}/{path}", "torn")] if found != size else []
    if wrong:
        raise _error(root, wrong)


def check_entries(root: str, name: str, newest: int) -> None:
    """A quick look for empty entries of a local table's log, which Delta takes for changes of nothing.

    Raises:
        CatalogError: which is empty, and the snapshot to go back to.
    """
    folder = f"{root}/{name}/_delta_log"
    try:
        with open(f"{folder}/_last_checkpoint", "rb") as file:
            first = json.loads(file.read())["version"]
    except (OSError, ValueError, KeyError):
        first = 0
    versions = (int(found.group(1)) for entry in os.listdir(folder) if (found := ENTRY.fullmatch(entry)))
    for version in sorted(v for v in versions if min(first, newest) <= v <= newest):
        path = f"{version:020d}.json"
        if os.path.getsize(f"{folder}/{path}") == 0:
            raise _error(root, [Damage(name, f"{name}/_delta_log/{path}", "empty")])


def unreadable_log(root: str, name: str, version: int | None, error: Exception) -> CatalogError:
    """What to say of a table that cannot be opened (at a version; None: the newest)."""
    reason = str(error).strip().split("\n")[0]
    unclear = CatalogError(f"cannot read table {name} of the catalog at {root}: {reason}")
    try:
        log = Log(Storage(root), name)
    except MissingDependency:  # what it takes to look into this object store
        return unclear
    wrong = [b for b in log.broken() if version is None or b.version <= version]
    if wrong:
        return _error(root, [Damage(name, b.path, b.what) for b in wrong])
    if version is not None and version > log.newest >= 0:
        return CatalogError(
            f"{name} has no version {version}: the newest is {log.newest} (`datakit catalog history {root}` lists them)"
        )
    return unclear


def set_aside(root: str) -> list[str]:
    """Give up entries of logs that are torn, empty or missing, where the newest version needs them, and all later ones.
    They are renamed to `….json.torn`, never deleted; entries that change nothing take their places, so that their
    numbers, which snapshots may have recorded, are not given to other versions.

    Returns:
        paths of the entries that were given up.
    """
    storage = Storage(root)
    moved: list[str] = []
    for name in TABLES:
        log = Log(storage, name)
        first = _first_lost(log)
        if first == 0:  # nothing is whole before: no way back, and reading says so
            continue
        lost = (
            list(range(log.newest, first - 1, -1)) if first else []
        )  # newest first: killed in between, there is no gap
        for version in lost:
            if version in log.entries:
                storage.move(log.entries[version], log.entries[version] + ASIDE)
        moved += [log.path(version) for version in lost]
        _fill_numbers(storage, Log(storage, name), lost)
    return sorted(moved)


def _fill_numbers(storage: Storage, log: Log, lost: list[int]) -> None:
    """Entries that change nothing, in place of those given up (now, or by a call that was killed)."""
    given_up = {int(found.group(1)) for path in log.other if (found := GIVEN_UP.search(path))} | set(lost)
    if not given_up - set(log.entries):
        return
    moment = max((state.time for state in log.states()), default=0)
    for version in sorted(given_up - set(log.entries)):
        note = {"timestamp": moment, "operation": "LOST", "operationParameters": {}, "engineInfo": "datakit"}
        storage.replace(log.path(version), json.dumps({"commitInfo": note}).encode())


def files_of(table: DeltaTable) -> dict[str, int]:
    """The data files of a table as it was opened, as they are called on disk, with their bytes."""
    adds = table.get_add_actions(
        flatten=False
    )  # not made a pyarrow table of, which would import pandas where there is one
    return {
        unquote(path): size
        for path, size in zip(adds.column("path").to_pylist(), adds.column("size_bytes").to_pylist())
    }


def _what_is_wrong(storage: Storage, path: str, size: int, stored: dict[str, Stored]) -> str | None:
    if path not in stored:
        return "missing"
    if stored[path].size != size:
        return "torn"
    try:
        with storage.open(path) as file:
            file.seek(-len(MAGIC), os.SEEK_END)
            if file.read() != MAGIC:
                return "torn"
            pq.read_metadata(file)
    except FileNotFoundError:
        return "missing"
    except (OSError, pa.ArrowException) as e:
        return f"damaged ({str(e).strip().splitlines()[0]})"
    return None


def _error(root: str, found: list[Damage]) -> CatalogError:
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return CatalogError(f"{root}/{found[0].path} is {found[0].what}{more}: {_way_back(root, {d.table for d in found})}")


def _way_back(root: str, tables: set[str]) -> str:
    """In words: what to type."""
    records = sorted(tables & set(RECORDS))
    if records:
        return (
            f"table {records[0]} is about the catalog itself, no snapshot holds it; move {root}/{records[0]} to "
            f"another place, and "
            "the next `datakit run ingest` makes an empty one"
        )
    versions = newest_whole(Storage(root), tables)
    if versions is None:
        return "no older version is whole; the sources can be ingested again, into a new catalog"
    if not versions:
        return (
            f"the catalog as it is now is whole; that version is lost (`datakit catalog history {root}` lists the "
            f"others)"
        )
    text = ",".join(f"{name}={version}" for name, version in sorted(versions.items()))
    meanwhile = "" if "videos" in tables else f", `--snapshot {text}` reads it meanwhile"
    return (
        f"the newest snapshot whose files are all there is {text}; `datakit catalog restore {root} {text}` goes "
        f"back to it{meanwhile}"
    )


def newest_whole(storage: Storage, tables: Iterable[str]) -> dict[str, int] | None:
    """The newest versions of damaged tables, and of those that must go with them, whose files and logs are all there.
    Tables whose newest version is whole are left out; None: there is no such version."""
    wanted = set(tables)
    wanted |= set(TOGETHER) if wanted & set(TOGETHER) else set()
    newest = {name: Log(storage, name).newest for name in wanted}
    history = {name: _wholeness(storage, name) for name in wanted}
    found: dict[str, int] = {}
    for name in wanted - set(TOGETHER):
        whole = [version for version, (_, is_whole) in history[name].items() if is_whole]
        if not whole:
            return None
        found[name] = max(whole)
    if wanted & set(TOGETHER):
        pair = _at_one_moment({name: history[name] for name in TOGETHER})
        if pair is None:
            return None
        found.update(pair)
    return {name: version for name, version in found.items() if version != newest[name]}


def _at_one_moment(history: dict[str, dict[int, tuple[int, bool]]]) -> dict[str, int] | None:
    """The newest moment at which all of these tables were whole."""
    moments = sorted({moment for versions in history.values() for moment, _ in versions.values()}, reverse=True)
    for now in moments:
        at = {
            name: max(v for v, (moment, _) in versions.items() if moment <= now)
            for name, versions in history.items()
            if any(moment <= now for moment, _ in versions.values())
        }
        if len(at) == len(history) and all(history[name][version][1] for name, version in at.items()):
            return at
    return None


def _wholeness(storage: Storage, name: str) -> dict[int, tuple[int, bool]]:
    """Version -> its time (ms), and whether log and files are whole."""
    log, stored = Log(storage, name), storage.list(name)
    states: dict[int, tuple[int, bool]] = {}
    judged: dict[tuple[str, int], bool] = {}
    for state in log.states():
        for file in state.files.items():
            if file not in judged:
                judged[file] = _what_is_wrong(storage, f"{name}/{file[0]}", file[1], stored) is None
        states[state.version] = (state.time, all(judged[file] for file in state.files.items()))
    found: dict[int, tuple[int, bool]] = {}
    for version in range(log.newest + 1):
        before = found[version - 1][0] + 1 if version else 0  # of an entry without a time: as early as can be
        found[version] = states.get(version) or (log.time(version) or before, False)
    return found


def _first_lost(log: Log) -> int | None:
    """The first entry that the newest version needs and that cannot be read."""
    start = max(log.checkpoints, default=-1)
    lost = [b.version for b in log.broken() if b.version > start]
    return lost[0] if lost else None
