"""The sections of the page, in their order."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from catalogs.report import charts
from catalogs.report.collect import Content, no_clips
from catalogs.report.counts import Failure
from catalogs.report.run_history import write_history
from catalogs.report.score_distributions import Distribution, Picks, Side
from datakit.html.page import Page, card, count, grid, hours, nothing, share, table, text, tile

MOST_ROWS = 25
KEY = (
    '<div class="key"><span><i style="background:var(--kept)"></i>kept</span>'
    '<span><i style="background:var(--other)"></i>rejected, pending or quarantined</span>{line}</div>'
)
LINE_KEY = '<span><i class="line"></i>threshold of the recipe</span>'


def write_sections(page: Page, content: Content) -> None:
    """Write all of them."""
    _header(page, content)
    _funnel(page, content)
    _scores(page, content)
    _density(page, content)
    _footage(page, content)
    _sources(page, content)
    _quarantine(page, content)
    _sheets(page, content)
    write_history(page, content)


def _header(page: Page, c: Content) -> None:
    f = c.facts
    videos, kept = sum(f.videos.values()), f.status["kept"]
    every = sum(h for _, h in f.status.values())
    snapshot = f"snapshot <b>{text(c.snapshot)}</b>" if c.snapshot else "the catalog as it was then"
    versions = ", ".join(f"{name} {version}" for name, version in c.versions.items())
    hint = f"table versions: {text(versions)}"
    lines = [f'Made {c.made_at:%Y-%m-%d %H:%M} UTC from <b>{text(c.root)}</b>, <span title="{hint}">{snapshot}</span>']
    if c.recipe is not None and c.decided_by == [c.recipe]:
        lines.append(f"Recipe in force: <b>{text(c.recipe)}</b>")
    else:
        decided = text(", ".join(c.decided_by) or "nothing yet")
        lines.append(f"Decided by <b>{decided}</b>; thresholds drawn from <b>{text(c.recipe or 'none')}</b>")
    if c.where is not None:
        lines.append(f"Clips where <code>{text(c.where)}</code>; videos and runs are those of the whole catalog")
    tiles = [
        tile("Videos", count(videos), f"{count(f.videos.get('ok', 0))} ok"),
        tile("Clips", count(f.clips), "candidates"),
        tile("Kept clips", count(kept[0]), share(kept[0], f.clips)),
        tile("Hours of clips", hours(every), f"of {hours(f.video_hours)} h of video"),
        tile("Hours kept", hours(kept[1]), share(kept[1], every)),
    ]
    name = c.root.rstrip("/").rsplit("/", 1)[-1]
    meta = "".join(f'<p class="meta">{line}</p>' for line in lines)
    page.header = f'<header><h1>{text(name)}</h1>{meta}<div class="tiles">{"".join(tiles)}</div></header>'


def _funnel(page: Page, c: Content) -> None:
    f = c.facts
    every, total_hours = f.clips, sum(h for _, h in f.status.values())
    lead = (
        "Where every video and every clip is: videos become clips, and the rules of the recipe say which clips "
        "are kept."
    )
    videos = sum(f.videos.values())
    found = {status: f.videos.get(status, 0) for status in ("ok", "quarantined", "pending")}
    video_rows = [(status, count(n), share(n, videos)) for status, n in found.items()]
    clip_rows = [(s, count(n), share(n, every), hours(h), share(h, total_hours)) for s, (n, h) in f.status.items()]
    if not videos and not every:
        page.section("funnel", "Funnel", lead, nothing("There is nothing in this catalog yet: no video was ingested."))
        return
    parts = [
        grid(
            card("Videos", table(("status", "videos", "share"), video_rows, (1, 2))),
            card("Clips", table(("status", "clips", "share", "hours", "share"), clip_rows, (1, 2, 3, 4))),
            kind="fit",
        )
    ]
    parts.insert(
        0,
        page.chart(charts.status_bars(f.status), "Clips and hours by status", wide=True)
        if every
        else nothing(no_clips(c)),
    )
    rejected = f.status["rejected"][0]
    if f.rejections.height:
        rows = [(rule, count(n), share(n, rejected), count(alone)) for rule, n, alone in f.rejections.iter_rows()]
        numbers = card("Rejections by rule", table(("rule", "rejects", "of rejected", "it alone"), rows, (1, 2, 3)))
        legend = page.chart(
            charts.rejection_bars(f.rejections.head(20)),
            "Clips that each rule rejects",
            '<p class="note">Full colour: clips that no other rule rejects. They would come back without this '
            "rule.</p>",
        )
        parts.append(grid(legend, numbers, kind="fit"))
    more = []
    if f.waiting.height:
        waiting = [(rule, count(n)) for rule, n in f.waiting.iter_rows()]
        more.append(card("Pending: rules that wait for a score", table(("rule", "clips"), waiting, (1,))))
    if f.levels.height > 1:
        more.append(card("Kept, by the level they reach", _tallied("level", f.levels, kept=False)))
    parts += [grid(*more, kind="fit")] if more else []
    page.section("funnel", "Funnel", lead, *parts)


def _scores(page: Page, c: Content) -> None:
    lead = (
        "How each score is distributed over the clips, with the recipe's thresholds drawn in and the clips either "
        "side counted. "
        "Axes leave out 0.1 % of the clips at either end; where the tail is long they are logarithmic."
    )
    if not c.scores:
        page.section("scores", "Scores", lead, nothing("No clip has a score." if c.facts.clips else no_clips(c)))
        return
    parts = [KEY.format(line=LINE_KEY if c.rules else ""), grid(*(_score_card(page, c, d) for d in c.scores))]
    if c.blank:
        parts.append(f'<p class="note">Not measured on any clip: {text(", ".join(c.blank))}.</p>')
    if c.unread:
        rows = [(u.rule, u.level or "", u.text, u.why) for u in c.unread]
        parts.append(card("Rules without a drawn threshold", table(("rule", "level", "condition", "why"), rows)))
    elif not c.rules:
        parts.append(
            '<p class="note">No recipe is recorded in the catalog, so there are no thresholds to draw; --recipe '
            "names one.</p>"
        )
    page.section("scores", "Scores", lead, *parts)


def _score_card(page: Page, c: Content, d: Distribution) -> str:
    low, middle, high = (charts.number(q) for q in d.quantiles)
    facts = [
        f"median <b>{middle}</b>",
        f"5–95 % <b>{low} … {high}</b>",
        f"measured <b>{count(d.measured)}</b>",
        f"not measured <b>{count(d.missing)}</b>" if d.missing else "",
    ]
    if d.lowest == d.highest:
        facts = [f"every measured clip has <b>{charts.number(d.lowest)}</b>", *facts[2:]]
    if d.zeros:
        facts.append(f"exactly 0, not drawn: <b>{count(d.zeros)}</b> ({share(d.zeros, d.measured)})")
    if d.below or d.above:
        facts.append(f"beyond the axis: <b>{count(d.below)}</b> lower, <b>{count(d.above)}</b> higher")
    stats = f'<div class="stats">{"".join(f"<span>{fact}</span>" for fact in facts if fact)}</div>'
    below = stats + _sides_table(c, d.sides, d.measured)
    figure = page.chart(charts.score_histogram(d, d.column.unit), "", below)
    head = f'<h3>{text(d.column.name)}</h3><p class="meaning">{text(d.column.meaning)}</p>'
    return figure.replace('<figure class="card">', f'<figure class="card">{head}', 1)


def _sides_table(c: Content, sides: Sequence[Side], measured: int) -> str:
    if not sides:
        return ""
    rows = [
        (
            s.threshold.rule,
            f"{s.threshold.sign} {_value(s)}{f' {s.threshold.level}' if s.threshold.level else ''}",
            f"{count(s.failing)} ({share(s.failing, measured)})",
            count(s.passing),
        )
        for s in sides
    ]
    written = {(rule.name, rule.level): rule.keep for rule in c.rules}
    hints = [f"the whole rule: {written.get((s.threshold.rule, s.threshold.level), '')}" for s in sides]
    return table(("rule", "keeps", "fails", "passes"), rows, (2, 3), hints, tight=True)


def _value(side: Side) -> str:
    t = side.threshold
    return charts.number(t.value) if _is_number(t.text) else f"{charts.number(t.value)} = {t.text}"


def _is_number(written: str) -> bool:
    return written.replace(".", "", 1).lstrip("-").isdigit()


def _density(page: Page, c: Content) -> None:
    d = c.density
    lead = "How motion and another score lie together."
    if d is None:
        page.section(
            "density", "Motion and looks", lead, nothing("No clip has motion and one of aesthetic, blur or brightness.")
        )
        return
    lead = (
        f"How motion and {d.y.name} lie together, on the {count(d.clips)} clips that have both; "
        "the colour counts clips, on a logarithmic scale."
    )
    if d.y.name != "aesthetic":
        lead += f" No clip has an aesthetic score, so {d.y.name} stands in for it."
    page.section("density", "Motion and looks", lead, page.chart(charts.density_map(d), wide=True))


def _footage(page: Page, c: Content) -> None:
    lead = (
        "What kind of footage the clips are: how long, how large, what shape, how fast, how coded, and how the "
        "camera moves."
    )
    if not c.facts.clips:
        page.section("footage", "Footage", lead, nothing(no_clips(c)))
        return
    cards = []
    if c.facts.durations:
        d = c.facts.durations
        figure = charts.histogram(d, "s")
        ends = f"<span>beyond the axis: <b>{count(d['below'])}</b> lower, <b>{count(d['above'])}</b> higher</span>"
        beyond = f'<div class="stats">{ends}</div>'
        below = (beyond if d["below"] or d["above"] else "") + _sides_table(c, c.duration_sides, len(c.facts.seconds))
        charts.draw_thresholds(figure, d, c.duration_sides)
        cards.append(page.chart(figure, "Duration, s", below))
    cards += [page.chart(charts.kept_bars(rows), title) for title, rows in c.facts.kinds.items()]
    page.section(
        "footage", "Footage", lead, KEY.format(line=LINE_KEY if c.duration_sides else ""), grid(*cards, kind="columns")
    )


def _sources(page: Page, c: Content) -> None:
    lead = (
        "Where the clips come from (the host of their source, or the folder of the file) and under which licence "
        "they may be used."
    )
    if not c.facts.clips:
        page.section("sources", "Sources and licences", lead, nothing(no_clips(c)))
        return
    page.section(
        "sources",
        "Sources and licences",
        lead,
        grid(
            card("Sources", _tallied("source", c.facts.sources)),
            card("Licences", _tallied("licence", c.facts.licenses)),
            kind="fit",
        ),
    )


def _tallied(name: str, rows: pl.DataFrame, kept: bool = True) -> str:
    """The first names of a tally and, in one line, all others."""
    columns = ["clips", "kept", "hours", "kept_hours"]
    shown = list(rows.head(MOST_ROWS).select("name", *columns).iter_rows())
    if rows.height > MOST_ROWS:
        shown.append(
            (f"{count(rows.height - MOST_ROWS)} others", *rows.slice(MOST_ROWS).select(pl.col(columns).sum()).row(0))
        )
    cells = [(n, count(clips), count(k), share(k, clips), hours(h), hours(kh)) for n, clips, k, h, kh in shown]
    if not kept:
        return table((name, "clips", "hours"), [(row[0], row[1], row[4]) for row in cells], (1, 2))
    return table((name, "clips", "kept", "share", "hours", "kept hours"), cells, (1, 2, 3, 4, 5))


def _quarantine(page: Page, c: Content) -> None:
    videos, clips = c.failures
    lead = (
        "What could not be processed, by kind, with examples; nothing of it is lost, datakit run … --retry-failed "
        "tries again."
    )
    if not videos and not clips:
        page.section(
            "quarantine",
            "Quarantine",
            lead,
            nothing("Nothing is in quarantine: every video and every clip was processed."),
        )
        return
    parts = [
        card(title, _failed(rows, what))
        for title, rows, what in (("Videos", videos, "videos"), ("Clips", clips, "errors"))
        if rows
    ]
    page.section("quarantine", "Quarantine", lead, *parts)


def _failed(failures: list[Failure], what: str) -> str:
    rows = []
    for failure in failures:
        for i, (where, message) in enumerate(failure.examples):
            rows.append((failure.kind if i == 0 else "", count(failure.count) if i == 0 else "", where, message))
    return table(("kind", what, "for example", "message"), rows, (1,))


def _sheets(page: Page, c: Content) -> None:
    lead = (
        "What the scores mean in pictures: the middle frame of clips at both ends of each score, and of those "
        "nearest a threshold. "
        "Point at a picture for its file and time."
    )
    shown = [d for d in c.scores if d.picks]
    if not shown:
        why = (
            "Left out: --thumbnails 0."
            if not c.thumbnails
            else "No score tells any two clips apart."
            if c.facts.clips
            else no_clips(c)
        )
        page.section("sheets", "Contact sheets", lead, nothing(why))
        return
    failed = sum(p.jpeg is None for p in page.pictures.values())
    told = f"{count(failed)} of {count(len(page.pictures))} pictures could not be made; their places say why."
    note = f'<p class="note">{told}</p>' if failed else ""
    cards = []
    for d in shown:
        rows = "".join(_sheet_row(page, row) for row in d.picks)
        head = f'<h3>{text(d.column.name)} <span class="unit">{text(d.column.unit)}</span></h3>'
        cards.append(f'<div class="card">{head}<div class="sheet" style="--thumbs:{c.thumbnails}">{rows}</div></div>')
    same = [d.column.name for d in c.scores if not d.picks]
    without = (
        f'<p class="note">Without a sheet, as all clips have the same value: {text(", ".join(same))}.</p>'
        if same
        else ""
    )
    page.section("sheets", "Contact sheets", lead, *cards, note, without)


def _sheet_row(page: Page, row: Picks) -> str:
    badges = {None: "", True: '<span class="badge in">passes</span>', False: '<span class="badge out">fails</span>'}
    thumbs = "".join(page.thumb(clip_id, charts.number(score), badges[keeps]) for clip_id, score, keeps in row.clips)
    tied = f"<small>drawn from {count(row.tied)} equal clips</small>" if row.tied else ""
    return f'<div class="label">{text(row.label)}{tied}</div><div class="thumbs">{thumbs}</div>'
