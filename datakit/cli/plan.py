"""The command `datakit plan`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import trainer
from datakit.cli.catalog import JsonOption, SnapshotOption
from datakit.errors import ConfigError

if TYPE_CHECKING:
    from trainer.planning.settings import PlanSettings

PRESETS = Path(trainer.__file__).parent / "presets"
SECTION = "plan"


def plan(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write the plan to.")],
    catalog: Annotated[str | None, typer.Option("--catalog", "-c", help="Catalog folder, or s3://, gs:// URL.")] = None,
    where: Annotated[str, typer.Option("--where", help="SQL condition over the view clips.")] = "status = 'kept'",
    snapshot: SnapshotOption = None,
    mix: Annotated[
        Path | None, typer.Option("--mix", help="YAML file: several selections and weights, in place of --catalog.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", help="Name of a shipped training config: its section plan.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="YAML file with a section plan: wins over the preset.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="One setting: plan.OPTION=value. Repeatable.")
    ] = None,
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
    if mix is not None and (where != "status = 'kept'" or snapshot is not None):
        raise ConfigError("with --mix, conditions and snapshots stand in the file: leave --where and --snapshot out")
    members = read_mix(mix) if mix is not None else [selected(catalog, where, snapshot)]
    show_plan(make_plan(members, chosen, out, overwrite), as_json)


def load_settings(preset: str | None, config: Path | None, sets: Sequence[str]) -> PlanSettings:
    """`PlanSettings` of a training config: its section `plan`; the other sections are the trainer's to check.

    Raises:
        ConfigError: no such preset or file; unknown keys; settings of other sections.
    """
    from datakit.config import load

    other = next((s for s in sets if not s.startswith(f"{SECTION}.")), None)
    if other is not None:
        raise ConfigError(f"--set {other}: here it is {SECTION}.OPTION=value")
    return load(_whole(), [*([_preset_file(preset)] if preset else []), *([config] if config else [])], sets).plan


def _whole() -> type:
    """A training config of which only one section is looked at."""
    from pydantic import BaseModel, ConfigDict

    from trainer.planning.settings import PlanSettings

    class Whole(BaseModel):
        model_config = ConfigDict(extra="ignore", frozen=True)
        plan: PlanSettings = PlanSettings()

    return Whole


def _preset_file(name: str) -> Path:
    shipped = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    if name not in shipped:
        raise ConfigError(f"no preset {name!r}: there are {', '.join(shipped) or 'none'}")
    return PRESETS / f"{name}.yaml"
