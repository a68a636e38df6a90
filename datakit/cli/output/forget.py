"""What `datakit catalog forget` asks and prints."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from datakit.errors import ConfigError

if TYPE_CHECKING:
    from catalogs.maintenance.forget import Plan
MOST_LISTED = 20


def show_plan(plan: Plan) -> None:
    """What would go."""
    what = [f"{plan.clips} clips ({plan.hours:.3f} h)", f"{plan.captions} captions"]
    if plan.videos:
        what.insert(0, f"{len(plan.videos)} videos")
    if plan.clip_files:
        what.append(f"{plan.clip_files} clip files")
    print(f"to be forgotten: {', '.join(what)}")
    print(
        "from every version: "
        + (", ".join(f"{count} of {name}" for name, count in plan.versions.items()) or "none has any of it")
    )
    for name, lost in plan.selections.items():
        print(
            f"{name}: its selection loses {lost} clips; its recorded content hash will not match any more"
            if lost is not None
            else f"{name}: its selection cannot be read any more; it may have had some of these clips"
        )
    _list("checkpoints that were trained on some of it", plan.checkpoints)
    _list("near-duplicates of it, which stay", plan.copies)
    _list("sources, which are not touched", plan.sources)


def confirm(yes: bool) -> bool:
    """Whether to go on.

    Raises:
        ConfigError: there is nobody to ask.
    """
    if yes:
        return True
    if not sys.stdin.isatty():
        raise ConfigError(
            "what is forgotten cannot be brought back: --yes says that this is meant (--dry-run only shows what "
            "would go)"
        )
    return input("This cannot be undone. Forget it? [y/N] ").strip().lower() in ("y", "yes")


def show_done(plan: Plan, waiting: int, as_json: bool) -> None:
    if as_json:
        print(json.dumps({**plan.as_dict(), "waiting": waiting}, indent=1))
        return
    print(
        f"forgotten: {plan.clips} clips, {plan.captions} captions; every other row is readable under the version "
        f"number that it had"
    )
    if waiting:
        print(
            f"{waiting} files with such rows belong to no version and may be of a writer at work: "
            "`datakit catalog forget` in a while removes them"
        )


def _list(what: str, values: list[str]) -> None:
    if values:
        more = f" and {len(values) - MOST_LISTED} more" if len(values) > MOST_LISTED else ""
        print(f"{what}: {', '.join(values[:MOST_LISTED])}{more}")
