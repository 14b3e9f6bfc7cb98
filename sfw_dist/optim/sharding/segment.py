"""Where the entries of a tensor lie that one rank holds, when no rank holds the whole of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sfw_dist.constraints import Constraint


@dataclass(frozen=True)
class Segment:
    """Consecutive entries of one tensor, in row-major order, and their place in this rank's memory."""

    name: str
    shape: torch.Size
    """Of the whole tensor."""
    constraint: Constraint
    """Of the whole tensor, concrete."""
    first: int
    """Which entry of the whole tensor these begin with."""
    length: int
    """How many they are; 0 where this rank has none."""
    offset: int
    """Where they begin in the flat memory that an engine gives to the optimizer."""
