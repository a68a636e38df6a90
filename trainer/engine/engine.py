"""The engine: one model, trained on any number of processes.

device = join_processes()
engine = Engine(model, EngineSettings(plugin="zero2"), OptimizerSettings(lr=5e-5), device)
for step in steps:
    for i, batch in enumerate(step):
        loss = objective(engine.forward(**inputs_of(batch)), batch)   # mean over the batch
        engine.backward(loss * batch.weight, last=i == len(step) - 1)
    norm = engine.step()
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from datakit.dependencies import install_command
from datakit.errors import ConfigError, DatakitError, MissingDependency
from trainer.engine.ema import Ema
from trainer.engine.gather import gather_whole
from trainer.engine.settings import EngineSettings, OptimizerSettings
from trainer.engine.sharded_state import Shards, check_shard, describe, find_shards, shard_file, write_shard
from trainer.models.common.compile import compile_blocks
from trainer.models.common.dit_architecture import Architecture

if TYPE_CHECKING:
    from trainer.engine.plugins import Boosted


def join_processes(timeout_s: float = 1800) -> torch.device:
    """Meet the processes that torchrun started with this one, or none: then this process is a group of its own.

    Returns:
        the device of this process.
    """
    # ColossalAI 0.5.0 calls collectives by names that torch 2.13 has others for.
    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout_s), **alone)
    return device


class Engine:
    """A model and its optimizer on this process.

    Attributes:
        module: what was given, as the plugin has changed it: also holds what is not trained.
        model: the boosted module; call it by `forward`.
        rank, world: of data parallelism; processes that share samples (tensor and sequence parallelism) have the same
            rank.
        updates: steps taken.
        parameters: names and shapes of what is trained.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: EngineSettings,
        optimizer: OptimizerSettings,
        device: torch.device,
        architecture: Architecture | None = None,
    ):
        """Takes the model over: its parameters with `requires_grad` are trained, and all become of the settings'
        precision (master weights start as what is left of them then).

        Args:
            architecture: of a diffusion transformer: its blocks, how it is split, and the inputs that keep their
                precision (bf16 has 8 bits, too few for a time or a position). None: any other model.

        Raises:
            ConfigError: the plugin cannot take this model or this number of processes.
            MissingDependency: ColossalAI is not installed.
        """
        boost = _colossal()
        if settings.compile and architecture is None:
            raise ConfigError(
                f"engine.compile compiles a diffusion transformer's blocks, and a {type(model).__name__} has none: set "
                f"engine.compile=false"
            )
        self.module, self.settings, self.optimizer_settings, self.device = model, settings, optimizer, device
        self.parameters = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
        self._kept = set(model.state_dict())
        self._exact = architecture.exact_inputs if architecture else frozenset[str]()
        model.register_forward_pre_hook(_unpack, with_kwargs=True)
        with _quiet():
            self._boosted = boost(model, settings, optimizer, device, architecture)
        self.model, self.rank, self.world = self._boosted.model, self._boosted.rank, self._boosted.world
        self.pieces = self._boosted.pieces
        self.dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        self.updates = 0
        self.ema = Ema(self.pieces, settings.ema) if settings.ema else None
        if settings.compile and architecture:
            compile_blocks(architecture.blocks(model))

    def forward(self, *args: Any, **inputs: Any) -> Any:
        """Call the model; floating inputs are cast to its precision, but for those that the architecture keeps exact,
        by keyword."""
        named = {k: _Exact(v) if k in self._exact else self._cast(v) for k, v in inputs.items()}
        return self.model(*(self._cast(v) for v in args), **named)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of a micro-batch. The step's gradient is that of the sum of all losses given, over
        micro-batches and data-parallel ranks: weigh each accordingly.

        Args:
            last: of the step; gradients are exchanged between ranks then. Every rank calls this equally often in a
                step.
        """
        self._boosted.backward(loss, last)

    def step(self) -> float:
        """Clip, update weights and EMA. Returns the gradient's norm before clipping, over all ranks."""
        for group in self._boosted.optimizer.param_groups:
            group["lr"] = self.rate
        norm = self._boosted.step()
        self.updates += 1
        if self.ema:
            self.ema.update()
        return norm

    @property
    def rate(self) -> float:
        """Learning rate of the next step."""
        return self.optimizer_settings.rate(self.updates)

    def owned(self) -> dict[str, Tensor]:
        """What this rank saves, by kind and parameter ("exp_avg/img_in.weight"): flat float32, not copies."""
        values = {f"{kind}/{p.name}": p.own(tensor) for p in self.pieces for kind, tensor in p.tensors().items()}
        values |= {f"ema/{name}": tensor for name, tensor in (self.ema.values if self.ema else {}).items()}
        return values | (
            {f"buffer/{name}": tensor for name, tensor in self._buffers().items()} if dist.get_rank() == 0 else {}
        )

    def about(self) -> dict[str, str]:
        """What the file of `owned` says of itself."""
        return describe(self.pieces, self.parameters, self.updates)

    def save(self, folder: Path) -> None:
        """Every rank writes its file into an empty folder, now; see `trainer.training.checkpoint` for checkpoints that
        do not stop training."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {key: tensor.cpu().contiguous() for key, tensor in self.owned().items()}
        write_shard(folder / shard_file(dist.get_rank(), dist.get_world_size()), tensors, self.about())
        dist.barrier()

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Master weights, moments, EMA and number of steps of a folder that any number of ranks, with any plugin,
        wrote.

        Raises:
            ConfigError: on every rank, where one finds a file missing or damaged, or of another model.
        """
        together(lambda: self._check(folder))
        together(lambda: self._read(Shards(folder)))
        self._boosted.publish()

    def full_state(self, ema: bool = False) -> dict[str, Tensor]:
        """On rank 0, trained parameters whole: master weights or their EMA, float32 on the CPU; elsewhere empty. All
        ranks call it.

        Raises:
            ConfigError: there is no EMA.
        """
        if ema and not self.ema:
            raise ConfigError("there is no EMA to export: set engine.ema, for example 0.9999")
        own = self.ema.values if ema else {p.name: p.own(p.tensors()["master"]) for p in self.pieces}
        return gather_whole(self.parameters, self.pieces, own)

    def _cast(self, value: Any) -> Any:
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def _buffers(self) -> dict[str, Tensor]:
        """Statistics of norms and the like: alike on all ranks, so rank 0 writes them."""
        return {name: buffer for name, buffer in self.module.named_buffers() if name in self._kept}

    def _check(self, folder: Path) -> None:
        """The files are checked by turns: rank 0 the first, rank 1 the second ..."""
        for path in find_shards(folder)[dist.get_rank() :: dist.get_world_size()]:
            check_shard(path)

    def _read(self, shards: Shards) -> None:
        shards.check_model(self.parameters)
        if self.ema and not shards.has("ema"):
            raise ConfigError(
                f"{shards.folder} has no EMA: resume with engine.ema=null, or start anew from an export of it"
            )
        for piece in self.pieces:
            for kind, tensor in piece.tensors().items():
                tensor.copy_(shards.read(kind, piece, piece.start, piece.stop))
            if self.ema:
                self.ema.values[piece.name].copy_(shards.read("ema", piece, *piece.owned))
        for name, buffer in self._buffers().items():
            buffer.copy_(shards.buffer(name))
        self.updates = shards.updates
        for state in self._boosted.optimizer.optim.state.values():
            state["step"].fill_(self.updates)


def _colossal() -> Callable[..., Boosted]:
    try:
        with _quiet():
            from trainer.engine.plugins import boost
    except ImportError as e:
        raise MissingDependency(f"training needs {e.name}: {install_command('train')}") from e
    return boost


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """ColossalAI and what it imports warn of optional libraries (apex, kernels) and of their own calls of torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


@dataclass(frozen=True)
class _Exact:
    """An input in which the plugins, which cast all tensors that they see, see none."""

    value: Any


def _unpack(model: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {k: v.value if isinstance(v, _Exact) else v for k, v in inputs.items()}


def together(work) -> None:
    """Do something on every rank; where one fails with an error for the user, all do, so that none waits for
    another."""
    error: Exception | None = None
    try:
        work()
    except DatakitError as e:
        error = e
    errors: list[Exception | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    first = next((e for e in errors if e is not None), None)
    if first is not None:
        raise first
