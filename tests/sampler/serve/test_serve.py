"""The page to try a checkpoint on: what is asked for there is made, is in the catalog as a command's samples are, and
shows."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import httpx
import numpy as np
import pytest
from playwright.sync_api import Page

from catalogs.tables.catalog import Catalog
from datakit.errors import ConfigError
from datakit.video.reader import VideoReader
from sampler.generation.model_source import open_checkpoint
from sampler.generation.passes import Worker
from sampler.generation.run import sample
from sampler.generation.sample_spec import expand
from sampler.prompts.prompt import Prompt
from sampler.prompts.references import Reference, content_hash
from sampler.serve.studio import REFERENCES, Studio
from support.tiny_sampling import SETS, prompts, save_model, settings

pytestmark = pytest.mark.slow

WAIT_MS = 60_000
PROMPT = "a red <b>ball</b> rolls"
FRAMES, SHAPE = 9, (9, 32, 48, 3)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    return str(save_model(tmp_path_factory.mktemp("weights") / "model.safetensors"))


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "patches.png"
    patches = np.random.default_rng(3).integers(40, 216, (4, 6, 3), dtype=np.uint8)
    cv2.imwrite(str(path), cv2.resize(patches, (48, 32), interpolation=cv2.INTER_CUBIC))
    return path


def rows(out: Path, table: str = "samples") -> list[dict]:
    return Catalog(out).scan(table).collect().to_dicts()


def files(out: Path) -> set[Path]:
    return {path for path in out.rglob("*") if path.is_file()}


def pixels(path: str | Path) -> np.ndarray:
    with VideoReader(str(path)) as reader:
        return np.stack([frame.rgb() for frame in reader.frames()])


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """Mean difference of pixels."""
    return float(np.abs(a.astype(int) - b).mean())


@contextmanager
def serving(weights: str, out: Path) -> Iterator[tuple[subprocess.Popen, str]]:
    """The command, and its page's address."""
    sets = [part for one in SETS for part in ("--set", one)]
    command = [
        sys.executable,
        "-m",
        "datakit",
        "sample",
        "serve",
        "--ckpt",
        weights,
        "--out",
        str(out),
        "--port",
        "0",
        *sets,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        told = [process.stdout.readline() for _ in range(2)]
        address = re.search(r"http://127\.0\.0\.1:\d+/", told[-1])
        assert address, (told, process.stderr.read() if process.poll() is not None else "")
        yield process, address[0]
    finally:
        process.kill()
        process.wait()


def is_shown(page: Page, words: str) -> None:
    """The words are about the video that is shown, it has been loaded, and the next one may be asked for."""
    page.wait_for_function("words => document.querySelector('#about textarea').value.includes(words)", arg=words)
    page.wait_for_function(
        "[...document.querySelectorAll('#video video')].some((v) => v.readyState >= 2 && v.videoWidth === 48)"
    )
    page.wait_for_selector("#make:not([disabled])")


def says(page: Page, words: str) -> None:
    page.wait_for_selector(f".toast-body:has-text({json.dumps(words)})")


def choose_mode(page: Page, mode: str) -> None:
    page.click("#mode input")
    page.click(f"#mode [role=option]:text-is('{mode}')")


def test_the_page(browser, weights, picture, tmp_path):
    """In a browser: a video from words, one from a picture, what cannot be made, the gallery, and Ctrl-C while there is
    work."""
    out = tmp_path / "out"
    asked, troubles = [], []
    with serving(weights, out) as (process, address):
        page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
        page.set_default_timeout(WAIT_MS)
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda m: troubles.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: troubles.append(str(e)))
        page.goto(address)
        page.wait_for_selector("#prompt textarea")
        begins = [page.input_value(f"#{name} input") for name in ("height", "width", "num_frames", "fps", "steps")]
        assert begins == ["32", "48", "9", "12", "4"]

        page.fill("#prompt textarea", PROMPT)
        page.click("#make")
        is_shown(page, "t2v, 9 frames of 32×48")
        (row,) = rows(out)
        assert (row["prompt"], row["status"], row["mode"], row["forwards"]) == (PROMPT, "done", "t2v", 8)
        made = pixels(out / row["path"])
        assert made.shape == SHAPE

        choose_mode(page, "i2v_head")
        page.set_input_files("#references input[type=file]", str(picture))
        page.wait_for_selector("#references img")
        page.fill("#motion input, #motion textarea", "5")
        page.click("#make")
        is_shown(page, "5 motion score")
        (second,) = [r for r in rows(out) if r["mode"] == "i2v_head"]
        kept = out / REFERENCES / f"{content_hash(Reference(str(picture)))}.png"
        assert second["references"] == [str(kept)] and kept.read_bytes() == picture.read_bytes()
        given = cv2.imread(str(picture))[None, ..., ::-1]
        assert apart(pixels(out / second["path"])[:1], given) < 20 < apart(made[:1], given), (
            "it begins with the picture"
        )

        before = files(out)
        for field, wrong, words in [
            ("num_frames", "10", "10 frames: this autoencoder takes 4k + 1 frames; the nearest are 9 and 13"),
            ("steps", "0", "sampling.steps: Input should be greater than 0"),
            ("seed", "1.5", "seed: Input should be a valid integer"),
        ]:
            right = page.input_value(f"#{field} input")
            page.fill(f"#{field} input", wrong)
            page.click("#make")
            says(page, words)
            page.fill(f"#{field} input", right)
        assert files(out) == before and page.is_visible("#video video"), "nothing is written, and what is shown stays"

        assert page.locator("#gallery button img").count() == 2
        assert [PROMPT in text for text in page.locator("#gallery .caption-label").all_inner_texts()] == [True, True], (
            "markup is text"
        )
        page.click("#gallery button:has(img) >> nth=1")
        is_shown(page, "t2v, 9 frames of 32×48")
        assert page.input_value("#mode input") == "t2v" and page.input_value("#motion input, #motion textarea") == ""
        page.click("#gallery button:has(img) >> nth=0")
        is_shown(page, "5 motion score")
        page.wait_for_selector("#references img")
        assert (
            page.input_value("#mode input") == "i2v_head" and page.input_value("#motion input, #motion textarea") == "5"
        )
        page.click("#make")
        says(page, "1 of 1 were there already")
        assert len(rows(out)) == 2, "the fields say what makes the very same sample"

        for path in ("/etc/passwd", str(out / "samples" / "_delta_log" / "00000000000000000000.json"), weights):
            assert page.evaluate("path => fetch('/gradio_api/file=' + path).then(answer => answer.status)", path) == 403
        assert [t for t in troubles if "403" not in t] == []
        for headers in ({"Origin": "http://elsewhere.example"}, {"Host": "elsewhere.example"}):
            assert httpx.post(f"{address}gradio_api/queue/join", json={}, headers=headers).status_code == 403
        assert page.evaluate("document.documentElement.scrollWidth") <= 1280

        page.fill("#steps input", "100000")
        page.click("#make")
        page.wait_for_selector("text=/step \\d+ of 100000/")
        process.send_signal(signal.SIGINT)
        said, complaints = process.communicate(timeout=60)
        page.context.close()
    assert process.returncode == 0 and complaints == "", complaints
    assert all(url.startswith((address, "data:", "blob:")) for url in asked), "no other host is asked for anything"
    assert [r["status"] for r in sorted(rows(out, "runs"), key=lambda r: r["started_at"])] == [
        "finished",
        "finished",
        "stopped",
    ]
    assert sorted(r["status"] for r in rows(out)) == ["done", "done", "encoded"]
    view = Catalog(out).clips(columns=["caption", "status", "num_frames"]).collect()
    assert (
        view.to_dicts() == [{"caption": PROMPT, "status": "kept", "num_frames": FRAMES}] * 2
        and len(rows(out, "videos")) == 2
    )


def test_requests_wait_for_each_other_and_are_the_commands_samples(weights, picture, tmp_path):
    """Two requests at once, of formats that browsers cannot play; what is in the catalog is what the command would
    make."""
    from sampler.serve.page import Shelf

    out, scratch = tmp_path / "out", tmp_path / "scratch"
    scratch.mkdir()
    upload = Path(shutil.copy(picture, tmp_path / "upload.PNG"))
    own = settings("output.format=lossless", "samples=2")
    studio = Studio(weights, out, own)
    studio.load()
    first = studio.submit(Prompt("one"), own)
    second = studio.submit(
        Prompt("two", references=(Reference(str(upload)),)), settings("output.format=lossless", "video.mode=i2v_head")
    )
    events = list(first.events())
    assert (first.result().done, second.result().done) == (2, 1)
    steps = [(event.text, event.done, event.of) for event in events if "step" in event.text]
    assert steps == [(f"video {v} of 2: step {s} of 4", 4 * (v - 1) + s, 8) for v in (1, 2) for s in (1, 2, 3, 4)]
    assert [event.made for event in events if event.made] == first.samples and not (out / "page_work").exists()
    table = sorted(rows(out), key=lambda row: row["finished_at"])
    assert [row["prompt"] for row in table] == ["one", "one", "two"]
    runs = sorted(rows(out, "runs"), key=lambda row: row["started_at"])
    assert [row["run_id"] for row in table] == [runs[0]["run_id"]] * 2 + [runs[1]["run_id"]]
    assert runs[0]["finished_at"] <= runs[1]["started_at"] and json.loads(runs[0]["counts"])["done"] == 2
    left = []
    sample(
        [Prompt("one")],
        weights,
        str(out),
        own,
        dry_run=True,
        on_start=lambda found: left.append((found.asked, found.todo)),
    )
    assert left == [(2, 0)], "to the command they are done"
    upload.unlink()
    again = studio.submit(Prompt("two", references=(Reference(table[2]["references"][0]),)), second.settings)
    assert (again.result().there, again.result().done) == (1, 0), "references outlive what was uploaded"
    shelf = Shelf(studio, scratch)
    shown, ids = shelf.newest()
    assert (
        ids == [row["sample_id"] for row in reversed(table)]
        and [caption for _, caption in shown][0] == "two · i2v_head · seed 0"
    )
    film = Path(shelf.video(table[0]))
    assert film.parent == scratch and film.suffix == ".mp4"
    assert apart(pixels(film), pixels(out / table[0]["path"])) < 8 < apart(pixels(film), pixels(out / table[1]["path"]))
    assert cv2.imread(shown[0][0]).shape == (32, 48, 3)
    (out / table[2]["path"]).unlink()
    assert shelf.newest()[1] == ids[1:], "what was deleted is not shown"
    studio.stop()
    with pytest.raises(ConfigError, match="about to close"):
        studio.submit(Prompt("three"), own)


def test_what_cannot_be_made_is_refused_before_anything_is_written(weights, tmp_path):
    with pytest.raises(ConfigError, match="one process"):
        Studio(weights, tmp_path / "out", settings("work.tensor_parallel=2"))
    with pytest.raises(ConfigError, match="height 30"):
        Studio(weights, tmp_path / "out", settings()).submit(Prompt("one"), settings("video.height=30"))
    text = tmp_path / "notes.txt"
    text.write_text("not a picture")
    studio = Studio(weights, tmp_path / "out", settings())
    with pytest.raises(ConfigError, match="notes.txt"):
        studio.submit(Prompt("one", references=(Reference(str(text)),)), settings("video.mode=i2v_head"))
    assert not (tmp_path / "out").exists()


def test_steps_are_told_with_their_forwards(weights, tmp_path):
    own = settings("sampling.guidance=1")
    checkpoint = open_checkpoint(weights, own)
    asked = expand(prompts(2), own, checkpoint, checkpoint.describe_autoencoder())
    worker, told = Worker(checkpoint, own, str(tmp_path), str(tmp_path / "work"), gpu=False), []
    worker.encode(asked)
    worker.denoise(asked, lambda *step: told.append(step))
    assert told == [(0, 1), (1, 1), (2, 1), (3, 1)]
