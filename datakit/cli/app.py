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

from datakit.cli.catalog import catalog_app
from datakit.cli.eval_samples import prefer, samples, vbench
from datakit.cli.eval_vae import vae
from datakit.cli.models import models_app
from datakit.cli.options import CatalogApp, JsonOption, Root
from datakit.cli.plan import plan
from datakit.cli.run import run_app
from datakit.cli.sample import sample_app
from datakit.cli.scores import scores
from datakit.cli.settings import settings
from datakit.cli.train import train_app
from datakit.errors import DatakitError
from datakit.version import __version__

INTERRUPTED = 130
"""The exit code that Typer makes of Ctrl-C."""
app = CatalogApp(
    name="datakit",
    cls=Root,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
eval_app = CatalogApp(no_args_is_help=True, help="How good a model is.")
app.add_typer(run_app, name="run")
app.add_typer(catalog_app, name="catalog")
app.add_typer(models_app, name="models")
app.add_typer(train_app, name="train")
app.add_typer(sample_app, name="sample")
app.add_typer(eval_app, name="eval")
app.command("plan")(plan)
app.command("settings")(settings)
app.command("scores")(scores)
eval_app.command("vae")(vae)
eval_app.command("samples")(samples)
eval_app.command("prefer")(prefer)
eval_app.command("vbench")(vbench)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"datakit {__version__}")
        raise typer.Exit


@app.callback()
def datakit(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Raw video in, a versioned Parquet catalog of scored clips out."""


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
