"""Pictures from text, by tiny random pipelines of diffusers in folders as they are published."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from datakit.errors import ConfigError, MissingDependency
from sampler.generation.text_to_image import TextToImage

CPU = torch.device("cpu")
WORDS = ["a", "cat", "on", "the", "wall", "sea", "red", "blue"]
PROMPTS, SEEDS = ["a red cat", "the blue sea on the wall"], [7, 2**63 - 1]


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Path:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    encoder, tokenizer = clip()
    second, words = t5()
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    )
    made = FluxPipeline(FlowMatchEulerDiscreteScheduler(), vae, encoder, tokenizer, second, words, transformer)
    return saved(made, tmp_path_factory.mktemp("painters") / "tiny-flux")


@pytest.fixture(scope="module")
def stable(tmp_path_factory) -> Path:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=32,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
    )
    encoder, tokenizer = clip()
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    made = StableDiffusionPipeline(vae, encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False)
    return saved(made, tmp_path_factory.mktemp("painters") / "tiny-stable-diffusion")


def clip():
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [c + end for c in "abcdehlnorstuw" for end in ("", "</w>")]
    vocabulary = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=len(letters),
        eos_token_id=len(letters) + 1,
    )
    return CLIPTextModel(config), tokenizer


def t5():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    encoder = T5EncoderModel(T5Config(vocab_size=len(words), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    return encoder, PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def saved(pipeline, folder: Path) -> Path:
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["flux", "stable"])
def test_a_picture_depends_on_its_own_prompt_and_seed(name, request):
    painter = TextToImage(str(request.getfixturevalue(name)), 2, 3.5, "auto", CPU, False)
    both = painter.paint(PROMPTS, SEEDS, 32, 48)
    assert both.shape == (2, 32, 48, 3) and both.dtype == np.uint8
    assert [p.std() > 1 for p in both] == [True, True]
    assert np.array_equal(painter.paint(PROMPTS[1:], SEEDS[1:], 32, 48)[0], both[1]), "whoever is painted beside it"
    assert not np.array_equal(painter.paint(PROMPTS[:1], [8], 32, 48)[0], both[0])
    assert not np.array_equal(painter.paint(PROMPTS[1:], SEEDS[:1], 32, 48)[0], both[0])
    assert painter.paint([], [], 32, 48).shape == (0, 32, 48, 3)


def test_pictures_are_those_that_the_pipeline_itself_paints(flux):
    from diffusers import FluxPipeline

    own = FluxPipeline.from_pretrained(flux)
    own.set_progress_bar_config(disable=True)
    theirs = own(
        prompt=PROMPTS[0],
        height=32,
        width=48,
        num_inference_steps=3,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(7),
    ).images[0]
    found = TextToImage(str(flux), 3, 2.0, "float32", CPU, True).paint(PROMPTS[:1], [7], 32, 48)[0]
    assert np.array_equal(found, np.asarray(theirs))


def test_sizes_that_the_pipeline_does_not_take_are_met(flux):
    """Flux paints multiples of 16."""
    painter = TextToImage(str(flux), 1, None, "float32", CPU, False)
    nearest = painter.paint(PROMPTS[:1], [3], 32, 80)[0]
    found = painter.paint(PROMPTS[:1], [3], 40, 88)[0]
    assert found.shape == (40, 88, 3)
    assert abs(found.mean() - nearest[:, 5:75].mean()) < 3, "the same picture, enlarged to 40 x 100 and cut to 88"


def test_precision_is_as_asked(stable):
    half = TextToImage(str(stable), 1, None, "bfloat16", CPU, False)
    assert {p.dtype for p in half._pipeline.unet.parameters()} == {torch.bfloat16}
    whole = TextToImage(str(stable), 1, None, "auto", CPU, False)
    assert {p.dtype for p in whole._pipeline.unet.parameters()} == {torch.float32}
    a, b = (painter.paint(PROMPTS[:1], [3], 32, 32).astype(int) for painter in (half, whole))
    assert np.abs(a - b).max() > 0 and np.abs(a - b).mean() < 16


def test_what_is_no_painter_says_so(flux, stable, tmp_path):
    with pytest.raises(MissingDependency, match="datakit models"):
        TextToImage(str(tmp_path / "nowhere"), None, None, "auto", CPU, False)
    (tmp_path / "flux1-dev.safetensors").write_bytes(b"x")
    with pytest.raises(ConfigError, match="model_index.json"):
        TextToImage(str(tmp_path), None, None, "auto", CPU, False)
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in os.listdir(flux):
        if name != "transformer":
            (broken / name).symlink_to(flux / name)
    with pytest.raises(ConfigError, match="does not load"):
        TextToImage(str(broken), None, None, "auto", CPU, False)
    other = tmp_path / "other"
    other.mkdir()
    for name in ("vae", "scheduler", "unet"):
        (other / name).symlink_to(stable / name)
    index = json.loads((stable / "model_index.json").read_text())
    kept = {name: index[name] for name in ("_diffusers_version", "scheduler", "unet")}
    (other / "model_index.json").write_text(json.dumps({"_class_name": "DDIMPipeline", **kept}))
    with pytest.raises(ConfigError, match="DDIMPipeline, which takes no prompt"):
        TextToImage(str(other), None, None, "auto", CPU, False)


def test_a_painted_picture_is_the_first_frame(stable, tmp_path):
    """Text to image to video: the passes of a run, from the prompt alone."""
    import cv2

    from sampler.generation.model_source import open_checkpoint
    from sampler.generation.passes import Encoded, Worker, given_key, picture_of
    from sampler.generation.run import checked_samples
    from support.tiny_sampling import prompts, save_model, settings

    weights = str(save_model(tmp_path / "model.safetensors"))
    own = settings(f"image.model={stable}", "image.steps=2", "sampling.steps=2")
    checkpoint = open_checkpoint(weights, own)
    samples = checked_samples(prompts(2), own, checkpoint, checkpoint.describe_autoencoder())
    assert [(s.mode, s.painted) for s in samples] == [("i2v_head", True)] * 2
    worker = Worker(checkpoint, own, str(tmp_path / "out"), str(tmp_path / "work"), gpu=False)
    assert all(isinstance(answer, Encoded) for answer in (*worker.paint(samples), *worker.encode(samples)))
    pictures = [cv2.imread(str(picture_of(tmp_path / "out", sample))) for sample in samples]
    assert all(picture.shape == (32, 48, 3) for picture in pictures) and (pictures[0] != pictures[1]).any()
    worker.denoise(samples)
    for sample, answer in zip(samples, worker.decode(samples)):
        cond = worker.store.get("given", given_key(checkpoint, own, sample))["cond"][0]
        assert (
            torch.equal(worker.store.get("latents", sample.sample_id)["latents"][:, 0], cond[1:, 0])
            and answer.clip["num_frames"] == 9
        )
