"""Heads of attention modules that answer with a constant are removed.

Heads of one module have one width, so that only whole ones can go. The modules are timm's: one linear layer ``qkv`` for
queries, keys and values, another one, ``proj``, for the output, and ``num_heads``, ``head_dim`` and ``attn_dim``. An
``nn.MultiheadAttention`` has as many channels in its heads as at its input, and stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sfw_dist.deploy.constant_channels import Channels, fold
from sfw_dist.deploy.layers import is_layer


@dataclass(frozen=True)
class Attention:
    """An attention module whose heads can be removed."""

    name: str
    module: Any
    qkv: nn.Linear
    proj: nn.Linear
    heads: int
    width: int
    """Of each head."""

    @property
    def qkv_name(self) -> str:
        """The name of the layer that loses output channels."""
        return f"{self.name}.qkv" if self.name else "qkv"


def attentions(model: nn.Module) -> Iterator[Attention]:
    """The attention modules whose heads can be removed."""
    for name, module in model.named_modules():
        qkv, proj = getattr(module, "qkv", None), getattr(module, "proj", None)
        heads, width, inner = (getattr(module, size, None) for size in ("num_heads", "head_dim", "attn_dim"))
        if not (isinstance(qkv, nn.Linear) and isinstance(proj, nn.Linear) and isinstance(heads, int)):
            continue
        # A norm over all heads, and a gate that a layer of its own computes, would have to become narrower, too.
        alone = (
            isinstance(getattr(module, "norm", nn.Identity()), nn.Identity) and getattr(module, "gate", None) is None
        )
        own = all(is_layer(layer) for layer in (qkv, proj))
        fits = isinstance(width, int) and proj.in_features == inner == heads * width and qkv.out_features == 3 * inner
        if alone and own and fits:
            yield Attention(name, module, qkv, proj, heads, proj.in_features // heads)


@torch.no_grad()
def remove_constant_heads(attention: Attention, seen: Mapping[nn.Module, Channels]) -> int:
    """Remove the heads that are constant at the output projection, whose bias takes them up; one head stays.

    Args:
        attention: one of :func:`attentions`.
        seen: what is constant in the network; of ``attention`` it then describes what is left.

    Returns:
        The number of output channels that ``qkv`` lost.
    """
    qkv, proj = attention.qkv, attention.proj
    if proj not in seen or qkv not in seen:
        return 0
    constant = seen[proj].constant.view(attention.heads, attention.width).all(1)
    if constant.all():
        constant[0] = False
    gone = constant.repeat_interleave(attention.width)
    if not gone.any():
        return 0
    fold(proj, gone.nonzero().flatten().tolist(), seen[proj].value[gone])
    _keep_inputs(proj, seen[proj], ~gone)
    _keep_outputs(qkv, seen[qkv], (~gone).repeat(3))
    attention.module.num_heads = attention.heads - int(constant.sum())
    attention.module.attn_dim = proj.in_features
    return 3 * int(gone.sum())


def _keep_inputs(layer: nn.Linear, channels: Channels, kept: Tensor) -> None:
    layer.weight = nn.Parameter(layer.weight[:, kept])
    layer.in_features = layer.weight.shape[1]
    channels.low, channels.high = channels.low[kept], channels.high[kept]


def _keep_outputs(layer: nn.Linear, channels: Channels, kept: Tensor) -> None:
    layer.weight = nn.Parameter(layer.weight[kept])
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias[kept])
    layer.out_features = layer.weight.shape[0]
    channels.live = channels.live[kept]
