"""The command `datakit plan`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import trainer
from datakit.cli.options import (
    KEPT,
    ConfigOption,
    JsonOption,
    MixOption,
    OptionalCatalog,
    PresetOption,
    SetOption,
    SnapshotOption,
    WhereKeptOption,
)
from datakit.errors import ConfigError

if TYPE_CHECKING:
    from trainer.planning.settings import PlanSettings

PRESETS = Path(trainer.__file__).parent / "presets"
SECTION = "plan"


def plan(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write the plan to.")],
    catalog: OptionalCatalog = None,
    where: WhereKeptOption = KEPT,
    snapshot: SnapshotOption = None,
    mix: MixOption = None,
    preset: PresetOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another plan at --out.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Which bucket every selected clip trains in, or why it cannot: a folder that a training run reads. Opens no
    video."""
    from datakit.cli.output.plan import show_plan
    from trainer.planning.build_plan import make_plan
    from trainer.planning.mixture import read_mix, selected

    chosen = load_settings(preset, config, settings or [])
    if (catalog is None) == (mix is None):
        raise ConfigError("give --catalog DIR, or --mix FILE for several selections")
    if mix is not None and (where != KEPT or snapshot is not None):
        raise ConfigError("with --mix, conditions and snapshots stand in the file: leave --where and --snapshot out")
    if mix is not None:
        members = read_mix(mix)
    else:
        assert catalog is not None
        members = [selected(catalog, where, snapshot)]
    show_plan(make_plan(members, chosen, out, overwrite), as_json)


def load_settings(preset: str | None, config: Path | None, sets: Sequence[str]) -> PlanSettings:
    """`PlanSettings` of a training config: its section `plan`; the other sections are the trainer's to check.

    Raises:
        ConfigError: no such preset or file; unknown keys; settings of other sections.
    """
    from datakit.config import load, preset_file

    other = next((s for s in sets if not s.startswith(f"{SECTION}.")), None)
    if other is not None:
        raise ConfigError(f"--set {other}: here it is {SECTION}.OPTION=value")
    return load(
        _whole(), [*([preset_file(PRESETS, preset)] if preset else []), *([config] if config else [])], sets
    ).plan


def _whole() -> type:
    """A training config of which only one section is looked at."""
    from pydantic import BaseModel, ConfigDict

    from trainer.planning.settings import PlanSettings

    class Whole(BaseModel):
        model_config = ConfigDict(extra="ignore", frozen=True)
        plan: PlanSettings = PlanSettings()

    return Whole
