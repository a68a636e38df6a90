"""LAION's aesthetic rating, from embeddings that are in the catalog.

Its heads are linear, so the mean rating of a clip's frames follows from their mean embedding.
"""

from __future__ import annotations

import numpy as np

from datakit.columns import Column
from datakit.config import Section
from datakit.errors import ConfigError, MissingDependency
from pipelines.stages.base import EmbeddingStage, StageSettings

HEADS = {
    "v1": {
        "ViT-B-32/openai": "sa_0_4_vit_b_32_linear",
        "ViT-B-16/openai": "sa_0_4_vit_b_16_linear",
        "ViT-L-14/openai": "sa_0_4_vit_l_14_linear",
    },
    "v2": {"ViT-L-14/openai": "sac+logos+ava1-l14-linearMSE"},
}
"""LAION's aesthetic heads by the CLIP whose embeddings they take: v1 linear (github.com/LAION-AI/aesthetic-predictor),
v2 a stack of linear layers (github.com/christophschuhmann/improved-aesthetic-predictor)."""


class Aesthetic(EmbeddingStage):
    """LAION's heads (v1, v2) on the CLIP embeddings, mean over frames; looks at no picture.

    Args:
        head: its file.
    """

    name = "aesthetic"
    version = "1"
    order = 120
    columns = (
        Column("aesthetic", "float32", "about 1..10", "LAION predictor on CLIP embeddings, mean over frames", good=1),
    )
    weights = ("head",)
    requires = (("torch", "clip"),)

    class Settings(StageSettings):
        enabled: bool = False
        """whether this stage runs"""
        head: str = "auto"
        """LAION head: v1, v2, a file; auto: the newest for embed.model"""

    def __init__(self, head: str):
        self._path = head
        self._head = load_head(head)

    @classmethod
    def resolved(cls, section: Section, model: str, folder: str) -> Section:
        return section.model_copy(update={"head": find_head(getattr(section, "head", "auto"), model, folder)})

    def rate(self, vectors: np.ndarray, norms: np.ndarray, model: str) -> dict[str, np.ndarray]:
        weight, _ = self._head
        if vectors.shape[1] != len(weight):
            raise ConfigError(
                f"{self._path} is for embeddings of length {len(weight)}, those of {model} have {vectors.shape[1]}"
            )
        return {"aesthetic": aesthetic_of(vectors, norms, self._head)}


def find_head(version: str, model: str, folder: str) -> str:
    """File of the aesthetic head for the embeddings of `model`.

    Args:
        version: v1, v2, a file, or auto.
        folder: where weights lie.

    Raises:
        ConfigError: there is none for this model, or it is not here.
    """
    from datakit.weights.registry import locate

    if version == "auto":
        version = next((each for each in ("v2", "v1") if model in HEADS[each]), "v1")
    name = version
    if version in HEADS:
        if model not in HEADS[version]:
            raise ConfigError(
                f"LAION has no aesthetic head {version} for {model}: there are {', '.join(HEADS[version])}; a head of "
                f"your own: --set aesthetic.head=FILE"
            )
        name = HEADS[version][model]
    try:
        return str(locate(name, folder))
    except MissingDependency as e:
        raise ConfigError(f"stage aesthetic cannot run: {e}") from e


def load_head(path: str) -> tuple[np.ndarray, float]:
    """An aesthetic head as one linear map: weight float64 [d] and bias.

    The v2 predictor is a stack of linear layers with nothing but dropout between them, so it is one, too.

    Raises:
        ConfigError: the file is no such head.
    """
    import torch

    state = torch.load(path, map_location="cpu", weights_only=True)
    names = [name.removesuffix("weight") for name in state if name.endswith("weight")]
    weight, bias = None, 0.0
    for name in sorted(names, key=lambda n: [int(part) if part.isdigit() else -1 for part in n.split(".")]):
        matrix, offset = (state[name + part].double().numpy() for part in ("weight", "bias"))
        weight, bias = (matrix, offset) if weight is None else (matrix @ weight, matrix @ bias + offset)
    if weight is None or weight.shape[0] != 1:
        raise ConfigError(f"{path} is not an aesthetic head: linear layers that end in one number were expected")
    return weight[0], float(bias[0])


def aesthetic_of(vectors: np.ndarray, norms: np.ndarray, head: tuple[np.ndarray, float]) -> np.ndarray:
    """Mean over frames of the head's rating, float64 [n]: what is linear in unit vectors is linear in their mean.

    Args:
        vectors: float32 [n, d], of unit length; norms: [n], the lengths of the means.
    """
    weight, bias = head
    return norms * (vectors @ weight) + bias
