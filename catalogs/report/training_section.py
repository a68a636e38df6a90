"""The section "What training found"."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from catalogs.report import charts
from catalogs.report.collect import Content
from catalogs.report.training_losses import SURE, Hard, TrainedRun, Training
from datakit.html.page import Page, card, count, grid, nothing, table, text

KEY = "loss"
TITLE = "What training found"
MOST_SLICES, MOST_RUNS, MOST_BUCKETS = 12, 8, 5


def write_training(page: Page, c: Content) -> None:
    """Write it, where a run has entered losses."""
    t = c.training
    if t is None:
        return
    lead = (
        "Which clips training finds hard. Excess loss is what a clip's loss is above the running mean of its noise "
        "level and bucket; "
        "here, over that of all clips: to the right of the dotted line they train worse, to the left better. With "
        "standard errors."
    )
    if not t.clips:
        page.section(KEY, TITLE, lead, nothing(f"Run {t.run.run_id} has trained on none of these clips."))
        return
    kinds = [page.chart(charts.loss_dots(rows), title) for title, rows in t.kinds.items()]
    page.section(
        KEY,
        TITLE,
        lead,
        _which(t),
        grid(_off(t.worse, t, "worse"), _off(t.better, t, "better"), kind="fit"),
        _sheet(page, c, t),
        grid(*kinds, kind="columns"),
        _places(page, t),
    )


def _which(t: Training) -> str:
    r = t.run
    about = [
        f"run <b>{text(r.run_id)}</b>",
        text(", ".join(filter(None, (r.pipeline, r.status)))),
        f"steps <b>{count(r.from_step)} … {count(r.to_step)}</b>",
        f"clips <b>{count(t.clips)}</b>",
        f"samples <b>{count(t.samples)}</b>",
        f"mean of all <b>{_signed(t.mean)}</b>",
    ]
    line = f'<div class="stats">{"".join(f"<span>{one}</span>" for one in about if one)}</div>'
    return line + (_others(t) if len(t.runs) > 1 else "")


def _others(t: Training) -> str:
    def row(r: TrainedRun) -> tuple:
        name = f"{r.run_id}{' (shown)' if r is t.run else ''}"
        return (
            name,
            r.pipeline,
            r.status,
            f"{count(r.from_step)} … {count(r.to_step)}",
            count(r.clips),
            count(r.samples),
        )

    rows = [row(r) for r in t.runs[:MOST_RUNS]]
    heads = ("run", "pipeline", "status", "steps", "clips", "samples")
    note = '<p class="note">The newest is shown; --run ID shows another. The score “loss” is over all runs.</p>'
    return card(f"{count(len(t.runs))} runs", table(heads, rows, (3, 4, 5)), note)


def _off(rows: pl.DataFrame, t: Training, how: str) -> str:
    title = f"Kinds of clips that train {how}"
    if rows.is_empty():
        return card(title, nothing(f"No kind trains {how} than all clips by more than {SURE:.0f} standard errors."))
    cells = [
        (slice_, name, f"{_signed(mean)} ± {charts.number(error)}", count(clips), count(samples))
        for slice_, name, clips, samples, mean, error in rows.head(MOST_SLICES).iter_rows()
    ]
    more = f"{count(rows.height - MOST_SLICES)} more are in the charts. " if rows.height > MOST_SLICES else ""
    side = "above" if how == "worse" else "below"
    note = f'<p class="note">{more}By more than {SURE:.0f} standard errors {side} the mean of all clips.</p>'
    return card(title, table(("kind", "", "excess loss", "clips", "samples"), cells, (2, 3, 4)), note)


def _sheet(page: Page, c: Content, t: Training) -> str:
    if not c.thumbnails:
        return ""
    rows = [
        *(("Worst" if not i else "", t.worst[i : i + c.thumbnails]) for i in range(0, len(t.worst), c.thumbnails)),
        ("Best", t.best),
    ]
    inner = "".join(_row(page, label, clips) for label, clips in rows if clips)
    note = (
        '<p class="note">Below each: excess loss, samples, caption. In the order of how sure it is: a clip that was '
        "seen more often "
        "needs less excess. A high loss may be a wrong caption, a broken picture, or just much detail.</p>"
    )
    return (
        f'<div class="card"><h3>Clips</h3><div class="sheet" style="--thumbs:{c.thumbnails}">{inner}</div>{note}</div>'
    )


def _row(page: Page, label: str, clips: Sequence[Hard]) -> str:
    def thumb(clip: Hard) -> str:
        number, samples = f"<b>{_signed(clip.mean)}</b>", f"<span>{count(clip.samples)}</span>"
        return page.thumb(clip.clip_id, number, samples, text(clip.caption or "no caption"))

    thumbs = "".join(map(thumb, clips))
    return f'<div class="label">{text(label)}</div><div class="thumbs">{thumbs}</div>'


def _places(page: Page, t: Training) -> str:
    cards = []
    if t.levels:
        seen = dict(t.places["Bucket"].select("name", "samples").iter_rows()) if "Bucket" in t.places else {}
        most = sorted(t.levels, key=lambda name: (-seen.get(name, 0), name))
        left = f"The {MOST_BUCKETS} most frequent of {count(len(most))} buckets. " if len(most) > MOST_BUCKETS else ""
        note = f'<p class="note">{left}Running means where the run is now; 0 is data, 1 is noise.</p>'
        cards.append(
            page.chart(
                charts.level_lines({name: t.levels[name] for name in most[:MOST_BUCKETS]}), "Loss by noise level", note
            )
        )
    note = (
        '<p class="note">Near nothing by construction, as excess is over the running mean of just these; below '
        "while the loss falls.</p>"
    )
    cards += [page.chart(charts.loss_dots(rows), title, note) for title, rows in t.places.items()]
    return grid(*cards, kind="columns") if cards else ""


def _signed(value: float) -> str:
    return f"{'+' if value > 0 else '−' if value < 0 else ''}{charts.number(abs(value))}"
