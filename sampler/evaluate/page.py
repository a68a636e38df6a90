"""The page of an evaluation: one HTML file that opens without a network (the videos it links to stay where they
are)."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from catalogs.query.selection import Selection
from catalogs.report import write_page as write_file
from catalogs.report.charts import number
from catalogs.report.contact_sheets import pictures
from catalogs.tables.catalog import Catalog
from datakit.html.page import Page, Picture, card, count, grid, nothing, table, text, tile
from sampler.evaluate.baselines import MOST_NOISE
from sampler.evaluate.charts import colour, distance_dots, neighbour_histogram, overlaid
from sampler.evaluate.distances import KernelDistance, Measured, Spread
from sampler.evaluate.distributions import ScoreComparison
from sampler.evaluate.grid import Cell, Row, make_grid
from sampler.evaluate.memorization import Neighbour

if TYPE_CHECKING:
    from sampler.evaluate.result import Evaluation

PAIRS = 12
"""Samples shown beside their nearest training clips."""
SIDE = 256
PICTURES_S = 60.0
SHORT = 16


def write_page(found: Evaluation, out: Path, prompts: int) -> int:
    """Write the page; its bytes.

    Raises:
        CatalogError: it cannot be written.
    """
    pairs = _pairs(found)
    page = Page("datakit evaluation", pictures=_pictures(found, pairs))
    _header(page, found)
    _distances(page, found)
    _scores(page, found)
    _memorisation(page, found, pairs)
    _grid(page, found, out, prompts)
    _preferences(page, found)
    return write_file(out, page.html())


def _header(page: Page, found: Evaluation) -> None:
    where = f" where <code>{text(found.where)}</code>" if found.where else ""
    lines = [f"Made {found.made_at:%Y-%m-%d %H:%M} UTC. Training footage: <b>{text(found.catalog)}</b>{where}"]
    lines += [
        f"{_key(i)}<b>{text(s.label)}</b>: {text(s.checkpoint or 'checkpoint unknown')} "
        f"<code>{text(s.checkpoint_hash[:12])}</code>, samples in {text(s.root)}"
        for i, s in enumerate(found.sets)
    ]
    samples = sum(s.rows.height for s in found.sets)
    asked = len({prompt for s in found.sets for prompt in s.rows["prompt"]})
    flagged, memory = len(found.memorisation.flagged), found.memorisation
    tiles = [
        tile("Samples", count(samples), f"of {count(asked)} prompts"),
        tile("Checkpoints", count(len(found.sets))),
        tile("Training clips", count(found.clips), "compared with"),
    ]
    measured = [(d.frechet, d.label) for d in found.features.distances if d.kind == "samples" and d.frechet is not None]
    if measured:
        nearest, label = min(measured, key=lambda each: each[0].value.mean)
        note = f"{label}; noise floor {number(nearest.floor.mean)}"
        tiles.append(tile("Fréchet distance", number(nearest.value.mean), note))
    if memory.threshold is not None:
        tiles.append(tile("Flagged samples", count(flagged), "too near to a training clip"))
    meta = "".join(f'<p class="meta">{line}</p>' for line in lines)
    page.header = (
        f'<header><h1>Samples beside their footage</h1>{meta}<div class="tiles">{"".join(tiles)}</div></header>'
    )


def _distances(page: Page, found: Evaluation) -> None:
    f = found.features
    if f.problem:
        page.section(
            "distances",
            "Distances",
            "How far the samples are from the training footage.",
            nothing(_sentence(f.problem)),
        )
        return
    lead = (
        f"How far each set of videos is from the training footage, by the features of {f.model} ({count(f.real)} "
        f"clips). "
        f"The noise floor is what as many real clips, held out, get against the same others: mean and standard "
        f"deviation over "
        f"{found.splits} seeded splits. A set on its floor cannot be told from the footage by these features with so "
        f"few videos."
    )
    rows = [
        (
            _whole(d.label),
            count(d.count),
            _spread(d.frechet, "value"),
            _spread(d.frechet, "floor"),
            count(d.frechet.count) if d.frechet else "–",
            _kernel(d.kernel),
            _spread(d.kernel_splits, "floor"),
        )
        for d in f.distances
    ]
    heads = ("set", "videos", "Fréchet distance", "noise floor", "videos in a split", "kernel distance", "noise floor")
    told = [_verdict(found, s.label) for s in found.sets]
    few = [d.label for d in f.distances if d.frechet is None]
    notes = (
        [f"Not enough for a Fréchet distance (two videos and four training clips are the least): {', '.join(few)}."]
        if few
        else []
    )
    if any(d.kind == "noise" for d in f.distances):
        notes.append(
            f"Noise: Gaussian pixels, at most {MOST_NOISE} videos. Mean frame: the mean of training clips' middle "
            f"frames, held "
            "still. Both are of the samples' sizes and went through the same encoder and stages."
        )
    notes.append(
        "Fréchet distance: squared, of Gaussians fitted to unit vectors, ± the spread over splits. Kernel distance: "
        "as KID, "
        "unbiased, polynomial of degree 3, of all videos to all clips, ± the standard error over blocks."
    )
    parts = [f'<p class="lead"><b>{text(sentence)}</b></p>' for sentence in told if sentence]
    if any(d.frechet for d in f.distances):
        below = (
            '<div class="key"><span><i style="background:var(--other)"></i>noise floor at the same count</span></div>'
        )
        figure = distance_dots(f, [s.label for s in found.sets])
        parts.append(page.chart(figure, "Fréchet distance to the training footage", below, wide=True))
    parts.append(
        card(
            "In numbers",
            table(heads, rows, range(1, 7)),
            "".join(f'<p class="note">{text(note)}</p>' for note in notes),
        )
    )
    page.section("distances", "Distances", lead, *parts)


def _verdict(found: Evaluation, label: str) -> str:
    nearer = found.features.nearer(label) if any(d.label == label for d in found.features.distances) else {}
    if not nearer:
        return ""
    yes, no = ([name for name, is_nearer in nearer.items() if is_nearer == wanted] for wanted in (True, False))
    parts = [f"nearer to the training footage than {' and '.join(yes)}"] if yes else []
    parts += [f"no nearer {'' if yes else 'to the training footage '}than {' and '.join(no)}"] if no else []
    return f"Samples of {label} are {', but '.join(parts)}."


def _scores(page: Page, found: Evaluation) -> None:
    lead = (
        "The same stages over samples and training clips; only numbers made at one fingerprint are compared. "
        "Distances: "
        "Kolmogorov-Smirnov (0 … 1), and the shift (first Wasserstein distance in standard deviations of the "
        "training clips), "
        "each with the noise floor that as many real clips have."
    )
    if not found.scores:
        why = (
            "No score is on both sides."
            if found.not_compared
            else "The training clips have no scores: datakit run score fills them."
        )
        parts = [nothing(why)]
    else:
        keys = "".join(f"<span>{_key(i)}{text(s.label)}</span>" for i, s in enumerate(found.sets))
        parts = [
            f'<div class="key"><span><i style="background:var(--other)"></i>training clips</span>{keys}</div>',
            grid(*(_score(page, found, c) for c in found.scores)),
        ]
    left = (
        [card("Stages that did not run on the samples", table(("stage", "why"), found.stages_not_run))]
        if found.stages_not_run
        else []
    )
    if found.not_compared:
        left.append(
            card(
                "Not compared",
                table(("score", "samples of", "why"), [(n.column, n.label, n.why) for n in found.not_compared]),
            )
        )
    parts += [f'<div style="margin-top:14px">{each}</div>' for each in left]
    if found.left_out:
        told = ", ".join(f"{stage} {count(clips)}" for stage, clips in found.left_out)
        parts.append(
            f'<p class="note">Training clips left out, as they have the stage at another fingerprint than most: '
            f"{text(told)}.</p>"
        )
    page.section("scores", "Scores side by side", lead, *parts)


def _score(page: Page, found: Evaluation, c: ScoreComparison) -> str:
    rows = [("training", count(len(c.real)), number(c.median), "", "")]
    rows += [
        (_whole(s.label), count(len(s.values)), number(s.median), _with_floor(s.ks), _with_floor(s.shift))
        for s in c.sets
    ]
    below = table(("", "n", "median", "KS (floor)", "shift, σ (floor)"), rows, (1, 2, 3, 4), tight=True)
    figure = page.chart(overlaid(c, [s.label for s in found.sets]), "", below)
    head = f'<h3>{text(c.column.name)}</h3><p class="meaning">{text(c.column.meaning)}</p>'
    return figure.replace('<figure class="card">', f'<figure class="card">{head}', 1)


def _memorisation(page: Page, found: Evaluation, pairs: Sequence[Neighbour]) -> None:
    m = found.memorisation
    lead = (
        "Whether samples repeat training clips: how far each is from its nearest one, beside the same of clips "
        "that were not trained on."
    )
    if m.problem:
        page.section("memorisation", "Memorisation", lead, nothing(_sentence(m.problem)))
        return
    if m.threshold is None:
        told = "Not enough training clips to hold any out: distances are shown, none is flagged."
    else:
        told = (
            f"Held out: {m.held_from}; their near-duplicates do not count as neighbours. The 1st percentile of their "
            f"{count(len(m.held))} distances is {number(m.threshold)}: {count(len(m.flagged))} of "
            f"{count(len(m.neighbours))} samples "
            "are nearer and flagged."
        )
    keys = "".join(f"<span>{_key(i)}{text(s.label)}</span>" for i, s in enumerate(found.sets))
    below = (
        f'<div class="key"><span><i style="background:var(--other)"></i>held-out clips</span>{keys}'
        '<span><i class="line"></i>1st percentile</span></div>'
    )
    shown = "".join(_pair(page, found, n) for n in pairs)
    title = (
        "Flagged samples and their nearest training clips"
        if m.flagged
        else "The nearest samples and their training clips"
    )
    columns = "grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:16px 24px"
    figure = neighbour_histogram(m, [s.label for s in found.sets])
    page.section(
        "memorisation",
        "Memorisation",
        lead,
        f'<p class="lead">{text(told)}</p>',
        page.chart(figure, "Distance to the nearest training clip", below, wide=True),
        card(title, f'<div class="thumbs" style="{columns}">{shown}</div>'),
    )


def _pair(page: Page, found: Evaluation, n: Neighbour) -> str:
    badge = '<span class="badge out">flagged</span>' if n.flagged else ""
    left = page.thumb(n.sample_id, text("sample"), badge)
    right = page.thumb(n.clip_id, text("training clip"))
    source = ", the clip of its own caption" if n.is_source else ""
    told = f"{text(n.label)}: <b>{number(n.distance)}</b>{source} · {text(_prompt(found, n.sample_id))}"
    return (
        f'<div><div class="thumbs" style="grid-template-columns:1fr 1fr">{left}{right}</div>'
        f'<p class="words" style="display:block;margin:4px 0 0;font-size:12px;color:var(--muted)">{told}</p></div>'
    )


def _grid(page: Page, found: Evaluation, out: Path, prompts: int) -> None:
    made = make_grid(found.sets, prompts)
    lead = "The same prompt, seed and number by each checkpoint: first, middle and last frame. A click opens the video."
    if not made.rows:
        page.section("prompts", "Prompts", lead, nothing("Left out: --prompts 0."))
        return
    head = "".join(f"<th>{_key(i)}{text(label)}</th>" for i, label in enumerate(made.labels))
    body = "".join(_row(row, out) for row in made.rows)
    hidden = made.every - len(made.rows)
    more = f'<p class="note">{count(hidden)} more are not shown (--prompts N).</p>' if hidden else ""
    rows = (
        f'<div class="scroll"><table><thead><tr><th>prompt</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )
    page.section("prompts", "Prompts", lead, f'<div class="card">{rows}{more}</div>')


def _row(row: Row, out: Path) -> str:
    told = (
        f'<b>{text(row.prompt or "(no prompt)")}</b><br><span class="note">seed {row.seed}, number {row.number}</span>'
    )
    return f'<tr><td style="width:26%">{told}</td>{"".join(f"<td>{_cell(cell, out)}</td>" for cell in row.cells)}</tr>'


def _cell(cell: Cell | None, out: Path) -> str:
    if cell is None:
        return '<span class="note">not sampled</span>'
    if cell.strip is None:
        return f'<span class="note">{text(cell.problem)}</span>'
    data = base64.b64encode(cell.strip).decode()
    picture = f'<img alt="" style="display:block;max-width:100%;border-radius:6px" src="data:image/jpeg;base64,{data}">'
    return f'<a href="{text(_link(cell.file, out))}" title="{text(cell.file)}">{picture}</a>'


def _link(file: str, out: Path) -> str:
    """From the page to a file: relative, so that both can move together."""
    return file if "://" in file else quote(os.path.relpath(file, out.resolve().parent))


def _preferences(page: Page, found: Evaluation) -> None:
    if not found.preferences:
        return
    lead = (
        "What people preferred, shown pairs of the same prompt without being told whose they are (datakit eval prefer)."
    )
    rows = [
        (
            t.a,
            t.b,
            count(t.wins_a),
            count(t.ties),
            count(t.wins_b),
            "–" if t.rate is None else f"{t.rate:.0%}",
            "–" if t.low is None else f"{t.low:.0%} … {t.high:.0%}",
        )
        for t in found.preferences
    ]
    heads = ("A", "B", "A preferred", "ties", "B preferred", "win rate of A", "95 % interval")
    page.section(
        "preferences",
        "Preferences",
        lead,
        card("Votes", table(heads, rows, range(2, 7)), '<p class="note">Win rate without ties; Wilson interval.</p>'),
    )


def _pairs(found: Evaluation) -> list[Neighbour]:
    m = found.memorisation
    return (m.flagged or m.neighbours)[:PAIRS]


def _pictures(found: Evaluation, pairs: Sequence[Neighbour]) -> dict[str, Picture]:
    """Middle frames of both sides of the pairs: of samples by their sample id, of training clips by clip id."""
    shown = pictures(
        Selection(Catalog(found.catalog), None, None, ("clip_id",)), [n.clip_id for n in pairs], SIDE, PICTURES_S
    )
    for s in found.sets:
        own = {n.sample_id for n in pairs}
        clips = dict(row for row in s.videos.select("sample_id", "clip_id").iter_rows() if row[0] in own)
        drawn = pictures(Selection(Catalog(s.root), None, None, ("clip_id",)), clips.values(), SIDE, PICTURES_S)
        shown |= {sample: drawn[clip] for sample, clip in clips.items() if clip in drawn}
    return shown


def _prompt(found: Evaluation, sample_id: str) -> str:
    return next(
        (row[0] for s in found.sets for row in s.rows.select("prompt", "sample_id").iter_rows() if row[1] == sample_id),
        "",
    )


def _key(index: int) -> str:
    """A small square of a checkpoint's colour."""
    box = "display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px;vertical-align:-1px"
    return f'<i style="{box};background:var({colour(index)[0]})"></i>'


def _sentence(problem: str) -> str:
    return f"{problem[:1].upper()}{problem[1:].rstrip('.')}."


def _whole(label: str) -> str:
    """A short label that does not break at its hyphens."""
    return label.replace("-", "\u2011") if len(label) <= SHORT else label


def _spread(measured: Measured | None, part: str) -> str:
    if measured is None:
        return "–"
    spread: Spread = getattr(measured, part)
    return f"{spread.mean:.4g} ± {spread.std:.2g}"


def _kernel(distance: KernelDistance | None) -> str:
    if distance is None:
        return "–"
    return f"{distance.mean:.3g}" + ("" if distance.error is None else f" ± {distance.error:.2g}")


def _with_floor(measured: Measured | None) -> str:
    return "–" if measured is None else f"{measured.value.mean:.2f} ({measured.floor.mean:.2f})"
