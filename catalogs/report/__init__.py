"""One HTML page about a catalog: what is in it, what the recipe does to it, and what the clips look like.

    from catalogs.report import report
    report(catalog, "report.html", where="status = 'kept'")

The page is one file that opens without a network: styles, scripts, charts and thumbnails are inside.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from catalogs.query.selection import Selection
from catalogs.report.collect import gather
from catalogs.report.contact_sheets import pictures
from catalogs.report.sections import write_sections
from catalogs.report.thresholds import Rule, plain_rules
from catalogs.tables.catalog import Catalog
from datakit.atomic import atomic_path
from datakit.errors import CatalogError
from datakit.html.page import Page

__all__ = ["Report", "Rule", "plain_rules", "report"]
PICTURES_S = 30.0


@dataclass(frozen=True)
class Report:
    """What was written. `pictures` were shown, `failed` of them could not be made."""

    path: Path
    bytes: int
    clips: int
    seconds: float
    pictures: int
    failed: int

    def __str__(self) -> str:
        missing = (
            f", {self.failed} of {self.pictures} thumbnails could not be made"
            if self.failed
            else f", {self.pictures} thumbnails"
        )
        return f"{self.path}: {self.bytes / 2**20:.1f} MiB, {self.clips:,} clips, {self.seconds:.1f} s{missing}"


def report(
    catalog: Catalog,
    out: str | Path,
    *,
    rules: Sequence[Rule] = (),
    recipe: str | None = None,
    where: str | None = None,
    snapshot: str | None = None,
    thumbnails: int = 5,
    side: int = 256,
    pictures_s: float = PICTURES_S,
    run: str | None = None,
) -> Report:
    """Write the page.

    Args:
        rules: of the recipe whose thresholds are drawn, (name, level, condition).
        recipe: its name.
        where: SQL condition over the view: only these clips.
        snapshot: see `catalogs.query.snapshots.resolve`; None: now.
        thumbnails: in a row of the contact sheets; 0: no contact sheets.
        side: longer side of a thumbnail, px.
        pictures_s: time for all thumbnails; what is not ready by then has a placeholder.
        run: training run whose losses are shown: its id, or how that begins; None: the newest that has any.

    Raises:
        ConfigError: the condition cannot be read.
        CatalogError: no such snapshot or run, a table that cannot be read, or the page cannot be written.
    """
    began, out = time.monotonic(), Path(out)
    check_writable(out)
    selection = Selection(catalog, snapshot, where, ("clip_id",))
    with catalog.reading():
        content = gather(selection, rules, recipe, snapshot, thumbnails, run)
        shown = pictures(selection, content.pictured(), side, pictures_s)
    page = Page(f"{_name(catalog)} – datakit report", pictures=shown)
    write_sections(page, content)
    size = write_page(out, page.html())
    failed = sum(p.jpeg is None for p in shown.values())
    return Report(out, size, content.facts.clips, time.monotonic() - began, len(shown), failed)


def _name(catalog: Catalog) -> str:
    return catalog.root.rsplit("/", 1)[-1] or catalog.root


def check_writable(out: Path) -> None:
    """Before the work that a page takes.

    Raises:
        CatalogError: no page can be written there.
    """
    if out.is_dir():
        raise CatalogError(f"{out} is a folder: give the page a file name, as report.html")
    if not out.parent.is_dir():
        raise CatalogError(f"the page cannot be written: there is no folder {out.parent}")


def write_page(out: Path, text: str) -> int:
    """All of it or nothing: who opens the page while it is made again sees the old one. Returns its bytes.

    Raises:
        CatalogError: it cannot be written.
    """
    data = text.encode("utf-8", "replace")  # file names may hold bytes that are no text
    try:
        with atomic_path(out) as path:
            path.write_bytes(data)
    except OSError as e:
        raise CatalogError(f"the page cannot be written: {e}") from e
    return len(data)
