"""The commands `datakit sample PROMPTS…` and `datakit sample serve`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from datakit.cli.options import (
    KEPT,
    ConfigOption,
    JsonOption,
    PortOption,
    PresetOption,
    RayOption,
    SetOption,
    SnapshotOption,
)
from datakit.dependencies import require
from datakit.errors import ConfigError

if TYPE_CHECKING:
    from sampler.prompts.prompt import Prompt

NEEDED = ("torch", "diffusers", "transformers", "safetensors")


class PromptsOrCommand(TyperGroup):
    """`datakit sample serve` is a command, anything else prompts and options of `run`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in self.commands:
            args = ["run", *args]
        return super().parse_args(ctx, args)


sample_app = typer.Typer(
    cls=PromptsOrCommand, help="Videos from prompts, in bulk: datakit sample PROMPTS… --ckpt C --out DIR."
)

CkptOption = Annotated[
    str,
    typer.Option(
        "--ckpt", help="Folder of a training run, one of its checkpoints, or weights: a file, a folder, a name."
    ),
]


@sample_app.command(
    "run",
    epilog="Command: datakit sample serve opens a page to try a checkpoint on (datakit sample serve --help).",
)
def run(
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Folder of the results, itself a catalog; the same command again goes on."),
    ],
    ckpt: CkptOption,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPTS...", help="Prompts; or files of them: txt, csv (text,ref,name,neg), jsonl, parquet."
        ),
    ] = None,
    catalog: Annotated[
        str | None, typer.Option("--catalog", "-c", help="In place of prompts: captions (and frames) of its clips.")
    ] = None,
    where: Annotated[str, typer.Option("--where", help="With --catalog: SQL condition over the view clips.")] = KEPT,
    snapshot: SnapshotOption = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Take at most this many prompts.")] = None,
    mode: Annotated[
        str | None, typer.Option("--mode", help="t2v, i2v_head, i2v_tail, i2v_loop, v2v_head, v2v_tail, …_easy.")
    ] = None,
    ref: Annotated[
        list[str] | None,
        typer.Option("--ref", help="Picture or video for the prompt given here. Twice: head and tail."),
    ] = None,
    num_frames: Annotated[int | None, typer.Option("--num-frames", min=1, help="4k + 1.")] = None,
    resolution: Annotated[
        str | None, typer.Option("--resolution", help="256px, 768px …: the area of a square of that side.")
    ] = None,
    aspect_ratio: Annotated[str | None, typer.Option("--aspect-ratio", help="16:9, 9:16, 1:1, 2.39:1 …")] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Steps from noise to a video.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0)] = None,
    num_samples: Annotated[int | None, typer.Option("--num-samples", "-n", min=1, help="Of each prompt.")] = None,
    motion_score: Annotated[
        str | None, typer.Option("--motion-score", help="A number, or auto: a language model says.")
    ] = None,
    refine: Annotated[
        bool, typer.Option("--refine", help="Have a language model (settings llm) write the prompts out.")
    ] = False,
    preset: PresetOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    ray: RayOption = "local",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, show what would be done.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Sample videos, in bulk: datakit sample PROMPTS… --ckpt C --out DIR."""
    require("sampling", "train", *NEEDED)
    from datakit.cli.output.sample import Bar, show_estimate, show_sampled
    from sampler.settings import load_settings

    flags = {
        "video.mode": mode,
        "video.num_frames": num_frames,
        "video.resolution": resolution,
        "video.aspect_ratio": aspect_ratio,
        "sampling.steps": steps,
        "seed": seed,
        "samples": num_samples,
        "prompt.motion": motion_score,
        "prompt.refine": refine or None,
    }
    chosen = load_settings(
        preset, config, [*(settings or []), *(f"{name}={value}" for name, value in flags.items() if value is not None)]
    )
    asked = _prompts(prompts or [], ref or [], catalog, where, snapshot, limit, chosen)
    from sampler.generation.run import sample

    with Bar(quiet=as_json) as bar:
        done = sample(
            asked, ckpt, str(out), chosen, ray, dry_run, lambda found: show_estimate(found, as_json), bar.update
        )
    if not dry_run:
        show_sampled(done, out, as_json)
        if done.failed:
            raise typer.Exit(1)


@sample_app.command("serve")
def serve(
    ckpt: CkptOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the results, itself a catalog.")],
    port: PortOption = 7860,
    preset: PresetOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    ray: RayOption = "local",
) -> None:
    """Open a page to try a checkpoint on, on this machine."""
    require("sampling", "train", *NEEDED)
    require("the page", "serve", "gradio")
    from sampler.serve.studio import serve as open_page
    from sampler.settings import load_settings

    open_page(ckpt, out, load_settings(preset, config, settings or []), port, ray)


def _prompts(
    sources: list[str],
    references: list[str],
    catalog: str | None,
    where: str,
    snapshot: str | None,
    limit: int | None,
    settings: Any,
) -> list[Prompt]:
    from dataclasses import replace

    from datakit.video.uri import is_remote
    from sampler.generation.model_source import FPS
    from sampler.generation.sample_spec import mode_of
    from sampler.prompts.prompt import prompts_of_catalog, read_prompts
    from sampler.prompts.references import Reference

    def absolute(uri: str) -> str:  # processes elsewhere have other working folders
        return uri if is_remote(uri) else os.path.abspath(uri)

    if bool(sources) == (catalog is not None):
        raise ConfigError("say what to sample: prompts (or files of them), or --catalog DIR, and not both")
    if catalog is not None:
        if references:
            raise ConfigError("--ref goes with a prompt; with --catalog the clips themselves are the references")
        return prompts_of_catalog(catalog, where, mode_of(settings), snapshot, limit, settings.video.fps or FPS)
    found = read_prompts(sources, limit)
    if not references:
        return found
    if any(prompt.references for prompt in found):
        raise ConfigError("--ref goes with prompts on the command line; those of a file have references of their own")
    return [replace(prompt, references=tuple(Reference(absolute(uri)) for uri in references)) for prompt in found]
