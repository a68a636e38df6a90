"""What the training loop asks of a task: what a micro-batch teaches, how good the model is, what it makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from trainer.data.dataloader import Batch
from trainer.engine import Engine


@dataclass(frozen=True)
class Learned:
    """What a micro-batch came to; nothing here has a graph.

    Attributes:
        losses: [B] float32, of each sample.
        values: means over the batch, to log.
        times: [B] noise levels that the losses are of; None: they are not for the catalogs.
        flops: of the forward and the backward pass.
    """

    losses: Tensor
    values: dict[str, Tensor]
    times: Tensor | None = None
    flops: float = 0.0


class Task(Protocol):
    """What the loop trains.

    Attributes:
        engines: their state is in checkpoints; the first one says which samples are this rank's.
    """

    engines: Mapping[str, Engine]

    def learn(self, step: int, batch: Batch, last: bool) -> Learned:
        """Forward and backward pass of a micro-batch, whose losses count `batch.weight`.

        Args:
            last: of the step.
        """
        ...

    def update(self, step: int) -> float:
        """Change the weights by the step's gradients. Gives the gradients' norm."""
        ...

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """Numbers of every sample, [B] each: always the same ones, however the samples come together."""
        ...

    def preview(self, folder: Path) -> None:
        """Files to look at. Every rank takes part."""
        ...


@dataclass
class Stepped:
    """What the micro-batches of one step came to on this rank. Those of weight 0 are repeats and do not count.

    Attributes:
        values: this rank's share of the step's mean, on the device (data-parallel ranks are added up).
        losses: of every sample; clips: theirs.
        norm: of the whole gradient.
        tokens, flops: worked on by this rank.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    losses: list[Tensor] = field(default_factory=list)
    clips: list[str] = field(default_factory=list)
    norm: float = 0.0
    tokens: int = 0
    flops: float = 0.0

    def add(self, batch: Batch, learned: Learned) -> None:
        for name, value in learned.values.items():
            self.values[name] = self.values.get(name, 0) + value * batch.weight
        self.losses.append(learned.losses)
        self.clips += batch.clip_ids
        self.tokens += batch.bucket.tokens * len(batch.clip_ids)
        self.flops += learned.flops
