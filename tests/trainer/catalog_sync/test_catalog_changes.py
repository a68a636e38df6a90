"""A training run while its catalog changes: cached latents that it reads stay, clips that were forgotten are not
trained on."""

import json
import re
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch

from catalogs.maintenance.forget import Forgetting
from catalogs.maintenance.forget import Request as Forget
from catalogs.query.selection import Selection
from catalogs.query.snapshots import vacuum
from catalogs.records.latents import Latents
from catalogs.records.losses import commit
from catalogs.tables.catalog import Catalog
from datakit.errors import CatalogError, ConfigError
from datakit.identity import clip_id, video_id
from support.drawn_videos import encode as encode_film
from trainer.catalog_sync import loss_book
from trainer.data.latent_reader import LatentReader
from trainer.data.sample_reader import Window, frames_shape, read_frames
from trainer.dit.task import build_frozen
from trainer.dit.train import train_dit
from trainer.latents.encode_queue import Tally, Task, Writer
from trainer.latents.encoder import Encoder
from trainer.models.autoencoders.build import autoencoder_hash, build_autoencoder
from trainer.models.common.weights import save_weights
from trainer.planning.build_plan import make_plan
from trainer.planning.mixture import COLUMNS
from trainer.planning.plan import Plan
from trainer.planning.settings import PlanSettings
from trainer.settings import DiTSettings, load_settings
from trainer.training.setup import Request

FRAMES, TICKS = 9, 512
"""Of a film; of a frame, in MP4 at 24 frames/s: 1/12288 s."""
PLAN = PlanSettings(
    fps=24,
    resolutions=["64px"],
    aspects=["4:3"],
    frames=[9],
    captions="optional",
    tokens=1000,
    patch=1,
    text_tokens=8,
    max_upscale=2,
)
SETTINGS = [
    "model={hidden_size: 48, num_heads: 2, depth: 1, depth_single_blocks: 1, axes_dim: [4, 10, 10], patch_size: 1}",
    "text.options={length: 8}",
    "loader={workers: 0}",
    "log.tensorboard=false",
    "preview.every=0",
    "validation.every=0",
    "watchdog_s=0",
    "conditions={t2v: 1}",
    "checkpoint={every: 1, keep: 2}",
    "optimizer={lr: 1.0e-3, warmup: 0}",
]


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("films")
    made = []
    for v in range(5):
        pictures = [np.full((48, 64, 3), 30 + 40 * v, np.uint8) for _ in range(FRAMES)]
        for i, picture in enumerate(pictures):
            picture[:, 4 * i : 4 * i + 8] = 255 - 40 * v
        made.append(encode_film(folder / f"{v}.mp4", pictures, 24))
    return made


@pytest.fixture
def catalog(films, tmp_path) -> Catalog:
    """A kept clip of each film, whole."""
    catalog = Catalog.create(tmp_path / "catalog")
    for film in films:
        with film.open("rb") as file:
            video = video_id(file, film.stat().st_size)
        end, base = FRAMES * TICKS, "1/12288"
        clip = clip_id(video, 0, 0, end)
        catalog.append(
            "videos",
            [
                {
                    "video_id": video,
                    "shard": video[0],
                    "status": "ok",
                    "run_id": "r",
                    "clip_count": 1,
                    "kind": "video",
                    "time_base": base,
                    "uris": [{"uri": str(film), "size": film.stat().st_size, "etag": "e"}],
                    "duration_s": FRAMES / 24,
                    "vfr": False,
                }
            ],
        )
        catalog.append(
            "clips",
            [
                {
                    "clip_id": clip,
                    "video_id": video,
                    "shard": video[0],
                    "stream": 0,
                    "run_id": "r",
                    "start_pts": 0,
                    "end_pts": end,
                    "time_base": base,
                    "start_s": 0.0,
                    "end_s": FRAMES / 24,
                    "num_frames": FRAMES,
                    "fps": 24.0,
                    "width": 64,
                    "height": 48,
                    "split": "train",
                    "errors": [],
                    "stage_versions": [],
                }
            ],
        )
        catalog.append(
            "decisions",
            [{"clip_id": clip, "shard": video[0], "status": "kept", "reasons": [], "recipe": "r", "level": 1}],
        )
    return catalog


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Settings of so many steps, with these more."""
    weights = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    torch.manual_seed(0)
    save_weights(build_autoencoder("tiny").state_dict(), weights)
    common = [f"autoencoder.weights={weights}", *SETTINGS]
    return lambda steps, *sets: load_settings(DiTSettings, "tiny", None, [*common, f"steps={steps}", *sets])


def planned(catalog: Catalog, folder: Path) -> Plan:
    return make_plan(Selection(catalog, columns=COLUMNS), PLAN, folder)


def encode(catalog: Catalog, plan: Plan, settings: DiTSettings) -> None:
    """As `datakit run encode`, in this process."""
    name = autoencoder_hash(build_frozen(settings)[0])
    encoder = Encoder(settings.autoencoder.model_dump(), name, False, "fp32", "float32", 1)
    writer = Writer(Latents(catalog, name), "run", 1 << 30, 60.0, Tally())
    for row in range(plan.windows.num_rows):
        window = Window.of(plan, row)
        frames = np.empty(frames_shape(plan.buckets[window.bucket]), np.uint8)
        read_frames(window, None, frames)
        (found,) = encoder.run([{}], [[frames]])
        writer.take(Task(row, plan, row, False), found["latent"], None)
    writer.close()


def files(run: Path) -> set[Path]:
    """That the run's index of latents names."""
    with pa.memory_map(str(run / "latents.arrow")) as source:
        return {Path(file) for file in pa.ipc.open_file(source).read_all()["file"].unique().to_pylist()}


def run_row(catalog: Catalog) -> dict:
    (row,) = catalog.scan("runs").filter(pl.col("pipeline") == "train dit").collect().to_dicts()
    return row


def test_latents_that_a_run_reads_outlive_a_vacuum_as_long_as_its_row_is_there(catalog, settings, tmp_path):
    """They were encoded after the plan, whose snapshot knows nothing of them."""
    plan = planned(catalog, tmp_path / "plan")
    encode(catalog, plan, settings(1))
    train_dit(Request(tmp_path / "run", plan=plan.folder, quiet=True), settings(2, "loader.latents=only"))
    read = files(tmp_path / "run")
    version = catalog.table("latents").version()
    assert plan.parts[0].selection["versions"]["latents"] < version and len(read) == 1
    assert json.loads(run_row(catalog)["selection"]) == {
        **plan.parts[0].selection,
        "versions": {**plan.parts[0].selection["versions"], "latents": version},
    }
    catalog.delete("latents", "first = 0")
    encode(catalog, plan, settings(1))
    assert vacuum(catalog, keep_days=0).referenced["latents"] == [version] and all(file.exists() for file in read)
    reader = LatentReader(tmp_path / "run" / "latents.arrow", 0)
    for row in range(plan.windows.num_rows):
        window = Window.of(plan, row)
        assert reader.read(reader.find(row), window.geometry, window.clip_id).dtype == "float32"
    train_dit(Request(tmp_path / "run", resume=True, quiet=True), settings(3, "loader.latents=only"))
    later = files(tmp_path / "run")
    assert (
        not later & read
        and json.loads(run_row(catalog)["selection"])["versions"]["latents"] == catalog.table("latents").version()
    )
    catalog.delete("latents", "first = 0")
    vacuum(catalog, keep_days=0)
    assert not any(file.exists() for file in read) and all(file.exists() for file in later), "those of the resumed run"
    catalog.delete("runs", "pipeline = 'train dit'")
    vacuum(catalog, keep_days=0)
    assert not any(file.exists() for file in later)


@pytest.mark.parametrize("write_back", [True, False])
def test_clips_that_were_forgotten_are_not_trained_on_any_more(catalog, settings, tmp_path, write_back):
    """Neither by a resumed run nor by one that starts on a plan of before; what is not in the plan may go."""
    sets = [f"write_back={json.dumps(write_back)}"]
    ids = catalog.scan("clips").sort("clip_id").collect()["clip_id"].to_list()
    catalog.upsert("decisions", [{"clip_id": ids[0], "status": "rejected"}], only="update")
    plan = planned(catalog, tmp_path / "plan")
    assert set(plan.windows["clip_id"].to_pylist()) == set(ids[1:])
    train_dit(Request(tmp_path / "run", plan=plan.folder, quiet=True), settings(1, *sets))
    Forgetting(catalog, Forget(clips=(ids[0],))).run()
    assert train_dit(Request(tmp_path / "run", resume=True, quiet=True), settings(2, *sets)).step == 2
    source = catalog.clips().filter(pl.col("clip_id") == ids[2]).collect()["video_id"].item()
    Forgetting(catalog, Forget(clips=(ids[1],), sources=(source,))).run()
    said = (
        rf"2 of the clips of the plan .*plan were forgotten after it was made \(for example {ids[1]}\): plan anew "
        rf"and train with another"
    )
    for request in (Request(tmp_path / "run", resume=True), Request(tmp_path / "new", plan=plan.folder)):
        with pytest.raises(ConfigError, match=said):
            train_dit(request, settings(3, *sets))
    assert not (tmp_path / "new").exists()
    anew = planned(catalog, tmp_path / "anew")
    assert set(anew.windows["clip_id"].to_pylist()) == set(ids[3:])
    assert train_dit(Request(tmp_path / "new", plan=anew.folder, quiet=True), settings(1, *sets)).status == "finished"


def test_a_catalog_that_is_out_of_reach(catalog, settings, tmp_path, capsys):
    """Without writing to it, training needs it no more; then it is said that nobody looked."""
    plan = planned(catalog, tmp_path / "plan")
    Path(catalog.root).rename(tmp_path / "elsewhere")
    with pytest.raises(CatalogError, match="catalog"):
        train_dit(Request(tmp_path / "one", plan=plan.folder, quiet=True), settings(1))
    assert (
        train_dit(Request(tmp_path / "two", plan=plan.folder, quiet=True), settings(1, "write_back=false")).status
        == "finished"
    )
    assert "whether clips of the plan were forgotten cannot be seen: " in capsys.readouterr().out


def test_a_catalog_that_is_out_of_reach_for_a_while(catalog, settings, tmp_path, capsys, monkeypatch):
    """At a checkpoint: training goes on, and the next enters all. At the last: the run fails, and `--resume` enters the
    rest."""
    plan, there, away = planned(catalog, tmp_path / "plan"), Path(catalog.root), tmp_path / "away"
    commits, gone = [], {2}

    def flaky(*given):
        commits.append(given)
        if len(commits) not in gone:
            return commit(*given)
        there.rename(away)
        try:
            return commit(*given)
        finally:
            away.rename(there)

    monkeypatch.setattr(loss_book, "commit", flaky)
    run = tmp_path / "run"
    assert train_dit(Request(run, plan=plan.folder, quiet=True), settings(3)).step == 3
    assert re.findall(
        "^step (.*): what was learned is in the checkpoint, and enters the catalog with the next",
        capsys.readouterr().err,
        re.M,
    ) == ["2"]
    assert ranges(catalog) == [(0, 1), (1, 2), (2, 3)]
    commits.clear()
    gone |= {1, 3}
    with pytest.raises(CatalogError, match="catalog"):
        train_dit(Request(run, resume=True, quiet=True), settings(4))
    assert [row["status"] for row in catalog.scan("runs").collect().to_dicts()] == ["failed"]
    monkeypatch.undo()
    assert train_dit(Request(run, resume=True, quiet=True), settings(4)).step == 4
    assert ranges(catalog) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert [row["status"] for row in catalog.scan("runs").collect().to_dicts()] == ["finished"]


def ranges(catalog: Catalog) -> list[tuple[int, int]]:
    """Of steps that losses were entered of."""
    return catalog.scan("losses").select("from_step", "to_step").unique().sort("from_step").collect().rows()
