"""ColossalAI's plugins behind one interface.

What they do differently is settled here: who averages gradients over whom, when they are exchanged, where the master
weights and Adam's moments are, and how working weights follow masters that were loaded. ColossalAI 0.5.0 is met as it
is; see the comments.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from colossalai.amp.naive_amp.mixed_precision_optimizer import MixedPrecisionOptimizer
from colossalai.booster import Booster
from colossalai.booster.plugin import GeminiPlugin, HybridParallelPlugin, LowLevelZeroPlugin, TorchDDPPlugin
from colossalai.device.device_mesh import DeviceMesh
from colossalai.interface import OptimizerWrapper
from colossalai.tensor.d_tensor.api import clear_layout_converter
from colossalai.zero.gemini import gemini_optimizer
from colossalai.zero.low_level import LowLevelZeroOptimizer
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from datakit.errors import ConfigError
from trainer.engine.cpu_accelerator import pretend
from trainer.engine.parallel_policy import ParallelPolicy, policy_for
from trainer.engine.settings import EngineSettings, OptimizerSettings
from trainer.engine.sharded_state import Piece, share
from trainer.models.common.dit_architecture import Architecture

CHUNK = 32 << 20
"""Elements of a chunk of Gemini's."""


@dataclass
class Boosted:
    """A model and its optimizer, spread over the processes.

    Attributes:
        model: to call.
        averaged: over so many ranks the plugin averages gradients, where their sum is wanted.
        rank, world: of data parallelism: processes with the same rank see the same samples.
        pieces: what this process holds.
        publish: has the working weights follow master weights that were loaded.
    """

    model: nn.Module
    optimizer: OptimizerWrapper
    booster: Booster
    settings: EngineSettings
    averaged: int
    rank: int
    world: int
    pieces: list[Piece] = field(default_factory=list)
    publish: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self._ddp = next((m for m in self.model.modules() if isinstance(m, DistributedDataParallel)), None)
        if self._ddp is not None:
            self._ddp.require_backward_grad_sync = False  # `backward` says when

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of a loss to those before; on the last one, exchange them."""
        if last and self._ddp is not None:
            # DDP decides in `forward` whether the next backward pass exchanges gradients; here the caller knows only
            # afterwards.
            # These are the two calls that its `forward` makes to prepare for an exchange.
            self._ddp.reducer._rebuild_buckets()
            self._ddp.reducer.prepare_for_backward([])
        with contextlib.nullcontext() if last else self._no_exchange():
            self.booster.backward(loss * self.averaged, self.optimizer)

    def step(self) -> float:
        """Clip, update, forget the gradients. Gives their norm over all ranks, before clipping."""
        if type(self.optimizer) is OptimizerWrapper:  # plain DDP: every rank has all gradients
            norm = self.optimizer.clip_grad_by_norm(self.settings.grad_clip or math.inf)
            self.optimizer.step()
        else:
            self.optimizer.step()
            norm = self.optimizer.get_grad_norm()
        self.optimizer.zero_grad()
        return float(norm)

    def _no_exchange(self) -> contextlib.AbstractContextManager:
        """ZeRO-1 and ZeRO-0 keep whole gradients until the last; ZeRO-2 and Gemini keep slices, so each backward pass
        is reduced."""
        zero = self.optimizer if isinstance(self.optimizer, LowLevelZeroOptimizer) else None
        return zero.no_sync() if zero is not None and not zero._partition_grads else contextlib.nullcontext()


def boost(
    model: nn.Module,
    settings: EngineSettings,
    optimizer: OptimizerSettings,
    device: torch.device,
    architecture: Architecture | None = None,
) -> Boosted:
    """Spread a model whose parameters with `requires_grad` are to be trained.

    Args:
        architecture: of a diffusion transformer; the plugin hybrid splits these alone.

    Raises:
        ConfigError: the plugin cannot take this model or this number of processes.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ConfigError("there is nothing to train: no parameter requires a gradient")
    if device.type == "cpu" and settings.plugin != "ddp":
        pretend()
    shapes = {name: tuple(p.shape) for name, p in trained.items()}
    if settings.plugin == "hybrid":
        policy = policy_for(architecture, model)
        boosted, holders = _hybrid(model, settings, optimizer, device, trained, policy)
    else:
        boosted, holders = _BOOST[settings.plugin](model, settings, optimizer, device, trained)
    _start_moments(boosted.optimizer)
    boosted.pieces = [piece for name in trained for piece in holders(name, trained[name], shapes[name])]
    return boosted


Holders = Callable[[str, nn.Parameter, tuple[int, ...]], Iterable[Piece]]


def _ddp(model, settings, optimizer, device, trained) -> tuple[Boosted, Holders]:
    plugin = TorchDDPPlugin(broadcast_buffers=False, bucket_cap_mb=settings.bucket_mb)
    rank, world = dist.get_rank(), dist.get_world_size()
    adam: Any = _adam(trained, optimizer, device)
    if settings.precision == "bf16":
        model.to(device=device, dtype=torch.bfloat16)
        adam = MixedPrecisionOptimizer(adam, "bf16", max_norm=settings.grad_clip or math.inf)
    boosted = _boosted(plugin, model, adam, settings, world, rank, world)
    boosted.publish = lambda: _copy_masters(boosted.optimizer)
    return boosted, lambda name, p, shape: [_whole_piece(boosted.optimizer, name, p, shape, None, rank, world)]


def _zero(model, settings, optimizer, device, trained) -> tuple[Boosted, Holders]:
    plugin = LowLevelZeroPlugin(
        stage=int(settings.plugin[-1]),
        precision=settings.precision,
        max_norm=settings.grad_clip or math.inf,
        reduce_bucket_size_in_m=_bucket_m(settings),
        overlap_communication=device.type == "cuda",
    )
    rank, world = dist.get_rank(), dist.get_world_size()
    boosted = _boosted(plugin, model, _adam(trained, optimizer, device), settings, world, rank, world)
    boosted.publish = lambda: _gather_masters(boosted.optimizer)
    return boosted, lambda name, p, shape: [
        _zero_piece(boosted.optimizer, name, p, shape, None, dist.group.WORLD, 0, 1)
    ]


def _hybrid(model, settings, optimizer, device, trained, policy: ParallelPolicy) -> tuple[Boosted, Holders]:
    total, tp, sp = dist.get_world_size(), settings.tp, settings.sp
    if total % (tp * sp):
        raise ConfigError(f"{total} processes do not divide by tp·sp = {tp}·{sp}")
    DeviceMesh._DIST_BACKEND[device.type] = (
        dist.get_backend()
    )  # ColossalAI tells the device by it, and knows plain nccl and gloo only
    clear_layout_converter()  # it remembers how it cut tensors before, with the process groups of then
    sequence = (
        {"enable_sequence_parallelism": True, "sequence_parallelism_mode": "all_to_all", "sp_size": sp}
        if sp > 1
        else {}
    )
    plugin = HybridParallelPlugin(
        tp_size=tp,
        pp_size=1,
        precision=settings.precision,
        zero_stage=settings.zero,
        max_norm=settings.grad_clip or math.inf,
        custom_policy=policy,
        zero_bucket_size_in_m=_bucket_m(settings),
        overlap_communication=device.type == "cuda",
        ddp_bucket_cap_mb=settings.bucket_mb,
        broadcast_buffers=False,
        **sequence,
    )
    exchanged: ProcessGroup = plugin.mixed_dp_group
    rank, world = plugin.pg_mesh.coordinate(plugin.dp_axis), total // (tp * sp)
    boosted = _boosted(plugin, model, _adam(trained, optimizer, device), settings, exchanged.size(), rank, world)
    policy.add_hooks()
    boosted.publish = lambda: _gather_masters(boosted.optimizer) if settings.zero else _copy_masters(boosted.optimizer)

    def holders(name: str, p: nn.Parameter, shape: tuple[int, ...]) -> list[Piece]:
        cut, alike, ranks = policy.cuts.get(name), 0, 1
        if cut is None:
            alike, ranks = plugin.tp_group.rank(), tp
        if settings.zero:
            return [_zero_piece(boosted.optimizer, name, p, shape, cut, exchanged, alike, ranks)]
        alike, ranks = exchanged.rank() * ranks + alike, exchanged.size() * ranks
        return [_whole_piece(boosted.optimizer, name, p, shape, cut, alike, ranks)]

    return boosted, holders


def _gemini(model, settings, optimizer, device, trained) -> tuple[Boosted, Holders]:
    if any(not p.requires_grad for p in model.parameters()):
        raise ConfigError("gemini trains all parameters; train LoRA, or with frozen weights, with zero2")
    gemini_optimizer._AVAIL_OPTIM_LIST.add(_GeminiAdam)  # its own need CUDA extensions compiled on the spot
    rank, world = dist.get_rank(), dist.get_world_size()
    total = sum(p.numel() for p in trained.values())
    # Chunks that are kept whole, as Gemini chooses for small models, multiply accumulated gradients by the ranks at
    # each micro-batch.
    chunks = {world: {"chunk_size": math.ceil(min(total, CHUNK) / world) * world, "keep_gathered": False}}
    plugin = GeminiPlugin(
        chunk_config_dict=chunks,
        precision=settings.precision,
        enable_gradient_accumulation=True,
        max_norm=settings.grad_clip or math.inf,
        pin_memory=device.type == "cuda",
        enable_async_reduce=device.type == "cuda",
    )
    names = {id(p): name for name, p in trained.items()}
    boosted = _boosted(plugin, model, _adam(trained, optimizer, device, _GeminiAdam), settings, world, rank, world)
    gemini = boosted.optimizer
    ids = {names[id(p)]: i for i, p in gemini.id_to_real_params.items()}
    boosted.publish = lambda: _update_chunks(gemini)
    return boosted, lambda name, p, shape: _gemini_pieces(gemini, ids[name], name, shape)


_BOOST = {"ddp": _ddp, "zero1": _zero, "zero2": _zero, "gemini": _gemini}


class _GeminiAdam(AdamW):
    """AdamW as Gemini calls it: gradients are bf16 and come with what to divide them by."""

    def step(self, closure: None = None, div_scale: float = -1) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                grad = p.grad.float()
                p.grad = grad.div_(div_scale) if div_scale > 0 else grad
        super().step()


def _boosted(plugin, model, adam, settings: EngineSettings, averaged: int, rank: int, world: int) -> Boosted:
    booster = Booster(plugin=plugin)
    model, wrapped, *_ = booster.boost(model, adam)
    return Boosted(model, wrapped, booster, settings, averaged, rank, world)


def _adam(
    trained: dict[str, nn.Parameter], s: OptimizerSettings, device: torch.device, cls: type[AdamW] = AdamW
) -> AdamW:
    return cls(
        list(trained.values()),
        lr=s.rate(0),
        betas=s.betas,
        eps=s.eps,
        weight_decay=s.weight_decay,
        fused=device.type == "cuda",
    )


def _bucket_m(settings: EngineSettings) -> int:
    """ZeRO counts a bucket's elements, in 2²⁰."""
    return max(1, settings.bucket_mb // (2 if settings.precision == "bf16" else 4))


def _start_moments(optimizer: OptimizerWrapper) -> None:
    """Adam's state as its first step would make it, so that it can be saved and loaded before."""
    ranges = getattr(optimizer, "param_to_range", {})  # Gemini's parameters are empty between steps
    for group in optimizer.param_groups:
        for p in group["params"]:
            shape = (ranges[p][1] - ranges[p][0],) if p in ranges else p.shape
            moments = {key: torch.zeros(shape, device=p.device) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.optim.state[p] = {
                "step": torch.zeros((), device=p.device if group["fused"] else "cpu"),
                **moments,
            }


def _whole_piece(optimizer, name: str, p: nn.Parameter, shape: tuple[int, ...], cut, alike: int, ranks: int) -> Piece:
    """Of a parameter that this many ranks hold whole, or the same cut of, this one the alike-th."""
    masters = getattr(optimizer, "working_to_master_map", None)
    master = masters[p] if masters else p
    return Piece(
        name,
        shape,
        cut,
        0,
        p.numel(),
        share(0, p.numel(), alike, ranks),
        lambda: _tensors(optimizer.optim, master, p.numel()),
    )


def _zero_piece(
    optimizer, name: str, p: nn.Parameter, shape: tuple[int, ...], cut, group: ProcessGroup, alike: int, ranks: int
) -> Piece:
    """ZeRO pads a parameter to a multiple of the ranks; each holds a slice."""
    master = optimizer.working_to_master_param[id(p)]
    start = min(master.numel() * group.rank(), p.numel())
    stop = min(start + master.numel(), p.numel())
    return Piece(
        name,
        shape,
        cut,
        start,
        stop,
        share(start, stop, alike, ranks),
        lambda: _tensors(optimizer.optim, master, stop - start),
    )


def _gemini_pieces(gemini, index: int, name: str, shape: tuple[int, ...]) -> list[Piece]:
    """Gemini packs parameters into chunks and slices those; a rank may have nothing of a parameter."""
    in_chunk, start, size = gemini.get_offsets(index)
    if size <= 0:
        return []
    fake = gemini.id_to_fake_params[index]
    chunk = gemini.param_to_chunk16[fake]

    def tensors() -> dict[str, Tensor]:
        return _tensors(gemini.optim, fake, size) | {"master": chunk.paired_chunk.payload[in_chunk : in_chunk + size]}

    return [Piece(name, shape, None, start, start + size, (start, start + size), tensors)]


def _tensors(adam: AdamW, master: Tensor, size: int) -> dict[str, Tensor]:
    state = adam.state[master]
    values = {"master": master, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
    return {key: value.detach().view(-1)[:size] for key, value in values.items()}


def _copy_masters(optimizer: OptimizerWrapper) -> None:
    for working, master in getattr(optimizer, "working_to_master_map", {}).items():
        working.data.copy_(master.data)


def _update_chunks(gemini: OptimizerWrapper) -> None:
    for chunk in gemini.chunk16_set:
        chunk.optim_update()


def _gather_masters(optimizer: LowLevelZeroOptimizer) -> None:
    for working, padded in optimizer._working_param_to_padded_working_param.items():
        master = optimizer.working_to_master_param[id(working)]
        dist.all_gather_into_tensor(
            padded, master.to(padded.device, padded.dtype), group=optimizer.param_to_pg[working]
        )
