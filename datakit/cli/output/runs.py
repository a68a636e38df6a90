"""What the commands print: progress, reports, tables. Nothing here computes."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from datakit.cli.output.catalog import wide

if TYPE_CHECKING:
    from catalogs.query.funnel import Funnel
    from pipelines.recipes.what_if import WhatIf
    from pipelines.runs.caption import Captioned
    from pipelines.runs.dedup import Deduplicated
    from pipelines.runs.report import Progress as IngestProgress
    from pipelines.runs.report import Report
    from pipelines.settings import Settings

REFRESH_S = 0.5


class _Bar:
    """One line of progress on stderr. Silent without a terminal."""

    def __init__(self, quiet: bool, unit: str):
        console = Console(stderr=True)
        self._rich = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal,
            refresh_per_second=4,
        )
        self._task = self._rich.add_task("starting", total=None, rate="")

    def __enter__(self) -> Self:
        self._rich.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._rich.__exit__(*raised)


class ProgressBar(_Bar):
    """Progress of an ingest: videos, rate against real time, time left."""

    def __init__(self, quiet: bool = False):
        super().__init__(quiet, "videos")
        self._began: float | None = None
        self._shown = 0.0

    def update(self, progress: IngestProgress) -> None:
        now = time.monotonic()
        if now - self._shown < REFRESH_S:
            return
        self._shown = now
        total = None if progress.listing else progress.registered
        self._rich.update(
            self._task, description=progress.phase, completed=progress.done, total=total, rate=self._rate(progress, now)
        )

    def _rate(self, progress: IngestProgress, now: float) -> str:
        seconds = progress.video_s + progress.running_s
        if not seconds:
            return ""
        if self._began is None:
            self._began = now
        elapsed = now - self._began + REFRESH_S
        speed = seconds / elapsed
        parts = [f"{progress.clips} clips", f"{speed:.0f}× real time"]
        if progress.bytes_done and not progress.listing:
            left = (progress.bytes - progress.bytes_done) * elapsed / progress.bytes_done
            parts.append(f"about {_duration(left)} left")
        if progress.quarantined:
            parts.append(f"{progress.quarantined} quarantined")
        return " · ".join(parts)


class ClipBar(_Bar):
    """Progress of what goes clip by clip."""

    def __init__(self, doing: str, quiet: bool = False):
        super().__init__(quiet, "clips")
        self._doing = doing

    def update(self, done: int, of: int) -> None:
        self._rich.update(self._task, description=self._doing, completed=done, total=of)


def show_plan(settings: Settings, sources: Sequence[str], catalog: str, as_json: bool) -> None:
    """`--dry-run`: the resolved settings, the stages, the rules, and what is missing."""
    from pipelines.runs.ingest import checked_recipe
    from pipelines.sources import check
    from pipelines.stages.registry import STAGES, enabled_stages, fingerprint, missing_requirements

    check(sources)
    recipe = checked_recipe(settings)
    stages: list[dict[str, Any]] = [
        {
            "stage": name,
            "needs": STAGES[name].needs,
            "columns": list(STAGES[name].column_names()),
            "fingerprint": fingerprint(name, settings),
            "missing": missing_requirements(name, settings),
        }
        for name in enabled_stages(settings)
    ]
    waiting = recipe.waits_for(set(enabled_stages(settings)))
    if as_json:
        print(
            json.dumps(
                {"settings": settings.model_dump(), "stages": stages, "recipe": recipe.label, "pending_rules": waiting},
                indent=1,
            )
        )
        return
    import yaml

    console = wide()
    console.print(f"Sources: {', '.join(sources)}\nCatalog: {catalog}\n", highlight=False)
    console.print(
        yaml.safe_dump(json.loads(settings.model_dump_json()), sort_keys=False).rstrip() + "\n",
        highlight=False,
        markup=False,
    )
    table = Table("stage", "looks at", "fills", "fingerprint", "missing", title="Stages", title_justify="left")
    for s in stages:
        fills = ", ".join(s["columns"]) or "videos.cuts, the clips"
        table.add_row(s["stage"], s["needs"], fills, s["fingerprint"], "; ".join(s["missing"]) or "–")
    console.print(table)
    rules = Table(
        "rule", "keeps", "source", title=f"Recipe {recipe.label}: {recipe.file.description}", title_justify="left"
    )
    for rule in recipe.file.rules:
        keep = rule.keep if isinstance(rule.keep, str) else "\n".join(f"{k}: {v}" for k, v in rule.keep.items())
        rules.add_row(
            rule.name, keep, rule.source + (f" (waits for stage {waiting[rule.name]})" if rule.name in waiting else "")
        )
    console.print(rules)


def show_report(report: Report, catalog: str, as_json: bool) -> None:
    """The end of an ingest: what it did, the funnel, time by stage."""
    if as_json:
        body = {
            "run_id": report.run_id,
            "catalog": catalog,
            "counts": report.counts,
            "ignored_files": report.ignored_files,
            "funnel": report.funnel.as_dict(),
            "clip_files": report.clip_files,
            "stage_cpu_s": report.stage_cpu_s,
            "wall_s": report.wall_s,
            "cpu_hours_per_kept_hour": report.cpu_hours_per_kept_hour,
        }
        print(json.dumps(body, indent=1))
        return
    console = Console(highlight=False)
    console.print(_sentence(report) + "\n", soft_wrap=True)
    show_funnel(report.funnel, False)
    total = sum(report.stage_cpu_s.values())
    if total:
        table = Table("stage", "CPU s", "share", title="Time by stage", title_justify="left")
        for column in table.columns[1:]:
            column.justify = "right"
        for stage, seconds in sorted(report.stage_cpu_s.items(), key=lambda item: -item[1]):
            table.add_row(stage, f"{seconds:.1f}", f"{seconds / total:.0%}")
        console.print(table)
    per_hour = report.cpu_hours_per_kept_hour
    spent = f"{_duration(report.wall_s)} in all, {_duration(total)} of CPU in the stages"
    console.print(spent + (f", {per_hour:.2f} CPU-hours per kept hour" if per_hour and total else "") + ".")
    if files := report.clip_files:
        from pipelines.video_tasks.messages import CLIP_FOLDER

        lost = f", {files['lost_frames']} frames at their ends lost to key frames" if files["lost_frames"] else ""
        without = f"; {files['without']} kept clips hold no key frame and have no file" if files["without"] else ""
        console.print(f"{files['files']} clip files in {catalog}/{CLIP_FOLDER}{lost}{without}.", soft_wrap=True)
    query = "SELECT uri, start_s, end_s, motion FROM clips WHERE status = 'kept'"
    console.print(
        f'Catalog: {catalog}   (try: datakit catalog query {catalog} "{query}")', soft_wrap=True, markup=False
    )


def _sentence(report: Report) -> str:
    c = report.counts
    parts = [f"{c['ok']} videos ingested"] if c["ok"] else ["nothing new to ingest"]
    c = {**c, "quarantined": c["quarantined"] + c["quarantined_at_once"]}
    words = {
        "quarantined": "quarantined",
        "done_before": "done before",
        "quarantined_before": "quarantined before (--retry-failed does them again)",
        "same_content": "with the content of another",
        "done_by_another": "done by another run meanwhile",
        "forgotten": "forgotten (`datakit catalog forget`): left out",
    }
    parts += [f"{c[key]} {text}" for key, text in words.items() if c[key]]
    ignored = f"; {report.ignored_files} files without a media suffix ignored" if report.ignored_files else ""
    return f"{c['sources']} sources: {', '.join(parts)}{ignored}."


def show_funnel(funnel: Funnel, as_json: bool) -> None:
    if as_json:
        print(json.dumps(funnel.as_dict(), indent=1))
        return
    console = Console(highlight=False)
    table = Table("", "number", "hours", "why", title="Funnel", title_justify="left")
    table.columns[1].justify = table.columns[2].justify = "right"
    hours = funnel.hours
    table.add_row("videos", str(funnel.videos), _hours(hours.get("videos")), "")
    table.add_row("  ok", str(funnel.videos_ok), "", "")
    if funnel.videos_pending:
        table.add_row("  pending", str(funnel.videos_pending), "", "not processed yet: the same command goes on")
    table.add_row("  quarantined", str(funnel.videos_quarantined), "", _list(funnel.quarantine))
    table.add_section()
    table.add_row(
        "clips",
        str(funnel.clips),
        _hours(sum(hours.get(s, 0.0) for s in ("kept", "rejected", "pending", "quarantined"))),
        "",
    )
    table.add_row("  rejected", str(funnel.rejected), _hours(hours.get("rejected")), "")
    for rule, (count, only) in funnel.rejected_by.items():
        table.add_row(f"    {rule}", str(count), "", f"{only} by this rule alone" if only else "")
    table.add_row("  pending", str(funnel.pending), _hours(hours.get("pending")), _list(funnel.pending_on))
    table.add_row("  quarantined", str(funnel.quarantined), _hours(hours.get("quarantined")), _list(funnel.clip_errors))
    levels = ", ".join(f"level {k}: {v}" for k, v in funnel.levels.items()) if len(funnel.levels) > 1 else ""
    table.add_row("  kept", str(funnel.kept), _hours(hours.get("kept")), levels)
    if funnel.marks:
        table.add_row("  marked by people", str(sum(funnel.marks.values())), "", _list(funnel.marks))
    if funnel.captions or funnel.caption_errors:
        table.add_section()
        table.add_row("captions", str(sum(funnel.captions.values())), "", _list(funnel.captions))
        from pipelines.captioning.caption_quality import FLAGS

        for flag, count in funnel.caption_flags.items():
            table.add_row(f"  {flag}", str(count), "", FLAGS.get(flag, ""))
        if funnel.caption_errors:
            table.add_row("  failed", str(funnel.caption_errors), "", "run caption --retry-failed asks again")
        table.add_row("  kept clips without", str(funnel.without_caption), "", "")
    console.print(table)


def show_what_if(found: WhatIf, as_json: bool) -> None:
    """What a recipe would keep, beside what is kept now, and what each of its rules does alone."""
    if as_json:
        print(json.dumps(found.as_dict(), indent=1))
        return
    console = wide()
    table = Table(
        "", "clips", "hours", "now", "hours", title=f"Recipe {found.recipe}, nothing written", title_justify="left"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for status, then in found.outcome.items():
        now = found.now[status]
        table.add_row(status, str(then.clips), _hours(then.hours), str(now.clips), _hours(now.hours))
        if status == "kept":
            table.add_row("  gained", f"+{found.gained.clips}", _hours(found.gained.hours), "", "")
            table.add_row("  lost", f"−{found.lost.clips}", _hours(found.lost.hours), "", "")
            for level, amount in found.levels.items() if len(found.levels) > 1 else ():
                table.add_row(f"  level {level}", str(amount.clips), _hours(amount.hours), "", "")
    if found.marked.clips:
        table.add_row("marked by people", str(found.marked.clips), _hours(found.marked.hours), "", "")
    console.print(table)
    rules = Table(
        "rule",
        "rejects",
        "hours",
        "alone",
        "hours",
        "waits",
        "kept without it",
        "keeps",
        title="Rules",
        title_justify="left",
    )
    for column in rules.columns[1:7]:
        column.justify = "right"
    for rule in found.rules:
        more = rule.kept_without.clips - found.outcome["kept"].clips
        rules.add_row(
            rule.rule,
            str(rule.rejects.clips),
            _hours(rule.rejects.hours),
            str(rule.only.clips),
            _hours(rule.only.hours),
            str(rule.waits.clips),
            f"+{more}",
            rule.keep,
        )
    console.print(rules)


def show_score(counts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(counts, indent=1))
        return
    print(f"{counts['clips']} clips of {counts['videos']} videos scored, {counts['clips_with_errors']} with errors")
    for stage, clips in counts["rated"].items():
        print(f"{clips} clips rated from their embeddings: {stage}")
    _show_statuses(counts["statuses"])


def show_captioned(done: Captioned, as_json: bool) -> None:
    """The end of a run that wrote captions."""
    if as_json:
        print(json.dumps(asdict(done), indent=1))
        return
    failed = f", {done.failed} failed (SELECT error FROM captions; --retry-failed asks again)" if done.failed else ""
    print(
        f"{done.captions} captions for {done.clips} clips in {_duration(done.wall_s)}{failed}"
        if done.clips
        else "nothing to caption"
    )
    if done.flags:
        print(f"flagged: {_list(done.flags)}")
    _show_statuses(done.statuses)


def show_dedup(found: Deduplicated, as_json: bool) -> None:
    """The end of a search for duplicates."""
    if as_json:
        print(json.dumps(asdict(found), indent=1))
        return
    repeated = sum(found.duplicates.values())
    model = f"; embeddings of {found.model}, cosine from {found.threshold:g}" if found.model else ""
    print(f"{found.clips} of {found.of} clips compared ({_hours(found.hours)} h){model}, in {_duration(found.wall_s)}")
    print(
        f"{repeated} repeat another ({_list(found.duplicates)}): {_hours(found.hours_saved)} h less without them; "
        f"{found.groups} groups"
    )
    if found.splits_moved:
        print(f"{found.splits_moved} clips moved to the split of their group")
    if found.without_phash:
        print(f"{found.without_phash} clips have no perceptual hash: `datakit run score --stages phash` makes it")
    print(f"{found.changed} rows changed" if found.changed else "nothing changed: nothing was written")
    _show_statuses(found.statuses)


def _show_statuses(statuses: dict[str, int] | None) -> None:
    if statuses:
        print(f"decided again: {_list(dict(sorted(statuses.items())))}")


def _list(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _hours(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
