"""How many tokens fit on a GPU, and what a sample costs to compute.

Memory of a training step of the MMDiT with bf16 weights and an Adam optimizer, in bytes, for P parameters of which T
are trained on S shards (measured, see docs/benchmarks.md: width 3072, 4 + 8 blocks, ColossalAI LowLevelZero,
one H100):

- weights 2 P, gradients 2 T, fp32 master and two moments 12 T, and while the optimizer steps an fp32 copy of the
  gradients, 4 T. 2.49 G parameters: 16 P = 37 GiB during the backward pass, 20 P = 46 GiB while it steps (measured:
  47.9 GiB).
- activations, linear in tokens: 33 bytes · width for each token and block. Measured: 17,656 tokens through 12 blocks
  raise the peak to 56.7 GiB, which is 32.3. A block that is recomputed keeps its input only (2 bytes · width) plus,
  once, the working set of one block.

Attention adds nothing that grows with the square of the tokens: the kernels in use (FlashAttention, cuDNN) keep no such
matrix.
"""

from __future__ import annotations

import shutil
import subprocess

from datakit.errors import ConfigError
from trainer.planning.settings import MemorySettings

GPUS = {"24gb": 23, "32gb": 31, "40gb": 39, "48gb": 44, "80gb": 78, "96gb": 94, "141gb": 139, "192gb": 178}
"""GiB that torch can use on cards sold by these sizes (RTX 4090, 5090, A100, L40S, A100 and H100, H100 NVL, H200,
B200), rounded down."""
DEFAULT_TOKENS = 18_432
"""Two samples of 129 frames at 256px, of whatever aspect: an H100 is busy (413 TFLOP/s measured at 8,828 tokens, 429 at
17,656)."""
ACTIVATION = 33
"""Bytes for each token, block and unit of width, nothing recomputed."""
INPUT = 2
"""Bytes for each token, block and unit of width, of a recomputed block."""
GIB = 2**30


def tokens_that_fit(gpu: str | float, memory: MemorySettings) -> int:
    """Largest micro-batch.

    Raises:
        ConfigError: no such GPU, or the model alone does not fit.
    """
    size = gpu_gib(gpu)
    available = (size - memory.reserve_gib) * GIB
    resident, stepping = _fixed(memory)
    tokens = int((available - resident) / _per_token(memory))
    if stepping > available or tokens < 1:
        raise ConfigError(
            f"a model of {parameters(memory) / 1e9:.1f} G parameters takes {max(resident, stepping) / GIB:.0f} GiB "
            f"of a GPU before any "
            f"sample does, {size:g} GiB are there less {memory.reserve_gib:g}: divide it (plan.memory.shards, "
            f"plan.memory.zero), train "
            "less of it (plan.memory.trained), or describe another model (plan.memory.width, .double_blocks, "
            ".single_blocks)"
        )
    return tokens


def peak_bytes(memory: MemorySettings, tokens: int) -> float:
    """Of a training step with so many tokens in a micro-batch, without the reserve."""
    resident, stepping = _fixed(memory)
    return max(stepping, resident + tokens * _per_token(memory))


def gpu_gib(gpu: str | float) -> float:
    """Memory of a GPU: by name, as a number, or of the one `here`.

    Raises:
        ConfigError: unknown name; none here.
    """
    if isinstance(gpu, str) and gpu.lower() == "here":
        return _here()
    if isinstance(gpu, str) and gpu.lower() in GPUS:
        return GPUS[gpu.lower()]
    try:
        size = float(gpu)
    except ValueError:
        size = 0.0
    if size <= 0:
        raise ConfigError(f"no GPU {gpu!r}: plan.gpu is one of {', '.join(GPUS)}, a number of GiB, or here")
    return size


def parameters(memory: MemorySettings) -> int:
    """Of the blocks (the rest is below a hundredth): 36 w² for a double block, 15 w² for a single one."""
    return memory.width**2 * (36 * memory.double_blocks + 15 * memory.single_blocks)


def cost(tokens: int, memory: MemorySettings) -> float:
    """Operations of one forward pass of a sample: see `trainer.models.mmdit.flops`, of which this is the sum."""
    blocks = memory.double_blocks + memory.single_blocks
    return blocks * (24.0 * memory.width**2 * tokens + 4.0 * memory.width * tokens**2)


def _fixed(memory: MemorySettings) -> tuple[float, float]:
    """Bytes whatever the batch: during the backward pass, and while the optimizer steps."""
    whole, s = parameters(memory), memory.shards
    trained = whole * memory.trained
    weights = 2 * whole / (s if memory.zero >= 3 else 1)
    gradients = 2 * trained / (s if memory.zero >= 2 else 1)
    states = 12 * trained / (s if memory.zero >= 1 else 1)
    copy = 4 * trained / (s if memory.zero >= 1 else 1)
    return weights + gradients + states, weights + gradients + states + copy


def _per_token(memory: MemorySettings) -> float:
    """Bytes of activations."""
    blocks = memory.double_blocks + memory.single_blocks
    kept = ACTIVATION * (1 - memory.recompute) + INPUT * memory.recompute
    working = ACTIVATION if memory.recompute else 0
    return memory.width * (blocks * kept + working)


def _here() -> float:
    """The smallest GPU of this machine, as the driver says it (a torch that tells takes seconds to import)."""
    tool = shutil.which("nvidia-smi")
    query = [tool or "", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, check=False) if tool else None
    sizes = [float(line) / 1024 for line in done.stdout.split() if line.isdigit()] if done else []
    if not sizes:
        raise ConfigError(
            "no GPU here: name one (--set plan.gpu=80gb), or give the tokens of a micro-batch (--set plan.tokens=18432)"
        )
    return round(min(sizes) * 0.98, 1)
