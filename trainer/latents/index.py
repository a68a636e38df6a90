"""Which windows of a plan are encoded, and where their latents lie: the index that loaders read
(`trainer.data.latent_reader`).

Reads the table `latents` of the plan's catalogs, so it is for the main process, before workers start.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa

from catalogs.records.latents import TABLE, paths, windows_of
from catalogs.tables.catalog import Catalog
from datakit.atomic import atomic_path
from datakit.errors import ConfigError
from trainer.data.latent_reader import INDEX
from trainer.data.sample_reader import PASSING, Broken
from trainer.planning.plan import Plan

FILES_AT_ONCE = 16
"""Whose keys are read: in object stores that is waiting."""
KEYS = ("geometry", "error_kind", "error")


@dataclass(frozen=True)
class Located:
    """Windows of a plan that are encoded, and those that are not.

    Attributes:
        index: the file for loaders: `Loader(…, latents=index)`.
        found: windows that it has.
        missing: windows that were never encoded (or could not be read, for a reason that may pass).
        broken: windows that were found broken when they were to be encoded; `SampleReader` puts others in their place.
        versions: catalog -> version of its table `latents` whose files the index names. A run that records it
            (`TrainingRecord.reads_latents`) keeps them from vacuum.
    """

    index: Path
    found: int
    missing: int
    broken: tuple[Broken, ...]
    versions: dict[str, int]


def locate(plan: Plan, autoencoder: str, out: Path) -> Located:
    """Find the latents of a plan's windows and write the index.

    A window that has several rows (no run of ours makes them) gets the first by file and place.

    Args:
        autoencoder: its hash.
        out: of the index; replaced if it is there.

    Raises:
        ConfigError: clips of windows without a latent have latents of another geometry or by another autoencoder: the
            plan or the weights changed since they were encoded.
        CatalogError: a catalog is gone or damaged.
    """
    windows = pl.from_arrow(plan.windows.select(["part", "clip_id", "geometry"]))
    assert isinstance(windows, pl.DataFrame)
    windows = windows.with_row_index("window")
    found: list[pl.DataFrame] = []
    addresses: list[str] = []
    versions: dict[str, int] = {}
    for root in dict.fromkeys(part.catalog for part in plan.parts):
        catalog = Catalog(root)
        versions[root] = catalog.table(TABLE).version()
        parts = [i for i, part in enumerate(plan.parts) if part.catalog == root]
        there = _rows(catalog, versions[root], autoencoder, addresses)
        own = windows.filter(pl.col("part").is_in(parts)).join(there, on="geometry", how="left")
        _refuse_stale(plan, catalog, versions[root], autoencoder, own.filter(_missing()))
        found.append(own)
    rows = pl.concat(found).sort("window")
    encoded = rows.filter(pl.col("row").is_not_null() & pl.col("error_kind").is_null())
    _write(encoded, addresses, out)
    broken = rows.filter(pl.col("error_kind").is_not_null() & ~_missing())
    return Located(
        out,
        encoded.height,
        rows.filter(_missing()).height,
        tuple(Broken(*row) for row in broken.select("window", "error_kind", "error").iter_rows()),
        versions,
    )


def _missing() -> pl.Expr:
    """Nothing is known of the window, or nothing that will stay so."""
    return pl.col("row").is_null() | pl.col("error_kind").is_in([str(kind) for kind in PASSING]).fill_null(False)


def _rows(catalog: Catalog, version: int, autoencoder: str, addresses: list[str]) -> pl.DataFrame:
    """One row for every geometry there is: `KEYS`, `row_group`, `row` and the number of the `file` in `addresses`,
    which its address is added to; an error only where there is nothing else."""
    root = os.path.abspath(catalog.root) if catalog.is_local else catalog.root
    files = [f"{root}/{TABLE}/{path}" for path in paths(catalog.table(TABLE, version), autoencoder)]
    types = {**dict.fromkeys(KEYS, pl.String), "row_group": pl.Int32, "row": pl.Int32}
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        frames = list(pool.map(lambda address: windows_of(address, KEYS).cast(types), files))
    numbered = [frame.with_columns(file=pl.lit(len(addresses) + i, pl.Int32)) for i, frame in enumerate(frames)]
    addresses += files
    rows = pl.concat([pl.DataFrame(schema={**types, "file": pl.Int32}), *numbered])
    return rows.sort(pl.col("error_kind").is_not_null(), maintain_order=True).unique(
        "geometry", keep="first", maintain_order=True
    )


def _refuse_stale(plan: Plan, catalog: Catalog, version: int, autoencoder: str, missing: pl.DataFrame) -> None:
    if missing.is_empty():
        return
    wanted = pl.from_arrow(plan.windows.select(["geometry"]))
    assert isinstance(wanted, pl.DataFrame)
    columns = ("clip_id", "autoencoder", "geometry", "bucket", "first")
    there = catalog.scan(TABLE, version).filter(pl.col("error_kind").is_null()).select(columns)
    with catalog.reading():
        there = there.join(missing.select("clip_id").unique().lazy(), on="clip_id", how="semi").collect()
    same = pl.col("autoencoder") == autoencoder
    other = there.filter(~same | ~pl.col("geometry").is_in(wanted["geometry"].implode()))
    if other.is_empty():
        return
    stale = missing.filter(pl.col("clip_id").is_in(other["clip_id"].implode()))
    row = other.sort(same, "clip_id", descending=[True, False]).row(0, named=True)
    window = plan.rows([stale.filter(pl.col("clip_id") == row["clip_id"])["window"][0]])[0]
    if row["autoencoder"] != autoencoder:
        why = f"it was encoded by autoencoder {row['autoencoder']}, not by {autoencoder}"
    else:
        bucket = plan.buckets[window["bucket"]].name
        why = (
            f"it was encoded as {row['bucket']} from frame {row['first']} (geometry {row['geometry']}), the plan has "
            f"{bucket} from "
            f"frame {window['first']} (geometry {window['geometry']})"
        )
    raise ConfigError(
        f"the latents of {stale.height} of the plan's {plan.windows.num_rows} windows are stale, for example of clip "
        f"{window['clip_id']} "
        f"({window['path'] or window['uri']}): {why}; `datakit run encode --plan {plan.folder}` encodes what is missing"
    )


def _write(rows: pl.DataFrame, addresses: list[str], out: Path) -> None:
    """Whole or not at all. Every address stands in it once."""
    numbers = {name: pa.array(rows[name].to_numpy(), pa.int32()) for name in ("window", "file", "row_group", "row")}
    files = pa.DictionaryArray.from_arrays(numbers["file"], pa.array(addresses, pa.string()))
    table = pa.table({**numbers, "file": files}).select(INDEX.names)
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        atomic_path(out) as path,
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table)
