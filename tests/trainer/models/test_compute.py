"""How the MMDiT is computed: kernels, recomputation, compilation, 8-bit floats, and what none of them may change."""

import re
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trainer.diffusion.rectified_flow import positions
from trainer.models.common.attention import KERNELS, attend, best_kernel, describe
from trainer.models.common.compile import WrongGradients, check_gradients, compile_blocks
from trainer.models.common.fp8 import Fp8Linear, to_fp8
from trainer.models.mmdit.architecture import MMDiTArchitecture
from trainer.models.mmdit.flops import forward_flops
from trainer.models.mmdit.model import MMDiT, MMDiTConfig

pytestmark = pytest.mark.slow

CONFIG = MMDiTConfig(
    in_channels=16,
    vec_in_dim=8,
    context_in_dim=12,
    hidden_size=64,
    num_heads=4,
    depth=2,
    depth_single_blocks=2,
    axes_dim=(4, 6, 6),
)


def random_model(config: MMDiTConfig = CONFIG) -> MMDiT:
    torch.manual_seed(0)
    model = MMDiT(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float(name.endswith("scale")), std=0.15)
    return model


def random_inputs(
    config: MMDiTConfig = CONFIG, batch: int = 2, size: tuple[int, int, int] = (3, 4, 6), text: int = 5
) -> dict[str, torch.Tensor]:
    """Size: of the latents."""
    torch.manual_seed(1)
    ids = positions(batch, *size, config.patch_size)
    n = ids.shape[1]
    inputs = {
        "img": torch.randn(batch, n, config.in_channels),
        "img_ids": ids,
        "txt": torch.randn(batch, text, config.context_in_dim),
        "txt_ids": torch.zeros(batch, text, 3),
        "timesteps": torch.rand(batch),
        "y_vec": torch.randn(batch, config.vec_in_dim),
    }
    if config.cond_embed:
        inputs["cond"] = torch.randn(batch, n, config.in_channels + config.patch_size**2)
    if config.guidance_embed:
        inputs["guidance"] = torch.rand(batch)
    return inputs


def loss(model: MMDiT) -> torch.Tensor:
    return model(**random_inputs()).square().mean()


def gradients(model: MMDiT) -> list[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss(model).backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("layout", ["separate", "fused"])
@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize(
    "batch, size, text", [(1, (1, 2, 2), 1), (2, (3, 4, 6), 5), (3, (2, 6, 2), 7), (1, (5, 2, 8), 3)]
)
def test_any_size_batch_length_and_aspect(layout, patch, batch, size, text):
    """Shapes are right; a sample is what it is alone; order in the batch does not matter; every parameter has a
    gradient."""
    config = replace(
        CONFIG, layout=layout, patch_size=patch, guidance_embed=layout == "fused", cond_embed=layout == "separate"
    )
    model, inputs = random_model(config), random_inputs(config, batch, size, text)
    out = model(**inputs)
    assert out.shape == inputs["img"].shape and out.isfinite().all()
    for i in range(batch):
        assert torch.allclose(model(**{k: v[i : i + 1] for k, v in inputs.items()})[0], out[i], atol=2e-5)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_attention_is_softmax_of_scaled_products():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 7, 16)
    expected = torch.softmax(q @ k.transpose(-1, -2) / 4, -1) @ v
    assert torch.allclose(attend(q, k, v), expected, atol=1e-5) and torch.allclose(
        attend(q, k, v, "sdpa"), expected, atol=1e-5
    )
    with pytest.raises(ValueError, match="cudnn, flash-attn, sdpa"):
        attend(q, k, v, "magic")


def test_the_kernel_is_chosen_by_device_and_type(monkeypatch):
    """Hopper takes cuDNN's in half precision; older ones flash-attn where it is installed; what kernels do not take,
    torch chooses."""
    from trainer.models.common import attention

    gpu, half = torch.device("cuda:0"), torch.bfloat16
    for major, installed, expected in [
        (9, False, "cudnn"),
        (10, True, "cudnn"),
        (8, True, "flash-attn"),
        (8, False, "sdpa"),
    ]:
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device, major=major: type("Properties", (), {"major": major})
        )
        monkeypatch.setattr(attention, "FLASH_ATTN", installed)
        assert best_kernel(gpu, half, 128) == expected and expected in KERNELS
        assert (
            best_kernel(gpu, torch.float32, 128) == best_kernel(gpu, half, 60) == best_kernel(gpu, half, 256) == "sdpa"
        )
    assert best_kernel(torch.device("cpu"), half, 128) == "sdpa" and "cpu" in describe(torch.device("cpu"), half, 128)


def test_recomputed_blocks_keep_less_and_give_the_same_gradients():
    """So many blocks of either kind as was asked for; attention is computed again only if asked to be."""
    model = random_model()
    wanted = gradients(model)
    full = kept(model)
    model.checkpoint_activations(1, 0, keep_attention=False)
    some, some_calls = kept(model), attention_calls(model)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), wanted))
    model.checkpoint_activations(2, 2, keep_attention=False)
    least, calls = kept(model), attention_calls(model)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), wanted))
    assert least < 0.3 * full and least < some < full and (some_calls, calls) == (5, 8)
    model.checkpoint_activations(2, 2)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), wanted)) and attention_calls(model) == 4
    model.checkpoint_activations(0, 0)
    assert kept(model) == full and attention_calls(model) == 4


def kept(model: MMDiT) -> int:
    """Numbers that autograd keeps for the backward pass."""
    count = 0

    def pack(x: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss(model)
    return count


def attention_calls(model: MMDiT) -> int:
    """Times that the kernel runs, forward and back (the gradient's kernel is another)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            name = op.__name__
            self.calls += "attention" in name and "backward" not in name
            return op(*args, **(kwargs or {}))

    with Count() as count:
        loss(model).backward()
    return count.calls


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_block_is_one_graph_forward_and_back(recomputed):
    """Nothing in a block stops torch.compile, and what it traces computes the same gradients."""
    torch._dynamo.reset()
    model = random_model()
    if recomputed:
        model.checkpoint_activations(1, 1)
    assert check_gradients(model, model.blocks, loss, "aot_eager", tolerance=1e-4) < 1e-4
    assert torch.equal(random_model()(**random_inputs()), model(**random_inputs()))  # eager again
    names = set(model.state_dict())
    compile_blocks(model.blocks, "aot_eager")
    assert (
        torch.allclose(model(**random_inputs()), random_model()(**random_inputs()), atol=1e-5)
        and set(model.state_dict()) == names
    )


def test_blocks_are_compiled_for_every_bucket():
    """Twelve sizes: torch by itself gives up after eight."""
    torch._dynamo.reset()
    model = random_model()
    compile_blocks(model.blocks, "eager")
    for frames in range(1, 13):
        inputs = random_inputs(batch=1, size=(frames, 4, 2))
        assert torch.equal(model(**inputs), random_model()(**inputs))


def test_wrong_gradients_of_a_compiler_are_told_by_name():
    """A compiler whose modulation of the first block learns nothing."""
    model, calls = random_model(), []

    def bent(model: MMDiT) -> torch.Tensor:
        calls.append(model)
        out = loss(model)
        return out + (100 * model.double_blocks[0].img_mod.lin.weight.square().sum() if len(calls) == 2 else 0)

    with pytest.raises(
        WrongGradients, match=r"for 1 parameters, worst: double_blocks\.0\.img_mod\.lin\.weight"
    ) as caught:
        check_gradients(model, model.blocks, bent, "aot_eager")
    assert set(caught.value.worst) == {"double_blocks.0.img_mod.lin.weight"}


def test_bf16_is_within_two_percent_of_float32():
    model, inputs = random_model(), random_inputs()
    wanted = model(**inputs)
    ids = {"img_ids", "txt_ids", "timesteps"}
    found = model.bfloat16()(**{k: v if k in ids else v.bfloat16() for k, v in inputs.items()}).float()
    assert 0 < (found - wanted).norm() / wanted.norm() < 2e-2


@torch.no_grad()
@pytest.mark.parametrize("scales", ["row", "tensor"])
def test_fp8_layers_are_near_and_take_half_the_bytes(scales):
    """e4m3 has three bits after the point: a product of two is off by a few percent, and a row's own scale survives
    outliers."""
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(64, 48), torch.randn(2, 7, 64)
    quantised = Fp8Linear(linear, scales)
    found = quantised(x)
    assert found.shape == (2, 7, 48) and 0 < (found - linear(x)).norm() / linear(x).norm() < 5e-2
    assert quantised.weight.dtype == torch.float8_e4m3fn and quantised.weight.element_size() == 1
    x[0, 0] *= 1e6
    rest = (quantised(x)[1] - linear(x)[1]).norm() / linear(x)[1].norm()
    assert rest < 5e-2 if scales == "row" else rest > 0.5
    model, inputs = random_model(), random_inputs()
    wanted = model(**inputs)
    assert (
        to_fp8(model.blocks, scales, kept=MMDiTArchitecture.fp8_kept) == 2 * (2 * 4 + 2 * 2) + 2 * 4
    )  # q, k, v, proj and the MLP of two streams; q, k, v_mlp and linear2
    assert isinstance(model.double_blocks[0].img_mod.lin, torch.nn.Linear) and isinstance(model.img_in, torch.nn.Linear)
    assert 0 < (model(**inputs) - wanted).norm() / wanted.norm() < 0.1
    with pytest.raises(ValueError, match="multiples of 16"):
        to_fp8(random_model(replace(CONFIG, hidden_size=40, axes_dim=(2, 4, 4))).blocks)


def test_flops_are_those_of_the_published_model():
    """12.910 GFLOP a token and 700,416 FLOP a pair; 168.6 TFLOP at 192×336×129, 5,092 at 576×1024×129."""
    config = MMDiTConfig()
    assert forward_flops(config, 8828).total / 1e12 == pytest.approx(168.6, abs=0.1)
    assert forward_flops(config, 76544).total / 1e12 == pytest.approx(5092, abs=1)
    assert forward_flops(config, 1).attention == 700_416


def test_flops_are_those_that_torch_counts():
    """In the blocks, without modulation. Of attention it counts the plain kernel only."""
    inputs = random_inputs(batch=1)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        random_model()(**inputs)
    counts = {name: sum(by_operation.values()) for name, by_operation in counter.get_flop_counts().items()}
    blocks = sum(count for name, count in counts.items() if re.fullmatch(r"MMDiT\.\w+_blocks\.\d+", name))
    modulation = sum(count for name, count in counts.items() if re.search(r"_blocks\.\d+\.\w*mod\w*$", name))
    assert blocks - modulation == forward_flops(CONFIG, inputs["img"].shape[1] + inputs["txt"].shape[1]).total
