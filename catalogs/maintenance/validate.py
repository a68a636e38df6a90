"""`datakit catalog validate`: does a catalog hold what its schema and its protocol promise?"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import polars as pl

from catalogs.query.funnel import funnel
from catalogs.records.tombstones import SPAN, Forgotten
from catalogs.tables import schema
from catalogs.tables.catalog import Catalog
from catalogs.tables.integrity import damaged, require_whole
from datakit.errors import CatalogError
from datakit.identity import clip_id


def problems(catalog: Catalog, sources: bool = True) -> Iterator[str]:
    """Everything that is wrong, one line each.

    Args:
        sources: also look whether local source files are where they were, unchanged in size.
    """
    broken = False
    for line in _damage(catalog):  # first: what follows could not be read
        broken = True
        yield line
    if broken:
        return
    for name in schema.TABLES:
        for line in schema.missing_columns(name, [field.name for field in catalog.table(name).schema().fields]):
            broken = True
            yield line
    if broken:
        return
    try:
        funnel(catalog)
    except CatalogError as e:
        yield str(e)
    yield from _identities(catalog)
    yield from _overlaps(catalog)
    yield from _doubles(catalog)
    yield from _files(catalog)
    yield from _forgotten(catalog)
    if sources:
        yield from _sources(catalog)


def _damage(catalog: Catalog) -> Iterator[str]:
    """Files that are missing or torn; versions that were recorded and that the tables do not have."""
    newest = dict.fromkeys(schema.TABLES)
    found = damaged(catalog, newest)
    yield from (f"{d.path} is {d.what}" for d in found)
    if found:
        try:
            require_whole(catalog, newest)
        except CatalogError as e:
            yield str(e).partition(": ")[2]
        return
    recorded: dict[str, int] = {}
    for table, column in (("runs", "snapshot"), ("tags", "versions")):
        for text in catalog.scan(table).select(column).drop_nulls().collect()[column]:
            for name, version in json.loads(text).items():
                recorded[name] = max(version, recorded.get(name, 0))
    for name, version in recorded.items():
        if version > (found_now := catalog.table(name).version()):
            yield (
                f"{name} had version {version} once, its newest is {found_now}: the newest entries of "
                f"{name}/_delta_log are missing"
            )


def _identities(catalog: Catalog) -> Iterator[str]:
    clips = catalog.finished_clips().select("clip_id", "video_id", "stream", "start_pts", "end_pts", "shard").collect()
    twice = clips.filter(pl.col("clip_id").is_duplicated())
    if twice.height:
        yield f"{twice['clip_id'].n_unique()} clip_id occur more than once; first {twice['clip_id'][0]}"
    wrong = [c for c, v, s, a, b, _ in clips.iter_rows() if clip_id(v, s, a, b) != c]
    if wrong:
        yield f"{len(wrong)} clips have an id that is not the hash of their span; first {wrong[0]}"
    misplaced = clips.filter(pl.col("shard") != pl.col("video_id").str.slice(0, catalog.shard_digits))
    if misplaced.height:
        yield f"{misplaced.height} clips lie in another shard than their video's"
    videos = catalog.scan("videos").select("video_id").collect()
    if videos["video_id"].is_duplicated().any():
        yield "a video_id occurs more than once in videos"


def _overlaps(catalog: Catalog) -> Iterator[str]:
    clips = (
        catalog.finished_clips()
        .select("clip_id", "video_id", "stream", "start_pts", "end_pts")
        .sort("video_id", "stream", "start_pts")
    )
    before = pl.col("end_pts").shift(1).over("video_id", "stream")
    overlapping = clips.filter((pl.col("start_pts") < before) | (pl.col("end_pts") <= pl.col("start_pts"))).collect()
    if overlapping.height:
        yield f"{overlapping.height} clips overlap the one before or are empty; first {overlapping['clip_id'][0]}"


def _doubles(catalog: Catalog) -> Iterator[str]:
    """One caption per clip, style and model; one embedding per clip and model; one latent per window and autoencoder;
    choices that exist."""
    encoded = catalog.scan("latents").filter(pl.col("error_kind").is_null())
    keys = {
        "captions": (catalog.captions(), ["clip_id", "style", "model"]),
        "embeddings": (catalog.embeddings(), ["clip_id", "model"]),
        "latents": (encoded, ["clip_id", "geometry", "autoencoder"]),
    }
    for table, (rows, key) in keys.items():
        doubles = rows.select(key).filter(pl.struct(key).is_duplicated()).collect()
        if doubles.height:
            yield (
                f"{table}: {doubles.unique().height} {', '.join(key)} occur more than once; first of clip "
                f"{doubles['clip_id'][0]}"
            )
    chosen = catalog.scan("decisions").filter(pl.col("caption_id").is_not_null())
    lost = chosen.join(catalog.scan("captions"), on="caption_id", how="anti").collect()
    if lost.height:
        yield f"{lost.height} clips have chosen a caption that is not there (`datakit run decide` chooses anew)"


def _files(catalog: Catalog) -> Iterator[str]:
    if not catalog.is_local:
        return
    paths = catalog.finished_clips().filter(pl.col("path").is_not_null()).select("clip_id", "path").collect()
    missing = [c for c, path in paths.iter_rows() if not os.path.isfile(os.path.join(catalog.root, path))]
    if missing:
        yield f"{len(missing)} clip files are missing; first that of clip {missing[0]}"


def _forgotten(catalog: Catalog) -> Iterator[str]:
    """What was forgotten is gone; not yet, where a forget was killed or others wrote meanwhile."""
    forgotten = Forgotten.read(catalog)
    if forgotten.rows.is_empty():
        return
    for table, what in (("clips", "clips"), ("latents", "latents of clips")):
        back = forgotten.covers(catalog.scan(table).select(SPAN).collect()).sum()
        if back:
            yield (
                f"{back} rows of {what} that were forgotten are there (`datakit catalog forget {catalog.root}` "
                f"removes them)"
            )


def _sources(catalog: Catalog) -> Iterator[str]:
    videos = catalog.scan("videos").filter(pl.col("status") == "ok").select("video_id", "uris").collect()
    for video_id, uris in videos.iter_rows():
        local = [u for u in uris if "://" not in u["uri"]]
        if len(local) < len(uris) or any(_unchanged(u) for u in local):
            continue
        yield (
            f"video {video_id} is not at {local[0]['uri'] if local else 'any address'} any more (`datakit catalog "
            f"relink OLD NEW`)"
        )


def _unchanged(address: dict) -> bool:
    try:
        return os.stat(address["uri"]).st_size == address["size"]
    except OSError:
        return False
