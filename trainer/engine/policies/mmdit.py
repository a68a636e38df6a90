"""How an MMDiT is split: tensor parallelism by heads and by features of the MLPs, sequence
parallelism by tokens (`trainer.engine.ulysses`). The model knows nothing of it.

Where one Linear computes several things (v and the MLP's input; q, k and v), its rows are put in the order of the ranks
first, so that a plain cut gives each rank its part of each; likewise the columns of `linear2`, which reads attention
and MLP.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from colossalai.shardformer.layer import Linear1D_Col, Linear1D_Row
from colossalai.shardformer.policies.base_policy import ModulePolicyDescription, SubModuleReplacementDescription
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from datakit.errors import ConfigError
from trainer.engine.parallel_policy import ParallelPolicy
from trainer.engine.sharded_state import Cut
from trainer.engine.ulysses import Ulysses, gather_tokens, shares
from trainer.models.mmdit.model import DoubleBlock, MMDiT, MMDiTConfig, QKNorm, SelfAttention, SingleBlock

ROWS, COLUMNS = 0, 1


@dataclass(frozen=True)
class _Split:
    """A Linear of a block, cut by rows or columns; each of the sections that its cut dimension has is divided."""

    linear: str
    dim: int
    sections: tuple[int, ...]

    def cut(self, rank: int, count: int) -> Cut:
        ranges, start = [], 0
        for size in self.sections:
            ranges.append((start + size // count * rank, start + size // count * (rank + 1)))
            start += size
        return Cut(self.dim, tuple(ranges))


class MMDiTPolicy(ParallelPolicy):
    kind = "mmdit"

    def config_sanity_check(self) -> None:
        """Raises ConfigError: no MMDiT, heads or features that do not divide, or tensor parallelism with frozen weights
        or LoRA."""
        models = [m for m in self.model.modules() if isinstance(m, MMDiT)]
        if len(models) != 1:
            raise ConfigError(
                f"the plugin hybrid spreads an MMDiT, not a {type(self.model).__name__}; use ddp, zero1 or zero2"
            )
        self._config, tp, sp = models[0].config, self._tp.size(), self._sp.size()
        if self._config.num_heads % (tp * sp) or self._config.mlp_size % tp:
            raise ConfigError(
                f"tp={tp}, sp={sp}: {self._config.num_heads} heads must divide by tp·sp, {self._config.mlp_size} MLP "
                f"features by tp"
            )
        if tp > 1 and any(not p.requires_grad for p in self.model.parameters()):
            raise ConfigError(f"tp={tp} trains all parameters; train LoRA, or with frozen weights, with tp=1")

    def preprocess(self) -> nn.Module:
        if self._tp.size() > 1:
            for path, block, split in self._splits():
                self._arrange(block.get_submodule(split.linear), split)
                cut = split.cut(self._tp.rank(), self._tp.size())
                self.cuts[f"{path}.{split.linear}.weight"] = cut
                if split.dim == ROWS:
                    self.cuts[f"{path}.{split.linear}.bias"] = cut
        return self.model

    def module_policy(self) -> dict[type[nn.Module], ModulePolicyDescription]:
        policy = {
            cls: ModulePolicyDescription(attribute_replacement={}, method_replacement={}, sub_module_replacement=[])
            for cls in (MMDiT, DoubleBlock, SingleBlock, SelfAttention)
        }
        if self._tp.size() > 1:
            for cls in (DoubleBlock, SingleBlock):
                policy[cls].sub_module_replacement += [
                    SubModuleReplacementDescription(split.linear, Linear1D_Col if split.dim == ROWS else Linear1D_Row)
                    for split in _splits_of(cls, self._config)
                ]
            heads, mlp_size = self._config.num_heads // self._tp.size(), self._config.mlp_size // self._tp.size()
            policy[SelfAttention].attribute_replacement.update(heads=heads)
            policy[SingleBlock].attribute_replacement.update(heads=heads, mlp_size=mlp_size)
            policy[SingleBlock].method_replacement.update(_project=_project_own_heads)
        if self._sp.size() > 1:
            policy[MMDiT].method_replacement.update(forward=_forward_of(self._sp))
            for cls in (DoubleBlock, SingleBlock):
                policy[cls].sub_module_replacement.append(
                    SubModuleReplacementDescription("attend", Ulysses, {"group": self._sp})
                )
        return policy

    def postprocess(self) -> nn.Module:
        return self.model

    def add_hooks(self) -> None:
        """The scales of the norms of q and k serve all heads: their gradients, each rank's from its own, are added. To
        be called when the parameters are what they will be (after boosting)."""
        if self._tp.size() > 1:
            for module in self.model.modules():
                if isinstance(module, QKNorm):
                    for scale in module.parameters():
                        scale.register_hook(self._add)

    def _add(self, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad, group=self._tp)
        return grad

    def _arrange(self, linear: nn.Linear, split: _Split) -> None:
        if len(split.sections) > 1:
            count = self._tp.size()
            order = torch.cat([torch.arange(a, b) for rank in range(count) for a, b in split.cut(rank, count).ranges])
            linear.weight.data = linear.weight.data.index_select(split.dim, order.to(linear.weight.device))
            if split.dim == ROWS and linear.bias is not None:
                linear.bias.data = linear.bias.data[order.to(linear.bias.device)]

    def _splits(self) -> Iterator[tuple[str, nn.Module, _Split]]:
        for path, block in self.model.named_modules():
            if isinstance(block, (DoubleBlock, SingleBlock)):
                yield from ((path, block, split) for split in _splits_of(type(block), self._config))

    @property
    def _tp(self) -> ProcessGroup:
        return self.shard_config.tensor_parallel_process_group

    @property
    def _sp(self) -> ProcessGroup:
        return self.shard_config.sequence_parallel_process_group


def _splits_of(cls: type[nn.Module], config: MMDiTConfig) -> list[_Split]:
    width, wide, fused = config.hidden_size, config.mlp_size, config.layout == "fused"
    if cls is SingleBlock:
        first = (
            {"linear1": (width, width, width, wide)}
            if fused
            else {"q_proj": (width,), "k_proj": (width,), "v_mlp": (width, wide)}
        )
        return [
            *(_Split(name, ROWS, sections) for name, sections in first.items()),
            _Split("linear2", COLUMNS, (width, wide)),
        ]
    first = {"qkv": (width, width, width)} if fused else {"q_proj": (width,), "k_proj": (width,), "v_proj": (width,)}
    return [
        split
        for stream in ("img", "txt")
        for split in (
            *(_Split(f"{stream}_attn.{name}", ROWS, sections) for name, sections in first.items()),
            _Split(f"{stream}_attn.proj", COLUMNS, (width,)),
            _Split(f"{stream}_mlp.0", ROWS, (wide,)),
            _Split(f"{stream}_mlp.2", COLUMNS, (wide,)),
        )
    ]


def _project_own_heads(self: SingleBlock, x: Tensor) -> tuple[Tensor, ...]:
    """`SingleBlock._project`, whose widths are now this rank's."""
    if self.fused:
        out = self.linear1(x)
        width = (out.shape[-1] - self.mlp_size) // 3
        return out.split([width, width, width, self.mlp_size], -1)
    q, wide = self.q_proj(x), self.v_mlp(x)
    return q, self.k_proj(x), *wide.split([q.shape[-1], self.mlp_size], -1)


def _forward_of(group: ProcessGroup):
    """`MMDiT.forward` on a share of the text's and of the video's tokens, its result gathered."""

    def forward(
        self: MMDiT,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y_vec: Tensor,
        cond: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        rank, count, length = group.rank(), group.size(), txt.shape[1]
        of_text = shares(length, count)
        of_video = [both - text for both, text in zip(shares(length + img.shape[1], count), of_text)]
        # The positions of all tokens, in the order in which attention gathers them: a rank's text, its video, the next
        # rank's text ...
        ids = torch.cat(
            [part for pair in zip(txt_ids.split(of_text, 1), img_ids.split(of_video, 1)) for part in pair], 1
        )
        img, txt, cond = (
            img.split(of_video, 1)[rank],
            txt.split(of_text, 1)[rank],
            cond if cond is None else cond.split(of_video, 1)[rank],
        )
        own = MMDiT.forward(self, img, ids[:, length:], txt, ids[:, :length], timesteps, y_vec, cond, guidance)
        return gather_tokens(own, of_video, group)

    return forward
