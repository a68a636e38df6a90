"""Options that several commands have: each is declared here once, with one name and one help text.

A catalog may be given as the argument DIR or as `--catalog DIR`: commands of a `CatalogApp` take both.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

KEPT = "status = 'kept'"
"""What a recipe kept: the clips that training, exports and sampling take where nothing else is said."""

CATALOG_HELP = "Catalog folder, or s3://, gs:// URL."
CatalogArgument = Annotated[
    str, typer.Argument(metavar="DIR", help="Catalog folder, or s3://, gs:// URL; --catalog DIR says the same.")
]
CatalogOption = Annotated[str, typer.Option("--catalog", "-c", help=CATALOG_HELP)]
OptionalCatalog = Annotated[str | None, typer.Option("--catalog", "-c", help=CATALOG_HELP)]

WhereOption = Annotated[str | None, typer.Option("--where", help="SQL condition over the view clips.")]
WhereKeptOption = Annotated[str, typer.Option("--where", help="SQL condition over the view clips.")]
WhereOpenOption = Annotated[
    str | None, typer.Option("--where", help="SQL condition over the view clips; not given: kept or pending.")
]
SnapshotOption = Annotated[
    str | None, typer.Option("--snapshot", help="A tag, a run id, a time, or clips=12,decisions=4; not given: now.")
]
MixOption = Annotated[
    Path | None, typer.Option("--mix", help="YAML file of selections and their weights, in place of --catalog.")
]
RecipeOption = Annotated[str | None, typer.Option("--recipe", help="Name of a shipped recipe, or a YAML file.")]
StagesOption = Annotated[str | None, typer.Option("--stages", help="Comma-separated; all enabled ones if not given.")]

ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="YAML file of settings; wins over --preset, where there is one.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="One setting: SECTION.option=value (`datakit settings` lists them). Repeatable."),
]
PresetOption = Annotated[
    str | None, typer.Option("--preset", help="Shipped settings by name (tiny, …), or a YAML file.")
]

RayOption = Annotated[str, typer.Option("--ray", help="local (start Ray here), auto, or the address of a cluster.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout, nothing else.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Show what would be done; do nothing.")]
PortOption = Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free.")]
WeightsOption = Annotated[
    str | None, typer.Option("--weights", help="File, folder, or a name of `datakit models list`.")
]


class CatalogApp(typer.Typer):
    """An app whose commands take their catalog as DIR or as --catalog DIR.

    A command that declares `CatalogArgument` understands the option as well. One that declares `CatalogOption` or
    `OptionalCatalog` takes the argument too, unless it has arguments of its own.
    """

    def command(
        self, name: str | None = None, *, cls: type[TyperCommand] | None = None, **kwargs: Any
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        register = super().command(name, cls=cls or CatalogCommand, **kwargs)
        return lambda function: register(_with_argument(function))


class CatalogCommand(TyperCommand):
    """A command with the argument DIR, for which `--catalog DIR` may stand anywhere."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if any(param.name == "catalog" and param.param_type_name == "argument" for param in self.params):
            args = _catalog_first(args)
        return super().parse_args(ctx, args)


def _catalog_first(args: list[str]) -> list[str]:
    """`A B --catalog DIR` as `DIR A B`."""
    for place, arg in enumerate(args):
        if arg == "--":
            break
        if arg in ("--catalog", "-c") and place + 1 < len(args):
            return [args[place + 1], *args[:place], *args[place + 2 :]]
        if arg.startswith("--catalog="):
            return [arg.partition("=")[2], *args[:place], *args[place + 1 :]]
    return args


def _with_argument(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with an argument DIR beside its option --catalog, if it has the option and no argument yet."""
    signature = inspect.signature(function, eval_str=True)
    if "catalog" not in signature.parameters or any(_is_argument(p) for p in signature.parameters.values()):
        return function
    option = signature.parameters["catalog"]
    needed = option.default is inspect.Parameter.empty

    @functools.wraps(function)
    def with_argument(*, catalog_argument: str | None, catalog: str | None, **options: Any) -> Any:
        if catalog_argument is not None and catalog is not None:
            raise typer.BadParameter("the catalog is given twice, as DIR and as --catalog", param_hint="DIR")
        chosen = catalog_argument if catalog_argument is not None else catalog
        if needed and chosen is None:
            raise typer.BadParameter("which catalog? Give DIR, or --catalog DIR", param_hint="DIR")
        return function(catalog=chosen, **options)

    argument = inspect.Parameter(
        "catalog_argument",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[str | None, typer.Argument(metavar="DIR", help=CATALOG_HELP)],
    )
    option = option.replace(default=None if needed else option.default, annotation=OptionalCatalog)
    others = [p for p in signature.parameters.values() if p.name != "catalog"]
    keywords = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (argument, option, *others)]
    setattr(with_argument, "__signature__", signature.replace(parameters=keywords))  # noqa: B010 - functions declare none
    with_argument.__annotations__ = {p.name: p.annotation for p in keywords}
    return with_argument


def _is_argument(parameter: inspect.Parameter) -> bool:
    """Typer's rule: what is declared as one, and what has neither a declaration nor a default."""
    declared = [type(each).__name__ for each in getattr(parameter.annotation, "__metadata__", ())]
    if "OptionInfo" in declared:
        return False
    return "ArgumentInfo" in declared or parameter.default is inspect.Parameter.empty


class Root(TyperGroup):
    """The group of all commands. One that is not there is answered by where it is, or by what is near."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            ctx.fail(f"there is no command {args[0]!r}{self._hint(args[0])}")
        return super().resolve_command(ctx, args)

    def _hint(self, name: str) -> str:
        inside = [group for group, command in self.commands.items() if name in getattr(command, "commands", {})]
        near = difflib.get_close_matches(name, self.commands, n=1)
        suggestions = [f"`datakit {group} {name}`" for group in inside] or [f"`datakit {each}`" for each in near]
        return f": did you mean {' or '.join(suggestions)}?" if suggestions else "; `datakit --help` lists them"
