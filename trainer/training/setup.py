"""`datakit train`: from a catalog, or a plan, to checkpoints. What DiT and VAE training share: the run's folder, its
plan, its start.

RUN/run.json        its id, and datakit's version
RUN/settings.yaml   every setting; `--config` takes it again
RUN/plan, RUN/val   the plan of the train split, and of the val split (none: no clip of it fits)
RUN/checkpoints     see `trainer.training.checkpoint`
RUN/previews        videos made on the way
RUN/log.jsonl, RUN/tensorboard, RUN/ranks
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import yaml

from catalogs.records.runs import new_run_id
from datakit.atomic import atomic_path
from datakit.config import load
from datakit.errors import ConfigError
from datakit.version import __version__
from trainer.catalog_sync.forgotten_check import refuse_forgotten
from trainer.catalog_sync.loss_book import WriteBack
from trainer.catalog_sync.run_record import TrainingRecord
from trainer.data.batch_sampler import Order
from trainer.data.dataloader import Replacement
from trainer.engine import join_processes
from trainer.engine.engine import together
from trainer.models.autoencoders.base import Autoencoder
from trainer.planning.build_plan import NothingToPlan, make_plan
from trainer.planning.mixture import Member
from trainer.planning.plan import Plan
from trainer.planning.settings import MemorySettings, PlanSettings
from trainer.settings import RunSettings
from trainer.training.checkpoint import latest

FORMAT = 1
FIXED = ("seed", "plan", "model", "autoencoder", "text", "conditions", "dropout")
"""Settings that a resumed run cannot change: the samples and the model would be others."""
S = TypeVar("S", bound=RunSettings)


@dataclass(frozen=True)
class Request:
    """What to train on and where to put it.

    Attributes:
        members: selections; empty: `plan` is given, or the run is resumed.
        plan: made before with `datakit plan`.
        resume: go on from the newest checkpoint.
    """

    folder: Path
    members: tuple[Member, ...] = ()
    plan: Path | None = None
    resume: bool = False
    quiet: bool = False


@dataclass(frozen=True)
class Prepared:
    """A run before its first step.

    Attributes:
        val: plan of the val split, if there is one.
        back: takes what the run learns to the catalogs, if it is to.
        record: of the run in the catalogs, on rank 0.
    """

    request: Request
    settings: RunSettings
    device: torch.device
    plan: Plan
    val: Plan | None
    order: Order
    back: WriteBack | None = None
    record: TrainingRecord | None = None

    @property
    def folder(self) -> Path:
        return self.request.folder

    @property
    def main(self) -> bool:
        """Rank 0 of all processes."""
        return dist.get_rank() == 0


def prepare(request: Request, settings: S, fitted: Callable[[PlanSettings], PlanSettings], pipeline: str) -> Prepared:
    """Meet the other processes; make the run's folder and its plans, or open those that are there; enter the run in the
    catalogs.

    Args:
        pipeline: what it is called there.
        fitted: the plan's settings, made to fit the models.

    Raises:
        ConfigError: on every rank: nothing to train on, a folder in use, settings that a resumed run cannot have.
    """
    device = join_processes()
    folder = request.folder
    together(lambda: _make(request, settings, fitted) if dist.get_rank() == 0 else None)
    plan = Plan.open(folder / "plan")
    val = Plan.open(folder / "val") if (folder / "val").exists() else None
    record, back = _recorded(request, settings, plan, pipeline) if settings.write_back else (None, None)
    return Prepared(request, settings, device, plan, val, Order(plan, settings.seed), back, record)


@dataclass(frozen=True)
class Latents:
    """Cached latents to read.

    Attributes:
        index: see `trainer.data.latent_reader`.
        broken: windows that were found broken while encoding.
    """

    index: Path
    broken: tuple[Replacement, ...] = ()


def fit_to(
    autoencoder: Autoencoder, patch: int, text_tokens: int, memory: Mapping[str, Any] | None = None
) -> Callable[[PlanSettings], PlanSettings]:
    """Plan settings that fit the models: what an autoencoder compresses by, tokens, and the sizes that memory is
    reckoned by (`memory`, where nothing else is set) are not for the user to repeat."""
    usual = MemorySettings()

    def fitted(plan: PlanSettings) -> PlanSettings:
        sizes = (memory or {}).items()
        unset = {name: size for name, size in sizes if getattr(plan.memory, name) == getattr(usual, name)}
        return plan.model_copy(
            update={
                "compression": autoencoder.compression,
                "causal": autoencoder.causal,
                "patch": patch,
                "text_tokens": text_tokens,
                "memory": plan.memory.model_copy(update=unset),
            }
        )

    return fitted


def recorded(folder: Path) -> dict[str, Any]:
    """`run.json` of a run's folder.

    Raises:
        ConfigError: there is none, or of another format.
    """
    try:
        found = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError) as e:
        raise ConfigError(f"{folder} is no folder of a training run: it has no readable run.json") from e
    if found.get("format") != FORMAT:
        raise ConfigError(f"{folder}/run.json has format {found.get('format')}, this datakit reads {FORMAT}")
    return found


def _make(request: Request, settings: RunSettings, fitted: Callable[[PlanSettings], PlanSettings]) -> None:
    folder = request.folder
    if request.resume:
        recorded(folder)
        refuse_forgotten([folder / "plan", folder / "val"], settings.write_back)
        _check_unchanged(folder / "settings.yaml", settings)
        if latest(folder / "checkpoints") is None:
            raise ConfigError(f"{folder} has no whole checkpoint to resume from: start anew with another --out")
        return
    if folder.exists() and any(path.name != "ranks" for path in folder.iterdir()):
        raise ConfigError(f"{folder} is not empty: --resume goes on with the run in it, or give another --out")
    plan = fitted(settings.plan)
    if request.plan is not None:
        refuse_forgotten([request.plan, _val_of(request.plan)], settings.write_back)
        _link(request.plan, folder / "plan", plan)
    else:
        make_plan(request.members, plan, folder / "plan")
        _validation_plan(request, plan, settings, folder / "val")
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))
    _write_json(folder / "run.json", {"format": FORMAT, "run_id": new_run_id(), "datakit": __version__})


def _validation_plan(request: Request, plan: PlanSettings, settings: RunSettings, folder: Path) -> None:
    """Of the val split; a catalog too small to have one trains without."""
    if not settings.validation.every:
        return
    try:
        make_plan(
            request.members,
            plan.model_copy(update={"split": "val", "global_batch": None, "global_tokens": None}),
            folder,
        )
    except NothingToPlan:
        print("datakit: no clip of the val split can be used: training without validation", flush=True)


def _link(given: Path, place: Path, wanted: PlanSettings) -> None:
    """A plan that was made before, after a look at whether it fits the models."""
    plan = Plan.open(given)
    for name in ("compression", "causal", "patch"):
        found, needed = plan.settings[name], getattr(wanted, name)
        if (tuple(found) if isinstance(found, list) else found) != needed:
            raise ConfigError(
                f"the plan at {given} was made with plan.{name}={found}, these models need {needed}: make it again "
                f"(datakit plan)"
            )
    place.parent.mkdir(parents=True, exist_ok=True)
    os.symlink(given.absolute(), place)
    val = _val_of(given)
    if val.exists():
        os.symlink(val.absolute(), place.with_name("val"))


def _val_of(plan: Path) -> Path:
    """Where the plan of the val split is, if there is one."""
    return plan.with_name(plan.name + "-val")


def _check_unchanged(file: Path, settings: RunSettings) -> None:
    before = load(type(settings), file).model_dump(mode="json")  # with defaults of settings that are newer than the run
    now = settings.model_dump(mode="json")
    for name in FIXED:
        if name in now and now[name] != before[name]:
            raise ConfigError(f"a resumed run keeps its settings of {name}: they were {before[name]}, now {now[name]}")
    file.write_text(yaml.safe_dump(now, sort_keys=False))


def _recorded(
    request: Request, settings: RunSettings, plan: Plan, pipeline: str
) -> tuple[TrainingRecord | None, WriteBack]:
    """The run's rows (rank 0 writes), and the way back to the catalogs."""
    run_id = recorded(request.folder)["run_id"]
    entered: list[TrainingRecord] = []

    def enter() -> None:
        config = {**settings.model_dump(mode="json"), "folder": str(request.folder.absolute()), "plan_hash": plan.hash}
        gpus = dist.get_world_size() if torch.cuda.is_available() else 0
        entered.append(TrainingRecord.open(plan.parts, pipeline, config, run_id, gpus))

    together(lambda: enter() if dist.get_rank() == 0 else None)
    record = entered[0] if entered else None
    return record, WriteBack(plan, run_id, record.catalogs if record else {})


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with atomic_path(path) as aside:
        aside.write_text(json.dumps(values, indent=1, ensure_ascii=False))
