"""The settings of the ingest and score pipelines: one section per stage, `--set SECTION.option=value`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from datakit.config import OneOf, Section
from datakit.weights.registry import DEFAULT_FOLDER
from pipelines.llm.engine import BACKENDS
from pipelines.shots.options import DetectorName


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
    """whether this stage runs"""


class Motion(Stage):
    method: Literal["dis", "farneback"] = "dis"
    """optical flow: OpenCV's DIS, or Farnebäck's"""


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
    """whether this stage runs"""


class TechnicalQuality(ImageStage):
    enabled: bool = False
    """whether this stage runs"""


class Models(Section):
    folder: str = Field(DEFAULT_FOLDER, description="where `datakit models download` puts weights")


class Embed(ImageStage):
    enabled: bool = False
    """whether this stage runs"""
    model: str = Field(
        "ViT-L-14/openai", description="open_clip ARCH/TAG, or efficientnet-lite0, which a package ships"
    )
    weights: str | None = Field(None, description="weights file for the architecture `model`; None: looked for by name")
    fallback: str | None = Field(
        "efficientnet-lite0", description="model when the weights of `model` are not here; null: refuse"
    )
    batch: int = Field(64, ge=1, description="pictures per network call")
    precision: Literal["fp32", "bf16", "fp16"] | None = Field(None, description="None: fp16 on a GPU, fp32 on a CPU")
    threads: int = Field(4, ge=1, description="of an actor without a GPU")
    num_gpus: float | None = Field(None, ge=0, description="per actor; None: 1 where there are GPUs, else 0")


class Aesthetic(Section):
    enabled: bool = False
    """whether this stage runs"""
    head: str = Field("auto", description="LAION head: v1, v2, a file; auto: the newest for embed.model")


class CaptionMatch(ImageStage):
    enabled: bool = False
    """whether this stage runs"""
    num_gpus: float | None = Field(None, ge=0, description="per actor; None: 1 where there are GPUs, else 0")
    threads: int = Field(4, ge=1, description="of an actor without a GPU")


class LanguageModel(ImageStage):
    """What writes texts, and how."""

    num_gpus: float | None = Field(
        None, ge=0, description="per actor; None: tensor_parallel where there are GPUs, else 0"
    )
    enabled: bool = False
    """whether this stage runs"""
    backend: Annotated[str, OneOf(lambda: tuple(BACKENDS))] = "vllm"
    """in this process (vllm, transformers), or behind an endpoint (openai)"""
    model: str | None = Field(
        None, description="folder, or name that `datakit models` knows; openai: the endpoint's name for it"
    )
    max_tokens: int = Field(512, ge=1, description="longest answer")
    temperature: float = Field(0.0, ge=0, description="0: greedy, the same text every time")
    top_p: float = Field(1.0, gt=0, le=1)
    """nucleus sampling: tokens of this much probability together"""
    seed: int = 0
    """of the sampling of tokens"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """number format of the weights; auto: the model's own"""
    threads: int = Field(4, ge=1, description="of an actor without a GPU")
    max_num_seqs: int = Field(32, ge=1, description="requests an actor works on at once")
    max_model_len: int | None = Field(
        None, ge=64, description="vllm: longest prompt and answer, tokens; None: the model's own"
    )
    tensor_parallel: int = Field(1, ge=1, description="vllm: GPUs per actor")
    gpu_memory: float = Field(0.9, gt=0, le=1, description="vllm: share of a GPU's memory")
    kv_cache_gb: float | None = Field(
        None, gt=0, description="vllm: key-value cache, GiB; None: what fits the GPU, 1 on a CPU"
    )
    compile: bool = Field(True, description="vllm on a GPU: compile and capture graphs (slower start, faster after)")
    base_url: str | None = Field(None, description="openai: address of the endpoint, for example http://HOST:8000/v1")
    api_key_env: str = Field("OPENAI_API_KEY", description="openai: environment variable that holds the key")
    requests_per_minute: float | None = Field(None, gt=0, description="openai: no more than this")
    timeout_s: float = Field(120.0, gt=0, description="openai: patience with one request")
    patience_s: float = Field(
        300.0, ge=0, description="openai: patience with an endpoint that refuses or fails everything"
    )


class Caption(LanguageModel):
    styles: tuple[str, ...] = Field(("dense",), min_length=1, description="prompts by name, or files: one caption each")
    fps: float = Field(2.0, gt=0, description="frames per second shown to the model")
    frames: int = Field(16, ge=1, description="most frames per clip; longer clips are shown at a lower rate")
    side: int = Field(448, ge=32, description="longer side of a frame, pixels, inside the crop box")
    input: Literal["auto", "video", "images"] = Field("auto", description="auto: video where backend and model take it")
    language: str | None = Field("en", description="of the captions; others are flagged; null: any")


class Refine(LanguageModel):
    prompt: str = Field("refine", description="prompt by name, or a file")
    source: str = Field("dense", description="style of the captions that are rewritten")
    style: str = Field("refined", description="style of the captions that it writes")
    language: str | None = "en"
    """of the captions; others are flagged; null: any"""


class Dedup(Section):
    enabled: bool = Field(False, description="also at the end of an ingest")
    exact: bool = Field(True, description="the same pictures in another file")
    perceptual: bool = Field(
        True, description="clips that look the same: copies at another size, rate, crop, with a logo"
    )
    semantic: bool = Field(True, description="clips with near embeddings, where there are embeddings")
    perceptual_radius: int = Field(
        6, ge=0, le=32, description="bits of 64 by which hashes of the same picture may differ"
    )
    perceptual_share: float = Field(0.5, gt=0, le=1, description="share of the frames both show that must be the same")
    semantic_threshold: float | None = Field(None, gt=0, le=1, description="least cosine; None: what suits the model")
    model: str | None = Field(None, description="whose embeddings are compared; None: the one that embedded most clips")
    within_video: bool = Field(False, description="also compare clips of one video (exact copies always are)")


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
    phash: Stage = Stage()
    ocr: Ocr = Ocr()
    nsfw: Nsfw = Nsfw()
    technical_quality: TechnicalQuality = TechnicalQuality()
    embed: Embed = Embed()
    aesthetic: Aesthetic = Aesthetic()
    caption_match: CaptionMatch = CaptionMatch()
    caption: Caption = Caption()
    refine: Refine = Refine()
    models: Models = Models()
    dedup: Dedup = Dedup()
    images: Images = Images()
    runner: Runner = Runner()
