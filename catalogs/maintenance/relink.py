"""`datakit catalog relink OLD NEW`: sources were moved; their identity is their content, so nothing else changes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import polars as pl

from catalogs.tables.arrow_types import polars_schema
from catalogs.tables.catalog import Catalog
from datakit.errors import CatalogError
from datakit.identity import video_id
from datakit.video.uri import is_remote, open_bytes


@dataclass(frozen=True)
class Relinked:
    """Addresses that were moved, and those that were not, with the reason."""

    moved: int
    failed: list[str]


def relink(catalog: Catalog, old: str, new: str) -> Relinked:
    """Replace the prefix `old` of source addresses by `new`, where the same content is found there.

    Raises:
        CatalogError: no source has an address below `old`.
    """
    old, new = (prefix if is_remote(prefix) else os.path.abspath(prefix) for prefix in (old, new))
    videos = catalog.scan("videos").select("video_id", "uris").collect()
    fresh: dict[str, dict[str, Any]] = {}
    failed: list[str] = []
    for identity, uris in videos.iter_rows():
        for address in uris:
            target = _moved(address["uri"], old, new)
            if target is None:
                continue
            found, problem = _look(target, identity)
            if found is None:
                failed.append(f"{target}: {problem}")
            else:
                fresh.setdefault(identity, {})[address["uri"]] = found
    if not fresh and not failed:
        raise CatalogError(f"no source lies below {old}")
    if fresh:
        _write(catalog, fresh)
    return Relinked(sum(map(len, fresh.values())), failed)


def _moved(uri: str, old: str, new: str) -> str | None:
    if uri == old:
        return new
    base = old if old.endswith("/") else old + "/"
    return os.path.join(new, uri[len(base) :]) if uri.startswith(base) else None


def _look(uri: str, expected: str) -> tuple[dict | None, str]:
    try:
        with open_bytes(uri) as file:
            size = file.seek(0, os.SEEK_END)
            found = video_id(file, size)
    except Exception as e:  # each object store has its own exceptions
        return None, f"cannot be read: {e}"
    if found != expected:
        return None, "holds other content"
    etag = "" if is_remote(uri) else f"mtime-{os.stat(uri).st_mtime_ns}"
    return {"uri": uri, "size": size, "etag": etag}, ""


def _write(catalog: Catalog, fresh: dict[str, dict[str, Any]]) -> None:
    def with_addresses(rows: pl.DataFrame, table: pl.LazyFrame) -> pl.DataFrame:
        now = table.join(rows.lazy(), on="video_id", how="semi").select("video_id", "uris").collect()
        moved = [
            [by_uri[uri] for uri in sorted(by_uri)]
            for v, uris in now.iter_rows()
            for by_uri in [{a["uri"]: a for a in (fresh[v].get(u["uri"], u) for u in uris)}]
        ]
        return now.with_columns(pl.Series("uris", moved, polars_schema("videos")["uris"]))

    catalog.upsert("videos", pl.DataFrame({"video_id": list(fresh)}), only="update", revise=with_addresses)
