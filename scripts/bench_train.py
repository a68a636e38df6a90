"""Training steps of a wide MMDiT on one GPU: TFLOP/s and MFU against this machine's own ceilings, and the wait for data
from latents.

    .venv/bin/python scripts/bench_train.py [--frames 33 65 129] [--steps N] [--plugin zero2] [--tiny] [--out FILE]

The model is Open-Sora 2.0's width (3072) cut to 4 double and 8 single blocks, 192×336, bf16, through the engine that
`datakit train`
uses: forward, backward, clipping, AdamW. FLOPs are three times the forward's, whatever is computed again. Ceilings are
    those of
`scripts/bench_dit.py`, measured in the same run: the floor of a step is its FLOPs at these rates; MFU is the share of
the GEMM ceiling. The baseline, what one writes first, is eager with torch's FlashAttention-2. Latents come from Parquet
files through the loader.

Needs a GPU, except with --tiny. Seen on one H100 (torch 2.11): 295 TFLOP/s for the reference's layers, 429 for a
compiled sketch.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
from bench_dit import COMPRESSION, TEXT, Bench, make_inputs, measure_ceilings
from synthetic_latents import synthetic_latents

from trainer.data.batch_sampler import Order
from trainer.data.dataloader import Batch, Loader, LoaderOptions, Position
from trainer.diffusion.rectified_flow import losses, noised, pack
from trainer.engine import Engine, EngineSettings, OptimizerSettings, join_processes
from trainer.models.mmdit.architecture import MMDiTArchitecture
from trainer.models.mmdit.flops import forward_flops
from trainer.models.mmdit.model import MMDiT, MMDiTConfig
from trainer.planning.plan import Bucket

WIDE = MMDiTConfig(depth=4, depth_single_blocks=8)
SMALL = dataclasses.replace(WIDE, hidden_size=256, num_heads=2, depth=1, depth_single_blocks=1)
BATCHES = {1: 32, 33: 4, 65: 2, 97: 2, 129: 1}
"""Samples that fit into 80 GB without recomputation; two of 129 frames take 57 GiB."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", nargs="+", type=int)
    parser.add_argument("--batch", nargs="+", type=int, help="as many as frames")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--plugin", default=None, help="of the engine; default: zero2, with --tiny ddp")
    parser.add_argument("--tiny", action="store_true", help="a small model on whatever there is")
    parser.add_argument("--out", type=Path, help="JSON of all numbers")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.tiny:
        sys.exit("bench_train.py needs a GPU; --tiny trains a small model without one")
    device = join_processes()
    size = "32x48" if arguments.tiny else "192x336"
    frames = arguments.frames or ([5] if arguments.tiny else [33, 65, 129])
    bench = Bench(device, torch.bfloat16, SMALL if arguments.tiny else WIDE, 3, 32 if arguments.tiny else TEXT)
    plugin = arguments.plugin or ("ddp" if arguments.tiny else "zero2")
    print(
        f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, torch {torch.__version__}, plugin "
        f"{plugin}"
    )
    results = {}
    for i, count in enumerate(frames):
        batch = arguments.batch[i] if arguments.batch else BATCHES.get(count, 1)
        results[count] = measure(bench, plugin, f"{size}x{count}", batch, arguments.steps, compiled=not arguments.tiny)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1))


def measure(bench: Bench, plugin: str, size: str, batch: int, steps: int, compiled: bool) -> dict:
    inputs = make_inputs(bench, size, 1)
    tokens = inputs["img"].shape[1] + bench.text
    flops = forward_flops(bench.config, tokens)
    ceilings = measure_ceilings(bench, tokens)
    floor = 3 * (flops.linear / ceilings["bf16"] + flops.attention / ceilings["attention"])
    print(
        f"\n{size}, {tokens} tokens, {flops.training / 1e12:.3g} TFLOP a sample; ceilings, TFLOP/s: "
        + ", ".join(f"{k} {v / 1e12:.3g}" for k, v in ceilings.items())
    )
    rows = {}
    variants = [
        ("eager, FlashAttention-2 (baseline)", False, (0, 0), batch, True),
        ("eager, best kernel", False, (0, 0), batch, False),
    ]
    if compiled:
        variants += [
            ("compiled", True, (0, 0), batch, False),
            ("compiled, batch doubled", True, (0, 0), 2 * batch, False),
        ]
    everything = (bench.config.depth, bench.config.depth_single_blocks)
    variants += [("recomputed but for attention", compiled, everything, 3 * batch, False)]
    for name, compile_it, recompute, samples, flash in variants:
        try:
            seconds, wait = train(bench, plugin, size, samples, steps, compile_it, recompute, flash)
        except torch.OutOfMemoryError:
            print(f"  {name:36s} batch {samples}: out of memory")
            continue
        rate = samples * flops.training / seconds / 1e12
        rows[name] = {
            "seconds": seconds,
            "batch": samples,
            "tflops": rate,
            "mfu": rate * 1e12 / ceilings["bf16"],
            "of_floor": samples * floor / seconds,
            "peak_gib": bench.peak(),
            "data_wait": wait,
        }
        print(
            f"  {name:36s} batch {samples}  {seconds:7.3f} s/step  {rate:7.3g} TFLOP/s  MFU {rows[name]['mfu']:4.0%}  "
            f"floor {samples * floor:.3f} s ({samples * floor / seconds:4.0%})  {bench.peak():5.1f} GiB  data wait "
            f"{wait:.1%}"
        )
    return {"tokens": tokens, "ceilings": ceilings, "rows": rows}


def train(
    bench: Bench,
    plugin: str,
    size: str,
    batch: int,
    steps: int,
    compile_it: bool,
    recompute: tuple[int, int],
    flash: bool,
) -> tuple[float, float]:
    """Seconds of a step, and the share of it that was spent waiting for latents."""
    gc.collect()
    bench.reset()
    torch.manual_seed(0)
    model = MMDiT(bench.config)
    model.initialise()
    model.checkpoint_activations(*recompute)
    if flash:
        model.use_kernel("sdpa")
    engine = Engine(
        model.to(bench.device),
        EngineSettings(plugin=plugin, precision="bf16", compile=compile_it),
        OptimizerSettings(),
        bench.device,
        MMDiTArchitecture(bench.config),
    )
    height, width, frames = map(int, size.split("x"))
    shape = (
        bench.config.in_channels // bench.config.patch_size**2,
        (frames - 1) // COMPRESSION[0] + 1,
        height // COMPRESSION[1],
        width // COMPRESSION[2],
    )
    inputs = make_inputs(bench, size, batch)
    with tempfile.TemporaryDirectory() as folder, flash_attention(flash and bench.device.type == "cuda"):
        bucket = Bucket(size, height, width, frames, batch, inputs["img"].shape[1] + bench.text)
        plan, latents = synthetic_latents(Path(folder), bucket, shape, count=max(64, 4 * batch))
        with Loader(plan, Order(plan, 0), 0, 1, Position(0, 0), LoaderOptions(workers=2), latents) as loader:
            for _ in range(3):
                step(engine, next(loader)[1][0], inputs, bench)
            bench.wait()
            start, waited = time.perf_counter(), loader.waited_s
            for _ in range(steps):
                step(engine, next(loader)[1][0], inputs, bench)
            bench.wait()
            seconds = time.perf_counter() - start
            return seconds / steps, (loader.waited_s - waited) / seconds


def flash_attention(only: bool):
    return sdpa_kernel(SDPBackend.FLASH_ATTENTION) if only else contextlib.nullcontext()


def step(engine: Engine, batch: Batch, inputs: dict, bench: Bench) -> None:
    """One optimizer step on the latents that were read; text and condition stay on the device."""
    latents = batch.mean.to(bench.device, non_blocking=True).float()
    noise = torch.randn_like(latents)
    times = torch.rand(len(latents), device=bench.device)
    seen, target = noised(latents, noise, times)
    velocity = engine.forward(**{**inputs, "img": pack(seen, bench.config.patch_size), "timesteps": times})
    engine.backward(losses(velocity, pack(target, bench.config.patch_size)).mean(), last=True)
    engine.step()


if __name__ == "__main__":
    main()
