"""The commands `datakit eval samples`, `prefer` and `vbench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from datakit.cli.options import KEPT, CatalogOption, ConfigOption, JsonOption, PortOption, RayOption, SetOption

if TYPE_CHECKING:
    from sampler.evaluate import Evaluation
    from sampler.evaluate.distances import Measured

SamplesOption = Annotated[
    list[str],
    typer.Option("--samples", "-s", help="Output folder of `datakit sample`. Repeatable: one for each checkpoint."),
]
WIDTH = 34


def samples(
    samples: SamplesOption,
    catalog: CatalogOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path("evaluation.html"),
    where: Annotated[
        str, typer.Option("--where", help="SQL condition over the training catalog's clips: those to compare with.")
    ] = KEPT,
    baselines: Annotated[
        bool, typer.Option("--baselines/--no-baselines", help="Also measure noise and the mean frame.")
    ] = True,
    splits: Annotated[
        int, typer.Option("--splits", min=2, help="Seeded splits of the training clips, for noise floors.")
    ] = 10,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of splits, draws and noise.")] = 0,
    prompts: Annotated[int, typer.Option("--prompts", min=0, help="Rows of the page's grid of prompts.")] = 40,
    settings: SetOption = None,
    config: ConfigOption = None,
    ray: RayOption = "local",
    as_json: JsonOption = False,
) -> None:
    """Score samples with the stages of their training catalog; distances to the footage, memorisation, prompts side by
    side: one page."""
    from datakit import config as settings_loader
    from datakit.cli.output.runs import ClipBar
    from pipelines.settings import Settings
    from sampler.evaluate import evaluate_samples

    chosen = settings_loader.load(Settings, config, settings or [])
    with ClipBar("scoring", quiet=as_json) as bar:
        found = evaluate_samples(
            samples,
            catalog,
            out,
            where,
            chosen,
            ray,
            baselines,
            splits,
            seed,
            prompts,
            lambda what, done, of: bar.update(done, of),
        )
    if as_json:
        print(json.dumps(found.as_dict(), indent=1))
    else:
        _show(found)


def prefer(
    samples: SamplesOption,
    port: PortOption = 0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the order of the pairs, and of who stands left.")] = 0,
    author: Annotated[str | None, typer.Option("--author", help="Whose votes these are; not given: user@host.")] = None,
    summary: Annotated[bool, typer.Option("--summary", help="Only print what the votes say.")] = False,
) -> None:
    """Ask people which of two checkpoints' videos is better, without telling whose they are. Votes last; it goes on
    where it stopped."""
    from sampler.evaluate.prefer_app import serve, show
    from sampler.evaluate.preference import votes_of
    from sampler.evaluate.result_sets import read_sets

    if summary:
        sets = read_sets(samples)
        show(votes_of(sets), sets)
        return
    serve(samples, port, seed, author)


def vbench(
    samples: Annotated[
        str, typer.Option("--samples", "-s", help="Output folder of `datakit sample` for VBench's prompts.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to lay them out in: not there, or empty.")],
) -> None:
    """Lay samples out as VBench's evaluation reads them: PROMPT-INDEX.mp4 in one folder."""
    from sampler.prompts.vbench import export_vbench

    print(f"{export_vbench(samples, out):,} videos in {out}")


def _show(found: Evaluation) -> None:
    names = [s.label for s in found.sets]
    print(
        f"{sum(s.rows.height for s in found.sets):,} samples of {', '.join(names)}, beside {found.clips:,} clips of "
        f"{found.catalog}"
    )
    _show_features(found)
    for c in found.scores:
        for s in c.sets:
            print(
                f"{c.column.name:<16}{s.label[:WIDTH]:<{WIDTH + 2}}median {s.median:>9.4g}  clips' {c.median:>9.4g}  "
                f"KS {_with_floor(s.ks)}  shift {_with_floor(s.shift)} σ"
            )
    for stage, why in found.stages_not_run:
        print(f"stage {stage} did not run on the samples: {why}")
    for stage, clips in found.left_out:
        print(f"stage {stage}: {clips} training clips have it at another fingerprint than most, and are left out")
    for left in found.not_compared:
        print(f"{left.column} of {left.label} is not compared: {left.why}")
    memory = found.memorisation
    if memory.problem:
        print(f"memorisation: {memory.problem}")
    elif memory.threshold is None:
        print("memorisation: not enough training clips to hold any out")
    else:
        print(
            f"memorisation: {len(memory.flagged)} of {len(memory.neighbours)} samples are nearer to a training clip "
            f"than "
            f"{memory.threshold:.4g}, the 1st percentile of {len(memory.held)} held-out clips"
        )
    for tally in found.preferences:
        print(tally)
    if found.page:
        print(f"{found.page[0]}: {found.page[1] / 2**20:.1f} MiB")


def _show_features(found: Evaluation) -> None:
    compared = found.features
    if compared.problem:
        print(f"distance to the training footage: {compared.problem}")
        return
    print(
        f"{f'distance to the footage, {compared.model}':<{WIDTH + 2}}{'videos':>7}  "
        f"{'Fréchet':<20}{'noise floor':<20}{'kernel':<22}"
    )
    for d in compared.distances:
        error = f" ± {d.kernel.error:.2g}" if d.kernel and d.kernel.error is not None else ""
        kernel = f"{d.kernel.mean:.4g}{error}" if d.kernel else "not enough"
        value, floor = (
            (f"{s.mean:.4f} ± {s.std:.2g}" for s in (d.frechet.value, d.frechet.floor))
            if d.frechet
            else ("not enough", "–")
        )
        print(f"{d.label[:WIDTH]:<{WIDTH + 2}}{d.count:>7}  {value:<20}{floor:<20}{kernel:<22}")
    for s in found.sets:
        for name, nearer in (
            compared.nearer(s.label) if any(d.label == s.label for d in compared.distances) else {}
        ).items():
            print(
                f"samples of {s.label} are {'nearer' if nearer else 'NOT nearer'} to the training footage than {name}"
            )


def _with_floor(measured: Measured | None) -> str:
    return (
        "–"
        if measured is None
        else f"{measured.value.mean:.3f} (floor {measured.floor.mean:.3f} ± {measured.floor.std:.2g})"
    )
