"""Sampling in bulk: what comes out depends on (prompt, seed, number) alone, is there once, and whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import polars as pl
import pytest
import torch
from mmdit_golden import GOLDEN, close, golden
from safetensors import safe_open
from safetensors.torch import load_file
from sampling import prompts, save_model, settings

from catalogs.tables import Catalog
from datakit.errors import ConfigError, MissingDependency
from datakit.video.decode import VideoReader
from sampler.batch import sample
from sampler.checkpoint import open_checkpoint
from sampler.denoiser import Denoiser
from sampler.prompts import Prompt
from sampler.references import Reference
from sampler.samples import FILES, expand
from sampler.settings import SamplingSettings
from sampler.worker import Denoised, Worker
from trainer.conditions import MODES
from trainer.diffusion import Text, condition, pack
from trainer.models.autoencoder import build_autoencoder
from trainer.models.export import export_open_sora, load_mmdit
from trainer.models.mmdit import MMDiT

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    return str(save_model(tmp_path_factory.mktemp("weights") / "model.safetensors"))


def pixels(path: Path) -> np.ndarray:
    with VideoReader(str(path)) as reader:
        return np.stack([picture.rgb() for picture in reader.frames()])


def latents(out: Path) -> dict[str, torch.Tensor]:
    return {path.stem: load_file(path)["latents"] for path in (out / "work" / "latents").glob("*.safetensors")}


def rows(out: Path) -> pl.DataFrame:
    return Catalog(out).scan("samples").sort("name").collect()


@pytest.mark.parametrize("name", ["denoise_t2v_tiny", "denoise_i2v_head_tiny"])
def test_the_loop_is_that_of_the_reference(name, tmp_path):
    """From a file of weights to the latents of Open-Sora 2.0's own code."""
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        about = {k: v if k == "cond_type" else json.loads(v) for k, v in file.metadata().items()}
    part = {p: {k.split(".", 1)[1]: v for k, v in tensors.items() if k.startswith(f"{p}.")} for p in ("weights", "inputs", "expected")}
    _, config, _, _ = golden("mmdit_v2_tiny")
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in about.items() if k in config.__dict__}
    model = MMDiT(type(config)(**fields, layout="fused" if about["fused_qkv"] else "separate"))
    model.load_state_dict(part["weights"])
    export_open_sora(model, tmp_path / "m.safetensors")
    i = part["inputs"]
    own = SamplingSettings(
        steps=about["num_steps"], guidance=about["guidance"], image_guidance=about["guidance_img"], image_over_frames=about["scale_temporal_osci"])
    denoiser = Denoiser(load_mmdit(tmp_path / "m.safetensors").eval(), own)
    found = denoiser(
        i["noise"], condition(i["mask"], i["masked_ref"]), Text(i["txt_cond"], i["vec_cond"]), Text(i["txt_uncond"], i["vec_uncond"]),
        about["cond_type"])
    given = i["mask"].bool().expand_as(found)
    expected = part["expected"]["packed_latent"]
    kept = pack(torch.where(given, i["masked_ref"], torch.zeros(())))
    assert torch.equal(found[given], i["masked_ref"][given]), "given frames are in their places"
    free = pack((~given).float()).bool()
    assert close(torch.where(free, pack(found), kept), torch.where(free, expected, kept))


def test_what_is_made_does_not_depend_on_how(weights, tmp_path, ray_address):
    """Batches of one, of two and of five, one actor and two: the same videos within 1e-5, and bit for bit where batches are equal."""
    own = ("samples=2", "output.format=lossless", "work.keep=true")
    made = {}
    for name, more in {"one": ("work.batch=1",), "two": ("work.batch=2", "work.actors=2"), "five": ("work.batch=5",), "again": ("work.batch=1", "work.actors=2")}.items():
        done = sample(prompts(3), weights, str(tmp_path / name), settings(*own, *more), ray_address)
        assert (done.asked, done.done, done.failed) == (6, 6, 0)
        made[name] = latents(tmp_path / name)
    assert len(made["one"]) == 6 and len({t.sum().item() for t in made["one"].values()}) == 6, "each is a video of its own"
    for name in ("two", "five", "again"):
        assert made[name].keys() == made["one"].keys()
        assert max((made[name][k] - made["one"][k]).abs().max() for k in made["one"]) <= 1e-5
    assert all(torch.equal(made["again"][k], made["one"][k]) for k in made["one"])
    files = {name: sorted((tmp_path / name / FILES).iterdir()) for name in made}
    assert [f.name for f in files["one"]] == [f.name for f in files["again"]]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(files["one"], files["again"]))
    table = rows(tmp_path / "one")
    assert table["status"].to_list() == ["done"] * 6 and table["forwards"].to_list() == [8] * 6
    assert sorted(set(zip(table["seed"], table["number"]))) == [(0, 0), (0, 1)] and table["text"][0].endswith(" 12 FPS.")
    more = sample(prompts(4), weights, str(tmp_path / "one"), settings(*own, "work.batch=1"), ray_address)
    assert (more.asked, more.there, more.done) == (8, 6, 2), "of a longer list, what is missing is made"
    assert all(torch.equal(latents(tmp_path / "one")[k], made["one"][k]) for k in made["one"])


def test_a_catalog_of_samples_is_a_catalog(weights, tmp_path, ray_address):
    """Scores, views and reports work on it; the prompt is the caption."""
    from catalogs.report import report
    from pipelines.score import score

    out = tmp_path / "out"
    sample(prompts(2), weights, str(out), settings(), ray_address)
    counts = score(str(out), stages=["motion", "quality"], ray=ray_address)
    assert counts["clips"] == 2 and counts["clips_with_errors"] == 0
    view = Catalog(out).clips(columns=["clip_id", "caption", "status", "num_frames", "fps", "brightness"]).collect()
    assert sorted(view["caption"]) == [p.text for p in prompts(2)] and set(view["status"]) == {"kept"}
    assert view["num_frames"].to_list() == [9, 9] and view["fps"].to_list() == [12.0, 12.0] and view["brightness"].null_count() == 0
    assert set(view["clip_id"]) == set(rows(out)["clip_id"])
    assert "samples" in str(Catalog(out).scan("runs").collect()["config"][0])
    report(str(out), tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert not (out / "work").exists(), "nothing is left of the work"


@pytest.mark.parametrize("mode", MODES)
def test_modes_keep_what_they_are_given(mode, weights, tmp_path, ray_address):
    """The latents of given frames are the reference's own, in every sample of a batch, and the first or last frame shows it."""
    given = MODES[mode]
    frames = 17 if mode.startswith(("t2v", "i2v")) else 81
    rng = np.random.default_rng(3)
    references = []
    for i in range(2):
        block = rng.integers(40, 216, (4, 6, 3), dtype=np.uint8)
        picture = cv2.resize(block, (48, 32), interpolation=cv2.INTER_CUBIC)
        if mode.startswith("v2v"):
            from sampler.writer import write

            references.append(str(write(np.stack([np.roll(picture, t, 1) for t in range(70)]), tmp_path / f"r{i}", 12.0, "lossless")))
        else:
            references.append(str(tmp_path / f"r{i}.png"))
            cv2.imwrite(references[-1], picture[..., ::-1])
    count = {"t2v": 0, "i2v_loop": 2}.get(mode, 1)
    asked = [Prompt(f"p{i}", references=tuple(Reference(r) for r in ((references * 2)[i : i + count]))) for i in range(2)]
    own = settings(f"video.mode={mode}", f"video.num_frames={frames}", "work.batch=2", "work.keep=true", "output.format=lossless", "sampling.steps=2")
    done = sample(asked, weights, str(tmp_path / "out"), own, ray_address)
    assert done.done == 2 and done.failed == 0, done.first_problems
    conds = [load_file(path)["cond"] for path in (tmp_path / "out" / "work" / "given").glob("*")]
    assert len(conds) == (2 if count else 0)
    for found in latents(tmp_path / "out").values():
        assert found.shape == (16, (frames - 1) // 4 + 1, 4, 6)
        if count:
            head, tail = -(-(given.head - 1) // 4) + 1 if given.head else 0, -(-(given.tail - 1) // 4) + 1 if given.tail else 0
            own_cond = next(c[0] for c in conds if torch.equal(c[0, 1:][:, c[0, 0, :, 0, 0] > 0], found[:, c[0, 0, :, 0, 0] > 0]))
            assert own_cond[0, :, 0, 0].tolist() == [1.0] * head + [0.0] * (own_cond.shape[1] - head - tail) + [1.0] * tail
    model = build_autoencoder("tiny", "embedded").eval()
    for row in rows(tmp_path / "out").to_dicts():
        video = pixels(tmp_path / "out" / row["path"])
        assert video.shape == (frames, 32, 48, 3) and row["num_frames"] == frames and row["mode"] == mode
        if mode in ("i2v_head", "i2v_loop"):
            shown = cv2.imread(row["references"][0])[..., ::-1].copy()
            with torch.no_grad():
                again = model(torch.from_numpy(shown).permute(2, 0, 1)[None, :, None] / 127.5 - 1)[0]
            again = ((again[0, :, 0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).numpy()
            assert np.abs(video[0] - again).max() <= 1, "the first frame is the reference, as the autoencoder shows it"


def test_colours_of_files_are_those_that_were_made(weights, tmp_path, ray_address):
    """mp4 against lossless, of the same latents: flat patches within 3 of 255, tagged BT.709."""
    from sampler.writer import write

    rng = np.random.default_rng(0)
    flat = np.repeat(np.repeat(rng.integers(16, 240, (1, 4, 6, 3), dtype=np.uint8), 16, 1), 16, 2).repeat(5, 0)
    path = write(flat, tmp_path / "flat", 24.0)
    centres = (slice(None), slice(8, None, 16), slice(8, None, 16))
    assert np.abs(pixels(path).astype(int)[centres] - flat[centres]).max() <= 3
    probe = subprocess.run(["ffprobe", "-v", "error", "-show_streams", "-of", "json", str(path)], capture_output=True, text=True) if _has_ffprobe() else None
    if probe is not None:
        stream = json.loads(probe.stdout)["streams"][0]
        assert [stream[k] for k in ("color_space", "color_transfer", "color_primaries", "color_range", "codec_name")] == ["bt709"] * 3 + ["tv", "h264"]
    assert np.array_equal(pixels(write(flat, tmp_path / "flat", 24.0, "lossless")), flat)
    folder = write(flat, tmp_path / "frames", 24.0, "frames")
    assert np.array_equal(cv2.imread(str(folder / "00003.png"))[..., ::-1], flat[3]) and len(list(folder.iterdir())) == 5
    from PIL import Image

    gif = Image.open(write(flat, tmp_path / "flat", 25.0, "gif"))
    assert gif.n_frames == 5 and gif.info["duration"] == 40


def _has_ffprobe() -> bool:
    import shutil

    return shutil.which("ffprobe") is not None


KILL = """
import os, signal, sys
from sampling import prompts, settings
from sampler import batch
before = batch._Run._pass
def passed(self, pool, name, *args, **more):
    if name == sys.argv[4] and sys.argv[5] == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == sys.argv[4]:
        self._commit = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
    return before(self, pool, name, *args, **more)
batch._Run._pass = passed
batch.sample(prompts(3), sys.argv[1], sys.argv[2], settings("output.format=lossless", "work.batch=1"), sys.argv[3])
"""


@pytest.mark.parametrize("name, when", [("encode", "after"), ("denoise", "after"), ("decode", "before"), ("decode", "after")])
def test_a_kill_redoes_no_finished_pass(name, when, weights, tmp_path, ray_address):
    """The process is killed between a pass and its commit: the files of that pass are as they were after the next run, or done with."""
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    killed = subprocess.run([sys.executable, "-c", KILL, weights, str(out), ray_address, name, when], env=environment, cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (out / "work").rglob("*.safetensors")}
    videos = {path: path.stat().st_mtime_ns for path in (out / FILES).glob("*")}
    assert before and (len(videos) == 3) == (name == "decode" and when == "after")
    again = sample(prompts(3), weights, str(out), settings("output.format=lossless", "work.batch=1", "work.keep=true"), ray_address)
    assert (again.done + again.there, again.failed) == (3, 0)
    kept = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in before}
    assert kept == before, "what was finished is not done again"
    assert rows(out)["status"].to_list() == ["done"] * 3 and Catalog(out).clips().collect().height == 3
    assert not [path for path in (out / FILES).iterdir() if path.name.startswith(".")]
    whole = sample(prompts(3), weights, str(tmp_path / "whole"), settings("output.format=lossless", "work.batch=1"), ray_address)
    assert whole.done == 3
    assert {p.name: p.read_bytes() for p in (out / FILES).iterdir()} == {p.name: p.read_bytes() for p in (tmp_path / "whole" / FILES).iterdir()}


def test_memory_that_is_too_small_halves_the_batch(weights, tmp_path, monkeypatch):
    own = settings("work.batch=4")
    checkpoint = open_checkpoint(weights, own)
    asked = expand(prompts(4), own, checkpoint, checkpoint.describe_autoencoder())
    worker = Worker(checkpoint, own, str(tmp_path), str(tmp_path / "work"), gpu=False)
    worker.encode(asked)
    sizes, forward = [], MMDiT.forward

    def small(self, img, *args, **more):
        sizes.append(img.shape[0])
        if img.shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, img, *args, **more)

    monkeypatch.setattr(MMDiT, "forward", small)
    answers = worker.denoise(asked)
    assert all(isinstance(a, Denoised) and a.batch == 1 for a in answers) and max(sizes) == 8, "two branches of four, of two, of one"
    sizes.clear()
    assert len(worker.denoise(asked)) == 4 and max(sizes) == 2, "and does not try again what did not fit"
    monkeypatch.setattr(MMDiT, "forward", lambda self, img, *a, **m: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    failed, = worker.denoise(asked[:1])
    assert failed.kind == "out_of_memory" and "does not fit" in failed.message


def test_several_processes_share_a_video(weights, tmp_path, ray_address):
    """Tensor and sequence parallelism over gloo give what one process gives."""
    plain = settings("work.keep=true", "work.batch=1", "samples=1")
    sample(prompts(2), weights, str(tmp_path / "one"), plain, ray_address)
    for name in ("tensor_parallel", "sequence_parallel"):
        own = settings("work.keep=true", "work.batch=1", f"work.{name}=2", "work.num_cpus=0.5", "work.threads=1")
        done = sample(prompts(2), weights, str(tmp_path / name), own, ray_address)
        assert done.done == 2, done.first_problems
        one, two = latents(tmp_path / "one"), latents(tmp_path / name)
        assert one.keys() == two.keys() and max((one[k] - two[k]).abs().max() for k in one) <= 1e-4


@pytest.mark.parametrize("sets, message", [
    (("video.num_frames=10",), "4k \\+ 1|9"),
    (("video.height=33",), "multiples of 8"),
    (("video.height=32", "video.width=48", "video.resolution=256px"), "not both"),
    (("video.mode=i2v_head",), "reference"),
    (("video.mode=v2v_head", "video.num_frames=33"), "33"),
    (("video.mode=upside_down",), "video.mode"),
    (("sampling.guidance=0.5",), "sampling.guidance"),
    (("autoencoder.kind=hunyuan",), "needs weights"),
    (("autoencoder.kind=dc-ae", "autoencoder.weights=nowhere.safetensors"), "nowhere"),
    (("text.kind=t5-clip", "text.options={}"), "t5|T5"),
    (("prompt.refine=true",), "which language model"),
    (("image.model=nowhere/at-all",), "nowhere"),
    (("work.fp8=row", "work.precision=fp32"), "bf16"),
])
def test_what_makes_no_sense_is_refused_before_anything_is_loaded(sets, message, weights, tmp_path, monkeypatch):
    monkeypatch.setattr("sampler.batch.RaySession.__enter__", lambda self: pytest.fail("Ray was started"))
    with pytest.raises((ConfigError, MissingDependency), match=message):
        sample(prompts(1), weights, str(tmp_path / "out"), settings(*sets))
    assert not (tmp_path / "out").exists()


def test_odd_folders_and_prompts_are_refused(weights, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x.txt").write_text("mine")
    with pytest.raises(ConfigError, match="neither empty nor"):
        sample(prompts(1), weights, str(tmp_path / "full"), settings())
    with pytest.raises(ConfigError, match="no prompt"):
        sample([], weights, str(tmp_path / "out"), settings())
    with pytest.raises((ConfigError, MissingDependency), match="nowhere"):
        sample(prompts(1), "nowhere.safetensors", str(tmp_path / "out"), settings())
    twice = sample([*prompts(1), *prompts(1)], weights, str(tmp_path / "out"), settings(), dry_run=True)
    assert twice.asked == 1, "the same is sampled once"


def test_the_command(weights, tmp_path, ray_address):
    """Estimate, result, and an exit code for scripts."""
    command = [sys.executable, "-m", "datakit.cli", "sample", "a cat", "a dog", "--ckpt", weights, "--out", str(tmp_path / "out"), "--ray", ray_address]
    command += [part for one in settings.__globals__["SETS"] for part in ("--set", one)]
    shown = subprocess.run([*command, "--num-samples", "2", "--motion-score", "3", "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "4 to make: 9 frames of 32×48; 8 forwards each" in shown.stdout and not (tmp_path / "out").exists()
    made = subprocess.run([*command, "--motion-score", "3", "--json"], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    said = json.loads(made.stdout)
    assert (said["asked"], said["done"], said["failed"]) == (2, 2, 0)
    assert rows(tmp_path / "out")["text"].to_list() == ["a cat 12 FPS, 3 motion score.", "a dog 12 FPS, 3 motion score."]
    wrong = subprocess.run([*command, "--mode", "i2v_head"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("datakit: ") and wrong.stderr.count("\n") == 1
