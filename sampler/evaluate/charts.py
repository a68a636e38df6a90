"""Charts of samples beside training clips: plain plotly figures, as `catalogs.report.charts` makes them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from catalogs.report.charts import LINE, Figure, log_ticks, number, plain
from sampler.evaluate.distributions import ScoreComparison
from sampler.evaluate.features import FeatureComparison
from sampler.evaluate.memorization import Memorisation

REAL = "--other"
COLOURS = ("--accent", "--rejected", "--pending", "--quarantined", "--threshold")
"""Of checkpoints, in their order; beyond these they come again, dashed."""
DASHES = ("solid", "dash", "dot")
BASELINE = "--muted"
HEIGHT = 190
ROW_PX = 26
BINS = 30


def colour(index: int) -> tuple[str, str]:
    """Colour and dash of a checkpoint's line."""
    return COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)]


def overlaid(comparison: ScoreComparison, order: Sequence[str]) -> Figure:
    """Training clips as bars, each checkpoint's samples as a stepped line, all in per cent of their own.

    Args:
        order: labels of all checkpoints, for their colours.
    """
    h = comparison.histogram()
    sets = [(s.label, shares, *colour(order.index(s.label))) for s, shares in zip(comparison.sets, h["sets"])]
    return _histogram(h["edges"], h["real"], "training clips", sets, plain(comparison.column.unit), h["log"])


def neighbour_histogram(found: Memorisation, order: Sequence[str]) -> Figure:
    """Distances to the nearest training clip: held-out clips as bars, samples as lines, the threshold."""
    by_label = {label: np.array([n.distance for n in found.neighbours if n.label == label]) for label in order}
    every = np.concatenate([found.held, *by_label.values()])
    edges = np.linspace(0.0, max(float(every.max()), 1e-6) * 1.02, BINS + 1)
    shares = {label: _shares(values, edges) for label, values in by_label.items() if len(values)}
    sets = [(label, values, *colour(order.index(label))) for label, values in shares.items()]
    figure = _histogram(
        edges.tolist(), _shares(found.held, edges), "held-out clips", sets, "distance (1 − cosine)", False
    )
    if found.threshold is not None:
        figure["layout"]["shapes"] = [
            {
                "type": "line",
                "x0": found.threshold,
                "x1": found.threshold,
                "yref": "paper",
                "y0": 0,
                "y1": 1,
                "line": {"color": LINE, "width": 1.5, "dash": "dash"},
            }
        ]
    figure["layout"]["height"] = 260
    return figure


def distance_dots(found: FeatureComparison, order: Sequence[str]) -> Figure:
    """Fréchet distance of each set, the nearest on top, and for each its noise floor as a bar with the floor's
    spread."""
    measured = [(d, d.frechet) for d in found.distances if d.frechet is not None]
    rows = sorted(measured, key=lambda row: -row[1].value.mean)
    ids = list(range(len(rows)))
    floors = {
        "type": "bar",
        "orientation": "h",
        "name": "noise floor",
        "y": ids,
        "x": [frechet.floor.mean for _, frechet in rows],
        "width": 0.5,
        "marker": {"color": REAL, "line": {"width": 0}},
        "customdata": [f"{frechet.floor.mean:.4g} ± {frechet.floor.std:.2g}" for _, frechet in rows],
        "hovertemplate": "noise floor %{customdata}<extra></extra>",
    }
    dots = {
        "type": "scatter",
        "mode": "markers",
        "name": "distance",
        "y": ids,
        "x": [frechet.value.mean for _, frechet in rows],
        "marker": {
            "size": 11,
            "color": [colour(order.index(d.label))[0] if d.kind == "samples" else BASELINE for d, _ in rows],
        },
        "error_x": {
            "type": "data",
            "array": [frechet.value.std for _, frechet in rows],
            "color": BASELINE,
            "thickness": 1.5,
            "width": 0,
        },
        "text": [f"{plain(d.label)}<br>{frechet.value.mean:.4g} ± {frechet.value.std:.2g}" for d, frechet in rows],
        "hovertemplate": "%{text}<extra></extra>",
    }
    longest = max((len(d.label) for d, _ in rows), default=0)
    return {
        "data": [floors, dots],
        "layout": {
            "height": 70 + ROW_PX * len(rows),
            "margin": {"l": 24 + 6.4 * min(longest, 40), "r": 16, "t": 8, "b": 44},
            "showlegend": False,
            "xaxis": {"rangemode": "tozero", "title": {"text": "squared Fréchet distance", "standoff": 6}},
            "yaxis": {
                "tickvals": ids,
                "ticktext": [plain(d.label[:40]) for d, _ in rows],
                "showgrid": False,
                "range": [-0.7, len(rows) - 0.3],
            },
        },
    }


def _histogram(
    edges: list[float],
    real: list[float],
    whose: str,
    sets: Sequence[tuple[str, list[float], str, str]],
    unit: str,
    log: bool,
) -> Figure:
    """Args:
    real: of the bars, per cent; `whose` they are.
    sets: label, shares, colour and dash of each line.
    """
    centres = [(a + b) / 2 for a, b in zip(edges, edges[1:])]
    names = [f"{number(10**a if log else a)} … {number(10**b if log else b)}" for a, b in zip(edges, edges[1:])]
    bars = {
        "type": "bar",
        "x": centres,
        "y": real,
        "customdata": names,
        "marker": {"color": REAL, "line": {"width": 0}},
        "hovertemplate": f"%{{customdata}}<br>%{{y:.1f}} % of {whose}<extra></extra>",
    }
    lines = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": plain(label),
            "x": _twice(edges),
            "y": [0.0, *_twice(shares), 0.0],
            "line": {"color": tint, "width": 2, "dash": dash},
            "customdata": [names[0], *_twice(names), names[-1]],
            "hovertemplate": f"%{{customdata}}<br>%{{y:.1f}} % of {plain(label)}<extra></extra>",
        }
        for label, shares, tint, dash in sets
    ]
    axis = {
        "range": [edges[0], edges[-1]],
        "showgrid": False,
        "title": {"text": unit + (" (log)" if log else ""), "standoff": 6},
    }
    if log:
        axis |= log_ticks(edges[0], edges[-1])
    return {
        "data": [bars, *lines],
        "layout": {
            "bargap": 0,
            "height": HEIGHT,
            "xaxis": axis,
            "yaxis": {"rangemode": "tozero", "nticks": 4, "ticksuffix": " %"},
            "margin": {"l": 46, "r": 12, "t": 12, "b": 42},
        },
    }


def _twice(values: list) -> list:
    """Each value twice: bins have two ends, edges two sides."""
    return [value for value in values for _ in range(2)]


def _shares(values: np.ndarray, edges: np.ndarray) -> list[float]:
    return [float(n) for n in 100 * np.histogram(values, edges)[0] / max(1, len(values))]
