"""The later sections of the page: what was written about the clips, what was learned from them, and the runs that did
it."""

from __future__ import annotations

import json

from catalogs.report import charts
from catalogs.report.caption_stats import SAMPLE
from catalogs.report.collect import Content, no_clips
from catalogs.report.counts import STATUSES
from catalogs.report.training_section import write_training
from datakit.html.page import Page, card, count, grid, hours, nothing, share, table, text

MOST_RUNS = 50


def write_history(page: Page, content: Content) -> None:
    """Captions, training, duplicates and splits, runs."""
    _captions(page, content)
    write_training(page, content)
    _duplicates(page, content)
    _runs(page, content)


def _captions(page: Page, c: Content) -> None:
    w, kept = c.words, c.facts.status["kept"][0]
    lead = "What the captions are like: how long, in which words, by which model, and what is wrong with them."
    share_missing = share(c.facts.uncaptioned, kept)
    missing = (
        f"{count(c.facts.uncaptioned)} of {count(kept)} kept clips have no caption that the recipe takes "
        f"({share_missing})."
    )
    if not w.captions and not w.by_style.height:
        why = "There are no captions yet." + (f" {missing}" if kept else "")
        page.section("captions", "Captions", lead, nothing(why))
        return
    if w.sampled < w.captions:
        lead += (
            f" Lengths and words are those of a random sample of {count(w.sampled)} captions (at most about "
            f"{count(SAMPLE)} are read)."
        )
    cards = []
    if w.lengths:
        low, middle, high = (count(q) for q in w.length_quantiles)
        stats = f'<div class="stats"><span>median <b>{middle}</b></span><span>5–95 % <b>{low} … {high}</b></span></div>'
        cards.append(page.chart(charts.histogram(w.lengths, "words", split=False), "Length, words", stats))
    if w.frequent:
        facts = (
            f'<div class="stats"><span>vocabulary <b>{count(w.vocabulary)}</b></span><span>words '
            f"<b>{count(w.words)}</b></span></div>"
        )
        note = (
            f'{facts}<p class="note">Share of captions that have the word; English words like “the” are left out.</p>'
        )
        pairs = [(word, 100 * part) for word, part in w.frequent]
        cards.append(
            page.chart(charts.plain_bars(pairs[:20], "% of captions", form=".1f"), "Most frequent words", note)
        )
    rows = [(style or "", model or "", count(n), count(failed)) for style, model, n, failed in w.by_style.iter_rows()]
    styles = table(("style", "model", "captions", "failed"), rows, (2, 3))
    tables = [card("By style and model", styles, f'<p class="note">{text(missing)}</p>')]
    flagged = [(flag, count(n), share(n, w.captions)) for flag, n in w.flags]
    flags = table(("flag", "captions", "share"), flagged, (1, 2)) if flagged else nothing("No caption is flagged.")
    tables.append(card("Flags", flags))
    page.section("captions", "Captions", lead, grid(*cards, f"<div>{''.join(tables)}</div>", kind="fit"))


def _duplicates(page: Page, c: Content) -> None:
    lead = "Which clips repeat others, and which side of training, validation and test the clips are on."
    d, f = c.duplicates, c.facts
    if not f.clips:
        page.section("duplicates", "Duplicates and splits", lead, nothing(no_clips(c)))
        return
    if not d.looked:
        found = card("Duplicates", nothing("Nobody has looked for duplicates yet (datakit run dedup does)."))
    elif not d.groups and not d.copies:
        found = card("Duplicates", nothing(f"None among {count(d.looked)} clips."))
    else:
        facts = [
            ("clips compared", count(d.looked)),
            ("groups of near-duplicates", count(d.groups)),
            ("clips that repeat a better one", count(d.copies)),
            *((f"  of these {kind}", count(n)) for kind, n in d.kinds),
        ]
        largest = [(count(size), count(groups)) for size, groups in d.sizes[:8]]
        if len(d.sizes) > 8:
            largest.append(
                (f"{count(d.sizes[8][0])} … {count(d.sizes[-1][0])}", count(sum(groups for _, groups in d.sizes[8:])))
            )
        sizes = card("Groups by size", table(("clips in the group", "groups"), largest, (0, 1)))
        found = card("Duplicates", table(("", "number"), facts, (1,))) + sizes
        found = f"<div>{found}</div>"
    rows = [
        (n, count(clips), share(clips, f.clips), count(k), hours(h), hours(kh))
        for n, clips, k, h, kh in f.splits.select("name", "clips", "kept", "hours", "kept_hours").iter_rows()
    ]
    splits = card("Splits", table(("split", "clips", "share", "kept", "hours", "kept hours"), rows, (1, 2, 3, 4, 5)))
    page.section("duplicates", "Duplicates and splits", lead, grid(found, splits, kind="fit"))


def _runs(page: Page, c: Content) -> None:
    lead = "What it took to make this catalog: the CPU time of every stage over all runs, and the runs, newest first."
    if not c.runs.height:
        page.section("runs", "Runs", lead, nothing("No run is recorded."))
        return
    parts = []
    if c.stages:
        total = sum(h for _, h in c.stages)
        kept_hours = c.facts.status["kept"][1]
        each = f", {charts.number(total / kept_hours)} for each kept hour" if kept_hours else ""
        note = f'<p class="note">{hours(total)} CPU hours in all{each}.</p>'
        parts.append(
            page.chart(
                charts.plain_bars(c.stages[:20], "CPU hours", form=",.3~g"), "CPU hours by stage", note, wide=True
            )
        )
    rows = []
    for run in c.runs.head(MOST_RUNS).iter_rows(named=True):
        rows.append(
            (
                f"{run['started_at']:%Y-%m-%d %H:%M}" if run["started_at"] else "",
                *(run[name] or "" for name in ("pipeline", "status", "author")),
                _duration(run["wall_s"]),
                *("" if run[h] is None else hours(run[h]) for h in ("cpu_hours", "gpu_hours")),
                _outcome(run["counts"]),
                run["run_id"] or "",
            )
        )
    heads = ("started, UTC", "pipeline", "status", "by", "time", "CPU h", "GPU h", "outcome", "run")
    more = (
        f'<p class="note">The newest {MOST_RUNS} of {count(c.runs.height)} runs.</p>'
        if c.runs.height > MOST_RUNS
        else ""
    )
    parts.append(
        card(f"{count(c.runs.height)} {'run' if c.runs.height == 1 else 'runs'}", table(heads, rows, (4, 5, 6)), more)
    )
    page.section("runs", "Runs", lead, *parts)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    return (
        f"{whole // 60} min {whole % 60:02d} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    )


def _outcome(counts: str | None) -> str:
    """A few words of the counts that a run recorded: its error, the kept clips of its funnel, or its plain numbers."""
    try:
        known = json.loads(counts or "{}")
    except ValueError:
        return ""
    if not isinstance(known, dict):
        return ""
    if "error" in known:
        return str(known["error"])[:160]
    funnel = known.get("funnel", known)
    if isinstance(funnel, dict) and all(status in funnel for status in STATUSES):
        return f"{count(funnel['kept'])} of {count(funnel.get('clips', 0))} clips kept"
    numbers = [
        f"{name} {value:,}" for name, value in known.items() if isinstance(value, int) and not isinstance(value, bool)
    ]
    return ", ".join(numbers[:4])
