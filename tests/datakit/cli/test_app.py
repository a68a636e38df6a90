"""The command line as a user meets it: quick help, one-line errors, machine-readable results."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from support.drawn_videos import encode, shots


def datakit(*arguments, cwd=None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "datakit", *map(str, arguments)], capture_output=True, text=True, cwd=cwd
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory, ray_address):
    """A small catalog, made by the command line."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "in").mkdir()
    for i in range(2):
        frames = [np.roll(f, j + 9 * i, 1) for j, f in enumerate(shots([50 + i, 60, 55], 240, 320))]
        encode(folder / "in" / f"v{i}.mp4", frames, 25, pix_fmt="yuv420p", options={"crf": "20", "preset": "ultrafast"})
    (folder / "in" / "bad.mp4").write_bytes(b"")
    (folder / "in" / "notes.doc").write_text("not media")
    done = datakit(
        "run",
        "ingest",
        "in",
        "--catalog",
        "c",
        "--ray",
        ray_address,
        "--recipe",
        "technical",
        "--set",
        "ocr.enabled=false",
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return folder, done


def test_help_imports_nothing_heavy():
    script = (
        "import sys, runpy\nsys.argv = ['datakit', '--help']\n"
        "try:\n    runpy.run_module('datakit.cli.app', run_name='cli')['app']()\nexcept SystemExit:\n    pass\n"
        "heavy = {'ray', 'polars', 'av', 'cv2', 'numpy', 'deltalake', 'pyarrow', 'pydantic', 'torch'} & "
        "set(sys.modules)\n"
        "print('HEAVY', sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "HEAVY []" in done.stdout and "doctor" in done.stdout


def test_a_run_with_broken_videos_ends_well_and_says_so(made):
    folder, done = made
    assert "3 sources: 2 videos ingested, 1 quarantined; 1 files without a media suffix ignored." in done.stdout
    assert "empty 1" in done.stdout and "CPU-hours per kept hour" in done.stdout and done.stderr == ""


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["run", "ingest", "nowhere", "--catalog", "x"], "nowhere"),
        (["run", "ingest", "in", "--catalog", "x", "--recipe", "nicest"], "nicest"),
        (["run", "ingest", "in", "--catalog", "x", "--set", "shots.max=1"], "did you mean max_s?"),
        (["run", "ingest", "in", "--catalog", "x", "--ray", "127.0.0.1:1"], "cannot reach Ray"),
        (["run", "score", "--catalog", "x"], "no catalog at x"),
        (["run", "score", "--catalog", "c", "--stages", "taste"], "no stage 'taste'"),
        (["run", "score", "--catalog", "c", "--where", "motoin > 1"], "no column 'motoin': did you mean motion"),
        (["run", "decide", "--catalog", "x"], "no catalog at x"),
        (["catalog", "show", "x"], "no catalog at x"),
        (["catalog", "query", "c", "SELECT motoin FROM clips"], "did you mean motion?"),
        (["catalog", "query", "c", "SELEC 1"], "cannot run the query"),
        (["run", "ingest", "in", "--catalog", "/proc/nowhere/x"], "the catalog cannot be written"),
        (["catalog", "query", "c", "SELECT clip_id FROM clips", "--format", "xml"], "table, csv or jsonl"),
    ],
)
def test_mistakes_are_one_line_and_a_code(made, arguments, words):
    done = datakit(*arguments, cwd=made[0])
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr and done.stdout == ""
    assert not (made[0] / "x").exists(), "a run that could not start left a catalog behind"


def test_a_ray_of_its_own_starts_under_uv_run_and_leaves_nothing_behind(made, ray_address):
    """Also while RAY_ADDRESS names another Ray."""
    folder, _ = made

    def started_here() -> set[str]:
        """Names of live processes with this working folder, which Ray's inherit."""
        found = psutil.process_iter(["name", "cwd", "status"])
        return {
            p.info["name"] for p in found if p.info["cwd"] == str(folder) and p.info["status"] != psutil.STATUS_ZOMBIE
        }

    seen: set[str] = set()
    project = Path(__file__).parents[3]
    command = [
        "uv",
        "run",
        "--no-sync",
        "--project",
        str(project),
        "datakit",
        "run",
        "ingest",
        "in",
        "--catalog",
        "own",
        "--json",
        "--recipe",
        "technical",
        "--set",
        "ocr.enabled=false",
    ]
    run = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "RAY_ADDRESS": ray_address},
    )
    while run.poll() is None:
        seen |= started_here()
        time.sleep(0.2)
    out, err = run.communicate()
    assert run.returncode == 0, err
    assert json.loads(out)["funnel"]["clips"] == 6
    assert "raylet" in seen, "a Ray of its own"
    time.sleep(0.5)
    assert not started_here()


def test_interrupting_a_run_is_clean(made, ray_address):
    folder, _ = made
    (folder / "slow").mkdir()
    encode(
        folder / "slow" / "long.mp4",
        shots([3000], 240, 320),
        25,
        pix_fmt="yuv420p",
        options={"crf": "20", "preset": "ultrafast"},
    )
    command = [
        sys.executable,
        "-m",
        "datakit",
        "run",
        "ingest",
        "slow",
        "--catalog",
        "stopped",
        "--ray",
        ray_address,
    ]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder)
    deadline = time.monotonic() + 30
    while not (folder / "stopped" / "runs" / "_delta_log" / f"{1:020}.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130 and "goes on from there" in err and err.count("\n") == 1
    (row,) = datakit(
        "catalog", "query", "stopped", "SELECT status FROM runs", "--format", "jsonl", cwd=folder
    ).stdout.splitlines()
    assert json.loads(row) == {"status": "stopped"}


def test_json_is_the_whole_of_stdout(made, ray_address):
    folder, _ = made
    arguments = (
        "--catalog",
        "c",
        "--ray",
        ray_address,
        "--recipe",
        "technical",
        "--set",
        "ocr.enabled=false",
        "--json",
    )
    again = json.loads(datakit("run", "ingest", "in", *arguments, cwd=folder).stdout)
    assert again["counts"]["done_before"] == 2 and again["funnel"]["clips"] == 6
    assert json.loads(datakit("catalog", "funnel", "c", "--json", cwd=folder).stdout) == again["funnel"]
    shown = json.loads(datakit("catalog", "show", "c", "--json", cwd=folder).stdout)
    assert {t["table"]: t["rows"] for t in shown["tables"]}["clips"] == 6
    assert all(c["meaning"] for c in shown["columns"]["clips"])
    score = datakit(
        "run", "score", "--catalog", "c", "--ray", ray_address, "--stages", "motion", "--redo", "--json", cwd=folder
    )
    assert json.loads(score.stdout)["clips"] == 6


def test_queries_come_as_table_csv_and_jsonl(made):
    folder, _ = made
    sql = (
        "SELECT start_frame, reasons, motion FROM clips WHERE status IN ('kept', 'rejected') ORDER BY uri, "
        "start_frame LIMIT 2"
    )
    lines = [
        json.loads(line)
        for line in datakit("catalog", "query", "c", sql, "--format", "jsonl", cwd=folder).stdout.splitlines()
    ]
    assert [line["start_frame"] for line in lines] == [0, 50] and lines[0]["motion"] > 0
    table = datakit("catalog", "query", "c", sql.replace("LIMIT 2", ""), "--rows", "1", cwd=folder).stdout
    assert "start_frame" in table and "1 of 6 rows" in table
    csv = datakit("catalog", "query", "c", sql, "--format", "csv", cwd=folder).stdout.splitlines()
    assert csv[0] == "start_frame,reasons,motion" and len(csv) == 3


def test_dry_run_shows_the_plan_and_does_nothing(made):
    folder, _ = made
    done = datakit("run", "ingest", "in", "--catalog", "dry", "--dry-run", cwd=folder)
    assert done.returncode == 0 and not (folder / "dry").exists()
    for words in ("detector: adaptive", "motion_vmaf", "ocr_area", "Recipe default"):
        assert words in done.stdout
    plan = json.loads(datakit("run", "ingest", "in", "--catalog", "dry", "--dry-run", "--json", cwd=folder).stdout)
    assert [s["stage"] for s in plan["stages"]][:2] == ["shots", "jitter"] and plan["settings"]["shots"]["max_s"] == 8


def test_decide_changes_statuses_and_opens_no_video(made):
    folder, _ = made
    (folder / "in").rename(folder / "away")
    try:
        (folder / "strict.yaml").write_text(
            "name: strict\ndescription: d\nrules:\n  - {name: long, keep: num_frames >= 1000, source: test}\n"
        )
        strict = json.loads(
            datakit("run", "decide", "--catalog", "c", "--recipe", "strict.yaml", "--json", cwd=folder).stdout
        )
        assert (strict["kept"], strict["rejected_by"]) == (0, {"long": [6, 6]})
        assert (
            json.loads(
                datakit("run", "decide", "--catalog", "c", "--recipe", "technical", "--json", cwd=folder).stdout
            )["kept"]
            > 0
        )
        broken = datakit("catalog", "validate", "c", cwd=folder)
        assert broken.returncode == 1 and "relink" in broken.stdout
    finally:
        (folder / "away").rename(folder / "in")
    assert datakit("catalog", "validate", "c", cwd=folder).stdout == "the catalog is in order\n"


def test_doctor_knows_what_is_there():
    done = datakit("doctor", "--quick", "--json")
    findings = {(f["area"], f["name"]): f for f in json.loads(done.stdout)}
    assert done.returncode == 0 and findings["codecs", "decode h264"]["ok"] and findings["base", "ray"]["ok"]
    absent = findings["extra flash", "flash_attn"]
    assert absent["ok"] is None and "--extra flash" in absent["detail"]
