"""The settings of the ingest and score pipelines: one section per stage, `--set SECTION.option=value`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, create_model

from datakit.config import OneOf, Section
from datakit.weights.registry import DEFAULT_FOLDER
from pipelines.llm.engine import BACKENDS
from pipelines.stages.base import ImageSettings
from pipelines.stages.registry import STAGES

if TYPE_CHECKING:
    from pipelines.stages.aesthetic import Aesthetic
    from pipelines.stages.embed import CaptionMatch, Embed
    from pipelines.stages.shots import ShotSettings


class Catalog(Section):
    shard_digits: int = Field(default=1, ge=1, le=4)
    """shards: 16 to this power (fixed when the catalog is made)"""
    val: float = Field(default=0.05, ge=0, le=1)
    """share of videos in the val split"""
    test: float = Field(default=0.05, ge=0, le=1)
    """share of videos in the test split"""


class Models(Section):
    folder: str = DEFAULT_FOLDER
    """where `datakit models download` puts weights"""


class LanguageModel(ImageSettings):
    """What writes texts, and how."""

    num_gpus: float | None = Field(default=None, ge=0)
    """per actor; None: tensor_parallel where there are GPUs, else 0"""
    enabled: bool = False
    """whether this stage runs"""
    backend: Annotated[str, OneOf(lambda: tuple(BACKENDS))] = "vllm"
    """in this process (vllm, transformers), or behind an endpoint (openai)"""
    model: str | None = None
    """folder, or name that `datakit models` knows; openai: the endpoint's name for it"""
    max_tokens: int = Field(default=512, ge=1)
    """longest answer"""
    temperature: float = Field(default=0.0, ge=0)
    """0: greedy, the same text every time"""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """nucleus sampling: tokens of this much probability together"""
    seed: int = 0
    """of the sampling of tokens"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """number format of the weights; auto: the model's own"""
    threads: int = Field(default=4, ge=1)
    """of an actor without a GPU"""
    max_num_seqs: int = Field(default=32, ge=1)
    """requests an actor works on at once"""
    max_model_len: int | None = Field(default=None, ge=64)
    """vllm: longest prompt and answer, tokens; None: the model's own"""
    tensor_parallel: int = Field(default=1, ge=1)
    """vllm: GPUs per actor"""
    gpu_memory: float = Field(default=0.9, gt=0, le=1)
    """vllm: share of a GPU's memory"""
    kv_cache_gb: float | None = Field(default=None, gt=0)
    """vllm: key-value cache, GiB; None: what fits the GPU, 1 on a CPU"""
    compile: bool = True
    """vllm on a GPU: compile and capture graphs (slower start, faster after)"""
    base_url: str | None = None
    """openai: address of the endpoint, for example http://HOST:8000/v1"""
    api_key_env: str = "OPENAI_API_KEY"
    """openai: environment variable that holds the key"""
    requests_per_minute: float | None = Field(default=None, gt=0)
    """openai: no more than this"""
    timeout_s: float = Field(default=120.0, gt=0)
    """openai: patience with one request"""
    patience_s: float = Field(default=300.0, ge=0)
    """openai: patience with an endpoint that refuses or fails everything"""


class Caption(LanguageModel):
    styles: tuple[str, ...] = Field(default=("dense",), min_length=1)
    """prompts by name, or files: one caption each"""
    fps: float = Field(default=2.0, gt=0)
    """frames per second shown to the model"""
    frames: int = Field(default=16, ge=1)
    """most frames per clip; longer clips are shown at a lower rate"""
    side: int = Field(default=448, ge=32)
    """longer side of a frame, pixels, inside the crop box"""
    input: Literal["auto", "video", "images"] = "auto"
    """auto: video where backend and model take it"""
    language: str | None = "en"
    """of the captions; others are flagged; null: any"""


class Refine(LanguageModel):
    prompt: str = "refine"
    """prompt by name, or a file"""
    source: str = "dense"
    """style of the captions that are rewritten"""
    style: str = "refined"
    """style of the captions that it writes"""
    language: str | None = "en"
    """of the captions; others are flagged; null: any"""


class Dedup(Section):
    enabled: bool = False
    """also at the end of an ingest"""
    exact: bool = True
    """the same pictures in another file"""
    perceptual: bool = True
    """clips that look the same: copies at another size, rate, crop, with a logo"""
    semantic: bool = True
    """clips with near embeddings, where there are embeddings"""
    perceptual_radius: int = Field(default=6, ge=0, le=32)
    """bits of 64 by which hashes of the same picture may differ"""
    perceptual_share: float = Field(default=0.5, gt=0, le=1)
    """share of the frames both show that must be the same"""
    semantic_threshold: float | None = Field(default=None, gt=0, le=1)
    """least cosine; None: what suits the model"""
    model: str | None = None
    """whose embeddings are compared; None: the one that embedded most clips"""
    within_video: bool = False
    """also compare clips of one video (exact copies always are)"""


class Images(Section):
    positions: tuple[float, ...] = (0.1, 0.5, 0.9)
    """where in a clip image stages look"""


class Runner(Section):
    workers: int | None = Field(default=None, ge=1)
    """most decoding workers; None: one per CPU of the cluster"""
    threads: int = Field(default=0, ge=0)
    """decoder threads; 0: more than one only while CPUs lie idle"""
    memory_gb: float = Field(default=4.0, gt=0)
    """memory limit of one worker process, GiB"""
    stall_s: float = Field(default=60.0, gt=0)
    """seconds without progress after which a video is given up"""
    attempts: int = Field(default=2, ge=1)
    """tries of a video or batch whose worker process died"""
    commit_s: float = Field(default=15.0, gt=0)
    """seconds between commits, at least"""
    scan_threads: int = Field(default=16, ge=1)
    """threads that read sources for their identity"""


class RunSettings(Section):
    recipe: str = "default"
    """name of a shipped recipe or a YAML file"""
    clips: Literal["virtual", "cut", "copy"] = "virtual"
    """write clip files, and how"""
    catalog: Catalog = Catalog()


if TYPE_CHECKING:

    class StageSections(RunSettings):
        """Those of the stages that other code reads by name."""

        shots: ShotSettings = ShotSettings()
        embed: Embed.Settings = Embed.Settings()
        aesthetic: Aesthetic.Settings = Aesthetic.Settings()
        caption_match: CaptionMatch.Settings = CaptionMatch.Settings()

else:
    StageSections = create_model(
        "StageSections",
        __base__=RunSettings,
        **{name: (stage.Settings, stage.Settings()) for name, stage in STAGES.items() if stage.Settings is not None},
    )
    """A section for every stage, as it declares it."""


class Settings(StageSections):
    """All of them; a stage's section has its name."""

    caption: Caption = Caption()
    refine: Refine = Refine()
    models: Models = Models()
    dedup: Dedup = Dedup()
    images: Images = Images()
    runner: Runner = Runner()
