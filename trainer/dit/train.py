"""`datakit train dit`: the DiT's task under the engine and the loop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from datakit.errors import ConfigError
from trainer.data.dataloader import Batch, Replacement
from trainer.dit.task import DiTTask, architecture_for, build_frozen, build_model
from trainer.engine import Engine
from trainer.engine.engine import together
from trainer.latents.index import locate
from trainer.models.autoencoders.base import Autoencoder
from trainer.models.autoencoders.build import autoencoder_hash
from trainer.models.common.attention import describe
from trainer.models.common.compile import check_gradients
from trainer.planning.plan import Bucket
from trainer.settings import DiTSettings
from trainer.training.collectives import share_out
from trainer.training.loop import Ended, train
from trainer.training.preview import write_video
from trainer.training.setup import Latents, Prepared, Request, fit_to, prepare
from trainer.training.task import Learned

CHECKED_BLOCKS = 2
"""Of either kind, in the model whose compiled gradients are compared with eager ones."""

CAPTIONS_SEEN = 64
"""Windows looked at for each caption that a preview takes: those of one clip share it."""


def train_dit(request: Request, settings: DiTSettings) -> Ended:
    """Train on every process that takes part; each calls this.

    Raises:
        ConfigError, CatalogError, MissingDependency: what keeps it from starting, before any model is moved or file
            written.
        NotFinite, DatakitError: see `trainer.training.loop.Loop.run`.
    """
    autoencoder, encoder = build_frozen(settings)
    architecture = architecture_for(settings.model, autoencoder, encoder)
    fitted = fit_to(autoencoder, architecture.patch, encoder.length, architecture.memory())
    prepared = prepare(request, settings, fitted, "train dit")
    task = DiTTask(settings, autoencoder, encoder, prepared.device)
    model = build_model(settings.model, architecture, settings.seed).to(prepared.device)
    if settings.engine.compile and settings.check_compile:
        check_compiled(task, max(prepared.plan.buckets, key=lambda b: b.tokens), prepared.device)
    if prepared.main and not request.quiet:
        dtype = torch.bfloat16 if settings.engine.precision == "bf16" else torch.float32
        print(describe(prepared.device, dtype, architecture.head_features), flush=True)
    engine = Engine(model, settings.engine, settings.optimizer, prepared.device, architecture)
    return train(prepared, DiTTraining(prepared, task, engine), latents_of(prepared, autoencoder))


def latents_of(prepared: Prepared, autoencoder: Autoencoder) -> Latents | None:
    """The index of cached latents, if the settings ask for them; made on rank 0.

    Raises:
        ConfigError: there are none, or stale ones.
    """
    wanted = prepared.settings.loader.latents
    if wanted == "no":
        return None
    found: list[Any] = [None]

    def find() -> None:
        located = locate(prepared.plan, autoencoder_hash(autoencoder), prepared.folder / "latents.arrow")
        if wanted == "only" and located.missing:
            raise ConfigError(
                f"{located.missing} of {located.found + located.missing} windows have no latents: run `datakit run "
                f"encode`, "
                "or set loader.latents='if there' to read their frames"
            )
        if prepared.record:
            prepared.record.reads_latents(located.versions)
        found[0] = [Replacement(0, 0, b.window, b.window, b.kind, b.message) for b in located.broken]

    together(lambda: find() if prepared.main else None)
    dist.broadcast_object_list(found)
    return Latents(prepared.folder / "latents.arrow", tuple(found[0]))


class DiTTraining:
    """A DiT under an engine, see `trainer.training.task.Task`."""

    def __init__(self, prepared: Prepared, task: DiTTask, engine: Engine):
        self.prepared, self.task, self.engine, self.settings = prepared, task, engine, task.settings
        self.engines: Mapping[str, Engine] = {"model": engine}

    def learn(self, step: int, batch: Batch, last: bool) -> Learned:
        sampled = self.task.sample(self.engine.forward, batch)
        loss = sampled.losses.mean()
        self.engine.backward(loss * batch.weight, last)
        flops = len(batch.clip_ids) * self.task.architecture.flops(batch.bucket.tokens).training
        return Learned(sampled.losses.detach(), {"loss": loss.detach()}, sampled.times, flops)

    def update(self, step: int) -> float:
        return self.engine.step()

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """The loss, whole and at every noise level."""
        levels = self.settings.validation.levels
        losses = self.task.validate(self.engine.forward, batch, levels)
        at_levels = {f"loss_at_{level:g}": of_level for level, of_level in zip(levels, losses)}
        return {"loss": losses.double().mean(0), **at_levels}

    def preview(self, folder: Path) -> None:
        """Each rank makes some, and all as many: sharded models need every rank in every forward."""
        options = self.settings.preview
        bucket, rows = self.prepared.plan.commonest_bucket()
        captions = list(dict.fromkeys(c for c in rows["caption"].to_pylist()[: CAPTIONS_SEEN * options.count] if c))
        prompts = (options.prompts or captions or [""])[: options.count]
        fps = rows["fps"][0].as_py()
        for number, words in share_out([*enumerate(prompts)], self.engine.rank, self.engine.world):
            made = self.task.preview(self.engine.forward, words, (bucket.frames, bucket.height, bucket.width), fps)
            write_video(made, folder / f"{number:02d}.mp4", fps)
        if self.prepared.main:
            (folder / "prompts.txt").write_text(
                "".join(f"{number:02d} {words}\n" for number, words in enumerate(prompts))
            )


def check_compiled(task: DiTTask, bucket: Bucket, device: torch.device) -> float:
    """Whether a few blocks of the model's sizes, compiled, have eager's gradients at a bucket's shape (`WrongGradients`
    if not)."""
    shallow = task.architecture.shallow(CHECKED_BLOCKS)
    dtype = torch.bfloat16 if task.settings.engine.precision == "bf16" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        model = shallow.build().to(device, dtype)
        for parameter in model.parameters():
            if parameter.ndim > 1:  # gates that start at zero would hide what is behind them
                torch.nn.init.normal_(parameter, std=0.02)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    channels, *latent = task.autoencoder.latent_shape(bucket.frames, bucket.height, bucket.width)
    encoder = task.texts.encoder
    inputs = (
        random(bucket.batch, channels, *latent),
        random(bucket.batch, channels + 1, *latent),
        random(bucket.batch, encoder.length, encoder.states_size),
        random(bucket.batch, encoder.pooled_size),
        torch.rand(bucket.batch, generator=generator, device=device),
    )
    return check_gradients(model, shallow.blocks(model), lambda m: shallow.velocity(m)(*inputs).float().square().mean())
