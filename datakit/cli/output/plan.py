"""What `datakit plan` prints. Nothing here computes."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from rich.markup import escape
from rich.table import Table

from datakit.cli.output.catalog import wide
from trainer.planning.plan import Plan

MOST_ROWS = 40
"""Buckets in the table; `--json` and plan.html have all."""


def show_plan(plan: Plan, as_json: bool) -> None:
    """The plan's counts; what cannot train and why."""
    if as_json:
        print(json.dumps(_as_dict(plan), indent=1, ensure_ascii=False))
        return
    console = wide()
    if len(plan.parts) > 1:
        console.print(_parts(plan))
    console.print(_buckets(plan))
    if plan.counts["left_out"]:
        console.print(_left_out(plan))
    for line in _summary(plan):
        console.print(line, markup=False, soft_wrap=True)


def _as_dict(plan: Plan) -> dict[str, Any]:
    return {
        "folder": str(plan.folder),
        "plan_hash": plan.hash,
        "global_batches": plan.global_batches,
        "buckets": [asdict(b) for b in plan.buckets],
        "parts": [asdict(p) for p in plan.parts],
        "settings": plan.settings,
        "counts": plan.counts,
    }


def _parts(plan: Plan) -> Table:
    table = _table("Mix", "part", "clips", "train", "windows", "share of samples", "times seen in an epoch", left=1)
    for p in plan.counts["parts"]:
        clips, trained, windows = (f"{p[k]:,}" for k in ("clips", "trained", "windows"))
        table.add_row(escape(p["name"]), clips, trained, windows, f"{p['share']:.1%}", f"{p['epochs']:.3g}")
    return table


def _buckets(plan: Plan) -> Table:
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
        "crop",
        "used",
    )
    table = _table("Buckets (height x width x frames)", *heads, left=1)
    rows = sorted(plan.counts["buckets"], key=lambda r: -r["cost_share"])
    for r in rows[:MOST_ROWS]:
        table.add_row(
            r["name"],
            f"{r['clips']:,}",
            f"{r['windows']:,}",
            _hours(r["hours"]),
            f"{r['batch']}",
            f"{r['tokens']:,}",
            f"{r['micro_batches']:,}",
            f"{r['steps']:,.1f}",
            f"{r['fill']:.0%}",
            f"{r['cost_share']:.1%}",
            f"{r['crop']:.1%}",
            f"{r['used']:.0%}",
        )
    if len(rows) > MOST_ROWS:
        rest = {
            k: sum(r[k] for r in rows[MOST_ROWS:])
            for k in ("clips", "windows", "hours", "micro_batches", "steps", "cost_share")
        }
        table.add_row(
            f"{len(rows) - MOST_ROWS} others",
            f"{rest['clips']:,}",
            f"{rest['windows']:,}",
            _hours(rest["hours"]),
            "",
            "",
            f"{rest['micro_batches']:,}",
            f"{rest['steps']:,.1f}",
            "",
            f"{rest['cost_share']:.1%}",
            "",
            "",
        )
    return table


def _left_out(plan: Plan) -> Table:
    table = _table("Left out", "reason", "clips", "for example")
    table.columns[1].justify = "right"
    for r in plan.counts["left_out"]:
        table.add_row(escape(r["kind"]), f"{r['clips']:,}", escape(r["example"].partition(": ")[2] or r["example"]))
    return table


def _summary(plan: Plan) -> list[str]:
    c, epoch, step = plan.counts, plan.counts["epoch"], plan.counts["step"]
    clips, trained, windows = (sum(p[k] for p in c["parts"]) for k in ("clips", "trained", "windows"))
    tokens, cost = c["balance"]["tokens"], c["balance"]["cost"]
    lines = [
        f"{clips:,} clips: {trained:,} train, in {windows:,} windows; {clips - trained:,} left out",
        f"an epoch: {epoch['samples']:,.0f} samples, {_hours(epoch['hours'])} hours, {epoch['tokens']:,.0f} tokens, "
        f"{_count(epoch['micro_batches'], 'micro-batch', 'micro-batches')}, {_count(epoch['steps'], 'step', 'steps')}",
        f"a step: {_count(plan.global_batches, 'micro-batch', 'micro-batches')}, {step['samples']:.1f} samples and "
        f"{step['tokens']:,.0f} tokens on average; a micro-batch takes at most {plan.settings['budget']:,} "
        f"tokens{_whence(plan)}",
        f"full micro-batches: {tokens['least']:,.0f} to {tokens['most']:,.0f} tokens; computation "
        f"{cost['least']:.2f} to {cost['most']:.2f} of the mean, spread {cost['spread']:.0%}",
    ]
    other = {status: n for status, n in c["statuses"].items() if status != "kept"}
    if other:
        found = ", ".join(f"{n:,} {status}" for status, n in other.items())
        lines.append(f"of those that train, {found}: the condition selects them (status = 'kept' would not)")
    if c["in_several_parts"]:
        lines.append(f"{_count(c['in_several_parts'], 'clip trains', 'clips train')} in more than one part")
    if c["too_large"]:
        names = ", ".join(f"{t['name']} ({t['tokens']:,})" for t in c["too_large"][:3])
        more = f" and {len(c['too_large']) - 3} more" if len(c["too_large"]) > 3 else ""
        lines.append(f"no use was made of buckets that take more tokens a sample than the budget: {names}{more}")
    return [*lines, f"{plan.folder}: plan {plan.hash}, picture in plan.html"]


def _whence(plan: Plan) -> str:
    gpu = plan.settings["gpu"]
    return f" ({gpu})" if gpu is not None else ""


def _count(n: int, one: str, many: str) -> str:
    return f"{n:,} {one if n == 1 else many}"


def _hours(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:,.1f}" if value >= 10 else f"{value:.3f}"


def _table(title: str, *heads: str, left: int | None = None) -> Table:
    """Columns from `left` on stand to the right."""
    table = Table(*heads, title=title, title_justify="left")
    for column in table.columns[left:] if left is not None else ():
        column.justify = "right"
    return table
