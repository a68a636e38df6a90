"""The page: numbers known by construction, thresholds read from rules, nothing from data that is markup, nothing from
the network."""

import base64
import json
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from catalogs.query.selection import Selection
from catalogs.report import Rule, plain_rules, report
from catalogs.report.collect import gather
from catalogs.report.contact_sheets import pictures
from catalogs.report.thresholds import extract, resolved
from catalogs.tables.catalog import Catalog
from datakit.errors import CatalogError, ConfigError
from datakit.identity import clip_id
from pipelines.recipes.decide import decide_and_record
from pipelines.recipes.recipe import load_recipe, shipped_recipes
from support.browser import until

EVIL = "<script>alert('x')</script>\"&"
NOW = datetime(2026, 11, 22, tzinfo=UTC)
RULES = (
    Rule("motion", None, "kind = 'image' or motion between 0.3 and 120"),
    Rule("blur", None, "blur >= quantile_cont(blur, 0.5)"),
    Rule(f"odd{EVIL}", None, f"caption <> '{EVIL}'"),
)


def video(number: int, uri: str, **columns) -> dict:
    video_id = f"{number:032x}"
    return {
        "video_id": video_id,
        "shard": video_id[0],
        "status": "ok",
        "run_id": "r",
        "clip_count": 0,
        "kind": "video",
        "duration_s": 36.0,
        "uris": [{"uri": uri, "size": 1, "etag": "e"}],
        "codec": "h264",
        **columns,
    }


def clip(number: int, start: int, end: int, **columns) -> dict:
    video_id = f"{number:032x}"
    return {
        "clip_id": clip_id(video_id, 0, start, end),
        "video_id": video_id,
        "shard": video_id[0],
        "stream": 0,
        "run_id": "r",
        "start_pts": start,
        "end_pts": end,
        "start_s": start / 12800,
        "end_s": end / 12800,
        "num_frames": 25,
        "fps": 25.0,
        "width": 1280,
        "height": 720,
        "errors": [],
        "stage_versions": [],
        "camera_motion": "static",
        "split": "train",
        **columns,
    }


@pytest.fixture(scope="module")
def demo(footage, tmp_path_factory) -> Catalog:
    """Twelve clips of a real film (0.36 s each) with scores 0 … 11; one of a file that is not there; two videos in
    quarantine."""
    catalog = Catalog.create(tmp_path_factory.mktemp("report") / "catalog")
    film = str(footage["bigbuckbunny.mp4"])
    clips = [
        clip(
            1,
            n * 4608,
            (n + 1) * 4608,
            motion=float(n),
            blur=10.0**n / 100,
            brightness=0.5,
            aesthetic=None if n == 3 else 5 + n / 10,
            ocr_area=0.0,
            duplicate_group="g" if n < 3 else f"g{n}",
            duplicate_of=None if n != 1 else "x",
            duplicate_kind="exact" if n == 1 else None,
        )
        for n in range(12)
    ]
    clips.append(
        clip(
            2,
            0,
            36000,
            motion=500.0,
            blur=1e7,
            camera_motion=EVIL,
            errors=[{"stage": "ocr", "kind": "crash", "message": EVIL}],
        )
    )
    catalog.append(
        "videos",
        [
            video(1, film, clip_count=12, license="CC0", source_url="https://one.example/film"),
            video(2, f"/gone/{EVIL}.mp4", clip_count=1, license=EVIL, codec="av1"),
            video(3, f"/v/{EVIL}.mp4", status="quarantined", error_kind="truncated", error=EVIL),
            video(4, "/v/b.mp4", status="quarantined", error_kind="empty"),
            video(5, "/v/c.mp4", status="pending"),
        ],
    )
    catalog.append("clips", clips)
    status = ["kept"] * 6 + ["rejected"] * 4 + ["pending"] * 2 + ["quarantined"]
    reasons = [[]] * 6 + [["motion"], ["motion", "blur"], ["blur"], ["blur"]] + [["text"]] * 2 + [["ocr"]]
    catalog.append(
        "captions",
        [
            {
                "caption_id": f"{n:08x}",
                "clip_id": clips[n]["clip_id"],
                "shard": "0",
                "style": "dense",
                "model": EVIL,
                "text": f"a dog runs {EVIL} " + "far " * n,
                "flags": ["length"] if n else [],
                "created_at": NOW,
            }
            for n in range(3)
        ],
    )
    catalog.append(
        "decisions",
        [
            {
                "clip_id": c["clip_id"],
                "shard": "0",
                "status": s,
                "reasons": why,
                "recipe": "hand@1",
                "level": int(s == "kept"),
                "caption_id": f"{n:08x}" if n < 3 else None,
            }
            for n, (c, s, why) in enumerate(zip(clips, status, reasons))
        ],
    )
    catalog.append(
        "losses",
        [
            {
                "clip_id": c["clip_id"],
                "shard": "0",
                "run_id": "t",
                "bucket": "b",
                "noise_level": 1,
                "excess": n / 10,
                "count": 2,
            }
            for n, c in enumerate(clips[:8])
        ],
    )
    catalog.append(
        "runs",
        [
            {
                "run_id": "r",
                "pipeline": "ingest",
                "author": EVIL,
                "status": "finished",
                "started_at": NOW,
                "wall_s": 75.0,
                "cpu_hours": 0.5,
                "stage_cpu_s": json.dumps({"motion": 1800.0, EVIL: 3600.0}),
                "counts": json.dumps({"error": EVIL}),
            }
        ],
    )
    return catalog


@pytest.fixture(scope="module")
def page(demo, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("page") / "report.html"
    done = report(demo, out, rules=RULES, recipe=f"hand{EVIL}", thumbnails=4)
    assert done.clips == 13 and done.bytes == out.stat().st_size and done.pictures == 13 and done.failed == 1
    assert str(done).startswith(f"{out}: ") and "1 of 13 thumbnails could not be made" in str(done)
    return out


def content(catalog, rules=RULES, where=None, thumbnails=4):
    return gather(Selection(catalog, None, where, ("clip_id",)), rules, "hand", None, thumbnails)


def test_counts_either_side_of_thresholds(demo):
    c = content(demo)
    scores = {d.column.name: d for d in c.scores}
    motion = scores["motion"]
    assert [(s.threshold.sign, s.threshold.value, s.failing, s.passing) for s in motion.sides] == [
        ("≥", 0.3, 1, 12),
        ("≤", 120.0, 1, 12),
    ]
    assert motion.measured == 13 and motion.missing == 0 and (motion.lowest, motion.highest) == (0.0, 500.0)
    blur = scores["blur"]  # its threshold is the median of the catalog: the 7th of 13
    assert blur.log and [(round(s.threshold.value), s.failing, s.passing) for s in blur.sides] == [(10_000, 6, 7)]
    assert scores["aesthetic"].measured == 11 and scores["aesthetic"].missing == 2
    for d in c.scores:  # every clip is in a bin, or said to be outside
        assert sum(d.kept) + sum(d.other) + d.below + d.above + d.zeros == d.measured
    assert set(c.blank) >= {"nsfw", "quality", "caption_match"}
    assert [u.rule for u in c.unread] == [f"odd{EVIL}"]


def test_the_funnel_of_the_page(demo):
    f = content(demo).facts
    assert f.clips == 13 and f.videos == {"ok": 2, "quarantined": 2, "pending": 1}
    assert {s: n for s, (n, _) in f.status.items()} == {"kept": 6, "rejected": 4, "pending": 2, "quarantined": 1}
    assert f.status["kept"][1] == pytest.approx(6 * 0.36 / 3600, rel=1e-5)
    assert f.rejections.rows() == [("blur", 3, 2), ("motion", 2, 1)] and f.waiting.rows() == [("text", 2)]
    assert f.uncaptioned == 3
    assert f.licenses.select("name", "clips", "kept").rows() == [("CC0", 12, 6), (EVIL, 1, 0)]
    assert f.sources.select("name", "clips").rows() == [("one.example", 12), ("/gone", 1)]
    assert f.kinds["Aspect ratio"].select("name", "clips").rows() == [("16:9", 13)]
    assert f.kinds["Shorter side, px"].select("name", "clips").rows() == [("720 … 1079", 13)]
    assert f.kinds["Codec"].select("name", "clips").rows() == [("h264", 12), ("av1", 1)]


def test_what_else_is_counted(demo):
    c = content(demo)
    videos, clips = c.failures
    assert {f.kind: f.count for f in videos} == {"truncated": 1, "empty": 1}
    assert [(f.kind, f.count, f.examples[0][1]) for f in clips] == [("ocr: crash", 1, EVIL)]
    d = c.duplicates
    assert (d.looked, d.groups, d.copies, d.sizes, d.kinds) == (12, 1, 1, [(3, 1)], [("exact", 1)])
    assert c.words.captions == c.words.sampled == 3 and c.words.flags == [("length", 2)]
    frequent = dict(c.words.frequent)
    assert frequent["dog"] == 1.0 and frequent["far"] == pytest.approx(2 / 3) and "a" not in frequent
    assert c.words.length_quantiles[1] == 8  # a dog runs script alert x script far
    t = c.training
    assert (t.run.run_id, t.clips, t.samples, t.mean) == ("t", 8, 16, pytest.approx(sum(n / 20 for n in range(8)) / 8))
    assert c.stages == [(EVIL, 1.0), ("motion", 0.5)] and c.density.y.name == "aesthetic" and c.density.clips == 11


def test_a_condition_limits_the_clips(demo):
    c = content(demo, where="motion < 5")
    assert c.facts.clips == 5 and c.words.captions == 3 and {d.column.name: d.measured for d in c.scores}["motion"] == 5
    blur = next(d for d in c.scores if d.column.name == "blur")
    assert round(blur.sides[0].threshold.value) == 10_000  # a share stays that of the whole catalog
    assert content(demo, where="motion > 1e6").facts.clips == 0


def test_the_clips_of_the_contact_sheets(demo):
    motion = next(d for d in content(demo).scores if d.column.name == "motion")
    rows = {row.label: [(v, keeps) for _, v, keeps in row.clips] for row in motion.picks}
    assert rows == {
        "Lowest": [(0.0, None), (1.0, None), (2.0, None), (3.0, None)],
        "Highest": [(500.0, None), (11.0, None), (10.0, None), (9.0, None)],
        "Borderline ≥ 0.3": [(0.0, False), (1.0, True), (2.0, True)],
        "Borderline ≤ 120": [(10.0, True), (11.0, True), (500.0, False)],
    }
    assert [row.label for row in next(d for d in content(demo).scores if d.column.name == "aesthetic").picks] == [
        "Best",
        "Worst",
    ]
    assert not next(d for d in content(demo).scores if d.column.name == "brightness").picks  # all the same
    assert not any(d.picks for d in content(demo, thumbnails=0).scores)


def test_equal_scores_are_drawn_from_and_counted(tmp_path):
    catalog = Catalog.create(tmp_path / "c")
    clips = [clip(1, n * 100, n * 100 + 100, motion=float(n == 9)) for n in range(10)]
    catalog.append("videos", [video(1, "/v", clip_count=10)])
    catalog.append("clips", clips)
    lowest = next(d for d in content(catalog, rules=()).scores if d.column.name == "motion").picks[0]
    assert lowest.tied == 9 and [i for i, _, _ in lowest.clips] == sorted(c["clip_id"] for c in clips[:9])[:4]


@pytest.mark.parametrize(
    "text, found, left",
    [
        ("motion between 0.3 and 120", [("motion", ">=", 0.3), ("motion", "<=", 120)], 0),
        ("blur >= 4", [("blur", ">=", 4)], 0),
        ("4 < blur", [("blur", ">", 4)], 0),
        ("not (motion < 3)", [("motion", ">=", 3)], 0),
        ("motion not between 1 and 5", [("motion", "<", 1), ("motion", ">", 5)], 0),
        (
            "status = 'kept' and (motion > 1 or (blur>2 and jitter<1e2))",
            [("motion", ">", 1), ("blur", ">", 2), ("jitter", "<", 100)],
            0,
        ),
        ("resolution >= 240 * 320", [("resolution", ">=", 76800)], 0),
        ("end_s - start_s >= 2", [("duration", ">=", 2)], 0),
        ('(end_s - start_s) >= 2 and "motion" > -.5', [("duration", ">=", 2), ("motion", ">", -0.5)], 0),
        ("aesthetic is null or aesthetic >= 5", [("aesthetic", ">=", 5)], 0),
        ("motion >= quantile_cont(motion, 0.25)", [("motion", ">=", None)], 0),
        ("motion >= quantile_cont(motion, 0.25) * 2", [], 1),
        ("log(motion) > 1 and blur >= 4", [("blur", ">=", 4)], 1),
        ("motion * 2 > 3 or jitter < 5", [("jitter", "<", 5)], 1),
        ("motion >= blur", [], 1),
        ("ocr_boxes in (0, 1)", [], 1),
        ("blur >= case when codec = 'av1' then 1 else 2 end", [], 1),
        ("codec in ('av1', 'vp9')", [], 1),
        ("case when duplicate_group is null then null else duplicate_of is null end", [], 1),
        ("vfr", [], 1),
        ("motion >", [], 1),
        ("motion > 3 )", [], 1),
        ("~ motion", [], 1),
    ],
)
def test_thresholds_are_read_from_conditions(text, found, left):
    thresholds, unread = extract([Rule("r", "base", text)])
    assert [(t.column, t.operator, t.value) for t in thresholds] == found
    assert len(unread) == left and all(t.rule == "r" and t.level == "base" for t in thresholds)


def test_every_shipped_recipe_is_read():
    """Rule for rule: it has a threshold, or it is listed."""
    for name in shipped_recipes():
        rules = plain_rules({rule.name: rule.keep for rule in load_recipe(name).file.rules})
        thresholds, unread = extract(rules)
        assert {(r.name, r.level) for r in rules} == {(t.rule, t.level) for t in thresholds} | {
            (u.rule, u.level) for u in unread
        }
        assert {u.rule for u in unread} <= {"bits_per_pixel", "sdr", "profile"}
    pyramid = plain_rules({rule.name: rule.keep for rule in load_recipe("pyramid").file.rules})
    blur = [(t.level, t.operator, t.value) for t in extract(pyramid)[0] if t.column == "blur"]
    assert blur == [("base", ">=", 2), ("clean", ">=", 10), ("best", ">=", 30)]


def test_shares_are_resolved_over_the_catalog(demo):
    svd = plain_rules({rule.name: rule.keep for rule in load_recipe("svd").file.rules})
    found = {t.rule: t.value for t in resolved(extract(svd)[0], demo, demo.versions())}
    assert found["motion"] == 3.0 and found["text"] == 0.07
    assert found["caption_match"] is None  # nothing measured it


def test_an_aggregate_over_nothing_is_listed(demo):
    unread = content(demo, rules=(Rule("m", None, "caption_match >= quantile_cont(caption_match, 0.5)"),)).unread
    assert [(u.rule, u.why) for u in unread] == [("m", "caption_match was not measured")]


def test_nothing_from_data_is_markup(page):
    html = page.read_text()
    assert "<script>alert" not in html and "&lt;script&gt;alert" in html
    without_plotly = max(re.findall(r"<script>(.*?)</script>", html, re.S), key=len)
    rest = html.replace(without_plotly, "")
    assert rest.count("<script") == 4 == rest.count("</script>")
    charts = json.loads(re.search(r'<script id="charts" type="application/json">(.*?)</script>', html, re.S).group(1))
    assert charts and "<script" not in json.dumps(charts)  # plotly reads tags in texts: they are escaped there too


def test_nothing_is_fetched(page):
    html = page.read_text()
    plotly = max(re.findall(r"<script>(.*?)</script>", html, re.S), key=len)
    rest = html.replace(plotly, "")
    assert not re.search(r"""(src|href|srcset|action)\s*=\s*["']?\s*(https?:)?//""", rest)
    assert not re.search(r"url\(\s*['\"]?(?!data:)", rest)
    assert "@import" not in rest


def test_each_picture_is_embedded_once(page):
    html = page.read_text()
    found = re.findall(r"url\(data:image/jpeg;base64,([^)]*)\)", html)
    assert len(found) == 12 == len(set(re.findall(r"thumb (t\d+)", html)))
    assert all(base64.b64decode(data)[:2] == b"\xff\xd8" for data in found)
    assert html.count('class="thumb missing"') >= 2 and "1 of 13 pictures could not be made" in html


def test_a_picture_that_is_not_ready_in_time_has_a_place(demo):
    ids = [c["clip_id"] for c in demo.clips(columns=["clip_id"]).collect().to_dicts()]
    late = pictures(Selection(demo, None, None, ("clip_id",)), ids, 64, 0.0)
    assert len(late) == 13 and all(p.jpeg is None and p.problem for p in late.values())


def opened(browser, path: Path, scheme: str, width: int = 1200):
    """The page with all charts drawn, and what it complained about or asked the network for."""
    tab = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900}).new_page()
    trouble = []
    tab.on("console", lambda message: trouble.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: trouble.append(str(error)))
    tab.on(
        "request",
        lambda request: trouble.append(request.url) if not request.url.startswith(("file:", "data:")) else None,
    )
    tab.on("dialog", lambda dialog: (trouble.append("a dialog"), dialog.dismiss()))
    tab.goto(path.as_uri())
    until(tab, "document.documentElement.dataset.drawn !== undefined")
    return tab, trouble


@pytest.mark.parametrize("scheme, surface", [("light", "rgb(255, 255, 255)"), ("dark", "rgb(26, 28, 31)")])
def test_it_opens_in_a_browser_in_both_schemes(browser, page, scheme, surface):
    tab, trouble = opened(browser, page, scheme)
    drawn = (
        "[...document.querySelectorAll('.plot')].map((p) => p.querySelectorAll('.main-svg').length > 0 && "
        "p.clientWidth > 100)"
    )
    plots = tab.evaluate(drawn)
    assert len(plots) >= 20 and all(plots)
    marked = "p.querySelectorAll('.bars path, .points path, .hm image, .errorbar').length"
    marks = tab.evaluate(f"[...document.querySelectorAll('.plot')].map((p) => {marked})")
    assert all(marks), marks
    assert tab.evaluate("getComputedStyle(document.querySelector('.card')).backgroundColor") == surface
    bar = "getComputedStyle(document.querySelector('.plot .bars path')).fill"
    before = tab.evaluate(bar)
    tab.click("#theme")
    until(tab, "document.documentElement.dataset.drawn !== undefined")
    assert (
        tab.evaluate("getComputedStyle(document.querySelector('.card')).backgroundColor") != surface
        and tab.evaluate(bar) != before
    )
    assert trouble == []
    tab.context.close()


def test_it_fits_a_phone(browser, page):
    tab, trouble = opened(browser, page, "light", width=420)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 420 and trouble == []
    tab.context.close()


def test_an_empty_catalog_has_a_page_that_says_so(browser, tmp_path):
    done = report(Catalog.create(tmp_path / "empty"), tmp_path / "empty.html")
    assert done.clips == done.pictures == done.failed == 0
    tab, trouble = opened(browser, done.path, "light")
    assert "no video was ingested" in tab.inner_text("#funnel") and "There are no captions yet." in tab.inner_text(
        "#captions"
    )
    assert trouble == [] and tab.query_selector("#loss") is None
    tab.context.close()


def command(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "datakit", "catalog", "report", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_says_what_it_wrote(demo, tmp_path):
    said = command(
        demo.root,
        "-o",
        str(tmp_path / "a.html"),
        "--recipe",
        "default",
        "--where",
        "status = 'kept'",
        "--thumbnails",
        "0",
    )
    assert re.fullmatch(r"\S+a\.html: [\d.]+ MiB, 6 clips, [\d.]+ s, 0 thumbnails\n", said)
    html = (tmp_path / "a.html").read_text()
    assert "thresholds drawn from <b>default@" in html and "Left out: --thumbnails 0." in html


def test_the_command_draws_the_recipe_in_force(tmp_path):
    catalog = Catalog.create(tmp_path / "c")
    catalog.append("videos", [video(1, "/v", clip_count=1)])
    catalog.append("clips", [clip(1, 0, 100, blur=3.0)])
    decide_and_record(catalog, load_recipe("technical"))
    command(catalog.root, "-o", str(tmp_path / "b.html"))
    html = (tmp_path / "b.html").read_text()
    assert (
        "Recipe in force: <b>technical@" in html
        and '<td>≥ 4</td><td class="n">1 (100 %)</td><td class="n">0</td>' in html
    )


def test_what_cannot_be_done_is_one_clear_line(demo, tmp_path):
    with pytest.raises(CatalogError, match="no folder"):
        report(demo, tmp_path / "missing" / "report.html")
    with pytest.raises(CatalogError, match="is a folder"):
        report(demo, tmp_path)
    with pytest.raises(ConfigError, match="did you mean motion"):
        report(demo, tmp_path / "report.html", where="motoin > 3")
    assert list(tmp_path.iterdir()) == []


def test_a_snapshot_is_the_catalog_of_then(tmp_path):
    catalog = Catalog.create(tmp_path / "c")
    catalog.append("videos", [video(1, "/v", clip_count=1)])
    catalog.append("clips", [clip(1, 0, 100, motion=1.0)])
    before = ",".join(f"{name}={version}" for name, version in catalog.versions().items())
    catalog.append("videos", [video(2, "/w", clip_count=1)])
    catalog.append("clips", [clip(2, 0, 100, motion=2.0)])
    assert report(catalog, tmp_path / "now.html", thumbnails=0).clips == 2
    assert report(catalog, tmp_path / "then.html", thumbnails=0, snapshot=before).clips == 1
    assert "snapshot <b>" in (tmp_path / "then.html").read_text()
