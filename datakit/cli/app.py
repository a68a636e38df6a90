"""The command line. Parts are imported when a command needs them: `datakit --help` stays quick."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from datakit.cli.catalog import CatalogOption, JsonOption, catalog_app
from datakit.cli.encode import run_encode
from datakit.cli.eval_samples import prefer as eval_prefer
from datakit.cli.eval_samples import samples as eval_samples
from datakit.cli.eval_samples import vbench as eval_vbench
from datakit.cli.eval_vae import vae as eval_vae
from datakit.cli.plan import plan
from datakit.cli.sample import sample_app
from datakit.cli.train import train_app
from datakit.errors import ConfigError, DatakitError

INTERRUPTED = 130
"""The exit code that Typer makes of Ctrl-C."""
app = typer.Typer(
    name="datakit",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Raw video in, a versioned Parquet catalog of scored clips out.",
)
run_app = typer.Typer(no_args_is_help=True, help="Pipelines, on Ray.")
eval_app = typer.Typer(no_args_is_help=True, help="How good a model is.")
models_app = typer.Typer(no_args_is_help=True, help="Weights: which there are, where they lie, and bringing them here.")
app.add_typer(run_app, name="run")
app.add_typer(catalog_app, name="catalog")
app.add_typer(models_app, name="models")
app.add_typer(train_app, name="train")
app.add_typer(sample_app, name="sample")
app.add_typer(eval_app, name="eval")
app.command("plan")(plan)
eval_app.command("vae")(eval_vae)
eval_app.command("samples")(eval_samples)
eval_app.command("prefer")(eval_prefer)
eval_app.command("vbench")(eval_vbench)
run_app.command("encode")(run_encode)

ConfigOption = Annotated[Path | None, typer.Option("--config", help="YAML file of settings.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="One setting: STAGE.option=value. Repeatable.")]
RayOption = Annotated[str, typer.Option("--ray", help="local (start Ray here), auto, or the address of a cluster.")]
FolderOption = Annotated[
    str | None, typer.Option("--folder", help="Folder of weights; default: ~/.cache/datakit/models.")
]


def main() -> None:
    """Entry point: errors meant for the user are one line on stderr and exit code 2; Ctrl-C is 130."""
    try:
        app(standalone_mode=True)
    except DatakitError as e:
        _finish(f"datakit: {' '.join(str(e).split())}", 2)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(bool(e.code))
        stopped = "datakit: stopped; what was committed stays, the same command goes on from there"
        _finish(stopped if code == INTERRUPTED else "", code)


def _finish(message: str, code: int) -> None:
    """Leave at once. A Ray that was started here goes too: its own goodbye takes a second, and left alone
    some of its processes stay for a minute."""
    if message:
        print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    for pid in _descendants(os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    os._exit(code)


def _descendants(pid: int) -> list[int]:
    """Processes that this one started, and theirs (Linux)."""
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in children.read_text().split():
                found += [int(child), *_descendants(int(child))]
    return found


@run_app.command("ingest")
def run_ingest(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SRC...", help="Files, folders, globs, lists (txt, csv, jsonl, parquet), URLs."),
    ],
    catalog: CatalogOption,
    recipe: Annotated[str | None, typer.Option("--recipe", help="Name of a shipped recipe, or a YAML file.")] = None,
    settings: SetOption = None,
    config: ConfigOption = None,
    ray: RayOption = "local",
    clips: Annotated[
        str | None, typer.Option("--clips", help="virtual (no files), cut (re-encode), copy (stream copy).")
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Do quarantined videos again.")] = False,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Take at most this many sources.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show settings, stages and what is missing; do nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Find shots, score clips, and enter them in the catalog (made if there is none)."""
    from datakit import config as settings_loader
    from pipelines.settings import Settings

    chosen = [*(settings or []), *([f"recipe={recipe}"] if recipe else []), *([f"clips={clips}"] if clips else [])]
    resolved = settings_loader.load(Settings, config, chosen)
    if dry_run:
        from datakit.cli.output.runs import show_plan

        show_plan(resolved, sources, catalog, as_json)
        return
    from datakit.cli.output.runs import ProgressBar, show_report
    from pipelines.runs.ingest import ingest

    with ProgressBar(quiet=as_json) as bar:
        report = ingest(sources, catalog, resolved, ray, retry_failed, limit, bar.update, leave_ray=True)
    show_report(report, catalog, as_json)


@run_app.command("score")
def run_score(
    catalog: CatalogOption,
    stages: Annotated[
        str | None, typer.Option("--stages", help="Comma-separated; all enabled ones if not given.")
    ] = None,
    where: Annotated[str | None, typer.Option("--where", help="SQL condition over the view clips.")] = None,
    redo: Annotated[bool, typer.Option("--redo", help="Also clips that have been through these stages.")] = False,
    settings: SetOption = None,
    config: ConfigOption = None,
    ray: RayOption = "local",
    as_json: JsonOption = False,
) -> None:
    """Fill score columns of clips that are in the catalog."""
    from datakit import config as settings_loader
    from datakit.cli.output.runs import ClipBar, show_score
    from pipelines.runs.score import score
    from pipelines.settings import Settings

    names = [name.strip() for name in stages.split(",") if name.strip()] if stages else None
    with ClipBar("scoring", quiet=as_json) as bar:
        counts = score(
            catalog, settings_loader.load(Settings, config, settings or []), names, where, redo, ray, bar.update
        )
    show_score(counts, as_json)


@run_app.command("caption")
def run_caption(
    catalog: CatalogOption,
    where: Annotated[
        str | None, typer.Option("--where", help="SQL condition over the view clips; not given: kept or pending.")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Ask again about clips that had an error.")
    ] = False,
    settings: SetOption = None,
    config: ConfigOption = None,
    ray: RayOption = "local",
    as_json: JsonOption = False,
) -> None:
    """Have a vision-language model describe clips: --set caption.backend=vllm|openai|transformers --set
    caption.model=M."""
    from datakit import config as settings_loader
    from datakit.cli.output.runs import ClipBar, show_captioned
    from pipelines.runs.caption import caption
    from pipelines.settings import Settings

    with ClipBar("captioning", quiet=as_json) as bar:
        done = caption(
            catalog, settings_loader.load(Settings, config, settings or []), where, retry_failed, ray, bar.update
        )
    show_captioned(done, as_json)


@run_app.command("refine")
def run_refine(
    catalog: CatalogOption,
    where: Annotated[
        str | None, typer.Option("--where", help="SQL condition over the view clips; not given: kept or pending.")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Ask again about clips that had an error.")
    ] = False,
    settings: SetOption = None,
    config: ConfigOption = None,
    ray: RayOption = "local",
    as_json: JsonOption = False,
) -> None:
    """Have a language model rewrite captions, the originals stay: --set refine.backend=… --set refine.model=M."""
    from datakit import config as settings_loader
    from datakit.cli.output.runs import ClipBar, show_captioned
    from pipelines.runs.caption import refine
    from pipelines.settings import Settings

    with ClipBar("refining", quiet=as_json) as bar:
        done = refine(
            catalog, settings_loader.load(Settings, config, settings or []), where, retry_failed, ray, bar.update
        )
    show_captioned(done, as_json)


@run_app.command("dedup")
def run_dedup(
    catalog: CatalogOption,
    where: Annotated[
        str | None, typer.Option("--where", help="SQL condition over the view clips; not given: kept or pending.")
    ] = None,
    settings: SetOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find clips that repeat others: exact, near (perceptual), or alike (embeddings); puts each group in one split.
    Opens no video."""
    from datakit import config as settings_loader
    from datakit.cli.output.runs import show_dedup
    from pipelines.runs.dedup import dedup
    from pipelines.settings import Settings

    show_dedup(dedup(catalog, settings_loader.load(Settings, config, settings or []), where), as_json)


@run_app.command("decide")
def run_decide(
    catalog: CatalogOption,
    recipe: Annotated[str, typer.Option("--recipe", help="Name of a shipped recipe, or a YAML file.")] = "default",
    rule: Annotated[
        list[str] | None,
        typer.Option(
            "--rule", help="NAME=CONDITION, in place of the recipe's rule of that name, or added. Repeatable."
        ),
    ] = None,
    without: Annotated[list[str] | None, typer.Option("--without", help="A rule to leave out. Repeatable.")] = None,
    what_if: Annotated[
        bool, typer.Option("--what-if", help="Only show what would be kept and lost, and what each rule does alone.")
    ] = False,
    where: Annotated[str | None, typer.Option("--where", help="With --what-if: count these clips only.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Apply a recipe to stored scores; opens no video."""
    from catalogs.tables.catalog import Catalog
    from datakit.cli.output.runs import show_funnel, show_what_if
    from pipelines.recipes.decide import decide_and_record
    from pipelines.recipes.recipe import load_recipe
    from pipelines.recipes.what_if import what_if as count

    opened = Catalog(catalog)
    rules = load_recipe(recipe, rule or [], without or [])
    if what_if:
        show_what_if(count(opened, rules, where), as_json)
        return
    if where is not None:
        raise ConfigError("--where goes with --what-if: a recipe decides about every clip")
    show_funnel(decide_and_record(opened, rules), as_json)


@models_app.command("list")
def models_list(
    kind: Annotated[str | None, typer.Option("--kind", help="Only these: clip, aesthetic, vlm, llm …")] = None,
    folder: FolderOption = None,
    as_json: JsonOption = False,
) -> None:
    """Models that the stages and the trainer load: size, licence, and where on this machine they are."""
    from datakit.cli.output.models import show_models

    show_models(kind, folder, as_json)


@models_app.command("download")
def models_download(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="From the list, ARCH/TAG of open_clip, or a Hugging Face id.")
    ],
    source: Annotated[
        str, typer.Option("--from", help="huggingface, modelscope, or a folder that mirrors one.")
    ] = "huggingface",
    folder: FolderOption = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Size and licence are agreed to; do not ask.")] = False,
) -> None:
    """Bring weights to this machine, after a look at their size and licence. Interrupted, it goes on where it
    stopped."""
    from datakit.cli.output.models import ask_and_download

    ask_and_download(names, folder, source, revision, yes)


@app.command("doctor")
def doctor(
    quick: Annotated[bool, typer.Option("--quick", help="Do not start Ray.")] = False, as_json: JsonOption = False
) -> None:
    """What is installed, what is missing and which extra brings it; exit code 1 when something needed fails."""
    from dataclasses import asdict

    from datakit.doctor import examine

    findings = examine(start_ray=not quick)
    if as_json:
        print(json.dumps([asdict(f) for f in findings], indent=1))
    else:
        for f in findings:
            mark = {True: "ok", False: "FAILS", None: "–"}[f.ok]
            print(f"{f.area:<22} {f.name:<24} {mark:<6} {f.detail}")
    raise typer.Exit(1 if any(f.ok is False for f in findings) else 0)


if __name__ == "__main__":
    main()
