"""The command `datakit eval vae`."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from datakit.cli.options import KEPT, JsonOption, OptionalCatalog, SnapshotOption, WeightsOption, WhereKeptOption
from datakit.dependencies import require
from datakit.errors import ConfigError, either
from trainer.models.autoencoders.registry import AUTOENCODERS

if TYPE_CHECKING:
    from trainer.evaluation.vae import Evaluation, Interval
    from trainer.models.autoencoders.base import Autoencoder
    from trainer.planning.plan import Plan

SizeOption = Annotated[
    list[str] | None,
    typer.Option("--size", help="Resolution: 256px, 480p … Repeatable; a clip has the largest that it reaches."),
]
FramesOption = Annotated[
    list[int] | None, typer.Option("--frames", help="Of a window. Repeatable; a clip has the longest that it fills.")
]
PerceptualOption = Annotated[
    str, typer.Option("--perceptual", help="LPIPS: alex-st, vgg-st (weights included), alex, vgg; or none.")
]
PerceptualWeightsOption = Annotated[
    list[str] | None,
    typer.Option("--perceptual-weights", help="Of alex or vgg: the network, and LPIPS's layers. Repeatable."),
]


def vae(
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="[FILE]...", help="Videos or images, in place of --catalog.")
    ] = None,
    catalog: OptionalCatalog = None,
    where: WhereKeptOption = KEPT,
    split: Annotated[str, typer.Option("--split", help="train, val or test, of the catalog.")] = "val",
    snapshot: SnapshotOption = None,
    autoencoder: Annotated[str, typer.Option("--autoencoder", help=f"{either(AUTOENCODERS.names())}.")] = "tiny",
    weights: WeightsOption = None,
    sizes: SizeOption = None,
    frames: FramesOption = None,
    fps: Annotated[float, typer.Option("--fps", help="Target frame rate.")] = 24.0,
    windows: Annotated[int, typer.Option("--windows", min=1, help="Of a clip, at most.")] = 1,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Windows at most, drawn from all.")] = None,
    tiled: Annotated[bool, typer.Option("--tiled", help="In tiles: less memory.")] = False,
    precision: Annotated[str, typer.Option("--precision", help="fp32 or bf16.")] = "fp32",
    perceptual: PerceptualOption = "alex-st",
    perceptual_weights: PerceptualWeightsOption = None,
    videos: Annotated[
        int, typer.Option("--videos", min=0, help="Videos, original and reconstruction side by side, in --out.")
    ] = 8,
    workers: Annotated[int, typer.Option("--workers", min=0, help="Processes that read.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for evaluation.json, the plan, and videos.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """How good an autoencoder is on clips: PSNR, SSIM, LPIPS, and its rate. Without --split, on clips that no training
    sees."""
    require("evaluation", "train", "torch", "safetensors")
    import torch

    from trainer.evaluation.vae import evaluate
    from trainer.models.autoencoders.build import check_precision, load_autoencoder
    from trainer.models.autoencoders.lpips import KINDS, build_perceptual
    from trainer.models.autoencoders.settings import AutoencoderSettings

    _check("--split", split, ("train", "val", "test"))
    _check("--precision", precision, ("fp32", "bf16"))
    _check("--perceptual", perceptual, (*KINDS, "none"))
    _check("--autoencoder", autoencoder, AUTOENCODERS.names())
    if (catalog is None) == (not files):
        raise ConfigError("give --catalog DIR or files to say what to reconstruct")
    if files and (where != KEPT or snapshot is not None):
        raise ConfigError("--where and --snapshot go with --catalog")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_precision(precision, device.type)
    model = load_autoencoder(AutoencoderSettings(kind=autoencoder, weights=weights))
    distance = build_perceptual(cast(Any, perceptual), perceptual_weights or ()) if perceptual != "none" else None
    lengths = frames or [33 if model.causal else 32]
    with _folder(out) as folder:
        plan = _plan(
            folder / "plan", files, catalog, where, snapshot, split, model, sizes or ["256px"], lengths, fps, windows
        )
        found = evaluate(
            plan,
            model,
            distance,
            device,
            torch.bfloat16 if precision == "bf16" else torch.float32,
            model.tiles if tiled else None,
            limit,
            workers,
            folder / "videos" if out else None,
            videos,
        )
        if out is not None:
            (folder / "evaluation.json").write_text(json.dumps(found.as_dict(), indent=1))
    _show(found, autoencoder, as_json)


def _check(option: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(f"{option} {value}: there are {', '.join(known)}")


@contextlib.contextmanager
def _folder(out: Path | None) -> Generator[Path]:
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="datakit-eval-") as folder:
        yield Path(folder)


def _plan(
    folder: Path,
    files: list[Path] | None,
    catalog: str | None,
    where: str,
    snapshot: str | None,
    split: str,
    model: Autoencoder,
    sizes: list[str],
    frames: list[int],
    fps: float,
    windows: int,
) -> Plan:
    """One window in a micro-batch: what a clip takes of time and memory does not depend on others."""
    from trainer.planning.build_plan import make_plan
    from trainer.planning.file_selection import FileSelection
    from trainer.planning.mixture import Member, selected
    from trainer.planning.settings import PlanSettings

    settings = PlanSettings(
        fps=fps,
        bucket_config={size: {length: (1.0, 1) for length in frames} for size in sizes},
        compression=model.compression,
        causal=model.causal,
        patch=1,
        text_tokens=0,
        windows=windows,
        captions="optional",
        split=cast(Any, split) if catalog else "train",
    )
    member = selected(catalog, where, snapshot) if catalog else Member("files", cast(Any, FileSelection(files or [])))
    return make_plan(member, settings, folder, overwrite=True)


def _show(found: Evaluation, kind: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps(found.as_dict(), indent=1))
        return
    distance = f"LPIPS {found.perceptual or ''}"
    print(f"{'bucket':<14}{'clips':>6}  {'PSNR dB':<22}{'SSIM':<24}{distance:<24}{'bits/pixel':>10}{'compression':>13}")
    for s in [*found.buckets, *([found.overall] if len(found.buckets) > 1 else [])]:
        print(
            f"{s.bucket:<14}{s.clips:>6}  "
            f"{_interval(s.psnr, 2):<22}{_interval(s.ssim, 4):<24}{_interval(s.lpips, 4):<24}"
            f"{s.bits_per_pixel:>10.3f}{s.compression:>12.1f}×"
        )
    rate = found.pixels / 1e6
    print(
        f"{kind} {found.autoencoder}: latents of mean {found.latents.mean:.3f}, standard deviation "
        f"{found.latents.std:.3f}; encoding "
        f"{rate / found.encode_s:.3g} and decoding {rate / found.decode_s:.3g} megapixels/s; at most "
        f"{found.peak_bytes / 2**30:.2f} GiB"
    )
    if found.broken:
        print(f"{found.broken} clips could not be read and are not counted", file=sys.stderr)


def _interval(value: Interval | None, digits: int) -> str:
    if value is None:
        return "–"
    if value.low is None:
        return f"{value.mean:.{digits}f}"
    return f"{value.mean:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"
