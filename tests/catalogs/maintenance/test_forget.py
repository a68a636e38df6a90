"""What is forgotten is in no version and comes back by no ingest; everything else stays, under the numbers it had."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from catalogs.maintenance.forget import Forgetting, Request
from catalogs.maintenance.validate import problems
from catalogs.query.funnel import funnel
from catalogs.query.selection import Selection
from catalogs.query.snapshots import restore, tag
from catalogs.records.marks import mark
from catalogs.records.runs import RunRecord
from catalogs.records.tombstones import Forgotten, spans
from catalogs.tables.catalog import Catalog
from catalogs.tables.object_store import Storage
from catalogs.tables.schema import TABLES
from datakit.errors import CatalogError
from pipelines.catalog_sync.score_writer import write_columns
from support.catalog_rows import clip, video

pytestmark = pytest.mark.slow

IDS = [f"{n:x}" * 32 for n in range(4)]
GONE = IDS[1]
CLIPS = 5
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def ids_of(video_id: str) -> list[str]:
    return [clip(video_id, n * 100)["clip_id"] for n in range(CLIPS)]


def build(root: Path) -> Catalog:
    """Four videos of five clips; scored, captioned, decided, marked, with losses, embeddings, a tag and a training
    run."""
    catalog = Catalog.create(root)
    for v in IDS:
        rows = [clip(v, n * 100, motion=float(n), path=f"clip_files/{v}/{n}.mp4") for n in range(CLIPS)]
        for row in rows:
            Path(catalog.root, row["path"]).parent.mkdir(parents=True, exist_ok=True)
            Path(catalog.root, row["path"]).write_bytes(b"clip")
        catalog.append("clips", rows)
        catalog.append("videos", [video(v, clip_count=CLIPS)])
    everything = [c for v in IDS for c in ids_of(v)]
    shard = {c: v[0] for v in IDS for c in ids_of(v)}
    catalog.append(
        "runs",
        [
            {
                "run_id": "ingested",
                "pipeline": "ingest",
                "status": "finished",
                "started_at": NOW,
                "counts": "{}",
                "config": json.dumps({"sources": [f"/v/{GONE}.mp4", "/v"]}),
            }
        ],
    )
    catalog.append(
        "captions",
        [
            {
                "caption_id": f"caption {c}",
                "clip_id": c,
                "shard": shard[c],
                "style": "dense",
                "model": "m",
                "text": f"secret {c}",
                "flags": [],
                "created_at": NOW,
            }
            for c in everything
        ],
    )
    catalog.append(
        "embeddings",
        [
            {"clip_id": c, "video_id": v, "shard": v[0], "model": "m", "vector": [0.6, 0.8], "run_id": "r"}
            for v in IDS
            for c in ids_of(v)
        ],
    )
    catalog.append(
        "losses", [{"clip_id": c, "shard": shard[c], "run_id": "t", "excess": 1.0, "count": 2} for c in everything]
    )
    for recipe in ("one", "two", "three"):
        catalog.replace(
            "decisions",
            pl.DataFrame(
                [
                    {
                        "clip_id": c,
                        "shard": shard[c],
                        "status": "kept",
                        "reasons": [],
                        "recipe": recipe,
                        "level": 1,
                        "caption_id": f"caption {c}",
                    }
                    for c in everything
                ]
            ),
        )
    mark(catalog, everything, "keep")
    tag(catalog, "before")
    for v in IDS:  # rewrites files of clips
        scores = [{"clip_id": c, "run_id": "r", "shard": v[0], "errors": [], "blur": 1.0} for c in ids_of(v)]
        write_columns(catalog, scores, {"quality": "f"})
    run = RunRecord(catalog, "train", {}, selection=Selection(catalog)).begin()
    run.checkpoints([("/checkpoints/7", 7)])
    run.end("finished", {})
    innocent = Selection(catalog, where=f"video_id = '{IDS[0]}'")
    other = RunRecord(catalog, "train", {}, selection=innocent).begin()
    other.checkpoints([("/checkpoints/innocent", 1)])
    other.end("finished", {})
    tag(catalog, "innocent", selection=innocent)
    tag(catalog, "chosen", selection=Selection(catalog, where="motion > 1"))
    return catalog


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Catalog:
    """To be copied."""
    return build(tmp_path_factory.mktemp("built") / "a catalog äß")


@pytest.fixture
def catalog(built, tmp_path) -> Catalog:
    return copied(built, tmp_path / "a catalog äß")


def versions_of(catalog: Catalog, name: str) -> dict[int, pl.DataFrame]:
    """Every version of a table, in a fixed order."""
    newest = DeltaTable(f"{catalog.root}/{name}").version()
    found = {}
    for version in range(newest + 1):
        rows = pl.scan_delta(catalog.table(name, version)).collect()
        found[version] = rows.sort(
            [c for c in ("clip_id", "mark_id", "video_id", "run_id", "name") if c in rows.columns]
        )
    return found


def everything(catalog: Catalog) -> dict[str, dict[int, pl.DataFrame]]:
    return {name: versions_of(catalog, name) for name in TABLES if name not in ("forgotten", "runs", "tags")}


def without(rows: pl.DataFrame, name: str, gone: set[str], videos: set[str], less: dict[str, int]) -> pl.DataFrame:
    """A version as it has to be afterwards."""
    if "clip_id" in rows.columns:
        rows = rows.filter(~pl.col("clip_id").is_in(list(gone)))
    if name == "videos":
        rows = rows.filter(~pl.col("video_id").is_in(list(videos)))
        for v, count in less.items():
            fewer = pl.when(pl.col("video_id") == v).then(pl.col("clip_count") - count).otherwise("clip_count")
            rows = rows.with_columns(fewer.alias("clip_count"))
    return rows


def assert_forgotten(
    catalog, before, gone: set[str], videos: set[str] = frozenset(), less: dict[str, int] = {}
) -> None:
    after = everything(catalog)
    for name, versions in before.items():
        assert set(after[name]) == set(versions), name
        for version, rows in versions.items():
            expected = without(rows, name, gone, videos, less)
            assert after[name][version].equals(expected, null_equal=True), (name, version)
            assert DeltaTable(f"{catalog.root}/{name}", version=version).version() == version
    assert traces(catalog, gone, videos) == []


def traces(catalog: Catalog, gone: set[str], videos: set[str]) -> list[str]:
    """Files that still say something of what is forgotten; `forgotten` says which video it was."""
    found = []
    words = [*gone, *(f"/v/{v}.mp4" for v in videos), *(f"secret {c}" for c in gone)]
    for path in Path(catalog.root).rglob("*"):
        if path.suffix == ".parquet":
            rows = pq.read_table(path, partitioning=None).to_pylist()
            text = json.dumps(rows, default=str)
        elif path.is_file():
            text = path.read_bytes().decode(errors="replace")
        else:
            continue
        found += [str(path) for word in words if word in text]
    return found


def forget(catalog: Catalog, **request) -> Forgetting:
    forgetting = Forgetting(catalog, Request(**request))
    assert forgetting.run("asked to") == 0
    return forgetting


def test_a_source_leaves_every_version(catalog):
    before = everything(catalog)
    innocent = Selection(catalog, "innocent", where=f"video_id = '{IDS[0]}'").content_hash
    plan = forget(catalog, sources=(f"/v/{GONE}.mp4",)).plan
    assert (plan.videos, plan.clips, plan.captions, plan.sources) == ([GONE], 5, 5, [f"/v/{GONE}.mp4"])
    assert plan.hours == pytest.approx(10 / 3600)
    assert plan.versions == {
        "decisions": 3,
        "captions": 1,
        "embeddings": 1,
        "marks": 1,
        "losses": 1,
        "clips": 7,
        "videos": 3,
        "runs": 7,
    }
    assert plan.checkpoints == ["/checkpoints/7"]
    assert sorted(name.split()[0] for name in plan.selections) == ["run", "tag"] and plan.selections["tag chosen"] == 3
    assert_forgotten(catalog, before, set(ids_of(GONE)), {GONE})
    assert list(problems(catalog, sources=False)) == []
    assert Selection(catalog, "innocent", where=f"video_id = '{IDS[0]}'").content_hash == innocent
    rows = catalog.scan("forgotten").collect().to_dicts()
    assert [(r["video_id"], r["stream"], r["seen_by"], r["reason"]) for r in rows] == [
        (GONE, None, ["/checkpoints/7"], "asked to")
    ]
    config = catalog.scan("runs").filter(pl.col("run_id") == "ingested").collect()["config"][0]
    assert json.loads(config)["sources"] == ["(forgotten)", "/v"]
    assert {p.parent.name for p in Path(catalog.root, "clip_files").rglob("*.mp4")} == {v for v in IDS if v != GONE}


def test_clips_leave_and_the_accounts_of_every_version_add_up(catalog):
    before = everything(catalog)
    gone = {ids_of(GONE)[2], ids_of(GONE)[4], ids_of(IDS[3])[0]}
    forget(catalog, clips=tuple(gone))
    assert_forgotten(catalog, before, gone, less={GONE: 2, IDS[3]: 1})
    for version in range(1, 5):
        assert funnel(catalog.at({**catalog.versions(), "videos": version})).clips == sum([5, 3, 5, 4][:version])
    restore(catalog, "before")
    assert (funnel(catalog).clips, funnel(catalog).kept) == (17, 17)
    assert (
        not Path(catalog.root, "clip_files", GONE, "2.mp4").exists()
        and Path(catalog.root, "clip_files", GONE, "3.mp4").exists()
    )


def test_a_condition_and_a_second_time(catalog):
    before = everything(catalog)
    forget(catalog, where=f"motion = 4 and video_id <> '{IDS[0]}'")
    forget(catalog, sources=(GONE,))
    assert_forgotten(
        catalog, before, {ids_of(v)[4] for v in IDS[1:]} | set(ids_of(GONE)), {GONE}, {IDS[2]: 1, IDS[3]: 1}
    )
    assert Forgetting(catalog, Request()).is_empty and Forgetting(catalog, Request(sources=(GONE,))).is_empty


def test_all_rows_of_a_file_may_go(catalog):
    before = everything(catalog)
    forget(catalog, clips=tuple(c for v in IDS for c in ids_of(v)))
    assert_forgotten(catalog, before, {c for v in IDS for c in ids_of(v)}, less=dict.fromkeys(IDS, 5))
    assert (funnel(catalog).clips, funnel(catalog).videos_ok) == (0, 4) and catalog.scan("clips").collect().is_empty()
    catalog.append("clips", [clip(IDS[0], 9000)])
    assert catalog.scan("clips").collect().height == 1


def test_clips_of_another_division_that_show_the_same_go_too(catalog):
    other = clip(GONE, 150, run_id="older")
    catalog.append("clips", [other])
    forget(catalog, clips=(ids_of(GONE)[1],))
    assert other["clip_id"] not in catalog.scan("clips").collect()["clip_id"].to_list()
    assert catalog.scan("videos").filter(pl.col("video_id") == GONE).collect()["clip_count"].to_list() == [4]


def test_checkpoints_of_the_log_are_made_anew(catalog):
    for _ in range(3):
        catalog.table("clips").create_checkpoint()
        mark(catalog, [ids_of(GONE)[0]], "reject")
    catalog.table("marks").create_checkpoint()
    before = everything(catalog)
    forget(catalog, sources=(GONE,))
    assert_forgotten(catalog, before, set(ids_of(GONE)), {GONE})
    assert len(list(Path(catalog.root, "marks/_delta_log").glob("*.checkpoint.parquet"))) == 1


def test_statistics_stay_true(catalog):
    forget(catalog, sources=(GONE,))
    for name in ("clips", "decisions", "captions"):
        table = DeltaTable(f"{catalog.root}/{name}")
        adds = pl.DataFrame(table.get_add_actions(flatten=True))
        assert adds["num_records"].sum() == 15
        for row in adds.iter_rows(named=True):
            rows = pl.read_parquet(f"{catalog.root}/{name}/{row['path']}", hive_partitioning=False)
            assert (
                rows.height == row["num_records"]
                and os.path.getsize(f"{catalog.root}/{name}/{row['path']}") == row["size_bytes"]
            )
            if rows.height and name == "decisions":
                assert (row["min.clip_id"], row["max.clip_id"]) == (rows["clip_id"].min(), rows["clip_id"].max())


def test_what_is_not_there_and_a_past_that_is_unknown(catalog):
    with pytest.raises(CatalogError, match="no version of the catalog has clip abc"):
        Forgetting(catalog, Request(clips=("abc",)))
    with pytest.raises(CatalogError, match="no version of the catalog has a video nowhere.mp4"):
        Forgetting(catalog, Request(sources=("nowhere.mp4",)))
    for _ in range(2):
        catalog.table("marks").create_checkpoint()
    Path(catalog.root, "marks/_delta_log", f"{0:020d}.json").unlink()
    before = sorted(p for p in Path(catalog.root).rglob("*"))
    with pytest.raises(CatalogError, match="marks/_delta_log/0+.json is missing: .* nothing was"):
        Forgetting(catalog, Request(sources=(GONE,)))
    assert sorted(p for p in Path(catalog.root).rglob("*")) == before


def test_files_outside_the_catalog_are_never_deleted(catalog, tmp_path):
    outside = tmp_path / "outside.mp4"
    outside.write_bytes(b"x")
    (Path(catalog.root) / "clip_files" / "link").symlink_to(tmp_path)
    bad = [f"clip_files/../../{outside.name}", str(outside), f"../{outside.name}", f"clip_files/link/{outside.name}"]
    v = "f" * 32
    catalog.append("clips", [clip(v, n * 100, path=path) for n, path in enumerate(bad)])
    catalog.append("videos", [video(v, clip_count=len(bad))])
    forget(catalog, sources=(v,))
    assert outside.exists()


class Killed(BaseException):
    pass


def killing(monkeypatch, after: int):
    """Storage that dies before its change number `after`."""
    left = [after]
    for name in ("replace", "delete"):

        def change(self, *arguments, original=getattr(Storage, name)):
            if not left[0]:
                raise Killed
            left[0] -= 1
            return original(self, *arguments)

        monkeypatch.setattr(Storage, name, change)
    return left


def test_a_kill_at_any_point_leaves_every_version_readable_and_the_same_command_completes(
    catalog, tmp_path, monkeypatch
):
    catalog.table("clips").create_checkpoint()
    before = everything(catalog)
    gone = {ids_of(IDS[3])[0], *ids_of(GONE)}
    total = count_changes(copied(catalog, tmp_path / "count"), monkeypatch)
    assert total > 50  # all of them were tried once: too slow for every day
    random.seed(7)
    for n, after in enumerate([0, *sorted(random.sample(range(1, total), 6)), total - 1]):
        kept = copied(catalog, tmp_path / f"killed {n}")
        with monkeypatch.context() as patched:
            killing(patched, after)
            with pytest.raises(Killed):
                Forgetting(kept, Request(sources=(GONE,), clips=(ids_of(IDS[3])[0],))).run()
        for name, versions in everything(kept).items():
            for version, rows in versions.items():
                assert_between(rows, name, before[name][version], gone)
        for version in range(1, 5):
            funnel(kept.at({**kept.versions(), "videos": version}))
        Forgetting(kept, Request(sources=(GONE,) if n % 2 else (), clips=(ids_of(IDS[3])[0],) if n % 2 else ())).run()
        assert_forgotten(kept, before, gone, {GONE}, {IDS[3]: 1})


def copied(catalog: Catalog, root: Path) -> Catalog:
    subprocess.run(["cp", "-r", catalog.root, str(root)], check=True)
    return Catalog(root)


def count_changes(catalog: Catalog, monkeypatch) -> int:
    with monkeypatch.context() as patched:
        left = killing(patched, 10**6)
        Forgetting(catalog, Request(sources=(GONE,), clips=(ids_of(IDS[3])[0],))).run()
    return 10**6 - left[0]


def assert_between(rows: pl.DataFrame, name: str, before: pl.DataFrame, gone: set[str]) -> None:
    """No row that stays is lost or doubled."""
    key = "mark_id" if name == "marks" else "clip_id" if "clip_id" in rows.columns else "video_id"
    found, expected = rows[key].to_list(), before[key].to_list()
    assert len(found) == len(set(found)), name
    clips = dict(zip(before[key], before["clip_id" if "clip_id" in before.columns else key]))
    must_stay = {k for k in expected if clips[k] not in gone and k != GONE}
    assert must_stay <= set(found) <= set(expected), name


def _forget_in_process(root: str) -> None:
    Forgetting(Catalog(root), Request(sources=(GONE,))).run()


def test_sigkill(catalog, tmp_path):
    before = everything(catalog)
    context = multiprocessing.get_context("spawn")
    random.seed(3)
    for _ in range(3):
        process = context.Process(target=_forget_in_process, args=(catalog.root,))
        process.start()
        runs = catalog.scan("runs").collect().height
        deadline = time.monotonic() + 30
        while process.is_alive() and catalog.scan("runs").collect().height == runs and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.25))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        for name, versions in everything(catalog).items():
            for version, rows in versions.items():
                assert_between(rows, name, before[name][version], set(ids_of(GONE)))
    Forgetting(catalog, Request()).run()
    assert_forgotten(catalog, before, set(ids_of(GONE)), {GONE})


def test_a_writer_that_commits_in_between_loses_nothing_and_brings_nothing_back(catalog):
    """It read before, and commits after the files that it read were replaced."""
    keep = ids_of(GONE)[0]
    forget(catalog, clips=tuple(ids_of(GONE)[1:3]))
    log = Path(catalog.root, "clips/_delta_log")
    newest = json.loads(
        [line for line in sorted(log.glob("*.json"))[-1].read_text().splitlines() if '"add"' in line][0]
    )["add"]
    # what such a writer leaves behind: its entry removes a file by the name that it had before
    state = {p: None for p in catalog.table("clips").file_uris() if f"shard={GONE[0]}" in p}
    (path,) = state
    original = path.rsplit("/", 1)[1].replace(path.rsplit("-forgot-", 1)[1].split(".")[0], "").replace("-forgot-", "")
    added = clip(GONE, 100)
    now = pl.read_parquet(path, hive_partitioning=False)
    rewritten = pl.concat(
        [
            now,
            now.head(1).with_columns(
                clip_id=pl.lit(added["clip_id"]), start_pts=pl.lit(100, pl.Int64), end_pts=pl.lit(200, pl.Int64)
            ),
        ]
    )
    rewritten.write_parquet(f"{catalog.root}/clips/shard={GONE[0]}/late.snappy.parquet")
    size = os.path.getsize(f"{catalog.root}/clips/shard={GONE[0]}/late.snappy.parquet")
    entry = [
        {"commitInfo": {"timestamp": 1, "operation": "MERGE"}},
        {
            "remove": {
                "path": f"shard={GONE[0]}/{original}",
                "dataChange": True,
                "deletionTimestamp": 1,
                "partitionValues": {"shard": GONE[0]},
                "size": 1,
            }
        },
        {
            "add": {
                **newest,
                "path": f"shard={GONE[0]}/late.snappy.parquet",
                "partitionValues": {"shard": GONE[0]},
                "size": size,
                "stats": None,
            }
        },
    ]
    number = DeltaTable(f"{catalog.root}/clips").version() + 1
    (log / f"{number:020d}.json").write_text("\n".join(json.dumps(a) for a in entry))
    assert catalog.scan("clips").filter(pl.col("clip_id") == keep).collect().height == 2  # doubled, for now
    assert any("rows of clips that were forgotten are there" in line for line in problems(catalog, sources=False))
    Forgetting(catalog, Request()).run()
    found = catalog.scan("clips").filter(pl.col("video_id") == GONE).collect()["clip_id"].to_list()
    assert sorted(found) == sorted(set(ids_of(GONE)) - set(ids_of(GONE)[1:3]))


def test_what_a_span_covers():
    forgotten = Forgotten(spans(pl.DataFrame({"video_id": ["a"], "stream": [0], "start_pts": [100], "end_pts": [200]})))
    rows = [
        {"video_id": v, "stream": s, "start_pts": a, "end_pts": b}
        for v, s, a, b in [
            ("a", 0, 0, 100),
            ("a", 0, 0, 101),
            ("a", 0, 199, 300),
            ("a", 0, 200, 300),
            ("a", 1, 100, 200),
            ("b", 0, 100, 200),
            ("a", 0, 120, 130),
        ]
    ]
    assert forgotten.covers(pl.DataFrame(rows)).to_list() == [False, True, True, False, False, False, True]
    assert len(forgotten.without([r for r in rows if r["video_id"] == "a"])) == 3
    whole = Forgotten(spans(pl.DataFrame({"video_id": ["b"]})))
    assert whole.covers(pl.DataFrame(rows)).sum() == 1 and whole.videos == {"b"}


def datakit(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "datakit", "catalog", "forget", *arguments]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_the_command(catalog):
    before = everything(catalog)
    refused = datakit(catalog.root, "--source", GONE)
    assert (
        refused.returncode == 2 and "--yes" in refused.stderr and "to be forgotten: 1 videos, 5 clips" in refused.stdout
    )
    assert "tag chosen: its selection loses 3 clips" in refused.stdout and "/checkpoints/7" in refused.stdout
    dry = datakit(catalog.root, "--source", GONE, "--dry-run", "--json")
    assert json.loads(dry.stdout)["clips"] == 5 and everything(catalog)["clips"].keys() == before["clips"].keys()
    done = datakit(catalog.root, "--source", GONE, "--reason", "a person asked", "--yes")
    assert done.returncode == 0 and f"not touched: /v/{GONE}.mp4" in done.stdout, done.stderr
    assert_forgotten(catalog, before, set(ids_of(GONE)), {GONE})
    assert datakit(catalog.root).stdout.splitlines()[-1] == "nothing to forget"


def test_an_ingest_brings_nothing_back(footage, tmp_path, ray_address):
    from pipelines.runs.ingest import ingest
    from pipelines.settings import Settings

    settings = Settings.model_validate({"ocr": {"enabled": False}, "recipe": "technical"})
    root, bikes, bunny = str(tmp_path / "catalog"), str(footage["bikes.mp4"]), str(footage["bigbuckbunny.mp4"])
    first = ingest([bikes, bunny], root, settings, ray_address)
    catalog = Catalog(root)
    rows = catalog.finished_clips().collect().sort("start_pts")
    of_bikes = rows.filter(
        pl.col("video_id")
        == catalog.scan("videos")
        .filter(pl.col("codec") == "h264")
        .collect()
        .filter(pl.col("uris").list.first().struct.field("uri").str.contains("bikes"))["video_id"][0]
    )
    gone = of_bikes["clip_id"][1]
    forget(catalog, clips=(gone,), sources=(bunny,))
    shorter = Settings.model_validate({**settings.model_dump(), "shots": {"min_s": 1.0, "max_s": 4.0}})
    again = ingest([bikes, bunny], root, shorter, ray_address)
    assert (again.counts["forgotten"], again.counts["ok"]) == (1, 1) and again.funnel.videos == 1
    left = catalog.finished_clips().collect()
    span = of_bikes.filter(pl.col("clip_id") == gone).row(0, named=True)
    assert left.filter((pl.col("start_pts") < span["end_pts"]) & (pl.col("end_pts") > span["start_pts"])).is_empty()
    assert left.height and first.funnel.videos == 2 and list(problems(catalog)) == []
    assert Path(bunny).exists()
