"""The page: pieces of HTML, and how they become one file. Everything from data goes through `text`."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from string import Template
from typing import Any

LONG_WORD = 26
"""Cells with more characters than this may break anywhere: addresses, messages."""


@dataclass(frozen=True)
class Picture:
    """`jpeg`, or None and in `problem` why; `title` says which clip it is."""

    clip_id: str
    title: str
    jpeg: bytes | None
    problem: str = ""


@dataclass
class Page:
    """Sections as they are written, with the charts and pictures that they show."""

    title: str
    sections: list[tuple[str, str, str]] = field(default_factory=list)
    charts: list[dict[str, Any]] = field(default_factory=list)
    pictures: dict[str, Picture] = field(default_factory=dict)
    header: str = ""

    def __post_init__(self) -> None:
        self._places = {clip_id: f"t{i}" for i, (clip_id, p) in enumerate(self.pictures.items()) if p.jpeg is not None}

    def section(self, key: str, title: str, lead: str, *parts: str) -> None:
        """Add a section. `lead` is one plain sentence, no markup; parts are HTML."""
        self.sections.append((key, title, f'<p class="lead">{text(lead)}</p>{"".join(parts)}'))

    def chart(self, figure: dict[str, Any], title: str = "", below: str = "", wide: bool = False) -> str:
        """A figure. `below` is HTML."""
        self.charts.append(figure)
        head = f"<h3>{text(title)}</h3>" if title else ""
        height = figure["layout"]["height"]
        plot = f'<div class="plot" id="chart-{len(self.charts) - 1}" style="height:{height}px"></div>'
        return f'<figure class="card{" wide" if wide else ""}">{head}{plot}{below}</figure>'

    def html(self) -> str:
        """The whole file: styles, scripts, figures and pictures inside."""
        from plotly.offline import get_plotlyjs

        styles = "".join(
            _background(place, self.pictures[clip_id].jpeg or b"") for clip_id, place in self._places.items()
        )
        contents = "".join(f'<li><a href="#{key}">{text(title)}</a></li>' for key, title, _ in self.sections)
        body = "".join(
            f'<section id="{key}"><h2>{text(title)}</h2>{inner}</section>' for key, title, inner in self.sections
        )
        return Template(_file("page.html")).substitute(
            title=text(self.title),
            header=self.header,
            contents=contents,
            sections=body,
            style=_file("page.css"),
            pictures=styles,
            plotly=get_plotlyjs().replace("</script", "<\\/script"),
            charts=_json(self.charts),
            script=_file("page.js"),
        )

    def thumb(self, clip_id: str, caption: str, badge: str = "", below: str = "") -> str:
        """The picture of a clip, or why there is none. `caption`, `badge` and `below`, a few lines under it, are
        HTML."""
        picture = self.pictures.get(clip_id)
        title = text(picture.title if picture else clip_id)
        if clip_id in self._places:
            inner = f'<div class="thumb {self._places[clip_id]}" role="img" title="{title}" aria-label="{title}"></div>'
        else:
            problem = text(picture.problem if picture else "not in the catalog")
            inner = f'<div class="thumb missing" title="{title}"><b>no picture</b><span>{problem}</span></div>'
        words = f'<p class="words">{below}</p>' if below else ""
        return f"<figure>{inner}<figcaption>{caption}{badge}</figcaption>{words}</figure>"


def text(value: Any) -> str:
    """Anything, for HTML and its attributes."""
    return escape(str(value), quote=True)


def count(value: float) -> str:
    """A number with separators."""
    return f"{value:,.0f}"


def hours(value: float) -> str:
    """Three digits where there is little."""
    return (
        "0" if value == 0 else f"{value:,.0f}" if value >= 1000 else f"{value:,.1f}" if value >= 10 else f"{value:,.3f}"
    )


def share(part: float, whole: float) -> str:
    """Per cent; small ones not as 0."""
    if not whole:
        return "–"
    percent = 100 * part / whole
    if not part or percent < 0.1:
        return "< 0.1 %" if part else "0 %"
    return f"{percent:.1f} %" if percent < 10 or 99 < percent < 100 else f"{percent:.0f} %"


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[Any]],
    numeric: Sequence[int] = (),
    hints: Sequence[str] = (),
    tight: bool = False,
) -> str:
    """Rows of values, escaped.

    Args:
        numeric: indices of columns that stand to the right.
        hints: a tooltip for each row.
        tight: small, for below a chart.
    """

    def cell(tag: str, index: int, value: Any) -> str:
        kind = "n" if index in numeric else "long" if tag == "td" and len(str(value)) > LONG_WORD else ""
        return f'<{tag} class="{kind}">{text(value)}</{tag}>' if kind else f"<{tag}>{text(value)}</{tag}>"

    def line(tag: str, values: Sequence[Any], hint: str = "") -> str:
        tooltip = f' title="{text(hint)}"' if hint else ""
        return f"<tr{tooltip}>{''.join(cell(tag, i, value) for i, value in enumerate(values))}</tr>"

    body = "".join(line("td", row, hints[i] if hints else "") for i, row in enumerate(rows))
    kind = ' class="tight"' if tight else ""
    return f'<div class="scroll"><table{kind}><thead>{line("th", heads)}</thead><tbody>{body}</tbody></table></div>'


def grid(*parts: str, kind: str = "") -> str:
    """Cards beside each other, as many as fit."""
    return f'<div class="grid {kind}">{"".join(parts)}</div>'


def card(title: str, *parts: str, wide: bool = False) -> str:
    """A box with a heading."""
    return f'<div class="card{" wide" if wide else ""}"><h3>{text(title)}</h3>{"".join(parts)}</div>'


def nothing(why: str) -> str:
    """In place of what is not there."""
    return f'<p class="nothing">{text(why)}</p>'


def tile(label: str, value: str, note: str = "") -> str:
    """A number to read first."""
    return f'<div class="tile"><span>{text(label)}</span><b>{text(value)}</b><i>{text(note)}</i></div>'


def _file(name: str) -> str:
    return (resources.files("datakit.html") / name).read_text(encoding="utf-8")


def _background(name: str, jpeg: bytes) -> str:
    return f".{name}{{background-image:url(data:image/jpeg;base64,{base64.b64encode(jpeg).decode()})}}\n"


def _json(value: Any) -> str:
    """For a script element: no end of it can occur inside."""
    written = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return written.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
