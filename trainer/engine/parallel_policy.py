"""How an architecture is split over processes by tensor and sequence parallelism: ColossalAI's policy, and what an
engine asks of it besides."""

from __future__ import annotations

from typing import ClassVar

from colossalai.shardformer.policies.base_policy import Policy
from torch import nn

from datakit.errors import ConfigError
from trainer.engine.sharded_state import Cut
from trainer.models.common.dit_architecture import Architecture
from trainer.models.common.registry import Registry


class ParallelPolicy(Policy):
    """For `HybridParallelPlugin(custom_policy=...)` and `ShardFormer`.

    Attributes:
        kind: of the architecture.
        cuts: after boosting, by parameter's name, what this rank has of those that are cut.
    """

    kind: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.cuts: dict[str, Cut] = {}

    def add_hooks(self) -> None:
        """What remains to be done when the parameters are what they will be (after boosting)."""


POLICIES: Registry[ParallelPolicy] = Registry("parallel policy", "trainer.engine.policies")


def policy_for(architecture: Architecture | None, model: nn.Module) -> ParallelPolicy:
    """Raises:
    ConfigError: nothing says how such a model is split.
    """
    if architecture is None or architecture.kind not in POLICIES.names():
        what = f"a {type(model).__name__}" if architecture is None else f"the architecture {architecture.kind}"
        raise ConfigError(
            f"tensor and sequence parallelism (the plugin hybrid) split {', '.join(POLICIES.names())}, not {what}: "
            f"train with ddp, zero1 or zero2, sample in one process"
        )
    return POLICIES.get(architecture.kind)()
