"""What a run has learned, from its folder alone: equal to what its engine had, whatever plugin and number of processes
wrote it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from typer.testing import CliRunner

from datakit.cli.train import train_app
from datakit.errors import ConfigError
from support import export_worker
from support.bar_films import make_bars
from support.export_worker import settings_for, train_and_tell
from trainer.dit.task import architecture_for, build_frozen, build_model
from trainer.export.dit import RUN_KEY, export_run, run_weights
from trainer.export.vae import trained
from trainer.models.autoencoders.build import build_autoencoder
from trainer.models.common.lora import load_lora, merge_lora
from trainer.models.common.weights import read_metadata
from trainer.models.mmdit.checkpoint_io import CONFIG_KEY, export_open_sora, layout_of, load_mmdit
from trainer.settings import load_settings
from trainer.training.setup import Request
from trainer.vae.settings import VAESettings
from trainer.vae.train import train_vae

pytestmark = pytest.mark.slow

TOGETHER = ("ddp", "zero2", "tp", "gemini")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return make_bars(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def runs(home) -> Path:
    """Runs by two processes, one for each of `TOGETHER`, each with what its engine gave at the end (`NAME-told`)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[3]), os.environ["PYTHONPATH"]]),
    }
    command = [
        sys.executable,
        export_worker.__file__,
        str(home / "plan"),
        str(home / "tiny.safetensors"),
        str(home),
        *TOGETHER,
    ]
    logs = [home / f"log{rank}.txt" for rank in (0, 1)]
    both = [
        subprocess.Popen(command, env=env | {"RANK": str(rank)}, stdout=log.open("w"), stderr=subprocess.STDOUT)
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(timeout=180) for process in both]
    finally:
        for process in both:
            process.kill()
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    return home


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", TOGETHER)
def test_what_is_read_is_what_the_engine_had(runs, home, name):
    """Weights and EMA bit for bit; the config is that of the model that was trained; neither needs a process group."""
    assert len(list((runs / name / "checkpoints" / "step-000003" / "model").glob("shard-*-of-00002.safetensors"))) == 2
    settings = settings_for(home / "tiny.safetensors", *export_worker.RUNS[name])
    start = build_model(settings.model, architecture_for(settings.model, *build_frozen(settings)), settings.seed)
    weights = run_weights(runs / name, ema=False)
    assert same(weights.state, load_file(runs / f"{name}-told" / "weights.safetensors"))
    assert weights.architecture.config == start.config
    assert (weights.path.name, weights.step, weights.ema, weights.settings) == ("step-000003", 3, False, settings)
    assert sum(not torch.equal(t, start.state_dict()[n]) for n, t in weights.state.items()) > 30, "it was trained"
    average = run_weights(runs / name)
    assert average.ema == (name != "tp") and {t.dtype for t in average.state.values()} == {torch.float32}
    assert same(average.state, load_file(runs / f"{name}-told" / "ema.safetensors") if average.ema else weights.state)
    assert not dist.is_initialized()


def test_a_file_of_it_is_loaded_with_its_config(runs, tmp_path):
    """In both layouts, bfloat16 if nothing else is said; `load_mmdit` needs nothing but the file."""
    told = load_file(runs / "zero2-told" / "ema.safetensors")
    done = CliRunner().invoke(
        train_app, ["export", str(runs / "zero2"), "-o", str(tmp_path / "a.safetensors"), "--json"]
    )
    checkpoint = str(runs / "zero2" / "checkpoints" / "step-000003")
    assert json.loads(done.stdout) == {
        "file": str(tmp_path / "a.safetensors"),
        "checkpoint": checkpoint,
        "step": 3,
        "ema": True,
    }
    loaded = load_mmdit(tmp_path / "a.safetensors")
    config = run_weights(runs / "zero2").architecture.config
    assert loaded.config == config and config.mlp_ratio == 2.5 and config.axes_dim == (4, 10, 10), (
        "what shapes do not show"
    )
    assert same(dict(loaded.state_dict()), {name: tensor.bfloat16() for name, tensor in told.items()})
    origin = json.loads(read_metadata(tmp_path / "a.safetensors")[RUN_KEY])
    assert origin == {"run_id": json.loads((runs / "zero2" / "run.json").read_text())["run_id"], "step": 3, "ema": True}
    fused = tmp_path / "b.safetensors"
    arguments = ["export", str(runs / "tp"), "-o", str(fused), "--layout", "fused", "--dtype", "float32", "--step", "2"]
    assert "weights after 2 steps" in CliRunner().invoke(train_app, arguments).stdout
    assert layout_of(load_file(fused)) == json.loads(read_metadata(fused)[CONFIG_KEY])["layout"] == "fused"
    wanted = run_weights(runs / "tp", step=2)
    assert same(dict(load_mmdit(fused, config=wanted.architecture.config).state_dict()), wanted.state)


def test_what_cannot_be_exported_is_told_in_a_line(runs, home, tmp_path):
    for run, options, said in (
        (tmp_path, {}, "is no folder of a training run: it has no readable run.json"),
        (runs / "ddp", {"step": 7}, r"ddp has no whole checkpoint of step 7: there are 1, 2, 3"),
        (
            runs / "ddp",
            {"lora": True},
            r"ddp has trained the whole model \(model.lora is null\): export it without --lora",
        ),
        (runs / "ddp", {"rescale": True}, "--rescale is for autoencoders"),
    ):
        with pytest.raises(ConfigError, match=said):
            export_run(run, tmp_path / "x.safetensors", **options)
    with pytest.raises(ConfigError, match="ends in .safetensors"):
        export_run(runs / "ddp", tmp_path / "folder")
    (empty := tmp_path / "empty").mkdir()
    for name in ("run.json", "settings.yaml"):
        (empty / name).write_text((runs / "ddp" / name).read_text())
    (empty / "checkpoints" / "step-000004.partial").mkdir(parents=True)
    with pytest.raises(ConfigError, match="empty has no whole checkpoint"):
        run_weights(empty)
    assert not list(tmp_path.glob("x*"))


def test_damage_is_found(runs, home, tmp_path):
    import shutil

    shutil.copytree(runs / "ddp", tmp_path / "ddp", symlinks=True)
    file = sorted((tmp_path / "ddp" / "checkpoints" / "step-000003" / "model").glob("*.safetensors"))[1]
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(ConfigError, match="shard-00001-of-00002.safetensors is damaged: its checksum"):
        run_weights(tmp_path / "ddp")
    assert run_weights(tmp_path / "ddp", step=2).step == 2, "another checkpoint is whole"


def test_lora_is_merged_or_alone(home, tmp_path):
    """Trained on weights in a file, which stay: base and LoRA alone make the merged model."""
    settings = settings_for(home / "tiny.safetensors")
    base = build_model(settings.model, architecture_for(settings.model, *build_frozen(settings)), 7)
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    export_open_sora(base, tmp_path / "base.safetensors")
    before = (tmp_path / "base.safetensors").read_bytes()
    lora = [
        f"model.weights={tmp_path / 'base.safetensors'}",
        "model.lora={rank: 2, alpha: 4, targets: ['double_blocks.*_mlp.*']}",
        "engine.ema=0.5",
    ]
    train_and_tell(home / "plan", tmp_path / "run", settings_for(home / "tiny.safetensors", *lora))
    merged = run_weights(tmp_path / "run")
    told = load_file(tmp_path / "run-told" / "ema.safetensors")
    name = "double_blocks.0.img_mlp.0"
    b, a = (told[f"{name}.lora_{f}.default.weight"] for f in "BA")
    wanted = base.state_dict()[f"{name}.weight"] + 2 * b @ a
    assert torch.allclose(merged.state[f"{name}.weight"], wanted, atol=1e-6) and b.abs().max() > 1e-3
    assert merged.ema and merged.architecture.config == base.config
    assert torch.equal(
        merged.state["single_blocks.0.linear2.weight"], base.state_dict()["single_blocks.0.linear2.weight"]
    )
    export_run(tmp_path / "run", tmp_path / "merged.safetensors", dtype=torch.float32)
    assert same(load_file(tmp_path / "merged.safetensors"), merged.state)
    for place in ("lora.safetensors", "lora"):
        arguments = ["export", str(tmp_path / "run"), "--lora", "-o", str(tmp_path / place)]
        assert CliRunner().invoke(train_app, arguments, catch_exceptions=False).exit_code == 0
        model = load_mmdit(tmp_path / "base.safetensors")
        load_lora(model, tmp_path / place)
        merge_lora(model)
        assert same(dict(model.state_dict()), merged.state)
    assert (tmp_path / "base.safetensors").read_bytes() == before


def test_lora_on_random_weights_is_refused(home):
    """Gates are zero before everything: it could learn nothing."""
    with pytest.raises(ConfigError, match="^model: lora adapts a model that has learned something: set model.weights$"):
        settings_for(home / "tiny.safetensors", "model.lora={rank: 2}")


def test_an_autoencoder_is_exported_by_the_same_command(home, tmp_path):
    settings = load_settings(
        VAESettings,
        "vae-tiny",
        None,
        [
            "autoencoder.sizes={widths: [16, 32, 32]}",
            "autoencoder.weights=null",
            "perceptual=null",
            "gan=null",
            "steps=2",
            "engine={plugin: zero1, precision: fp32, ema: 0.5}",
            "loader={workers: 0, augment: none}",
            "write_back=false",
            "log.tensorboard=false",
            "validation.every=0",
            "preview.every=0",
            "watchdog_s=0",
            "checkpoint={every: 1, keep: 2}",
            "optimizer={lr: 1.0e-3, warmup: 0}",
        ],
    )
    train_vae(Request(tmp_path / "run", plan=home / "plan", quiet=True), settings)
    for arguments, step, ema in ((["--step", "1", "--no-ema"], 1, False), ([], 2, True)):
        out = tmp_path / f"{step}.safetensors"
        command = ["export", str(tmp_path / "run"), "-o", str(out), "--json", *arguments]
        done = CliRunner().invoke(train_app, command, catch_exceptions=False)
        assert (json.loads(done.stdout)["step"], json.loads(done.stdout)["ema"]) == (step, ema)
        wanted = trained(settings, tmp_path / "run" / "checkpoints" / f"step-{step:06d}", ema)
        assert same(dict(build_autoencoder("tiny", out).state_dict()), dict(wanted.state_dict()))
    assert not same(load_file(tmp_path / "1.safetensors"), load_file(tmp_path / "2.safetensors"))
    with pytest.raises(ConfigError, match="--lora and --layout are for diffusion transformers"):
        export_run(tmp_path / "run", tmp_path / "x.safetensors", layout="fused")
    with pytest.raises(ConfigError, match="is not a run of `datakit train dit`"):
        run_weights(tmp_path / "run")
