"""Prune a trained network to many sparsities and measure each on the test set, in one pass over it.

python -m sfw_dist.evaluate runs/digits_sfw
python -m sfw_dist.evaluate runs/digits_sfw --max-drop 1.0
python -m sfw_dist.evaluate runs/digits_sfw --sparsities 0.5,0.9:0.99:0.01 --granularity filter --ranking layerwise
torchrun --nproc-per-node 2 -m sfw_dist.evaluate runs/digits_sfw --sparsities 0.9 --export
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from sfw_dist.errors import UserError, command_imports, reports_user_errors

with command_imports("sfw_dist.evaluate", "train"):
    from sfw_dist.config import load_config
    from sfw_dist.distributed.world import joined_world
    from sfw_dist.evaluate.console import print_search, print_sweep
    from sfw_dist.evaluate.pruning_arguments import add_pruning_arguments, pruning_options
    from sfw_dist.evaluate.sparsity_search import search_run
    from sfw_dist.evaluate.sweep import sweep_run
    from sfw_dist.files import user_path
    from sfw_dist.pruning import parse_sparsities
    from sfw_dist.train.run_folder import RunFolder

_EXAMPLES = "\n".join((__doc__ or "").split("\n\n")[1].splitlines())


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    arguments = _parser().parse_args(argv)
    max_drop = arguments.max_drop
    if max_drop is not None and arguments.sparsities is not None:
        raise UserError(f"--max-drop {max_drop:g} looks for the sparsity itself: leave --sparsities out")
    sparsities = None if arguments.sparsities is None else parse_sparsities(arguments.sparsities)
    run = RunFolder.existing(arguments.run)
    options = pruning_options(arguments, load_config(run.config).prune)
    where = {"data_root": arguments.data_root, "export": arguments.export}
    with joined_world() as world:
        if max_drop is None:
            results = sweep_run(run, world, options, sparsities=sparsities, **where)
        else:
            results = [search_run(run, world, max_drop, options, **where)]
        if not world.main:
            return 0
        if results and not results[0]["bn_layers"] and arguments.recalibrate != 0:
            print("note: the network has no BatchNorm, so nothing was recalibrated", file=sys.stderr)
        if arguments.json:
            print(json.dumps(results if max_drop is None else results[0]))
        elif max_drop is None:
            print_sweep(results)
        else:
            print_search(results[0])
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sfw_dist.evaluate",
        description="Prune a trained network to many sparsities and measure each on the test set.",
        epilog=f"examples:\n{_EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=user_path, metavar="RUN", help="the run's folder")
    parser.add_argument(
        "--sparsities", metavar="LIST", help="fractions removed, as in 0.5,0.9:0.99:0.01 (default: the run's)"
    )
    add_pruning_arguments(parser)
    parser.add_argument(
        "--max-drop",
        type=float,
        metavar="POINTS",
        help="find the highest sparsity, to 0.1 points, whose validation accuracy is at most this many points below "
        "the dense network's, as in 1.0; then measure that one on the test set, once",
    )
    parser.add_argument("--data-root", metavar="DIR", help="folder of the prepared data sets (default: the run's)")
    parser.add_argument(
        "--export",
        action="store_true",
        help="also write the pruned networks as safetensors, with recalibrated statistics unless --recalibrate is 0",
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
