"""Exponential moving average of the master weights; each rank keeps that of what it owns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.engine.sharded_state import Piece


class Ema:
    """After each update: average ← decay · average + (1 − decay) · weights.

    Attributes:
        values: by a parameter's name, [owned] float32.
    """

    def __init__(self, pieces: Sequence[Piece], decay: float):
        self._pieces, self.decay = pieces, decay
        self.values: dict[str, Tensor] = {p.name: own.clone() for p, own in zip(pieces, self._masters())}

    @torch.no_grad()
    def update(self) -> None:
        if self._pieces:
            torch._foreach_lerp_(list(self.values.values()), self._masters(), 1 - self.decay)

    def _masters(self) -> list[Tensor]:
        return [piece.own(piece.tensors()["master"]) for piece in self._pieces]
