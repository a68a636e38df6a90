"""What `datakit train` can train: the settings that each takes, and the function that every process calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trainer.dit.train import train_dit
from trainer.settings import DiTSettings, RunSettings
from trainer.training.loop import Ended
from trainer.training.setup import Request
from trainer.vae.settings import VAESettings
from trainer.vae.train import train_vae


@dataclass(frozen=True)
class Trainable:
    settings: type[RunSettings]
    train: Callable[[Request, Any], Ended]


TRAINABLES = {"dit": Trainable(DiTSettings, train_dit), "vae": Trainable(VAESettings, train_vae)}
