"""What a stage is: one class, whose attributes are all that the rest of datakit knows of it.

A new score is a module of this folder with such a class, and a test:

    class Redness(FrameStage):
        \"\"\"Mean share of red in the picture.\"\"\"

        name = "redness"
        version = "1"
        columns = (Column("redness", "float32", "0..1", "mean share of red", good=-1),)

        def frame(self, picture: Picture) -> float: ...
        def summarise(self, values: Sequence[float]) -> dict[str, object]: ...

Nothing else names it: the registry finds the module; settings, schema, recipes, browser, report, `doctor` and the list
of scores read the class. The module is imported wherever one of them is: it imports nothing of the catalog, and heavy
libraries (OpenCV, PyTorch …) only inside its functions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from datakit.columns import Column
from datakit.config import Section

if TYPE_CHECKING:
    import numpy as np

    from datakit.video.frame import Picture

Needs = Literal["frames", "grid", "images", "embeddings", "captions"]
"""What a stage looks at: every frame in order; grid frames, or pairs of them and the next frame; a clip's pictures;
its embedding in the catalog; that and its caption."""
LAST = 1000
"""Place in the order of stages of one that says nothing about it."""


class StageSettings(Section):
    """Settings of every stage that can be switched off."""

    enabled: bool = True
    """whether this stage runs"""


class ImageSettings(StageSettings):
    """Of a stage that looks at pictures: it runs in Ray actors of its own."""

    num_cpus: float | None = Field(default=None, ge=0)
    """per actor; None: one CPU shared by all CPU pools"""
    num_gpus: float = Field(default=0.0, ge=0)
    """per actor"""
    workers: int | None = Field(default=None, ge=1)
    """most actors; None: what the cluster's CPUs or GPUs allow"""


NO_NUMBERS = frozenset(ImageSettings.model_fields)
"""Settings that say where and whether a stage runs, not what it measures."""


class Stage:
    """A measurement of clips.

    Attributes:
        name: also its section in the settings; the class's docstring says what it does and stands in lists of scores.
        version: of its numbers. Raise it whenever they change: clips then count as not done.
        columns: of the table `clips` that it fills.
        Settings: its section (None: it has none, and always runs). What is set there changes its numbers, and so its
            fingerprint, but for `runtime`. Settings that its constructor has a parameter for are handed to it.
        runtime: settings that do not change its numbers.
        weights: settings that hold files whose content changes its numbers.
        upstream: stages whose results it builds on.
        requires: modules that are not in the base installation, each with the extra that brings it; `required` says
            which of them where that depends on settings.
        result: what it gives besides columns (`embedding`).
        order: place among the stages, after those it builds on.
        needs: see `Needs`; said by the class it derives from.
    """

    name: ClassVar[str]
    version: ClassVar[str]
    columns: ClassVar[tuple[Column, ...]] = ()
    Settings: ClassVar[type[Section] | None] = StageSettings
    runtime: ClassVar[tuple[str, ...]] = ()
    weights: ClassVar[tuple[str, ...]] = ()
    upstream: ClassVar[tuple[str, ...]] = ()
    requires: ClassVar[tuple[tuple[str, str], ...]] = ()
    result: ClassVar[tuple[str, ...]] = ()
    order: ClassVar[int] = LAST
    needs: ClassVar[Needs]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "columns" in vars(cls):
            cls.columns = tuple(replace(column, filled_by=cls.name) for column in cls.columns)

    @classmethod
    def column_names(cls) -> tuple[str, ...]:
        return tuple(column.name for column in cls.columns)

    @classmethod
    def nothing(cls) -> dict[str, object]:
        """Its columns of a clip that it can say nothing of."""
        return {name: None for name in cls.column_names()}

    @classmethod
    def target(cls) -> str:
        """`module:class`, by which another process finds it."""
        return f"{cls.__module__}:{cls.__qualname__}"

    @classmethod
    def numbers(cls) -> tuple[str, ...]:
        """Settings that change its numbers, files of weights aside."""
        without = {*NO_NUMBERS, *cls.runtime, *cls.weights}
        return tuple(name for name in (cls.Settings.model_fields if cls.Settings else ()) if name not in without)

    @classmethod
    def arguments(cls, section: Section) -> dict[str, Any]:
        """The settings that its constructor takes."""
        return {name: getattr(section, name) for name in inspect.signature(cls).parameters if hasattr(section, name)}

    @classmethod
    def required(cls, section: Section | None) -> tuple[tuple[str, str], ...]:
        """Which of `requires` are needed under these settings."""
        return cls.requires

    @classmethod
    def summary(cls) -> str:
        """What it does: the first paragraph of its docstring, in one line."""
        return " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())


class GridStage(Stage):
    """A measurement at the candidate grid, in the process that decodes the video.

    Attributes:
        uses: columns of the clip that `summarise` takes besides, as keyword arguments: as measured just now by stages
            before this one, else as the catalog has them, else None.
    """

    needs = "grid"
    uses: ClassVar[tuple[str, ...]] = ()

    def summarise(self, values: Sequence[Any], /) -> dict[str, object]:
        """The columns of a clip from the values of its frames or pairs, of which there may be none."""
        raise NotImplementedError


class FrameStage(GridStage):
    """A measurement on single grid frames."""

    def frame(self, picture: Picture, /) -> Any:
        """Of one frame, what `summarise` needs to know; it crosses process boundaries."""
        raise NotImplementedError


class PairStage(GridStage):
    """A measurement on a grid frame and the first frame at least 40 ms later, `seconds` apart."""

    def pair(self, first: Picture, second: Picture, seconds: float, /) -> Any:
        """Of one pair, what `summarise` needs to know; it crosses process boundaries."""
        raise NotImplementedError


GridStages = Mapping[str, Callable[[], GridStage]]
"""Name -> what makes the stage (in another process), in the order in which a clip's columns are made."""


class ImageStage(Stage):
    """A measurement on a clip's pictures, at `images.positions`, in Ray actors of its own."""

    needs = "images"
    Settings = ImageSettings

    def run(self, rows: Sequence[dict], images: Sequence[Sequence[np.ndarray]]) -> list[dict[str, object]]:
        """The columns of each clip.

        Args:
            rows: of the clips: size and crop box.
            images: for each clip its uint8 RGB pictures [h, w, 3], longer side at most 640; there may be none.
        """
        raise NotImplementedError


class EmbeddingStage(Stage):
    """A measurement on embeddings that are in the catalog; it looks at no picture."""

    needs = "embeddings"
    upstream = ("embed",)

    @classmethod
    def resolved(cls, section: Section, model: str, folder: str) -> Section:
        """Its settings with the files of its weights found on this machine.

        Args:
            model: that embeds.
            folder: where weights lie.

        Raises:
            ConfigError: they are not here, or not for this model.
        """
        return section

    def rate(self, vectors: np.ndarray, norms: np.ndarray, model: str) -> dict[str, np.ndarray]:
        """Its columns, [n] each.

        Args:
            vectors: float32 [n, d], the mean of a clip's frames, scaled to unit length.
            norms: [n], lengths of the means before.
            model: whose they are.

        Raises:
            ConfigError: these settings are for other embeddings.
        """
        raise NotImplementedError
