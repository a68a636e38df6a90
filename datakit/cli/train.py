"""The commands `datakit train dit|vae|export`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from datakit.cli.options import (
    KEPT,
    CatalogApp,
    ConfigOption,
    JsonOption,
    MixOption,
    OptionalCatalog,
    PresetOption,
    SetOption,
    SnapshotOption,
    WhereKeptOption,
)
from datakit.dependencies import require
from datakit.errors import ConfigError

train_app = CatalogApp(no_args_is_help=True, help="Training, from a catalog's clips.")

OutOption = Annotated[Path, typer.Option("--out", "-o", help="Folder of the run: plan, checkpoints, previews, logs.")]
PlanOption = Annotated[
    Path | None, typer.Option("--plan", help="A plan made before (`datakit plan`), in place of --catalog.")
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out, with its settings.")
]
NprocOption = Annotated[
    int, typer.Option("--nproc", min=1, help="Processes (one a GPU) on this machine, or on the Ray cluster.")
]
DtypeOption = Annotated[
    Literal["bfloat16", "float32"] | None,
    typer.Option("--dtype", help="Left out: bfloat16; of autoencoders and --lora, float32."),
]
LayoutOption = Annotated[
    Literal["separate", "fused"] | None,
    typer.Option("--layout", help="Names and shapes of Open-Sora (separate, if left out) or of Flux (fused)."),
]
RayOption = Annotated[
    str | None, typer.Option("--ray", help="Place the processes on a Ray cluster: auto, or HOST:PORT.")
]


@train_app.command("dit")
def dit(
    out: OutOption,
    catalog: OptionalCatalog = None,
    where: WhereKeptOption = KEPT,
    snapshot: SnapshotOption = None,
    mix: MixOption = None,
    plan: PlanOption = None,
    preset: PresetOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    resume: ResumeOption = False,
    nproc: NprocOption = 1,
    ray: RayOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a video diffusion transformer (MMDiT) by rectified flow."""
    require("training", "train", "torch", "colossalai", "peft", "safetensors")
    request = _request(out, catalog, where, snapshot, mix, plan, resume, as_json)
    _start("dit", request, preset, config, settings or [], nproc, ray, as_json)


@train_app.command("vae")
def vae(
    out: OutOption,
    catalog: OptionalCatalog = None,
    where: WhereKeptOption = KEPT,
    snapshot: SnapshotOption = None,
    mix: MixOption = None,
    plan: PlanOption = None,
    preset: PresetOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    resume: ResumeOption = False,
    nproc: NprocOption = 1,
    ray: RayOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a video autoencoder: L1, perceptual distance, divergence, and a discriminator from a step on."""
    require("training", "train", "torch", "colossalai", "peft", "safetensors")
    request = _request(out, catalog, where, snapshot, mix, plan, resume, as_json)
    _start("vae", request, preset, config, settings or [], nproc, ray, as_json)


@train_app.command("export")
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run of `datakit train dit` or `datakit train vae`.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="File .safetensors; of --lora also a folder, as peft writes it.")
    ],
    step: Annotated[int | None, typer.Option("--step", help="Of the checkpoint; the newest if left out.")] = None,
    ema: Annotated[bool, typer.Option("--ema/--no-ema", help="The average of the weights, if there is one.")] = True,
    dtype: DtypeOption = None,
    layout: LayoutOption = None,
    lora: Annotated[bool, typer.Option("--lora", help="LoRA alone; left out, it is merged into the model.")] = False,
    rescale: Annotated[
        bool, typer.Option("--rescale", help="Of an autoencoder: its latents get mean 0 and deviation 1.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write what a run has learned as one file: `datakit sample` and Open-Sora's own code load it."""
    require("exporting", "train", "torch", "colossalai", "peft", "safetensors")
    import torch

    from trainer.export.dit import export_run

    done = export_run(run, out, ema, step, getattr(torch, dtype) if dtype else None, layout, lora, rescale)
    told = {"file": str(out), "checkpoint": str(done.checkpoint), "step": done.step, "ema": done.ema}
    print(
        json.dumps(told)
        if as_json
        else f"{out}: {'the EMA' if done.ema else 'weights'} after {done.step} steps ({done.checkpoint})"
    )


def _settings(kind: type, out: Path, preset: str | None, config: Path | None, sets: list[str], resume: bool) -> Any:
    from datakit.config import load
    from trainer.settings import load_settings
    from trainer.training.setup import recorded

    if not resume:
        return load_settings(kind, preset, config, sets)
    if preset is not None or config is not None:
        raise ConfigError(
            "--resume goes on with the run's own settings: leave --preset and --config out (--set changes one)"
        )
    recorded(out)
    return load(kind, out / "settings.yaml", sets)


def _request(
    out: Path,
    catalog: str | None,
    where: str,
    snapshot: str | None,
    mix: Path | None,
    plan: Path | None,
    resume: bool,
    quiet: bool,
) -> dict[str, Any]:
    given = [name for name, value in (("--catalog", catalog), ("--mix", mix), ("--plan", plan)) if value is not None]
    if len(given) != (0 if resume else 1):
        raise ConfigError(
            "a resumed run has its plan: leave --catalog, --mix and --plan out"
            if resume
            else "give one of --catalog DIR, --mix FILE and --plan PLAN to say what to train on"
        )
    if catalog is None and (where != KEPT or snapshot is not None):
        raise ConfigError("--where and --snapshot go with --catalog")
    return {
        "out": str(out),
        "catalog": catalog,
        "where": where,
        "snapshot": snapshot,
        "mix": str(mix) if mix else None,
        "plan": str(plan) if plan else None,
        "resume": resume,
        "quiet": quiet,
    }


def _start(
    kind: str,
    request: dict[str, Any],
    preset: str | None,
    config: Path | None,
    sets: list[str],
    nproc: int,
    ray: str | None,
    as_json: bool,
) -> None:
    """In this process, in several of this machine, or on a cluster.

    Args:
        kind: see `trainer.trainables.TRAINABLES`.
    """
    from trainer.trainables import TRAINABLES
    from trainer.training.launch import on_ray, on_this_machine, started_by_launcher

    settings = _settings(TRAINABLES[kind].settings, Path(request["out"]), preset, config, sets, request["resume"])
    work = {"kind": kind, "settings": settings.model_dump(mode="json"), "request": request, "as_json": as_json}
    if ray is not None:
        on_ray(nproc, ray, work_on, {**work, "request": _absolute(request)}, Path(request["out"]))
    elif nproc > 1 and not started_by_launcher():
        on_this_machine(nproc, _without("--nproc", sys.argv[1:]), Path(request["out"]))
    else:
        work_on(work)


def _absolute(request: dict[str, Any]) -> dict[str, Any]:
    """Its paths as other machines, and processes in other folders, find them."""
    local = [
        name for name in ("out", "catalog", "mix", "plan") if request[name] is not None and "://" not in request[name]
    ]
    return {**request, **{name: os.path.abspath(request[name]) for name in local}}


def work_on(work: dict[str, Any]) -> None:
    """What each process does.

    Args:
        work: what is trained (`trainer.trainables`), its settings, the request, whether to print JSON.
    """
    import torch.distributed as dist

    from trainer.planning.mixture import read_mix, selected
    from trainer.trainables import TRAINABLES
    from trainer.training.setup import Request

    trainable, asked = TRAINABLES[work["kind"]], work["request"]
    members = read_mix(asked["mix"]) if asked["mix"] else []
    members = [selected(asked["catalog"], asked["where"], asked["snapshot"])] if asked["catalog"] else members
    request = Request(
        Path(asked["out"]),
        tuple(members),
        Path(asked["plan"]) if asked["plan"] else None,
        asked["resume"],
        asked["quiet"],
    )
    ended = trainable.train(request, trainable.settings.model_validate(work["settings"]))
    if dist.get_rank() == 0:
        told = {"status": ended.status, "step": ended.step, "checkpoint": str(ended.checkpoint), **ended.values}
        print(json.dumps(told) if work["as_json"] else f"{ended.status} after {ended.step} steps: {ended.checkpoint}")
    dist.barrier()
    dist.destroy_process_group()


def _without(option: str, arguments: list[str]) -> list[str]:
    """Arguments without an option and its value."""
    left: list[str] = []
    skip = False
    for argument in arguments:
        if not skip and argument != option and not argument.startswith(f"{option}="):
            left.append(argument)
        skip = argument == option
    return left
