"""`datakit run encode`: fills the table `latents` for the windows of plans.

What is there already for a window's geometry and the autoencoder, however it was computed, is not encoded again: after
a change of plan only windows whose pixels changed are. Windows go through the autoencoder in batches of one shape, in
the order of the plan, and are committed now and then; so a run that is killed goes on where it was, and the files are
read as the plan is.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Literal

import polars as pl
from pydantic import Field

from catalogs.records.latents import Latents
from catalogs.records.runs import RunRecord
from catalogs.tables.catalog import Catalog
from datakit.config import Section
from datakit.errors import ConfigError, DatakitError
from datakit.process.messages import ToolSpec
from datakit.units import readable
from pipelines.executor.actors import EngineWorker
from pipelines.executor.flow import Flow, StagePool
from pipelines.executor.flow_setup import gpus_of
from pipelines.executor.session import RaySession
from pipelines.settings import Runner
from trainer.data.latent_reader import SIZES
from trainer.data.sample_reader import PASSING
from trainer.latents.encode_queue import STAGE, Queue, Tally, Writer
from trainer.models.autoencoders.settings import AutoencoderSettings
from trainer.planning.plan import Plan

GIVE_UP = 16
"""So many windows on which the encoder fails before it has encoded one: then it is not the windows."""
SLOTS = 2
"""Batches that an actor has: one it computes, one whose frames it fetches meanwhile."""


class Encode(Section):
    """How windows are encoded."""

    batch: int | None = Field(
        None, ge=1, description="windows that are encoded together; None: 8.5 million pixels, at least one window"
    )
    precision: Literal["fp32", "bf16"] | None = Field(
        None, description="of the computation; None: bf16 on a GPU, fp32 on a CPU"
    )
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="of the numbers that are stored")
    compression: Literal["snappy", "zstd"] = Field(
        "snappy", description="of the files; zstd takes a fifth off bfloat16, and time"
    )
    num_gpus: float | None = Field(None, ge=0, description="per actor; None: 1 where there are GPUs, else 0")
    num_cpus: float | None = Field(None, ge=0, description="per actor; None: CPUs are shared with the readers")
    actors: int | None = Field(None, ge=1, description="most that encode; None: what the cluster's GPUs or CPUs allow")
    threads: int = Field(4, ge=1, description="of an actor without a GPU")
    commit_mb: int = Field(256, ge=1, description="latents of a commit, MiB; twice as much memory is taken")
    commit_s: float = Field(60.0, gt=0, le=600, description="seconds between commits")


class EncodeSettings(Section):
    """The sections that `datakit run encode` looks at."""

    autoencoder: AutoencoderSettings = AutoencoderSettings()
    encode: Encode = Encode()
    runner: Runner = Runner()


@dataclass(frozen=True)
class Estimate:
    """What is about to be done.

    Attributes:
        autoencoder: its hash.
        windows: of the plans, each counted once.
        there: of them, encoded before.
        broken: of them, found broken before and not tried again.
        todo: bucket -> windows to encode.
        bytes: that these will take, before compression.
        free: bytes on the disk, where a catalog lies on one.
    """

    autoencoder: str
    windows: int
    there: int
    broken: int
    todo: dict[str, int]
    bytes: int
    free: int | None


@dataclass
class Encoded:
    """What a run did."""

    estimate: Estimate
    tally: Tally = field(default_factory=Tally)
    wall_s: float = 0.0


def encode(
    plans: Sequence[str | Path],
    settings: EncodeSettings = EncodeSettings(),
    retry_failed: bool = False,
    ray: str = "local",
    dry_run: bool = False,
    on_start: Callable[[Estimate], None] = lambda estimate: None,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> Encoded:
    """Encode the windows of plans that this autoencoder has not encoded yet, into the catalogs that they come from.

    Args:
        retry_failed: also those that were found broken. Those that could not be read for a reason that may pass are
            always tried again.
        dry_run: only count.
        on_start: called with what is to be done, before it is.
        on_progress: called with windows done and windows in all.

    Raises:
        ConfigError: a plan or weights are missing, a bucket does not fit the autoencoder, the disk has too little
            space, bf16 on CPUs.
        CatalogError: a catalog cannot be read or written.
    """
    started = time.monotonic()
    opened = [Plan.open(folder) for folder in plans]
    session = RaySession(ray)
    autoencoder, shapes = _describe(settings, opened)
    roots = dict.fromkeys(part.catalog for plan in opened for part in plan.parts)
    targets = [_target(root, opened, autoencoder, settings, retry_failed) for root in roots]
    sizes = {name: 2 * prod(shape) * SIZES[settings.encode.dtype] for name, shape in shapes.items()}
    done = Encoded(_estimate(targets, autoencoder, sizes))
    on_start(done.estimate)
    for target in targets:
        target.check_space(sizes)
    targets = [target for target in targets if target.todo.height]
    if targets and not dry_run:
        with session:
            _encode(session, targets, settings, autoencoder, done, on_progress)
    done.wall_s = time.monotonic() - started
    return done


@dataclass(frozen=True)
class _Target:
    """A catalog, and the windows of the plans that come from it.

    Attributes:
        todo: in order: `plan` (number), `row`, `bucket` (its row in the plan), `name` (of the bucket), `again` (it had
            an error).
        windows, there, broken: see `Estimate`.
    """

    catalog: Catalog
    latents: Latents
    plans: list[Plan]
    todo: pl.DataFrame
    windows: int
    there: int
    broken: int

    @property
    def free(self) -> int | None:
        return shutil.disk_usage(self.catalog.root).free if self.catalog.is_local else None

    def bytes(self, sizes: dict[str, int]) -> int:
        return sum(count * sizes[name] for name, count in self.counts().items())

    def counts(self) -> dict[str, int]:
        return dict(self.todo.group_by("name", maintain_order=True).len().iter_rows())

    def check_space(self, sizes: dict[str, int]) -> None:
        """Raises:
        ConfigError: the latents would not fit the disk.
        """
        needed, free = self.bytes(sizes), self.free
        if free is not None and needed > free:
            raise ConfigError(
                f"the latents take {readable(needed)}, the disk of {self.catalog.root} has {readable(free)} left: "
                f"make room"
            )


def _describe(settings: EncodeSettings, plans: Sequence[Plan]) -> tuple[str, dict[str, tuple[int, ...]]]:
    """The autoencoder's hash, and the shape of a latent of every bucket."""
    from trainer.models.autoencoders.build import autoencoder_hash, load_autoencoder

    model = load_autoencoder(settings.autoencoder)
    shapes = {}
    for plan in plans:
        for bucket in plan.buckets:
            try:
                shapes[bucket.name] = model.latent_shape(bucket.frames, bucket.height, bucket.width)
            except ValueError as e:
                raise ConfigError(
                    f"bucket {bucket.name} of {plan.folder} does not fit autoencoder {settings.autoencoder.kind}: "
                    f"{e}; plan with its "
                    "plan.compression and plan.causal"
                ) from e
    return autoencoder_hash(model), shapes


def _target(
    root: str, plans: Sequence[Plan], autoencoder: str, settings: EncodeSettings, retry_failed: bool
) -> _Target:
    catalog = Catalog(root)
    latents = Latents(catalog, autoencoder, settings.encode.compression)
    wanted = pl.concat([_windows_from(root, plan, number) for number, plan in enumerate(plans)])
    wanted = wanted.unique("geometry", keep="first", maintain_order=True)
    rows = latents.windows().with_columns(ok=pl.col("error_kind").is_null())
    known = rows.sort("ok", "error_kind").unique("geometry", keep="last", maintain_order=True)
    found = wanted.join(known, on="geometry", how="left", maintain_order="left")
    encoded = pl.col("ok").fill_null(False)
    _check_dtype(found.filter(encoded)["dtype"], settings.encode.dtype, root)
    final = (
        pl.col("error_kind").is_not_null()
        & ~pl.col("error_kind").is_in([str(kind) for kind in PASSING])
        & (not retry_failed)
    )
    todo = found.filter(~encoded & ~final).select(
        "plan", "row", "bucket", "name", again=pl.col("error_kind").is_not_null()
    )
    return _Target(
        catalog, latents, list(plans), todo, found.height, found.filter(encoded).height, found.filter(final).height
    )


def _check_dtype(there: pl.Series, dtype: str, root: str) -> None:
    """Raises:
    ConfigError: batches would have numbers of two formats, which loaders refuse.
    """
    other = there.filter(there != dtype)
    if len(other):
        raise ConfigError(
            f"{len(other)} of the windows have {other[0]} latents in {root}, the others would have {dtype}: --set "
            f"encode.dtype={other[0]}"
        )


def _windows_from(root: str, plan: Plan, number: int) -> pl.DataFrame:
    """Rows of a plan's windows that come from a catalog."""
    frame = pl.from_arrow(plan.windows.select(["part", "bucket", "geometry"]))
    assert isinstance(frame, pl.DataFrame)
    parts = [i for i, part in enumerate(plan.parts) if part.catalog == root]
    numbers, names = list(range(len(plan.buckets))), [bucket.name for bucket in plan.buckets]
    name = pl.col("bucket").replace_strict(numbers, names, return_dtype=pl.String).alias("name")
    frame = frame.with_row_index("row").filter(pl.col("part").is_in(parts))
    return frame.select(pl.lit(number, pl.Int32).alias("plan"), "row", "bucket", name, "geometry")


def _estimate(targets: Sequence[_Target], autoencoder: str, sizes: dict[str, int]) -> Estimate:
    todo: dict[str, int] = {}
    for target in targets:
        for name, count in target.counts().items():
            todo[name] = todo.get(name, 0) + count
    free = [target.free for target in targets if target.free is not None]
    return Estimate(
        autoencoder,
        sum(t.windows for t in targets),
        sum(t.there for t in targets),
        sum(t.broken for t in targets),
        todo,
        sum(t.bytes(sizes) for t in targets),
        min(free, default=None),
    )


def _encode(
    session: RaySession,
    targets: Sequence[_Target],
    settings: EncodeSettings,
    autoencoder: str,
    done: Encoded,
    on_progress: Callable[[int, int], None],
) -> None:
    flow = _flow(session, settings, autoencoder)
    before, of = 0, sum(target.todo.height for target in targets)
    try:
        for target in targets:
            record = RunRecord(
                target.catalog,
                "encode",
                {
                    **settings.model_dump(mode="json"),
                    "plans": {str(plan.folder): plan.hash for plan in target.plans},
                    "hash": autoencoder,
                },
            )
            with record.running() as counts:
                tally = Tally()
                _encode_into(
                    flow,
                    target,
                    settings.encode,
                    record.run_id,
                    tally,
                    lambda count, before=before: on_progress(before + count, of),
                )
                record.spend(tally.cpu_s)
                counts.update(asdict(tally))
            done.tally.add(tally)
            before += target.todo.height
    finally:
        flow.close()


def _encode_into(
    flow: Flow, target: _Target, settings: Encode, run_id: str, tally: Tally, on_progress: Callable[[int], None]
) -> None:
    """Encode what a catalog lacks."""
    queue = Queue(target.plans, target.todo, target.latents, settings.batch)
    writer = Writer(target.latents, run_id, settings.commit_mb << 20, settings.commit_s, tally)
    finished = refused = 0
    try:
        for outcome in flow.run(queue.jobs()):
            if outcome is not None:
                tally.spend(outcome.cpu_s)
                results = queue.take(outcome)
                for task, latent, error in results:
                    writer.take(task, latent, error)
                    refused += error is not None and error["stage"] == STAGE
                    if refused >= GIVE_UP and not tally.encoded:
                        raise DatakitError(
                            f"the encoder failed on each of {refused} windows; the last error: {error['message']}"
                        )
                finished += len(results)
                on_progress(finished)
            writer.commit_if_due()
    finally:
        writer.close()
    tally.left_out += queue.skipped


def _flow(session: RaySession, settings: EncodeSettings, autoencoder: str) -> Flow:
    from trainer.models.autoencoders.build import check_precision

    own, runner = settings.encode, settings.runner
    num_gpus = gpus_of(own.num_gpus, session.gpus())
    gpu = num_gpus > 0
    precision = own.precision or ("bf16" if gpu else "fp32")
    check_precision(precision, "cuda" if gpu else "cpu")
    encoder = ToolSpec(
        "trainer.latents.encoder:Encoder",
        {
            "settings": settings.autoencoder.model_dump(mode="json"),
            "expected": autoencoder,
            "gpu": gpu,
            "precision": precision,
            "dtype": own.dtype,
            "threads": own.threads,
        },
    )
    threads = 1 if gpu else own.threads
    pool = StagePool(
        STAGE,
        encoder,
        ("latent",),
        own.num_cpus,
        num_gpus,
        own.actors,
        slots=SLOTS,
        worker=EngineWorker,
        threads=threads,
    )
    reader = ToolSpec("trainer.latents.encoder:read_windows", {}, int(runner.memory_gb * (1 << 30)), runner.stall_s)
    return Flow(session, reader, [pool], runner.workers, runner.attempts)
