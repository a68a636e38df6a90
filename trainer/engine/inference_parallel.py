"""One diffusion transformer over several processes without training it: each call is made by all of them, with the
same inputs and the same result."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from pipelines.executor.actor_pool import Member
from trainer.models.common.dit_architecture import Architecture

PATIENCE_S = 1800.0


def join_group(
    member: Member, tp: int, sp: int, device: torch.device, architecture: Architecture
) -> Callable[[nn.Module], nn.Module]:
    """Meet the other processes; gives what splits a model (on the CPU, in place) by tensor and sequence parallelism.

    Args:
        tp: processes that share heads and features; sp: that share tokens. Their product is the group's size.

    Raises (what it gives):
        ConfigError: heads or features that do not divide.
    """
    if tp * sp != member.size:
        raise AssertionError(f"tp {tp} times sp {sp} is not {member.size}")
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        init_method=f"tcp://{member.address}:{member.port}",
        rank=member.rank,
        world_size=member.size,
        timeout=timedelta(seconds=PATIENCE_S),
    )
    by_tp = [dist.new_group(list(range(start, start + tp))) for start in range(0, member.size, tp)]
    by_sp = [dist.new_group(list(range(start, member.size, tp))) for start in range(tp)]
    groups = by_tp[member.rank // tp], by_sp[member.rank % tp]
    return lambda model: _split(model, *groups, device, architecture)


def _split(
    model: nn.Module, tp: dist.ProcessGroup, sp: dist.ProcessGroup, device: torch.device, architecture: Architecture
) -> nn.Module:
    from colossalai.shardformer import ShardConfig, ShardFormer

    from trainer.engine.cpu_accelerator import pretend
    from trainer.engine.parallel_policy import policy_for

    if device.type == "cpu":
        pretend()
    config = ShardConfig(
        tensor_parallel_process_group=tp,
        enable_tensor_parallelism=tp.size() > 1,
        sequence_parallel_process_group=sp,
        enable_sequence_parallelism=sp.size() > 1,
        sequence_parallelism_mode="all_to_all" if sp.size() > 1 else None,
    )
    model.requires_grad_(True)  # the policy, made for training, refuses weights that are frozen
    model, _ = ShardFormer(config).optimize(model, policy_for(architecture, model))
    return model.requires_grad_(False)
