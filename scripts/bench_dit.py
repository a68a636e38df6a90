"""One forward of the full 11.9 B MMDiT, random weights: time, TFLOP/s, share of this machine's ceilings, memory; and
whether a compiled step's gradients are eager's.

    .venv/bin/python scripts/bench_dit.py [--sizes 192x336x129 576x1024x129] [--repeats N] [--tiny] [--out FILE]

Needs a GPU, except with --tiny (a small model, everything but the kernels of a GPU: it shows that the script works).
All numbers are of one run. Ceilings: the largest matrix product of the model in bf16 and fp8, and attention alone by
cuDNN and by FlashAttention-2. The floor of a forward is its FLOPs at these rates. The baseline is what one writes
first: eager, attention by torch's FlashAttention-2.

The check of gradients is there because torch 2.11's Inductor computes wrong ones for the modulation in silence unless
`mix_order_reduction` is off, as `trainer.models.common.compile` sets it; it is done for batches of 1 and 2, and once
more with it on.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from trainer.diffusion.rectified_flow import positions
from trainer.models.common.attention import attend, describe
from trainer.models.common.compile import compare_gradients, compile_blocks
from trainer.models.common.fp8 import quantise, to_fp8
from trainer.models.mmdit.architecture import MMDiTArchitecture
from trainer.models.mmdit.flops import forward_flops
from trainer.models.mmdit.model import MMDiT, MMDiTConfig

FULL = MMDiTConfig()
TINY = replace(FULL, hidden_size=256, num_heads=2, depth=1, depth_single_blocks=2)
TEXT = 512
COMPRESSION = (4, 8, 8)
GIB = 2**30


@dataclass(frozen=True)
class Bench:
    device: torch.device
    dtype: torch.dtype
    config: MMDiTConfig
    repeats: int
    text: int

    def seconds(self, run: Callable[[], object], repeats: int | None = None) -> float:
        """Median time of a call, after one that is not counted."""
        run()
        times = []
        for _ in range(repeats or self.repeats):
            self.wait()
            start = time.perf_counter()
            run()
            self.wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak(self) -> float:
        return torch.cuda.max_memory_allocated() / GIB if self.device.type == "cuda" else float("nan")

    def reset(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", help="height x width x frames")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--tiny", action="store_true", help="a small model on whatever there is")
    parser.add_argument("--skip-gradients", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON of all numbers")
    arguments = parser.parse_args()
    gpu = torch.cuda.is_available()
    if not gpu and not arguments.tiny:
        sys.exit("bench_dit.py needs a GPU; --tiny runs a small model without one")
    sizes = arguments.sizes or (["32x48x5"] if arguments.tiny else ["192x336x129", "576x1024x129"])
    bench = Bench(
        torch.device("cuda" if gpu else "cpu"),
        torch.bfloat16,
        TINY if arguments.tiny else FULL,
        arguments.repeats or (3 if gpu else 1),
        32 if arguments.tiny else TEXT,
    )
    print(
        f"{torch.cuda.get_device_name() if gpu else 'CPU'}, torch {torch.__version__}; "
        f"{describe(bench.device, bench.dtype, bench.config.hidden_size // bench.config.num_heads)}"
    )
    results = {"sizes": {size: measure(bench, size) for size in sizes}}
    if not arguments.skip_gradients:
        results["gradients"] = gradients(bench, sizes[0])
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1))


def measure(bench: Bench, size: str) -> dict:
    """All variants at one size, and the ceilings at its number of tokens."""
    inputs = make_inputs(bench, size, 1)
    tokens = inputs["img"].shape[1] + bench.text
    flops = forward_flops(bench.config, tokens)
    ceilings = measure_ceilings(bench, tokens)
    print(
        f"\n{size}: {tokens} tokens, {flops.total / 1e12:.3g} TFLOP a forward ({flops.attention / flops.total:.0%} "
        f"attention)"
    )
    print("ceilings, TFLOP/s: " + ", ".join(f"{k} {v / 1e12:.3g}" for k, v in ceilings.items()))
    reset_seed()
    model = make_model(bench)
    rows: dict[str, dict] = {}

    def add(name: str, reference: Tensor | None, gemm: str) -> Tensor:
        bench.reset()
        with torch.no_grad():
            seconds = bench.seconds(lambda: model(**inputs))
            out = model(**inputs).float()
        floor = flops.linear / ceilings[gemm] + flops.attention / ceilings["attention"]
        error = ((out - reference).norm() / reference.norm()).item() if reference is not None else 0.0
        rows[name] = {
            "seconds": seconds,
            "tflops": flops.total / seconds / 1e12,
            "of_floor": floor / seconds,
            "floor": floor,
            "peak_gib": bench.peak(),
            "error": error,
        }
        print(
            f"  {name:34s} {seconds:8.3f} s  {flops.total / seconds / 1e12:7.3g} TFLOP/s  floor {floor:.3f} s "
            f"({floor / seconds:4.0%})  "
            f"{bench.peak():5.1f} GiB  error {error:.1e}"
        )
        return out

    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        model.use_kernel("sdpa")
        reference = add("eager, FlashAttention-2 (baseline)", None, "bf16")
    model.use_kernel(None)
    add("eager, best kernel", reference, "bf16")
    compile_blocks(model.blocks)
    add("compiled", reference, "bf16")
    for scales in ("row", "tensor"):
        torch._dynamo.reset()
        del model
        bench.reset()
        reset_seed()
        model = make_model(bench)  # the same weights again
        to_fp8(model.blocks, scales, kept=MMDiTArchitecture.fp8_kept)
        compile_blocks(model.blocks)
        add(f"compiled, fp8, a scale a {scales}", reference, "fp8" if "fp8" in ceilings else "bf16")
    base = rows["eager, FlashAttention-2 (baseline)"]["seconds"]
    print(
        "  times the baseline's speed: "
        + ", ".join(f"{name} {base / row['seconds']:.2f}" for name, row in rows.items())
    )
    return {"tokens": tokens, "tflop": flops.total / 1e12, "ceilings": ceilings, "rows": rows}


def measure_ceilings(bench: Bench, tokens: int) -> dict[str, float]:
    """FLOP/s of the model's largest product and of its attention, each alone."""
    width, wide = bench.config.hidden_size, bench.config.mlp_size
    x, weight = (torch.randn(n, width, device=bench.device, dtype=bench.dtype) for n in (tokens, wide))
    ceilings = {"bf16": 2 * tokens * width * wide / bench.seconds(lambda: x @ weight.T, 10)}
    (rows, scale), (columns, other) = quantise(x, "tensor"), quantise(weight, "tensor")
    ceilings["fp8"] = (
        2
        * tokens
        * width
        * wide
        / bench.seconds(
            lambda: torch._scaled_mm(
                rows, columns.T, scale_a=scale, scale_b=other, out_dtype=torch.bfloat16, use_fast_accum=True
            ),
            10,
        )
    )
    heads = bench.config.num_heads
    q, k, v = (torch.randn(1, heads, tokens, width // heads, device=bench.device, dtype=bench.dtype) for _ in range(3))
    work = 4 * tokens * tokens * width
    ceilings["attention"] = work / bench.seconds(lambda: attend(q, k, v))
    if bench.device.type == "cuda":
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            ceilings["attention, FlashAttention-2"] = work / bench.seconds(
                lambda: F.scaled_dot_product_attention(q, k, v)
            )
    return ceilings


def gradients(bench: Bench, size: str) -> dict[str, float]:
    """Worst relative difference of a parameter's gradient, compiled against eager: two blocks of either kind at full
    width."""
    small = replace(bench, config=replace(bench.config, depth=2, depth_single_blocks=2))
    found = {}
    print(f"\ngradients of a compiled step against eager's, {size}, two blocks of either kind")
    for batch, trap in ((1, False), (2, False), (1, True)):
        torch._dynamo.reset()
        bench.reset()
        reset_seed()
        model = make_model(small)
        inputs = make_inputs(small, size, batch)
        worst = compare_gradients(
            model, model.blocks, lambda m, inputs=inputs: m(**inputs).float().square().mean(), mix_order_reduction=trap
        )
        name = f"batch {batch}" + (", mix_order_reduction on" if trap else "")
        parameter = max(worst, key=worst.get)
        found[name] = worst[parameter]
        print(f"  {name:34s} worst {worst[parameter]:.1e} in {parameter}")
        del model
    return found


def make_model(bench: Bench) -> MMDiT:
    """Random weights, made on the device; small ones, so that the velocity stays finite through 57 blocks."""
    with torch.device("meta"):
        model = MMDiT(bench.config)
    model = model.to(bench.dtype).to_empty(device=bench.device)
    for name, parameter in model.named_parameters():
        torch.nn.init.ones_(parameter) if name.endswith("scale") else torch.nn.init.normal_(parameter, std=0.02)
    return model


def make_inputs(bench: Bench, size: str, batch: int) -> dict[str, Tensor]:
    height, width, frames = map(int, size.split("x"))
    latent = (frames - 1) // COMPRESSION[0] + 1, height // COMPRESSION[1], width // COMPRESSION[2]
    ids = positions(batch, *latent, bench.config.patch_size, bench.device)
    config = bench.config

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=bench.device, dtype=bench.dtype)

    return {
        "img": random(batch, ids.shape[1], config.in_channels),
        "img_ids": ids,
        "txt": random(batch, bench.text, config.context_in_dim),
        "txt_ids": torch.zeros(batch, bench.text, 3, device=bench.device),
        "timesteps": torch.rand(batch, device=bench.device),
        "y_vec": random(batch, config.vec_in_dim),
        "cond": random(batch, ids.shape[1], config.in_channels + config.patch_size**2),
    }


def reset_seed() -> None:
    torch.manual_seed(0)


if __name__ == "__main__":
    main()
