"""What a run of `train dit` shows its model, noted from the running job, sample by sample."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from torch import Tensor

from trainer.data.dataloader import Batch
from trainer.engine import Engine
from trainer.training.loop import Loop
from trainer.training.task import Stepped

INPUTS = ("img", "cond", "timesteps", "txt", "y_vec")
"""Of the model: noised latents, condition, time, and text as it was dropped or not. All that is drawn is in them."""


@dataclass(frozen=True)
class Shown:
    """A sample that counted.

    Attributes:
        window: row of the plan.
        inputs: what the model was called with, of this sample.
    """

    step: int
    window: int
    clip: str
    seed: int
    inputs: dict[str, Tensor]
    loss: float

    @property
    def digest(self) -> str:
        """Of the inputs' bits."""
        return hashlib.sha1(b"".join(self.inputs[name].numpy().tobytes() for name in INPUTS)).hexdigest()


class Watch:
    """While entered, notes what steps of this process's runs are made of, and does what they do.

    Args:
        after: called with the index of a step that was taken.

    Attributes:
        shown: in the order of the steps.
    """

    def __init__(self, after: Callable[[int], None] = lambda index: None):
        self.shown: list[Shown] = []
        self._after = after
        self._calls: list[dict[str, Tensor]] = []

    def __enter__(self) -> Watch:
        train_step, next_batches, forward = Loop.train_step, Loop._next_batches, Engine.forward

        def noting_forward(engine: Engine, *args: Any, **inputs: Any) -> Any:
            self._calls.append({name: inputs[name].detach().clone() for name in INPUTS})
            return forward(engine, *args, **inputs)

        def noting_batches(loop: Loop) -> tuple[list[Batch], float]:
            batches, waited_s = next_batches(loop)
            self._calls.clear()
            self._batches = batches
            return batches, waited_s

        def noting_step(loop: Loop) -> Stepped:
            index = loop.step
            stepped = train_step(loop)
            self._note(index, self._batches, stepped)
            self._after(index)
            return stepped

        self._patches = ExitStack()
        self._patches.enter_context(patch.object(Engine, "forward", noting_forward))
        self._patches.enter_context(patch.object(Loop, "_next_batches", noting_batches))
        self._patches.enter_context(patch.object(Loop, "train_step", noting_step))
        return self

    def __exit__(self, *exc: Any) -> None:
        self._patches.close()

    def _note(self, index: int, batches: list[Batch], stepped: Stepped) -> None:
        of_samples = [loss for losses in stepped.losses for loss in losses.tolist()]
        losses = iter(zip(of_samples, stepped.clips, strict=True))
        for batch, call in zip(batches, self._calls, strict=True):
            for i in range(len(batch.windows) if batch.weight else 0):
                loss, clip = next(losses)
                assert clip == batch.clip_ids[i]
                inputs = {name: value[i] for name, value in call.items()}
                self.shown.append(Shown(index, batch.windows[i], clip, batch.seeds[i], inputs, loss))
