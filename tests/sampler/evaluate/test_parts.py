"""The parts of an evaluation, on hand-made catalogs and drawn videos whose answers are known."""

from datetime import UTC, datetime

import cv2
import numpy as np
import polars as pl
import pytest

from catalogs.tables.catalog import Catalog
from datakit import config
from datakit.errors import CatalogError
from datakit.weights.registry import EFFICIENTNET
from pipelines.recipes.decide import decide_and_record
from pipelines.recipes.recipe import load_recipe
from pipelines.settings import Settings
from sampler.evaluate import features
from sampler.evaluate.baselines import cut_to, mean_picture
from sampler.evaluate.captions import enter_prompts
from sampler.evaluate.features import read_real
from sampler.evaluate.grid import make_grid, strip
from sampler.evaluate.memorization import LEAST_HELD, memorisation
from sampler.evaluate.result_sets import read_sets
from sampler.evaluate.scoring import plan_embedding
from support.catalog_rows import clip, video
from support.drawn_videos import encode
from support.sample_catalogs import drifting, import_all, result_catalog, sample, write

MARK = "features of then"


def unit(rng: np.random.Generator, count: int, size: int = 64) -> np.ndarray:
    x = rng.normal(size=(count, size))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def embedded(
    root, vectors: np.ndarray, splits: list[str], groups: list[str | None] | None = None
) -> tuple[Catalog, list[str]]:
    """A catalog with a clip for each vector, every clip of a video of its own; and the clips' ids."""
    catalog = Catalog.create(root)
    ids = [f"{i % 16:x}{i:031d}" for i in range(len(vectors))]
    rows = [
        clip(v, split=s, duplicate_group=(groups or [None] * len(ids))[i], num_frames=9)
        for i, (v, s) in enumerate(zip(ids, splits))
    ]
    catalog.append("videos", [video(v) for v in ids])
    catalog.append("clips", rows)
    catalog.append(
        "embeddings",
        [
            {
                "clip_id": row["clip_id"],
                "video_id": v,
                "shard": v[0],
                "run_id": "r",
                "model": "m",
                "weights_hash": "w",
                "fingerprint": MARK,
                "vector": vector,
                "norm": 1.0,
                "frames": 3,
            }
            for row, v, vector in zip(rows, ids, vectors.tolist())
        ],
    )
    return catalog, [row["clip_id"] for row in rows]


def near_to(vector: np.ndarray, cosine: float, rng: np.random.Generator) -> np.ndarray:
    """A unit vector at a known cosine."""
    other = unit(rng, 1)[0]
    other -= vector * (other @ vector)
    return cosine * vector + np.sqrt(1 - cosine**2) * other / np.linalg.norm(other)


def ask(catalog: Catalog, queries: dict[str, np.ndarray], seed: int = 0, source: str | None = None):
    rows = pl.DataFrame({"sample_id": list(queries)}).with_columns(source_clip=pl.lit(source, pl.String))
    real = read_real(catalog, pl.lit(True), MARK)
    return memorisation(real, [("model", rows, np.stack(list(queries.values())).astype(np.float32))], seed)


def test_neighbours_are_those_of_brute_force_and_copies_are_flagged(tmp_path):
    rng = np.random.default_rng(0)
    vectors, splits = unit(rng, 90), ["train"] * 60 + ["val"] * 15 + ["test"] * 15
    catalog, ids = embedded(tmp_path / "c", vectors, splits)
    queries = {
        "copy": near_to(vectors[7], 0.999, rng),
        "of val": vectors[65],
        **{f"q{i}": v for i, v in enumerate(unit(rng, 8))},
    }
    found = ask(catalog, queries, source=ids[7])
    train = vectors[:60]
    for n in found.neighbours:
        cosines = train @ queries[n.sample_id]
        assert n.clip_id == ids[int(cosines.argmax())] and n.distance == pytest.approx(1 - cosines.max(), abs=1e-5)
    held = np.sort(1 - (vectors[60:] @ train.T).max(axis=1))
    assert found.held == pytest.approx(held, abs=1e-5) and found.threshold == pytest.approx(
        np.percentile(held, 1), abs=1e-5
    )
    assert found.trained == 60 and "val and test" in found.held_from
    assert found.neighbours[0].sample_id == "copy" and found.neighbours[0].clip_id == ids[7]
    assert found.neighbours[0].is_source and all(n.is_source == (n.clip_id == ids[7]) for n in found.neighbours)
    assert [n.sample_id for n in found.flagged] == [
        n.sample_id for n in found.neighbours if n.distance < found.threshold
    ]
    assert "copy" in {n.sample_id for n in found.flagged} and "of val" not in {n.sample_id for n in found.flagged}


def test_many_clips_are_read_a_shard_at_a_time(tmp_path, monkeypatch):
    vectors = unit(np.random.default_rng(4), 70)
    catalog, ids = embedded(tmp_path / "c", vectors, ["train"] * 50 + ["val"] * 20)
    queries = {f"q{i}": v for i, v in enumerate(unit(np.random.default_rng(5), 6))}
    at_once = ask(catalog, queries)
    monkeypatch.setattr(features, "MOST_REAL", 16)
    real = read_real(catalog, pl.lit(True), MARK)
    assert len(real.vectors) == 16 and real.rows.height == 70 and len(list(real.batches())) == 16
    assert np.array_equal(real.of(pl.Series("clip_id", ids[::-7])), vectors[::-7])
    in_parts = ask(catalog, queries)
    assert in_parts.held == pytest.approx(at_once.held, abs=1e-6)
    assert [(n.sample_id, n.clip_id) for n in in_parts.neighbours] == [
        (n.sample_id, n.clip_id) for n in at_once.neighbours
    ]


def test_near_duplicates_of_held_out_clips_are_no_neighbours(tmp_path):
    rng = np.random.default_rng(1)
    vectors = unit(rng, 60)
    vectors[40:] = [
        near_to(vectors[i], 0.9999, rng) for i in range(20)
    ]  # each held-out clip repeats one that was trained on
    splits = ["train"] * 40 + ["val"] * 20
    catalog, _ = embedded(tmp_path / "apart", vectors, splits)
    assert ask(catalog, {"q": vectors[0]}).held.max() == pytest.approx(1e-4, abs=1e-5)
    grouped, _ = embedded(
        tmp_path / "known", vectors, splits, [f"g{i}" for i in range(40)] + [f"g{i}" for i in range(20)]
    )
    cosines = vectors[40:] @ vectors[:40].T
    cosines[np.arange(20), np.arange(20)] = -1
    assert ask(grouped, {"q": vectors[0]}).held == pytest.approx(np.sort(1 - cosines.max(axis=1)), abs=1e-5)


def test_without_a_holdout_clips_are_drawn_and_do_not_find_themselves(tmp_path):
    rng = np.random.default_rng(2)
    vectors = unit(rng, 70)
    catalog, ids = embedded(tmp_path / "c", vectors, ["train"] * 67 + ["val"] * 3)
    found = ask(catalog, {"copy": vectors[5]})
    assert len(found.held) == LEAST_HELD and found.held.min() > 0.1
    assert found.flagged[0].clip_id == ids[5] and found.flagged[0].distance == pytest.approx(0, abs=1e-6)
    assert found.held_from == f"{LEAST_HELD - 3} clips drawn from those trained on, and 3 of the splits val and test"
    assert np.array_equal(ask(catalog, {"copy": vectors[5]}).held, found.held)
    assert not np.array_equal(ask(catalog, {"copy": vectors[5]}, seed=1).held, found.held)


def test_one_training_clip_is_not_enough_to_flag_anything(tmp_path):
    vectors = unit(np.random.default_rng(3), 2)
    catalog, ids = embedded(tmp_path / "c", vectors[:1], ["train"])
    found = ask(catalog, {"q": vectors[0]})
    assert found.threshold is None and found.flagged == [] and found.neighbours[0].clip_id == ids[0]
    other, _ = embedded(tmp_path / "d", vectors, ["val", "test"])
    assert "none of the selected clips is of the split train" in ask(other, {"q": vectors[0]}).problem


def test_prompts_become_the_preferred_captions_once(tmp_path):
    catalog = result_catalog(tmp_path / "s", {"a dog": drifting(1), "rain": drifting(2)})
    assert enter_prompts(catalog) == 2
    shown = ["caption", "caption_style", "caption_model", "status"]
    assert sorted(catalog.clips(columns=shown).collect().rows()) == [
        (text, "prompt", "prompt", "kept") for text in ("a dog", "rain")
    ]
    before = catalog.versions()
    assert enter_prompts(catalog) == 0 and catalog.versions() == before
    # somebody decides by a recipe that prefers other captions, which there are
    clip_id, shard = (
        catalog.clips(columns=["clip_id", "shard"]).filter(pl.col("clip_id").is_not_null()).collect().row(0)
    )
    other = {"caption_id": "x", "style": "dense", "model": "vlm", "text": "something", "flags": []}
    catalog.append("captions", [{**other, "clip_id": clip_id, "shard": shard, "created_at": datetime.now(UTC)}])
    decide_and_record(catalog, load_recipe("technical"))
    assert "something" in set(catalog.clips(columns=["caption"]).collect()["caption"])
    assert enter_prompts(catalog) == 0
    assert set(catalog.clips(columns=["caption"]).collect()["caption"]) == {"a dog", "rain"}
    assert set(catalog.scan("decisions").select(pl.col("recipe").str.split("@").list.first()).collect()["recipe"]) == {
        "technical"
    }


def test_two_samples_of_one_content_share_a_clip_and_both_count(tmp_path):
    catalog = result_catalog(tmp_path / "s", {"a dog": drifting(1)})
    row = catalog.scan("samples").collect().to_dicts()[0]
    catalog.append("samples", [{**row, "sample_id": "another", "prompt": "a cat"}])
    assert enter_prompts(catalog) == 1 and enter_prompts(catalog) == 0
    [found] = read_sets([catalog.root])
    assert found.videos.height == 2 and found.videos["clip_id"].n_unique() == 1


def test_sets_are_checkpoints_with_names_that_tell_them_apart(tmp_path):
    a = Catalog.create(tmp_path / "a")
    a.append(
        "samples",
        [
            sample("x", "one/step-5"),
            sample("x", "two/step-5"),
            sample("x", "two/step-5", number=1),
            sample("y", status="failed"),
        ],
    )
    b = Catalog.create(tmp_path / "b")
    b.append("samples", [sample("x", "one/step-5")])
    assert [s.label for s in read_sets([a.root])] == ["one/step-5", "two/step-5"]
    both = read_sets([a.root, b.root, a.root])
    assert len(both) == 3 and len({s.label for s in both}) == 3 and [s.rows.height for s in both] == [1, 2, 1]
    assert all(s.videos.is_empty() for s in both)


@pytest.mark.slow
def test_the_package_features_stand_in_where_there_are_no_weights(tmp_path, caplog):
    chosen = config.load(Settings, None, [f"models.folder={tmp_path}"])
    plan = plan_embedding(chosen, [])
    assert (
        plan.settings.embed.model == EFFICIENTNET
        and plan.fingerprint
        and "Using efficientnet-lite0 instead" in caplog.text
    )
    assert plan_embedding(plan.settings, []).fingerprint == plan.fingerprint
    refusing = config.load(Settings, None, [f"models.folder={tmp_path}", "embed.fallback=null"])
    none = plan_embedding(refusing, [])
    assert none.settings is None and "datakit models download" in none.problem


def plain_frames(*colours: tuple[int, int, int], height: int = 48, width: int = 64) -> list[np.ndarray]:
    return [np.full((height, width, 3), colour, np.uint8) for colour in colours]


def test_the_mean_picture_is_the_mean_of_middle_frames(tmp_path):
    red, blue, grey = (200, 20, 40), (20, 40, 220), (90, 90, 90)
    colours = {"one.mp4": (grey, grey, red, red, red, grey, grey), "two.mp4": [blue] * 7}
    files = [write(tmp_path / name, plain_frames(*frames)) for name, frames in colours.items()]
    catalog = import_all(files, tmp_path / "c")
    ids = catalog.finished_clips().select("clip_id", "run_id", "shard").collect()
    catalog.append(
        "embeddings", ids.with_columns(fingerprint=pl.lit(MARK), model=pl.lit("m"), vector=pl.lit([1.0, 0.0]))
    )
    real = read_real(catalog, pl.lit(True), MARK)
    mean = mean_picture(real, 0.5)
    assert mean.shape[:2] == (320, 640)
    assert np.abs(mean - np.mean([red, blue], axis=0)).max() < 4
    for file in files:
        file.unlink()
    with pytest.raises(CatalogError, match="no clip of .* can be read"):
        mean_picture(real, 0.5)


def test_pictures_are_cut_in_the_middle():
    picture = np.zeros((40, 100, 3), np.uint8)
    picture[:, 30:70] = 255  # what a square keeps
    assert (cut_to(picture, (20, 20)) == 255).all() and cut_to(picture.transpose(1, 0, 2), (20, 20)).min() == 255
    assert cut_to(picture, (50, 20)).shape == (20, 50, 3)


def test_strips_show_the_first_the_middle_and_the_last_frame(tmp_path):
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    grey = (120, 120, 120)
    frames = plain_frames(colours[0], grey, grey, colours[1], grey, grey, colours[2])
    path = encode(tmp_path / "v.mp4", frames, 7, pix_fmt="yuv420p")
    [row] = result_rows(tmp_path, path)
    shown = cv2.imdecode(np.frombuffer(strip(**row), np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    thirds = [shown[45, round(shown.shape[1] * at)] for at in (1 / 6, 1 / 2, 5 / 6)]
    assert np.abs(np.array(thirds, int) - np.array(colours)).max() < 12
    single = encode(tmp_path / "one.mp4", frames[:1], 7, pix_fmt="yuv420p")
    [row] = result_rows(tmp_path / "single", single)
    assert cv2.imdecode(np.frombuffer(strip(**row), np.uint8), cv2.IMREAD_COLOR).shape == (90, 120, 3)


def result_rows(folder, path) -> list[dict]:
    folder.mkdir(exist_ok=True)
    catalog = import_all([path], folder / "c")
    rows = catalog.clips(columns=["uri", "stream", "start_pts", "end_pts", "num_frames"]).collect()
    return rows.rename({"num_frames": "frames"}).to_dicts()


def test_a_grid_has_a_row_for_each_prompt_and_a_column_for_each_checkpoint(tmp_path):
    a = result_catalog(tmp_path / "a", {"rain": drifting(1), "a dog": drifting(2)}, "x")
    b = result_catalog(tmp_path / "b", {"a dog": drifting(3), "snow": drifting(4)}, "y")
    b.append("samples", [sample("rain", "y", path="files/pictures")])
    (tmp_path / "b" / "files" / "01.mp4").unlink()
    grid = make_grid(read_sets([a.root, b.root]), 10)
    assert (
        grid.labels == ["x", "y"] and grid.every == 3 and [row.prompt for row in grid.rows] == ["a dog", "rain", "snow"]
    )
    dog, rain, snow = (row.cells for row in grid.rows)
    assert all(cell.strip[:2] == b"\xff\xd8" for cell in (*dog, rain[0]))
    assert rain[1].strip is None and rain[1].problem == "not a video file"
    assert snow[0] is None and "01.mp4" in snow[1].problem and snow[1].strip is None
    assert [len(make_grid(read_sets([a.root]), most).rows) for most in (0, 1)] == [0, 1]
