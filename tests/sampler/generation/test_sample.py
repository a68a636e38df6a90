"""Sampling in bulk: what comes out depends on (prompt, seed, number) alone, is there once, and whole."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from catalogs.tables.catalog import Catalog
from datakit.errors import ConfigError, MissingDependency
from datakit.video.probe import describe
from datakit.video.reader import VideoReader
from sampler.generation.denoiser import Denoiser
from sampler.generation.model_source import open_checkpoint
from sampler.generation.passes import Denoised, Worker, given_key
from sampler.generation.run import sample
from sampler.generation.sample_spec import FILES, expand
from sampler.prompts.prompt import Prompt, check_references
from sampler.prompts.references import Reference
from sampler.settings import SamplingSettings
from sampler.video_files import write, write_picture
from support.mmdit_golden import GOLDEN, close, golden
from support.tiny_sampling import prompts, save_model, settings
from trainer.diffusion.conditioning import MODES
from trainer.diffusion.rectified_flow import Text, condition, pack
from trainer.models.autoencoders.build import build_autoencoder
from trainer.models.mmdit.architecture import MMDiTArchitecture
from trainer.models.mmdit.checkpoint_io import export_open_sora, load_mmdit
from trainer.models.mmdit.model import MMDiT

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]


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
    part = {
        p: {k.split(".", 1)[1]: v for k, v in tensors.items() if k.startswith(f"{p}.")}
        for p in ("weights", "inputs", "expected")
    }
    _, config, _, _ = golden("mmdit_v2_tiny")
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in about.items() if k in config.__dict__}
    model = MMDiT(type(config)(**fields, layout="fused" if about["fused_qkv"] else "separate"))
    model.load_state_dict(part["weights"])
    export_open_sora(model, tmp_path / "m.safetensors")
    i = part["inputs"]
    own = SamplingSettings(
        steps=about["num_steps"],
        guidance=about["guidance"],
        image_guidance=about["guidance_img"],
        image_over_frames=about["scale_temporal_osci"],
    )
    model = load_mmdit(tmp_path / "m.safetensors").eval()
    denoiser = Denoiser(MMDiTArchitecture(model.config), model, own)
    found = denoiser(
        i["noise"],
        condition(i["mask"], i["masked_ref"]),
        Text(i["txt_cond"], i["vec_cond"]),
        Text(i["txt_uncond"], i["vec_uncond"]),
        about["cond_type"],
    )
    given = i["mask"].bool().expand_as(found)
    expected = part["expected"]["packed_latent"]
    kept = pack(torch.where(given, i["masked_ref"], torch.zeros(())))
    assert torch.equal(found[given], i["masked_ref"][given]), "given frames are in their places"
    free = pack((~given).float()).bool()
    assert close(torch.where(free, pack(found), kept), torch.where(free, expected, kept))


OWN = ("samples=2", "output.format=lossless", "work.keep=true", "work.batch=1")


@pytest.fixture(scope="module")
def made(weights, tmp_path_factory, ray_address) -> Path:
    """Two samples of each of two prompts, one after the other by one process."""
    out = tmp_path_factory.mktemp("made") / "out"
    done = sample(prompts(2), weights, str(out), settings(*OWN), ray_address)
    assert (done.asked, done.done, done.failed) == (4, 4, 0)
    return out


def test_what_is_made_does_not_depend_on_how(made, weights, tmp_path, ray_address):
    """Two processes: the same bits where batches are equal, within 1e-5 where they are not."""
    one = latents(made)
    assert len(one) == 4 and len({t.sum().item() for t in one.values()}) == 4, "each is a video of its own"
    table = rows(made)
    assert table["status"].to_list() == ["done"] * 4 and table["forwards"].to_list() == [8] * 4
    assert sorted(set(zip(table["seed"], table["number"]))) == [(0, 0), (0, 1)] and table["text"][0].endswith(
        " 12 FPS."
    )
    shutil.copytree(made, tmp_path / "again")
    more = sample(prompts(3), weights, str(tmp_path / "again"), settings(*OWN, "work.actors=2"), ray_address)
    assert (more.asked, more.there, more.done) == (6, 4, 2), "of a longer list, what is missing is made"
    for name in ("two", "batch"):
        sample(
            prompts(2),
            weights,
            str(tmp_path / name),
            settings(*OWN, "work.actors=2", f"work.batch={1 if name == 'two' else 3}"),
            ray_address,
        )
        other = latents(tmp_path / name)
        assert other.keys() == one.keys() and max((other[k] - one[k]).abs().max() for k in one) <= 1e-5
    assert all(torch.equal(latents(tmp_path / "two")[k], one[k]) for k in one)
    files = {
        folder: {f.name: f.read_bytes() for f in (folder / FILES).iterdir()} for folder in (made, tmp_path / "two")
    }
    assert files[made] == files[tmp_path / "two"] and len(files[made]) == 4


def test_a_catalog_of_samples_is_a_catalog(weights, tmp_path, ray_address):
    """Scores, views and reports work on it; the prompt is the caption."""
    from catalogs.report import report
    from pipelines.runs.score import score

    out = tmp_path / "out"
    sample(prompts(2), weights, str(out), settings(), ray_address)
    counts = score(str(out), stages=["motion", "quality"], ray=ray_address)
    assert counts["clips"] == 2 and counts["clips_with_errors"] == 0
    view = Catalog(out).clips(columns=["clip_id", "caption", "status", "num_frames", "fps", "brightness"]).collect()
    assert sorted(view["caption"]) == [p.text for p in prompts(2)] and set(view["status"]) == {"kept"}
    assert (
        view["num_frames"].to_list() == [9, 9]
        and view["fps"].to_list() == [12.0, 12.0]
        and view["brightness"].null_count() == 0
    )
    assert set(view["clip_id"]) == set(rows(out)["clip_id"])
    (run,) = Catalog(out).scan("runs").filter(pl.col("pipeline") == "sample").collect().to_dicts()
    assert run["status"] == "finished" and json.loads(run["counts"])["done"] == 2
    report(Catalog(out), tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert not (out / "work").exists(), "nothing is left of the work"


@pytest.mark.parametrize("mode", MODES)
def test_modes_keep_what_they_are_given(mode, weights, tmp_path):
    """The latents of given frames are the reference's own, in every sample of a batch, and the first or last frame
    shows it."""
    given = MODES[mode]
    frames = 17 if mode.startswith(("t2v", "i2v")) else 81
    files = [_reference(tmp_path / f"r{i}", i, moving=mode.startswith("v2v")) for i in range(2)]
    count = {"t2v": 0, "i2v_loop": 2}.get(mode, 1)
    asked = [Prompt(f"p{i}", references=tuple(Reference(str(f)) for f in (files * 2)[i : i + count])) for i in range(2)]
    check_references(asked, mode, 12.0)
    own = settings(f"video.mode={mode}", f"video.num_frames={frames}", "output.format=lossless", "sampling.steps=2")
    checkpoint = open_checkpoint(weights, own)
    samples = expand(asked, own, checkpoint, checkpoint.describe_autoencoder())
    worker = Worker(checkpoint, own, str(tmp_path / "out"), str(tmp_path / "work"), gpu=False)
    worker.encode(samples)
    assert all(isinstance(answer, Denoised) and answer.batch == 2 for answer in worker.denoise(samples))
    written = worker.decode(samples)
    model = build_autoencoder("tiny", "embedded").eval()
    heads, tails = (-(-(n - 1) // 4) + 1 if n else 0 for n in (given.head, given.tail))
    for one, answer in zip(samples, written):
        found = worker.store.get("latents", one.sample_id)["latents"]
        video = pixels(tmp_path / "out" / answer.path)
        assert (
            found.shape == (16, (frames - 1) // 4 + 1, 4, 6)
            and video.shape == (frames, 32, 48, 3)
            and answer.clip["num_frames"] == frames
        )
        if count:
            cond = worker.store.get("given", given_key(checkpoint, own, one))["cond"][0]
            assert cond[0, :, 0, 0].tolist() == [1.0] * heads + [0.0] * (found.shape[1] - heads - tails) + [1.0] * tails
            held = cond[0, :, 0, 0] > 0
            assert torch.equal(found[:, held], cond[1:, held])
        if given.head:
            shown = _seen(pixels_of(one.references[0].uri)[: given.head], model)
            assert np.abs(video[: given.head].astype(int) - shown).max() <= 1, (
                "the frames given are the reference's, as the autoencoder shows them"
            )
        if given.tail:
            assert torch.equal(
                found[:, -tails:], model.encode(_video(pixels_of(one.references[-1].uri)[-given.tail :])).mean[0]
            )


def _reference(path: Path, seed: int, moving: bool) -> Path:
    """A smooth picture, or 70 frames in which it wanders."""
    block = np.random.default_rng(seed).integers(40, 216, (4, 6, 3), dtype=np.uint8)
    picture = cv2.resize(block, (48, 32), interpolation=cv2.INTER_CUBIC)
    if moving:
        return write(np.stack([np.roll(picture, t, 1) for t in range(70)]), path, 12.0, "lossless")
    write_picture(picture, path.with_suffix(".png"))
    return path.with_suffix(".png")


def pixels_of(uri: str) -> np.ndarray:
    return cv2.imread(uri)[None, ..., ::-1].copy() if uri.endswith(".png") else pixels(Path(uri))


def _video(frames: np.ndarray) -> torch.Tensor:
    """As the autoencoder takes it; of frames at an end, as many as it takes."""
    lacking = -(len(frames) - 1) % 4
    return (
        torch.from_numpy(np.concatenate((frames, frames[-1:].repeat(lacking, 0)))).permute(3, 0, 1, 2)[None] / 127.5 - 1
    )


@torch.no_grad()
def _seen(frames: np.ndarray, model: torch.nn.Module) -> np.ndarray:
    shown = model(_video(frames))[0][0, :, : len(frames)].permute(1, 2, 3, 0)
    return ((shown + 1) * 127.5).round().clamp(0, 255).numpy()


def test_colours_of_files_are_those_that_were_made(tmp_path):
    """Patches of colour come back from H.264 within 3 of 255, tagged; from the other forms as they were, GIF's palette
    apart."""
    rng = np.random.default_rng(0)
    flat = np.repeat(np.repeat(rng.integers(32, 224, (1, 4, 6, 3), dtype=np.uint8), 16, 1), 16, 2).repeat(5, 0)
    path = write(flat, tmp_path / "flat", 24.0)
    centres = (slice(None), slice(8, None, 16), slice(8, None, 16))
    assert np.abs(pixels(path).astype(int)[centres] - flat[centres]).max() <= 3
    with VideoReader(str(path)) as reader:
        picture = next(reader.frames())
        info = describe(reader, picture, path.stat().st_size)
    assert (info.color_space, info.color_transfer, info.color_primaries, info.color_range, info.codec) == (
        "bt709",
    ) * 3 + ("tv", "h264")
    assert np.array_equal(pixels(write(flat, tmp_path / "flat", 24.0, "lossless")), flat)
    folder = write(flat, tmp_path / "frames", 24.0, "frames")
    assert (
        np.array_equal(cv2.imread(str(folder / "00003.png"))[..., ::-1], flat[3]) and len(list(folder.iterdir())) == 5
    )
    gif = Image.open(
        write(np.stack([np.roll(f, 16 * t, 1) for t, f in enumerate(flat)]), tmp_path / "flat", 25.0, "gif")
    )
    assert gif.n_frames == 5 and gif.info["duration"] == 40


KILL = """
import os, signal, sys
from support.tiny_sampling import prompts, settings
from sampler.generation import run as batch
from sampler.generation.run_passes import Passes
commit = Passes._commit
def commit_or_die(self, name, answers):
    if name == sys.argv[4]:
        os.kill(os.getpid(), signal.SIGKILL)
    return commit(self, name, answers)
Passes._commit = commit_or_die
batch.sample(prompts(2), sys.argv[1], sys.argv[2], settings(*sys.argv[5:]), sys.argv[3])
"""


@pytest.mark.parametrize("name", ["encode", "denoise", "decode"])
def test_a_kill_redoes_no_finished_pass(name, made, weights, tmp_path, ray_address):
    """The process is killed between a pass and its commit: the files of that pass stay as they are, and the end is that
    of a run which nobody killed."""
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    killed = subprocess.run(
        [sys.executable, "-c", KILL, weights, str(out), ray_address, name, *OWN],
        env=environment,
        cwd=ROOT,
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (out / "work").rglob("*.safetensors")}
    assert {path.parent.name for path in before} == {"encode": {"texts"}}.get(name, {"texts", "latents"})
    assert len(list((out / FILES).glob("*"))) == (4 if name == "decode" else 0)
    again = sample(prompts(2), weights, str(out), settings(*OWN), ray_address)
    assert (again.done, again.failed) == (4, 0)
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in before} == before, (
        "what was finished is not done again"
    )
    assert rows(out)["status"].to_list() == ["done"] * 4 and Catalog(out).clips().collect().height == 4
    assert {p.name: p.read_bytes() for p in (out / FILES).iterdir()} == {
        p.name: p.read_bytes() for p in (made / FILES).iterdir()
    }


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
    assert all(isinstance(a, Denoised) and a.batch == 1 for a in answers) and max(sizes) == 8, (
        "two branches of four, of two, of one"
    )
    sizes.clear()
    assert len(worker.denoise(asked)) == 4 and max(sizes) == 2, "and does not try again what did not fit"
    monkeypatch.setattr(
        MMDiT, "forward", lambda self, img, *a, **m: (_ for _ in ()).throw(torch.OutOfMemoryError("no"))
    )
    (failed,) = worker.denoise(asked[:1])
    assert failed.kind == "out_of_memory" and "does not fit" in failed.message


def test_several_processes_share_a_video(made, weights, tmp_path, ray_address):
    """Tensor and sequence parallelism over gloo give what one process gives."""
    for name in ("tensor_parallel", "sequence_parallel"):
        own = settings(*OWN, f"work.{name}=2", "work.num_cpus=0.5", "work.threads=1")
        done = sample(prompts(2), weights, str(tmp_path / name), own, ray_address)
        assert done.done == 4, done.first_problems
        one, two = latents(made), latents(tmp_path / name)
        assert one.keys() == two.keys() and max((one[k] - two[k]).abs().max() for k in one) <= 1e-4


@pytest.mark.parametrize(
    "sets, message",
    [
        (("video.num_frames=10",), "4k \\+ 1|9"),
        (("video.height=33",), "multiples of 8"),
        (("video.height=32", "video.width=48", "video.resolution=256px"), "not both"),
        (("video.mode=i2v_head",), "takes one picture, there are none"),
        (("video.mode=v2v_head", "video.num_frames=33"), "nothing is left to make"),
        (("video.mode=upside_down",), "video.mode"),
        (("sampling.guidance=0.5",), "sampling.guidance"),
        (("autoencoder.kind=hunyuan",), "needs weights"),
        (("autoencoder.kind=dc-ae", "autoencoder.weights=nowhere.safetensors"), "nowhere"),
        (("text.kind=t5-clip", "text.options={}"), "t5|T5"),
        (("prompt.refine=true",), "which language model"),
        (("image.model=nowhere/at-all",), "nowhere"),
        (("work.fp8=row", "work.precision=fp32"), "bf16"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_loaded(sets, message, weights, tmp_path, monkeypatch):
    monkeypatch.setattr("sampler.generation.run.RaySession.__enter__", lambda self: pytest.fail("Ray was started"))
    with pytest.raises((ConfigError, MissingDependency), match=message):
        sample(prompts(1), weights, str(tmp_path / "out"), settings(*sets))
    assert not (tmp_path / "out").exists()


def test_prompts_of_several_shapes(weights, tmp_path, ray_address):
    """A prompt may ask for a shape of its own; those of a shape are denoised together."""
    asked = [Prompt("wide"), Prompt("tall", aspect_ratio="9:16"), Prompt("long", num_frames=17), Prompt("wide too")]
    done = sample(asked, weights, str(tmp_path / "out"), settings("work.batch=2", "work.work_gb=0.0005"), ray_address)
    assert done.done == 4, done.first_problems
    table = rows(tmp_path / "out")
    found = {row["prompt"]: (row["num_frames"], row["height"], row["width"]) for row in table.to_dicts()}
    assert found == {"wide": (9, 32, 48), "tall": (9, 48, 32), "long": (17, 32, 48), "wide too": (9, 32, 48)}
    for row in table.to_dicts():
        assert pixels(tmp_path / "out" / row["path"]).shape == (*found[row["prompt"]], 3)
    with pytest.raises(ConfigError, match="line 3.*nearest"):
        sample([Prompt("odd", num_frames=16, where="p.csv line 3")], weights, str(tmp_path / "x"), settings())


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
    command = [
        sys.executable,
        "-m",
        "datakit",
        "sample",
        "a cat",
        "a dog",
        "--ckpt",
        weights,
        "--out",
        str(tmp_path / "out"),
        "--ray",
        ray_address,
    ]
    command += [part for one in settings.__globals__["SETS"] for part in ("--set", one)]
    shown = subprocess.run(
        [*command, "--num-samples", "2", "--motion-score", "3", "--dry-run"], cwd=ROOT, capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    assert "4 to make: 9 frames of 32×48; 8 forwards each" in shown.stdout and not (tmp_path / "out").exists()
    made = subprocess.run([*command, "--motion-score", "3", "--json"], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    said = json.loads(made.stdout)
    assert (said["asked"], said["done"], said["failed"]) == (2, 2, 0)
    assert rows(tmp_path / "out")["text"].to_list() == [
        "a cat 12 FPS, 3 motion score.",
        "a dog 12 FPS, 3 motion score.",
    ]
    wrong = subprocess.run([*command, "--mode", "i2v_head"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("datakit: ") and wrong.stderr.count("\n") == 1
