"""A catalog in an object store (moto's S3 server): everything that a folder can do."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time

import polars as pl
import pytest

pytestmark = pytest.mark.slow

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_ALLOW_HTTP": "true",
}
ROOT = "s3://bucket/catalog"


@pytest.fixture(scope="module")
def store():
    """The server, with an empty bucket; its address is in the environment, as for any user of S3. It is a process of
    its own: deltalake's restore does not let other threads run while it waits for an answer."""
    import boto3

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", port],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT, AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}")
    deadline = time.monotonic() + 60
    while socket.socket().connect_ex(("127.0.0.1", int(port))):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    yield client
    os.environ.clear()
    os.environ.update(before)
    server.kill()
    server.wait()


@pytest.fixture(scope="module")
def catalog(store, footage):
    """A real film from the bucket, ingested into a catalog in the bucket; the processes of a Ray of its own inherit the
    address."""
    from catalogs.tables.catalog import Catalog
    from pipelines.runs.ingest import ingest
    from pipelines.settings import Settings

    store.upload_file(str(footage["bikes.mp4"]), "bucket", "videos/bikes.mp4")
    report = ingest(
        ["s3://bucket/videos/"],
        ROOT,
        Settings.model_validate({"ocr": {"enabled": False}, "recipe": "technical"}),
        "local",
    )
    assert (report.funnel.videos_ok, report.funnel.clips) == (1, 6) and report.funnel.kept > 0
    return Catalog(ROOT)


def datakit(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "datakit", *arguments], capture_output=True, text=True)


def test_reading_deciding_and_going_back(catalog):
    from catalogs.maintenance.validate import problems
    from catalogs.query.funnel import funnel
    from catalogs.query.selection import Selection
    from catalogs.query.snapshots import restore, tag, untag, vacuum
    from catalogs.query.sql import query
    from pipelines.recipes.decide import decide_and_record
    from pipelines.recipes.recipe import load_recipe

    assert query(catalog, "SELECT DISTINCT uri FROM clips")["uri"].to_list() == ["s3://bucket/videos/bikes.mp4"]
    selection = Selection(catalog)
    assert selection.size[0] == funnel(catalog).kept == selection.read().height
    tag(catalog, "first", selection=selection)
    kept = funnel(catalog).kept
    for n in range(10):
        assert decide_and_record(catalog, load_recipe("technical", [f"long=end_s - start_s > {n * 100}"])).clips == 6
    assert funnel(catalog).kept == 0
    assert Selection(catalog, "first").content_hash == selection.content_hash
    gone = vacuum(catalog, keep_days=0)
    assert gone.files >= 8 and gone.bytes is None
    assert Selection(catalog, "first").content_hash == selection.content_hash
    restore(catalog, "first")
    assert funnel(catalog).kept == kept and list(problems(catalog)) == []
    untag(catalog, "first")


def _mark(root: str, clip: str, times: int) -> None:
    from catalogs.records.marks import mark
    from catalogs.tables.catalog import Catalog

    for n in range(times):
        mark(Catalog(root), [clip], "keep", str(n))


def _decide(root: str, times: int) -> None:
    from catalogs.tables.catalog import Catalog
    from pipelines.recipes.decide import decide
    from pipelines.recipes.recipe import load_recipe

    for _ in range(times):
        decide(Catalog(root), load_recipe("technical"))


def test_two_writers_lose_nothing(catalog):
    clips = sorted(catalog.finished_clips().collect()["clip_id"])
    context = multiprocessing.get_context("spawn")
    before = catalog.scan("marks").collect().height
    writers = [context.Process(target=_mark, args=(ROOT, clip, 5)) for clip in clips[:2]] + [
        context.Process(target=_decide, args=(ROOT, 4))
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
        assert writer.exitcode == 0
    assert catalog.scan("marks").collect().height == before + 10
    assert sorted(catalog.marks().collect()["clip_id"]) == clips[:2]
    assert catalog.scan("decisions").collect()["clip_id"].sort().to_list() == clips


def test_commands(catalog):
    for command in (["show"], ["funnel"], ["select", "--json"], ["history"], ["validate"]):
        done = datakit("catalog", command[0], ROOT, *command[1:])
        assert done.returncode == 0, done.stderr
    assert (
        json.loads(datakit("catalog", "select", ROOT, "--json").stdout)["clips"]
        == catalog.clips(columns=["status"]).filter(pl.col("status") == "kept").collect().height
    )


def test_latents(catalog, tmp_path):
    """Written in the order of the plan, each once; found and read from the bucket by what loaders have."""
    from catalogs.query.selection import Selection
    from catalogs.records.latents import Latents, windows_of
    from trainer.data.latent_reader import LatentReader
    from trainer.latents.index import locate
    from trainer.planning.build_plan import make_plan
    from trainer.planning.mixture import COLUMNS
    from trainer.planning.settings import PlanSettings

    chosen = PlanSettings(fps=25, resolutions=["64px"], frames=[9], captions="optional")
    plan = make_plan(Selection(catalog, where="split = 'train'", columns=COLUMNS), chosen, tmp_path / "plan")
    facts = ("clip_id", "video_id", "stream", "start_pts", "end_pts", "geometry", "first", "frames", "fps")
    windows = plan.rows(range(plan.windows.num_rows), facts)
    rows = [
        {
            **w,
            "shard": "0",
            "bucket": plan.buckets[0].name,
            "dtype": "float32",
            "shape": [1, 1, 1, 250_000],
            "std": bytes(1_000_000),
            "mean": i.to_bytes(1) * 1_000_000,
        }
        for i, w in enumerate(windows)
    ]
    one, other = Latents(catalog, "ae"), Latents(catalog, "ae")
    assert len(rows) > 2 and one.add(rows) == len(rows) and other.add(rows[1:]) == 0
    (address,) = catalog.table("latents").file_uris()
    keys = windows_of(address, ("geometry",))
    assert keys["geometry"].to_list() == [w["geometry"] for w in windows] and keys["row"].to_list()[:3] == [
        0,
        1,
        0,
    ]  # two of 2 MB a group
    located = locate(plan, "ae", tmp_path / "latents.arrow")
    assert (located.found, located.missing) == (len(rows), 0)
    reader = LatentReader(located.index, 1 << 20)
    for i, window in enumerate(windows):
        place = reader.find(i)
        assert (
            place.file == address
            and bytes(reader.read(place, window["geometry"], window["clip_id"]).mean) == rows[i]["mean"]
        )


def test_forgetting(catalog, store):
    from catalogs.maintenance.forget import Forgetting, Request
    from catalogs.maintenance.validate import problems
    from catalogs.query.funnel import funnel

    clip = catalog.finished_clips().collect()["clip_id"].sort()[0]
    plan = Forgetting(catalog, Request(clips=(clip,)))
    assert (plan.plan.clips, plan.plan.sources) == (1, ["s3://bucket/videos/bikes.mp4"])
    assert plan.run() == 0
    assert funnel(catalog).clips == 5 and list(problems(catalog)) == []
    for version in range(1, catalog.table("clips").version() + 1):
        assert clip not in catalog.scan("clips", version).collect()["clip_id"].to_list()
    assert store.head_object(Bucket="bucket", Key="videos/bikes.mp4")["ContentLength"]


def test_damage_is_named(catalog, store):
    from catalogs.query.funnel import funnel
    from datakit.errors import CatalogError

    path = catalog.table("clips").file_uris()[0].removeprefix("s3://bucket/")
    body = store.get_object(Bucket="bucket", Key=path)["Body"].read()
    for harm, word in (
        (lambda: store.delete_object(Bucket="bucket", Key=path), "missing"),
        (lambda: store.put_object(Bucket="bucket", Key=path, Body=body[: len(body) // 2]), "torn"),
    ):
        harm()
        with pytest.raises(CatalogError, match=rf"{path} is {word}.*restore s3://bucket/catalog"):
            funnel(catalog)
        assert datakit("catalog", "query", ROOT, "SELECT * FROM clips").returncode == 2
    store.put_object(Bucket="bucket", Key=path, Body=body)
    funnel(catalog)


def test_a_store_that_does_not_answer_is_one_line(catalog, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    done = datakit("catalog", "funnel", ROOT)
    assert (
        done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "cannot read the catalog" in done.stderr
    )
