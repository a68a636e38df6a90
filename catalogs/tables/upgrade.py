"""`datakit catalog upgrade`: bring a catalog of an earlier schema to this one. Adds tables and columns, changes
no row; the columns are null until their stage has run. History is kept from then on."""

from __future__ import annotations

import json

from deltalake import DeltaTable
from deltalake.exceptions import TableNotFoundError

from catalogs.tables import schema
from catalogs.tables.catalog import KEEP_HISTORY, create_table, missing_fields
from datakit.errors import CatalogError


def upgrade(root: str) -> list[str]:
    """What was added, one line each; nothing when the catalog is up to date. Done again after a crash, it goes on.

    Raises:
        CatalogError: no catalog there, or it was made by a newer datakit.
    """
    root = root.rstrip("/")
    try:
        description = json.loads(DeltaTable(f"{root}/videos").metadata().description or "{}")
    except TableNotFoundError as e:
        raise CatalogError(f"no catalog at {root}") from e
    found = description.get("schema", 0)
    if found > schema.VERSION:
        raise CatalogError(
            f"the catalog at {root} has schema version {found}, this datakit only knows {schema.VERSION}"
        )
    text = json.dumps({**description, "schema": schema.VERSION})
    added: list[str] = []
    for name in (*(t for t in schema.TABLES if t != "videos"), "videos"):  # videos last: it says "complete"
        added += bring_up_to_date(root, name, text)
    return added


def bring_up_to_date(root: str, name: str, description: str) -> list[str]:
    """Give one table the columns, properties and description of this schema; what was added, one line each."""
    if not DeltaTable.is_deltatable(f"{root}/{name}"):
        create_table(root, name, description)
        return [f"table {name}"]
    table = DeltaTable(f"{root}/{name}")
    missing = missing_fields(table, name)
    if missing:
        table.alter.add_columns(missing)
    about = table.metadata()
    if not KEEP_HISTORY.items() <= about.configuration.items():
        DeltaTable(f"{root}/{name}").alter.set_table_properties(KEEP_HISTORY)
    if about.description != description:
        DeltaTable(f"{root}/{name}").alter.set_table_description(description)
    return [f"column {name}.{field.name}" for field in missing]
