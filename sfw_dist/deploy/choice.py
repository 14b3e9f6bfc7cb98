"""Which dead channels of a layer go, and why others stay."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from sfw_dist.deploy.channel_graph import Part
from sfw_dist.deploy.layers import Layer, groups, inputs, is_depthwise, is_layer


@dataclass
class Choice:
    """The dead channels of one layer.

    Attributes:
        gone: those that go.
        reasons: of each that stays.
        merged: of layers that pad zeros: the channel that stays for others and its value, and those others by root.
    """

    gone: set[int]
    reasons: dict[int, str] = field(default_factory=dict)
    merged: list[tuple[Layer, tuple[int, float], dict[int, tuple[int, float]]]] = field(default_factory=list)

    def stay(self, roots: Iterable[int], reason: str) -> None:
        """Let these stay, if they have not been for another reason."""
        for root in set(roots) & self.gone:
            self.gone.discard(root)
            self.reasons[root] = reason

    def counts(self) -> dict[str, int]:
        """How many stay for each reason."""
        found: dict[str, int] = defaultdict(int)
        for reason in self.reasons.values():
            found[reason] += 1
        return dict(found)


def balance(choice: Choice, parts: list[Part]) -> None:
    """Let as many stay that every group of a grouped convolution loses equally many, and no module all."""
    while True:
        before = len(choice.gone)
        for part in parts:
            module = part.module
            if not is_layer(module):
                continue
            size = inputs(module) if part.side == "in" else module.weight.shape[0]
            gone = [(c, r) for c, r in zip(part.channels, part.roots, strict=True) if r in choice.gone]
            if len(gone) == size:
                choice.stay([gone[0][1]], "the layer's last channel")
            elif groups(module) > 1 and not is_depthwise(module):
                number, each = groups(module), size // groups(module)
                of_group = [[root for channel, root in gone if channel // each == group] for group in range(number)]
                fewest = min(map(len, of_group))
                for roots in of_group:
                    choice.stay(roots[fewest:], "all groups of a convolution lose equally many")
        if len(choice.gone) == before:
            return
