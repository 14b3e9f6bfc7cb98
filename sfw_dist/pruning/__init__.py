"""One-shot pruning: what is removed (scope × granularity × ranking × criterion), what is left, and BatchNorm after.

Example:
    >>> from torch import nn
    >>> from sfw_dist.pruning import layer_table, prune
    >>> net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> masks = prune(net, 0.5)
    >>> masks.kept, masks.total
    (20, 40)
"""

from sfw_dist.pruning.criteria import CRITERIA
from sfw_dist.pruning.low_rank import LowRank
from sfw_dist.pruning.masks import Masks
from sfw_dist.pruning.measuring.curve import Curve, CurvePoint
from sfw_dist.pruning.measuring.sweeping import sweep
from sfw_dist.pruning.one_shot import Pruner, prune
from sfw_dist.pruning.options import PruningOptions
from sfw_dist.pruning.recalibration import recalibrate
from sfw_dist.pruning.result import Pruning
from sfw_dist.pruning.sparsities import PAPER_SPARSITIES, parse_sparsities
from sfw_dist.pruning.summary import count_flops, dead_layers, kept_flops, layer_table

__all__ = [
    "CRITERIA",
    "PAPER_SPARSITIES",
    "Curve",
    "CurvePoint",
    "LowRank",
    "Masks",
    "Pruner",
    "Pruning",
    "PruningOptions",
    "count_flops",
    "dead_layers",
    "kept_flops",
    "layer_table",
    "parse_sparsities",
    "prune",
    "recalibrate",
    "sweep",
]
