"""The DiT's task: what a micro-batch is worth, how good the model is on clips it does not train on, and what it makes
of a prompt."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from datakit.errors import ConfigError
from datakit.hashing import seed_of
from trainer.data.dataloader import Batch
from trainer.diffusion.conditioning import MODES, given_condition
from trainer.diffusion.prompt_format import motion_score, prompt
from trainer.diffusion.rectified_flow import (
    Guidance,
    Text,
    condition,
    denoise,
    losses,
    noised,
    shift,
    training_time,
)
from trainer.diffusion.sample_randomness import draw
from trainer.models.autoencoders.base import Autoencoder, pixels
from trainer.models.autoencoders.build import load_autoencoder
from trainer.models.common.dit_architecture import ARCHITECTURES, Architecture, Inputs
from trainer.models.common.lora import add_lora
from trainer.models.common.settings import DiTModelSettings
from trainer.models.common.text_encoders import TextEncoder, build_text_encoder
from trainer.settings import DiTSettings

MIB = 1 << 20


@dataclass(frozen=True)
class Sampled:
    """What came of a micro-batch.

    Attributes:
        losses: [B] float32, with a graph.
        times: [B] noise levels, 0 to 1.
    """

    losses: Tensor
    times: Tensor


class Texts:
    """Prompts to texts, on a device; those that come again are kept.

    Each is encoded by itself, so that what it gives does not depend, to the last bit, on which others come with it, and
    a resumed run is the unbroken one. (T5-XXL on an H100: 0.033 s for one prompt, 0.375 s for 16.)

    Args:
        cache_mb: for them. 0 keeps none but the empty prompt.
    """

    def __init__(self, encoder: TextEncoder, cache_mb: int):
        self.encoder, self._room = encoder, cache_mb * MIB
        self._kept: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()
        self._bytes = 0
        self.empty = encoder.encode([""])

    def __call__(self, prompts: Sequence[str]) -> Text:
        found = {p: self._one(p) for p in dict.fromkeys(prompts)}
        return Text(*(torch.cat([found[p][i] for p in prompts]) for i in (0, 1)))

    def _one(self, prompt: str) -> tuple[Tensor, Tensor]:
        if prompt in self._kept:
            self._kept.move_to_end(prompt)
            return self._kept[prompt]
        text = self.encoder.encode([prompt])
        self._kept[prompt] = text.states, text.pooled
        self._bytes += text.states.nbytes + text.pooled.nbytes
        while self._bytes > self._room:
            _, (states, pooled) = self._kept.popitem(last=False)
            self._bytes -= states.nbytes + pooled.nbytes
        return text.states, text.pooled


class DiTTask:
    """The task of training a DiT, on one device.

    Args:
        autoencoder, encoder: frozen, moved to the device.
    """

    def __init__(self, settings: DiTSettings, autoencoder: Autoencoder, encoder: TextEncoder, device: torch.device):
        self.settings, self.device = settings, device
        self.autoencoder = autoencoder.requires_grad_(False).eval().to(device)
        self.texts = Texts(encoder.to(device), settings.text.cache_mb)
        self.architecture = architecture_for(settings.model, autoencoder, encoder)
        self.patch = self.architecture.patch
        self.tiles = autoencoder.tiles if settings.autoencoder.tiled else None

    def sample(self, model: Callable[..., Tensor], batch: Batch) -> Sampled:
        """Losses of a micro-batch, everything random drawn from the samples' seeds.

        Args:
            model: of the architecture, or what calls one (`Engine.forward`).
        """
        shape = self.autoencoder.latent_shape(batch.bucket.frames, batch.bucket.height, batch.bucket.width)
        drawn = draw(batch.seeds, shape, batch.bucket.frames, self.settings.conditions, self.settings.dropout)
        mean, std = self.latents(batch)
        latents = mean + std * drawn.spread.to(mean)
        cond = self._condition(batch, drawn.modes, mean)
        text = self._dropped(self._text(batch), drawn.no_states, drawn.no_pooled)
        times = training_time(drawn.normal, shift(*shape[1:], self.patch)).to(self.device)
        return Sampled(self._losses(model, latents, drawn.noise.to(latents), times, cond, text), times)

    @torch.no_grad()
    def validate(self, model: Callable[..., Tensor], batch: Batch, levels: Sequence[float]) -> Tensor:
        """Losses [levels, B] from text alone, at fixed noise: a clip's depends on the clip and the level, not on the
        batch."""
        shape = self.autoencoder.latent_shape(batch.bucket.frames, batch.bucket.height, batch.bucket.width)
        mean, _ = self.latents(batch)
        text, cond = self._text(batch), condition(torch.zeros_like(mean[:, :1]), torch.zeros_like(mean))
        found = []
        for level in levels:
            seeds = [fixed_seed(clip, level) for clip in batch.clip_ids]
            noise = draw(seeds, shape, batch.bucket.frames, {"t2v": 1.0}, 0.0).noise.to(mean)
            found.append(
                self._losses(model, mean, noise, torch.full((len(seeds),), level, device=self.device), cond, text)
            )
        return torch.stack(found)

    @torch.no_grad()
    def latents(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean and std of each sample, [B, c, T', H', W'], float32, as read or encoded now."""
        shape = (
            len(batch.windows),
            *self.autoencoder.latent_shape(batch.bucket.frames, batch.bucket.height, batch.bucket.width),
        )
        mean, std = torch.empty(shape, device=self.device), torch.empty(shape, device=self.device)
        raw = torch.zeros(len(batch.windows), dtype=torch.bool)
        raw[batch.raw] = True
        if batch.mean is not None:
            mean[~raw], std[~raw] = batch.mean.to(self.device).float(), batch.std.to(self.device).float()
        if batch.video is not None:
            encoded = self.autoencoder.encode(self._video(batch), self.tiles)
            mean[raw], std[raw] = encoded.mean.float(), encoded.std.float()
        return mean, std

    @torch.no_grad()
    def preview(self, model: Callable[..., Tensor], words: str, shape: tuple[int, int, int], fps: float) -> Tensor:
        """A video of a prompt, [3, T, H, W] in −1..1; always of the same noise.

        Args:
            shape: frames, height, width.
        """
        options = self.settings.preview
        size = self.autoencoder.latent_shape(*shape)
        noise = draw([fixed_seed(words, 0)], size, shape[0], {"t2v": 1.0}, 0.0).noise.to(self.device)
        nothing = condition(torch.zeros_like(noise[:, :1]), torch.zeros_like(noise))
        text, guidance = self.texts([prompt(words, fps)]), Guidance(options.guidance, 1.0)
        velocity = self.architecture.velocity(model)
        latents = denoise(velocity, noise, nothing, text, self.texts.empty, options.steps, guidance, self.patch)
        return self.autoencoder.decode(latents.to(next(self.autoencoder.parameters()).dtype), self.tiles)[0]

    def _losses(
        self, model: Callable[..., Tensor], latents: Tensor, noise: Tensor, times: Tensor, cond: Tensor, text: Text
    ) -> Tensor:
        seen, target = noised(latents, noise, times)
        return losses(self.architecture.velocity(model)(seen, cond, text.states, text.pooled, times), target)

    def _video(self, batch: Batch) -> Tensor:
        return pixels(batch.video.to(self.device), self.autoencoder)

    def _condition(self, batch: Batch, modes: Sequence[str], mean: Tensor) -> Tensor:
        """[B, c + 1, T', H', W'], of each sample by its mode."""
        cond = condition(torch.zeros_like(mean[:, :1]), torch.zeros_like(mean))
        video = self._video(batch) if batch.video is not None else None
        with torch.no_grad():
            for i, mode in enumerate(modes):
                given = MODES[mode]
                if not (given.head or given.tail):
                    continue
                if i in batch.raw:
                    row = batch.raw.index(i)
                    frames = video[row : row + 1]
                elif given.tail or not self.autoencoder.causal:
                    raise ConfigError(
                        f"condition {mode} needs the frames of clip {batch.clip_ids[i]}, of which only the latent is "
                        f"read: "
                        "set loader.latents=no, or conditions to those of the start (with a causal autoencoder)"
                    )
                else:
                    frames = mean.new_zeros(
                        1, 3, batch.bucket.frames, 1, 1
                    )  # not looked at: the latents of the start serve
                cond[i] = given_condition(frames, given, self.autoencoder, mean[i : i + 1], self.tiles)[0]
        return cond

    def _text(self, batch: Batch) -> Text:
        return self.texts(
            [prompt(c or "", fps, motion_score(m)) for c, fps, m in zip(batch.captions, batch.fps, batch.motion_vmaf)]
        )

    def _dropped(self, text: Text, no_states: Tensor, no_pooled: Tensor) -> Text:
        empty = self.texts.empty
        return Text(
            torch.where(no_states.to(self.device)[:, None, None], empty.states, text.states),
            torch.where(no_pooled.to(self.device)[:, None], empty.pooled, text.pooled),
        )


def fixed_seed(text: str, number: float) -> int:
    """63 bits that depend on both."""
    return seed_of(f"{text}/{number}", "datakit-fixed")


def build_frozen(settings: DiTSettings) -> tuple[Autoencoder, TextEncoder]:
    """The autoencoder and the text encoder, on the CPU.

    Raises:
        ConfigError, MissingDependency: weights that are not given, not here, or do not fit.
    """
    return load_autoencoder(settings.autoencoder), build_text_encoder(settings.text.kind, **settings.text.options)


def architecture_for(settings: DiTModelSettings, autoencoder: Autoencoder, encoder: TextEncoder) -> Architecture:
    """The architecture that the settings name, at their sizes and those of the frozen models."""
    inputs = Inputs(autoencoder.channels, encoder.states_size, encoder.pooled_size)
    return ARCHITECTURES.get(settings.architecture).of_settings(settings, inputs)


def build_model(settings: DiTModelSettings, architecture: Architecture, seed: int) -> nn.Module:
    """The network to train, on the CPU, float32: from its weights or random ones."""
    if settings.weights is not None:
        model = architecture.load(settings.weights, torch.float32)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = architecture.build()
            architecture.initialise(model)
    architecture.checkpoint_activations(model, settings)
    if settings.lora is not None:
        add_lora(model, settings.lora, seed, architecture.lora_targets)
    return model
