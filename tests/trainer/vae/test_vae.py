"""Autoencoder training: it learns, what its losses are, when the discriminator comes in, exact resume; export and
evaluation."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest
import torch
import typer
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from datakit.cli.eval_vae import vae as eval_vae
from datakit.errors import ConfigError
from datakit.video.reader import VideoReader
from support.drawn_videos import encode
from support.plan_folders import bucket, window
from trainer.data.batch_sampler import Order
from trainer.data.dataloader import Loader, LoaderOptions, Position
from trainer.evaluation.psnr_ssim import psnr
from trainer.evaluation.vae import _quantile, evaluate, interval, latent_moments
from trainer.export.vae import export_autoencoder, trained
from trainer.models.autoencoders.base import Encoded
from trainer.models.autoencoders.build import CONFIG_KEY, build_autoencoder, check_precision, described
from trainer.models.autoencoders.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from trainer.models.common.weights import read_metadata, save_weights
from trainer.planning.buckets import bucket_table
from trainer.planning.plan import WINDOWS, Part, Plan, write_plan
from trainer.settings import load_settings
from trainer.training.preview import to_pixels
from trainer.training.setup import Request
from trainer.vae.settings import VAESettings
from trainer.vae.task import build_discriminator, build_trained, divergence, draw, has_spread, last_layer
from trainer.vae.train import fitted, train_vae

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
SIZES = {
    "tiny": {"widths": [16, 32, 32]},
    "hunyuan": {"latent_channels": 4, "widths": [8, 16, 16, 16], "layers": 1, "groups": 4},
    "dc-ae": {
        "latent_channels": 16,
        "widths": [16, 32, 32, 32],
        "encoder_depths": [1, 1, 1, 1],
        "decoder_depths": [1, 1, 1, 1],
        "attention": [False, False, True, True],
        "halves_time": [False, True, True, False],
    },
}
COMPRESSION = {"tiny": (4, 8, 8), "hunyuan": (4, 8, 8), "dc-ae": (4, 8, 8)}
FRAMES = {"tiny": 9, "hunyuan": 9, "dc-ae": 8}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> list[Path]:
    """A film to train on, of 40 shots, and one of 6 to look at. A shot has 9 frames, 40 x 40: a coloured texture that
    moves."""
    folder = tmp_path_factory.mktemp("films")
    options = {"qp": "0", "preset": "ultrafast", "g": "9"}
    return [
        encode(folder / f"{name}.mp4", [frame for shot in shots for frame in moving(shot)], 24, options=options)
        for name, shots in (("train", range(40)), ("val", range(40, 46)))
    ]


def moving(seed: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    texture = cv2.resize(random.random((6, 6, 3)), (96, 96), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    dx, dy = random.integers(-2, 3, 2)
    return [(255 * np.roll(texture, (i * dy, i * dx), (0, 1))[:40, :40]).astype(np.uint8) for i in range(9)]


@pytest.fixture(scope="module")
def plans(films, tmp_path_factory) -> dict[str, Path]:
    """For each kind a plan of the first film, and beside it one of the other: windows of 32 x 32, and (for training)
    single frames."""
    folder = tmp_path_factory.mktemp("plans")
    for kind, frames in FRAMES.items():
        made = [bucket(4, frames, 32, 32, tokens=48), bucket(8, 1, 32, 32, tokens=16)]
        videos = [row(films[0], shot, frames=frames) for shot in range(40)]
        images = [row(films[0], shot, of=1, frames=1, fps=0.0) for shot in range(0, 40, 5)]
        plan_of(folder / kind, videos + images, made, kind)
        plan_of(folder / f"{kind}-val", [row(films[1], shot, frames=frames) for shot in range(6)], made[:1], kind)
    return {kind: folder / kind for kind in FRAMES}


def row(film: Path, shot: int, of: int = 0, **columns) -> dict:
    return window(
        of,
        film.stem,
        **{
            "clip_id": f"{film.stem}-{shot:02d}-{of}",
            "uri": str(film),
            "first": 9 * shot,
            "time_base": "1/12288",
            "end_pts": 360 * 512,
            "fps": 24.0,
            "crop_width": 40,
            "crop_height": 40,
            "width": 40,
            "height": 40,
            **columns,
        },
    )


def plan_of(folder: Path, rows: list[dict], buckets: list, kind: str, global_batches: int = 1) -> Plan:
    settings = {"compression": list(COMPRESSION[kind]), "causal": kind != "dc-ae", "patch": 1}
    return write_plan(
        folder,
        buckets,
        [Part("films", 1.0, {"content_hash": ""}, "")],
        settings,
        global_batches,
        {},
        [pa.RecordBatch.from_pylist(rows, schema=WINDOWS)],
        [],
    )


def settings_of(kind: str, *sets: str) -> VAESettings:
    usual = [
        "engine.precision=fp32",
        "loader.workers=0",
        "write_back=false",
        "log.tensorboard=false",
        "preview.every=0",
        "optimizer.lr=0.004",
        "optimizer.eps=1.0e-8",
        f"autoencoder.kind={kind}",
        f"autoencoder.sizes={json.dumps(SIZES[kind])}",
        "gan=null",
        "perceptual=null",
    ]
    return load_settings(VAESettings, None, None, [*usual, *sets])


def train(folder: Path, plan: Path, settings: VAESettings, resume: bool = False):
    return train_vae(Request(folder, plan=None if resume else plan, resume=resume, quiet=True), settings)


@pytest.mark.parametrize(
    "kind, steps, lr, gain, over_flat",
    [("tiny", 40, 4e-3, 2.0, 0.3), ("dc-ae", 15, 1e-3, 2.0, 0.0), ("hunyuan", 20, 2e-3, 1.2, -2.0)],
)
def test_it_learns(kind, steps, lr, gain, over_flat, plans, quiet_start, tmp_path):
    """Shots of a film that it is not trained on come out better than they did before, and (but for the slowest) than
    flat pictures of the right colours; images are among the samples."""
    start = [f"autoencoder.weights={quiet_start}"] if kind == "hunyuan" else []
    settings = settings_of(kind, f"steps={steps}", "validation.every=1000", f"optimizer.lr={lr}", *start)
    model, video = build_trained(settings.autoencoder, settings.seed), held_out(plans[kind])
    with torch.no_grad():
        before = float(psnr(video, model(video)[0]).mean())
    ended = train(tmp_path / "run", plans[kind], settings)
    assert ended.status == "finished" and ended.step == steps
    flat = float(psnr(video, video.mean((3, 4), keepdim=True).expand_as(video)).mean())
    assert ended.values["val_psnr"] > max(before + gain, flat + over_flat), (before, flat)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert ("loss_kl" in lines[0]) == (kind != "dc-ae") and lines[0]["norm"] > 0 and "val_ssim" in lines[-1]
    exported = export_autoencoder(tmp_path / "run", tmp_path / "weights.safetensors", ema=False)
    with torch.no_grad():
        found = float(psnr(video, exported(video)[0]).mean())
    assert found == pytest.approx(ended.values["val_psnr"], abs=1e-4), "what is exported is what was measured"


def held_out(plan: Path) -> torch.Tensor:
    val = Plan.open(plan.with_name(plan.name + "-val"))
    with Loader(val, Order(val, 0), 0, 1, Position(0, 0), LoaderOptions(workers=0)) as loader:
        return torch.cat([next(loader)[1][0].video for _ in range(loader.order.steps(0))]).float() / 127.5 - 1


@pytest.fixture(scope="module")
def quiet_start(tmp_path_factory) -> Path:
    """Weights for the small Hunyuan with little noise on its latents: from scratch, it would take thousands of steps to
    lower it."""
    torch.manual_seed(0)
    model = build_autoencoder("hunyuan", **SIZES["hunyuan"])
    with torch.no_grad():
        model.quant_conv.bias[4:] = -6
    path = tmp_path_factory.mktemp("weights") / "start.safetensors"
    save_weights(model.state_dict(), path)
    return path


class Game:
    """What a run of the whole recipe is given here: all losses, the discriminator from the third step on, an EMA."""

    gan = ("gan.start=2", "gan.layers=3", "gan.width=8", "gan.weight=0.05", "gan.optimizer.lr=0.001")
    sets = (
        "perceptual.kind=alex-st",
        "perceptual.weight=0.5",
        "perceptual.frames=1",
        *gan,
        "engine.ema=0.9",
        "checkpoint.every=2",
        "checkpoint.keep=5",
        "log.every=1",
        "loader.augment=random",
        "loader.flip=true",
    )


def test_resumed_it_is_the_run_that_was_not_interrupted(plans, tmp_path):
    """Bit for bit: both networks' weights, moments and the EMA. Until its first step, the discriminator stays as it was
    made."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(whole, plans["tiny"], settings_of("tiny", "gan={}", "perceptual={}", *Game.sets, "steps=5"))
    train(cut, plans["tiny"], settings_of("tiny", "gan={}", "perceptual={}", *Game.sets, "steps=2"))
    ended = train(
        cut, plans["tiny"], settings_of("tiny", "gan={}", "perceptual={}", *Game.sets, "steps=5"), resume=True
    )
    assert ended.step == 5
    for network in ("autoencoder", "discriminator"):
        a, b = (
            load_file(run / "checkpoints" / "step-000005" / network / "shard-00000-of-00001.safetensors")
            for run in (whole, cut)
        )
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        assert any(name.startswith("ema/") for name in a) == (network == "autoencoder")
    places = (cut / "checkpoints" / f"step-00000{n}" / "discriminator" for n in (2, 5))
    early, later = (load_file(place / "shard-00000-of-00001.safetensors") for place in places)
    made = build_discriminator(settings_of("tiny", "gan={}", *Game.gan))
    for name, parameter in made.named_parameters():
        assert torch.equal(early[f"master/{name}"], parameter.detach().flatten())
        assert not torch.equal(later[f"master/{name}"], early[f"master/{name}"])
    lines = [line for line in map(json.loads, (cut / "log.jsonl").read_text().splitlines()) if "loss_l1" in line]
    assert [("loss_gan" in line, "loss_discriminator" in line) for line in lines] == [(False, False)] * 2 + [
        (True, True)
    ] * 3
    assert all(line["gan_weight"] > 0 and line["loss_lpips"] > 0 for line in lines[2:])


def test_two_processes_with_sharded_optimizers_do_the_same(plans, tmp_path):
    """ZeRO-2 on two processes gives the weights of DDP on one: the adaptive weight is that of the micro-batch, wherever
    it is."""
    sets = [s for s in Game.sets if not s.startswith(("perceptual", "engine.ema"))]
    made = Plan.open(plans["tiny"])
    plan = plan_of(tmp_path / "plan", made.windows.to_pylist(), made.buckets, "tiny", global_batches=2)
    train(tmp_path / "one", plan.folder, settings_of("tiny", "gan={}", *sets, "steps=4", "optimizer.lr=0.0005"))
    one = load_settings(VAESettings, None, tmp_path / "one" / "settings.yaml", ["engine.plugin=zero2"])
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(one.model_dump(mode="json")))
    command = [
        sys.executable,
        "-m",
        "datakit",
        "train",
        "vae",
        "--out",
        str(tmp_path / "two"),
        "--plan",
        str(plan.folder),
        "--config",
        str(tmp_path / "two.yaml"),
        "--nproc",
        "2",
        "--json",
    ]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    a, b = (
        trained(one, tmp_path / run / "checkpoints" / "step-000004", ema=False).state_dict() for run in ("one", "two")
    )
    start = build_trained(one.autoencoder, one.seed).state_dict()
    for name in a:
        moved = (a[name] - start[name]).abs().max()
        assert moved > 1e-4 and (a[name] - b[name]).abs().max() < 0.02 * moved, name


def test_hinge_losses_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert discriminator_loss(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3))
    assert generator_loss(fake).item() == pytest.approx((3 + 0 - 1) / 3)


def test_adaptive_weight_by_hand():
    """y = w · h: the gradient of mean |y| for h = (1, 3), w = 2 is (1 + 3) / 2; that of −5 mean y, −5 · 2."""
    w, h = torch.nn.Parameter(torch.tensor(2.0)), torch.tensor([1.0, 3.0])
    y = w * h
    reconstruction, adversarial = y.abs().mean(), -5 * y.mean()
    assert adaptive_weight(reconstruction, adversarial, w).item() == pytest.approx(2 / (10 + 1e-4))
    (reconstruction + adversarial).backward()
    assert w.grad.item() == pytest.approx(2 - 10), "the graphs are still there, and no gradient was left"
    y = w * h
    assert adaptive_weight(y.mean(), 0 * y.sum(), w).item() == pytest.approx(1e4), "bounded"


def test_the_discriminator_judges_each_sample_alone_and_learns_nothing_from_judging():
    torch.manual_seed(0)
    model = PatchDiscriminator(8, 3)
    video = torch.randn(2, 3, 9, 32, 40, requires_grad=True)
    logits = model.judge(video)
    assert logits.shape == (2, 1, 5, 4, 5) and model(torch.randn(1, 3, 1, 32, 32)).shape == (1, 1, 1, 4, 4)
    generator_loss(logits).backward()
    assert video.grad.abs().sum() > 0 and all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(model(video[1:]), logits[1:])
    with pytest.raises(ValueError, match="at least 8 × 8"):
        model(torch.zeros(1, 3, 1, 4, 64))


def test_everything_random_comes_from_the_samples_seeds():
    three, one = draw([5, 6, 7], (4, 3, 2, 2), 9, 2), draw([6], (4, 3, 2, 2), 9, 2)
    assert torch.equal(three.noise[1:2], one.noise) and torch.equal(three.frames[1:2], one.frames)
    assert three.frames.shape == (3, 2) and three.frames.diff().gt(0).all() and three.frames.max() < 9
    assert torch.equal(draw([6], (4, 3, 4, 4), 9, 2).frames, one.frames), "whatever the shape"
    assert draw([6], (4, 3, 2, 2), 2, 2).frames is None and draw([6], (4, 3, 2, 2), 9, None).frames is None


def test_divergence_by_hand():
    """Of raw latents: scaled means 2, spread 1 at scale 2 and shift 0.5 are means 1.5 and spread 0.5."""
    model = build_autoencoder("tiny", **SIZES["tiny"], scale=2.0, shift=0.5)
    found = divergence(Encoded(torch.full((2, 1, 1, 1, 3), 2.0), torch.full((2, 1, 1, 1, 3), 1.0)), model)
    expected = 3 * 0.5 * (1.5**2 + 0.5**2 - 1 - 2 * math.log(0.5))
    torch.testing.assert_close(found, torch.full((2,), expected))
    normal = Encoded(torch.full((1, 1, 1, 1, 1), -1.0), torch.full((1, 1, 1, 1, 1), 2.0))
    assert divergence(normal, model).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", SIZES)
def test_the_last_layer_makes_pixels_and_blocks_can_be_computed_again(kind):
    """Scaled by it alone (its bias aside), pictures scale; with recomputation every gradient is the same."""
    torch.manual_seed(0)
    model = build_autoencoder(kind, **SIZES[kind])
    video = torch.randn(1, 3, FRAMES[kind], 32, 32)
    noise = torch.randn(1, *model.latent_shape(FRAMES[kind], 32, 32))

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        made, encoded = model(video, noise)
        assert has_spread(encoded) == (kind != "dc-ae")
        (made.square().mean() + encoded.mean.mean()).backward()
        return [p.grad.clone() for p in model.parameters()]

    before, names = gradients(), list(model.state_dict())
    blocks = model.checkpoint_activations()
    assert blocks >= 4 and list(model.state_dict()) == names
    for a, b in zip(before, gradients()):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        [p.zero_() for p in model.decoder.parameters() if p.ndim == 1 and p is list(model.decoder.parameters())[-1]]
        made = model(video)[0]
        last_layer(model).mul_(3)
        torch.testing.assert_close(model(video)[0], 3 * made)


def test_an_export_knows_its_sizes_and_has_latents_of_unit_deviation(plans, tmp_path):
    settings = settings_of("tiny", "steps=3", "engine.ema=0.5", "validation.every=0")
    train(tmp_path / "run", plans["tiny"], settings)
    plain = export_autoencoder(tmp_path / "run", tmp_path / "plain.safetensors", ema=True)
    scaled = export_autoencoder(
        tmp_path / "run", tmp_path / "scaled.safetensors", rescale=True, about={"footage": "drawn"}
    )
    loaded = build_autoencoder("tiny", tmp_path / "scaled.safetensors")
    assert (
        loaded.config == scaled.config
        and loaded.config.widths == (16, 32, 32)
        and loaded.scale == scaled.scale != plain.scale == 1.0
    )
    assert read_metadata(tmp_path / "scaled.safetensors")["footage"] == "drawn"
    plan = Plan.open(plans["tiny"])
    found = latent_moments(plan, loaded)
    assert abs(found.mean) < 1e-4 and found.std == pytest.approx(1, abs=1e-4)
    video = held_out(plans["tiny"])
    with torch.no_grad():
        torch.testing.assert_close(loaded(video)[0], plain(video)[0], atol=1e-4, rtol=1e-4), "the scale cancels out"
    with pytest.raises(ConfigError, match="of the autoencoder tiny, not of dc-ae"):
        build_autoencoder("dc-ae", tmp_path / "scaled.safetensors")
    with pytest.raises(ConfigError, match="no readable run.json"):
        export_autoencoder(tmp_path, tmp_path / "x.safetensors")


def test_evaluation(plans, tmp_path):
    """Numbers of clips against those measured here; the rate by hand; files beside it."""
    torch.manual_seed(0)
    model = build_autoencoder("tiny", **SIZES["tiny"])
    plan = Plan.open(plans["tiny"].with_name("tiny-val"))
    found = evaluate(plan, model, None, torch.device("cpu"), videos=tmp_path / "videos", shown=2)
    video = held_out(plans["tiny"])
    with torch.no_grad():
        made = model(video)[0]
    assert [c.psnr for c in found.clips] == pytest.approx(psnr(video, made.clamp(-1, 1)).tolist(), abs=1e-3)
    assert (
        found.overall.psnr.mean == pytest.approx(np.mean([c.psnr for c in found.clips])) and found.overall.lpips is None
    )
    assert found.overall.clips == 6 and [b.bucket for b in found.buckets] == ["32x32x9"] and found.broken == 0
    bits = 16 * 3 * 4 * 4 * 16 / (9 * 32 * 32)
    assert found.overall.bits_per_pixel == pytest.approx(bits) and found.overall.compression == pytest.approx(24 / bits)
    assert found.encode_s > 0 and found.decode_s > 0 and found.peak_bytes > 1 << 26 and found.pixels == 6 * 9 * 32 * 32
    with torch.no_grad():
        encoded = model.encode(video)
    assert found.latents.mean == pytest.approx(encoded.mean.mean().item(), abs=1e-5)
    written = sorted((tmp_path / "videos").iterdir())
    assert len(written) == 2
    with VideoReader(str(written[0])) as reader:
        pictures = [picture.rgb() for picture in reader.frames()]
    assert len(pictures) == 9 and pictures[0].shape == (32, 64, 3)
    original = to_pixels(video[[c.clip_id for c in found.clips].index(written[0].stem[4:])])
    assert np.abs(pictures[4][:, :32].astype(int) - original[4]).mean() < 12, "the original is on the left"
    assert evaluate(plan, model, None, torch.device("cpu"), limit=4).overall.clips == 4


def test_the_command_takes_files(films, tmp_path, monkeypatch):
    """A file is one clip; what it says is JSON; what cannot be is told in a line."""
    model = build_autoencoder("tiny", **SIZES["tiny"])
    save_weights(model.state_dict(), tmp_path / "w.safetensors", {CONFIG_KEY: described(model)})
    app = typer.Typer()
    app.command()(eval_vae)
    arguments = [
        str(films[1]),
        "--weights",
        str(tmp_path / "w.safetensors"),
        "--size",
        "32px",
        "--frames",
        "9",
        "--windows",
        "3",
        "--out",
        str(tmp_path / "out"),
    ]
    done = CliRunner().invoke(app, [*arguments, "--json", "--videos", "1"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["overall"]["clips"] == 3 and found["overall"]["lpips"]["mean"] > 0 and found["perceptual"] == "alex-st"
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == found
    assert len(list((tmp_path / "out" / "videos").iterdir())) == 1
    table = CliRunner().invoke(app, [*arguments, "--perceptual", "none"]).output
    assert "32x32x9" in table and "LPIPS" in table and "megapixels/s" in table
    for wrong, told in (
        ([], "give --catalog DIR or files"),
        ([str(films[0]), "--split", "all"], "train, val, test"),
        ([str(tmp_path / "no.mp4")], "cannot read .*no.mp4"),
        (["--catalog", "x", "y.mp4"], "give --catalog DIR or files"),
    ):
        with pytest.raises(ConfigError, match=told):
            CliRunner().invoke(app, wrong, catch_exceptions=False)


def test_intervals():
    assert interval([2.0]).low is None
    found = interval([1.0, 2.0, 3.0, 6.0])
    half = 3.182 * math.sqrt(14 / 3 / 4)
    assert found.mean == 3 and (3 - found.low, found.high - 3) == pytest.approx((half, half), rel=1e-2)
    for freedom, expected in ((1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (1000, 1.962)):
        assert _quantile(freedom) == pytest.approx(expected, rel=1e-2), "of a table of Student's t"


@pytest.mark.parametrize("preset", ["vae-tiny", "vae-hunyuan", "vae-dc-ae"])
def test_presets(preset):
    found = load_settings(VAESettings, preset)
    with torch.device("meta"):
        model = build_autoencoder(found.autoencoder.kind)
    buckets = bucket_table(fitted(model)(found.plan)).buckets
    assert {b.frames for b in buckets} == {1, 17 if preset == "vae-tiny" else 32 if preset == "vae-dc-ae" else 33}
    for b in buckets:
        model.latent_shape(b.frames, b.height, b.width)  # fits
    assert found.engine.ema == 0.99 and found.loader.augment == "random"
    if preset != "vae-tiny":
        assert (found.optimizer.lr, found.gan.optimizer.lr) == (5e-5, 1e-4)
        assert (found.gan.start, found.gan.weight, found.gan.layers) == (250_000, 0.05, 5)
        assert found.perceptual.weight == 0.5 and found.steps == 450_000


def test_bf16_waits_for_a_gpu():
    """torch's own mistake, see `check_precision`."""
    check_precision("bf16", "cuda")
    check_precision("fp32", "cpu")
    with pytest.raises(ConfigError, match="fp32 on a CPU"):
        check_precision("bf16", "cpu")


def test_plugins_that_divide_the_last_layer_are_refused():
    for plugin in ("gemini", "hybrid"):
        with pytest.raises(ConfigError, match="a rank must hold whole"):
            load_settings(VAESettings, "vae-tiny", None, [f"engine.plugin={plugin}", "engine.precision=bf16"])
    with pytest.raises(ConfigError, match="trained on frames"):
        load_settings(VAESettings, "vae-tiny", None, ["loader.latents=only"])
