"""The command `datakit run encode`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from datakit.cli.options import (
    ConfigOption,
    JsonOption,
    PresetOption,
    RayOption,
    SetOption,
    WeightsOption,
)
from datakit.dependencies import require
from datakit.errors import ConfigError
from datakit.units import readable

if TYPE_CHECKING:
    from trainer.latents.encode import Encoded, EncodeSettings, Estimate


def run_encode(
    plan: Annotated[list[Path], typer.Option("--plan", "-p", help="Folder that `datakit plan` wrote. Repeatable.")],
    autoencoder: Annotated[str | None, typer.Option("--autoencoder", help="hunyuan, dc-ae or tiny.")] = None,
    weights: WeightsOption = None,
    preset: PresetOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try windows again that were found broken.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what is to be encoded, and the space that it takes.")
    ] = False,
    ray: RayOption = "local",
    as_json: JsonOption = False,
) -> None:
    """Encode the windows of plans with an autoencoder, once: training then reads latents and not videos."""
    require("encoding", "train", "torch", "safetensors")
    from datakit.cli.output.runs import ClipBar
    from trainer.latents.encode import encode

    chosen = [
        *(settings or []),
        *([f"autoencoder.kind={autoencoder}"] if autoencoder else []),
        *([f"autoencoder.weights={json.dumps(weights)}"] if weights else []),
    ]
    resolved = load_settings(preset, config, chosen)
    with ClipBar("encoding", quiet=as_json) as bar:
        done = encode(
            plan, resolved, retry_failed, ray, dry_run, lambda estimate: _announce(estimate, as_json), bar.update
        )
    _show(done, dry_run, as_json)


def load_settings(preset: str | None, config: Path | None, sets: Sequence[str]) -> EncodeSettings:
    """Settings from a training config; its other sections are the trainer's to check.

    Raises:
        ConfigError: no such preset or file; unknown keys; settings of other sections.
    """
    from pydantic import ConfigDict

    from datakit.config import load, preset_file
    from trainer.latents.encode import EncodeSettings
    from trainer.settings import PRESETS

    class Whole(EncodeSettings):
        model_config = ConfigDict(extra="ignore", frozen=True)

    sections = list(EncodeSettings.model_fields)
    other = next((s for s in sets if s.partition(".")[0] not in sections), None)
    if other is not None:
        raise ConfigError(f"--set {other}: the sections are {', '.join(sections)}")
    files = [*([preset_file(PRESETS, preset)] if preset is not None else []), *([config] if config is not None else [])]
    whole = load(Whole, files, sets)
    return EncodeSettings(**{name: getattr(whole, name) for name in sections})


def _announce(estimate: Estimate, as_json: bool) -> None:
    """Before it starts: how much, and how much space."""
    if as_json:
        return
    todo = sum(estimate.todo.values())
    parts = [f"{estimate.windows:,} windows"]
    parts += [f"{estimate.there:,} are encoded"] if estimate.there else []
    parts += [f"{estimate.broken:,} were found broken (--retry-failed tries again)"] if estimate.broken else []
    free = f", of {readable(estimate.free)} free" if estimate.free is not None else ""
    parts += [f"{todo:,} to encode: {readable(estimate.bytes)} of latents{free}"] if todo else ["nothing to encode"]
    print(f"{'; '.join(parts)} (autoencoder {estimate.autoencoder})", file=sys.stderr)


def _show(done: Encoded, dry_run: bool, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(done), indent=1))
        return
    if dry_run or not done.estimate.todo:
        return
    tally = done.tally
    rate = tally.encoded / done.wall_s
    print(f"{tally.encoded:,} windows encoded in {done.wall_s:,.0f} s ({rate:.3g} a second), {readable(tally.bytes)}")
    if tally.failed:
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(tally.failed.items()))
        print(
            f"{sum(tally.failed.values()):,} could not be: {kinds} (SELECT clip_id, error FROM latents WHERE "
            f"error_kind IS NOT NULL)"
        )
    if tally.left_out:
        print(f"{tally.left_out:,} left out: encoded by another run meanwhile, or forgotten")
