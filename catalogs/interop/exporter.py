"""`datakit catalog export`: the way from a selection to files."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass

from catalogs.interop.exchange.export_job import Job, Place, Request, chosen_media
from catalogs.interop.formats import EXPORT_FORMATS, FORMATS
from catalogs.interop.formats.webdataset import shard_limit
from catalogs.interop.media.clip_files import Failed
from catalogs.query.selection import Selection
from catalogs.tables.catalog import Catalog
from datakit.errors import CatalogError, ConfigError
from datakit.version import __version__


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
    if request.form not in EXPORT_FORMATS:
        raise ConfigError(f"no form {request.form!r}: there are {', '.join(EXPORT_FORMATS)}")
    form = FORMATS[request.form]
    asked = "link" if request.media == "none" and form.links else request.media
    media = chosen_media(asked, form.media, request.form)
    if form.check:
        form.function(form.check)()
    shard_limit(request.shard_size)
    catalog = Catalog(request.root)
    _check_apart(request.out, catalog)
    columns = form.function(form.columns)() if form.columns else Catalog.view_columns()
    selection = Selection(catalog, request.snapshot, request.where, request.columns or columns)
    total = selection.size[0]
    if not total:
        raise CatalogError(f"nothing to export: no clip of {catalog.root} matches {request.where!r}")
    with Place(request.out, form.suffix, form.file, request.overwrite) as place:
        job = Job(request, selection, place, media, total)
        request.on_progress(0, total)
        clips = form.function(form.write)(job)
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
