"""What `datakit catalog export` and `import` print."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from catalogs.interop.exchange.import_request import Imported
    from catalogs.interop.exporter import Exported

NAMED = 20
"""Clips that are named one by one; `datakit_export.json` has all."""


def show_exported(done: Exported, as_json: bool) -> None:
    if as_json:
        print(json.dumps(done.as_dict(), indent=1, ensure_ascii=False))
        return
    for failed in done.failed[:NAMED]:
        print(f"left out: clip {failed.clip_id} of {failed.uri}: {failed.kind}: {failed.reason}", file=sys.stderr)
    if len(done.failed) > NAMED:
        print(f"left out: {len(done.failed) - NAMED} more, see datakit_export.json", file=sys.stderr)
    left = f", {len(done.failed)} could not be cut and are left out" if done.failed else ""
    made = f", {done.made} clip files made" if done.made else ""
    print(f"{done.clips} clips in {done.out} ({done.form}){made}{left}")


def show_imported(done: Imported, statuses: dict[str, int] | None, root: str, as_json: bool) -> None:
    """Args:
    statuses: clips by status, where the recipe in force was applied.
    """
    if as_json:
        print(json.dumps({**done.as_dict(), "statuses": statuses}, indent=1, ensure_ascii=False))
        return
    parts = {
        "entered": done.entered,
        "there before": done.in_catalog,
        "there with other clips": done.divided_otherwise,
        "of the same content as another row": done.same_content,
        "forgotten before": done.forgotten,
        "quarantined": done.quarantined,
    }
    print(f"{done.rows} rows ({done.form}): " + ", ".join(f"{count} {what}" for what, count in parts.items() if count))
    if done.captions:
        print(f"{done.captions} captions entered or changed")
    if done.discrepancies:
        print(
            f"{done.discrepancies} rows state other frames, sizes or rates than their files have (videos.extra, key "
            f"stated)"
        )
    for line in done.first_problems:
        print(f"quarantined: {line}", file=sys.stderr)
    if statuses is None:
        print(f"no recipe was applied yet: the clips are pending until `datakit run decide --catalog {root}`")
    else:
        print("by the recipe in force: " + ", ".join(f"{count} {status}" for status, count in sorted(statuses.items())))
