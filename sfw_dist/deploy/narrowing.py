"""Dead channels are removed where that changes no output.

A channel may go if every layer that reads it, or what became of it, reads a constant: its share goes to that layer's
bias. Where the layer pads zeros, its share is smaller at the borders than a bias would be, unless the constant is 0.
Shares of several constants are multiples of each other there, if the weights are: so one channel stays for all of them,
and its weights become their sum.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sfw_dist.deploy.attention_heads import attentions, remove_constant_heads
from sfw_dist.deploy.channel_graph import ChannelGraph, Group, Part
from sfw_dist.deploy.choice import Choice, balance
from sfw_dist.deploy.constant_channels import fold, observe
from sfw_dist.deploy.layers import Layer, groups, inputs, is_layer, pads_zeros

_CHANNELWISE = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.PReLU)
"""Modules with parameters that treat each channel by itself."""


class UnfollowedError(Exception):
    """After channels of ``layer`` were removed, the network computes something else."""

    def __init__(self, layer: str) -> None:
        super().__init__(layer)
        self.layer = layer


@dataclass
class Report:
    """What was removed of each layer, and how many of its dead channels stay for which reason."""

    removed: dict[str, int] = field(default_factory=dict)
    kept: dict[str, dict[str, int]] = field(default_factory=dict)


class Narrowing:
    """Removes dead channels from a network, layer by layer.

    Args:
        model: in float64 and evaluation mode; it changes.
        example: an input.
        keep: names of layers whose output channels stay, with the reason.
    """

    def __init__(self, model: nn.Module, example: Tensor, keep: Mapping[str, str]) -> None:
        self._model, self._example, self._keep = model, example, keep
        self._names: dict[object, str] = {module: name for name, module in model.named_modules()}
        self._names |= {parameter: name for name, parameter in model.named_parameters()}
        self._shared = _with_shared_parameters(model)
        self._seen = observe(model, example)
        self._whole: dict[object, str] = {attention.qkv: attention.name for attention in attentions(model)}
        self.report = Report()

    def run(self, is_exact: Callable[[], bool]) -> None:
        """Remove what can be removed.

        Args:
            is_exact: whether the network computes what it did; asked after each layer.

        Raises:
            UnfollowedError: it does not, or fails.
        """
        for attention in attentions(self._model):
            if attention.qkv_name not in self._keep:
                with _followed(attention.qkv_name, is_exact):
                    if lost := remove_constant_heads(attention, self._seen):
                        self.report.removed[attention.qkv_name] = lost
        graph = ChannelGraph(self._model, self._example)
        for layer in graph.layers():
            name = self._names[layer]
            dead = [] if layer not in self._seen else (~self._seen[layer].live).nonzero().flatten().tolist()
            if dead and name in self._keep:
                self.report.kept[name] = {self._keep[name]: len(dead)}
            elif dead:
                with _followed(name, is_exact):
                    choice = self._choose(graph, layer, dead)
                    if choice.gone:
                        self._remove(graph.group(layer, sorted(choice.gone)), choice)
                if choice.reasons:
                    self.report.kept[name] = choice.counts()

    def _choose(self, graph: ChannelGraph, layer: Layer, dead: list[int]) -> Choice:
        """Which of the dead channels of a layer go."""
        choice = Choice(set(dead))
        parts = graph.group(layer, range(layer.weight.shape[0])).parts
        for part in parts:
            if (reason := self._fault(graph, part)) is not None:
                choice.stay(part.roots, reason)
        padded = []
        for part in parts:
            if part.side == "in" and is_layer(part.module) and choice.gone:
                choice.stay(
                    self._varying(part.module, part), f"{self._names[part.module]} reads values that vary there"
                )
                if pads_zeros(part.module) and (values := self._nonzero(part.module, part, choice.gone)):
                    padded.append((part.module, values))
        self._merge(choice, padded)
        balance(choice, parts)
        # Channels of one layer may go together: then more are taken than were looked at above.
        if choice.gone and not self._all_constant(graph, graph.group(layer, sorted(choice.gone)).parts, choice):
            choice.stay(list(choice.gone), "it goes together with channels that are not dead")
        return choice

    def _fault(self, graph: ChannelGraph, part: Part) -> str | None:
        """Why no channel of this part can be removed, if so."""
        module = part.module
        if graph.is_output(module):
            return "the network returns it"
        name = self._names.get(module, "")
        if isinstance(module, nn.Parameter) or graph.is_operation(module):
            return None
        if part.side == "out" and name in self._keep:
            return self._keep[name]
        if part.side == "out" and module in self._whole:
            return f"{self._whole[module]} loses whole heads only"
        if isinstance(module, nn.Module) and module in self._shared:
            return f"{name} shares a parameter with another module"
        if isinstance(module, _CHANNELWISE) or (
            isinstance(module, nn.modules.conv._ConvTransposeNd) and part.side == "out"
        ):
            return None
        if not is_layer(module):
            return f"{name} ({type(module).__name__}) computes with all channels together, or in its own way"
        if part.side == "in" and module not in self._seen:
            return f"{name} is not called as a layer"
        return None

    def _varying(self, layer: Layer, part: Part) -> list[int]:
        constant = self._seen[layer].constant.tolist()
        return [root for channel, root in zip(part.channels, part.roots, strict=True) if not constant[channel]]

    def _nonzero(self, layer: Layer, part: Part, roots: Collection[int]) -> dict[int, tuple[int, float]]:
        """By root the channel and its value, of constants other than 0."""
        values = self._seen[layer].value.tolist()
        found = zip(part.channels, part.roots, strict=True)
        return {root: (channel, values[channel]) for channel, root in found if root in roots and values[channel] != 0}

    def _merge(self, choice: Choice, padded: Iterable[tuple[Layer, dict[int, tuple[int, float]]]]) -> None:
        """Let one channel stand for all whose constants meet padding of zeros."""
        padded = [(layer, {root: at for root, at in values.items() if root in choice.gone}) for layer, values in padded]
        for layer, values in padded:
            if groups(layer) > 1 and values:
                choice.stay(values, f"zeros are padded beside a constant (in {self._names[layer]}, which has groups)")
        concerned = {root for _, values in padded for root in values} & choice.gone
        if not concerned:
            return
        padded = [(layer, values) for layer, values in padded if groups(layer) == 1 and values]

        def smallest(root: int) -> float:
            return min(abs(values[root][1]) if root in values else 0.0 for _, values in padded)

        stays = max(sorted(concerned), key=smallest)
        names = ", ".join(self._names[layer] for layer, _ in padded)
        if smallest(stays) == 0:
            choice.stay(concerned, f"zeros are padded beside different constants (in {names})")
            return
        choice.stay([stays], f"it stands for all constants beside which zeros are padded (in {names})")
        choice.merged = [
            (layer, values[stays], {r: values[r] for r in concerned - {stays} if r in values})
            for layer, values in padded
        ]

    def _all_constant(self, graph: ChannelGraph, parts: list[Part], choice: Choice) -> bool:
        merged = {layer: {at[0] for at in values.values()} for layer, _, values in choice.merged}
        for part in parts:
            if self._fault(graph, part) is not None:
                return False
            if part.side == "in" and is_layer(part.module):
                if self._varying(part.module, part):
                    return False
                if pads_zeros(part.module):
                    allowed = merged.get(part.module, set())
                    if any(at[0] not in allowed for at in self._nonzero(part.module, part, part.roots).values()):
                        return False
        return True

    @torch.no_grad()
    def _remove(self, group: Group, choice: Choice) -> None:
        for layer, (channel, value), others in choice.merged:
            for root, (other, its_value) in others.items():
                if root in choice.gone:
                    layer.weight[:, channel] += layer.weight[:, other] * (its_value / value)
        for part in group.parts:
            if part.side == "in" and is_layer(part.module) and not pads_zeros(part.module):
                fold(part.module, part.channels, self._seen[part.module].value[part.channels])
        group.remove()
        for part in group.parts:
            if is_layer(part.module):
                self._forget(part.module, part)

    def _forget(self, layer: Layer, part: Part) -> None:
        """Follow the removal in what was seen of a layer."""
        if part.side == "out":
            name = self._names[layer]
            self.report.removed[name] = self.report.removed.get(name, 0) + len(part.channels)
        if (seen := self._seen.get(layer)) is None:
            return
        # A depthwise convolution loses input and output channels as one part.
        if len(seen.low) != inputs(layer):
            kept = _without(len(seen.low), part.channels)
            seen.low, seen.high = seen.low[kept], seen.high[kept]
        if len(seen.live) != layer.weight.shape[0]:
            seen.live = seen.live[_without(len(seen.live), part.channels)]

    @torch.no_grad()
    def zero_biases(self) -> None:
        """Set to zero the bias, and γ and β of the BatchNorm after it, of each dead channel that could go.

        What follows a channel of zeros may be dead too, so that this goes on until there are no more.
        """
        graph = ChannelGraph(self._model, self._example)
        done: dict[Layer, int] = {}
        while True:
            changed = False
            for layer in graph.layers():
                if layer not in self._seen or layer in self._shared:
                    continue
                dead = (~self._seen[layer].live).nonzero().flatten().tolist()
                if len(dead) <= done.get(layer, 0):
                    continue
                done[layer], changed = len(dead), True
                parts = graph.group(layer, dead).parts
                if any(self._fault(graph, part) is not None for part in parts):
                    continue
                after = [p for norm in graph.batchnorms_after(layer) for p in norm.parameters(recurse=False)]
                for parameter in (layer.bias, *after):
                    if parameter is not None:
                        parameter[dead] = 0
            if not changed:
                return
            self._seen = observe(self._model, self._example)


@contextmanager
def _followed(layer: str, is_exact: Callable[[], bool]) -> Iterator[None]:
    try:
        yield
        exact = is_exact()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a forward with wrong widths meets
        raise UnfollowedError(layer) from error
    if not exact:
        raise UnfollowedError(layer)


def _without(number: int, channels: list[int]) -> Tensor:
    kept = torch.ones(number, dtype=torch.bool)
    kept[channels] = False
    return kept.nonzero().flatten()


def _with_shared_parameters(model: nn.Module) -> set[nn.Module]:
    """The modules that hold a parameter which another module holds, too."""
    holders: dict[nn.Parameter, list[nn.Module]] = defaultdict(list)
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders[parameter].append(module)
    return {module for modules in holders.values() if len(modules) > 1 for module in modules}
