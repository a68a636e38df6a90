"""Blind pairs: which there are, votes that last, what they say, and a browser that votes."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn
from starlette.testclient import TestClient

from datakit.errors import CatalogError, ConfigError
from sampler.evaluate.prefer_app import make_app
from sampler.evaluate.preference import FILE, Votes, make_pairs, tally, votes_of, wilson
from sampler.evaluate.result_sets import read_sets
from support.browser import until
from support.sample_catalogs import drifting, result_catalog, sample

PROMPTS = ("a <b>red</b> car", "a dog", "a lake", "rain")
BASE = "http://127.0.0.1:9999"


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> list[str]:
    """Two checkpoints that share four prompts; the second has one more, and one sample that is no video."""
    folder = tmp_path_factory.mktemp("prefer")
    a = result_catalog(folder / "a", {prompt: drifting(i) for i, prompt in enumerate(PROMPTS)}, "runs/step-10")
    b = result_catalog(
        folder / "b", {prompt: drifting(50 + i) for i, prompt in enumerate([*PROMPTS, "alone"])}, "runs/step-20"
    )
    for catalog, checkpoint in ((a, "runs/step-10"), (b, "runs/step-20")):
        catalog.append("samples", [sample("a folder of pictures", checkpoint, path="files/pictures")])
    return [a.root, b.root]


@pytest.fixture
def copied(roots, tmp_path) -> list[str]:
    """To vote in."""
    return [str(shutil.copytree(root, tmp_path / Path(root).name)) for root in roots]


def test_pairs_are_of_one_prompt_seed_and_number_and_hide_whose_they_are(roots):
    sets = read_sets(roots)
    assert [s.label for s in sets] == ["step-10", "step-20"]
    pairs = make_pairs(sets, 0)
    assert sorted(pair.prompt for pair in pairs) == sorted(PROMPTS)
    assert all({pair.left.label, pair.right.label} == {"step-10", "step-20"} for pair in pairs)
    assert all(
        f"/{pair.prompt}/42/0" in bytes.fromhex(side.sample_id).decode()
        for pair in pairs
        for side in (pair.left, pair.right)
    )
    assert make_pairs(read_sets(roots[::-1]), 0) == pairs, (
        "neither the order of the folders nor a second look changes a pair"
    )
    sides = {
        seed: tuple(pair.left.label for pair in sorted(make_pairs(sets, seed), key=lambda p: p.prompt))
        for seed in range(12)
    }
    orders = {tuple(pair.prompt for pair in make_pairs(sets, seed)) for seed in range(12)}
    assert len(set(sides.values())) > 4 and len(orders) > 4
    left = sum(labels.count("step-10") for labels in sides.values())
    assert 12 < left < 36, "of 48 sides"


def test_other_seeds_and_numbers_are_no_pairs(tmp_path):
    result_catalog(tmp_path / "a", {"a dog": drifting(1)}, "x", seed=1)
    result_catalog(tmp_path / "b", {"a dog": drifting(2)}, "y", seed=2)
    with pytest.raises(ConfigError, match="no two checkpoints have a video of the same prompt"):
        make_pairs(read_sets([str(tmp_path / "a"), str(tmp_path / "b")]), 0)


def test_votes_last_and_the_newest_counts(copied):
    sets = read_sets(copied)
    first, second, third, fourth = make_pairs(sets, 0)
    votes = votes_of(sets)
    for pair in (first, second):
        votes.add(pair, _side(pair, "step-20"), "ann")
    votes.add(third, "tie", "ann")
    votes.add(fourth, "right", "ann")
    votes.add(fourth, _side(fourth, "step-10"), "ann")  # she went back
    votes.add(first, _side(first, "step-20"), "bob")
    again = votes_of(sets)
    assert len(again.all()) == 5 and again.done("ann") == {p.pair_id for p in (first, second, third, fourth)}
    assert again.done("bob") == {first.pair_id}
    [found] = tally(again.all(), sets)
    assert (found.a, found.b, found.wins_a, found.wins_b, found.ties) == ("step-10", "step-20", 1, 3, 1)
    assert found.rate == 0.25 and (found.low, found.high) == wilson(1, 4)
    assert tally(again.all(), sets[:1]) == [], "votes on samples that are not asked about"
    lines = (Path(copied[0]) / FILE).read_text().splitlines()
    assert len(lines) == 6 and json.loads(lines[0])["author"] == "ann" and json.loads(lines[0])["time"].startswith("20")


def _side(pair, label: str) -> str:
    return "left" if pair.left.label == label else "right"


def test_wilson_is_the_published_interval():
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3 (Wilson score, no continuity correction)
    for (wins, trials), (low, high) in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        assert wilson(wins, trials) == pytest.approx((low, high), abs=5e-5)


def test_a_vote_that_a_crash_cut_off_does_not_count_and_harms_none(copied):
    sets = read_sets(copied)
    pairs, file = make_pairs(sets, 0), Path(copied[0]) / FILE
    Votes(file).add(pairs[0], "left", "ann")
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:40])
    votes = Votes(file)
    assert len(votes.all()) == 1
    votes.add(pairs[1], "right", "ann")
    assert Votes(file).done("ann") == {pairs[0].pair_id, pairs[1].pair_id}
    file.write_bytes(b"hello\n" + whole)
    with pytest.raises(CatalogError, match="line 1 is no vote"):
        Votes(file)


def test_threads_may_vote_at_once(copied):
    sets = read_sets(copied)
    pairs, votes = make_pairs(sets, 0), votes_of(sets)
    threads = [
        threading.Thread(target=lambda i=i: [votes.add(pair, "tie", f"rater {i}") for pair in pairs]) for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(votes_of(sets).all()) == 6 * len(pairs)


@pytest.fixture
def client(copied):
    sets = read_sets(copied)
    app = make_app(make_pairs(sets, 0), votes_of(sets), "ann", 9999)
    with TestClient(
        app, base_url=BASE, headers={"Sec-Fetch-Site": "same-origin"}, raise_server_exceptions=False
    ) as client:
        client.token, client.sets = {"X-Datakit-Token": app.state.token}, sets
        yield client


def test_nothing_that_is_served_tells_whose_a_video_is(client, copied):
    told = client.get("/api/pairs").json()
    assert told["all"] == len(told["pairs"]) == 4
    pair = told["pairs"][0]["pair"]
    answers = [
        client.get(path)
        for path in ("/", "/api/pairs", "/static/prefer.js", f"/video/{pair}/left", f"/video/{pair}/right")
    ]
    assert all(answer.status_code == 200 for answer in answers)
    for answer in answers:
        seen = answer.content + repr(answer.headers).encode()
        assert not any(word in seen for word in (b"step-10", b"step-20", copied[0].encode(), copied[1].encode()))
    shown = {p.pair_id: p for p in make_pairs(client.sets, 0)}[pair]
    assert (
        answers[3].content == Path(shown.left.file).read_bytes()
        and answers[4].content == Path(shown.right.file).read_bytes()
    )
    assert answers[3].headers["content-type"] == "video/mp4"
    assert client.get(f"/video/{pair}/left", headers={"Range": "bytes=0-9"}).status_code == 206


def test_votes_take_the_page_and_a_pair_and_a_choice(client, copied):
    pair = client.get("/api/pairs").json()["pairs"][0]["pair"]
    body = {"pair": pair, "choice": "left"}
    assert client.post("/api/vote", json=body).status_code == 403
    assert client.post("/api/vote", json=body, headers=client.token | {"Host": "evil.example:9999"}).status_code == 403
    assert (
        client.post("/api/vote", json=body, headers=client.token | {"Origin": "http://evil.example"}).status_code == 403
    )
    assert client.get("/api/pairs", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    unknown, neither = {"pair": "0" * 24, "choice": "left"}, {"pair": pair, "choice": "both"}
    for wrong, status in ((unknown, 404), (neither, 400), ({"choice": "left"}, 400), ([], 400)):
        assert client.post("/api/vote", json=wrong, headers=client.token).status_code == status
    assert not (Path(copied[0]) / FILE).exists()
    assert client.post("/api/vote", json=body, headers=client.token).json() == {"done": 1}
    left = client.get("/api/pairs").json()
    assert len(left["pairs"]) == 3 and pair not in {p["pair"] for p in left["pairs"]}
    assert (
        client.get("/video/nothing/left").status_code == 404 and client.get(f"/video/{pair}/middle").status_code == 404
    )


def test_what_browsers_cannot_play_is_encoded_for_them(tmp_path):
    import av

    roots = [
        result_catalog(tmp_path / name, {"a dog": drifting(seed)}, name, ".mkv").root
        for name, seed in (("a", 1), ("b", 2))
    ]
    sets = read_sets(roots)
    app = make_app(make_pairs(sets, 0), votes_of(sets), "ann", 9999)
    with TestClient(app, base_url=BASE, headers={"Sec-Fetch-Site": "same-origin"}) as client:
        pair = client.get("/api/pairs").json()["pairs"][0]["pair"]
        answer = client.get(f"/video/{pair}/left")
        (tmp_path / "served.mp4").write_bytes(answer.content)
    assert answer.headers["content-type"] == "video/mp4"
    with av.open(str(tmp_path / "served.mp4")) as container:
        assert container.format.name.startswith("mov") and sum(1 for _ in container.decode(video=0)) == 9


@contextmanager
def served(app, listening):
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(10)


def test_a_browser_votes_by_keys_and_goes_on_where_it_stopped(browser, copied):
    sets = read_sets(copied)
    pairs, votes = make_pairs(sets, 0), votes_of(sets)
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    troubles: list[str] = []
    with served(make_app(pairs, votes, "ann", port), listening):
        page = browser.new_context(viewport={"width": 1300, "height": 850}).new_page()
        page.on("console", lambda m: troubles.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: troubles.append(str(e)))

        def at(number: int) -> None:
            page.wait_for_selector(
                f"body[data-ready][data-pair='{pairs[number].pair_id if number < len(pairs) else ''}']"
            )

        page.goto(f"http://127.0.0.1:{port}/")
        at(0)
        assert page.inner_text("#prompt") == pairs[0].prompt and page.inner_text("#count") == "0 of 4"  # markup is text
        until(page, "[...document.querySelectorAll('video')].every((v) => v.readyState >= 2 && v.videoWidth === 96)")
        page.keyboard.press("ArrowLeft")
        at(1)
        page.keyboard.press("ArrowRight")
        at(2)
        page.keyboard.press("Backspace")
        at(1)
        page.keyboard.press(" ")
        at(2)
        page.reload()
        at(2)
        assert page.inner_text("#count") == "2 of 4"
        page.click("figure[data-side=right]")
        at(3)
        page.click("button[data-choice=tie]")
        at(4)
        assert page.is_visible("#end") and not page.is_visible("#work")
        assert page.evaluate("document.documentElement.scrollWidth") <= 1300
        page.context.close()
    assert troubles == []
    choices = {vote.pair: vote.choice for vote in votes_of(sets).all()}
    assert [choices[pair.pair_id] for pair in pairs] == ["left", "tie", "right", "tie"]


def test_the_command_serves_this_machine_and_sums_up_at_the_end(copied):
    folders = [part for root in copied for part in ("--samples", root)]
    command = [sys.executable, "-m", "datakit", "eval", "prefer", *folders, "--author", "ann"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("4 of 4 pairs to judge: http://127.0.0.1:") and "Ctrl-C" in line
        sets = read_sets(copied)
        pair = make_pairs(sets, 0)[0]
        votes_of(sets).add(pair, _side(pair, "step-20"), "ann")
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        said, complaints = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 0 and complaints == ""
    assert said == "step-10 against step-20: 0 wins, 1 losses, 0 ties; win rate 0% [0%, 79%]\n"
    summary = subprocess.run([*command, "--summary"], capture_output=True, text=True)
    assert summary.stdout == said and summary.returncode == 0
