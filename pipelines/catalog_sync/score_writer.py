"""Writing results into the catalog: columns of `clips`, merged shard by shard, and rows of `embeddings`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import polars as pl

from catalogs.tables.arrow_types import full_rows, polars_schema
from catalogs.tables.catalog import Catalog
from pipelines.executor.flow import Outcome

NO_FRAMES = {"vector": None, "norm": None, "frames": 0}
KEY = ("clip_id", "run_id", "shard")


def scored_rows(outcome: Outcome, clips: list[dict], columns: Sequence[str]) -> list[dict]:
    """What came back of some clips of a video, as rows for `write_columns`."""
    by_id = {row["clip_id"]: row for row in outcome.rows}
    rows = []
    for clip in clips:
        row = by_id[clip["clip_id"]]
        values = {name: row.get(name) for name in columns}
        rows.append({**{name: clip[name] for name in KEY}, "errors": row["errors"], **values})
    return rows


def failed_rows(outcome: Outcome, clips: list[dict], stage: str) -> list[dict]:
    """A video that could not be processed is an error on each of its clips: rows for `write_errors`."""
    assert outcome.failure is not None, "of an outcome that failed"
    errors = [{"stage": stage, "kind": str(outcome.failure.kind), "message": outcome.failure.message}]
    return [{**{name: clip[name] for name in KEY}, "errors": errors} for clip in clips]


def write_errors(catalog: Catalog, rows: list[dict], stages: Sequence[str]) -> None:
    """Merge errors of these stages into `clips`. What the clips' columns held before stays, and the stages
    count as not done: the next run tries again."""
    write_columns(catalog, rows, dict.fromkeys(stages))


def write_columns(catalog: Catalog, rows: list[dict], fingerprints: Mapping[str, str | None]) -> None:
    """Merge filled columns into `clips`, shard by shard.

    Other writers may fill other columns of the same clips meanwhile: the lists of stage versions and of
    errors are made anew from the version that is merged into.

    Args:
        rows: clip_id, run_id, shard, errors (of these stages only) and the filled columns. A row that has a
            `mark` takes that as the fingerprint of its (single) stage.
        fingerprints: stage -> fingerprint, of the stages that filled them; None: not done.
    """
    if not rows:
        return
    types = {name: kind for name, kind in polars_schema("clips").items() if name in rows[0]}
    source = pl.DataFrame(rows, schema={**types, **({"mark": pl.String} if "mark" in rows[0] else {})})
    catalog.upsert("clips", source, only="update", revise=partial(_with_lists, fingerprints))


def embedding_rows(rows: list[dict], model: str, weights_hash: str, mark: str) -> list[dict]:
    """Rows of `embeddings` from clip rows with an `embedding`, which is taken out of them. A clip without a frame
    has a row without a vector; one on which the stage failed has none."""
    made = []
    for row in rows:
        if "embedding" not in row:
            continue
        embedding = row.pop("embedding") or NO_FRAMES
        if not any(error["stage"] == "embed" for error in row["errors"]):
            made.append(
                {
                    "clip_id": row["clip_id"],
                    "video_id": row["video_id"],
                    "shard": row["shard"],
                    "run_id": row["run_id"],
                    "model": model,
                    "weights_hash": weights_hash,
                    "fingerprint": mark,
                    **embedding,
                }
            )
    return made


def write_embeddings(catalog: Catalog, rows: list[dict]) -> None:
    """Merge rows into `embeddings`, one per clip and model."""
    catalog.upsert("embeddings", full_rows("embeddings", rows))


def _with_lists(fingerprints: Mapping[str, str | None], rows: pl.DataFrame, table: pl.LazyFrame) -> pl.DataFrame:
    """The rows with their new lists of stage versions and errors, made from those in the table."""
    old = table.select("clip_id", "run_id", "stage_versions", "errors").collect()
    joined = rows.rename({"errors": "new_errors"}).join(old, on=["clip_id", "run_id"])
    marks = joined["mark"].to_list() if "mark" in joined.columns else [None] * joined.height
    versions = [
        _merged(v or [], fingerprints if mark is None else dict.fromkeys(fingerprints, mark))
        for v, mark in zip(joined["stage_versions"].to_list(), marks)
    ]
    errors = [
        [e for e in before or [] if e["stage"] not in fingerprints and e not in new] + new
        for before, new in zip(joined["errors"].to_list(), (e or [] for e in joined["new_errors"].to_list()))
    ]
    types = polars_schema("clips")
    return joined.drop("new_errors", "mark", strict=False).with_columns(
        pl.Series("stage_versions", versions, dtype=types["stage_versions"]),
        pl.Series("errors", errors, dtype=types["errors"]),
    )


def _merged(versions: list[dict], fingerprints: Mapping[str, str | None]) -> list[dict]:
    """The list of stage versions with these stages', where they are done."""
    if None in fingerprints.values():
        return versions
    kept = [v for v in versions if v["stage"] not in fingerprints]
    return kept + [{"stage": name, "fingerprint": mark} for name, mark in fingerprints.items()]
