"""Embeddings, aesthetics and the match of captions: known answers, each frame once, weights found or named."""

import json
import os
import shutil
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from catalogs.tables.catalog import Catalog
from datakit import config
from datakit.errors import ConfigError
from datakit.video.reader import VideoReader
from pipelines.catalog_sync.embeddings import resolve
from pipelines.recipes.decide import redecide
from pipelines.runs.caption import caption_id
from pipelines.runs.ingest import ingest
from pipelines.runs.score import score
from pipelines.settings import Settings
from pipelines.stages.aesthetic import aesthetic_of, load_head
from pipelines.stages.embed import mean_of
from pipelines.stages.image_encoders import make_encoder
from pipelines.stages.registry import STAGES
from support.counting_stage import CountingEmbed
from support.drawn_videos import encode, shots
from support.tiny_clip import build as build_tiny_clip

pytestmark = pytest.mark.slow

DATA = Path(__file__).parents[2] / "data" / "aesthetic"
RATED = {  # LAION's published heads over the embeddings of pictures that it rates 0 to 9
    ("vit_b_32", "sa_0_4_vit_b_32_linear.pth"): (-1.470, 11.006),
    ("vit_l_14", "sa_0_4_vit_l_14_linear.pth"): (-2.458, 11.304),
}
QUICK = ("ocr.enabled=false", "recipe=technical")


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory) -> Path:
    return build_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny-clip")


@pytest.fixture(scope="module")
def two_hundred(tmp_path_factory) -> Path:
    """Five videos of forty shots each."""
    folder = tmp_path_factory.mktemp("sources")
    for number in range(5):
        frames = [np.roll(frame, 7 * number, 1) for frame in shots([12 + number] * 40, 96, 128)]
        encode(folder / f"v{number}.mp4", frames, 10, pix_fmt="yuv420p", options={"crf": "24", "preset": "ultrafast"})
    return folder


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> str:
    """An aesthetic head for the small model."""
    return head_for(tmp_path_factory.mktemp("head"), 32)


@pytest.fixture(scope="module")
def embedded(footage, tiny_clip, head, tmp_path_factory, ray_address) -> Path:
    """A catalog of the six shots of bikes.mp4, embedded and rated in the pass of its ingest; to be copied."""
    root = tmp_path_factory.mktemp("embedded") / "c"
    ingest([str(footage["bikes.mp4"])], str(root), embedding(tiny_clip, head), ray_address)
    return root


def embedding(tiny_clip: Path, head: str) -> Settings:
    return settings(
        "embed.enabled=true", "aesthetic.enabled=true", f"embed.model={tiny_clip}", f"aesthetic.head={head}"
    )


def settings(*sets: str) -> Settings:
    return config.load(Settings, None, [*QUICK, *sets])


def embeddings(root: str) -> pl.DataFrame:
    return Catalog(root).embeddings().sort("clip_id", "model").collect()


@pytest.mark.parametrize("kind, head", RATED)
def test_heads_give_the_published_ratings(kind, head):
    vectors = np.concatenate([np.load(DATA / f"{kind}_rating{i}.npy") for i in range(10)])
    ratings = aesthetic_of(vectors, np.ones(10), load_head(str(DATA / head)))
    assert (ratings[0], ratings[9]) == pytest.approx(RATED[kind, head], abs=1e-3)
    assert (np.diff(ratings) > 0).all()


@pytest.mark.parametrize("head", sorted(path.name for path in DATA.glob("*.pth")))
def test_a_head_is_its_layers_one_after_another_frame_by_frame(head):
    import torch

    state = torch.load(DATA / head, map_location="cpu", weights_only=True)
    weights = [state[name] for name in state if name.endswith("weight")]
    biases = [state[name] for name in state if name.endswith("bias")]
    frames = torch.nn.functional.normalize(
        torch.randn(3, weights[0].shape[1], generator=torch.Generator().manual_seed(1)), dim=-1
    )
    direct = frames
    for weight, bias in zip(weights, biases):
        direct = direct @ weight.T + bias
    clip = mean_of(frames.numpy())
    rated = aesthetic_of(clip["vector"][None], np.array([clip["norm"]]), load_head(str(DATA / head)))
    assert rated[0] == pytest.approx(direct.mean().item(), abs=1e-3)


def test_a_file_that_is_no_head_is_refused(tmp_path):
    import torch

    torch.save({"weight": torch.zeros(5, 7), "bias": torch.zeros(5)}, tmp_path / "x.pth")
    with pytest.raises(ConfigError, match="not an aesthetic head"):
        load_head(str(tmp_path / "x.pth"))


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
def test_vectors_are_those_of_a_bare_open_clip_loop(tiny_clip, footage, tmp_path, mode):
    import open_clip
    import torch
    from PIL import Image

    folder = tmp_path / mode
    described = json.loads((tiny_clip / "open_clip_config.json").read_text())
    described["preprocess_cfg"]["resize_mode"] = mode
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    os.link(tiny_clip / "open_clip_pytorch_model.bin", folder / "open_clip_pytorch_model.bin")
    with VideoReader(str(footage["bikes.mp4"])) as reader:
        pictures = [p.rgb(320 + 40 * (i % 2)) for i, p in zip(range(9), reader.frames())]
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    with torch.inference_mode():
        bare = torch.nn.functional.normalize(
            model.eval().encode_image(torch.stack([transform(Image.fromarray(p)) for p in pictures])), dim=-1
        )
        words = torch.nn.functional.normalize(
            model.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(["a dog", "a cat"])), dim=-1
        )
    encoder = make_encoder("tiny", str(folder), None, 2, 4)
    assert (encoder.images(pictures) * bare.numpy()).sum(axis=1) == pytest.approx(1.0, abs=2e-4)
    assert encoder.texts(["a dog", "a cat"]) == pytest.approx(words.numpy(), abs=1e-5)


def test_an_image_pass_does_each_frame_once_and_a_rerun_none(
    two_hundred, tiny_clip, tmp_path, ray_address, monkeypatch, attempts
):
    root = str(tmp_path / "c")
    ingest([str(two_hundred)], root, settings(), ray_address)
    clips = Catalog(root).clips().collect()
    assert clips.height == 200
    monkeypatch.setitem(STAGES, "embed", CountingEmbed)
    chosen = settings(f"embed.model={tiny_clip}", f"aesthetic.head={head_for(tmp_path, 32)}")
    done = score(root, chosen, ["embed", "aesthetic"], "num_frames > 0", ray=ray_address)
    assert (done["clips"], done["rated"]["aesthetic"], done["clips_with_errors"]) == (200, 200, 0)
    looked = Counter()
    for line in Path(os.environ["FAULTY_ATTEMPTS"], "embedded").read_text().splitlines():
        clip_id, pictures = json.loads(line)
        looked[clip_id] += 1
        assert pictures <= 3
    assert looked == dict.fromkeys(clips["clip_id"], 1)
    before = Path(os.environ["FAULTY_ATTEMPTS"], "embedded").stat().st_size
    again = score(root, chosen, ["embed", "aesthetic"], "num_frames > 0", ray=ray_address)
    assert (again["clips"], again["rated"]["aesthetic"]) == (0, 0)
    assert Path(os.environ["FAULTY_ATTEMPTS"], "embedded").stat().st_size == before
    rows = embeddings(root)
    assert rows.height == 200 and set(rows["model"]) == {"tiny-clip"} and rows["weights_hash"].n_unique() == 1
    assert np.linalg.norm(np.stack(rows["vector"].to_numpy()), axis=1) == pytest.approx(1.0, abs=1e-5)
    # another head: new ratings, no picture looked at
    other = settings(f"embed.model={tiny_clip}", f"aesthetic.head={head_for(tmp_path, 32, seed=5)}")
    assert score(root, other, ["embed", "aesthetic"], "num_frames > 0", ray=ray_address)["rated"]["aesthetic"] == 200
    assert Path(os.environ["FAULTY_ATTEMPTS"], "embedded").stat().st_size == before
    with pytest.raises(ConfigError, match="length 7.*length|embeddings of length 7"):
        score(
            root,
            settings(f"embed.model={tiny_clip}", f"aesthetic.head={head_for(tmp_path, 7)}"),
            ["aesthetic"],
            ray=ray_address,
        )


def test_ingest_embeds_in_its_pass_and_score_gives_the_same(footage, embedded, tiny_clip, head, tmp_path, ray_address):
    chosen = embedding(tiny_clip, head)
    root = str(shutil.copytree(embedded, tmp_path / "c"))
    first, rated = embeddings(root), Catalog(root).clips().sort("clip_id").collect()
    assert first.height == rated.height > 5
    weight, bias = load_head(head)
    assert_each_is(rated["aesthetic"], first, lambda vector, norm, i: norm * np.dot(vector, weight) + bias, 1e-3)
    done = score(root, chosen, ["embed"], "num_frames > 0", redo=True, ray=ray_address)
    assert done["clips"] == first.height
    second = embeddings(root)
    assert second.height == first.height
    for before, after in zip(first["vector"].to_list(), second["vector"].to_list()):
        assert before is after is None or after == pytest.approx(before, abs=1e-3)
    assert ingest([str(footage["bikes.mp4"])], root, chosen, ray_address).stage_cpu_s == {}, (
        "the second ingest had nothing to do"
    )


def test_caption_match_is_the_mean_cosine_and_follows_the_caption(embedded, tiny_clip, tmp_path, ray_address):
    root = str(shutil.copytree(embedded, tmp_path / "c"))
    chosen = settings(f"embed.model={tiny_clip}")
    catalog = Catalog(root)
    clips = catalog.clips().sort("clip_id").collect()
    write_captions(
        catalog,
        {row["clip_id"]: (row["shard"], f"clip number {i}") for i, row in enumerate(clips.iter_rows(named=True))},
    )
    done = score(root, chosen, ["caption_match"], ray=ray_address)
    rows = embeddings(root)
    assert (
        done["rated"]["caption_match"] == rows["vector"].count() == rows.height - 1
    )  # one is too short for a grid frame
    encoder = make_encoder("tiny-clip", str(tiny_clip), None, 1, 8)
    text = encoder.texts([f"clip number {i}" for i in range(clips.height)])
    before = catalog.clips().sort("clip_id").collect()["caption_match"]
    assert_each_is(before, rows, lambda vector, norm, i: norm * np.dot(vector, text[i]), 1e-4)
    assert score(root, chosen, ["caption_match"], ray=ray_address)["rated"]["caption_match"] == 0
    changed = next(i for i, value in enumerate(before) if value is not None)
    first = clips.row(changed, named=True)
    write_captions(catalog, {first["clip_id"]: (first["shard"], "something else altogether")})
    assert score(root, chosen, ["caption_match"], ray=ray_address)["rated"]["caption_match"] == 1
    assert catalog.clips().sort("clip_id").collect()["caption_match"][changed] != pytest.approx(
        before[changed], abs=1e-4
    )


def test_without_weights_one_line_says_what_to_do(tmp_path, caplog):
    empty = f"models.folder={tmp_path}"
    with pytest.raises(ConfigError, match="stage embed cannot run.*ViT-L-14/openai.*datakit models download") as error:
        resolve(settings(empty, "embed.fallback=null"), ["embed"])
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="stage aesthetic cannot run"):
        resolve(settings(empty), ["embed", "aesthetic"])
    with pytest.raises(ConfigError, match="aesthetic needs a CLIP"):
        resolve(settings(empty, "embed.model=efficientnet-lite0"), ["aesthetic"])
    found = resolve(settings(empty), ["embed"])
    assert found.embed.model == "efficientnet-lite0" and Path(found.embed.weights).is_file()
    assert "Using efficientnet-lite0 instead" in caplog.text and len(caplog.text.strip().splitlines()) == 1


def test_weights_that_do_not_load_end_the_run_and_quarantine_nothing(embedded, tiny_clip, tmp_path, ray_address):
    broken = tmp_path / "broken-clip"
    broken.mkdir()
    (broken / "open_clip_config.json").write_text((tiny_clip / "open_clip_config.json").read_text())
    (broken / "open_clip_pytorch_model.bin").write_bytes(b"no weights")
    root = str(shutil.copytree(embedded, tmp_path / "c"))
    with pytest.raises(ConfigError, match="a stage cannot start .Embed.") as error:
        score(root, settings(f"embed.model={broken}"), ["embed"], "num_frames > 0", ray=ray_address)
    assert "\n" not in str(error.value)
    assert Catalog(root).clips().filter(pl.col("errors").list.len() > 0).collect().height == 0


def test_the_fallback_tells_pictures_apart(footage, tmp_path, ray_address):
    root = str(tmp_path / "c")
    chosen = settings("embed.enabled=true", "embed.model=efficientnet-lite0")
    ingest([str(footage["bikes.mp4"]), str(footage["bigbuckbunny.mp4"])], root, chosen, ray_address)
    rows = embeddings(root).drop_nulls("vector")
    assert set(rows["model"]) == {"efficientnet-lite0"}
    vectors = np.stack(rows["vector"].to_numpy())
    assert vectors.shape == (rows.height, 1280)
    cosines = vectors @ vectors.T
    films = rows["video_id"].to_list()
    across = [cosines[i, j] for i in range(len(films)) for j in range(i) if films[i] != films[j]]
    assert max(across) < 0.9 < min(np.diag(cosines))


def assert_each_is(values: pl.Series, rows: pl.DataFrame, expected, tolerance: float) -> None:
    """Values follow from the embeddings in the same order; null where there is none."""
    for i, (value, vector, norm) in enumerate(zip(values, rows["vector"].to_list(), rows["norm"])):
        assert value is vector is None or value == pytest.approx(expected(np.array(vector), norm, i), abs=tolerance)


def head_for(folder: Path, dimensions: int, seed: int = 0) -> str:
    """An aesthetic head of random numbers."""
    import torch

    path = folder / f"head_{dimensions}_{seed}.pth"
    generator = torch.Generator().manual_seed(seed)
    torch.save(
        {"weight": torch.randn(1, dimensions, generator=generator), "bias": torch.randn(1, generator=generator)}, path
    )
    return str(path)


def write_captions(catalog: Catalog, texts: dict[str, tuple[str, str]]) -> None:
    """Enter captions by hand, and choose them."""
    rows = [
        {
            "caption_id": caption_id(clip, "dense", "hand"),
            "clip_id": clip,
            "shard": shard,
            "style": "dense",
            "model": "hand",
            "text": text,
            "flags": [],
            "created_at": datetime.now(UTC),
        }
        for clip, (shard, text) in texts.items()
    ]
    catalog.delete("captions", "clip_id IN (" + ", ".join(f"'{clip}'" for clip in texts) + ")")
    catalog.append("captions", rows)
    redecide(catalog)
