"""``sfw-dist VERB …``: every command under one name."""

from __future__ import annotations

import argparse
import importlib
import sys

_VERBS = {
    "train": ("sfw_dist.train.__main__", "train a network, as one process or as a rank under torchrun"),
    "local": ("launch.local", "train on several ranks of this machine"),
    "evaluate": ("sfw_dist.evaluate.__main__", "prune a trained network and measure it"),
    "report": ("sfw_dist.report.__main__", "draw one or several runs on one page"),
    "submit": ("launch.train", "submit a training to a cluster, with --chain its pruning and report too"),
    "prune-array": ("launch.prune_array", "prune a trained network as an array of jobs"),
    "collect": ("launch.collect", "merge what an array wrote, and list what is missing"),
    "status": ("launch.status", "show the state of runs and their jobs"),
    "cancel": ("launch.cancel", "cancel the jobs of runs"),
    "retry": ("launch.retry", "submit again what has failed"),
    "data": ("sfw_dist.data.__main__", "prepare or verify a data set"),
}

_EXAMPLES = """examples:
  sfw-dist local --config configs/digits/sfw.yaml --nproc 2
  sfw-dist evaluate runs/digits_sfw
  sfw-dist submit --config configs/digits/sfw.yaml --cluster configs/cluster/example.yaml --chain
  sfw-dist report runs/digits_sfw runs/digits_sgd
"""


def main() -> int:
    """Run the command of VERB with the arguments after it; the exit status."""
    verbs = "\n".join(f"  {verb:13}{about}" for verb, (_, about) in _VERBS.items())
    parser = argparse.ArgumentParser(
        prog="sfw-dist",
        usage="sfw-dist VERB [options]",
        description=f"Train once with stochastic Frank-Wolfe, prune to any sparsity.\n\nverbs:\n{verbs}",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=_VERBS, metavar="VERB", help="what to do; VERB --help tells more")
    verb = parser.parse_args(sys.argv[1:2]).verb
    module, _ = _VERBS[verb]
    return importlib.import_module(module).main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
