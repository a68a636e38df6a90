"""The browse app: what it serves and to whom, and a real browser on a really ingested catalog."""

import io
import json
import math
import os
import shutil
import socket
import threading
import time
from contextlib import contextmanager
from fractions import Fraction
from urllib.parse import unquote

import anyio
import av
import cv2
import numpy as np
import polars as pl
import pytest
import uvicorn
from starlette.testclient import TestClient

from catalogs.browse import make_app
from catalogs.browse.media import Films, inside
from catalogs.query.snapshots import tags
from catalogs.records.marks import mark
from catalogs.tables.catalog import Catalog
from datakit import config
from datakit.errors import DatakitError
from pipelines.runs.ingest import ingest
from pipelines.settings import Settings
from support.drawn_videos import encode, shots, texture

BASE = "http://127.0.0.1:8642"
SAME = {"Sec-Fetch-Site": "same-origin"}


@pytest.fixture(scope="module")
def ingested(tmp_path_factory, footage, ray_address):
    folder = tmp_path_factory.mktemp("browse")
    source = folder / "src"
    source.mkdir()
    for path in footage.values():
        shutil.copy(path, source)
    encode(
        source / "hevc.mp4",
        shots([60], 120, 160),
        25,
        pix_fmt="yuv420p",
        codec="libx265",
        options={"x265-params": "log-level=none", "preset": "ultrafast"},
    )
    encode(
        source / "offset.mkv",
        [np.roll(f, 9, 1) for f in shots([50, 60], 120, 160)],
        25,
        pix_fmt="yuv420p",
        time_base=Fraction(1, 1000),
        pts=[5000 + 40 * i for i in range(110)],
    )
    cv2.imwrite(str(source / "still.png"), texture(90, 120))
    root = str(folder / "catalog")
    ingest([str(source)], root, config.load(Settings, None, ["ocr.enabled=false", "recipe=technical"]), ray_address)
    return Catalog(root)


@pytest.fixture
def catalog(ingested, tmp_path):
    """A copy to write to; the sources are where they were."""
    return Catalog(shutil.copytree(ingested.root, tmp_path / "catalog"))


def at(path) -> pl.Expr:
    """One address, as a value for `uris`."""
    kind = pl.List(pl.Struct({"uri": pl.String, "size": pl.Int64, "etag": pl.String}))
    return pl.lit([{"uri": str(path), "size": 1, "etag": ""}], kind)


@contextmanager
def client_of(app, **headers):
    with TestClient(app, base_url=BASE, headers={**SAME, **headers}, raise_server_exceptions=False) as client:
        client.token = {"X-Datakit-Token": app.state.token}
        yield client


@pytest.fixture
def app(catalog):
    return make_app(catalog)


@pytest.fixture
def client(app):
    with client_of(app) as client:
        yield client


def clips_of(client, where=None) -> list[dict]:
    answer = client.get("/api/clips", params={"where": where or "", "limit": 200})
    assert answer.status_code == 200, answer.text
    return answer.json()["clips"]


def test_videos_are_served_in_ranges(client, footage):
    data = footage["bikes.mp4"].read_bytes()
    video = clips_of(client, "uri LIKE '%bikes.mp4'")[0]["video_id"]
    url = f"/video/{video}"
    whole = client.get(url)
    assert (whole.status_code, whole.headers["accept-ranges"], whole.headers["content-type"]) == (
        200,
        "bytes",
        "video/mp4",
    )
    assert whole.content == data
    etag = whole.headers["etag"]

    def ranged(text, **more):
        return client.get(url, headers={"Range": text, **more})

    size = len(data)
    parts = [
        ("bytes=0-99", 0, 100),
        ("bytes=1000-", 1000, size),
        ("bytes=-77", size - 77, size),
        (f"bytes=5-{10**12}", 5, size),
    ]
    for text, start, end in parts:
        answer = ranged(text)
        assert answer.status_code == 206 and answer.content == data[start:end], text
        assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{size}"
    beyond = ranged(f"bytes={len(data)}-")
    assert beyond.status_code == 416 and beyond.headers["content-range"] == f"bytes */{len(data)}"
    assert ranged("bytes=0-9", **{"If-Range": etag}).status_code == 206
    assert ranged("bytes=0-9", **{"If-Range": whole.headers["last-modified"]}).status_code == 206
    assert ranged("bytes=0-9", **{"If-Range": '"other"'}).content == data
    assert ranged("bytes=9-0").status_code == 200 and ranged("lines=0-9").status_code == 200
    head = client.head(url)
    assert head.status_code == 200 and head.headers["content-length"] == str(len(data)) and head.content == b""
    assert client.get(url, headers={"If-None-Match": etag}).status_code == 304


def test_videos_in_object_stores_are_passed_on(catalog, footage):
    import fsspec

    data = footage["bikes.mp4"].read_bytes()
    fsspec.filesystem("memory").pipe("/films/bikes.mp4", data)
    is_bikes = pl.col("uris").list.first().struct.field("uri").str.ends_with("bikes.mp4")
    catalog.replace(
        "videos",
        catalog.scan("videos")
        .with_columns(pl.when(is_bikes).then(at("memory://films/bikes.mp4")).otherwise("uris").alias("uris"))
        .collect(),
    )
    with client_of(make_app(catalog)) as client:
        clip = clips_of(client, "uri LIKE 'memory%'")[0]
        answer = client.get(f"/video/{clip['video_id']}", headers={"Range": "bytes=500-1499"})
        assert answer.status_code == 206 and answer.content == data[500:1500]
        assert client.get(f"/thumb/{clip['clip_id']}.jpg").status_code == 200


def test_spans_are_told_in_the_time_of_players(client, catalog):
    rows = {r["clip_id"]: r for r in catalog.clips().collect().to_dicts()}
    for clip in clips_of(client, "uri LIKE '%bikes.mp4' OR uri LIKE '%offset.mkv'"):
        media, row = client.get(f"/api/clip/{clip['clip_id']}").json()["media"], rows[clip["clip_id"]]
        assert media["src"] == f"/video/{row['video_id']}" and media["kind"] == "video"
        base = Fraction(
            row["time_base"]
        )  # of both films no stream begins before 0, and players do not move what begins late
        assert (media["start"], media["end"]) == pytest.approx(
            (float(row["start_pts"] * base), float(row["end_pts"] * base)), abs=2e-6
        )


def test_what_browsers_cannot_play_is_transcoded_and_pictures_are_shown(client, catalog):
    (hevc,) = clips_of(client, "codec = 'hevc'")
    media = client.get(f"/api/clip/{hevc['clip_id']}").json()["media"]
    assert media["src"] == f"/play/{hevc['clip_id']}.mp4" and media["of"] == "transcode"
    film = client.get(media["src"])
    assert film.headers["content-type"] == "video/mp4"
    with av.open(io.BytesIO(film.content)) as container:
        assert (
            container.streams.video[0].codec_context.name == "h264" and sum(1 for _ in container.decode(video=0)) == 60
        )
    assert client.get(media["src"], headers={"Range": "bytes=0-9"}).status_code == 206
    (still,) = clips_of(client, "kind = 'image'")
    media = client.get(f"/api/clip/{still['clip_id']}").json()["media"]
    assert media["kind"] == "image" and client.get(media["src"]).headers["content-type"] == "image/png"


def test_transcodes_are_gone_at_the_end(app):
    with client_of(app) as client:
        (hevc,) = clips_of(client, "codec = 'hevc'")
        client.get(f"/play/{hevc['clip_id']}.mp4")
        folder = app.state.api.media._folder.name
        assert os.listdir(folder)
    assert not os.path.exists(folder)


def test_the_file_of_a_transcode_is_deleted_when_newer_ones_need_its_room(tmp_path):
    films = Films(20, lambda path: path.stat().st_size)
    for name in "ab":
        (tmp_path / name).write_bytes(b"0123456789")
        films[name] = tmp_path / name
    assert films["a"].exists(), "the one that was asked for last stays"
    (tmp_path / "c").write_bytes(b"0123456789")
    films["c"] = tmp_path / "c"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(films) == ["a", "c"]


def test_thumbnails_and_reasons_why_there_is_none(client, catalog, tmp_path):
    clip = clips_of(client, "uri LIKE '%bikes.mp4'")[0]
    answer = client.get(f"/thumb/{clip['clip_id']}.jpg")
    picture = cv2.imdecode(np.frombuffer(answer.content, np.uint8), cv2.IMREAD_COLOR)
    assert (
        max(picture.shape) == 320
        and "max-age" in answer.headers["cache-control"]
        and answer.headers["content-type"] == "image/jpeg"
    )
    assert client.get(f"/thumb/{clip['clip_id']}.jpg?side=99999").status_code == 404
    catalog.replace("videos", catalog.scan("videos").with_columns(uris=at(tmp_path / "gone.mp4")).collect())
    with client_of(make_app(catalog)) as other:
        answer = other.get(f"/thumb/{clip['clip_id']}.jpg")
        assert answer.status_code == 422 and "gone.mp4" in answer.json()["error"]
        assert other.get(f"/video/{clip['video_id']}").status_code == 422


def test_clips_with_files_play_those_when_the_source_is_gone(catalog, footage, tmp_path):
    name = "clip_files/ab/one.mp4"
    os.makedirs(os.path.join(catalog.root, "clip_files/ab"))
    shutil.copy(footage["bikes.mp4"], os.path.join(catalog.root, name))
    rows = catalog.scan("clips").collect()
    chosen = rows.filter(pl.col("path").is_null())["clip_id"][0]
    gone = catalog.scan("videos").with_columns(
        uris=at(tmp_path / "gone.mp4"), kind=pl.lit("video"), codec=pl.lit("h264")
    )
    catalog.replace("videos", gone.collect())
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(b"secret")
    os.symlink(secret, os.path.join(catalog.root, "clip_files/ab/link.mp4"))
    outside = [
        "../secret.mp4",
        "../../../../../etc/passwd",
        "/etc/passwd",
        "clip_files/ab/link.mp4",
        "file:///etc/passwd",
    ]
    for path, status in [(name, 200), *((path, 404) for path in outside)]:
        with_path = pl.when(pl.col("clip_id") == chosen).then(pl.lit(path)).otherwise("path")
        catalog.replace("clips", rows.with_columns(path=with_path))
        with client_of(make_app(catalog)) as client:
            answer = client.get(f"/file/{chosen}")
            assert answer.status_code == status, path
            if status == 200:
                media = client.get(f"/api/clip/{chosen}").json()["media"]
                assert media["src"] == f"/file/{chosen}" and answer.content == footage["bikes.mp4"].read_bytes()
                assert client.get(f"/thumb/{chosen}.jpg").status_code == 200
            else:
                assert b"secret" not in answer.content and b"root:" not in answer.content
                assert (
                    client.get(f"/thumb/{chosen}.jpg").status_code == 404
                    and client.get(f"/play/{chosen}.mp4").status_code == 404
                )
    with pytest.raises(DatakitError, match="outside"):
        inside(catalog, "a/../../b")


@pytest.mark.parametrize(
    "path",
    [
        "/video/../../etc/passwd",
        "/video/..%2f..%2fetc%2fpasswd",
        "/video/%2e%2e/%2e%2e/etc/passwd",
        "/video/etc/passwd",
        "/file/%2fetc%2fpasswd",
        "/static/../app.py",
        "/static/..%2fapp.py",
        "/static/%2e%2e%2fapp.py",
        "/static/index.html",
        "/static/nothing.js",
        "/thumb/..%2f..%2fx.jpg",
        f"/video/{'0' * 32}",
        f"/thumb/{'0' * 32}.jpg",
        f"/play/{'0' * 32}.mp4",
        f"/file/{'0' * 32}",
        f"/api/clip/{'0' * 32}",
        "/api/nothing",
    ],
)
def test_nothing_is_served_that_the_catalog_does_not_hold(app, path):
    async def ask() -> int:
        statuses = []
        scope = {
            "type": "http",
            "method": "GET",
            "path": unquote(path),
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"host", b"127.0.0.1:8642")],
            "http_version": "1.1",
            "scheme": "http",
            "server": ("127.0.0.1", 8642),
            "client": ("127.0.0.1", 1),
        }

        async def receive():
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message):
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        await app(scope, receive, send)
        return statuses[0]

    assert anyio.run(ask) == 404


def test_quarantined_videos_are_not_served(catalog):
    video = catalog.scan("videos").collect()["video_id"][0]
    catalog.replace(
        "videos",
        catalog.scan("videos")
        .with_columns(
            pl.when(pl.col("video_id") == video).then(pl.lit("quarantined")).otherwise("status").alias("status")
        )
        .collect(),
    )
    with client_of(make_app(catalog)) as client:
        assert client.get(f"/video/{video}").status_code == 404


DATA = [
    "/api/info",
    "/api/clips",
    "/api/sql?q=SELECT%201",
    "/api/export",
    "/video/x",
    "/thumb/x.jpg",
    "/file/x",
    "/play/x.mp4",
]


@pytest.mark.parametrize("path", DATA)
def test_other_sites_get_nothing(client, path):
    for headers in [
        {"Host": "evil.example:8642"},
        {"Host": "127.0.0.1:9999"},
        {"Host": "localhost"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:3000"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ]:
        answer = client.get(path, headers=headers)
        assert answer.status_code == 403 and not any(h.startswith("access-control") for h in answer.headers), headers
    for host in ["127.0.0.1:8642", "localhost:8642", "[::1]:8642"]:
        assert client.get(path, headers={"Host": host}).status_code != 403


def test_writing_takes_the_token_and_json_of_our_page(client, catalog):
    clip = clips_of(client)[0]["clip_id"]
    body = {"ids": [clip], "mark": "keep"}
    assert client.post("/api/marks", json=body).status_code == 403
    assert client.post("/api/marks", json=body, headers={"X-Datakit-Token": "x" * 43}).status_code == 403
    assert (
        client.post(
            "/api/marks", content=json.dumps(body), headers={**client.token, "Content-Type": "text/plain"}
        ).status_code
        == 415
    )
    for headers in [{"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Host": "evil.example"}]:
        assert client.post("/api/marks", json=body, headers={**client.token, **headers}).status_code == 403
    for path in ["/api/marks", "/api/tag", "/api/reload"]:
        assert client.get(path, headers=client.token).status_code in (404, 405)
    assert (
        client.put("/api/marks", json=body, headers=client.token).status_code == 405
        and client.options("/api/marks").status_code == 405
    )
    assert client.post("/", json=body).status_code == 403
    assert catalog.scan("marks").collect().is_empty()
    assert client.post("/api/marks", json=body, headers={**client.token, "Origin": BASE}).status_code == 200
    assert catalog.scan("marks").collect().height == 1


def test_the_page_locks_itself_up(client):
    page = client.get("/", headers={"Sec-Fetch-Site": "cross-site"})  # a link in a chat
    policy = page.headers["content-security-policy"]
    assert (
        page.status_code == 200
        and "default-src 'self'" in policy
        and "frame-ancestors 'none'" in policy
        and "unsafe" not in policy
    )
    assert page.headers["x-content-type-options"] == "nosniff" and page.headers["cache-control"] == "no-store"
    assert client.token["X-Datakit-Token"] in page.text and "{{" not in page.text
    assert (
        "http:" not in page.text
        and "https:" not in page.text
        and "onclick" not in page.text
        and "<script>" not in page.text
    )
    for path in ["/static/app.js", "/static/app.css", "/favicon.ico"]:
        assert client.get(path).headers["x-content-type-options"] == "nosniff"
    assert client.get("/static/app.js").headers["content-type"].startswith("text/javascript")


# ---- asking, marking, taking along --------------------------------------------------------------------------------


def test_wrong_conditions_and_queries_are_told(client):
    answer = client.get("/api/clips", params={"where": "motoin > 3"})
    assert answer.status_code == 400 and "did you mean motion" in answer.json()["error"]
    assert client.get("/api/clips", params={"sort": "moshun"}).status_code == 400
    assert client.get("/api/clips", params={"limit": "-1"}).status_code == 400
    answer = client.get("/api/sql", params={"q": "SELECT motoin FROM clips"})
    assert answer.status_code == 400 and "did you mean motion" in answer.json()["error"]


def test_sql_answers_over_the_tables_and_reads_no_files(client, tmp_path):
    found = client.get(
        "/api/sql", params={"q": "SELECT kind, count(*) AS n FROM videos GROUP BY kind ORDER BY n"}
    ).json()
    assert found == {"columns": ["kind", "n"], "rows": [["image", 1], ["video", 4]], "more": False}
    assert client.get("/api/sql", params={"q": "SELECT clip_id, phash, errors FROM clips"}).status_code == 200
    secret = tmp_path / "secret.csv"
    secret.write_text("a\nsecret\n")
    for text in [
        f"SELECT * FROM read_csv('{secret}')",
        f"SELECT * FROM \"READ_CSV\"('{secret}')",
        f"SELECT * FROM read_csv/**/('{secret}')",
        f"SELECT * FROM '{secret}'",
        f"SELECT * FROM (SELECT * FROM read_csv('{secret}')) x",
        f"COPY clips TO '{tmp_path}/x.csv'",
    ]:
        answer = client.get("/api/sql", params={"q": text})
        assert answer.status_code == 400 and "secret\n" not in answer.text, text
    assert client.get("/api/clips", params={"where": f"read_csv('{secret}')"}).status_code == 400


def test_marks_through_the_app(client, catalog):
    clips = clips_of(client, "status = 'kept'")
    ids = [c["clip_id"] for c in clips]

    def send(**body):
        return client.post("/api/marks", json=body, headers=client.token)

    done = send(ids=ids[:2], mark="reject").json()
    assert done["marked"] == 2 and {c["status"] for c in done["clips"]} == {"rejected"}
    assert send(ids=ids[:1], comment="<script>alert(1)</script>").json()["clips"][0]["mark"] == "reject"
    assert (
        client.get("/api/clips", params={"where": "mark = 'reject'", "limit": 0}).json()["statuses"]["rejected"][
            "clips"
        ]
        == 2
    )
    record = client.get(f"/api/clip/{ids[0]}").json()
    assert (
        record["clip"]["status"] == "rejected" and record["clip"]["reasons"] == ["mark"] and len(record["marks"]) == 2
    )
    assert record["marks"][0]["comment"] == "<script>alert(1)</script>" and record["marks"][0]["mark"] == "reject"
    assert client.get("/api/changes").json() == {}
    pending = len(clips_of(client, "status = 'rejected'"))
    assert send(where="status = 'rejected'", expected=pending + 1, mark="keep").status_code == 400
    assert send(where="status = 'rejected'", expected=pending, mark="keep").json()["marked"] == pending
    assert not clips_of(client, "status = 'rejected'")
    cleared = send(ids=ids[:1], mark=None).json()["clips"][0]
    assert cleared == {"clip_id": ids[0], "status": "kept", "mark": None, "comment": "<script>alert(1)</script>"}
    for wrong in [
        {"ids": ids, "mark": "maybe"},
        {"ids": ids},
        {"mark": "keep"},
        {"ids": "x", "mark": "keep"},
        {"ids": ["0" * 32], "mark": "keep"},
        {"ids": [3], "mark": "keep"},
        {"ids": ids, "comment": 5},
    ]:
        assert send(**wrong).status_code == 400, wrong
    assert (
        client.post(
            "/api/marks", content=b"{", headers={**client.token, "Content-Type": "application/json"}
        ).status_code
        == 400
    )
    columns = ["clip_id", "status", "mark", "comment"]
    now = {c["clip_id"]: (c["status"], c["mark"], c["comment"]) for c in clips_of(client)}
    assert now == {r[0]: r[1:] for r in catalog.clips(columns=columns).collect().iter_rows()}


def test_a_snapshot_is_shown_and_not_changed(catalog):
    before = catalog.versions()
    mark(catalog, [catalog.clips(columns=["clip_id"]).collect()["clip_id"][0]], "reject")
    with client_of(make_app(catalog.at(before), snapshot="before")) as client:
        info = client.get("/api/info").json()
        assert info["read_only"] and info["snapshot"] == "before" and not clips_of(client, "mark = 'reject'")
        ids = [c["clip_id"] for c in clips_of(client)]
        for path, body in [("/api/marks", {"ids": ids, "mark": "keep"}), ("/api/tag", {"name": "x"})]:
            answer = client.post(path, json=body, headers=client.token)
            assert answer.status_code == 400 and "snapshot" in answer.json()["error"]
    assert catalog.scan("marks").collect().height == 1


def test_other_peoples_changes_are_noticed(client, catalog):
    clip = clips_of(client)[0]
    mark(Catalog(catalog.root), [clip["clip_id"]], "reject", "from elsewhere")
    assert list(client.get("/api/changes").json()) == ["marks"]
    assert client.post("/api/reload", json={}, headers=client.token).status_code == 200
    assert (
        client.get("/api/changes").json() == {}
        and clips_of(client, "comment = 'from elsewhere'")[0]["clip_id"] == clip["clip_id"]
    )


def test_a_selection_is_downloaded(client, catalog):
    where, columns = "motion IS NOT NULL", ["clip_id", "motion", "reasons", "phash", "caption", "stage_versions"]
    wanted = catalog.clips(columns=columns).filter(pl.col("motion").is_not_null()).collect().sort("clip_id")

    def fetch(form):
        answer = client.get("/api/export", params={"format": form, "where": where, "columns": ",".join(columns)})
        assert answer.status_code == 200 and f'filename="clips.{form}"' in answer.headers["content-disposition"]
        return answer.content

    assert pl.read_parquet(io.BytesIO(fetch("parquet"))).sort("clip_id").equals(wanted)
    lines = sorted((json.loads(line) for line in fetch("jsonl").splitlines()), key=lambda r: r["clip_id"])
    assert [r["motion"] for r in lines] == pytest.approx(wanted["motion"].to_list())
    assert lines[0]["reasons"] == wanted["reasons"][0].to_list()
    table = pl.read_csv(io.BytesIO(fetch("csv"))).sort("clip_id")
    assert table["clip_id"].to_list() == wanted["clip_id"].to_list()
    assert [json.loads(t) for t in table["reasons"]] == wanted["reasons"].to_list()
    assert [json.loads(t) for t in table["stage_versions"]] == wanted["stage_versions"].to_list()
    assert table["phash"].to_list() == [v.hex() for v in wanted["phash"]]
    for wrong in [{"format": "xls"}, {"columns": "colour"}, {"where": "motoin > 1"}]:
        assert client.get("/api/export", params=wrong).status_code == 400


def test_a_selection_is_tagged(client, catalog):
    body = {"name": "good", "where": "motion > 0", "note": "why", "columns": ["clip_id", "motion"]}
    done = client.post("/api/tag", json=body, headers=client.token).json()
    assert done["clips"] == len(clips_of(client, "motion > 0"))
    row = tags(catalog).row(0, named=True)
    assert (row["name"], row["where"], row["note"], row["content_hash"]) == (
        "good",
        "motion > 0",
        "why",
        done["content_hash"],
    )
    assert client.post("/api/tag", json=body, headers=client.token).status_code == 400


def test_the_record_has_all_that_is_known(client, catalog):
    clip = clips_of(client, "uri LIKE '%bikes.mp4'")[1]
    record = client.get(f"/api/clip/{clip['clip_id']}").json()
    view = catalog.clips().filter(pl.col("clip_id") == clip["clip_id"]).collect().row(0, named=True)
    assert set(record["clip"]) >= set(view)
    for name, value in view.items():
        if isinstance(value, (int, str)) or value is None:
            assert record["clip"][name] == value, name
        if isinstance(value, float) and math.isfinite(value):
            assert record["clip"][name] == pytest.approx(value), name
    siblings = (
        catalog.clips().filter(pl.col("video_id") == view["video_id"]).sort("start_s").collect()["clip_id"].to_list()
    )
    assert [s["clip_id"] for s in record["siblings"]] == siblings and record["video"]["clip_count"] == len(siblings)
    assert record["decision"]["recipe"].startswith("technical@") and record["runs"][0]["pipeline"] == "ingest"


# ---- in a browser -------------------------------------------------------------------------------------------------


@contextmanager
def served(app, port_of):
    """The app on a real socket."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [port_of]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield
    server.should_exit = True
    thread.join(10)


def caption_all(catalog: Catalog, text: str) -> None:
    clips = catalog.clips(columns=["clip_id", "shard"]).collect()
    rows = [
        {
            "caption_id": f"c{i}",
            "clip_id": c,
            "shard": s,
            "style": "short",
            "model": "m",
            "text": f"{text} {i}",
            "flags": [],
        }
        for i, (c, s) in enumerate(clips.iter_rows())
    ]
    catalog.append("captions", rows)
    ids = pl.DataFrame({"clip_id": [r["clip_id"] for r in rows], "mine": [r["caption_id"] for r in rows]})
    catalog.replace(
        "decisions",
        catalog.scan("decisions").collect().join(ids, on="clip_id").with_columns(caption_id="mine").drop("mine"),
    )


def test_a_browser_filters_plays_and_marks(browser, catalog):
    caption_all(catalog, "<script>document.title='pwned'</script><img src=x onerror=alert(1)> bicycle")
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    where = "uri LIKE '%bikes.mp4'"
    wanted = catalog.clips().filter(pl.sql_expr(where)).sort("start_s").collect()
    troubles: list[str] = []
    with served(make_app(catalog, port=port), listening):
        page = browser.new_context(viewport={"width": 1400, "height": 900}).new_page()
        page.on("console", lambda m: troubles.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: troubles.append(str(e)))
        page.on("dialog", lambda d: troubles.append(f"dialog {d.message}"))
        address = f"http://127.0.0.1:{port}/"
        page.goto(address)
        page.wait_for_selector("body[data-ready]")
        everything = catalog.count()
        shows(page, "#count", str(everything))

        page.fill("#where", where)  # a condition
        shows(page, "#count", str(wanted.height))
        slider = page.locator("[data-range=duration] input.low[type=range]")
        slider.focus()
        for _ in range(60):  # a slider, by its keys
            page.keyboard.press("ArrowRight")
        shows(page, "#sql", "(end_s - start_s) >= ", part=True)
        stays(page, "#sql")  # on a busy machine there are looks between the keys
        least = float(page.inner_text("#sql").split(">= ")[1].split(" ")[0])
        longer = wanted.filter(pl.col("end_s") - pl.col("start_s") >= least)
        assert 0 < longer.height < wanted.height
        shows(page, "#count", str(longer.height))
        kept = longer.filter(pl.col("status") == "kept").height
        assert page.inner_text("[data-status=kept] b") == str(kept)
        shows(page, ".card .caption", "<script>document.title='pwned'</script>", part=True)  # as text
        page.reload()  # the address holds it all
        page.wait_for_selector("body[data-ready]")
        shows(page, "#count", str(longer.height))
        page.fill("#where", "motoin > 3")
        shows(page, "#where-error", "did you mean motion", part=True)
        page.fill("#where", where)
        page.wait_for_selector("#where-error", state="hidden")
        shows(page, "#count", str(longer.height))

        page.locator(".card").nth(1).click()  # a clip from the middle of a film
        row = longer.row(1, named=True)
        page.wait_for_selector("#panel video")
        assert row["start_s"] > 0 and page.locator(".card.current").get_attribute("data-id") == row["clip_id"]
        times, began = [], time.monotonic()
        while time.monotonic() - began < 2 * (row["end_s"] - row["start_s"]) and not looped(times):
            now, ready, error = page.evaluate(
                "() => { const v = document.querySelector('#panel video'); return [v.currentTime, v.readyState, "
                "v.error?.message] }"
            )
            assert error is None
            if ready >= 2:
                times.append(now)
            time.sleep(0.05)
        assert looped(times), times  # it plays, to the end, and again
        assert min(times) >= row["start_s"] - 1e-3 and max(times) <= row["end_s"] + 0.05
        assert row["clip_id"] in page.inner_text("#panel table") and "% of diagonal" in page.inner_text("#panel table")

        page.keyboard.press("r" if row["status"] == "kept" else "k")  # a mark
        turned = "rejected" if row["status"] == "kept" else "kept"
        shows(page, "#panel .status", turned)
        page.fill("#panel .comment input", "shaky & <b>dark</b>")
        page.click("#panel .comment button")
        shows(page, "#panel .history", "shaky & <b>dark</b>", part=True)
        page.keyboard.press("Escape")
        page.keyboard.press("Escape")
        page.wait_for_selector("#panel", state="hidden")
        page.reload()
        page.wait_for_selector("body[data-ready]")
        card = page.locator(f"[data-id='{row['clip_id']}']")
        card.wait_for()
        assert f"is-{turned}" in card.get_attribute("class") and "shaky & <b>dark</b>" in card.get_attribute("title")

        page.click("#clear")  # everything that matches, after a question
        page.fill("#where", "kind = 'image'")
        shows(page, "#count", "1")
        page.wait_for_selector("body:not(.asking)")
        page.click("#mark-all")
        page.click("dialog button.keep")
        page.click("dialog button.primary")
        shows(page, "[data-status=kept] b", "1")
        page.locator(".card").first.click()
        page.wait_for_selector("#panel img.still")
        page.keyboard.press("Escape")

        page.fill("#where", "codec = 'hevc'")  # what the browser cannot play
        shows(page, "#sql", "codec = 'hevc'")
        page.wait_for_selector("body:not(.asking)")
        page.locator(".card").first.click()
        page.wait_for_selector("#panel video")
        assert eventually(lambda: page.evaluate("() => document.querySelector('#panel video').currentTime") > 0.2)
        page.keyboard.press("Escape")

        page.fill("#where", "uri LIKE '%offset.mkv'")  # a film that begins at 5 s: red, then green
        shows(page, "#sql", "uri LIKE '%offset.mkv'")
        page.wait_for_selector("body:not(.asking)")
        for number, channel in enumerate([2, 1]):
            page.locator(".card").nth(number).click()
            page.wait_for_selector("#panel video")
            assert eventually(lambda: page.evaluate("() => document.querySelector('#panel video').readyState") >= 3)
            time.sleep(0.4)
            picture = cv2.imdecode(np.frombuffer(page.locator("#panel video").screenshot(), np.uint8), cv2.IMREAD_COLOR)
            assert picture.mean((0, 1)).argmax() == channel
            page.keyboard.press("Escape")

        page.click("#open-sql")
        page.fill("dialog textarea", "SELECT count(*) AS n FROM marks")
        page.click("dialog .primary")
        shows(page, "dialog tbody", "3")
        page.keyboard.press("Escape")
        page.fill("#where", "codec = 'hevc'")
        shows(page, "#count", "1")
        with page.expect_download() as download:
            page.click("#open-export")
            page.click("dialog .primary")
        assert pl.read_csv(download.value.path()).height == 1
        assert page.title() != "pwned"
        page.context.close()
    assert [t for t in troubles if "400 (Bad Request)" not in t] == []  # the wrong condition above
    known = (
        catalog.clips(columns=["clip_id", "mark", "comment", "status"])
        .filter(pl.col("clip_id") == row["clip_id"])
        .collect()
    )
    assert known.rows() == [
        (row["clip_id"], "reject" if turned == "rejected" else "keep", "shaky & <b>dark</b>", turned)
    ]


def eventually(holds, seconds: float = 10) -> bool:
    """Whether something comes true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.05)
    return False


def shows(page, selector: str, text: str, part: bool = False) -> None:
    """Wait for a text; the page's policy lets no test code run in it while waiting."""

    def there() -> bool:
        node = page.locator(selector).first
        found = node.inner_text() if node.count() else ""
        return text in found if part else text == found.strip()

    assert eventually(there), f"{selector} is {page.locator(selector).first.inner_text()!r}, not {text!r}"


def stays(page, selector: str, seconds: float = 1.0) -> None:
    """Wait until a text has not changed for so long."""
    seen = [(time.monotonic(), "")]

    def there() -> bool:
        now = page.locator(selector).first.inner_text()
        if now != seen[-1][1]:
            seen.append((time.monotonic(), now))
        return time.monotonic() - seen[-1][0] > seconds

    assert eventually(there), f"{selector} changes: {[text for _, text in seen]}"


def looped(times: list[float]) -> bool:
    """Whether time ran on and then went back to the start."""
    return any(b < a - 0.3 for a, b in zip(times, times[1:]))
