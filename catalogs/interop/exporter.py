"""`datakit catalog export`: the way from a selection to files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from catalogs.interop.exchange.export_job import Job, Place, Request, chosen_media
from catalogs.interop.formats import huggingface, open_sora, tabular, webdataset
from catalogs.interop.media.clip_files import Failed
from catalogs.query.selection import Selection
from catalogs.tables.catalog import Catalog
from datakit.errors import CatalogError, ConfigError
from datakit.version import __version__


@dataclass(frozen=True)
class Form:
    """Args:
    suffix: of its file, empty where it is a folder always.
    name: of that file in a folder.
    media: what `--media` may be.
    columns: of the view, where none are chosen.
    write: gives the number of clips that were written.
    """

    suffix: str
    name: str
    media: Sequence[str]
    columns: Callable[[], list[str]]
    write: Callable[[Job], int]


NAMED = ("none", "link", "cut", "copy")
FILES = ("link", "cut", "copy")
FORMS = {
    "open-sora-csv": Form(".csv", "meta.csv", FILES, open_sora.default_columns, open_sora.write_csv),
    "open-sora-parquet": Form(".parquet", "meta.parquet", FILES, open_sora.default_columns, open_sora.write_parquet),
    "webdataset": Form("", "", ("cut", "copy"), Catalog.view_columns, webdataset.write),
    "huggingface": Form("", "", FILES, Catalog.view_columns, huggingface.write),
    "jsonl": Form(".jsonl", "clips.jsonl", NAMED, Catalog.view_columns, tabular.write_jsonl),
    "parquet": Form(".parquet", "clips.parquet", NAMED, Catalog.view_columns, tabular.write_parquet),
    "lance": Form(".lance", "clips.lance", NAMED, Catalog.view_columns, tabular.write_lance),
}
LINKS_ONLY = ("open-sora-csv", "open-sora-parquet")
"""For these `--media none` is `link`: no file is made, every clip must have one."""


@dataclass(frozen=True)
class Exported:
    """What was written. `made`: clip files that the export cut or copied."""

    out: str
    form: str
    media: str
    clips: int
    made: int
    failed: list[Failed]
    selection: dict
    notes: dict

    def as_dict(self) -> dict:
        return asdict(self)


def run(request: Request) -> Exported:
    """See `catalogs.interop.export`."""
    if request.form not in FORMS:
        raise ConfigError(f"no form {request.form!r}: there are {', '.join(FORMS)}")
    form = FORMS[request.form]
    asked = "link" if request.media == "none" and request.form in LINKS_ONLY else request.media
    media = chosen_media(asked, form.media, request.form)
    if request.form == "lance":
        tabular.need_lance()
    webdataset.shard_limit(request.shard_size)
    catalog = Catalog(request.root)
    _check_apart(request.out, catalog)
    selection = Selection(catalog, request.snapshot, request.where, request.columns or form.columns())
    total = selection.size[0]
    if not total:
        raise CatalogError(f"nothing to export: no clip of {catalog.root} matches {request.where!r}")
    with Place(request.out, form.suffix, form.name, request.overwrite) as place:
        job = Job(request, selection, place, media, total)
        request.on_progress(0, total)
        clips = form.write(job)
        if not clips:
            raise CatalogError(
                f"none of {total} clips could be exported; the first: {job.failed[0].uri}: {job.failed[0].reason}"
            )
        result = Exported(
            str(place.out), request.form, media, clips, job.made, job.failed, selection.as_dict(), job.notes
        )
        place.summary.write_text(
            json.dumps(_summary(result, request, catalog.root), indent=1, ensure_ascii=False) + "\n"
        )
        place.publish()
    return result


def _check_apart(out: str, catalog: Catalog) -> None:
    """Raises:
    ConfigError: the export and the catalog would lie in each other.
    """
    one, other = os.path.realpath(out), os.path.realpath(catalog.root)
    within = (one + os.sep).startswith(other + os.sep) or (other + os.sep).startswith(one + os.sep)
    if catalog.is_local and within:
        raise ConfigError(f"--out {out} and the catalog {catalog.root} lie in each other: choose another place")


def _summary(result: Exported, request: Request, root: str) -> dict:
    """`datakit_export.json`: what this is, and of what; by it an import knows our columns."""
    facts = {name: value for name, value in result.as_dict().items() if name != "out"}
    return {"made_by": f"datakit {__version__}", "catalog": root, "style": request.style, **facts}
