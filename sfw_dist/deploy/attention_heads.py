"""Heads of attention modules that answer with a constant are removed.

Heads of one module have one width, so that only whole ones can go. The modules are timm's: one linear layer ``qkv`` for
queries, keys and values, another one, ``proj``, for the output, and ``num_heads``, ``head_dim`` and ``attn_dim``. An
``nn.MultiheadAttention`` has as many channels in its heads as at its input, and stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from sfw_dist.deploy.constant_channels import Channels, fold
from sfw_dist.deploy.layers import is_layer


def attentions(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The attention modules whose heads can be removed."""
    for name, module in model.named_modules():
        qkv, proj = (getattr(module, attribute, None) for attribute in ("qkv", "proj"))
        sizes = [getattr(module, attribute, None) for attribute in ("num_heads", "head_dim", "attn_dim")]
        if not (isinstance(qkv, nn.Linear) and isinstance(proj, nn.Linear) and is_layer(qkv) and is_layer(proj)):
            continue
        plain = isinstance(getattr(module, "norm", nn.Identity()), nn.Identity) and not getattr(module, "gate", None)
        if plain and all(isinstance(size, int) for size in sizes) and qkv.out_features == 3 * proj.in_features:
            yield name, module


@torch.no_grad()
def remove_constant_heads(attention: nn.Module, seen: Mapping[nn.Module, Channels]) -> int:
    """Remove the heads that are constant at the output projection, whose bias takes them up; one head stays.

    Args:
        attention: one of :func:`attentions`.
        seen: what is constant in the network; of ``attention`` it then describes what is left.

    Returns:
        The number of heads that were removed.
    """
    qkv, proj, heads, width = attention.qkv, attention.proj, attention.num_heads, attention.head_dim
    if proj not in seen or qkv not in seen:
        return 0
    constant = seen[proj].constant.view(heads, width).all(1)
    constant[0] &= not constant.all()
    if not constant.any():
        return 0
    gone = constant.repeat_interleave(width)
    fold(proj, gone.nonzero().flatten().tolist(), seen[proj].value[gone])
    _keep_inputs(proj, seen[proj], ~gone)
    _keep_outputs(qkv, seen[qkv], (~gone).repeat(3))
    attention.num_heads = heads - int(constant.sum())
    attention.attn_dim = attention.num_heads * width
    return int(constant.sum())


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
