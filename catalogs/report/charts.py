"""Charts as plain plotly figures, `{"data": …, "layout": …}`. Colours are names of CSS variables: the page puts in
those of its scheme, light or dark. Texts from data are escaped here, as plotly reads tags in them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape as escaped

import polars as pl

from catalogs.report.score_distributions import Density, Distribution, Side

KEPT, OTHER, ACCENT, WARM, LINE = "--kept", "--other", "--accent", "--rejected", "--threshold"
STATUS_COLOURS = {"kept": "--kept", "rejected": "--rejected", "pending": "--pending", "quarantined": "--quarantined"}
CHARACTER_PX, PLOT_PX = 6.4, 250
ROW_PX, LONGEST_LABEL = 22, 34
MOST_BARS = 14

Figure = dict


def score_histogram(d: Distribution, unit: str) -> Figure:
    """Kept on others, stacked; thresholds as lines with their value above."""
    bins = {"log": d.log, "edges": d.edges, "kept": d.kept, "other": d.other}
    figure = histogram(bins, unit)
    draw_thresholds(figure, bins, d.sides)
    return figure


def histogram(bins: dict, unit: str, split: bool = True) -> Figure:
    """Of `numbers.binned`.

    Args:
        split: kept and other clips apart.
    """
    edges, log = bins["edges"], bins["log"]
    centres = [(a + b) / 2 for a, b in zip(edges, edges[1:])]
    names = [f"{number(10**a if log else a)} … {number(10**b if log else b)}" for a, b in zip(edges, edges[1:])]
    whole = edges[1] - edges[0] == 1 and edges[0] % 1 == 0.5
    if whole:
        names = [f"{c:.0f}" for c in centres]
    parts = [("kept", bins["kept"], KEPT), ("other", bins["other"], OTHER)] if split else [("", bins["other"], ACCENT)]
    data = [
        {
            "type": "bar",
            "name": name,
            "x": centres,
            "y": counts,
            "customdata": names,
            "marker": {"color": colour, "line": {"width": 0}},
            "hovertemplate": f"%{{customdata}} {plain(unit)}<br>%{{y:,}} {name}<extra></extra>",
        }
        for name, counts, colour in parts
    ]
    axis = {
        "range": [edges[0], edges[-1]],
        "showgrid": False,
        "title": {"text": plain(unit) + (" (log)" if log else ""), "standoff": 6},
    }
    if log:
        axis |= log_ticks(edges[0], edges[-1])
    elif whole:
        axis |= {"tick0": 0, "dtick": 1} if edges[-1] - edges[0] < 12 else {"tickformat": ",d"}
    return {
        "data": data,
        "layout": {
            "barmode": "stack",
            "bargap": 0.04 if len(centres) < 25 else 0,
            "xaxis": axis,
            "height": 190,
            "yaxis": _counts(max(map(sum, zip(*(counts for _, counts, _ in parts))), default=0)),
            "margin": {"l": 46, "r": 12, "t": 12, "b": 42},
        },
    }


def density_map(d: Density) -> Figure:
    """Counts on a logarithmic colour scale; empty cells are left open."""
    shown = [[math.log10(n) if n else None for n in row] for row in d.counts]
    x, y = (
        [(a + b) / 2 for a, b in zip(d.x_edges, d.x_edges[1:])],
        [(a + b) / 2 for a, b in zip(d.y_edges, d.y_edges[1:])],
    )
    across = [f"{d.x.name} {number(10**a if d.log_x else a)}" for a in x]
    down = [f"{d.y.name} {number(10**b if d.log_y else b)}" for b in y]
    text = [[f"{a}<br>{b}<br>{n:,} clips" for a, n in zip(across, row)] for b, row in zip(down, d.counts)]
    most = max(max(row) for row in d.counts)
    gap = 1 if len(x) < 30 else 0
    powers = range(0, int(math.log10(max(most, 1))) + 1)
    axes = {}
    for name, column, log, edges in (("xaxis", d.x, d.log_x, d.x_edges), ("yaxis", d.y, d.log_y, d.y_edges)):
        title = f"{column.name}, {column.unit}" + (" (log)" if log else "")
        ticks = log_ticks(edges[0], edges[-1]) if log else {}
        axes[name] = {"title": {"text": title, "standoff": 8}, "range": [edges[0], edges[-1]], **ticks}
    heat = {
        "type": "heatmap",
        "x": x,
        "y": y,
        "z": shown,
        "text": text,
        "hovertemplate": "%{text}<extra></extra>",
        "xgap": gap,
        "ygap": gap,
        "colorscale": [[0, "--density-low"], [1, "--density-high"]],
        "zmin": 0,
        "zmax": max(math.log10(max(most, 1)), 0.3),
        "colorbar": {
            "thickness": 10,
            "outlinewidth": 0,
            "title": {"text": "clips"},
            "tickvals": list(powers),
            "ticktext": [f"{10**p:,}" for p in powers],
        },
    }
    return {"data": [heat], "layout": {**axes, "height": 420, "margin": {"l": 60, "r": 10, "t": 10, "b": 50}}}


def status_bars(status: dict[str, tuple[int, float]]) -> Figure:
    """Shares of clips and of hours by status: two bars of 100 %."""
    clips, hours = sum(n for n, _ in status.values()), sum(h for _, h in status.values())
    data = []
    for name, (n, h) in status.items():
        shares = [100 * h / hours if hours else 0, 100 * n / clips if clips else 0]
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": name,
                "y": ["hours", "clips"],
                "x": shares,
                "marker": {"color": STATUS_COLOURS[name]},
                "customdata": [f"{h:,.2f} hours", f"{n:,} clips"],
                "hovertemplate": f"{name}: %{{customdata}} (%{{x:.1f}} %)<extra></extra>",
                "text": [f"{s:.0f} %" if s >= 7 else "" for s in shares],
                "textposition": "inside",
                "insidetextanchor": "middle",
                "textfont": {"color": "--on-status"},
            }
        )
    return {
        "data": data,
        "layout": {
            "barmode": "stack",
            "bargap": 0.35,
            "height": 130,
            "margin": {"l": 50, "r": 10, "t": 34, "b": 8},
            "showlegend": True,
            "legend": {"orientation": "h", "x": 0, "y": 1.05, "yanchor": "bottom", "traceorder": "normal"},
            "xaxis": {"range": [0, 100], "visible": False},
            "yaxis": {"showgrid": False},
        },
    }


def rejection_bars(rules: pl.DataFrame) -> Figure:
    """Clips that each rule rejects; in full colour those that no other rule rejects."""
    rows = rules.reverse()
    shared = (rows["clips"] - rows["alone"]).to_list()
    parts = [("by this rule alone", rows["alone"].to_list(), WARM), ("by others too", shared, "--rejected-soft")]
    return _bars(rows["rule"].to_list(), parts)


def kept_bars(rows: pl.DataFrame) -> Figure:
    """Clips by name, kept and other; beyond a number of names, the rest together."""
    if rows.height > MOST_BARS:
        rest = rows.slice(MOST_BARS - 1)
        together = rest.select(pl.lit(f"{rest.height:,} others").alias("name"), pl.col("clips", "kept").sum())
        first = rows.head(MOST_BARS - 1).select(pl.col("name").cast(pl.String), "clips", "kept")
        rows = pl.concat([first, together.select("name", "clips", "kept")], how="vertical_relaxed")
    rows = rows.reverse()
    other = (rows["clips"] - rows["kept"]).to_list()
    return _bars(rows["name"].to_list(), [("kept", rows["kept"].to_list(), KEPT), ("other", other, OTHER)])


def plain_bars(pairs: Sequence[tuple[str, float]], unit: str, colour: str = ACCENT, form: str = ",") -> Figure:
    """One bar for each (name, number), the first on top."""
    pairs = list(reversed(pairs))
    figure = _bars([name for name, _ in pairs], [("", [n for _, n in pairs], colour)])
    figure["data"][0]["hovertemplate"] = f"%{{customdata}}: %{{x:{form}}} {plain(unit)}<extra></extra>"
    figure["layout"] |= {"showlegend": False}
    return figure


def loss_dots(rows: pl.DataFrame) -> Figure:
    """Mean excess loss of each slice with its standard error, the first on top, and the line of no excess."""
    rows = rows.reverse()
    ids = list(range(rows.height))
    hover = [
        f"{plain(str(n))}<br>{mean:+.4f}{'' if error is None else f' ± {error:.4f}'}<br>{clips:,} clips, {samples:,} "
        f"samples"
        for n, mean, error, clips, samples in rows.select("name", "mean", "error", "clips", "samples").iter_rows()
    ]
    dots = {
        "type": "scatter",
        "mode": "markers",
        "y": ids,
        "x": rows["mean"].to_list(),
        "marker": {"color": ACCENT, "size": 9},
        "error_x": {
            "type": "data",
            "array": rows["error"].fill_null(0).to_list(),
            "color": ACCENT,
            "thickness": 1.5,
            "width": 0,
        },
        "text": hover,
        "hovertemplate": "%{text}<extra></extra>",
    }
    zero = {
        "type": "line",
        "x0": 0,
        "x1": 0,
        "yref": "paper",
        "y0": 0,
        "y1": 1,
        "line": {"color": LINE, "width": 1, "dash": "dot"},
    }
    layout = _bar_layout(rows["name"].to_list()) | {"shapes": [zero], "showlegend": False}
    layout["xaxis"] = {"nticks": 5, "title": {"text": "excess loss", "standoff": 6}}
    layout["margin"] = layout["margin"] | {"b": 40}
    layout["height"] += 32
    return {"data": [dots], "layout": layout}


def level_lines(levels: dict[str, Sequence[float | None]]) -> Figure:
    """Mean loss over the noise level, a line for each bucket."""
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": plain(name),
            "x": [(n + 0.5) / len(means) for n in range(len(means))],
            "y": list(means),
            "line": {"color": colour, "width": 2},
            "marker": {"color": colour, "size": 6},
            "hovertemplate": f"{plain(name)}<br>at %{{x:.2f}}: %{{y:.4f}}<extra></extra>",
        }
        for (name, means), colour in zip(levels.items(), (ACCENT, WARM, "--pending", "--quarantined", LINE))
    ]
    return {
        "data": data,
        "layout": {
            "height": 260,
            "margin": {"l": 52, "r": 12, "t": 8 + 22 * (len(data) > 1), "b": 42},
            "showlegend": len(data) > 1,
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
            "xaxis": {
                "range": [0, 1],
                "dtick": 0.2,
                "showgrid": False,
                "title": {"text": "noise level", "standoff": 6},
            },
            "yaxis": {"rangemode": "tozero", "nticks": 6, "title": {"text": "loss", "standoff": 6}},
        },
    }


def plain(text: str) -> str:
    """A text in which plotly finds no tags; it shows quotes as they are."""
    return escaped(text, quote=False)


def number(value: float) -> str:
    """Short: three significant digits, no exponent where it can be helped."""
    if value == 0 or abs(value) < 1e-9:
        return "0"
    if 1e-3 <= abs(value) < 1e6:
        digits = max(0, 2 - math.floor(math.log10(abs(value))))
        text = f"{value:,.{digits}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:.2g}"


def _bars(names: list[str], parts: list[tuple[str, list, str]]) -> Figure:
    ids = list(range(len(names)))  # names may repeat once they are shortened
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": label,
            "y": ids,
            "x": counts,
            "customdata": [plain(str(n)) for n in names],
            "marker": {"color": colour, "line": {"width": 0}},
            "hovertemplate": f"%{{customdata}}<br>%{{x:,}} {label}<extra></extra>",
        }
        for label, counts, colour in parts
    ]
    layout = _bar_layout(names)
    if all(isinstance(n, int) for _, counts, _ in parts for n in counts):
        layout["xaxis"] = _counts(max(map(sum, zip(*(counts for _, counts, _ in parts))), default=0))
    return {"data": data, "layout": layout}


def _bar_layout(names: list) -> dict:
    """Names stand at 0, 1, 2 …: shortened, two of them may read the same."""
    count, texts = len(names), [plain(_short(str(n))) for n in names]
    labels = {"tickvals": list(range(count)), "ticktext": texts}
    return {
        "barmode": "stack",
        "bargap": 0.28,
        "height": 44 + ROW_PX * max(count, 1),
        "margin": {"l": 8, "r": 14, "t": 4, "b": 28},
        "xaxis": {"nticks": 4, "rangemode": "tozero", "separatethousands": True},
        "yaxis": {
            **labels,
            "automargin": True,
            "showgrid": False,
            "ticks": "",
            "range": [-0.6, count - 0.4],
            "zeroline": False,
        },
    }


def draw_thresholds(figure: Figure, bins: dict, sides: Sequence[Side]) -> None:
    """Into a histogram: a line for each value; labels in as many rows as keep them apart; what is beyond the axis is an
    arrow at its end."""
    low, high = bins["edges"][0], bins["edges"][-1]
    shapes, notes, ends = [], [], []
    for value, label in _labels(sides, bins["log"]):
        at = min(max(value, low), high)
        beyond = value < low or value > high
        label = f"{label} →" if value > high else f"← {label}" if value < low else label
        centre, half = (at - low) / (high - low) * PLOT_PX, len(label) * CHARACTER_PX / 2
        centre = min(max(centre, half), PLOT_PX - half)
        row = next((i for i, end in enumerate(ends) if centre - half > end + 4), len(ends))
        ends[row : row + 1] = [centre + half]
        if not beyond:
            shapes.append(
                {
                    "type": "line",
                    "x0": at,
                    "x1": at,
                    "yref": "paper",
                    "y0": 0,
                    "y1": 1,
                    "line": {"color": LINE, "width": 1.5, "dash": "dash"},
                }
            )
        anchor = "left" if centre - half < 1 else "right" if centre + half > PLOT_PX - 1 else "center"
        notes.append(
            {
                "x": at,
                "y": 1,
                "yref": "paper",
                "yanchor": "bottom",
                "xanchor": anchor,
                "yshift": 1 + 13 * row,
                "text": plain(label),
                "showarrow": False,
                "font": {"size": 11, "color": LINE},
            }
        )
    layout = figure["layout"]
    layout["shapes"], layout["annotations"] = shapes, notes
    extra = 14 * max(len(ends) - 1, 0) + (8 if ends else 0)
    layout["margin"] = layout["margin"] | {"t": 12 + extra}
    layout["height"] += extra


def _labels(sides: Sequence[Side], log: bool) -> list[tuple[float, str]]:
    """Position and text of every distinct threshold, from left to right; a zero has no place on a logarithmic axis."""
    texts: dict[float, list[str]] = {}
    for side in sides:
        t = side.threshold
        label = f"{t.sign} {number(t.value)}" + (f" {t.level}" if t.level else "")
        if not log or t.value > 0:
            labels = texts.setdefault(math.log10(t.value) if log else t.value, [])
            labels.append(label) if label not in labels else None
    return [(value, ", ".join(labels)) for value, labels in sorted(texts.items())]


def _counts(most: float) -> dict:
    """An axis of counts: no half clips where there are few."""
    return {"rangemode": "tozero", "separatethousands": True, **({"dtick": 1} if most <= 4 else {"nticks": 4})}


def log_ticks(low: float, high: float) -> dict:
    """Decades, and 2 and 5 between them where there are few."""
    steps = (1, 2, 5) if high - low < 2.2 else (1, 3) if high - low < 3.5 else (1,)
    values = [(p + math.log10(s), s * 10.0**p) for p in range(math.floor(low), math.ceil(high) + 1) for s in steps]
    if high - low > 7:
        values = values[::2]
    return {"tickvals": [at for at, _ in values], "ticktext": [number(v) for _, v in values]}


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_LABEL else f"{text[:12]}…{text[-(LONGEST_LABEL - 13) :]}"
