"""Which autoencoders there are: the modules of `kinds`, each with a class that says what it is called, what its sizes
are, and which weights come with it (`trainer.models.autoencoders.base.Autoencoder`). Importing this takes no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.models.common.registry import Registry

if TYPE_CHECKING:
    from trainer.models.autoencoders.base import Autoencoder

AUTOENCODERS: Registry[Autoencoder] = Registry("autoencoder", "trainer.models.autoencoders.kinds")
