"""One video by the full model, random weights: T5-XXL and CLIP, the 11.9 B MMDiT, HunyuanVideo's autoencoder, each at
its released
size: seconds and memory, beside the reference's way in the same run, and what the floor is.

    .venv/bin/python scripts/bench_sample.py [--steps 50] [--baseline-steps 5] [--large-steps 2] [--tiny] [--out FILE]

Needs a GPU, except with --tiny (small models, on whatever there is: it shows that the script works). The reference's
way is that of Open-Sora 2.0's code: the three forwards of a step together (conditioned, without text, with neither),
eager, by FlashAttention-2; a few steps are timed and taken times 50. Ours computes the forwards that change the result,
by cuDNN's attention, each block compiled, in bf16 and with linear layers in fp8. Both make the same latents: their
difference is printed. At 192x336x129 all 50 steps are run; at 576x1024x129 a few, whose time per forward is taken times
the number of forwards.

Peaks are of tensors. Models come one after the other: text encoders leave before the MMDiT comes, as `work.offload` has
it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from bench_dit import FULL, TINY, Bench, make_model, measure_ceilings, reset_seed

from trainer.diffusion.rectified_flow import Guidance, Text, condition, denoise, forwards, schedule, shift, velocity_of
from trainer.models.autoencoders.base import Autoencoder
from trainer.models.autoencoders.build import build_autoencoder
from trainer.models.common.attention import describe
from trainer.models.common.compile import compile_blocks
from trainer.models.common.fp8 import to_fp8
from trainer.models.mmdit.architecture import MMDiTArchitecture
from trainer.models.mmdit.flops import forward_flops
from trainer.models.mmdit.model import MMDiT

TEXT = 512
WHOLE_PIXELS = 16_000_000  # as sampler.generation.passes: more are decoded in tiles
PUBLISHED = {
    "192x336x129": (60.0, 52.5),
    "576x1024x129": (1656.0, 60.3),
}  # Open-Sora 2.0's README: seconds and GB on one H100
STEPS = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--baseline-steps", type=int, default=5)
    parser.add_argument("--large-steps", type=int, default=2, help="at 576x1024x129; 0: leave it out")
    parser.add_argument("--tiny", action="store_true", help="small models, on whatever there is")
    parser.add_argument("--out", type=Path, help="JSON of all numbers")
    arguments = parser.parse_args()
    gpu = torch.cuda.is_available()
    if not gpu and not arguments.tiny:
        sys.exit("bench_sample.py needs a GPU; --tiny runs small models without one")
    bench = Bench(
        torch.device("cuda" if gpu else "cpu"),
        torch.bfloat16,
        TINY if arguments.tiny else FULL,
        3 if gpu else 1,
        32 if arguments.tiny else TEXT,
    )
    if arguments.tiny:
        arguments.steps, arguments.baseline_steps, arguments.large_steps = min(arguments.steps, 14), 1, 1
    print(
        f"{torch.cuda.get_device_name() if gpu else 'CPU'}, torch {torch.__version__}; "
        f"{describe(bench.device, bench.dtype, bench.config.hidden_size // bench.config.num_heads)}"
    )
    found = {}
    with torch.no_grad():
        size = "32x48x9" if arguments.tiny else "192x336x129"
        found[size] = measure(bench, size, arguments.steps, arguments.steps, arguments.baseline_steps, arguments.tiny)
        if arguments.large_steps:
            size = "64x64x9" if arguments.tiny else "576x1024x129"
            found[size] = measure(bench, size, arguments.steps, arguments.large_steps, 1, arguments.tiny)
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1))


def measure(bench: Bench, size: str, steps: int, own_steps: int, baseline_steps: int, tiny: bool) -> dict:
    """All variants at a size. Fewer `own_steps` than `steps`: extrapolated by the forwards."""
    autoencoder = make_autoencoder(bench, tiny)
    height, width, frames = map(int, size.split("x"))
    latent = autoencoder.latent_shape(frames, height, width)
    autoencoder.to("cpu")
    tokens = latent[1] * (latent[2] // 2) * (latent[3] // 2) + bench.text
    flops, count = forward_flops(bench.config, tokens), forwards(steps, Guidance(), latent[1], False)
    bench.reset()
    ceilings = measure_ceilings(bench, tokens)
    print(
        f"\n{size}, {steps} steps: {tokens} tokens, {flops.total / 1e12:.3g} TFLOP a forward, {count} of {3 * steps} "
        f"forwards matter"
    )
    print("ceilings, TFLOP/s: " + ", ".join(f"{k} {v / 1e12:.3g}" for k, v in ceilings.items()))
    texts_s, texts_gib = time_texts(bench, tiny)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1, *latent, generator=generator).to(bench.device)
    states, pooled = (
        torch.randn(2, *shape, generator=generator).to(bench.device, bench.dtype)
        for shape in ((bench.text, bench.config.context_in_dim), (bench.config.vec_in_dim,))
    )
    text, empty = (Text(states[i : i + 1], pooled[i : i + 1]) for i in (0, 1))
    inputs = (noise, text, empty, steps)
    row, reference = time_reference(bench, inputs, baseline_steps)
    rows = {"reference's way": row}
    for name, scales in (("bf16", None), ("fp8, a scale a row", "row"), ("fp8, a scale a tensor", "tensor")):
        run = 1 if scales and bench.device.type == "cpu" else own_steps  # a CPU multiplies 8-bit floats one by one
        rows[name] = time_ours(bench, inputs, scales, run, baseline_steps, reference)
        rows[name]["dit_s"] *= count / forwards(steps, Guidance(), latent[1], False, run)
        rows[name]["floor_s"] = count * (
            flops.linear / ceilings["fp8" if scales else "bf16"] + flops.attention / ceilings["attention"]
        )
    bench.reset()
    decode_s, decode_gib = time_decode(bench, autoencoder, latent, frames * height * width > WHOLE_PIXELS)
    show(size, steps, rows, texts_s, texts_gib, decode_s, decode_gib)
    return {
        "tokens": tokens,
        "forwards": count,
        "ceilings": ceilings,
        "rows": rows,
        "texts_s": texts_s,
        "texts_gib": texts_gib,
        "decode_s": decode_s,
        "decode_gib": decode_gib,
    }


def time_reference(bench: Bench, inputs: tuple, run: int) -> tuple[dict, Tensor]:
    reset_seed()
    model = make_model(bench)
    model.use_kernel("sdpa")
    bench.reset()
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        reference_way(model, *inputs, 1)  # not counted: kernels are chosen
        seconds, found = timed(bench, lambda: reference_way(model, *inputs, run))
    return {"dit_s": seconds / run * inputs[3], "peak_gib": bench.peak(), "run_steps": run}, found


def time_ours(bench: Bench, inputs: tuple, scales: str | None, run: int, compared: int, reference: Tensor) -> dict:
    """Seconds of the steps that are run; how far the first `compared` steps are from the reference's."""
    torch._dynamo.reset()
    bench.reset()
    reset_seed()
    model = make_model(bench)
    if scales:
        to_fp8(model.blocks, scales, kept=MMDiTArchitecture.fp8_kept)
    bench.reset()
    compile_blocks(model.blocks)
    compiling, _ = timed(bench, lambda: warm(model, *inputs))
    seconds, _ = timed(bench, lambda: ours(model, *inputs, run))
    peak = bench.peak()
    same = ours(model, *inputs, compared)
    return {
        "dit_s": seconds,
        "peak_gib": peak,
        "run_steps": run,
        "compile_s": compiling,
        "difference": ((same - reference).norm() / reference.norm()).item(),
    }


def show(
    size: str, steps: int, rows: dict[str, dict], texts_s: float, texts_gib: float, decode_s: float, decode_gib: float
) -> None:
    base = rows["reference's way"]["dit_s"]
    print(f"  texts {texts_s:.2f} s ({texts_gib:.1f} GiB), decode {decode_s:.2f} s ({decode_gib:.1f} GiB)")
    for name, row in rows.items():
        whole, peak = row["dit_s"] + texts_s + decode_s, max(row["peak_gib"], texts_gib, decode_gib)
        line = (
            f"  {name:22s} DiT {row['dit_s']:8.2f} s  whole {whole:8.2f} s  peak {peak:5.1f} GiB  "
            f"{base / row['dit_s']:5.2f} × the reference's way"
        )
        if "floor_s" in row:
            line += (
                f"  floor {row['floor_s']:.2f} s ({row['floor_s'] / row['dit_s']:.0%})  difference "
                f"{row['difference']:.1e}  compiled in {row['compile_s']:.0f} s"
            )
        if row["run_steps"] < steps:
            line += f"  (from {row['run_steps']} of {steps} steps)"
        print(line)
    if size in PUBLISHED:
        print("  published for the reference: {} s, {} GB".format(*PUBLISHED[size]))


def timed(bench: Bench, run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    bench.wait()
    start = time.perf_counter()
    found = run()
    bench.wait()
    return time.perf_counter() - start, found


def reference_way(model: MMDiT, noise: Tensor, text: Text, empty: Text, steps: int, run: int) -> Tensor:
    """All three forwards of a step in one batch, as Open-Sora 2.0's code does; the first steps of the schedule."""
    velocity, dtype = velocity_of(model), next(model.parameters()).dtype
    nothing = condition(torch.zeros_like(noise[:, :1]), torch.zeros_like(noise)).repeat(3, 1, 1, 1, 1)
    states, pooled = (torch.cat([getattr(t, name) for t in (text, empty, empty)]) for name in ("states", "pooled"))
    times = schedule(steps, shift(*noise.shape[2:])).tolist()
    x, guidance = noise, Guidance()
    for step, (t, t_next) in enumerate(zip(times[:run], times[1:])):
        on_text, on_image = guidance.scales(step, steps, noise.shape[2])
        found = velocity(
            x.repeat(3, 1, 1, 1, 1).to(dtype),
            nothing.to(dtype),
            states,
            pooled,
            torch.full((3,), t, dtype=x.dtype, device=x.device),
        ).float()
        c, u, u2 = found.chunk(3)
        on_image = on_image.to(x).view(-1, 1, 1)
        x = x + (t_next - t) * (u2 + on_image * (u - u2) + on_text * (c - u))
    return x


def ours(
    model: MMDiT, noise: Tensor, text: Text, empty: Text, steps: int, run: int, guidance: Guidance = Guidance()
) -> Tensor:
    """`trainer.diffusion.rectified_flow.denoise` as `sampler.generation.denoiser` calls it: the first steps of the
    schedule."""
    velocity, dtype = velocity_of(model), model.img_in.weight.dtype

    def call(x: Tensor, cond: Tensor, states: Tensor, pooled: Tensor, t: Tensor) -> Tensor:
        return velocity(x.to(dtype), cond.to(dtype), states, pooled, t).float()

    nothing = condition(torch.zeros_like(noise[:, :1]), torch.zeros_like(noise))
    return denoise(call, noise, nothing, text, empty, steps, guidance, run=run)


def warm(model: MMDiT, noise: Tensor, text: Text, empty: Text, steps: int) -> None:
    """Compile for both shapes: a step with guidance and one without."""
    for guidance in (Guidance(), Guidance(1.0, 1.0)):
        ours(model, noise, text, empty, steps, 1, guidance)


def time_texts(bench: Bench, tiny: bool) -> tuple[float, float]:
    """Seconds for a prompt and the empty one by T5-v1.1-XXL and CLIP-L with random weights, and GiB."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    sizes = (
        dict(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
        if tiny
        else dict(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
    )
    models = (
        on_device(bench, lambda: T5EncoderModel(T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **sizes))),
        on_device(
            bench,
            lambda: CLIPTextModel(
                CLIPTextConfig()
                if tiny
                else CLIPTextConfig(
                    hidden_size=768,
                    intermediate_size=3072,
                    num_hidden_layers=12,
                    num_attention_heads=12,
                    vocab_size=49408,
                )
            ),
        ),
    )
    ids = [torch.ones(1, length, dtype=torch.long, device=bench.device) for length in (bench.text, 77)]
    bench.reset()
    seconds = bench.seconds(
        lambda: [model(input_ids=own) for _ in ("prompt", "empty") for model, own in zip(models, ids)]
    )
    return seconds, bench.peak()


def time_decode(bench: Bench, autoencoder: Autoencoder, latent: tuple[int, ...], tiled: bool) -> tuple[float, float]:
    autoencoder.to(bench.device)
    latents = torch.randn(1, *latent, device=bench.device, dtype=next(autoencoder.parameters()).dtype)
    bench.reset()
    seconds = bench.seconds(lambda: autoencoder.decode(latents, autoencoder.tiles if tiled else None), 1)
    return seconds, bench.peak()


def make_autoencoder(bench: Bench, tiny: bool) -> Autoencoder:
    return (
        (build_autoencoder("tiny", "embedded") if tiny else build_autoencoder("hunyuan"))
        .eval()
        .to(bench.dtype if not tiny else torch.float32)
    )


def on_device(bench: Bench, make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """Random weights of the device's own making: 11 billion numbers from a CPU would take minutes."""
    with torch.device("meta"):
        model = make()
    model = model.to(bench.dtype).to_empty(device=bench.device).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        torch.nn.init.normal_(tensor, std=0.02) if tensor.is_floating_point() else tensor.zero_()
    return model


if __name__ == "__main__":
    main()
