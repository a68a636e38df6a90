"""An export under way: its rows, the files of its clips, and where things lie until it is finished."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from catalogs.interop.media.clip_files import COLUMNS, Failed, File, clip_files, with_sources
from catalogs.query.selection import Selection
from catalogs.tables.view import FROM_CAPTIONS
from datakit.atomic import beside, put, remove, sweep
from datakit.errors import CatalogError, ConfigError
from datakit.video.uri import is_remote

MEDIA = ("none", "link", "cut", "copy")
"""Values of `--media`."""
SUMMARY = "datakit_export.json"
CLIPS = "clips"
"""Folder of clip files, in the folder of the export, or behind its name with a dash."""


@dataclass(frozen=True)
class Request:
    """The arguments of `catalogs.interop.export`."""

    root: str
    out: str
    form: str
    where: str | None
    snapshot: str | None
    columns: Sequence[str] | None
    media: str | None
    style: str | None
    overwrite: bool
    shard_size: str
    workers: int | None
    on_progress: Callable[[int, int], None]


class Place:
    """Where an export is written, and where it belongs. As a context manager: what was not published is gone after it.

    Args:
        suffix: of the form's file.
        name: of that file, where `out` is a folder.
    """

    def __init__(self, out: str, suffix: str, name: str, overwrite: bool):
        if is_remote(out):
            raise ConfigError(f"--out {out}: give a local folder, and copy it from there")
        self.out = Path(os.path.abspath(out))
        self.is_file = bool(suffix) and self.out.suffix == suffix
        stem = self.out.with_name(self.out.name.removesuffix(suffix) + "-") if self.is_file else None
        self.final_clips = Path(f"{stem}{CLIPS}") if stem else self.out / CLIPS
        self.final_summary = Path(f"{self.out}.{SUMMARY}") if stem else self.out / SUMMARY
        self._file_name = name
        self._overwrite = overwrite
        taken = [
            path
            for path in ([self.out, self.final_clips, self.final_summary] if stem else [self.out])
            if os.path.lexists(path)
        ]
        if taken and not overwrite:
            raise ConfigError(f"{taken[0]} exists: choose another --out, or --overwrite")
        if self.out.is_dir() and not self.final_summary.exists():
            raise ConfigError(f"{self.out} is a folder that no export made: --overwrite does not remove it")

    def __enter__(self) -> Place:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        for target in (self.out, self.final_clips, self.final_summary):
            sweep(target)
        self.folder = beside(self.out)
        self.folder.mkdir()
        self.file = self.folder / self._file_name
        self.clips = self.folder / CLIPS
        self.summary = self.folder / SUMMARY
        return self

    def __exit__(self, *exc) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def final(self, path: str) -> str:
        """Where a file that lies below `clips` will be."""
        return str(self.final_clips / Path(path).relative_to(self.clips))

    def publish(self) -> None:
        """Put everything where it belongs, the thing that was asked for last."""
        if not self.is_file:
            put(self.folder, self.out)
            return
        if self.clips.exists():
            put(self.clips, self.final_clips)
        else:
            remove(self.final_clips)
        put(self.summary, self.final_summary)
        put(self.file, self.out)


@dataclass
class Job:
    """What a form's writer works with.

    Attributes:
        total: clips of the selection.
        failed: clips that could not be written; grows.
        made: clip files that were written.
        notes: more for the summary.
    """

    request: Request
    selection: Selection
    place: Place
    media: str
    total: int
    failed: list[Failed] = field(default_factory=list)
    made: int = 0
    notes: dict = field(default_factory=dict)

    def rows(self, columns: Sequence[str]) -> pl.LazyFrame:
        """Columns of the view, in order of video and start; captions of the style that is asked for."""
        columns = list(dict.fromkeys(columns))
        order = ["video_id", "start_pts"]
        texts = [name for name in columns if name in FROM_CAPTIONS] if self.request.style else []
        rows = self.selection.rows(list(dict.fromkeys([*(c for c in columns if c not in texts), "clip_id", *order])))
        if texts:
            rows = rows.join(self._captions().select("clip_id", *texts), on="clip_id", how="left")
        return rows.sort(order).select(columns)

    def rows_with_media(self, columns: Sequence[str]) -> pl.DataFrame:
        """See `rows`, with all that finding their files takes."""
        rows = with_sources(
            self.rows([*columns, *COLUMNS, "start_pts"]), self.selection.catalog, self.selection.versions
        )
        with self.selection.catalog.reading():
            return rows.sort("video_id", "start_pts").collect()

    def files(self, rows: pl.DataFrame, stem: Callable[[int], str]) -> Iterator[tuple[int, File]]:
        """Row numbers and files, in order; clips without any are noted as failed."""
        for number, file in clip_files(rows, self.selection.catalog.root, self.media, stem, self.request.workers):
            if isinstance(file, File):
                self.made += file.made
                yield number, file
            else:
                self.failed.append(file)
            self.request.on_progress(number + 1, self.total)

    def with_files(self, rows: pl.DataFrame, stem: Callable[[int], str]) -> pl.DataFrame:
        """The rows that have a file, with `file` (where it is now) and `made`; `num_frames`, `width`, `height`,
        `aspect_ratio` and `resolution` are the file's."""
        found = list(self.files(rows, stem))
        files = pl.DataFrame(
            {
                "file": [f.path for _, f in found],
                "made": [f.made for _, f in found],
                "num_frames": [f.frames for _, f in found],
                "width": [f.width for _, f in found],
                "height": [f.height for _, f in found],
            },
            schema={
                "file": pl.String,
                "made": pl.Boolean,
                "num_frames": pl.Int64,
                "width": pl.Int32,
                "height": pl.Int32,
            },
        )
        files = files.with_columns(
            aspect_ratio=pl.col("height") / pl.col("width"),
            resolution=pl.col("height").cast(pl.Int64) * pl.col("width"),
        )
        kept = rows[[number for number, _ in found]]
        return kept.drop(files.columns, strict=False).hstack(files)

    def stem(self, rows: pl.DataFrame, folder: Path | None = None) -> Callable[[int], str]:
        """Paths of files to be made: two hex digits make 256 sub-folders."""
        ids = rows["clip_id"]
        return lambda number: f"{folder or self.place.clips}/{ids[number][:2]}/{ids[number]}"

    def _captions(self) -> pl.LazyFrame:
        """The newest usable caption of the style, by clip."""
        catalog, style = self.selection.catalog, self.request.style
        written = catalog.captions(self.selection.versions).filter(pl.col("text").is_not_null())
        styles = sorted(written.select(pl.col("style").unique()).collect()["style"])
        if style not in styles:
            raise CatalogError(f"no captions of style {style!r}: the catalog has {', '.join(styles) or 'none at all'}")
        newest = (
            written.filter(pl.col("style") == style)
            .sort("created_at", "caption_id", descending=True)
            .unique("clip_id", keep="first", maintain_order=True)
        )
        return newest.select("clip_id", *(pl.col(theirs).alias(ours) for ours, theirs in FROM_CAPTIONS.items()))


def chosen_media(asked: str | None, allowed: Sequence[str], form: str) -> str:
    """Raises:
    ConfigError: no such way, or not for this form.
    """
    if asked is None:
        return "none" if "none" in allowed else "cut"
    if asked not in MEDIA:
        raise ConfigError(f"--media is {', '.join(MEDIA)}, not {asked!r}")
    if asked not in allowed:
        raise ConfigError(
            f"--media {asked} does not go with {form}, which needs a file for every clip: {', '.join(allowed)}"
        )
    return asked
