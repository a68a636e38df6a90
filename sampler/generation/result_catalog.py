"""The result catalog: a sample's row in `samples` from the moment it is asked for, its video in `videos` and `clips`
once it is there.

The files are the truth: a row is behind them at most by what a killed run did after its last commit, and the next run
catches up.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from catalogs.records.video_registry import Video, VideoRegistry
from catalogs.tables.arrow_types import polars_schema
from catalogs.tables.catalog import Catalog
from catalogs.tables.upsert import Only
from datakit.errors import CatalogError, ConfigError
from datakit.process.messages import Failed
from pipelines.recipes.decide import decide
from pipelines.recipes.recipe import load_recipe
from sampler.generation.model_source import Checkpoint
from sampler.generation.passes import Denoised, Encoded, Written
from sampler.generation.sample_spec import Sample
from sampler.settings import SampleSettings

STYLE = MODEL = "prompt"
"""Of captions that are the prompts which the videos were made from."""
RECIPE = "samples"


class Results:
    """A folder of samples.

    Raises:
        ConfigError: an address in an object store (files are written here), or a folder that is neither empty nor a
            catalog.
    """

    def __init__(self, folder: str | Path):
        if "://" in str(folder):
            raise ConfigError(f"--out {folder}: a folder of this machine or of a shared file system is needed")
        self.folder = Path(os.path.abspath(folder))
        if self.folder.exists() and any(self.folder.iterdir()) and not (self.folder / "videos" / "_delta_log").exists():
            raise ConfigError(f"{self.folder} is neither empty nor a folder of samples: give another --out")

    def open(self) -> Catalog:
        """The catalog, made if there is none."""
        self.catalog = Catalog.create(self.folder)
        return self.catalog

    def known(self) -> dict[str, dict[str, Any]]:
        """Rows by sample_id, of an earlier run; {} without any."""
        try:
            catalog = Catalog(self.folder)
        except CatalogError:
            if (self.folder / "videos" / "_delta_log").exists():
                raise
            return {}
        columns = ("sample_id", "status", "path", "refined", "motion", "name")
        rows = catalog.scan("samples").select(columns).collect().to_dicts()
        return {row["sample_id"]: row for row in rows}

    def is_done(self, row: dict[str, Any] | None) -> bool:
        """Whether its file is there; one that was deleted is made again."""
        return row is not None and row["status"] == "done" and (self.folder / (row["path"] or "")).exists()

    def enter(self, samples: Sequence[Sample], settings: SampleSettings, checkpoint: Checkpoint, run_id: str) -> None:
        """Rows of samples that are asked for; those that are there (failed, or not finished) are asked for again."""
        rows = [_row(sample, settings, checkpoint, run_id) for sample in samples]
        if rows:
            self._merge(rows)

    def passed(self, status: str, answers: Sequence[tuple[Sample, Encoded | Denoised | Failed]]) -> None:
        """Commit what became of samples in a pass that leaves nothing to look at."""
        rows = []
        for sample, answer in answers:
            if isinstance(answer, Failed):
                rows.append(_failure(sample, answer))
            elif isinstance(answer, Denoised):
                rows.append(
                    {
                        "sample_id": sample.sample_id,
                        "status": status,
                        "denoise_s": answer.seconds,
                        "forwards": answer.forwards,
                    }
                )
            else:
                rows.append({"sample_id": sample.sample_id, "status": status, "encode_s": answer.seconds})
        self._merge(rows, only="update")

    def written(self, answers: Sequence[tuple[Sample, Written | Failed]], run_id: str) -> None:
        """Commit finished files: `videos`, `clips` and `captions` first, then the samples' rows."""
        self._enter_videos(
            [(sample, answer) for sample, answer in answers if isinstance(answer, Written) and answer.clip], run_id
        )
        rows = []
        for sample, answer in answers:
            if isinstance(answer, Failed):
                rows.append(_failure(sample, answer))
                continue
            rows.append(
                {
                    "sample_id": sample.sample_id,
                    "status": "done",
                    "path": answer.path,
                    "decode_s": answer.seconds,
                    "video_id": answer.video["video_id"] if answer.video else None,
                    "clip_id": answer.clip["clip_id"] if answer.clip else None,
                    "finished_at": datetime.now(UTC),
                    "error_kind": None,
                    "error": None,
                }
            )
        self._merge(rows, only="update")

    def decide(self) -> None:
        """Give every clip a status, and its prompt as the caption."""
        decide(self.catalog, load_recipe(RECIPE))

    def _enter_videos(self, answers: Sequence[tuple[Sample, Written]], run_id: str) -> None:
        registry, entries = VideoRegistry(self.catalog, run_id), {}
        for sample, answer in answers:
            assert answer.video is not None and answer.clip is not None
            columns = dict(answer.video)
            video, source = columns.pop("video_id"), columns.pop("source")
            caption = {
                "text": sample.prompt,
                "style": STYLE,
                "model": MODEL,
                "flags": [],
                "shard": self.catalog.shard_of(video),
            }
            if video in entries:  # two samples of the same content
                entries[video].sources.append(source)
            else:
                entries[video] = Video(
                    video, [source], columns, clips=[answer.clip], captions={answer.clip["clip_id"]: caption}
                )
        there = {video for video, state in registry.states(entries).items() if state.status == "ok"}
        registry.enter([entry for video, entry in entries.items() if video not in there])
        registry.note([entry for video, entry in entries.items() if video in there])

    def _merge(self, rows: list[dict[str, Any]], only: Only | None = None) -> None:
        """Rows of the same columns are merged together."""
        groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for row in rows:
            groups.setdefault(tuple(sorted(row)), []).append(row)
        for group in groups.values():
            self.catalog.upsert("samples", group, only=only)


def _row(sample: Sample, settings: SampleSettings, checkpoint: Checkpoint, run_id: str) -> dict[str, Any]:
    sampling = settings.sampling
    options = settings.model_dump(mode="json", include={"sampling", "model", "image", "output", "prompt"})
    options |= {"work": settings.work.model_dump(mode="json", include={"precision", "fp8"})}
    row = {name: None for name in polars_schema("samples")}
    return row | {
        "sample_id": sample.sample_id,
        "status": "queued",
        "name": sample.name,
        "prompt": sample.prompt,
        "refined": sample.refined,
        "text": sample.text,
        "negative": sample.negative,
        "motion": sample.told_motion,
        "mode": sample.mode,
        "references": [reference.uri for reference in sample.references],
        "source_clip": sample.source_clip,
        "seed": sample.seed,
        "number": sample.number,
        "num_frames": sample.frames,
        "height": sample.height,
        "width": sample.width,
        "fps": sample.fps,
        "steps": sampling.steps,
        "guidance": sampling.guidance,
        "image_guidance": sampling.image_guidance,
        "options": json.dumps(options, sort_keys=True),
        "checkpoint": checkpoint.name,
        "checkpoint_hash": checkpoint.hash,
        "run_id": run_id,
        "created_at": datetime.now(UTC),
    }


def _failure(sample: Sample, failure: Failed) -> dict[str, Any]:
    return {
        "sample_id": sample.sample_id,
        "status": "failed",
        "error_kind": str(failure.kind),
        "error": failure.message[:500],
    }
