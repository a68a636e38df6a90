"""Exchange with other tools: selections of a catalog in the forms that they read, their data sets as catalogs.

Child processes import this package too: nothing here may import deltalake before a function needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from catalogs.interop.formats import EXPORT_FORMATS, IMPORT_FORMATS

if TYPE_CHECKING:
    from catalogs.interop.exchange.import_request import Imported
    from catalogs.interop.exporter import Exported

__all__ = ["EXPORT_FORMATS", "IMPORT_FORMATS", "export", "import_dataset"]

KEPT = "status = 'kept'"


def export(
    root: str,
    out: str,
    form: str,
    where: str | None = KEPT,
    snapshot: str | None = None,
    columns: Sequence[str] | None = None,
    media: str | None = None,
    style: str | None = None,
    overwrite: bool = False,
    shard_size: str = "1GB",
    workers: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> Exported:
    """Write the clips of a selection for other tools. `out` is there whole or not at all.

    Args:
        root: of the catalog.
        out: local path. A name that ends in the form's own suffix (.csv, .parquet, .jsonl, .lance) is that file, with
            clip files beside it; any other is a folder.
        form: one of `EXPORT_FORMATS`.
        where: SQL condition over the view; None: every clip.
        snapshot: see `catalogs.query.snapshots.resolve`; None: now.
        columns: of the view, in place of the form's own choice (what the form cannot do without is always there).
        media: `none`: no files, clips are spans of their sources; `link`: files that exist already are named where they
            are; `cut`: clips without a file are re-encoded, exact to the frame; `copy`: stream copies from the first
            key frame of the clip. None: `cut` where the form needs files, else `none`.
        style: captions of this style, in place of those that the recipe prefers.
        shard_size: of a WebDataset shard: bytes ("500MB", "1GB") or a number of clips ("1000").
        workers: processes that cut; None: one per processor.
        on_progress: called with clips done and clips in all.

    Raises:
        ConfigError: options that make no sense; `out` exists.
        CatalogError: no clip matches, or none could be exported.
        MissingDependency: the form `lance` without its extra.
    """
    from catalogs.interop.exchange.export_job import Request
    from catalogs.interop.exporter import run

    request = Request(
        root, out, form, where, snapshot, columns, media, style, overwrite, shard_size, workers, on_progress
    )
    return run(request)


def import_dataset(
    src: str,
    root: str,
    form: str = "auto",
    media_root: str | None = None,
    extract_to: str | None = None,
    style: str = "imported",
    limit: int | None = None,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> Imported:
    """Enter another tool's data set into a catalog (made if there is none), every file as one clip; or a `jsonl`,
    `parquet`, `lance` export of ours, with the clips that it lists. Done again, it enters what is new and updates
    captions.

    Args:
        src: file, folder, or for WebDataset a pattern of shards (`{000..012}`, `*`).
        root: of the catalog.
        form: one of `IMPORT_FORMATS`.
        media_root: folder that relative paths start from; None: that of the file which names them.
        extract_to: folder for the videos of tar shards; None: `<catalog>-media`.
        style: of the captions that come with the data; those of our own exports keep theirs.
        limit: rows taken at most.
        workers: processes that decode; None: one per processor.
        on_progress: called with rows done and rows in all.

    Raises:
        ConfigError: nothing there, unknown form, or a malformed row (named); nothing was written then.
    """
    from catalogs.interop.exchange.import_request import Request
    from catalogs.interop.importer import run

    return run(Request(src, root, form, media_root, extract_to, style, limit, workers, on_progress))
