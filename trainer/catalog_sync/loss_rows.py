"""What a training run learned about clips in a range of steps, as a file of a checkpoint."""

from __future__ import annotations

import io
from pathlib import Path

import polars as pl

from catalogs.records.losses import LEARNED
from datakit.errors import ConfigError

FILE = "losses.arrow"


def as_bytes(rows: pl.DataFrame) -> bytes:
    """An Arrow file."""
    file = io.BytesIO()
    rows.write_ipc(file, compression="zstd")
    return file.getvalue()


def read_rows(path: Path) -> pl.DataFrame:
    """Raises:
    ConfigError: not there, or damaged.
    """
    try:
        return pl.read_ipc(path.read_bytes()).select(list(LEARNED))
    except (OSError, pl.exceptions.PolarsError) as e:
        raise ConfigError(
            f"the checkpoint's {path} is missing or damaged: resume from another checkpoint, or with write_back=false"
        ) from e


def no_rows() -> pl.DataFrame:
    return pl.DataFrame(schema=LEARNED)
