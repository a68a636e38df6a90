"""`plan.html`: the plan at a glance, one page that opens without a network. The page and its charts are those of
`catalogs.report`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from catalogs.report.charts import ACCENT, OTHER, Figure, plain_bars
from datakit.html.page import Page, count, grid, hours, nothing, share, table, text, tile
from trainer.planning.plan import Bucket, Part

MOST_BARS = 24
CELL_PX = 34
DARK = 0.2
"""Share of the largest count from which a cell is drawn so strongly that its number needs the other ink."""
SAME_AREA = 1.3
"""Sizes of one resolution differ by less, resolutions by more."""


def picture(buckets: Sequence[Bucket], parts: Sequence[Part], counts: dict[str, Any], settings: dict[str, Any]) -> str:
    """The page.

    Args:
        counts: see `trainer.planning.statistics.count`.
        settings: as resolved.
    """
    page = Page("Training plan")
    page.header = _header(counts, settings)
    if len(parts) > 1:
        _mix(page, counts)
    _shapes(page, buckets, counts)
    _buckets(page, counts)
    _left_out(page, counts)
    return page.html()


def _header(counts: dict[str, Any], settings: dict[str, Any]) -> str:
    epoch = counts["epoch"]
    clips, trained, windows = (sum(p[k] for p in counts["parts"]) for k in ("clips", "trained", "windows"))
    tiles = [
        tile(
            "clips that train",
            count(trained),
            f"{share(trained, clips)} of {count(clips)}, in {count(windows)} windows",
        ),
        tile(
            "hours in an epoch",
            hours(epoch["hours"]),
            f"{count(epoch['samples'])} samples, {settings['fps']:g} frames/s where that is even",
        ),
        tile(
            "steps in an epoch",
            count(epoch["steps"]),
            f"of {epoch['global_batches']} micro-batches, {count(epoch['micro_batches'])} in all",
        ),
        tile(
            "tokens of a step", _short(counts["step"]["tokens"]), f"{counts['step']['samples']:.1f} samples on average"
        ),
        tile("balance", f"± {counts['balance']['cost']['spread']:.0%}", "spread of a micro-batch's computation"),
    ]
    sources = "".join(
        f'<p class="meta"><b>{text(p["name"])}</b>: {text(p["catalog"])} where {text(p["where"] or "anything")}</p>'
        for p in counts["parts"]
    )
    return f'<header><h1>Training plan</h1>{sources}<div class="tiles">{"".join(tiles)}</div></header>'


def _short(value: float) -> str:
    """Three digits and a unit."""
    power = next((p for p in (9, 6, 3) if value >= 10**p), 0)
    return f"{value / 10**power:.3g} { {9: 'G', 6: 'M', 3: 'k'}.get(power, '') }".strip()


def _mix(page: Page, counts: dict[str, Any]) -> None:
    rows = [
        (p["name"], *(count(p[k]) for k in ("clips", "trained", "windows")), share(p["share"], 1), f"{p['epochs']:.3g}")
        for p in counts["parts"]
    ]
    heads = ("part", "clips", "train", "windows", "share of samples", "times a window is seen in an epoch")
    page.section(
        "mix",
        "Mix",
        "How often the windows of each selection are drawn in an epoch.",
        table(heads, rows, numeric=range(1, 6)),
    )


def _shapes(page: Page, buckets: Sequence[Bucket], counts: dict[str, Any]) -> None:
    chart = page.chart(_shape_map(buckets, counts["buckets"]), "Windows by size and frames", wide=True)
    page.section(
        "shapes", "Shapes", "Height x width of the picture, and frames of the window. Numbers are windows.", grid(chart)
    )


def _buckets(page: Page, counts: dict[str, Any]) -> None:
    rows = sorted(counts["buckets"], key=lambda r: -r["cost_share"])
    shown = rows[:MOST_BARS]
    rest = f" The first {MOST_BARS} of {len(rows)}." if len(rows) > MOST_BARS else ""
    shares = page.chart(_shares(shown, counts["epoch"]["samples"]), "Where samples and computation go", wide=True)
    heads = (
        "bucket",
        "clips",
        "windows",
        "hours",
        "batch",
        "tokens",
        "micro-batches",
        "steps",
        "filled",
        "cost",
        "cut off",
        "used",
    )
    lines = [
        (
            r["name"],
            count(r["clips"]),
            count(r["windows"]),
            hours(r["hours"]),
            r["batch"],
            count(r["tokens"]),
            count(r["micro_batches"]),
            f"{r['steps']:,.1f}",
            *(share(r[k], 1) for k in ("fill", "cost_share", "crop", "used")),
        )
        for r in rows
    ]
    lead = "In per cent of an epoch: samples drawn from each bucket, and the operations that they take." + rest
    page.section("buckets", "Buckets", lead, grid(shares), table(heads, lines, numeric=range(1, 12)))


def _left_out(page: Page, counts: dict[str, Any]) -> None:
    rows = counts["left_out"]
    if not rows:
        page.section(
            "left-out",
            "Left out",
            "Selected clips that cannot train, by reason.",
            nothing("Every selected clip trains."),
        )
        return
    chart = page.chart(plain_bars([(r["kind"], r["clips"]) for r in rows], "clips", "--rejected"), "Clips left out")
    lines = [(r["kind"], count(r["clips"]), r["example"].partition(": ")[2]) for r in rows]
    examples = table(("reason", "clips", "for example"), lines, numeric=(1,))
    lead = "Selected clips that cannot train, by reason; left_out.arrow has each of them."
    page.section("left-out", "Left out", lead, grid(chart), examples)


def _shape_map(buckets: Sequence[Bucket], rows: Sequence[dict[str, Any]]) -> Figure:
    """Sizes down, frames across; colour by windows, on a scale of roots."""
    sizes = _by_resolution((b.height, b.width) for b in buckets)[::-1]
    lengths = sorted({b.frames for b in buckets})
    cells = {(b.height, b.width, b.frames): (r["windows"], b.batch) for b, r in zip(buckets, rows)}
    most = max(n for n, _ in cells.values())
    grid_of = [[cells.get((*size, n)) for n in lengths] for size in sizes]
    hover = [[_hover(size, n, cell) for n, cell in zip(lengths, row)] for size, row in zip(sizes, grid_of)]
    heat = {
        "type": "heatmap",
        "x": list(range(len(lengths))),
        "y": list(range(len(sizes))),
        "showscale": False,
        "z": [[cell and cell[0] ** 0.5 for cell in row] for row in grid_of],
        "zmin": 0,
        "zmax": most**0.5,
        "text": hover,
        "hovertemplate": "%{text}<extra></extra>",
        "xgap": 2,
        "ygap": 2,
        "colorscale": [[0, "--density-low"], [1, "--density-high"]],
    }
    ink = {True: "--on-status", False: "--text"}  # on dark cells, on light ones
    notes = [
        {
            "x": x,
            "y": y,
            "text": f"{cell[0]:,}",
            "showarrow": False,
            "font": {"size": 12, "color": ink[cell[0] > most * DARK]},
        }
        for y, row in enumerate(grid_of)
        for x, cell in enumerate(row)
        if cell
    ]
    across = {
        "tickvals": list(range(len(lengths))),
        "ticktext": [str(n) for n in lengths],
        "title": {"text": "frames", "standoff": 6},
    }
    down = {"tickvals": list(range(len(sizes))), "ticktext": [f"{h} x {w}" for h, w in sizes]}
    return {
        "data": [heat],
        "layout": {
            "height": 70 + CELL_PX * len(sizes),
            "margin": {"l": 90, "r": 10, "t": 8, "b": 44},
            "annotations": notes,
            "xaxis": {**across, "showgrid": False},
            "yaxis": {**down, "showgrid": False},
        },
    }


def _hover(size: tuple[int, int], frames: int, cell: tuple[int, int] | None) -> str:
    return (
        f"{size[0]} x {size[1]}, {frames} frames<br>{cell[0]:,} windows, micro-batches of {cell[1]}"
        if cell
        else "no windows"
    )


def _by_resolution(sizes: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Small resolutions first, wide before tall. Sizes of one resolution have about the same area."""
    classes: list[list[tuple[int, int]]] = []
    for size in sorted(set(sizes), key=lambda s: s[0] * s[1]):
        smallest = classes[-1][0] if classes else (0, 0)
        if size[0] * size[1] > SAME_AREA * smallest[0] * smallest[1]:
            classes.append([])
        classes[-1].append(size)
    return [size for sizes in classes for size in sorted(sizes, key=lambda s: -s[1] / s[0])]


def _shares(rows: Sequence[dict[str, Any]], whole: float) -> Figure:
    """Two bars for each bucket, the dearest on top.

    Args:
        whole: samples of an epoch.
    """
    drawn = plain_bars([(r["name"], round(100 * r["samples"] / whole, 2)) for r in rows], "% of samples", OTHER)
    figure = plain_bars([(r["name"], round(100 * r["cost_share"], 2)) for r in rows], "% of computation", ACCENT)
    figure["data"] = [
        drawn["data"][0] | {"name": "samples"},
        figure["data"][0] | {"name": "computation"},
    ]  # drawn from below
    legend = {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "traceorder": "reversed"}
    figure["layout"] |= {"barmode": "group", "showlegend": True, "legend": legend}
    figure["layout"]["margin"] = figure["layout"]["margin"] | {"t": 30}
    figure["layout"]["height"] += 30 + 8 * len(rows)
    return figure
