"""The commands `datakit catalog …`. Parts are imported when a command needs them."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from catalogs.interop.formats import EXPORT_FORMATS, IMPORT_FORMATS
from datakit.cli.options import (
    KEPT,
    CatalogApp,
    CatalogArgument,
    CatalogOption,
    JsonOption,
    PortOption,
    SnapshotOption,
    WhereKeptOption,
    WhereOption,
)

catalog_app = CatalogApp(no_args_is_help=True, help="Look at a catalog, question it, share it, keep it in order.")


def opened(root: str, snapshot: str | None = None):
    """The catalog, or a snapshot of it."""
    from catalogs.query.snapshots import resolve
    from catalogs.tables.catalog import Catalog

    catalog = Catalog(root)
    return catalog if snapshot is None else catalog.at(resolve(catalog, snapshot))


@catalog_app.command("show")
def catalog_show(catalog: CatalogArgument, as_json: JsonOption = False) -> None:
    """Tables, versions, counts, and every column with its unit and meaning."""
    from catalogs.tables.catalog import Catalog
    from datakit.cli.output.catalog import show_catalog

    show_catalog(Catalog(catalog), as_json)


@catalog_app.command("funnel")
def catalog_funnel(catalog: CatalogArgument, snapshot: SnapshotOption = None, as_json: JsonOption = False) -> None:
    """Where every video and clip is: kept, rejected by which rule, pending, quarantined why."""
    from catalogs.query.funnel import funnel
    from datakit.cli.output.runs import show_funnel

    show_funnel(funnel(opened(catalog, snapshot)), as_json)


@catalog_app.command("report")
def catalog_report(
    catalog: CatalogArgument,
    out: Annotated[str, typer.Option("--out", "-o", help="The page to write.")] = "report.html",
    where: Annotated[str | None, typer.Option("--where", help="SQL condition over the view clips: only these.")] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", help="Whose thresholds to draw: a name or a YAML file; not given: those in force."),
    ] = None,
    snapshot: SnapshotOption = None,
    thumbnails: Annotated[
        int, typer.Option("--thumbnails", min=0, max=12, help="In a row of the contact sheets; 0: no contact sheets.")
    ] = 5,
    patience_s: Annotated[float, typer.Option("--patience", min=1, help="Seconds for all thumbnails together.")] = 30,
    run: Annotated[
        str | None, typer.Option("--run", help="Training run whose losses to show; not given: the newest.")
    ] = None,
) -> None:
    """One HTML page with charts, thresholds and contact sheets. It opens without a network."""
    from catalogs.report import plain_rules, report
    from catalogs.tables.catalog import Catalog
    from pipelines.recipes.decide import current_recipe
    from pipelines.recipes.recipe import load_recipe

    chosen = load_recipe(recipe) if recipe else current_recipe(opened(catalog, snapshot))
    rules = plain_rules({rule.name: rule.keep for rule in chosen.file.rules}) if chosen else ()
    print(
        report(
            Catalog(catalog),
            out,
            rules=rules,
            recipe=chosen.label if chosen else None,
            where=where,
            snapshot=snapshot,
            thumbnails=thumbnails,
            pictures_s=patience_s,
            run=run,
        )
    )


@catalog_app.command("browse")
def catalog_browse(
    catalog: CatalogArgument,
    host: Annotated[
        str, typer.Option("--host", help="Address to serve on; others than 127.0.0.1 let other machines in.")
    ] = "127.0.0.1",
    port: PortOption = 8642,
    snapshot: SnapshotOption = None,
    where: Annotated[
        str | None, typer.Option("--where", help="SQL condition over the view clips to start with.")
    ] = None,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Also open it in a browser here.")] = False,
) -> None:
    """A local web app: filter, sort, play, mark, query, export. Snapshots are for looking only."""
    from catalogs.browse import serve

    serve(opened(catalog, snapshot), host, port, where, snapshot, open_browser)


@catalog_app.command("query")
def catalog_query(
    catalog: CatalogArgument,
    sql: Annotated[
        str, typer.Argument(help="For example: \"SELECT uri, start_s, motion FROM clips WHERE status = 'kept'\".")
    ],
    form: Annotated[str, typer.Option("--format", help="table, csv or jsonl.")] = "table",
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows shown in a table.")] = 40,
    snapshot: SnapshotOption = None,
) -> None:
    """SQL over clips (the joined view), and every table by its name."""
    from catalogs.query.sql import query
    from datakit.cli.output.catalog import show_rows

    show_rows(query(opened(catalog, snapshot), sql), form, rows)


@catalog_app.command("select")
def catalog_select(
    catalog: CatalogArgument,
    where: WhereKeptOption = KEPT,
    columns: Annotated[
        str | None,
        typer.Option("--columns", help="Comma-separated; not given: what reading clips takes, and captions."),
    ] = None,
    snapshot: SnapshotOption = None,
    tag_as: Annotated[str | None, typer.Option("--tag", help="Name the selection, so that its files are kept.")] = None,
    as_json: JsonOption = False,
) -> None:
    """What a training run would read: clips, hours, versions, content hash."""
    from catalogs.query.selection import COLUMNS, Selection
    from catalogs.query.snapshots import tag
    from catalogs.tables.catalog import Catalog
    from datakit.cli.output.catalog import show_selection

    opened = Catalog(catalog)
    names = [name.strip() for name in columns.split(",")] if columns else COLUMNS
    selection = Selection(opened, snapshot, where, names)
    if tag_as:
        tag(opened, tag_as, selection=selection)
    show_selection(selection, as_json)


@catalog_app.command("history")
def catalog_history(
    catalog: CatalogArgument,
    every: Annotated[bool, typer.Option("--all", help="Every commit of every table.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Which runs wrote what, and the snapshots they left."""
    from catalogs.query import history
    from catalogs.tables.catalog import Catalog
    from datakit.cli.output.catalog import show_history

    opened = Catalog(catalog)
    show_history(history.history(opened) if every else history.runs(opened), as_json)


@catalog_app.command("diff")
def catalog_diff(
    catalog: CatalogArgument,
    a: Annotated[str, typer.Argument(help="Snapshot: a tag, a run id, a time, or clips=12,decisions=4.")],
    b: Annotated[str, typer.Argument(help="Snapshot to compare with.")] = "now",
    as_json: JsonOption = False,
) -> None:
    """What changed from snapshot A to B: clips, statuses and by which rule, scores, captions, marks."""
    from catalogs.query.diff import diff
    from catalogs.query.snapshots import resolve
    from catalogs.tables.catalog import Catalog
    from datakit.cli.output.catalog import show_diff

    opened = Catalog(catalog)
    show_diff(diff(opened, resolve(opened, a), resolve(opened, b)), as_json)


@catalog_app.command("tag")
def catalog_tag(
    catalog: CatalogArgument,
    name: Annotated[str | None, typer.Argument(help="Not given: list the tags.")] = None,
    snapshot: SnapshotOption = None,
    note: Annotated[str, typer.Option("--note", help="Why.")] = "",
    delete: Annotated[bool, typer.Option("--delete", help="Remove the tag.")] = False,
) -> None:
    """Name a snapshot: it stays readable, vacuum or not."""
    from catalogs.query.snapshots import tag, tags, untag
    from catalogs.tables.catalog import Catalog
    from datakit.cli.output.catalog import show_rows

    opened = Catalog(catalog)
    if name is None:
        show_rows(tags(opened).drop("columns"), "table", sys.maxsize)
    elif delete:
        untag(opened, name)
        print(f"tag {name} removed")
    else:
        versions = tag(opened, name, snapshot, note=note)
        print(f"tag {name}: " + ", ".join(f"{table}={version}" for table, version in versions.items()))


@catalog_app.command("restore")
def catalog_restore(
    catalog: CatalogArgument,
    snapshot: Annotated[str, typer.Argument(help="A tag, a run id, a time, or clips=12,decisions=4.")],
) -> None:
    """Make the catalog what it was at a snapshot. Writes new versions: the state before stays in the history."""
    from catalogs.query.snapshots import restore
    from catalogs.records.runs import RunRecord
    from catalogs.tables.catalog import Catalog
    from catalogs.tables.integrity import set_aside

    for path in set_aside(catalog):
        print(
            f"given up: {path}, which cannot be read (it is kept as {path}.torn where it was not missing)",
            file=sys.stderr,
        )
    opened = Catalog(catalog)
    with RunRecord(opened, "restore", {"snapshot": snapshot}).running(finishing_restore=True) as counts:
        done = restore(opened, snapshot)
        counts["tables"] = done.tables
    changed = ", ".join(f"{name} {before} to {version}" for name, (before, version) in done.tables.items())
    print(f"restored {snapshot}: {changed}" if changed else f"the catalog is as it was at {snapshot} already")


@catalog_app.command("vacuum")
def catalog_vacuum(
    catalog: CatalogArgument,
    keep_days: Annotated[
        float, typer.Option("--keep-days", min=0, help="Days that versions live which nothing references.")
    ] = 7.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete files that only old versions need; what tags, training runs and their checkpoints reference stays."""
    from catalogs.query.snapshots import vacuum
    from catalogs.records.runs import RunRecord
    from catalogs.tables.catalog import Catalog
    from datakit.cli.output.catalog import show_vacuumed

    opened = Catalog(catalog)
    if dry_run:
        show_vacuumed(vacuum(opened, keep_days, dry_run), dry_run, as_json)
        return
    with RunRecord(opened, "vacuum", {"keep_days": keep_days}).running() as counts:
        done = vacuum(opened, keep_days)
        counts.update(files=done.files, bytes=done.bytes)
    show_vacuumed(done, dry_run, as_json)


@catalog_app.command("validate")
def catalog_validate(
    catalog: CatalogArgument,
    sources: Annotated[bool, typer.Option(help="Also look for local source files.")] = True,
) -> None:
    """Check schema, identities, accounts, clip files and sources; exit code 1 when something is wrong."""
    from catalogs.maintenance.validate import problems
    from catalogs.tables.catalog import Catalog

    found = 0
    for problem in problems(Catalog(catalog), sources):
        found += 1
        print(problem)
    print("the catalog is in order" if not found else f"{found} problems")
    raise typer.Exit(1 if found else 0)


@catalog_app.command("upgrade")
def catalog_upgrade(catalog: CatalogArgument) -> None:
    """A catalog of an earlier datakit: add the tables and columns that are new."""
    from catalogs.tables.upgrade import upgrade

    added = upgrade(catalog)
    for line in added:
        print(f"added {line}")
    print(f"{len(added)} things added" if added else "the catalog is up to date")


@catalog_app.command("relink")
def catalog_relink(
    catalog: CatalogArgument,
    old: Annotated[str, typer.Argument(help="Prefix of addresses in the catalog.")],
    new: Annotated[str, typer.Argument(help="Where the same files are now.")],
) -> None:
    """Sources were moved: point the catalog to where the same content is now."""
    from catalogs.maintenance.relink import relink
    from catalogs.tables.catalog import Catalog

    result = relink(Catalog(catalog), old, new)
    for line in result.failed:
        print(f"not moved: {line}", file=sys.stderr)
    print(f"{result.moved} addresses moved, {len(result.failed)} not")
    raise typer.Exit(1 if result.failed else 0)


@catalog_app.command("export")
def catalog_export(
    catalog: CatalogArgument,
    form: Annotated[str, typer.Option("--format", help=f"{', '.join(EXPORT_FORMATS)}.")],
    out: Annotated[
        str, typer.Option("--out", help="Folder; or a file that the format is: x.csv, x.parquet, x.jsonl, x.lance.")
    ],
    where: WhereKeptOption = KEPT,
    snapshot: SnapshotOption = None,
    columns: Annotated[
        str | None, typer.Option("--columns", help="Comma-separated, of the view; not given: the format's own.")
    ] = None,
    media: Annotated[
        str | None, typer.Option("--media", help="none, link (what is there), cut (re-encode), copy.")
    ] = None,
    style: Annotated[
        str | None, typer.Option("--style", help="Captions of this style; not given: those preferred.")
    ] = None,
    shard_size: Annotated[
        str, typer.Option("--shard-size", help="Of a WebDataset shard: 500MB, 1GB, or clips.")
    ] = "1GB",
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Processes that cut; not given: one per processor.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at --out.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write clips for other tools: Open-Sora, WebDataset, Hugging Face, JSON lines, Parquet, Lance."""
    from catalogs.interop import export
    from datakit.cli.output.interop import show_exported
    from datakit.cli.output.runs import ClipBar

    names = [name.strip() for name in columns.split(",") if name.strip()] if columns else None
    with ClipBar("exporting", quiet=as_json) as bar:
        done = export(
            catalog, out, form, where, snapshot, names, media, style, overwrite, shard_size, workers, bar.update
        )
    show_exported(done, as_json)


@catalog_app.command("import")
def catalog_import(
    src: Annotated[str, typer.Argument(metavar="SRC", help="File, folder, or shards as name-{000..012}.tar.")],
    catalog: CatalogOption,
    form: Annotated[str, typer.Option("--format", help=f"{', '.join(IMPORT_FORMATS)}.")] = "auto",
    media_root: Annotated[
        str | None, typer.Option("--media-root", help="Folder that relative paths start from.")
    ] = None,
    extract_to: Annotated[
        str | None, typer.Option("--extract-to", help="For videos of tar shards; not given: DIR-media.")
    ] = None,
    style: Annotated[
        str, typer.Option("--style", help="Name of the style of the captions that come along.")
    ] = "imported",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Take at most this many rows.")] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Processes that decode; not given: all processors.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Enter another tool's data set (made if there is no catalog): every file is a clip, captions and scores come
    along."""
    from catalogs.interop import import_dataset
    from catalogs.tables.catalog import Catalog
    from datakit.cli.output.interop import show_imported
    from datakit.cli.output.runs import ClipBar
    from pipelines.recipes.decide import redecide

    with ClipBar("importing", quiet=as_json) as bar:
        done = import_dataset(src, catalog, form, media_root, extract_to, style, limit, workers, bar.update)
    show_imported(done, redecide(Catalog(catalog)), catalog, as_json)


@catalog_app.command("forget")
def catalog_forget(
    catalog: CatalogArgument,
    clip: Annotated[list[str] | None, typer.Option("--clip", help="A clip_id. Repeatable.")] = None,
    source: Annotated[
        list[str] | None, typer.Option("--source", help="A whole video: its address or video_id. Repeatable.")
    ] = None,
    where: WhereOption = None,
    reason: Annotated[str | None, typer.Option("--reason", help="Is recorded.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would go.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove clips or whole sources from every version, for good; run it when nobody writes. Naming nothing, it
    completes one that was interrupted."""
    import json

    from catalogs.maintenance.forget import Forgetting, Request
    from catalogs.tables.catalog import Catalog
    from datakit.cli.output.forget import confirm, show_done, show_plan

    forgetting = Forgetting(Catalog(catalog), Request(tuple(clip or ()), tuple(source or ()), where))
    if not as_json:
        show_plan(forgetting.plan)
    elif dry_run:
        print(json.dumps(forgetting.plan.as_dict(), indent=1))
    if dry_run:
        return
    if forgetting.is_empty:
        print("nothing to forget" if not as_json else json.dumps(forgetting.plan.as_dict(), indent=1))
    elif confirm(yes):
        waiting = forgetting.run(reason)
        show_done(forgetting.plan, waiting, as_json)
