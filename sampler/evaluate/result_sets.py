"""The samples of result catalogs, by the checkpoint that made them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import polars as pl

from catalogs.tables.catalog import Catalog
from datakit.errors import CatalogError
from datakit.video.uri import local_path

KEY = ("prompt", "seed", "number", "references")
"""What samples of different checkpoints must share to be compared with each other."""
FACTS = ("uri", "stream", "start_pts", "end_pts")
"""Columns of the view that say where a sample's pixels are; its size, `num_frames` and `fps` are those of the file,
too."""
SIZE = ("width", "height", "num_frames", "fps")
NAMED = 12
"""Hex digits of a checkpoint's hash that stand for a name."""


@dataclass(frozen=True)
class SampleSet:
    """Finished samples of one checkpoint in one result catalog.

    Attributes:
        label: short name of the checkpoint, another for each set.
        rows: by prompt, seed, number: columns of the table `samples`, and `FACTS` and `SIZE` of their clips (null: the
            file is in a form that no stage reads).
    """

    root: str
    label: str
    checkpoint: str
    checkpoint_hash: str
    rows: pl.DataFrame

    @property
    def videos(self) -> pl.DataFrame:
        """The rows that stages can look at."""
        return self.rows.filter(pl.col("uri").is_not_null())


def read_sets(roots: Sequence[str]) -> list[SampleSet]:
    """The samples of several result catalogs.

    Raises:
        CatalogError: no catalog there, or one without a finished sample (how many there are in other states is said).
    """
    found = [
        each
        for root in dict.fromkeys(os.path.abspath(r) if "://" not in r else r for r in roots)
        for each in _of_catalog(root)
    ]
    labels = _labels(found)
    return [SampleSet(s.root, label, s.checkpoint, s.checkpoint_hash, s.rows) for s, label in zip(found, labels)]


def key_of(row: dict) -> tuple:
    """What identifies a sample whatever its checkpoint: its `KEY`, as a tuple that can be a key."""
    return tuple(tuple(row[name] or ()) if name == "references" else row[name] for name in KEY)


def file_of(root: str, row: dict) -> str:
    """Address of a sample's file."""
    return f"{root}/{row['path']}" if row["path"] else local_path(row["uri"] or "")


def _of_catalog(root: str) -> Iterator[SampleSet]:
    catalog = Catalog(root)
    with catalog.reading():
        every = catalog.scan("samples").collect().unique("sample_id", keep="last", maintain_order=True)
        rows = every.filter(pl.col("status") == "done")
        if rows.is_empty():
            states = ", ".join(f"{n} {state}" for state, n in every.group_by("status").len().sort("status").iter_rows())
            raise CatalogError(
                f"{root} has no finished samples ({states or 'nor any others'}): `datakit sample` makes them"
            )
        known = pl.col("clip_id").is_in(rows["clip_id"].drop_nulls().to_list())
        clips = catalog.clips(columns=["clip_id", *FACTS, *SIZE]).filter(known).collect()
    order = ("checkpoint", "checkpoint_hash", "prompt", "seed", "number", "sample_id")
    joined = rows.drop(SIZE).join(clips, on="clip_id", how="left").sort(order, nulls_last=True)
    for (name, content), part in joined.group_by("checkpoint", "checkpoint_hash", maintain_order=True):
        yield SampleSet(root, "", name or "", content or "", part)


def _labels(sets: Sequence[SampleSet]) -> list[str]:
    """The shortest ends of the checkpoints' paths that tell them apart; with the folder of the samples where they are
    the same."""
    names = [(s.checkpoint or s.checkpoint_hash[:NAMED] or "samples").rstrip("/") for s in sets]
    deepest = max((name.count("/") + 1 for name in names), default=1)
    for parts in range(1, deepest + 1):
        short = ["/".join(name.split("/")[-parts:]) for name in names]
        if _distinct(short):
            return short
    short = [f"{name.split('/')[-1]} ({s.root.rstrip('/').split('/')[-1]})" for name, s in zip(names, sets)]
    return short if _distinct(short) else [f"{name} #{i + 1}" for i, name in enumerate(short)]


def _distinct(names: Iterable[str]) -> bool:
    names = list(names)
    return len(set(names)) == len(names)
