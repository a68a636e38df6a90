"""The DiT's task and its run: what is random, what is given, what is validated, what is resumed, what breaks."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from datakit.errors import ConfigError
from support.drawn_videos import encode
from support.plan_folders import bucket, window
from trainer.data.batch_sampler import Order
from trainer.data.dataloader import Batch, Loader, LoaderOptions, Position
from trainer.diffusion.conditioning import MODES, given_condition, latent_frames
from trainer.dit.task import DiTTask, build_model
from trainer.dit.train import train_dit
from trainer.models.autoencoders.build import build_autoencoder
from trainer.models.common.text_encoders import build_text_encoder
from trainer.models.common.weights import save_weights
from trainer.planning.plan import WINDOWS, Part, Plan, write_plan
from trainer.settings import DiTSettings, load_settings
from trainer.training.loop import NotFinite
from trainer.training.setup import Request

pytestmark = pytest.mark.slow

CLIPS = 5
SIZE = 32, 48
MODEL = [
    "model.hidden_size=48",
    "model.num_heads=2",
    "model.depth=1",
    "model.depth_single_blocks=1",
    "model.axes_dim=[4,10,10]",
]
QUICK = [
    "text.options={length: 8}",
    "loader.workers=0",
    "write_back=false",
    "log.tensorboard=false",
    "log.every=1",
    "preview.every=0",
    "plan.text_tokens=8",
    "watchdog_s=0",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Films of moving bars, a plan of them, and an autoencoder's weights."""
    folder = tmp_path_factory.mktemp("dit")
    rows = []
    for v in range(CLIPS):
        pictures = [np.full((*SIZE, 3), 30 + 40 * v, np.uint8) for _ in range(9)]
        for i, picture in enumerate(pictures):
            picture[:, 4 * i : 4 * i + 8] = 255 - 40 * v
        film = encode(folder / f"{v}.mp4", pictures, 24)
        rows.append(
            window(
                0,
                f"video {v}",
                clip_id=f"clip{v}",
                uri=str(film),
                frames=9,
                fps=24.0,
                time_base="1/12288",
                end_pts=9 * 512,
                crop_width=SIZE[1],
                crop_height=SIZE[0],
                width=SIZE[1],
                height=SIZE[0],
                caption=f"bar number {v}",
            )
        )
    planned(folder / "plan", rows)
    planned(folder / "plan-val", rows[:2])
    torch.manual_seed(0)
    save_weights(build_autoencoder("tiny").state_dict(), folder / "tiny.safetensors")
    return folder


def planned(folder: Path, rows: list[dict]) -> Plan:
    import pyarrow as pa

    buckets = [bucket(2, frames=9, height=SIZE[0], width=SIZE[1], tokens=3 * 24 + 8)]
    resolved = {"compression": [4, 8, 8], "causal": True, "patch": 1}
    return write_plan(
        folder,
        buckets,
        [Part("all", 1.0, {"content_hash": "0"}, "")],
        resolved,
        2,
        {},
        [pa.RecordBatch.from_pylist(rows, schema=WINDOWS)],
        [],
    )


def settings_for(home: Path, *sets: str) -> DiTSettings:
    return load_settings(
        DiTSettings, "tiny", None, [f"autoencoder.weights={home / 'tiny.safetensors'}", *MODEL, *QUICK, *sets]
    )


@pytest.fixture(scope="module")
def parts(home):
    """Autoencoder and text encoder."""
    return build_autoencoder("tiny", home / "tiny.safetensors"), build_text_encoder("minilm", length=8)


@pytest.fixture(scope="module")
def batches(home) -> list[Batch]:
    """The first epoch's micro-batches: of 2, 2 and 1 samples."""
    plan = Plan.open(home / "plan")
    with Loader(plan, Order(plan, 0), 0, 1, Position(0, 0), LoaderOptions(workers=0)) as loader:
        return [batch for _ in range(2) for batch in next(loader)[1]]


def task_for(home: Path, parts, *sets: str) -> DiTTask:
    return DiTTask(settings_for(home, *sets), *parts, torch.device("cpu"))


def random_model(task: DiTTask, parts) -> torch.nn.Module:
    torch.manual_seed(1)
    model = build_model(task.settings.model, task.architecture, 0)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float(name.endswith("scale")), std=0.1)
    return model


@pytest.mark.parametrize("mode", ["t2v", "i2v_head", "i2v_tail", "i2v_loop"])
def test_every_mode_trains_and_its_frames_are_told(home, parts, batches, mode):
    """The condition reaches the loss, a sample's does not depend on the batch, and every parameter learns."""
    task = task_for(home, parts, f"conditions={{{mode}: 1}}", "dropout=0")
    model = random_model(task, parts)
    batch = batches[0]
    together = task.sample(model, batch)
    for i in range(2):
        one = dataclasses.replace(
            batch,
            windows=batch.windows[i : i + 1],
            clip_ids=batch.clip_ids[i : i + 1],
            seeds=batch.seeds[i : i + 1],
            captions=batch.captions[i : i + 1],
            fps=batch.fps[i : i + 1],
            motion_vmaf=batch.motion_vmaf[i : i + 1],
            video=batch.video[i : i + 1],
            raw=[0],
        )
        alone = task.sample(model, one)
        assert torch.allclose(alone.losses[0], together.losses[i], rtol=1e-4) and alone.times[0] == together.times[i]
    together.losses.mean().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0
        for n, p in model.named_parameters()
        if mode != "t2v" or n != "cond_in.weight"
    )
    nothing = task_for(home, parts, "conditions={t2v: 1}", "dropout=0").sample(model, batch)
    assert torch.equal(nothing.losses, together.losses) == (mode == "t2v"), (
        "the same noise and time, with another condition"
    )


@pytest.mark.parametrize(
    "mode, given",
    [
        ("i2v_head", [0]),
        ("i2v_tail", [18]),
        ("i2v_loop", [0, 18]),
        ("v2v_head", range(9)),
        ("v2v_tail", range(10, 19)),
        ("v2v_head_easy", range(17)),
        ("v2v_tail_easy", range(2, 19)),
    ],
)
def test_given_frames_are_where_open_sora_has_them(parts, mode, given):
    """73 frames, 19 latents: one frame fills a latent, 33 fill 9, 65 fill 17. At the end, the frames are encoded by
    themselves."""
    torch.manual_seed(0)
    video = torch.rand(1, 3, 73, 16, 16) * 2 - 1
    with torch.no_grad():
        cond = given_condition(video, MODES[mode], parts[0])
        latents = parts[0].encode(video).mean
        again = given_condition(video, MODES[mode], parts[0], latents)
        tail = MODES[mode].tail
        apart = parts[0].encode(video[:, :, -tail:]).mean if tail else None
    mask = cond[0, 0, :, 0, 0]
    assert mask.nonzero().flatten().tolist() == list(given) and torch.allclose(cond, again, atol=1e-5)
    assert torch.equal(cond[:, 1:][:, :, mask == 0], torch.zeros_like(cond[:, 1:][:, :, mask == 0]))
    head = latent_frames(MODES[mode], parts[0]).head
    assert torch.allclose(cond[:, 1:, :head], latents[:, :, :head], atol=1e-5), "of a causal autoencoder"
    if apart is not None:
        assert torch.allclose(cond[:, 1:, -apart.shape[2] :], apart, atol=1e-6)
        assert not torch.allclose(apart, latents[:, :, -apart.shape[2] :], atol=1e-3), (
            "the whole video's latents know what came before"
        )


def test_cached_latents_are_worth_what_frames_are(home, parts, batches):
    """Losses from latents equal those from frames; a condition of the end, that latents lack, is refused by name."""
    task = task_for(home, parts)
    model, batch = random_model(task, parts), batches[1]
    encoded = parts[0].encode(task._video(batch))
    cached = dataclasses.replace(batch, video=None, raw=[], mean=encoded.mean.detach(), std=encoded.std.detach())
    half = dataclasses.replace(
        batch, video=batch.video[1:], raw=[1], mean=encoded.mean[:1].detach(), std=encoded.std[:1].detach()
    )
    for other in (cached, half):
        assert torch.allclose(task.sample(model, other).losses, task.sample(model, batch).losses, rtol=1e-4)
    with pytest.raises(ConfigError, match=f"i2v_tail needs the frames of clip {batch.clip_ids[0]}"):
        task_for(home, parts, "conditions={i2v_tail: 1}").sample(model, cached)


def test_text_is_dropped_where_it_is_drawn(home, parts, batches):
    """Dropout of 1: what the caption says makes no difference; of 0 it does."""
    batch = batches[0]
    other = dataclasses.replace(batch, captions=["something else altogether"] * 2)
    for dropout, same in ((1, True), (0, False)):
        task = task_for(home, parts, f"dropout={dropout}")
        model = random_model(task, parts)
        assert torch.equal(task.sample(model, batch).losses, task.sample(model, other).losses) == same


def test_validation_is_at_fixed_noise_whatever_the_batch(home, parts, batches):
    task = task_for(home, parts)
    model = random_model(task, parts)
    found = task.validate(model, batches[0], [0.2, 0.8])
    shuffled = dataclasses.replace(batches[0], seeds=[1, 2])
    assert found.shape == (2, 2) and torch.equal(task.validate(model, shuffled, [0.2, 0.8]), found), (
        "seeds do not count"
    )
    swapped = dataclasses.replace(
        batches[0],
        clip_ids=batches[0].clip_ids[::-1],
        captions=batches[0].captions[::-1],
        video=batches[0].video.flip(0),
    )
    assert torch.allclose(task.validate(model, swapped, [0.2, 0.8]), found.flip(1), rtol=1e-4)


def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(home, tmp_path):
    """Weights, moments and EMA after 5 steps: at once, or stopped after 2 and resumed (mid-epoch: an epoch has 2
    steps)."""
    whole = train_dit(
        Request(tmp_path / "whole", plan=home / "plan", quiet=True),
        settings_for(home, "steps=5", "checkpoint.every=2", "validation.every=2"),
    )
    train_dit(
        Request(tmp_path / "parts", plan=home / "plan", quiet=True),
        settings_for(home, "steps=3", "checkpoint.every=2", "validation.every=2"),
    )
    ended = train_dit(
        Request(tmp_path / "parts", resume=True, quiet=True),
        settings_for(home, "steps=5", "checkpoint.every=2", "validation.every=2"),
    )
    assert (whole.status, ended.status, ended.step) == (
        "finished",
        "finished",
        5,
    ) and whole.checkpoint.name == ended.checkpoint.name == "step-000005"
    assert shards(whole.checkpoint) and all(
        torch.equal(a, b) for a, b in zip(shards(whole.checkpoint), shards(ended.checkpoint), strict=True)
    )
    lines = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    before = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [(x["step"], x.get("loss"), x.get("val_loss")) for x in before] == [
        (x["step"], x.get("loss"), x.get("val_loss")) for x in lines if x["step"] != 3 or "loss" in x
    ]
    with pytest.raises(ConfigError, match="is not empty: --resume"):
        train_dit(Request(tmp_path / "parts", plan=home / "plan"), settings_for(home, "steps=5"))
    with pytest.raises(ConfigError, match="keeps its settings of seed"):
        train_dit(Request(tmp_path / "parts", resume=True), settings_for(home, "steps=9", "seed=4"))


def shards(folder: Path) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    return [tensor for path in sorted(folder.rglob("*.safetensors")) for _, tensor in sorted(load_file(path).items())]


def test_any_number_of_processes_trains_on_the_same(home, tmp_path, monkeypatch):
    """Two processes through the command line (the last step of an epoch has work for one of them only), then one: the
    losses of one all along."""
    from trainer.training.launch import on_this_machine

    settings = settings_for(home, "steps=6", "checkpoint.every=3", "validation.every=3")
    train_dit(Request(tmp_path / "one", plan=home / "plan", quiet=True), settings)
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    on_this_machine(
        2,
        [
            "train",
            "dit",
            "--plan",
            str(home / "plan"),
            "--config",
            str(file),
            "--set",
            "steps=3",
            "--out",
            str(tmp_path / "two"),
        ],
        tmp_path / "two",
    )
    assert (
        sum(
            path.name.startswith("shard") and path.suffix == ".safetensors"
            for path in (tmp_path / "two" / "checkpoints" / "step-000003").rglob("*")
        )
        == 2
    )
    train_dit(Request(tmp_path / "two", resume=True, quiet=True), settings)
    for name, within in (("loss", 1e-4), ("val_loss", 1e-4), ("norm", 1e-3)):
        one, two = (numbers(tmp_path / run / "log.jsonl", name) for run in ("one", "two"))
        assert one.keys() == two.keys() and all(two[step] == pytest.approx(one[step], rel=within) for step in one), name


def numbers(log: Path, name: str) -> dict[int, float]:
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_clip(home, tmp_path, monkeypatch):
    sample = DiTTask.sample

    def poisoned(self, model, batch):
        found = sample(self, model, batch)
        bad = torch.tensor([clip == "clip3" for clip in batch.clip_ids])
        return dataclasses.replace(found, losses=torch.where(bad, torch.nan, found.losses))

    monkeypatch.setattr(DiTTask, "sample", poisoned)
    with pytest.raises(
        NotFinite,
        match=r"step \d: the loss of clip clip3 is not finite \(clips of the step: clip.*\); there is no checkpoint "
        r"yet",
    ):
        train_dit(Request(tmp_path / "run", plan=home / "plan", quiet=True), settings_for(home, "steps=5"))


def test_previews_are_videos_of_captions(home, tmp_path, capsys):
    train_dit(
        Request(tmp_path / "run", plan=home / "plan"),
        settings_for(home, "steps=1", "preview.every=1", "preview.steps=2", "validation.every=0"),
    )
    from datakit.video.probe import probe

    said = capsys.readouterr().out
    assert "attention: torch's scaled_dot_product_attention on cpu" in said and "step 1/1: loss" in said
    made = sorted((tmp_path / "run" / "previews" / "step-000001").glob("*.mp4"))
    assert [path.name for path in made] == ["00.mp4", "01.mp4"]
    facts = probe(str(made[0]))
    assert (facts.width, facts.height) == (SIZE[1], SIZE[0])
    assert "bar number" in (made[0].parent / "prompts.txt").read_text()


def test_a_plan_for_other_models_is_refused(home, tmp_path):
    with pytest.raises(ConfigError, match=r"plan.patch=1, these models need 2: make it again"):
        train_dit(Request(tmp_path / "run", plan=home / "plan"), settings_for(home, "model.patch_size=2"))
    with pytest.raises(ConfigError, match="autoencoder hunyuan needs weights"):
        train_dit(Request(tmp_path / "run", plan=home / "plan"), settings_for(home, "autoencoder={kind: hunyuan}"))
    assert not (tmp_path / "run").exists()
