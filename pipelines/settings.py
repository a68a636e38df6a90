"""The settings of the ingest and score pipelines: one section per stage, `--set SECTION.option=value`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from datakit.config import Section
from pipelines.stages import DetectorName


class Catalog(Section):
    shard_digits: int = Field(1, ge=1, le=4, description="shards: 16 to this power (fixed when the catalog is made)")
    val: float = Field(0.05, ge=0, le=1, description="share of videos in the val split")
    test: float = Field(0.05, ge=0, le=1, description="share of videos in the test split")


class Shots(Section):
    detector: DetectorName = Field("adaptive", description="PySceneDetect's adaptive, content, threshold; or transnet")
    threshold: float | None = Field(None, ge=0, description="the detector's; None: its own default")
    window: int = Field(2, ge=1, description="adaptive: frames either side of the rolling average")
    min_content: float = Field(15.0, ge=0, description="adaptive: least content value of a cut")
    min_scene_s: float = Field(0.6, ge=0, description="nearer cuts are merged (PySceneDetect's min-scene-len)")
    final_scene: bool = Field(False, description="threshold: report a fade out that ends the video")
    min_s: float = Field(2.0, ge=0, description="shorter shots become clips that recipes reject, seconds")
    max_s: float = Field(8.0, gt=0, description="longer shots are divided, seconds")
    trim_frames: int = Field(0, ge=0, description="frames taken off both ends of a shot (Step-Video: 3)")
    fade_level: float = Field(12.0, ge=0, le=255, description="mean of B, G, R below which a frame is part of a fade")

    @model_validator(mode="after")
    def _divisible(self) -> Shots:
        if self.max_s < 2 * self.min_s:
            raise ValueError("shots.max_s must be at least twice shots.min_s, so that halves are long enough")
        return self


class Stage(Section):
    enabled: bool = True


class Motion(Stage):
    method: Literal["dis", "farneback"] = "dis"


class ImageStage(Stage):
    """A stage that looks at pictures; runs in Ray actors of its own."""

    num_cpus: float | None = Field(None, ge=0, description="per actor; None: one CPU shared by all CPU pools")
    num_gpus: float = Field(0.0, ge=0, description="per actor")
    workers: int | None = Field(None, ge=1, description="most actors; None: what the cluster's CPUs or GPUs allow")


class Ocr(ImageStage):
    side: int = Field(640, ge=64, description="longer side of the picture the text detector sees, pixels")
    batch: int = Field(8, ge=1, description="pictures per network call")


class Nsfw(ImageStage):
    enabled: bool = False


class Images(Section):
    positions: tuple[float, ...] = Field((0.1, 0.5, 0.9), description="where in a clip image stages look")


class Runner(Section):
    workers: int | None = Field(None, ge=1, description="most decoding workers; None: one per CPU of the cluster")
    threads: int = Field(0, ge=0, description="decoder threads; 0: more than one only while CPUs lie idle")
    memory_gb: float = Field(4.0, gt=0, description="memory limit of one worker process, GiB")
    stall_s: float = Field(60.0, gt=0, description="seconds without progress after which a video is given up")
    attempts: int = Field(2, ge=1, description="tries of a video or batch whose worker process died")
    commit_s: float = Field(15.0, gt=0, description="seconds between commits, at least")
    scan_threads: int = Field(16, ge=1, description="threads that read sources for their identity")


class Settings(Section):
    recipe: str = Field("default", description="name of a shipped recipe or a YAML file")
    clips: Literal["virtual", "cut", "copy"] = Field("virtual", description="write clip files, and how")
    catalog: Catalog = Catalog()
    shots: Shots = Shots()
    motion: Motion = Motion()
    motion_vmaf: Stage = Stage()
    letterbox: Stage = Stage()
    quality: Stage = Stage()
    ocr: Ocr = Ocr()
    nsfw: Nsfw = Nsfw()
    images: Images = Images()
    runner: Runner = Runner()
