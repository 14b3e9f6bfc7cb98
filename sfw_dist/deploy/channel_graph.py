"""Which channels belong together, as torch-pruning finds it; the only file that imports it.

It follows the operations of one forward pass backwards and says which channels of other layers go with those of one.
Whether they may go is decided elsewhere, and what it does not follow is noticed there, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sfw_dist.deploy.layers import Layer, is_layer
from sfw_dist.errors import UserError, needs_extra


@dataclass(frozen=True)
class Part:
    """Channels of one module that go together with others.

    Attributes:
        module: a layer, a parameter, or what stands for the network's output.
        side: whether they are its input or output channels; where it has the same, "out".
        channels: their numbers.
        roots: for each of them the channel of the first layer with which it goes.
    """

    module: nn.Module | nn.Parameter
    side: Literal["in", "out"]
    channels: list[int]
    roots: list[int]


class Group:
    """All channels that go together with some of one layer's."""

    def __init__(self, group: Any, parts: list[Part]) -> None:
        self._group = group
        self.parts = parts

    def remove(self) -> None:
        """Take them out of their layers."""
        self._group.prune(record_history=False)


class ChannelGraph:
    """The channels of a network.

    Args:
        model: its layers become narrower when groups are removed; no parameter stays frozen.
        example: an input.

    Raises:
        MissingExtraError: torch-pruning is not installed.
        UserError: it fails on this network.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        with needs_extra("compact", "deploy"):
            import torch_pruning
        self._dummies = torch_pruning.ops
        self._graph = torch_pruning.DependencyGraph()
        self._graph.REGISTERED_PRUNERS[torch_pruning.ops.OPTYPE.CONV] = _grouped_pruner(torch_pruning)
        with self._refused(model), torch.enable_grad():
            self._graph.build_dependency(
                model.requires_grad_(),
                example,
                forward_fn=lambda model, example: model(example),
                # So every output is an operation of its own, and no layer is taken for one that nothing follows.
                output_transform=lambda out: [x * 1 for x in tree_leaves(out) if isinstance(x, Tensor) and x.grad_fn],
                verbose=False,
            )

    @contextmanager
    def _refused(self, model: nn.Module) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # it fails in ways of many types where it does not know an operation
            raise UserError(
                f"torch-pruning does not follow {type(model).__name__} ({type(error).__name__}: {error}): compact "
                "cannot make it narrower"
            ) from error

    def layers(self) -> list[Layer]:
        """Those that the network's outputs depend on."""
        return [module for module in self._graph.module2node if is_layer(module)]

    def is_output(self, module: nn.Module | nn.Parameter) -> bool:
        """Whether it stands for what the network returns."""
        return isinstance(module, self._dummies._OutputOp)

    def is_operation(self, module: nn.Module | nn.Parameter) -> bool:
        """Whether it stands for an operation without parameters; these are taken to treat each channel alone."""
        kinds = self._dummies.OPTYPE
        return self._dummies.module2type(module) in {
            *(kinds.CONCAT, kinds.SPLIT, kinds.ELEMENTWISE, kinds.RESHAPE),
            *(kinds.UNBIND, kinds.EXPAND, kinds.SLICE),
        }

    def batchnorms_after(self, layer: Layer) -> list[nn.Module]:
        """The BatchNorms that take its output."""
        after = [node.module for node in self._graph.module2node[layer].outputs]
        return [module for module in after if isinstance(module, nn.modules.batchnorm._BatchNorm)]

    def group(self, layer: Layer, channels: Sequence[int]) -> Group:
        """What goes together with these output channels of a layer."""
        pruner = self._graph.get_pruner_of_module(layer)
        with self._refused(self._graph.model):
            group = self._graph.get_pruning_group(layer, pruner.prune_out_channels, list(channels))
        parts = []
        for item in group:
            module = item.dep.target.module
            outgoing = item.dep.handler == self._graph.get_pruner_of_module(module).prune_out_channels
            parts.append(Part(module, "out" if outgoing else "in", list(item.idxs), list(item.root_idxs)))
        return Group(group, parts)


def _grouped_pruner(torch_pruning: Any) -> Any:
    """torch-pruning's for convolutions; that one removes the same input channels of every group."""

    class GroupedConvPruner(torch_pruning.pruner.function.ConvPruner):
        def prune_in_channels(self, layer: Any, idxs: list[int]) -> nn.Module:
            if layer.groups == 1:
                return super().prune_in_channels(layer, idxs)
            out, of_group, *kernel = layer.weight.shape
            kept = torch.ones(layer.in_channels, dtype=torch.bool, device=layer.weight.device)
            kept[idxs] = False
            weight = layer.weight.detach().view(layer.groups, out // layer.groups, of_group, *kernel)
            parts = [w[:, k] for w, k in zip(weight, kept.view(layer.groups, of_group), strict=True)]
            layer.weight = nn.Parameter(torch.cat(parts))
            layer.in_channels = int(kept.sum())
            return layer

    return GroupedConvPruner()
