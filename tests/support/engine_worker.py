"""What the test processes of the engine do: two of them, started once, go through all scenarios and write down what
they found.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python engine_worker.py FOLDER
"""

from __future__ import annotations

import faulthandler
import gc
import json
import random
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from datakit.errors import DatakitError
from trainer.engine import Engine, EngineSettings, OptimizerSettings, join_processes
from trainer.engine.sharded_state import Piece, Shards
from trainer.models.common.weights import read_weights
from trainer.models.mmdit.architecture import MMDiTArchitecture
from trainer.models.mmdit.model import MMDiT, MMDiTConfig
from trainer.training.checkpoint import Checkpoints, Run, export, resume

CONFIG = dict(
    in_channels=8,
    vec_in_dim=16,
    context_in_dim=24,
    hidden_size=32,
    mlp_ratio=2.0,
    num_heads=4,
    depth=1,
    depth_single_blocks=1,
    axes_dim=(2, 2, 4),
)
ADAM = OptimizerSettings(lr=1e-3, warmup=2)
CLIP = 0.5
"""Below the gradients' norm, so that clipping matters."""
MICRO = ((0, 3), (3, 5), (5, 8))
"""A step's eight samples, in micro-batches of three, two and three."""
STEPS = 5


def main(folder: Path) -> None:
    found = {}
    for scenario in (matches, exchanges_once, averages, trains_a_part, refuses, resumes, changes_worlds):
        started = time.process_time()
        found[scenario.__name__] = scenario(folder / scenario.__name__)
        found[scenario.__name__]["seconds"] = round(time.process_time() - started, 2)
        if dist.get_rank() == 0:
            (folder / "found.json").write_text(json.dumps(found, indent=1))


def matches(folder: Path) -> dict[str, Any]:
    """Every way of spreading a model against one process with torch alone, whose step is one batch of eight."""
    wanted, found = reference(), {}
    for name, settings in {
        "ddp": dict(precision="fp32"),
        "zero1": dict(plugin="zero1", precision="fp32"),
        "zero2": dict(plugin="zero2", precision="fp32"),
        "tp": dict(plugin="hybrid", tp=2, precision="fp32"),
        "sp": dict(plugin="hybrid", sp=2, precision="fp32"),
        "tp fused": dict(plugin="hybrid", tp=2, precision="fp32"),
        "ddp bf16": {},
        "zero2 bf16": dict(plugin="zero2"),
        "gemini": dict(plugin="gemini"),
        "tp bf16": dict(plugin="hybrid", tp=2),
        "tp zero2 bf16": dict(plugin="hybrid", tp=2, zero=2),
        "sp zero1 bf16": dict(plugin="hybrid", sp=2, zero=1),
        "sp zero2 bf16": dict(plugin="hybrid", sp=2, zero=2),
    }.items():
        layout = "fused" if "fused" in name else "separate"
        expected = reference(layout) if layout == "fused" else wanted
        engine = build(layout=layout, **settings)
        losses, norms = train(engine, range(STEPS))
        found[name] = compare(losses, norms, engine.full_state(), expected)
    return found


def exchanges_once(folder: Path) -> dict[str, Any]:
    """Of two micro-batches, the ranks' gradients differ after the first, which is not the last."""
    found = {}
    for name, settings in {"ddp": {}, "zero1": dict(plugin="zero1"), "sp": dict(plugin="hybrid", sp=2)}.items():
        engine = build(precision="fp32", **settings)
        inputs, target = samples(dist.get_rank(), 0, 2) if name != "sp" else samples(0, 0, 2)
        gradients: list[Any] = [None, None]
        engine.backward((engine.forward(**inputs) - target).square().mean(), last=False)
        dist.all_gather_object(gradients, engine.module.txt_in.weight.grad.tolist())
        found[name] = gradients[0] != gradients[1]
        engine.backward((engine.forward(**inputs) - target).square().mean(), last=True)
        engine.step()
        weights: list[Any] = [None, None]
        dist.all_gather_object(weights, engine.module.txt_in.weight.tolist())
        found[name] &= weights[0] == weights[1]
    return found


def averages(folder: Path) -> dict[str, Any]:
    """The EMA against its closed form, Σ (1 − d) dᵏ wₙ₋ₖ + dⁿ w₀, of the masters after each step; both exported."""
    folder.mkdir(exist_ok=True)
    engine = build(plugin="zero2", precision="fp32", ema=0.7)
    masters = [engine.full_state()]
    for step in range(3):
        train(engine, [step])
        masters.append(engine.full_state())
    average = engine.full_state(ema=True)
    export(engine, folder / "ema.safetensors", ema=True, metadata={"step": "3"})
    export(engine, folder / "masters.safetensors", dtype=torch.float32)
    if dist.get_rank():
        return {}
    exported = {name: tensor.bfloat16() for name, tensor in average.items()}, masters[3]
    closed = {
        name: 0.7**3 * masters[0][name] + 0.3 * sum(0.7 ** (3 - k) * masters[k][name] for k in (1, 2, 3))
        for name in masters[0]
    }
    return {
        "error": max(float((average[n] - closed[n]).abs().max()) for n in closed),
        "moved": max(float((average[n] - masters[3][n]).abs().max()) for n in closed),
        "exported": [
            same(read_weights(folder / f"{name}.safetensors"), state)
            for name, state in zip(("ema", "masters"), exported)
        ],
    }


def trains_a_part(folder: Path) -> dict[str, Any]:
    """Only what requires a gradient changes, and only that is saved."""
    found = {}
    for plugin in ("ddp", "zero2"):
        model = make_model()
        model.requires_grad_(False)
        model.single_blocks.requires_grad_(True)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        engine = Engine(model, EngineSettings(plugin=plugin, precision="fp32"), ADAM, join_processes(), like(model))
        train(engine, [0])
        engine.save(folder / plugin)
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        found[plugin] = {
            "as wanted": changed == set(engine.parameters) == {n for n in before if n.startswith("single_blocks.")},
            "error": message(lambda: build(plugin=plugin, precision="fp32").load(folder / plugin)),
        }
    return found


def refuses(folder: Path) -> dict[str, Any]:
    """What does not fit is said in one line, on both ranks."""
    frozen, odd = make_model(), make_model(hidden_size=24, num_heads=3)
    frozen.img_in.requires_grad_(False)

    def engine(model: torch.nn.Module, **settings: Any) -> Callable[[], Engine]:
        return lambda: Engine(model, EngineSettings(precision="bf16", **settings), ADAM, join_processes(), like(model))

    said = {
        "other model": message(engine(torch.nn.Linear(2, 2), plugin="hybrid", sp=2)),
        "heads": message(engine(odd, plugin="hybrid", sp=2)),
        "frozen with tp": message(engine(frozen, plugin="hybrid", tp=2)),
        "frozen with gemini": message(engine(frozen, plugin="gemini")),
        "nothing": message(engine(make_model().requires_grad_(False))),
        "processes": message(engine(make_model(), plugin="hybrid", tp=4)),
        "no ema": message(lambda: build().full_state(ema=True)),
        "compile": message(engine(torch.nn.Linear(2, 2), compile=True)),
    }
    both: list[Any] = [None, None]
    dist.all_gather_object(both, said)
    return said | {"alike": both[0] == both[1]}


def resumes(folder: Path) -> dict[str, Any]:
    """Two steps, a checkpoint, two steps; against a fresh model with other weights, resumed, and two steps."""
    found = {}
    for name, settings in {
        "ddp": {},
        "ddp fp32": dict(precision="fp32"),
        "zero1": dict(plugin="zero1"),
        "zero2": dict(plugin="zero2"),
        "tp": dict(plugin="hybrid", tp=2),
        "sp zero2": dict(plugin="hybrid", sp=2, zero=2),
        "gemini": dict(plugin="gemini"),
    }.items():
        engine = build(ema=0.9, **settings)
        seed_all(dist.get_rank())
        train(engine, [0, 1])
        checkpoints = Checkpoints(folder / name, {"model": engine}, Run(plan="p1"))
        checkpoints.save({"position": [3, 14]})
        unbroken = train(engine, [2, 3])  # while it is written
        whole: list[int] = []
        checkpoints.wait(lambda path, step: whole.append(step))
        drawn, states = draw_all(), (engine.full_state(), engine.full_state(ema=True), engine.rate)
        dist.barrier()
        fresh = build(seed=1, ema=0.9, **settings)
        seed_all(99)
        resumed = resume({"model": fresh}, folder / name, plan="p1")
        again = train(fresh, [2, 3])
        found[name] = {
            "losses": again == unbroken,
            "random": draw_all() == drawn,
            "rate": fresh.rate == states[2],
            "loop": resumed.loop,
            "step": resumed.step,
            "whole": whole,
            "masters": same(fresh.full_state(), states[0]),
            "ema": same(fresh.full_state(ema=True), states[1]),
        }
    found["zero2"]["other plan"] = message(lambda: resume({"model": fresh}, folder / "zero2", plan="p2"))
    return found


def changes_worlds(folder: Path) -> dict[str, Any]:
    """From two processes to one and back, through all plugins: what is saved never changes by a bit."""
    first = build(plugin="zero2", ema=0.9)
    train(first, [0, 1])
    first.save(folder / "0")
    del first
    found = {}
    alone(folder / "meet1")
    if dist.get_rank() == 0 and RANK == 0:
        for i, settings in enumerate(
            (dict(), dict(plugin="zero2"), dict(plugin="gemini"), dict(plugin="hybrid", zero=1))
        ):
            pass_on(folder, i, f"1 process, {settings.get('plugin', 'ddp')}", settings, found)
    together(folder / "meet2")
    for i, settings in enumerate(
        (
            dict(),
            dict(plugin="hybrid", tp=2),
            dict(plugin="gemini"),
            dict(plugin="hybrid", sp=2, zero=2),
            dict(plugin="hybrid", tp=2, zero=1),
            dict(plugin="zero1"),
        ),
        4,
    ):
        pass_on(folder, i, f"2 processes, {settings}", settings, found)
    engine = build(seed=1, plugin="zero2", ema=0.9)
    engine.load(folder / "10")
    found["loss"] = train(engine, [2])[0]
    engine.load(folder / "0")
    found["loss of the first"] = train(engine, [2])[0]
    return found


def pass_on(folder: Path, index: int, name: str, settings: dict[str, Any], found: dict[str, Any]) -> None:
    engine = build(seed=1, ema=0.9, **settings)
    engine.load(folder / str(index))
    engine.save(folder / str(index + 1))
    found[name] = same(assemble(folder / str(index + 1)), assemble(folder / "0")) and engine.updates == 2


def reference(layout: str = "separate") -> tuple[list[float], list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Losses, norms, weights after and before, of plain torch."""
    model = make_model(layout=layout)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adam = torch.optim.AdamW(model.parameters(), lr=ADAM.lr, eps=ADAM.eps, weight_decay=0)
    losses, norms = [], []
    for step in range(STEPS):
        adam.param_groups[0]["lr"] = ADAM.lr * min(1, (step + 1) / 2)
        inputs, target = samples(step, 0, 8)
        loss = (model(**inputs) - target).square().mean()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        losses.append(float(loss.detach()))
        adam.step()
        adam.zero_grad()
    return losses, norms, {name: p.detach() for name, p in model.named_parameters()}, before


def train(engine: Engine, steps) -> tuple[list[float], list[float]]:
    """Losses and norms. Ranks take micro-batches by turns; where there is none left, one is repeated with weight
    zero."""
    losses, norms = [], []
    for step in steps:
        rounds = -(-len(MICRO) // engine.world)
        total = torch.zeros(())
        for i in range(rounds):
            index = i * engine.world + engine.rank
            start, stop = MICRO[min(index, len(MICRO) - 1)]
            inputs, target = samples(step, start, stop)
            weight = (stop - start) / 8 if index < len(MICRO) else 0.0
            loss = (engine.forward(**inputs).float() - target).square().mean() * weight
            engine.backward(loss, last=i == rounds - 1)
            total += loss.detach()
        dist.all_reduce(total)
        losses.append(float(total) * engine.world / dist.get_world_size())
        norms.append(engine.step())
    return losses, norms


def compare(losses: list[float], norms: list[float], weights: dict[str, Tensor], wanted: tuple) -> dict[str, Any]:
    """Largest differences; that of the weights relative to the way that they went."""
    if dist.get_rank():
        return {}
    way = sum((wanted[2][n] - wanted[3][n]).square().sum() for n in weights).sqrt()
    off = sum((weights[n] - wanted[2][n]).square().sum() for n in weights).sqrt()
    return {
        "loss": max(abs(a - b) for a, b in zip(losses, wanted[0])),
        "norm": max(abs(a / b - 1) for a, b in zip(norms, wanted[1])),
        "weights": float(off / way),
        "clipped": min(wanted[1]) > CLIP,
        "names": set(weights) == set(wanted[2]),
    }


def build(layout: str = "separate", seed: int = 0, **settings: Any) -> Engine:
    (FOLDER / "alive").touch()
    model = make_model(seed, layout=layout)
    return Engine(model, EngineSettings(grad_clip=CLIP, **settings), ADAM, join_processes(), like(model))


def like(model: torch.nn.Module) -> MMDiTArchitecture | None:
    return MMDiTArchitecture(model.config) if isinstance(model, MMDiT) else None


def make_model(seed: int = 0, layout: str = "separate", **sizes: int) -> MMDiT:
    model = MMDiT(MMDiTConfig(**CONFIG | sizes, layout=layout))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.1, generator=generator)
    return model


def samples(step: int, start: int, stop: int) -> tuple[dict[str, Tensor], Tensor]:
    """Of a step's eight; seven video tokens and five of text, which two ranks cannot share evenly."""
    generator = torch.Generator().manual_seed(step)

    def normal(*shape: int) -> Tensor:
        return torch.randn(8, *shape, generator=generator)[start:stop]

    positions = torch.tensor([[0.0, 0.0, i] for i in range(7)]).expand(stop - start, -1, -1)
    inputs = dict(
        img=normal(7, 8),
        img_ids=positions,
        txt=normal(5, 24),
        txt_ids=torch.zeros(stop - start, 5, 3),
        timesteps=torch.rand(8, generator=generator)[start:stop],
        y_vec=normal(16),
        cond=normal(7, 12),
    )
    return inputs, normal(7, 8)


def assemble(folder: Path) -> dict[str, Tensor]:
    """Everything in the shards of a folder, whole."""
    shards = Shards(folder)
    return {
        f"{kind}/{name}": shards.read(kind, Piece(name, shape, None, 0, 0, (0, 0), dict), 0, torch.Size(shape).numel())
        for name, shape in shards.parameters.items()
        for kind in ("master", "exp_avg", "exp_avg_sq", "ema")
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def message(work: Callable[[], Any]) -> str:
    try:
        work()
    except DatakitError as e:
        return str(e)
    return "no error"


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def draw_all() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def alone(meeting: Path) -> None:
    """Leave the other process; this one is a world of its own."""
    leave(meeting)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def together(meeting: Path) -> None:
    leave(meeting)
    dist.init_process_group("gloo", store=dist.FileStore(str(meeting), 2), rank=RANK, world_size=2)


def leave(meeting: Path) -> None:
    meeting.parent.mkdir(parents=True, exist_ok=True)
    gc.collect()  # engines that are gone close their groups
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    faulthandler.enable()  # the test ends a process that hangs by SIGABRT
    FOLDER = Path(sys.argv[1])
    dist.init_process_group(
        "cpu:gloo", timeout=timedelta(seconds=100)
    )  # named as on GPUs (cpu:gloo,cuda:nccl): ColossalAI looks at it
    RANK = dist.get_rank()
    main(FOLDER)
