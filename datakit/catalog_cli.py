"""The commands `datakit catalog …`. Parts are imported when a command needs them."""

from __future__ import annotations

import sys
from typing import Annotated, Optional

import typer

catalog_app = typer.Typer(no_args_is_help=True, help="Look at a catalog, question it, share it, keep it in order.")

CatalogOption = Annotated[str, typer.Option("--catalog", "-c", help="Catalog folder, or s3://, gs:// URL.")]
CatalogArgument = Annotated[str, typer.Argument(metavar="DIR", help="Catalog folder, or s3://, gs:// URL.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout, nothing else.")]
SnapshotOption = Annotated[Optional[str], typer.Option("--snapshot", help="A tag, a run id, a time, or clips=12,decisions=4; not given: now.")]


def opened(root: str, snapshot: str | None = None):
    """The catalog, or a snapshot of it."""
    from catalogs.snapshots import resolve
    from catalogs.tables import Catalog

    catalog = Catalog(root)
    return catalog if snapshot is None else catalog.at(resolve(catalog, snapshot))


@catalog_app.command("show")
def catalog_show(catalog: CatalogArgument, as_json: JsonOption = False) -> None:
    """Tables, versions, counts, and every column with its unit and meaning."""
    from catalogs.tables import Catalog
    from catalogs.console import show_catalog

    show_catalog(Catalog(catalog), as_json)


@catalog_app.command("funnel")
def catalog_funnel(catalog: CatalogArgument, snapshot: SnapshotOption = None, as_json: JsonOption = False) -> None:
    """Where every video and clip is: kept, rejected by which rule, pending, quarantined why."""
    from catalogs.funnel import funnel
    from pipelines.console import show_funnel

    show_funnel(funnel(opened(catalog, snapshot)), as_json)


@catalog_app.command("query")
def catalog_query(
    catalog: CatalogArgument,
    sql: Annotated[str, typer.Argument(help='For example: "SELECT uri, start_s, motion FROM clips WHERE status = \'kept\'".')],
    form: Annotated[str, typer.Option("--format", help="table, csv or jsonl.")] = "table",
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows shown in a table.")] = 40,
    snapshot: SnapshotOption = None,
) -> None:
    """SQL over clips (the joined view), and every table by its name."""
    from catalogs.query import query
    from catalogs.console import show_rows

    show_rows(query(opened(catalog, snapshot), sql), form, rows)


@catalog_app.command("validate")
def catalog_validate(
    catalog: CatalogArgument,
    sources: Annotated[bool, typer.Option(help="Also look for local source files.")] = True,
) -> None:
    """Check schema, identities, accounts, clip files and sources; exit code 1 when something is wrong."""
    from catalogs.check import problems
    from catalogs.tables import Catalog

    found = 0
    for problem in problems(Catalog(catalog), sources):
        found += 1
        print(problem)
    print("the catalog is in order" if not found else f"{found} problems")
    raise typer.Exit(1 if found else 0)


@catalog_app.command("upgrade")
def catalog_upgrade(catalog: CatalogArgument) -> None:
    """A catalog of an earlier datakit: add the tables and columns that are new."""
    from catalogs.upgrade import upgrade

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
    from catalogs.relink import relink
    from catalogs.tables import Catalog

    result = relink(Catalog(catalog), old, new)
    for line in result.failed:
        print(f"not moved: {line}", file=sys.stderr)
    print(f"{result.moved} addresses moved, {len(result.failed)} not")
    raise typer.Exit(1 if result.failed else 0)
