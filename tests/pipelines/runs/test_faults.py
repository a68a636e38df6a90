"""What crashes, hangs or eats memory costs its own video or clip, and nothing else; all is accounted for."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import ray

from catalogs.maintenance.validate import problems
from catalogs.tables.catalog import Catalog
from datakit import config
from datakit.errors import CatalogError, ConfigError
from pipelines.executor.actor_pool import NODE_ATTEMPTS, ActorPool
from pipelines.runs import clip_files
from pipelines.runs import ingest as ingest_run
from pipelines.runs.ingest import ingest
from pipelines.settings import Settings
from pipelines.stages.registry import STAGES
from support.drawn_videos import encode, shots
from support.faulty_stages import STAGE_CODE, FaultyStage, WrongStage

pytestmark = pytest.mark.slow

QUICK = ("recipe=technical", "runner.stall_s=6", "runner.memory_gb=2")
KINDS = {"segv": "crash", "loop": "timeout", "memory": "out_of_memory", "raise": "stage"}


def settings(*sets: str) -> Settings:
    return config.load(Settings, None, list(sets))


def plant(monkeypatch, module, target: str) -> None:
    """Videos go through the tool `target` instead."""
    made = module.make_flow
    monkeypatch.setattr(
        module, "make_flow", lambda session, tool, *rest: made(session, replace(tool, target=target), *rest)
    )


def videos_named(folder, names) -> None:
    """Small videos of three shots each, of different content."""
    folder.mkdir()
    for i, name in enumerate(names):
        frames = [np.roll(f, j + 9 * i, 1) for j, f in enumerate(shots([50 + i, 60, 55], 240, 320))]
        encode(folder / f"{name}.mp4", frames, 25, pix_fmt="yuv420p", options={"crf": "20", "preset": "ultrafast"})


def by_name(catalog: Catalog) -> dict[str, dict]:
    rows = catalog.scan("videos").collect().to_dicts()
    return {row["uris"][0]["uri"].rsplit("/", 1)[1].split(".")[0]: row for row in rows}


def test_faults_in_the_decoder(tmp_path, ray_address, monkeypatch, attempts):
    videos_named(tmp_path / "in", ["a", *KINDS, "z"])
    plant(monkeypatch, ingest_run, "support.faulty_stages:faulty_decoder")
    report = ingest([str(tmp_path / "in")], str(tmp_path / "c"), settings("ocr.enabled=false", *QUICK), ray_address)
    catalog = Catalog(str(tmp_path / "c"))
    rows = by_name(catalog)
    assert {name: rows[name]["error_kind"] for name in KINDS} == KINDS
    assert all(rows[name]["error"] and rows[name]["status"] == "quarantined" for name in KINDS)
    assert "SIGSEGV" in rows["segv"]["error"] and "2 attempts" in rows["segv"]["error"]
    assert [(rows[n]["status"], rows[n]["clip_count"]) for n in "az"] == [("ok", 3)] * 2
    assert (report.funnel.videos, report.funnel.videos_quarantined, report.funnel.clips) == (6, 4, 6)
    assert attempts() == {"a.mp4": 1, "z.mp4": 1, "segv.mp4": 2, "loop.mp4": 2, "memory.mp4": 2, "raise.mp4": 1}
    assert catalog.scan("clips").collect().height == 6 and not list(problems(catalog))


def test_faults_in_an_actor(tmp_path, ray_address, monkeypatch, attempts):
    folder = tmp_path / "in"
    folder.mkdir()
    levels = {"segv": 200, "loop": 160, "memory": 120, "raise": 80}
    still = shots([50], 240, 320)
    for name, level in levels.items():
        red = np.zeros((240, 320, 3), np.uint8)
        red[..., 0] = level
        encode(folder / f"{name}.mp4", [np.roll(f, level, 1) for f in still] + [red] * 50, 25, pix_fmt="yuv420p")
    videos_named(tmp_path / "more", ["a"])
    monkeypatch.setitem(STAGES, "ocr", FaultyStage)
    report = ingest([str(folder), str(tmp_path / "more")], str(tmp_path / "c"), settings(*QUICK), ray_address)
    catalog = Catalog(str(tmp_path / "c"))
    clips = catalog.clips().sort("uri", "start_frame").collect()
    failed = clips.filter(pl.col("status") == "quarantined")
    found = {row["uri"].rsplit("/", 1)[1].split(".")[0]: row["errors"] for row in failed.iter_rows(named=True)}
    assert {name: [(e["stage"], e["kind"]) for e in errors] for name, errors in found.items()} == {
        name: [("ocr", kind)] for name, kind in KINDS.items()
    }
    assert failed.height == 4 and failed["ocr_area"].null_count() == 4 and failed["motion"].null_count() == 0
    others = clips.filter(pl.col("status") != "quarantined")
    assert others.height == 7 and others["ocr_area"].to_list() == [0.25] * 7  # the neighbours, same batch or not
    assert (report.funnel.clips, report.funnel.quarantined, report.funnel.clip_errors) == (11, 4, {"ocr": 4})
    assert all(count <= 4 for count in attempts().values()), attempts()  # in batches, then alone
    assert not list(problems(catalog))

    monkeypatch.undo()
    again = ingest(
        [str(folder), str(tmp_path / "more")], str(tmp_path / "c"), settings(*QUICK), ray_address, retry_failed=True
    )
    assert again.funnel.quarantined == 0 and catalog.clips().collect()["ocr_area"].null_count() == 0


def test_a_stage_that_loses_rows_is_found_out(tmp_path, ray_address, monkeypatch):
    videos_named(tmp_path / "in", ["a"])
    monkeypatch.setitem(STAGES, "ocr", WrongStage)
    report = ingest([str(tmp_path / "in")], str(tmp_path / "c"), settings(*QUICK), ray_address)
    assert (report.funnel.clips, report.funnel.quarantined) == (3, 3)
    errors = Catalog(str(tmp_path / "c")).clips().collect()["errors"][0]
    assert "0 of 1 clips" in errors[0]["message"]


def test_faults_in_each_stage_of_the_pass(tmp_path, ray_address, monkeypatch):
    videos_named(tmp_path / "in", ["a", *STAGE_CODE])
    plant(monkeypatch, ingest_run, "support.faulty_stages:faulty_stages")
    report = ingest([str(tmp_path / "in")], str(tmp_path / "c"), settings("ocr.enabled=false", *QUICK), ray_address)
    catalog = Catalog(str(tmp_path / "c"))
    rows = by_name(catalog)
    assert {n: (rows[n]["error_stage"], rows[n]["error_kind"]) for n in ("shots", "division")} == {
        "shots": ("shots", "stage"),
        "division": ("decode", "stage"),
    }
    grid = [name for name in STAGE_CODE if name not in ("shots", "division")]
    clips = catalog.clips().collect()
    for name in grid:
        own = clips.filter(pl.col("uri").str.ends_with(f"/{name}.mp4"))
        assert own["status"].to_list() == ["quarantined"] * 3 and own["reasons"].to_list() == [[name]] * 3
        assert own.select(pl.col(c).null_count() for c in STAGES[name].column_names()).row(0) == (3,) * len(
            STAGES[name].columns
        )
    assert report.funnel.clip_errors == dict.fromkeys(grid, 3) and report.funnel.videos_quarantined == 2
    assert report.funnel.clips == 3 * (1 + len(grid)) and report.funnel.quarantined == 3 * len(grid)
    assert not list(problems(catalog))


def test_faults_while_writing_clips(tmp_path, ray_address, monkeypatch, attempts):
    videos_named(tmp_path / "in", ["a", "segv", "raise"])
    plant(monkeypatch, clip_files, "support.faulty_stages:faulty_files")
    report = ingest(
        [str(tmp_path / "in")], str(tmp_path / "c"), settings("ocr.enabled=false", "clips=cut", *QUICK), ray_address
    )
    catalog = Catalog(str(tmp_path / "c"))
    clips = catalog.clips().collect()
    kept = clips.filter(pl.col("uri").str.ends_with("/a.mp4"))
    assert kept["status"].to_list() == ["kept"] * 3 and kept["path"].null_count() == 0
    failed = clips.filter(pl.col("errors").list.len() > 0)
    assert failed.height == 6 and failed["path"].null_count() == 6
    assert {e["kind"] for errors in failed["errors"] for e in errors} == {"crash", "stage"}
    assert attempts()["segv.mp4"] == 2 and attempts()["raise.mp4"] == 1
    assert (report.funnel.clips, report.funnel.quarantined, report.funnel.clip_errors) == (9, 6, {"clips": 6})
    assert not list(problems(catalog))

    monkeypatch.undo()
    again = settings("ocr.enabled=false", "clips=cut", *QUICK)
    assert ingest([str(tmp_path / "in")], str(tmp_path / "c"), again, ray_address).funnel.quarantined == 6
    assert ingest([str(tmp_path / "in")], str(tmp_path / "c"), again, ray_address, retry_failed=True).funnel.kept == 9
    assert catalog.clips().collect()["path"].null_count() == 0 and not list(problems(catalog))


def test_accounts_that_do_not_add_up_are_an_error(tmp_path, ray_address):
    from catalogs.query.funnel import funnel

    videos_named(tmp_path / "in", ["a"])
    ingest([str(tmp_path / "in")], str(tmp_path / "c"), settings("ocr.enabled=false", *QUICK), ray_address)
    catalog = Catalog(str(tmp_path / "c"))
    catalog.delete("clips", "start_frame = 0")
    with pytest.raises(CatalogError, match="3 expected, 2 found"):
        funnel(catalog)


def test_a_worker_that_is_lost_while_it_starts_is_replaced(tmp_path, footage, ray_address, monkeypatch):
    """As when its node goes, or Ray gives its creation up; not for ever: see the message."""
    lost, real = [], ActorPool.want

    def want(pool, work):
        known = set(pool.starting)
        real(pool, work)
        for ping in set(pool.starting) - known:
            if len(lost) < most:
                lost.append(ping)
                ray.kill(pool.starting[ping].leader)

    monkeypatch.setattr(ActorPool, "want", want)
    most = NODE_ATTEMPTS - 1
    report = ingest(
        [str(footage["bikes.mp4"])], str(tmp_path / "c"), settings("recipe=technical", "ocr.enabled=false"), ray_address
    )
    assert len(lost) == most and report.funnel.videos_ok == 1 and report.funnel.clips > 3
    most, lost[:] = 100, []
    with pytest.raises(ConfigError, match=f"could not start, {NODE_ATTEMPTS} times"):
        ingest(
            [str(footage["bikes.mp4"])],
            str(tmp_path / "d"),
            settings("recipe=technical", "ocr.enabled=false"),
            ray_address,
        )
