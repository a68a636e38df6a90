"""What trainer, planner, exporter and sampler ask of a diffusion transformer, whichever it is.

A family of models is a package in `trainer.models` with a module `architecture`, whose class is found by that name
(`ARCHITECTURES`). Networks stay plain PyTorch: how ColossalAI splits one over processes is declared in
`trainer.engine.policies`, under the same name. Importing this takes no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.models.common.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from trainer.diffusion.rectified_flow import Velocity
    from trainer.models.common.settings import DiTModelSettings


@dataclass(frozen=True)
class Inputs:
    """Sizes that follow from the other models.

    Attributes:
        channels: of latents.
        states, pooled: features of a text's states and of its pooled vector; None: not known, the architecture's usual
            ones.
    """

    channels: int
    states: int | None = None
    pooled: int | None = None


@dataclass(frozen=True)
class Flops:
    """Operations (a multiplication and an addition are two) of one forward pass of one sample.

    Attributes:
        linear: of the blocks' linear layers; embeddings and modulation are left out (below a thousandth).
        attention: of q kᵀ and of weighing v.
    """

    linear: float
    attention: float

    @property
    def total(self) -> float:
        return self.linear + self.attention

    @property
    def training(self) -> float:
        """Forward and backward, nothing computed twice: three times the forward."""
        return 3 * self.total


class Architecture(ABC):
    """One architecture at the sizes of one model: a frozen dataclass, which crosses process boundaries.

    Attributes:
        kind: its name in settings; that of its package, with `-` for `_`.
        settings: its section `model` of the training settings.
        lora_targets: patterns of the names of linears that LoRA is put on where its settings say nothing.
        exact_inputs: of the model's forward, by keyword, that are never cast to bf16.
        fp8_kept: names, in a block, of linears that stay as they are when the others go into 8 bits.
        layouts: of weights, that it can be exported in; the usual one first.
        patch: side of a token, in latents.
        channels: of latents.
        head_features: of each attention head.
        takes_condition: whether given frames can be told to it.
    """

    kind: ClassVar[str]
    settings: ClassVar[type[DiTModelSettings]]
    lora_targets: ClassVar[tuple[str, ...]]
    exact_inputs: ClassVar[frozenset[str]] = frozenset()
    fp8_kept: ClassVar[frozenset[str]] = frozenset()
    layouts: ClassVar[tuple[str, ...]]

    # Which model

    @classmethod
    @abstractmethod
    def of_settings(cls, settings: Any, inputs: Inputs) -> Architecture:
        """The model that a training run asks for.

        Args:
            settings: of the class `settings`.
        """

    @classmethod
    @abstractmethod
    def of_file(cls, source: str | Path) -> Architecture:
        """The model whose weights a file has, by what it says of itself, else by names and shapes.

        Args:
            source: see `trainer.models.common.weights.read_weights`.

        Raises:
            ConfigError: it has no such model, or several.
        """

    @classmethod
    @abstractmethod
    def recognises(cls, names: Sequence[str]) -> bool:
        """Whether weights under these names are those of such a model."""

    @classmethod
    @abstractmethod
    def inputs_of(cls, state: Mapping[str, Tensor], settings: Any) -> Inputs:
        """The other models' sizes, by the shapes of a run's weights."""

    @property
    @abstractmethod
    def patch(self) -> int: ...

    @property
    @abstractmethod
    def channels(self) -> int: ...

    @property
    @abstractmethod
    def head_features(self) -> int: ...

    @property
    @abstractmethod
    def takes_condition(self) -> bool: ...

    # The network, and its weights

    @abstractmethod
    def build(self) -> nn.Module:
        """The network, with PyTorch's usual random weights; on the device meta in a `torch.device("meta")`."""

    @abstractmethod
    def initialise(self, model: nn.Module) -> None:
        """Random weights to train from."""

    @abstractmethod
    def load(
        self, source: str | Path, dtype: torch.dtype | None = None, allow_unexpected: Sequence[str] | None = None
    ) -> nn.Module:
        """The network with the weights of a file, on the CPU. An input for conditions that the file does not have
        starts at zero: it changes nothing.

        Args:
            dtype: None: the file's.
            allow_unexpected: patterns of names to leave behind; None: what a training run leaves behind.

        Raises:
            WeightsError, ConfigError, MissingDependency: weights that do not fit, or are not here.
        """

    @abstractmethod
    def exported(
        self, state: Mapping[str, Tensor], layout: str | None = None
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """A model's weights under the names of a release, and what their file says of itself.

        Args:
            layout: of `layouts`; None: that of the model.

        Raises:
            WeightsError: a state that is not that of the model.
        """

    # The work

    @abstractmethod
    def velocity(self, model: Any) -> Velocity:
        """The model on latents, `trainer.diffusion.rectified_flow.Velocity`.

        Args:
            model: the network, or what calls one (`Engine.forward`).
        """

    @abstractmethod
    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """The parts that are alike: compiled, quantised and moved one by one."""

    @abstractmethod
    def checkpoint_activations(self, model: nn.Module, settings: Any) -> None:
        """As the settings say (`recompute`): what blocks keep of the forward pass in training."""

    @abstractmethod
    def shallow(self, blocks: int) -> Architecture:
        """The same with at most so many blocks of each kind."""

    @abstractmethod
    def flops(self, tokens: int) -> Flops:
        """Of so many tokens, text included."""

    @abstractmethod
    def memory(self) -> dict[str, Any]:
        """Sizes that memory is reckoned by: values of `trainer.planning.settings.MemorySettings`."""

    def tokens(self, latent: Sequence[int]) -> int:
        """Of a video, text left out.

        Args:
            latent: frames, height, width of its latents.
        """
        return prod(latent) // self.patch**2


ARCHITECTURES: Registry[Architecture] = Registry("architecture", "trainer.models", "architecture")
DEFAULT = "mmdit"
"""Where nothing is said; its reader explains what is wrong with a file that no architecture recognises."""


def architecture_of(source: str | Path) -> Architecture:
    """The architecture and the sizes of the model in a file of weights.

    Raises:
        ConfigError, MissingDependency: no model in it; not here.
    """
    from trainer.models.common.weights import read_weights

    names = list(read_weights(source))
    families = (ARCHITECTURES.get(name) for name in ARCHITECTURES.names())
    family = next((family for family in families if family.recognises(names)), ARCHITECTURES.get(DEFAULT))
    return family.of_file(source)
