"""The commands `datakit run …`: pipelines, on Ray."""

from __future__ import annotations

from typing import Annotated

import typer

from datakit.cli.encode import run_encode
from datakit.cli.options import (
    CatalogApp,
    CatalogOption,
    ConfigOption,
    JsonOption,
    RayOption,
    RecipeOption,
    SetOption,
    StagesOption,
    WhereOpenOption,
    WhereOption,
)
from datakit.errors import ConfigError

run_app = CatalogApp(no_args_is_help=True, help="Pipelines, on Ray.")
run_app.command("encode")(run_encode)
AskAgainOption = Annotated[bool, typer.Option("--retry-failed", help="Ask again about clips that had an error.")]


@run_app.command("ingest")
def run_ingest(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SRC...", help="Files, folders, globs, lists (txt, csv, jsonl, parquet), URLs."),
    ],
    catalog: CatalogOption,
    recipe: RecipeOption = None,
    settings: SetOption = None,
    config: ConfigOption = None,
    ray: RayOption = "local",
    stages: StagesOption = None,
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

    chosen = [
        *(settings or []),
        *_only(stages),
        *([f"recipe={recipe}"] if recipe else []),
        *([f"clips={clips}"] if clips else []),
    ]
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
    stages: StagesOption = None,
    where: WhereOption = None,
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

    names = _names(stages) if stages else None
    with ClipBar("scoring", quiet=as_json) as bar:
        counts = score(
            catalog, settings_loader.load(Settings, config, settings or []), names, where, redo, ray, bar.update
        )
    show_score(counts, as_json)


@run_app.command("caption")
def run_caption(
    catalog: CatalogOption,
    where: WhereOpenOption = None,
    retry_failed: AskAgainOption = False,
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
    where: WhereOpenOption = None,
    retry_failed: AskAgainOption = False,
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
    where: WhereOpenOption = None,
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


def _only(stages: str | None) -> list[str]:
    """Settings by which an ingest runs these stages, of those that can be switched off."""
    from pipelines.stages.registry import OPTIONAL, STAGES

    if stages is None:
        return []
    names = _names(stages)
    for name in names:
        if name not in STAGES:
            raise ConfigError(f"no stage {name!r}: there are {', '.join(STAGES)}")
    return [f"{name}.enabled={str(name in names).lower()}" for name in OPTIONAL]


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
