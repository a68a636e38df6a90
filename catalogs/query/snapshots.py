"""Snapshots: the version of every table at some moment. Naming them, listing them, going back, cleaning up.

A snapshot is written `NAME` (a tag), `RUN` (a run id, or the start of one: the catalog as that run left it), a time
(`2026-11-22`, `2026-11-22T10:00`, in UTC), `now`, or versions (`clips=12,decisions=4`; other tables: now).
"""

from __future__ import annotations

import getpass
import json
import re
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import polars as pl

from catalogs.query.history import commits
from catalogs.tables.catalog import RESTORING, Catalog
from catalogs.tables.integrity import require_whole
from catalogs.tables.schema import RECORDS, TABLES
from catalogs.tables.upgrade import bring_up_to_date
from datakit.errors import CatalogError

if TYPE_CHECKING:
    from catalogs.query.selection import Selection

DATA = tuple(name for name in TABLES if name not in RECORDS)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
RUN_PREFIX = 4
"""Fewest characters of a run id that name it."""


def author() -> str:
    """Who runs this: user@host."""
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (KeyError, OSError):  # a user id without a name, as in some containers
        return f"unknown@{socket.gethostname()}"


def resolve(catalog: Catalog, snapshot: str | None) -> dict[str, int]:
    """The versions that a snapshot's name stands for; None: now.

    Raises:
        CatalogError: nothing has that name.
    """
    if snapshot is None or snapshot == "now":
        return catalog.versions()
    if "=" in snapshot:
        chosen = _explicit(snapshot)
        return {**catalog.versions(without=chosen), **chosen}
    tagged = catalog.scan("tags").filter((pl.col("name") == snapshot) & (pl.col("name") != RESTORING)).collect()
    if tagged.height:
        return _complete(json.loads(tagged["versions"][-1]))
    runs = catalog.scan("runs").select("run_id", "snapshot").collect()
    named = runs.filter(pl.col("run_id").str.starts_with(snapshot)) if len(snapshot) >= RUN_PREFIX else runs.clear()
    if named.height == 1:
        if named["snapshot"][0] is None:
            raise CatalogError(
                f"run {named['run_id'][0]} has not finished, or is of an earlier datakit: no snapshot of it is known"
            )
        return _complete(json.loads(named["snapshot"][0]))
    moment = _time(snapshot)
    if moment is not None:
        return at_time(catalog, moment)
    known = ", ".join(sorted(set(catalog.scan("tags").select("name").collect()["name"]) - {RESTORING})) or "none"
    raise CatalogError(
        f"no snapshot {snapshot!r}: give a tag ({known}), a run id, a time, or versions as clips=12,decisions=4"
    )


def at_time(catalog: Catalog, moment: datetime) -> dict[str, int]:
    """The newest versions that were written at or before a moment.

    Raises:
        CatalogError: the catalog is younger.
    """
    found = {}
    for name in DATA:
        before = [c["version"] for c in commits(catalog, name) if c["time"] <= moment]
        if not before and name in ("videos", "clips"):
            raise CatalogError(f"the catalog is younger than {moment:%Y-%m-%d %H:%M:%S} UTC")
        found[name] = max(before, default=0)
    return found


def tag(
    catalog: Catalog, name: str, snapshot: str | None = None, selection: Selection | None = None, note: str = ""
) -> dict[str, int]:
    """Name a snapshot, or a selection. What a tag names is never vacuumed.

    Returns:
        the versions.

    Raises:
        CatalogError: the name is taken or makes no sense, or there is no such snapshot.
    """
    if not NAME.fullmatch(name) or name == "now":
        raise CatalogError(f"a tag's name has letters, digits, '.', '_' and '-': not {name!r}")
    versions = selection.versions if selection else resolve(catalog, snapshot)
    row = {
        "name": name,
        "versions": json.dumps(versions),
        "note": note,
        "author": author(),
        "created_at": datetime.now(UTC),
        **(
            {"where": selection.where, "columns": list(selection.columns), "content_hash": selection.content_hash}
            if selection
            else {}
        ),
    }

    def refuse_if_taken(rows: pl.DataFrame, table: pl.LazyFrame) -> pl.DataFrame:
        if table.filter(pl.col("name") == name).collect().height:
            raise CatalogError(f"there is a tag {name} already (`datakit catalog tag DIR {name} --delete` removes it)")
        return rows

    catalog.upsert("tags", [row], only="insert", revise=refuse_if_taken)
    return versions


def untag(catalog: Catalog, name: str) -> None:
    """Remove a tag; what it named stays until a vacuum.

    Raises:
        CatalogError: no such tag.
    """
    if not NAME.fullmatch(name) or not catalog.delete("tags", f"name = '{name}'"):
        raise CatalogError(f"no tag {name!r}")


def tags(catalog: Catalog) -> pl.DataFrame:
    """Every tag, oldest first."""
    return catalog.scan("tags").filter(pl.col("name") != RESTORING).sort("created_at").collect()


@dataclass(frozen=True)
class Restored:
    """Tables that were taken back: name -> (version before, version restored)."""

    tables: dict[str, tuple[int, int]]


def restore(catalog: Catalog, snapshot: str) -> Restored:
    """Make the catalog what it was at a snapshot. Nothing is lost: this writes new versions with the old rows, and the
    state before can be restored in the same way. Readers see the state before until all tables are back; killed in
    between, the same command finishes.

    Raises:
        CatalogError: no such snapshot, or its files are not there any more.
    """
    target = resolve(catalog, snapshot)
    require_whole(catalog, target)
    before = {name: catalog.table(name).version() for name in DATA}
    description = catalog.table("videos").metadata().description
    changes = {
        name: version for name, version in target.items() if _same_files(catalog, name, version, before[name]) is False
    }
    if not changes:
        _end_restore(catalog)
        return Restored({})
    if not catalog.scan("tags").filter(pl.col("name") == RESTORING).collect().height:
        catalog.append(
            "tags",
            [{"name": RESTORING, "versions": json.dumps(before), "author": author(), "created_at": datetime.now(UTC)}],
        )
    for name, version in changes.items():
        catalog.restore_table(name, version)
        bring_up_to_date(catalog.root, name, description)
    _end_restore(catalog)
    return Restored({name: (before[name], version) for name, version in changes.items()})


def check_writable(catalog: Catalog) -> None:
    """Raises:
    CatalogError: a restore is under way, or was interrupted.
    """
    if catalog.scan("tags").filter(pl.col("name") == RESTORING).collect().height:
        raise CatalogError(
            f"a restore of {catalog.root} is under way or was interrupted: `datakit catalog restore` finishes it"
        )


def _end_restore(catalog: Catalog) -> None:
    catalog.delete("tags", f"name = '{RESTORING}'")


def _same_files(catalog: Catalog, name: str, one: int, other: int) -> bool:
    return one == other or set(catalog.table(name, one).file_uris()) == set(catalog.table(name, other).file_uris())


@dataclass(frozen=True)
class Vacuumed:
    """Files that were deleted, their bytes (None in object stores), and the versions that had to stay, by table."""

    files: int
    bytes: int | None
    referenced: dict[str, list[int]]


def referenced(catalog: Catalog) -> list[dict[str, int]]:
    """The versions that tags, runs with a selection (and so their checkpoints) and a restore under way need."""
    named = catalog.scan("tags").select("versions").collect()["versions"].to_list()
    selections = catalog.scan("runs").select("selection").drop_nulls().collect()["selection"].to_list()
    return [
        *(_complete(json.loads(text)) for text in named),
        *(_complete(json.loads(text)["versions"]) for text in selections),
    ]


def vacuum(catalog: Catalog, keep_days: float = 7.0, dry_run: bool = False) -> Vacuumed:
    """Delete files that are needed by none of: the newest version, any version of the last days, tags, runs that
    recorded a selection (and so their checkpoints).

    Args:
        keep_days: that versions live without being referenced.
        dry_run: only count.
    """
    needed = referenced(catalog)
    kept = {name: sorted({v[name] for v in needed if name in v}) for name in TABLES}
    gone = [catalog.vacuum_table(name, keep_days, kept[name], dry_run) for name in TABLES]
    return Vacuumed(
        sum(len(paths) for paths, _ in gone), sum(size for _, size in gone) if catalog.is_local else None, kept
    )


def _explicit(text: str) -> dict[str, int]:
    versions = {}
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        if name not in DATA or not number.isdigit():
            raise CatalogError(f"versions are given as TABLE=NUMBER with tables {', '.join(DATA)}, not {part!r}")
        versions[name] = int(number)
    return versions


def _complete(versions: dict[str, int]) -> dict[str, int]:
    """Tables that are younger than a snapshot are empty in it: at their version 0."""
    return {name: versions.get(name, 0) for name in DATA}


def _time(text: str) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
