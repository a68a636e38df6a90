"""Blocks compiled one by one (`torch.compile`), and a look at whether what comes out trains.

torch 2.11's Inductor with its default `triton.mix_order_reduction` gives wrong gradients for the modulation vector of a
compiled double block, NaN or off by a factor of a thousand, with the forward pass and all other gradients right. So it
is off while blocks are compiled here, and `check_gradients` compares a compiled step with eager before a long run.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import Tensor, nn

from datakit.errors import DatakitError

TOLERANCE = 5e-2
"""Relative difference of a gradient in bf16 that is no error: the worst seen of sound ones is 1.1e-2."""
SHAPES = 512
"""Different inputs (buckets, full and last batches) that blocks are compiled for; torch gives up after 8."""
LEAST = 1e-2
"""Of the root mean square of all gradients: gradients below (of the bias of k, that softmax hardly feels) are measured
by it."""
Loss = Callable[[nn.Module], Tensor]


class WrongGradients(DatakitError):
    """A compiled step computes other gradients than an eager one.

    Attributes:
        worst: relative difference of each parameter that is beyond the tolerance.
    """

    def __init__(self, worst: dict[str, float]):
        named = ", ".join(
            f"{name} ({error:.1e})" for name, error in sorted(worst.items(), key=lambda item: -item[1])[:5]
        )
        super().__init__(
            f"torch.compile gives wrong gradients for {len(worst)} parameters, worst: {named}; train with compile=false"
        )
        self.worst = worst


def compile_blocks(blocks: Iterable[nn.Module], backend: str = "inductor", mix_order_reduction: bool = False) -> None:
    """Compile every block of a model, in place; names of parameters stay. Compilation happens at the first call for a
    shape.

    Args:
        blocks: see `trainer.models.common.dit_architecture.Architecture.blocks`.
        backend: of torch.compile; `aot_eager` traces a block forward and back as one graph without generating code.
    """
    import torch._dynamo.config as dynamo  # takes a second

    dynamo.recompile_limit = max(dynamo.recompile_limit, SHAPES)  # the only place it can be set
    options = (
        {"triton.mix_order_reduction": mix_order_reduction}
        if backend == "inductor" and _has_mix_order_reduction()
        else None
    )
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False, backend=backend, options=options)


def compare_gradients(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    loss: Loss,
    backend: str = "inductor",
    mix_order_reduction: bool = False,
) -> dict[str, float]:
    """Relative difference (norm of the difference over norm) of every parameter's gradient: compiled against eager.

    Args:
        model: not compiled; as before when this returns. Its gradients are dropped.
        blocks: of it, that are compiled.
        loss: scalar, of a call of the model; the same at every call.
    """
    eager = _gradients(model, loss)
    with _compiled(blocks, backend, mix_order_reduction):
        compiled = _gradients(model, loss)
    model.zero_grad(set_to_none=True)
    typical = math.sqrt(
        sum(g.square().sum().item() for g in eager.values()) / max(1, sum(g.numel() for g in eager.values()))
    )
    return {name: _difference(compiled[name], gradient, LEAST * typical) for name, gradient in eager.items()}


def check_gradients(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    loss: Loss,
    backend: str = "inductor",
    tolerance: float = TOLERANCE,
) -> float:
    """The worst relative difference, see `compare_gradients`.

    Raises:
        WrongGradients: some are beyond the tolerance, or not finite.
    """
    differences = compare_gradients(model, blocks, loss, backend)
    wrong = {name: error for name, error in differences.items() if not error <= tolerance}
    if wrong:
        raise WrongGradients(wrong)
    return max(differences.values())


def _gradients(model: nn.Module, loss: Loss) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss(model).backward()
    return {name: p.grad.detach().float().cpu() for name, p in model.named_parameters() if p.grad is not None}


def _difference(found: Tensor, wanted: Tensor, least: float) -> float:
    norm = max(wanted.norm().item(), least * math.sqrt(wanted.numel()))
    return (found - wanted).norm().item() / norm if norm else found.norm().item()


@contextlib.contextmanager
def _compiled(blocks: Sequence[nn.Module], backend: str, mix_order_reduction: bool) -> Iterator[None]:
    compile_blocks(blocks, backend, mix_order_reduction)
    try:
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None  # what `Module.compile` sets; torch has no way back of its own


def _has_mix_order_reduction() -> bool:
    import torch._inductor.config as inductor

    return hasattr(inductor.triton, "mix_order_reduction")
