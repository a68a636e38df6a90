"""Model weights: which there are, where they lie on this machine, and what identifies them. No network here.

`locate` is the one place that finds weights; `models_download` brings them to where it looks.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datakit.errors import MissingDependency
from datakit.identity import content_hash

DEFAULT_FOLDER = "~/.cache/datakit/models"
WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".gguf")
CONFIG_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".yaml")
"""With the weights, these say what a model computes: configuration, chat template, tokenizer."""
NON_COMMERCIAL = "non-commercial"
EFFICIENTNET = "efficientnet-lite0"
"""The one model that embeds pictures and is not open_clip's: its weights come with a package."""


@dataclass(frozen=True)
class ModelInfo:
    """One model that the toolkit can load.

    `size_gb` is about 10⁹ bytes, None where unknown. `files` are glob patterns of what is needed (none: all);
    of a `single` model, whose loader takes one weights file, they are names, the first that exists is taken.
    `repo` is the id at Hugging Face; `modelscope` that at ModelScope where it is known (None: `repo` is tried);
    `url` that of a plain file. `extra`: the datakit extra whose library loads it.
    """

    name: str
    kind: str
    size_gb: float | None
    licence: str
    repo: str | None = None
    modelscope: str | None = None
    files: tuple[str, ...] = ()
    single: bool = False
    url: str | None = None
    extra: str = ""
    used_by: str = ""


OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
TRANSFORMERS_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


def _clip(name: str, size_gb: float, licence: str, repo: str) -> ModelInfo:
    """Repositories: open_clip 3.3, pretrained.py. Sizes: float32 of the parameters in its model_profile.csv."""
    return ModelInfo(
        name,
        "clip",
        size_gb,
        licence,
        repo,
        files=OPEN_CLIP_FILES,
        single=True,
        extra="clip",
        used_by="embed, caption_match",
    )


def _head(file: str, size_gb: float, licence: str, repository: str) -> ModelInfo:
    url = f"https://github.com/{repository}/raw/main/{file.replace('+', '%2B')}"
    return ModelInfo(
        file.removesuffix(".pth"),
        "aesthetic",
        size_gb,
        licence,
        files=(file,),
        single=True,
        url=url,
        extra="clip",
        used_by="aesthetic",
    )


def _qwen(name: str, kind: str, size_gb: float, licence: str = "Apache-2.0") -> ModelInfo:
    return ModelInfo(
        name,
        kind,
        size_gb,
        licence,
        name,
        name,
        TRANSFORMERS_FILES,
        extra="vllm",
        used_by={"vlm": "caption", "llm": "refine"}[kind],
    )


def _part(name: str, kind: str, size_gb: float, licence: str, file: str, used_by: str) -> ModelInfo:
    """One file of the Open-Sora 2.0 release (its README; sizes from the repository's page)."""
    return ModelInfo(
        name,
        kind,
        size_gb,
        licence,
        "hpcai-tech/Open-Sora-v2",
        "luchentech/Open-Sora-v2",
        (file,),
        single=True,
        extra="train",
        used_by=used_by,
    )


FLUX_LICENCE = f"FLUX.1 [dev] Non-Commercial License ({NON_COMMERCIAL})"
FLUX_PIPELINE = (
    "model_index.json",
    "scheduler/*",
    "text_encoder/*",
    "text_encoder_2/*",
    "tokenizer/*",
    "tokenizer_2/*",
    "transformer/*",
    "vae/*",
)
_TABLE = (
    _clip("ViT-B-32/openai", 0.61, "Apache-2.0", "timm/vit_base_patch32_clip_224.openai"),
    _clip("ViT-B-16/openai", 0.60, "Apache-2.0", "timm/vit_base_patch16_clip_224.openai"),
    _clip("ViT-L-14/openai", 1.71, "Apache-2.0", "timm/vit_large_patch14_clip_224.openai"),
    _clip("ViT-L-14-336/openai", 1.71, "Apache-2.0", "timm/vit_large_patch14_clip_336.openai"),
    _clip("ViT-B-32/laion2b_s34b_b79k", 0.61, "MIT", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"),
    _clip("ViT-B-16/laion2b_s34b_b88k", 0.60, "MIT", "laion/CLIP-ViT-B-16-laion2B-s34B-b88K"),
    _clip("ViT-L-14/laion2b_s32b_b82k", 1.71, "MIT", "laion/CLIP-ViT-L-14-laion2B-s32B-b82K"),
    _clip("ViT-H-14/laion2b_s32b_b79k", 3.94, "MIT", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    _clip("ViT-bigG-14/laion2b_s39b_b160k", 10.2, "MIT", "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"),
    _clip("ViT-B-16-SigLIP/webli", 0.81, "Apache-2.0", "timm/ViT-B-16-SigLIP"),
    _clip("ViT-SO400M-14-SigLIP-384/webli", 3.51, "Apache-2.0", "timm/ViT-SO400M-14-SigLIP-384"),
    _clip("ViT-SO400M-14-SigLIP2/webli", 4.54, "Apache-2.0", "timm/ViT-SO400M-14-SigLIP2"),
    _head("sa_0_4_vit_b_32_linear.pth", 3e-6, "MIT", "LAION-AI/aesthetic-predictor"),
    _head("sa_0_4_vit_b_16_linear.pth", 3e-6, "MIT", "LAION-AI/aesthetic-predictor"),
    _head("sa_0_4_vit_l_14_linear.pth", 4e-6, "MIT", "LAION-AI/aesthetic-predictor"),
    _head("sac+logos+ava1-l14-linearMSE.pth", 3.7e-3, "Apache-2.0", "christophschuhmann/improved-aesthetic-predictor"),
    _qwen("Qwen/Qwen2.5-VL-3B-Instruct", "vlm", 7.5, f"Qwen Research License ({NON_COMMERCIAL})"),
    _qwen("Qwen/Qwen2.5-VL-7B-Instruct", "vlm", 16.6),
    _qwen("Qwen/Qwen3-VL-2B-Instruct", "vlm", 4.3),
    _qwen("Qwen/Qwen3-VL-4B-Instruct", "vlm", 8.9),
    _qwen("Qwen/Qwen3-VL-8B-Instruct", "vlm", 17.6),
    _qwen("Qwen/Qwen3-VL-30B-A3B-Instruct", "vlm", 62.0),
    _qwen("Qwen/Qwen2.5-7B-Instruct", "llm", 15.2),
    _qwen("Qwen/Qwen3-8B", "llm", 16.4),
    ModelInfo(
        "google/t5-v1_1-xxl",
        "text encoder",
        44.5,
        "Apache-2.0",
        "google/t5-v1_1-xxl",
        files=("*.bin", "*.json", "*.model"),
        extra="train",
        used_by="train, sample",
    ),
    ModelInfo(
        "DeepFloyd/t5-v1_1-xxl",
        "text encoder",
        19.1,
        "not stated (the encoder of google/t5-v1_1-xxl)",
        "DeepFloyd/t5-v1_1-xxl",
        files=("*.bin", "*.json", "*.model"),
        extra="train",
        used_by="train, sample",
    ),
    ModelInfo(
        "openai/clip-vit-large-patch14",
        "text encoder",
        1.71,
        "not stated (OpenAI's CLIP code: MIT)",
        "openai/clip-vit-large-patch14",
        "AI-ModelScope/clip-vit-large-patch14",
        ("*.safetensors", "*.json", "*.txt"),
        extra="train",
        used_by="train, sample",
    ),
    ModelInfo(
        "hpcai-tech/Open-Sora-v2",
        "release",
        69.2,
        f"Apache-2.0; its FLUX.1 files {NON_COMMERCIAL}",
        "hpcai-tech/Open-Sora-v2",
        "luchentech/Open-Sora-v2",
        extra="train",
        used_by="train, sample (all of it: DiT, VAE, text encoders, FLUX.1)",
    ),
    _part("Open-Sora-v2/mmdit", "dit", 23.8, "Apache-2.0", "Open_Sora_v2.safetensors", "train, sample"),
    _part(
        "Open-Sora-v2/hunyuan-vae",
        "autoencoder",
        0.49,
        "Tencent Hunyuan Community License",
        "hunyuan_vae.safetensors",
        "encode, train, sample",
    ),
    ModelInfo(
        "hpcai-tech/Open-Sora-v2-Video-DC-AE",
        "autoencoder",
        None,
        "not stated",
        "hpcai-tech/Open-Sora-v2-Video-DC-AE",
        files=("F32T4C128_AE.safetensors",),
        single=True,
        extra="train",
        used_by="encode, train, sample",
    ),
    ModelInfo(
        "black-forest-labs/FLUX.1-dev",
        "text to image",
        33.7,
        FLUX_LICENCE,
        "black-forest-labs/FLUX.1-dev",
        "black-forest-labs/FLUX.1-dev",
        FLUX_PIPELINE,
        extra="train",
        used_by="sample (t2i2v)",
    ),
    ModelInfo(
        "FLUX.1-dev/mmdit",
        "dit",
        23.8,
        FLUX_LICENCE,
        "black-forest-labs/FLUX.1-dev",
        "black-forest-labs/FLUX.1-dev",
        ("flux1-dev.safetensors",),
        single=True,
        extra="train",
        used_by="train (to start from)",
    ),
)
MODELS: dict[str, ModelInfo] = {info.name: info for info in _TABLE}
"""Every model the toolkit has a use for. Any other Hugging Face id, and any tag of open_clip, works as well."""


def find(name: str) -> ModelInfo:
    """What is known of a model: of the table, of the installed open_clip (`ARCH/TAG`), or any Hugging Face id.

    Raises:
        MissingDependency: the name is none of these.
    """
    if name in MODELS:
        return MODELS[name]
    if info := _open_clip(name):
        return info
    known = {spelling.lower(): spelling for spelling in MODELS}
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and name.lower() not in known:
        return ModelInfo(name, "other", None, "see its page", name)
    close = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"did you mean {known[close[0]]}?" if close else "see `datakit models list`"
    raise MissingDependency(f"there is no model {name!r} ({hint}), nor a file or folder of that name")


def locate(name: str, folder: str | Path = DEFAULT_FOLDER) -> Path:
    """Where the weights of a model lie: one file for a `single` model (safetensors first), else a folder.

    Looked for as a path, in `folder` (under the model's name, then its Hugging Face id), in Hugging Face's cache.
    What is not whole is not found.

    Args:
        name: a path, a name of `MODELS`, an open_clip `ARCH/TAG`, or a Hugging Face id `org/name`.
        folder: where `datakit models download` puts weights.

    Raises:
        MissingDependency: not there; one line with the places looked at and how to bring the model.
    """
    given = Path(name).expanduser()
    if given.exists() and name not in MODELS:
        return given
    info = find(name)
    home = Path(folder).expanduser()
    for place in dict.fromkeys([given, *(home / part for part in (info.name, info.repo) if part)]):
        if found := _weights_in(place, info):
            return found
    if found := _in_hub_cache(info):
        return found
    raise MissingDependency(
        f"no weights of {name} on this machine: looked for a file or folder of that name, in {home / info.name}, and "
        f"in {_hub_cache()}; "
        f"bring them with `datakit models download {name}`, give their path instead of the name, or say where they "
        f"are: "
        "--set models.folder=FOLDER"
    )


def weights_hash(path: str | Path) -> str:
    """Identity of weights by content, wherever they lie: 16 hex digits.

    Of a folder: names and contents of its weights and configuration files. Of each file a sample is read
    (`clip.content_hash`), so that 20 GB cost some MB; a change that fits between the samples goes unnoticed.

    Raises:
        MissingDependency: nothing there.
    """
    import hashlib

    path = Path(path)
    if path.is_file():
        return _hash_file(path)[:16]
    files = sorted(
        (f.relative_to(path).as_posix(), f)
        for f in visible_files(path)
        if f.suffix in WEIGHTS_SUFFIXES + CONFIG_SUFFIXES
    )
    if not files:
        raise MissingDependency(f"no weights at {path}")
    digest = hashlib.blake2b(digest_size=8, person=b"datakit-model")
    for name, file in files:
        digest.update(f"{name}\0{_hash_file(file)}\0".encode())
    return digest.hexdigest()


def is_whole(folder: Path, info: ModelInfo) -> bool:
    """Whether a folder holds a model: some weights, every file asked for by name, every shard of its indices."""
    files = {f.relative_to(folder).as_posix() for f in visible_files(folder)}
    if info.single:
        return not files.isdisjoint(info.files)
    named = {pattern for pattern in info.files if not set(pattern) & set("*?[")}
    for index in (name for name in files if name.endswith(".index.json")):
        named |= {(Path(index).parent / shard).as_posix() for shard in _shards(folder / index)}
    return named <= files and any(name.endswith(WEIGHTS_SUFFIXES) for name in files)


def visible_files(folder: Path) -> Iterator[Path]:
    """Files below a folder, in order; nothing hidden, no links to nothing."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from visible_files(path)
        elif path.is_file():
            yield path


def _shards(index: Path) -> set[str]:
    """Files that an index of Hugging Face's libraries names. One that cannot be read asks for what cannot be there."""
    try:
        return set(json.loads(index.read_text()).get("weight_map", {}).values())
    except ValueError:
        return {"a readable index"}


def _weights_in(folder: Path, info: ModelInfo) -> Path | None:
    if not info.single:
        return folder if folder.is_dir() and is_whole(folder, info) else None
    return next((folder / file for file in info.files if (folder / file).is_file()), None)


def _in_hub_cache(info: ModelInfo) -> Path | None:
    """In the cache of huggingface_hub (which reads HF_HOME and HF_HUB_CACHE)."""
    if info.repo is None or importlib.util.find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError

    if info.single:
        cached = (try_to_load_from_cache(info.repo, file) for file in info.files)
        return next((Path(file) for file in cached if isinstance(file, str)), None)
    try:
        snapshot = Path(snapshot_download(info.repo, local_files_only=True, allow_patterns=list(info.files) or None))
    except LocalEntryNotFoundError:  # nothing there, or less than there should be
        return None
    return snapshot if is_whole(snapshot, info) else None


def _hub_cache() -> str:
    if importlib.util.find_spec("huggingface_hub") is None:
        return "no cache of Hugging Face's (huggingface_hub is not installed)"
    from huggingface_hub import constants

    return f"Hugging Face's cache {constants.HF_HUB_CACHE}"


def _open_clip(name: str) -> ModelInfo | None:
    """A tag that the installed open_clip knows. Its table costs an import of torch: only for its architectures."""
    architecture, _, tag = name.partition("/")
    spec = importlib.util.find_spec("open_clip")
    if (
        not tag
        or spec is None
        or spec.origin is None
        or not (Path(spec.origin).parent / "model_configs" / f"{architecture}.json").exists()
    ):
        return None
    from open_clip.pretrained import get_pretrained_cfg

    known = get_pretrained_cfg(architecture, tag)
    if not known:
        raise MissingDependency(f"open_clip has no weights {tag!r} of {architecture}: see open_clip.list_pretrained()")
    repo, _, file = known["hf_hub"].rpartition("/")  # "org/name/", or "org/name/file"
    files = (file.removesuffix(".bin") + ".safetensors", file) if file else OPEN_CLIP_FILES
    return ModelInfo(
        name, "clip", None, "see its page", repo, files=files, single=True, extra="clip", used_by="embed, caption_match"
    )


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return content_hash(file, path.stat().st_size, b"datakit-weights")
