"""What a pruning leaves: layers with their exact counts, and FLOPs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sfw_dist.distributed.dtensor import reshard, to_local
from sfw_dist.pruning.modes import evaluation_mode
from sfw_dist.pruning.result import Pruning
from sfw_dist.pruning.scope import check_initialised, weights

_WITH_ADDEND = (torch.ops.aten.addmm, torch.ops.aten.baddbmm)
"""Operations whose first argument is added to the product of the next two."""


class LayerRow(TypedDict):
    """One prunable parameter in :func:`layer_table`."""

    name: str
    shape: list[int]
    parameters: int
    kept: int
    sparsity: float
    rank: NotRequired[int]
    """Of a weight of low rank; ``kept`` then counts its two factors."""


def layer_table(model: nn.Module, pruning: Pruning) -> list[LayerRow]:
    """What is left of each prunable parameter of ``model``, in the order of ``named_parameters``.

    Example:
        >>> from sfw_dist.pruning import prune
        >>> net = nn.Linear(4, 2)
        >>> layer_table(net, prune(net, 0.75))
        [{'name': 'weight', 'shape': [2, 4], 'parameters': 8, 'kept': 2, 'sparsity': 0.75}]
    """
    parameters = dict(model.named_parameters())
    rows = []
    for name, (entries, kept) in pruning.counts.items():
        shape, sparsity = list(parameters[name].shape), (entries - kept) / entries
        row = LayerRow(name=name, shape=shape, parameters=entries, kept=kept, sparsity=sparsity)
        if name in pruning.ranks:
            row["rank"] = pruning.ranks[name]
        rows.append(row)
    return rows


def dead_layers(pruning: Pruning) -> list[str]:
    """The parameters of which nothing is kept: a weight here cuts the network in two."""
    return [name for name, (_, kept) in pruning.counts.items() if kept == 0]


def count_flops(model: nn.Module, example: Tensor) -> dict[str, int]:
    """Count the dense forward FLOPs of one sample, by what is multiplied.

    Counted are the products of matrices and the convolutions of the whole network, as torch's ``FlopCounterMode`` does:
    a multiply-add is two FLOPs; biases, normalisations and activations are not counted. A layer that is called several
    times counts each time. Attention computes by its plain formula meanwhile: some of torch's fused kernels hide their
    products from the counter.

    Args:
        model: runs once in evaluation mode without gradients; modes and buffers are afterwards what they were. With
            FSDP2 (``fully_shard``) every rank must call this.
        example: ``(batch, ...)``, an input on the model's device; its first sample is used.

    Returns:
        FLOPs by the name of the weight that is multiplied, or of the module that multiplies activations with each
        other, as attention's queries with keys. The sum is the network's. Every prunable weight has an entry.

    Raises:
        UserError: a lazy layer that no batch has reached yet.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 10))
        >>> count_flops(net, torch.zeros(1, 1, 4, 4))
        {'0.weight': 144, '2.weight': 160}
        >>> attention = nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=16, batch_first=True)
        >>> flops = count_flops(attention, torch.zeros(1, 5, 8))
        >>> flops["self_attn.in_proj_weight"], flops["self_attn"]
        (1920, 800)
    """
    check_initialised(model)
    flops = dict.fromkeys((name for name, _ in weights(model)), 0)
    # Autocast would copy weights, and a copy is not known as the weight.
    exact_types = torch.autocast(example.device.type, enabled=False)
    try:
        with (
            evaluation_mode(model),
            torch.no_grad(),
            exact_types,
            _plain_attention(),
            _running_modules(model) as running,
            _FlopCounter(model, running, flops),
        ):
            model(example[:1])
    finally:
        reshard(model)
    return flops


class _FlopCounter(TorchDispatchMode):
    """Adds the FLOPs of each operation to the entry in ``flops`` of the parameter that is multiplied.

    It counts by the formulas of torch's ``FlopCounterMode``, whose hooks fail where a module is given a parameter.

    A parameter is known by its memory: layers multiply by views of it (its transpose, a third of an
    ``in_proj_weight``), and some by the weights of others. Where no factor is a parameter, or both are, the entry is
    that of the innermost running module: of its weight, if it is a layer that makes its factor from it, else its own.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, running: Sequence[nn.Module], flops: dict[str, int]) -> None:
        super().__init__()
        self._model, self._running, self._flops = model, running, flops
        self._names = {module: name for name, module in model.named_modules()}
        self._names |= {m: name for name, m in weights(model) if not isinstance(m, nn.MultiheadAttention)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operation = getattr(func, "overloadpacket", func)
        formula = flop_registry.get(operation)
        if formula is None and hasattr(func, "decompose"):
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if formula is not None:
            factors = args[1:] if operation in _WITH_ADDEND else args
            found = [name for x in factors if isinstance(x, Tensor) and x.ndim > 1 for name in self._parameter(x)]
            name = found[0] if len(found) == 1 else self._names[self._running[-1]]
            self._flops[name] = self._flops.get(name, 0) + formula(*args, **kwargs, out_val=out)
        return out

    def _parameter(self, x: Tensor) -> list[str]:
        """The parameter in whose memory a tensor lies, if any. They are looked up anew: FSDP2 replaces them."""
        address = to_local(x).data_ptr()
        return [
            name
            for name, parameter in self._model.named_parameters()
            if 0 <= address - to_local(parameter).data_ptr() < to_local(parameter).nbytes
        ]


@contextmanager
def _running_modules(model: nn.Module) -> Iterator[list[nn.Module]]:
    """Gives the list of modules whose forward is running inside the block, innermost last."""
    running = [model]

    def enter(module: nn.Module, args: object) -> None:
        running.append(module)

    def leave(module: nn.Module, args: object, output: object) -> None:
        running.pop()

    hooks = [module.register_forward_pre_hook(enter) for module in model.modules()]
    hooks += [module.register_forward_hook(leave) for module in model.modules()]
    try:
        yield running
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention by products of matrices inside the block.

    Fused kernels for whole attention layers have no FLOP formula, and those for the products only have in some versions
    of torch.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def kept_flops(flops: Mapping[str, int], pruning: Pruning) -> float:
    """FLOPs that multiply by a kept weight, or by one of its two factors.

    Args:
        flops: of :func:`count_flops`.
        pruning: what is left. A removed filter saves its own FLOPs; that the next layer may skip its channel is not
            counted.

    Returns:
        The sum over the entries, each one's FLOPs times the fraction of the weight that is kept; whole where nothing
        was pruned.

    Example:
        >>> from sfw_dist.pruning import prune
        >>> net = nn.Linear(4, 2)
        >>> flops = count_flops(net, torch.zeros(1, 4))
        >>> kept_flops(flops, prune(net, 0.75))
        4.0
    """
    counts = pruning.counts
    return sum(count * counts[name][1] / counts[name][0] if name in counts else count for name, count in flops.items())
