"""Changing the past of a table: the same edit to every data file that any version needs, under new names, and the log
made to mention those. Every version stays readable under its number at every moment, also after a kill in between:

| step | what changes | killed here, a version reads | the next call |
|---|---|---|---|
| 1 | edited files appear beside the old; name = old name + hash of content | old files | writes those missing |
| 2 | checkpoints go, the hint to them first: entries since 0 say the same | old files | deletes the rest |
| 3 | an entry that removes an old file removes the new one too | old files | completes the others |
| 4 | an entry that adds an old file adds the new one instead | old or new, removed where either was | as 3 |
| 5 | removals of old files go | new files | leaves the others: they name what is not there |
| 6 | a checkpoint is made, if there were any | new files | makes none: the entries do |
| 7 | additions of vacuumed files lose their statistics, which name rows | new files | clears the others |
| 8 | old files go; one that no version knows only when 15 minutes old | new files | deletes the others |

Meant for times when nobody writes: a writer that began before and commits in between is caught up with by the next
call.

Delta's own `delete` and `vacuum` (deltalake 1.6) keep one half of the promise only: of 20 versions, 17 with the row,
`vacuum` leaves 3 readable, or, with `keep_versions`, all 20 and the row in 17; either way statistics in the log name
it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import unquote

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable

from catalogs.tables.delta_log import Log
from catalogs.tables.file_statistics import statistics_of
from catalogs.tables.object_store import Storage
from datakit.errors import CatalogError

MARK = re.compile(r"-forgot-[0-9a-f]{16}(?=\.)")
"""Ends the stem of a new name."""
YOUNG_S = 900.0
"""A file that no version knows may belong to a writer at work for so long."""


@dataclass(frozen=True)
class Edit:
    """What is to become of the rows of a file.

    Attributes:
        columns: that `judge` looks at (those that a file lacks are null).
        judge: gives which rows stay, and new values of columns.
        shards: only files of these partitions can be concerned (None: any).
    """

    columns: tuple[str, ...]
    judge: Callable[[pl.DataFrame], tuple[pl.Series, dict[str, pl.Series]]]
    shards: frozenset[str] | None = None


@dataclass(frozen=True)
class NewFile:
    path: str
    size: int
    stats: str


@dataclass
class Rewritten:
    """What a rewriting did.

    Attributes:
        files: old files that were replaced or deleted.
        waiting: files that no version knows, too young to be deleted.
    """

    files: int = 0
    waiting: int = 0
    clean: set[str] = field(default_factory=set)


def check_rewritable(storage: Storage, table: str) -> None:
    """Raises:
    CatalogError: not every version of the table can be found out, so that not every version could be changed.
    """
    log = Log(storage, table)
    if not log.entries:
        raise CatalogError(f"{storage.root}/{table} has no log: there is no telling which files belong to it")
    for version in range(log.newest + 1):
        try:
            actions = log.actions(version)
        except FileNotFoundError as e:
            raise CatalogError(
                f"{log.path(version)} is missing: versions before it cannot be rewritten, so nothing was"
            ) from e
        except ValueError as e:
            raise CatalogError(
                f"{log.path(version)} is torn (`datakit catalog validate` says what to do): nothing was rewritten"
            ) from e
        for action in actions:
            about = action.get("add") or action.get("remove")
            if about and (about.get("deletionVector") or "://" in about["path"]):
                raise CatalogError(
                    f"{log.path(version)} has deletion vectors or files elsewhere, by another writer: nothing was "
                    f"rewritten"
                )


def data_files(storage: Storage, table: str, shards: frozenset[str] | None = None) -> list[str]:
    """The Parquet files that lie in a table's folder, below the catalog; those that no version knows too."""
    paths = [p for p in storage.list(table) if p.endswith(".parquet") and "/_delta_log/" not in p]
    return sorted(p for p in paths if _of_shards(p, shards))


def _of_shards(path: str, shards: frozenset[str] | None) -> bool:
    found = re.search(r"/shard=([^/]*)/", path)
    return shards is None or found is None or unquote(found.group(1)) in shards


def read_columns(storage: Storage, path: str, columns: tuple[str, ...]) -> pl.DataFrame:
    """Some columns of a data file; those it lacks are null.

    Raises:
        CatalogError: the file cannot be read.
    """
    try:
        with storage.open(path) as file:
            parquet = pq.ParquetFile(file)
            have = [c for c in columns if c in parquet.schema_arrow.names]
            frame = pl.from_arrow(parquet.read(columns=have))
            assert isinstance(frame, pl.DataFrame)
            frame = (
                frame if have else pl.DataFrame({"": pl.Series([None]).new_from_index(0, parquet.metadata.num_rows)})
            )
    except (OSError, pa.ArrowException) as e:
        raise CatalogError(
            f"{storage.root}/{path} cannot be read (`datakit catalog validate` says what to do): {e}"
        ) from e
    return frame.select(*(pl.col(c) if c in have else pl.lit(None).alias(c) for c in columns))


def rewrite(storage: Storage, table: str, edit: Edit, clean: set[str]) -> Rewritten:
    """Apply an edit to every version of a table; see above. Done again after a kill, it completes.

    Args:
        clean: files that need no edit, from an earlier call with the same edit; those found are added.
    """
    old = [
        path
        for path in data_files(storage, table, edit.shards)
        if path not in clean and not _is_clean(storage, path, edit, clean)
    ]
    log = Log(storage, table)
    actions = {version: log.actions(version) for version in log.entries}
    mentioned = {f"{table}/{unquote(a['add']['path'])}" for entry in actions.values() for a in entry if "add" in a}
    new = {path: _write_without(storage, path, edit) for path in old if path in mentioned}
    clean.update(file.path for file in new.values())
    lying = set(data_files(storage, table))
    vacuumed = {path for path in mentioned - lying if _of_shards(path, edit.shards)}
    names = {
        path[len(table) + 1 :]: NewFile(file.path[len(table) + 1 :], file.size, file.stats)
        for path, file in new.items()
    }
    followers = _unmatched_removals(actions, names)
    if names or followers:
        had_checkpoints = _drop_checkpoints(storage, log)
        for step in (_remove_both, _add_new, _remove_new_only):
            for version in sorted(actions):
                _write_entry(storage, log, version, actions, step(actions[version], names, followers))
        if had_checkpoints:
            DeltaTable(f"{storage.root}/{table}").create_checkpoint()
    for version, entry in actions.items():
        _write_entry(storage, log, version, actions, [_without_stats(a, table, vacuumed) for a in entry])
    result = Rewritten()
    bases = {
        _base(path)
        for path in {f"{table}/{unquote(a['add']['path'])}" for entry in actions.values() for a in entry if "add" in a}
    }
    for path in old:
        stored = storage.stat(path)
        if stored and path not in mentioned and _base(path) not in bases and time.time() - stored.modified < YOUNG_S:
            result.waiting += 1
            continue
        storage.delete(path)
        result.files += 1
    return result


def _is_clean(storage: Storage, path: str, edit: Edit, clean: set[str]) -> bool:
    stays, values = edit.judge(read_columns(storage, path, edit.columns))
    if stays.all() and not values:
        clean.add(path)
        return True
    return False


def _write_without(storage: Storage, path: str, edit: Edit) -> NewFile:
    """The file as it is to be, beside the old one."""
    with storage.open(path) as file:
        parquet = pq.ParquetFile(file)
        rows, about = parquet.read(), parquet.metadata
    rows = rows.cast(pa.schema([f.with_type(_plain(f.type)) for f in rows.schema]))
    stays, values = edit.judge(read_columns(storage, path, edit.columns))
    for name, series in values.items():
        place = rows.schema.get_field_index(name)
        rows = rows.set_column(place, rows.schema.field(place), series.to_arrow().cast(rows.schema.field(place).type))
    rows = rows.filter(stays.to_arrow())
    group = about.row_group(0) if about.num_row_groups else None
    codecs = (
        {group.column(i).path_in_schema: group.column(i).compression for i in range(group.num_columns)} if group else {}
    )
    one = next(iter(codecs.values()), "SNAPPY")
    buffer = io.BytesIO()
    compression = one if len(set(codecs.values())) < 2 else codecs
    pq.write_table(rows, buffer, compression=cast(Any, compression), row_group_size=group.num_rows if group else None)
    data = buffer.getvalue()
    name = f"{_base(path)}-forgot-{hashlib.blake2b(data, digest_size=8).hexdigest()}{_ending(path)}"
    if storage.stat(name) is None or storage.read(name) != data:
        storage.replace(name, data)
    return NewFile(
        name, len(data), json.dumps(statistics_of(pq.read_metadata(io.BytesIO(data))), separators=(",", ":"))
    )


def _plain(kind: pa.DataType) -> pa.DataType:
    """The same without views, which Arrow cannot filter and Parquet does not know."""
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_plain(kind.value_type)))
    if pa.types.is_struct(kind):
        return pa.struct([f.with_type(_plain(f.type)) for f in kind])
    return pa.string() if pa.types.is_string_view(kind) else pa.binary() if pa.types.is_binary_view(kind) else kind


def _base(path: str) -> str:
    """A name without its ending and without the mark of an earlier rewriting."""
    return MARK.sub("", path).removesuffix(_ending(path))


def _ending(path: str) -> str:
    """`.snappy.parquet` of a file's name."""
    return "." + os.path.basename(path).split(".", 1)[1]


def _unmatched_removals(actions: dict[int, list[dict]], names: dict[str, NewFile]) -> dict[str, list[str]]:
    """Files that are removed and added nowhere, though files that took their places are: a writer that read before a
    rewriting and committed after it. Gives those files."""
    added = {unquote(a["add"]["path"]) for entry in actions.values() for a in entry if "add" in a}
    added |= {names[path].path for path in added & set(names)}
    by_base: dict[str, list[str]] = {}
    for path in added:
        if MARK.search(path):
            by_base.setdefault(_base(path), []).append(path)
    removed = {unquote(a["remove"]["path"]) for entry in actions.values() for a in entry if "remove" in a}
    return {path: by_base[_base(path)] for path in removed - added if path not in names and _base(path) in by_base}


def _drop_checkpoints(storage: Storage, log: Log) -> bool:
    """The hint goes first: nothing may point to what is gone. What is derived from entries (checksums, compactions)
    goes too."""
    for path in sorted(log.other, key=lambda p: not p.endswith("_last_checkpoint")):
        if path.endswith(("_last_checkpoint", ".crc", ".compacted.json")) or "/_sidecars/" in path:
            storage.delete(path)
    for paths in log.checkpoints.values():
        for path in paths:
            storage.delete(path)
    return bool(log.checkpoints)


def _without_stats(action: dict, table: str, vacuumed: set[str]) -> dict:
    """The addition of a file that was vacuumed: its rows cannot be looked at, and its lowest and highest texts are some
    of them."""
    about = action.get("add")
    if not about or not about.get("stats") or f"{table}/{unquote(about['path'])}" not in vacuumed:
        return action
    return {
        "add": {
            **about,
            "stats": json.dumps({"numRecords": json.loads(about["stats"]).get("numRecords", 0)}, separators=(",", ":")),
        }
    }


def _remove_both(entry: list[dict], names: dict[str, NewFile], followers: dict[str, list[str]]) -> list[dict]:
    there = {unquote(a["remove"]["path"]) for a in entry if "remove" in a}
    changed = []
    for action in entry:
        changed.append(action)
        old = unquote(action["remove"]["path"]) if "remove" in action else None
        targets = [names[old].path] if old in names else followers.get(old, []) if old else []
        for path in targets:
            if path not in there:
                size = names[old].size if old in names else action["remove"].get("size")
                changed.append({"remove": _renamed(action["remove"], path, size, None)})
    return changed


def _add_new(entry: list[dict], names: dict[str, NewFile], followers: dict[str, list[str]]) -> list[dict]:
    changed = []
    for action in entry:
        new = names.get(unquote(action["add"]["path"])) if "add" in action else None
        changed.append({"add": _renamed(action["add"], new.path, new.size, new.stats)} if new else action)
    return changed


def _remove_new_only(entry: list[dict], names: dict[str, NewFile], followers: dict[str, list[str]]) -> list[dict]:
    return [
        a for a in entry if "remove" not in a or unquote(a["remove"]["path"]) not in (names.keys() | followers.keys())
    ]


def _renamed(about: dict, path: str, size: int | None, stats: str | None) -> dict:
    """An action about another file of the same folder; paths of folders stay written as they were."""
    folder = about["path"].rpartition("/")[0]
    name = path.rpartition("/")[2]
    changed = {**about, "path": f"{folder}/{name}" if folder else name}
    if size is not None and ("size" in about or "add" in about):
        changed["size"] = size
    if "stats" in about:
        changed["stats"] = stats
    return changed


def _write_entry(storage: Storage, log: Log, version: int, actions: dict[int, list[dict]], changed: list[dict]) -> None:
    if changed == actions[version]:
        return
    text = "\n".join(json.dumps(action, separators=(",", ":"), ensure_ascii=False) for action in changed)
    storage.replace(log.entries[version], text.encode(), log.stored[log.entries[version]].modified)
    actions[version] = changed
