"""How long questions to a catalog take, from 50 thousand clips to 5 million, beside what a user would do instead.

    .venv/bin/python scripts/bench_catalog.py [--clips 50000,1000000,5000000] [--folder DIR] [--only count,what_if]

Builds synthetic catalogs (scripts/synthetic_catalog.py) unless they are there. Every measurement runs in a process of
its own, so that its peak memory is its own; each is followed by its baseline on the same tables in the same run: DuckDB
over the catalog's Parquet files, and for deciding the way of Open-Sora's tools, a CSV read, filtered and rewritten by
pandas. Times are of the work; imports are left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
RULES = {
    "duration": "end_s - start_s >= 2",
    "frame_rate": "fps >= 12",
    "aspect": "aspect_ratio between 0.3333 and 3",
    "bits_per_pixel": "bits_per_pixel >= case when codec in ('hevc', 'vp9', 'av1') then 0.01 else 0.02 end",
    "progressive": "interlaced <= 0.5",
    "brightness": "brightness between 0.04 and 0.97",
    "contrast": "contrast >= 0.02",
    "blur": "blur >= 4",
    "motion": "motion between 0.3 and 120",
    "text": "ocr_area <= 0.07",
}
"""The rules of the recipe `default`, for the baselines."""
WHERE = "aesthetic > 5 and motion between 2 and 40 and status = 'kept'"


def count(root: str) -> dict:
    from catalogs.tables.catalog import Catalog

    began = time.monotonic()
    clips = Catalog(root).count()
    return {"seconds": time.monotonic() - began, "note": f"{clips} clips"}


def count_baseline(root: str) -> dict:
    db = _duckdb(root)
    began = time.monotonic()
    db.sql(
        "select count(*) from clips semi join (select * from videos where status = 'ok') v using (video_id)"
    ).fetchall()
    return {"seconds": time.monotonic() - began, "note": "DuckDB, count of the joined tables"}


def what_if(root: str) -> dict:
    from catalogs.tables.catalog import Catalog
    from pipelines.recipes.recipe import load_recipe
    from pipelines.recipes.what_if import what_if as ask

    catalog, recipe = Catalog(root), load_recipe("default")
    began = time.monotonic()
    found = ask(catalog, recipe)
    return {
        "seconds": time.monotonic() - began,
        "note": f"{found.outcome['kept'].clips} would be kept; {len(found.rules)} rules",
    }


def what_if_baseline(root: str) -> dict:
    db = _duckdb(root)
    masks = " + ".join(f"case when {rule} then 0 else {1 << bit} end" for bit, rule in enumerate(RULES.values()))
    began = time.monotonic()
    db.sql(f"""select mask, now, count(*), sum(seconds) from
      (select {masks} as mask, d.status as now, end_s - start_s as seconds
      from clips join (select video_id, codec, bits_per_pixel from videos where status = 'ok') v using (video_id)
      left join decisions d using (clip_id)) group by all""").fetchall()
    return {"seconds": time.monotonic() - began, "note": "DuckDB, the same masks written by hand"}


def decide(root: str) -> dict:
    from catalogs.tables.catalog import Catalog
    from pipelines.recipes.decide import decide as work
    from pipelines.recipes.recipe import load_recipe

    catalog, recipe = Catalog(root), load_recipe("default")
    began = time.monotonic()
    statuses = work(catalog, recipe)
    return {"seconds": time.monotonic() - began, "note": f"{statuses['kept']} kept"}


def decide_baseline(root: str) -> dict:
    import pandas

    columns = [
        "clip_id",
        "video_id",
        "start_s",
        "end_s",
        "fps",
        "aspect_ratio",
        "interlaced",
        "brightness",
        "contrast",
        "blur",
        "motion",
        "ocr_area",
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "meta.csv"
        _duckdb(root).sql(f"select {', '.join(columns)} from clips").write_csv(str(path))
        began = time.monotonic()
        rows = pandas.read_csv(path)
        keep = (
            (rows.end_s - rows.start_s >= 2)
            & (rows.fps >= 12)
            & rows.aspect_ratio.between(0.3333, 3)
            & (rows.interlaced <= 0.5)
        )
        keep &= (
            rows.brightness.between(0.04, 0.97)
            & (rows.contrast >= 0.02)
            & (rows.blur >= 4)
            & rows.motion.between(0.3, 120)
            & (rows.ocr_area <= 0.07)
        )
        rows[keep].to_csv(Path(folder) / "kept.csv", index=False)
        return {"seconds": time.monotonic() - began, "note": "pandas: CSV read, filtered, rewritten"}


def browse(root: str) -> dict:
    from catalogs.browse.clip_index import Index
    from catalogs.tables.catalog import Catalog

    began = time.monotonic()
    index = Index(Catalog(root))
    start = time.monotonic() - began
    times = []
    for motion in (2, 1, 3, 2.5, 4):
        began = time.monotonic()
        found = index.query(WHERE.replace("2 and", f"{motion} and"), "aesthetic", True, 0, 60)
        times.append(time.monotonic() - began)
    return {
        "seconds": sorted(times)[2],
        "note": f"slowest {max(times):.2f} s; start {start:.1f} s; {found.total.clips} clips match",
    }


def browse_baseline(root: str) -> dict:
    db = _duckdb(root)
    where = WHERE.replace("status", "d.status")
    view = (
        "clips join (select video_id from videos where status = 'ok') v using (video_id) left join decisions d "
        "using (clip_id)"
    )
    began = time.monotonic()
    db.sql(f"select count(*), sum(end_s - start_s) from {view} where {where}").fetchall()
    db.sql(f"select clip_id from {view} where {where} order by aesthetic desc limit 60").fetchall()
    return {"seconds": time.monotonic() - began, "note": "DuckDB, count and page from the files"}


def report(root: str) -> dict:
    from catalogs.report import plain_rules
    from catalogs.report import report as work
    from catalogs.tables.catalog import Catalog
    from pipelines.recipes.recipe import load_recipe

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.html"
        catalog = Catalog(root)
        began = time.monotonic()
        work(catalog, out, rules=plain_rules({rule.name: rule.keep for rule in load_recipe("default").file.rules}))
        return {"seconds": time.monotonic() - began, "note": f"{out.stat().st_size / 2**20:.1f} MiB page"}


def report_baseline(root: str) -> dict:
    db = _duckdb(root)
    began = time.monotonic()
    db.sql("summarize clips").fetchall()
    return {"seconds": time.monotonic() - began, "note": "DuckDB's SUMMARIZE of the one table: numbers, no picture"}


def select(root: str) -> dict:
    from catalogs.query.selection import Selection
    from catalogs.tables.catalog import Catalog

    began = time.monotonic()
    selection = Selection(Catalog(root), where="aesthetic > 5 and motion between 2 and 40")
    clips, hours = selection.size
    counted = time.monotonic() - began
    digest = selection.content_hash
    return {
        "seconds": time.monotonic() - began,
        "note": f"{clips} clips, {hours:.0f} h in {counted:.1f} s; hash {digest[:8]} over 19 columns",
    }


MEASURES = {
    "count": (count, count_baseline, "open and count"),
    "what_if": (what_if, what_if_baseline, "decide --what-if"),
    "browse": (browse, browse_baseline, "a browse query"),
    "report": (report, report_baseline, "report"),
    "decide": (decide, decide_baseline, "decide again"),
    "select": (select, None, "selection, with its hash"),
}


def _duckdb(root: str):
    """DuckDB with the newest version of the tables as views."""
    import duckdb
    from deltalake import DeltaTable

    db = duckdb.connect()
    for name in ("videos", "clips", "decisions"):
        files = ", ".join(f"'{uri}'" for uri in DeltaTable(f"{root}/{name}").file_uris())
        db.sql(f"create view {name} as select * from read_parquet([{files}])")
    return db


def _peak_gib() -> float:
    """Of this process; getrusage would count what the parent held when it forked."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def _apart(name: str, which: int, root: str) -> dict:
    """One measurement in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--measure", f"{name},{which},{root}"], capture_output=True, text=True
    )
    if done.returncode:
        return {
            "seconds": float("nan"),
            "gib": float("nan"),
            "note": (done.stderr.strip().splitlines() or ["died"])[-1],
        }
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", default="50000,1000000,5000000")
    parser.add_argument("--folder", default=".cache/bench_catalog")
    parser.add_argument("--only", default=",".join(MEASURES))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        name, which, root = arguments.measure.split(",", 2)
        result = MEASURES[name][int(which)](root)
        print(json.dumps({**result, "gib": _peak_gib()}))
        return
    sizes = [int(size) for size in arguments.clips.split(",")]
    roots = [_built(Path(arguments.folder), size) for size in sizes]
    first: dict[str, float] = {}
    print(f"{'':<26}{'clips':>9}{'s':>8}{'GiB':>6}{'baseline s':>12}{'ratio':>7}  ")
    for name in arguments.only.split(","):
        _, baseline, title = MEASURES[name]
        for size, root in zip(sizes, roots):
            ours = _apart(name, 0, root)
            theirs = _apart(name, 1, root) if baseline else {"seconds": float("nan"), "note": "no baseline"}
            grown = ours["seconds"] / first.setdefault(name, ours["seconds"])
            print(
                f"{title:<26}{size:>9}{ours['seconds']:>8.2f}{ours['gib']:>6.2f}{theirs['seconds']:>12.2f}"
                f"{ours['seconds'] / theirs['seconds']:>7.2f}"
                f"  {ours['note']} | {theirs['note']} | {grown:.1f} × the time for {size / sizes[0]:.0f} × the clips",
                flush=True,
            )


def _built(folder: Path, clips: int) -> str:
    from synthetic_catalog import build

    root = folder / str(clips)
    done = folder / f"{clips}.done"
    if not done.exists():
        began = time.monotonic()
        build(str(root), clips)
        done.touch()
        print(f"built {clips} clips in {time.monotonic() - began:.0f} s", flush=True)
    return str(root)


if __name__ == "__main__":
    main()
