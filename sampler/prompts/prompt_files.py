"""Rows of the files that prompts are read from, each with the place where it stands."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

from datakit.errors import ConfigError
from datakit.video.uri import open_bytes

Row = tuple[str, dict[str, Any]]
"""File with line or row, for messages; values by column."""


def rows(path: str) -> Iterator[Row]:
    """The rows of a .csv, .jsonl or .parquet; of a .txt the lines, as columns `text`, without empty ones and those that
    begin with #.

    Raises:
        ConfigError: it cannot be read; a row that is none (named).
    """
    kind = path.lower().rsplit(".", 1)[-1]
    try:
        yield from {"txt": _lines, "csv": _csv_rows, "jsonl": _json_rows, "parquet": _parquet_rows}[kind](path)
    except (OSError, UnicodeDecodeError, ImportError) as e:  # ImportError: an object store whose extra is not installed
        raise ConfigError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from e


def _lines(path: str) -> Iterator[Row]:
    with _text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip() and not line.startswith("#"):
                yield f"{path} line {number}", {"text": line.strip()}


def _csv_rows(path: str) -> Iterator[Row]:
    with _text(path) as file:
        reader = csv.reader(file, strict=True)
        line = 1
        try:
            header = [name.strip() for name in next(reader, [])]
            if len(set(header)) < len(header):
                raise ConfigError(f"{path} line 1: a column name occurs twice")
            line = reader.line_num + 1
            for cells in reader:
                if cells and len(cells) != len(header):
                    raise ConfigError(
                        f"{path} line {line}: {len(cells)} fields, the header has {len(header)} (quote texts that "
                        f"have commas)"
                    )
                if cells:
                    yield f"{path} line {line}", dict(zip(header, cells))
                line = reader.line_num + 1
        except csv.Error as e:
            raise ConfigError(f"{path} line {line}: {e}") from e


def _json_rows(path: str) -> Iterator[Row]:
    with _text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                found = json.loads(line)
            except ValueError as e:
                raise ConfigError(f"{path} line {number}: no JSON: {e}") from e
            if not isinstance(found, dict):
                raise ConfigError(f"{path} line {number}: a {type(found).__name__}, not an object with a text")
            yield f"{path} line {number}", found


def _parquet_rows(path: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open_bytes(path) as file:
        try:
            number = 0
            for batch in pq.ParquetFile(file).iter_batches(1000):
                for columns in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", columns
        except pa.ArrowInvalid as e:
            raise ConfigError(f"cannot read {path}: {str(e).splitlines()[0]}") from e


def _text(path: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(open_bytes(path), "utf-8-sig", newline="")
