"""`train dit` from a catalog or a plan to its last step: sets of a few clips, and every condition that a model is
trained on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import cv2
import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch

from catalogs.query.selection import KEPT
from catalogs.tables.catalog import Catalog
from support.catalog_rows import clip, video
from support.drawn_videos import encode, texture
from support.plan_folders import bucket, window
from support.training_trace import Watch
from trainer.diffusion.conditioning import MODES
from trainer.diffusion.sample_randomness import draw
from trainer.dit.train import train_dit
from trainer.models.autoencoders.base import pixels
from trainer.models.autoencoders.build import build_autoencoder
from trainer.planning.mixture import selected
from trainer.planning.plan import WINDOWS, Part, Plan, write_plan
from trainer.settings import DiTSettings, load_settings
from trainer.training.setup import Request

pytestmark = pytest.mark.slow

KINDS = ("square", "wide", "image", "square", "square", "wide", "square")
SIZES = {"square": (64, 64), "wide": (54, 96), "image": (64, 64)}
STEPS = 4


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two wait for each other, where others work beside, several times as long as they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small(folder: Path, count: int) -> Catalog:
    """A catalog of the first clips of `KINDS`: films of 40 frames, and a picture."""
    catalog = Catalog.create(folder / "catalog")
    for v, kind in enumerate(KINDS[:count]):
        height, width = SIZES[kind]
        about = {"width": width, "height": height, "split": "train"}
        if kind == "image":
            uri = folder / f"{v}.png"
            assert cv2.imwrite(str(uri), texture(height, width, v))
            about |= {"num_frames": 1}
        else:
            uri = encode(folder / f"{v}.mp4", [np.roll(texture(height, width, v), 2 * i, 1) for i in range(40)], 24)
            about |= {"num_frames": 40, "fps": 24.0, "time_base": "1/12288", "end_pts": 40 * 512}
        row = clip(f"{v:032x}", **about)
        source = {"kind": "image" if kind == "image" else "video", "uris": [{"uri": str(uri), "size": 1, "etag": "e"}]}
        catalog.append("videos", [video(f"{v:032x}", **source)])
        catalog.append("clips", [row])
        key = {"clip_id": row["clip_id"], "shard": row["shard"], "caption_id": f"{v}"}
        catalog.append("decisions", [{**key, "status": "kept", "recipe": "r"}])
        catalog.append("captions", [{**key, "style": "dense", "model": "m", "text": f"texture number {v}"}])
    return catalog


@pytest.mark.parametrize("count, videos", [(1, 1), (3, 1), (7, 2)])
def test_small_sets_train(tmp_path, count, videos):
    """With the preset `tiny` as it is, from the catalog to the end: each clip is trained on in the first epoch, all
    losses are finite, a video is made, and what was learned is in the catalog."""
    catalog = small(tmp_path, count)
    settings = load_settings(
        DiTSettings, "tiny", None, [f"steps={STEPS}", "log={every: 1, tensorboard: false}", "preview.steps=2"]
    )
    with Watch() as watch:
        ended = train_dit(Request(tmp_path / "run", (selected(catalog.root, KEPT, None),), quiet=True), settings)
    assert (ended.status, ended.step, ended.checkpoint.name) == ("finished", STEPS, f"step-{STEPS:06d}")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(math.isfinite(line["loss"]) and line["norm"] > 0 for line in lines)
    plan, ids = Plan.open(tmp_path / "run" / "plan"), {clip(f"{v:032x}")["clip_id"] for v in range(count)}
    assert plan.left_out.num_rows == 0 and len(plan.windows) == count
    epoch = len(plan.buckets)  # a step of each: they hold all of their windows
    assert epoch == len(set(KINDS[:count])) <= STEPS
    assert sorted(s.clip for s in watch.shown if s.step < epoch) == sorted(ids)
    assert len(list((tmp_path / "run" / "previews").rglob("*.mp4"))) == videos, "of captions of the commonest shape"
    (run,) = catalog.scan("runs").collect().to_dicts()
    cells = len(json.loads((ended.checkpoint / "checkpoint.json").read_text())["loop"]["write_back"]["means"])
    assert (
        run["status"] == "finished"
        and catalog.scan("losses").select(pl.col("count").sum()).collect().item() == len(watch.shown) - cells
    )


SIZE, FRAMES, FIRST = 64, 73, 3
LATENTS = 19
GIVEN = {
    "t2v": [],
    "i2v_head": [0],
    "i2v_tail": [18],
    "i2v_loop": [0, 18],
    "v2v_head": [*range(9)],
    "v2v_tail": [*range(10, 19)],
    "v2v_head_easy": [*range(17)],
    "v2v_tail_easy": [*range(2, 19)],
}
"""Latent frames, of 19: one frame fills one, 33 fill nine, 65 fill seventeen."""
SMALL = (
    "model={hidden_size: 48, num_heads: 2, depth: 1, depth_single_blocks: 1, axes_dim: [4, 10, 10], patch_size: 1}",
    "text.options={length: 8}",
    "loader.workers=0",
    "write_back=false",
    "log={every: 1, tensorboard: false}",
    "validation.every=0",
    "preview.every=0",
    "watchdog_s=0",
)


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A plan of two films of 80 frames, of each of which frames 3 to 75 are used; and these frames, uint8 [3, 73, 64,
    64]. A texture moves by a tenth of the picture from each frame to the next."""
    folder, rows, frames = tmp_path_factory.mktemp("conditions"), [], {}
    for v in range(2):
        pictures = [np.roll(texture(SIZE, SIZE, v), 7 * i, 1) for i in range(80)]
        film = encode(folder / f"{v}.mp4", pictures, 24)
        rows.append(
            window(
                0,
                f"video {v}",
                clip_id=f"clip{v}",
                uri=str(film),
                first=FIRST,
                frames=FRAMES,
                fps=24.0,
                time_base="1/12288",
                end_pts=80 * 512,
                crop_width=SIZE,
                crop_height=SIZE,
                width=SIZE,
                height=SIZE,
                caption=f"texture {v}",
            )
        )
        frames[f"clip{v}"] = torch.from_numpy(np.stack(pictures[FIRST : FIRST + FRAMES])).permute(3, 0, 1, 2)
    fitting = {"compression": [4, 8, 8], "causal": True, "patch": 1}
    parts = [Part("all", 1.0, {"content_hash": "0"}, "")]
    shapes = [bucket(2, FRAMES, SIZE, SIZE, tokens=LATENTS * 64 + 8)]
    write_plan(folder / "plan", shapes, parts, fitting, 1, {}, [pa.RecordBatch.from_pylist(rows, schema=WINDOWS)], [])
    return folder / "plan", frames


@pytest.mark.parametrize("modes", [*([mode] for mode in GIVEN), list(GIVEN)], ids="+".join)
def test_every_condition_trains_and_the_model_is_told_the_given_frames(films, tmp_path, modes):
    """Ones on exactly the latent frames that are given, there the latents of the given frames by themselves, nothing
    elsewhere: of every sample that the model saw, by its mode; alone, and mixed in one batch."""
    plan, frames = films
    steps = 1 if len(modes) == 1 else 6
    settings = load_settings(
        DiTSettings, "tiny", None, [*SMALL, f"steps={steps}", f"conditions={{{', '.join(f'{m}: 1' for m in modes)}}}"]
    )
    with Watch() as watch:
        assert train_dit(Request(tmp_path / "run", plan=plan, quiet=True), settings).step == steps
    assert len(watch.shown) == 2 * steps and all(math.isfinite(s.loss) for s in watch.shown)
    autoencoder, seen = build_autoencoder("tiny", "embedded"), set()
    for sample in watch.shown:
        cond = sample.inputs["cond"].view(LATENTS, 8, 8, -1).permute(3, 0, 1, 2)
        (mode,) = draw([sample.seed], (1, 1, 1, 1), FRAMES, settings.conditions, 0).modes
        seen.add(mode)
        mask = torch.zeros(LATENTS, 8, 8)
        mask[GIVEN[mode]] = 1
        assert torch.equal(cond[0], mask), mode
        assert not cond[1:, mask[:, 0, 0] == 0].any()
        for end, count in (("head", MODES[mode].head), ("tail", MODES[mode].tail)):
            if count:
                check_reference(cond[1:], frames[sample.clip], end, count, autoencoder)
    assert seen == set(modes) if len(modes) == 1 else len(seen) > 4


def check_reference(reference: torch.Tensor, frames: torch.Tensor, end: str, count: int, autoencoder) -> None:
    """The given frames' latents are where they belong, and a frame's shift would be seen."""

    def encoded(first: int) -> torch.Tensor:
        with torch.no_grad():
            return autoencoder.encode(pixels(frames[None, :, first : first + count], autoencoder)).mean[0]

    first, other = (0, 1) if end == "head" else (FRAMES - count, FRAMES - count - 1)
    wanted, shifted = encoded(first), encoded(other)
    found = reference[:, : wanted.shape[1]] if end == "head" else reference[:, -wanted.shape[1] :]
    off, far = ((found - what).square().mean().sqrt() for what in (wanted, shifted))
    assert off < 0.05 * far, f"{end}: {off} from the given frames, {far} from their neighbours"
