"""What holds for every autoencoder, at sizes for tests; and tiles. Their own tests: test_hunyuan.py, test_dc_ae.py."""

import copy
import itertools
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from datakit.config import load
from datakit.errors import ConfigError
from trainer.models.autoencoders import kinds
from trainer.models.autoencoders.base import Encoded
from trainer.models.autoencoders.build import (
    autoencoder_hash,
    build_autoencoder,
    describe_autoencoder,
    load_autoencoder,
)
from trainer.models.autoencoders.registry import AUTOENCODERS
from trainer.models.autoencoders.settings import AutoencoderSettings
from trainer.models.autoencoders.tiling import Tiles, pieces, tiled
from trainer.vae.settings import VAESettings

SIZES = {
    "hunyuan": dict(latent_channels=4, widths=(8, 16, 16, 16), layers=1, groups=4),
    "dc-ae": dict(latent_channels=16, widths=(8, 16, 16, 32, 32, 32), encoder_depths=(1,) * 6, decoder_depths=(1,) * 6),
    "tiny": dict(latent_channels=4, widths=(16, 32, 32)),
}
GOLDEN = {"hunyuan": "hunyuan_vae_tiny", "dc-ae": "dc_ae_tiny"}
"""Files with weights of these sizes (tests/data/golden): random, but drawn so that signals keep their size."""
LENGTHS = {"hunyuan": (1, 5, 17), "dc-ae": (1, 8, 20), "tiny": (1, 5, 17)}
RANGE = 2.0  # of pixels: −1..1


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    built = {kind: build_autoencoder(kind, **sizes) for kind, sizes in SIZES.items()}
    for kind, name in GOLDEN.items():
        tensors = load_file(Path(__file__).parents[2] / "data" / "golden" / f"{name}.safetensors")
        built[kind].load_state_dict(
            {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}
        )
    return built


@pytest.fixture(params=SIZES)
def model(models, request):
    return models[request.param]


def video(model, latent_frames=2, height=1, width=2, batch=1, seed=0):
    """Random, of so many latents."""
    shape = batch, 3, model.frames_of(latent_frames), height * model.compression[1], width * model.compression[2]
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# Shapes


@torch.no_grad()
@pytest.mark.parametrize(("length", "height", "width"), [(0, 1, 1), (0, 2, 3), (1, 3, 1), (2, 1, 2)])
def test_every_size_that_fits_comes_back(model, length, height, width):
    frames, side = LENGTHS[model.kind][length], model.compression[1]
    clip = torch.rand(1 + height, 3, frames, height * side, width * side) * 2 - 1
    encoded = model.encode(clip)
    assert encoded.mean.shape[1:] == encoded.std.shape[1:] == model.latent_shape(*clip.shape[2:])
    assert model.frames_of(encoded.mean.shape[2]) == frames
    assert model.decode(encoded.mean).shape == clip.shape


@pytest.mark.parametrize(
    ("kind", "size", "nearest"),
    [
        ("tiny", (18, 64, 64), "17 of 64×64"),
        ("tiny", (5, 60, 64), "5 of 64×64"),
        ("tiny", (0, 3, 64), "1 of 8×64"),
        ("hunyuan", (128, 64, 100), "129 of 64×96"),
        ("dc-ae", (129, 64, 64), "128 of 64×64"),
        ("dc-ae", (4, 32, 32), "8 of 32×32"),
        ("dc-ae", (8, 48, 250), "8 of 64×256"),
    ],
)
def test_a_size_that_does_not_fit_is_refused_with_the_nearest_that_does(models, kind, size, nearest):
    model = models[kind]
    for refused in (lambda: model.latent_shape(*size), lambda: model.encode(torch.zeros(1, 3, *size))):
        with pytest.raises(
            ValueError, match=f"{kind} takes .*not {size[0]} of {size[1]}×{size[2]}; the nearest is {nearest}$"
        ):
            refused()
    frames, space = nearest.split(" of ")
    model.latent_shape(int(frames), *map(int, space.split("×")))


def test_lengths(models):
    assert (
        [models["tiny"].frames_of(n) for n in (1, 2, 33)]
        == [models["hunyuan"].frames_of(n) for n in (1, 2, 33)]
        == [1, 5, 129]
    )
    assert [models["dc-ae"].frames_of(n) for n in (1, 2, 32)] == [1, 8, 128]
    assert models["hunyuan"].latent_shape(129, 192, 336) == (4, 33, 24, 42)


# Properties


@torch.no_grad()
def test_a_sample_does_not_know_its_batch(model):
    clip = video(model, batch=3)
    others = clip.clone()
    others[[0, 2]] = others[[0, 2]].flip(0) * 5 - 3
    for together in (clip, others):
        encoded, alone = model.encode(together), model.encode(clip[1:2])
        assert torch.allclose(encoded.mean[1:2], alone.mean, atol=1e-5) and torch.allclose(
            encoded.std[1:2], alone.std, atol=1e-5
        )
        assert torch.allclose(model.decode(encoded.mean)[1:2], model.decode(alone.mean), atol=1e-4)


def test_every_parameter_has_a_gradient(model):
    clip = video(model)
    noise = torch.randn(1, *model.latent_shape(*clip.shape[2:]))
    decoded, encoded = model(clip, noise)
    (decoded.square().mean() + encoded.std.sum()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    model.zero_grad()
    assert not without


@torch.no_grad()
def test_bf16_is_near_float32(model):
    """Relative error of mean, spread and video. Measured: at most 4.1 % (HunyuanVideo: its norms magnify), 1.2 %, 0.7
    %."""
    most = {"hunyuan": 0.06, "dc-ae": 0.02, "tiny": 0.01}[model.kind]
    clip = video(model)
    half = copy.deepcopy(model).bfloat16()
    exact, rounded = model.encode(clip), half.encode(clip.bfloat16())
    pairs = [
        (exact.mean, rounded.mean),
        (exact.std, rounded.std),
        (model.decode(exact.mean), half.decode(exact.mean.bfloat16())),
    ]
    for expected, found in pairs:
        assert found.dtype == torch.bfloat16
        assert (found.float() - expected).norm() <= most * expected.norm()


@torch.no_grad()
def test_latents_are_scaled_and_shifted():
    torch.manual_seed(0)
    plain = build_autoencoder("tiny", **SIZES["tiny"])
    scaled = build_autoencoder("tiny", **SIZES["tiny"], scale=2.0, shift=0.5)
    scaled.load_state_dict(plain.state_dict())
    clip = video(plain)
    raw, found = plain.encode(clip), scaled.encode(clip)
    assert torch.allclose(found.mean, (raw.mean - 0.5) * 2) and torch.allclose(found.std, raw.std * 2)
    assert torch.allclose(scaled.decode(found.mean), plain.decode(raw.mean), atol=1e-5)
    assert (
        torch.equal(Encoded(raw.mean, raw.std).sample(torch.ones_like(raw.std)), raw.mean + raw.std)
        and (raw.std > 0).all()
    )


# The tiny one's causality


@torch.no_grad()
def test_no_latent_of_the_tiny_one_knows_later_frames_and_no_frame_later_latents(models):
    tiny = models["tiny"]
    clip = video(tiny, latent_frames=5)
    for known in (1, 2, 4):
        other = clip.clone()
        other[:, :, tiny.frames_of(known) :] = -other[:, :, tiny.frames_of(known) :]
        latents, changed = tiny.encode(clip), tiny.encode(other)
        assert torch.equal(latents.mean[:, :, :known], changed.mean[:, :, :known])
        assert torch.equal(latents.std[:, :, :known], changed.std[:, :, :known])
        assert (latents.mean - changed.mean)[:, :, known].abs().min() > 0
        decoded, start = tiny.decode(latents.mean), tiny.decode(changed.mean)
        assert torch.equal(decoded[:, :, : tiny.frames_of(known)], start[:, :, : tiny.frames_of(known)])
        alone = tiny.encode(clip[:, :, : tiny.frames_of(known)])
        assert torch.allclose(alone.mean, latents.mean[:, :, :known], atol=1e-6)
        assert torch.allclose(tiny.decode(alone.mean), decoded[:, :, : tiny.frames_of(known)], atol=1e-6)


# Tiles: which, and where


def grouped(x, by, causal):
    """Means of the pixels of each latent: an encoder that knows nothing but them."""
    first = [x[:, :, :1]] if causal else []
    frames = x[:, :, 1:] if causal else x
    t = torch.cat([*first, *([frames.unflatten(2, (-1, by[0])).mean(3)] if frames.shape[2] else [])], 2)
    return F.avg_pool3d(t, (1, *by[1:]))


def spread(z, by, causal):
    """Each latent in all its pixels."""
    t = z.repeat_interleave(by[0], 2)
    return (t[:, :, by[0] - 1 :] if causal else t).repeat_interleave(by[1], 3).repeat_interleave(by[2], 4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.8])
def test_tiles_put_everything_where_it_belongs(causal, overlap):
    """A network without context gives the same in tiles of any size."""
    by, lead = (4, 8, 8), int(causal)
    for length, tile in itertools.product((1, 2, 5, 9), (1, 2, 3, 4, 20)):
        latents = (length, length + 1, 2)
        z = torch.randn(1, 2, *latents)
        clip = spread(z, by, causal)
        axes = [
            pieces(n, size, overlap, (b, 1), fore)
            for n, size, b, fore in zip(latents, (tile, tile, 1), by, (lead, 0, 0))
        ]
        assert torch.allclose(tiled(lambda x: grouped(x, by, causal), clip, axes), grouped(clip, by, causal), atol=1e-5)
        axes = [
            pieces(n, size, overlap, (1, b), fore)
            for n, size, b, fore in zip(latents, (tile, tile, 1), by, (lead, 0, 0))
        ]
        assert torch.allclose(tiled(lambda x: spread(x, by, causal), z, axes), clip, atol=1e-5)


@pytest.mark.parametrize(
    ("latents", "tile", "overlap", "starts"),
    [
        (32, 32, 0.25, [0]),
        (20, 32, 0.25, [0]),
        (33, 32, 0.25, [0, 1]),
        (56, 32, 0.25, [0, 24]),
        (57, 32, 0.25, [0, 12, 25]),
        (8, 4, 0, [0, 4]),
    ],
)
def test_as_few_tiles_as_overlap_enough_and_all_of_one_size(latents, tile, overlap, starts):
    found = pieces(latents, tile, overlap, (1, 8))
    assert [p.source.start for p in found] == starts and {p.source.stop - p.source.start for p in found} == {
        min(tile, latents)
    }
    assert all(
        (p.weight >= 0).all() and (p.weight <= 1).all() and len(p.weight) == p.target.stop - p.target.start
        for p in found
    )


def test_hunyuans_tiles_of_64_frames_are_65():
    found = pieces(33, 16, 0.25, (4, 1), lead=1)
    assert [(p.source.start, p.source.stop) for p in found] == [(0, 65), (32, 97), (64, 129)]
    assert [(p.target.start, p.target.stop, p.drop) for p in found] == [(0, 17, 0), (9, 25, 1), (17, 33, 1)]


@pytest.mark.parametrize("wrong", [dict(frames=0), dict(height=-8), dict(overlap=1.0), dict(overlap=-0.1)])
def test_tiles_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match="positive sizes and an overlap from 0"):
        Tiles(**wrong)


def test_tiles_below_a_latent_are_refused(models):
    for kind, tiles, least in (
        ("tiny", Tiles(4, 8, 7), "4 frames of 8×8"),
        ("dc-ae", Tiles(4, 32, 32), "8 frames of 32×32"),
    ):
        clip = video(models[kind])
        with pytest.raises(ValueError, match=f"{kind} needs tiles of at least {least}, not 4 of"):
            models[kind].encode(clip, tiles)


# Tiles: through the networks


def small_tiles(model, latents=2, overlap=0.25):
    t, h, w = model.compression
    return Tiles(latents * t, latents * h, latents * w, overlap)


@torch.no_grad()
def test_one_tile_that_covers_all_changes_nothing(model):
    clip = video(model)
    encoded = model.encode(clip)
    for tiles in (small_tiles(model), Tiles(1000, 1000, 1000)):
        again = model.encode(clip, tiles)
        assert torch.equal(again.mean, encoded.mean) and torch.equal(again.std, encoded.std)
        assert torch.equal(model.decode(encoded.mean, tiles), model.decode(encoded.mean))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_larger_tile_goes_through_and_none_is_kept(models, dtype):
    for model in models.values():
        model = copy.deepcopy(model).to(dtype)
        lead = int(model.causal)
        inputs, outputs, kept = [], [], []

        def before(module, args):
            inputs.append(tuple(args[0].shape[2:]))
            kept.append(sum(not output.expired() for output in outputs))

        for network in (model.encoder, model.decoder):
            network.register_forward_pre_hook(before)
            network.register_forward_hook(
                lambda module, args, output: outputs.append(StorageWeakRef(output.untyped_storage()))
            )
        clip, (t, h, w) = video(model, 4 + lead, 2, 3).to(dtype), model.compression
        tiles = Tiles(2 * t, h, 2 * w + w // 2, overlap=0.0)
        encoded = model.encode(clip, tiles)
        assert len(inputs) == 2 * 2 * 2 and set(inputs) == {(2 * t + lead, h, 2 * w)}
        inputs.clear()
        decoded = model.decode(encoded.mean, tiles)
        assert len(inputs) == 2 * 2 * 2 and set(inputs) == {(2 + lead, 1, 2)}
        assert max(kept) == 0  # results of tiles before
        assert decoded.shape == clip.shape and decoded.dtype == encoded.mean.dtype == dtype
        assert encoded.mean.shape[1:] == model.latent_shape(*clip.shape[2:])


def test_gradients_pass_through_tiles(models):
    tiny = models["tiny"]
    clip = video(tiny, 3, 3, 3).requires_grad_()
    tiles = small_tiles(tiny, overlap=0.5)
    tiny.decode(tiny.encode(clip, tiles).mean, tiles).square().sum().backward()
    assert (clip.grad.abs().sum((0, 1, 3, 4)) > 0).all()
    assert all(p.grad is not None for name, p in tiny.named_parameters())
    tiny.zero_grad()


# Tiles: their seams


@pytest.fixture(scope="module")
def trained(footage):
    """The tiny one that comes with datakit, and real clips: 5 × 64 × 256 and 49 × 64 × 64."""
    with av.open(str(footage["bikes.mp4"])) as file:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame, _ in zip(file.decode(video=0), range(200))])
    film = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    return build_autoencoder("tiny", "embedded"), {
        "wide": film[:, :, 60:65, 100:164, 200:456],
        "long": film[:, :, 150:199, 100:164, 0:64],
    }


@torch.no_grad()
@pytest.mark.parametrize("weights", ["trained", "random"])
@pytest.mark.parametrize(
    ("tiles", "clip", "most"),
    [
        (
            Tiles(64, 64, 128, 0.25),
            "wide",
            1e-6,
        ),  # a quarter of what tiles share is more than pixels know of their neighbourhood
        (Tiles(64, 64, 64, 0.5), "wide", 1e-2),
        (Tiles(24, 64, 64, 0.25), "long", 1e-2),
    ],
)
def test_tiles_of_the_tiny_one_are_as_the_whole(trained, weights, tiles, clip, most):
    """Largest differences anywhere, in parts of the range of pixels; measured 0, 0.2 % to 0.7 %, 0.6 % to 1.2 % (of
    random weights, which may differ half as much again), and on average below 0.05 %. Without overlap they are far
    larger: the test can fail."""
    model, clips = trained
    if weights == "random":
        torch.manual_seed(0)
        model = build_autoencoder("tiny")
    video = clips[clip]
    latents = model.encode(video).mean
    whole = model.decode(latents)
    difference = (model.decode(model.encode(video, tiles).mean, tiles) - whole).abs() / RANGE
    assert difference.max() <= (most if weights == "trained" else 1.5 * most) and difference.mean() <= 1e-3
    hard = Tiles(tiles.frames, tiles.height, tiles.width, 0.0)
    assert (model.decode(latents, hard) - whole).abs().max() / RANGE >= 3e-2


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dc-ae", "hunyuan"])
@pytest.mark.parametrize("axis", ["time", "width"])
def test_pictures_are_continuous_over_seams(models, kind, axis):
    """DC-AE attends to all of a tile and HunyuanVideo's norms see all of it, so what tiles show differs, even far from
    their edges. Where tiles blend, the mean step from a pixel to the next is at most 3 times that in the same places of
    the video that was decoded whole; without overlap it is more than 6 times."""
    model, dim = models[kind], {"time": 2, "width": 4}[axis]
    latents, tile = {
        ("dc-ae", "time"): ((10, 1, 1), 5),
        ("dc-ae", "width"): ((2, 1, 10), 5),
        ("hunyuan", "time"): ((21, 2, 3), 5),
        ("hunyuan", "width"): ((2, 4, 16), 4),
    }[kind, axis]
    lead, by = int(model.causal and axis == "time"), model.compression[dim - 2]
    torch.manual_seed(1)
    smooth = F.interpolate(torch.randn(1, model.channels, 2, 2, 3), size=latents, mode="trilinear")

    def steps(found):
        assert found.shape[2:] == (
            model.frames_of(latents[0]),
            *(n * size for n, size in zip(latents[1:], model.compression[1:])),
        )
        return found.diff(dim=dim).abs().mean([d for d in range(5) if d != dim])

    whole = steps(model.decode(smooth))
    for overlap, fits in ((0.5, lambda ratio: ratio <= 3), (0.0, lambda ratio: ratio > 6)):
        found = steps(model.decode(smooth, small_tiles(model, tile, overlap)))
        cuts = pieces(latents[dim - 2], tile, overlap, (1, by), lead)
        seams = torch.cat(
            [torch.arange(after.target.start - 1, before.target.stop) for before, after in zip(cuts, cuts[1:])]
        )
        assert fits(found[seams].max() / whole[seams].max())


# Building


def test_a_kind_or_size_that_does_not_exist():
    with pytest.raises(ConfigError, match="no autoencoder 'wan': dc-ae, hunyuan or tiny"):
        build_autoencoder("wan")
    with pytest.raises(ConfigError, match="tiny has no size 'width': it has latent_channels, widths"):
        build_autoencoder("tiny", width=3)
    for wrong in (
        "tiny has 3 widths, not 2",
        "hunyuan has 4 widths, not 2",
        "dc-ae has 2 widths, but 6 encoder_depths",
    ):
        with pytest.raises(ConfigError, match=wrong):
            build_autoencoder(wrong.split()[0], widths=[8, 8])


FLAT = """
from dataclasses import dataclass

from torch import nn

from trainer.models.autoencoders.base import Autoencoder
from trainer.models.autoencoders.tiling import Tiles


@dataclass(frozen=True)
class FlatConfig:
    side: int = 4


class FlatAE(Autoencoder):
    kind = "flat-ae"
    config_class = FlatConfig
    tiles = Tiles(8, 16, 16)
    blocks = frozenset({"Conv3d"})

    def __init__(self, config: FlatConfig = FlatConfig()):
        super().__init__(config, 3, (1, config.side, config.side), 1.0, 0.0, causal=True)
        self.encoder = nn.AvgPool3d((1, config.side, config.side))
        self.decoder = nn.Upsample(scale_factor=(1, config.side, config.side))

    def moments(self, video):
        return self.encoder(video)

    def pixels(self, latents):
        return self.decoder(latents)
"""


def test_a_new_autoencoder_is_a_new_file(tmp_path, monkeypatch):
    """Nothing lists it: settings, errors, the command's help and the factories find it by the file."""
    (tmp_path / "flat_ae.py").write_text(FLAT)
    monkeypatch.setattr(kinds, "__path__", [*kinds.__path__, str(tmp_path)])
    assert AUTOENCODERS.names() == ("dc-ae", "flat-ae", "hunyuan", "tiny")
    settings = load(AutoencoderSettings, None, ["kind=flat-ae", "sizes.side=8"])
    assert describe_autoencoder(settings.kind, **settings.sizes).compression == (1, 8, 8)
    with pytest.raises(ConfigError, match="flat-ae needs weights: set autoencoder.weights"):
        load_autoencoder(settings)
    model = build_autoencoder("flat-ae", side=8)
    assert model.decode(model.encode(torch.ones(1, 3, 2, 16, 8)).mean).shape == (1, 3, 2, 16, 8)
    assert load(VAESettings, None, ["autoencoder.kind=flat-ae"]).autoencoder.kind == "flat-ae"
    for kind in (AutoencoderSettings, VAESettings):
        with pytest.raises(ConfigError, match="kind: Input should be 'dc-ae', 'flat-ae', 'hunyuan' or 'tiny'"):
            load(kind, None, ["kind=wan" if kind is AutoencoderSettings else "autoencoder.kind=wan"])


def test_every_autoencoder_is_declared_under_the_name_of_its_file():
    assert set(AUTOENCODERS.names()) == set(SIZES)
    for kind in AUTOENCODERS.names():
        declared = AUTOENCODERS.get(kind)
        assert declared.kind == kind and is_dataclass(declared.config_class) and declared.blocks
        assert declared.embedded is None or declared.embedded.is_file()


def test_settings_of_an_autoencoder_take_no_torch():
    code = "import sys, trainer.models.autoencoders.settings, datakit.cli.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_weights_of_a_file(tmp_path, models):
    save_file(models["tiny"].state_dict(), tmp_path / "tiny.safetensors")
    built = build_autoencoder("tiny", tmp_path / "tiny.safetensors", **SIZES["tiny"])
    assert autoencoder_hash(built) == autoencoder_hash(models["tiny"])
    with pytest.raises(ConfigError):
        build_autoencoder("tiny", tmp_path / "tiny.safetensors", latent_channels=8)


def test_the_hash_is_of_kind_sizes_and_weights(models):
    tiny = models["tiny"]
    same = build_autoencoder("tiny", **{**SIZES["tiny"], "widths": [16, 32, 32]})  # a list, as YAML gives it
    same.load_state_dict(tiny.state_dict())
    assert autoencoder_hash(same) == autoencoder_hash(tiny) and len(autoencoder_hash(tiny)) == 32
    int(autoencoder_hash(tiny), 16)
    scaled = build_autoencoder("tiny", **SIZES["tiny"], scale=0.5)
    scaled.load_state_dict(tiny.state_dict())
    touched = copy.deepcopy(tiny)
    with torch.no_grad():
        next(touched.parameters()).view(-1)[0] += 1e-6
    hashes = {autoencoder_hash(m) for m in (*models.values(), scaled, touched, copy.deepcopy(tiny).bfloat16())}
    assert len(hashes) == 6


def test_the_tiny_one_is_tiny():
    assert sum(p.numel() for p in build_autoencoder("tiny").parameters()) < 0.5e6
