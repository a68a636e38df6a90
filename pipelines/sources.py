"""From what the user names (files, folders, globs, lists, URLs) to a stream of sources.

Listing streams: a folder of a million files gives its first source at once.
"""

from __future__ import annotations

import csv
import glob
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datakit.errors import ConfigError
from datakit.source import Source, listed_object, look_at, look_at_file
from datakit.video.uri import IMAGE_SUFFIXES, VIDEO_SUFFIXES, is_remote, local_path, open_bytes

MEDIA_SUFFIXES = VIDEO_SUFFIXES | IMAGE_SUFFIXES
LIST_SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl", ".parquet")
PATH_COLUMNS = ("path", "uri", "url", "video", "video_path", "file", "file_name", "filename")
KNOWN_COLUMNS = {
    "license": "license",
    "licence": "license",
    "source_url": "source_url",
    "attribution": "attribution",
    "source_caption": "source_caption",
    "caption": "source_caption",
    "text": "source_caption",
}
"""Columns of a list that have a column of their own in `videos`; the others go to `extra`."""


@dataclass
class Listing:
    """Counts of what a walk passed over; filled while `sources` runs."""

    found: int = 0
    ignored: int = 0  # files in folders without a media suffix


def sources(specs: Iterable[str], listing: Listing | None = None) -> Iterator[Source]:
    """Everything the specs name, in order, folders sorted by name.

    Args:
        specs: paths of files, folders, lists (.txt .csv .tsv .jsonl .parquet), globs, or URLs.

    Raises:
        ConfigError: a spec that names nothing, or a list without a path column.
    """
    listing = listing if listing is not None else Listing()
    for spec in specs:
        for source in _expand(spec, listing):
            listing.found += 1
            yield source


def check(specs: Iterable[str]) -> None:
    """Fail at once on what cannot work, before anything starts.

    Raises:
        ConfigError: no specs, or a local one that names nothing.
    """
    specs = list(specs)
    if not specs:
        raise ConfigError("name at least one source: a file, folder, glob, list or URL")
    for spec in specs:
        if not is_remote(spec) and not os.path.lexists(local_path(spec)) and not glob.glob(spec, recursive=True):
            raise ConfigError(f"no such file or folder: {spec}")


def _expand(spec: str, listing: Listing) -> Iterator[Source]:
    if is_remote(spec):
        yield from _expand_remote(spec, listing)
        return
    path = local_path(spec)
    if os.path.isdir(path):
        yield from _walk(path, listing)
    elif not os.path.lexists(path) and (matches := sorted(glob.glob(path, recursive=True))):
        for match in matches:
            yield from _expand(match, listing)
    elif path.lower().endswith(LIST_SUFFIXES):
        yield from _read_list(path)
    elif os.path.lexists(path):
        yield look_at_file(path)
    else:
        raise ConfigError(f"no such file or folder: {spec}")


def _walk(folder: str, listing: Listing) -> Iterator[Source]:
    entered: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(root)) in entered:  # a link leads back
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(files):
            if Path(name).suffix.lower() in MEDIA_SUFFIXES and not name.startswith("."):
                yield look_at_file(os.path.join(root, name))
            else:
                listing.ignored += 1


def _expand_remote(spec: str, listing: Listing) -> Iterator[Source]:
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(spec)
    except (ImportError, ValueError) as e:
        raise ConfigError(f"{spec}: {e} (for s3:// and gs:// install the extras 's3' and 'gcs')") from e
    if path.lower().endswith(LIST_SUFFIXES):
        yield from _read_list(spec)
        return
    try:
        if glob.has_magic(path):
            found = fs.glob(path, detail=True)
        elif fs.isdir(path):
            found = fs.find(path, detail=True)
        else:
            found = {path: fs.info(path)}
    except Exception as e:  # each store has its own exceptions
        raise ConfigError(f"cannot list {spec}: {e}") from e
    single = len(found) == 1
    for name, info in sorted(found.items()):
        if single or Path(name).suffix.lower() in MEDIA_SUFFIXES:
            yield listed_object(fs.unstrip_protocol(name), info)
        else:
            listing.ignored += 1


def _read_list(location: str) -> Iterator[Source]:
    """Sources of a list; relative paths are relative to the list."""
    for number, row in enumerate(_rows(location), start=1):
        lowered = {str(k).strip().lower(): v for k, v in row.items() if k is not None}
        column = next((c for c in PATH_COLUMNS if c in lowered), None)
        if column is None:
            raise ConfigError(
                f"{location} has no path column: it has {', '.join(lowered) or 'none'}; expected one of "
                f"{', '.join(PATH_COLUMNS)}"
            )
        path = str(lowered.pop(column) or "").strip()
        if not path:
            raise ConfigError(f"{location}: row {number} has an empty {column}")
        yield _listed(path, location, _attributes(lowered))


def _listed(path: str, location: str, attributes: dict[str, str]) -> Source:
    if not is_remote(path):
        path = local_path(path)
        if not os.path.isabs(path):
            folder = location.rsplit("/", 1)[0] if is_remote(location) else os.path.dirname(os.path.abspath(location))
            path = f"{folder}/{path}"
    return look_at(path, attributes)


def _rows(location: str) -> Iterator[dict[str, Any]]:
    """Rows of a list.

    Raises:
        ConfigError: it cannot be read or parsed.
    """
    try:
        for row in _parse(location, location.lower().rsplit(".", 1)[-1]):
            if not isinstance(row, dict):
                raise ConfigError(f"{location}: {row!r} is no JSON object with a path")
            yield row
    except (OSError, ValueError, csv.Error) as e:  # ValueError: of decoding, JSON
        raise ConfigError(f"cannot read the list {location}: {e}") from e


def _parse(location: str, suffix: str) -> Iterator[Any]:
    with open_bytes(location) as file:
        if suffix == "parquet":
            import pyarrow.parquet

            for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
                yield from batch.to_pylist()
            return
        lines = (line.decode("utf-8-sig" if i == 0 else "utf-8") for i, line in enumerate(file))
        if suffix == "txt":
            yield from ({"path": line.strip()} for line in lines if line.strip())
        elif suffix == "jsonl":
            yield from (json.loads(line) for line in lines if line.strip())
        else:
            yield from csv.DictReader(lines, delimiter="\t" if suffix == "tsv" else ",")


def _attributes(row: dict[str, Any]) -> dict[str, str]:
    known: dict[str, str] = {}
    extra: dict[str, Any] = {}
    for name, value in row.items():
        if value in (None, ""):
            continue
        column = KNOWN_COLUMNS.get(name)
        if column and column not in known:
            known[column] = str(value)
        else:
            extra[name] = value
    if extra:
        known["extra"] = json.dumps(extra, default=str, sort_keys=True)
    return known
