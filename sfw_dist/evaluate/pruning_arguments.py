"""The command-line options that say how to prune; `sfw_dist.evaluate` and `launch.prune_array` share them."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from typing import get_args

from sfw_dist.pruning import CRITERIA, PruningOptions
from sfw_dist.pruning.granularity import GRANULARITIES, Ranking
from sfw_dist.pruning.options import OLD_KINDS, without_old_words
from sfw_dist.pruning.scope import Scope


def add_pruning_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--scope``, ``--granularity``, ``--ranking``, ``--criterion``, ``--kind`` and ``--recalibrate``."""
    parser.add_argument("--scope", choices=get_args(Scope), help="which parameters are pruned (default: the run's)")
    parser.add_argument(
        "--granularity", choices=tuple(GRANULARITIES), help="what is removed as one piece (default: the run's)"
    )
    parser.add_argument(
        "--ranking",
        choices=get_args(Ranking),
        help="whether pieces are ranked over the whole network or within each layer (default: the run's)",
    )
    parser.add_argument(
        "--criterion", choices=tuple(CRITERIA), help="what makes a weight worth keeping (default: the run's)"
    )
    parser.add_argument("--kind", choices=tuple(OLD_KINDS), help="older words for --granularity and --ranking together")
    parser.add_argument(
        "--recalibrate",
        type=int,
        metavar="N",
        help="batches of training images over which BatchNorm's statistics are measured again after pruning, in "
        "addition to the accuracy without; 0: only without (default: the run's)",
    )


def pruning_options(arguments: argparse.Namespace, default: PruningOptions) -> PruningOptions:
    """The options that were given, and the default's where they were not.

    Raises:
        UserError: a combination without a meaning, or ``--kind`` next to ``--granularity`` or ``--ranking``.
    """
    names = ["kind", *(field.name for field in fields(PruningOptions))]
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return replace(default, **without_old_words(given))
