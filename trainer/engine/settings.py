"""Settings of the engine and of the optimizer, and the learning rate they ask for."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from datakit.config import Section

Plugin = Literal["ddp", "zero1", "zero2", "gemini", "hybrid"]


class EngineSettings(Section):
    """How a model is spread over processes.

    `ddp`: everything on every rank. `zero1`, `zero2`: optimizer state sharded; with `zero2` gradients too (each
        micro-batch is
    reduced). `gemini`: weights sharded too (ZeRO-3), bf16 only. `hybrid`: an MMDiT by tensor (`tp`) and sequence (`sp`)
    parallelism with ZeRO of stage `zero` over the rest.
    """

    plugin: Plugin = "ddp"
    """How the model is spread over processes; see docs/train.md."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Number format of the computation; master weights stay float32."""
    tp: int = Field(1, ge=1)
    """Processes that share each layer (tensor parallelism; hybrid)."""
    sp: int = Field(1, ge=1)
    """Processes that share each sequence (Ulysses; hybrid)."""
    zero: Literal[0, 1, 2] = 0
    """ZeRO stage within hybrid."""
    grad_clip: float | None = Field(1.0, gt=0)
    """Most that the norm of all gradients may be."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of an average of the weights; null: none."""
    compile: bool = False
    """Compile an MMDiT's blocks, see `trainer.models.common.compile`."""
    bucket_mb: int = Field(50, ge=1)
    """Gradients are exchanged in messages of about this size."""

    @model_validator(mode="after")
    def _fits(self) -> EngineSettings:
        if self.plugin != "hybrid" and (self.tp > 1 or self.sp > 1 or self.zero):
            raise ValueError(f"tp, sp and zero belong to the plugin hybrid, not to {self.plugin}")
        if self.precision == "fp32" and (self.plugin == "gemini" or self.zero):
            raise ValueError("gemini, and hybrid with zero, train in bf16 only (their masters are fp32)")
        if self.plugin == "gemini" and self.compile:
            raise ValueError("gemini cannot be compiled: it moves weights in and out between operations")
        if self.tp > 1 and self.compile:
            raise ValueError(
                "tp cannot be compiled: torch.compile does not take how ColossalAI's linears exchange gradients; use sp"
            )
        return self


class OptimizerSettings(Section):
    """AdamW, as Open-Sora 2.0 trains (its Adam: eps 1e-15, no weight decay; arXiv:2503.09642), and the course of its
    rate.

    The rate rises linearly over `warmup` steps; then it is constant, or falls as a half cosine to `final` times itself
    at `steps`.
    """

    lr: float = Field(5e-5, gt=0)
    """Learning rate after warmup."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of Adam's two moments."""
    eps: float = Field(1e-15, gt=0)
    """Added to the denominator of Adam."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay (AdamW)."""
    warmup: int = Field(0, ge=0)
    """Steps over which the learning rate rises from 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Of the learning rate after warmup."""
    steps: int | None = Field(None, ge=1)
    """Steps until the cosine ends; null: those of the run."""
    final: float = Field(0.0, ge=0, le=1)
    """Share of the learning rate at the end of the cosine."""

    @model_validator(mode="after")
    def _fits(self) -> OptimizerSettings:
        if self.schedule == "cosine" and (self.steps is None or self.steps <= self.warmup):
            raise ValueError("a cosine schedule needs steps, more than warmup")
        return self

    def rate(self, step: int) -> float:
        """Learning rate of the step with this index, from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.lr
        done = min(1.0, (step - self.warmup) / (self.steps - self.warmup))
        return self.lr * (self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2)
