"""A score of the tests' own. `tests/pipelines/stages/test_new_score.py` puts this file where shipped ones lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from datakit.columns import Column
from pipelines.stages.base import FrameStage, StageSettings

if TYPE_CHECKING:
    from datakit.video.frame import Picture


class Redness(FrameStage):
    """How much of the picture is red."""

    name = "redness"
    version = "1"
    columns = (
        Column("redness", "float32", "0..1", "share of pixels whose red stands out, mean over frames", good=-1),
        Column("reddest", "string", "", "red or pale: by the median frame"),
    )

    class Settings(StageSettings):
        above: int = Field(50, ge=1, description="codes by which red exceeds green and blue")

    def __init__(self, above: int = 50):
        self._above = above

    def frame(self, picture: Picture) -> float:
        red, green, blue = picture.rgb(64).astype(int).transpose(2, 0, 1)
        return float((red > self._above + green.clip(blue)).mean())

    def summarise(self, values: Sequence[float]) -> dict[str, object]:
        if not values:
            return self.nothing()
        return {
            "redness": sum(values) / len(values),
            "reddest": "red" if sorted(values)[len(values) // 2] > 0.5 else "pale",
        }
