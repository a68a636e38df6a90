"""The commands `datakit models list|download`."""

from __future__ import annotations

from typing import Annotated

import typer

from datakit.cli.options import JsonOption

models_app = typer.Typer(no_args_is_help=True, help="Weights: which there are, where they lie, and bringing them here.")
FolderOption = Annotated[
    str | None, typer.Option("--folder", help="Folder of weights; default: ~/.cache/datakit/models.")
]


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
