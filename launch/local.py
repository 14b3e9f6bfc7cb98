"""Train on several ranks of this machine: torchrun, but a mistake in the configuration shows before any rank starts.

python -m launch.local --config configs/digits_cnn.yaml --nproc 2
python -m launch.local --config configs/digits_cnn.yaml --nproc 2 --optimizer.lr 0.5 --name digits_lr05
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

from sfw_dist.config import parse_run
from sfw_dist.errors import UserError, reports_user_errors
from sfw_dist.train import add_options

_EXAMPLES = "\n".join((__doc__ or "").split("\n\n")[1].splitlines())


def command(nproc: int, arguments: Sequence[str]) -> list[str]:
    """The torchrun command for ``nproc`` ranks; a free port is found by the rendezvous."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    return [*launcher, "-m", "sfw_dist.train", *arguments]


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Raises nothing; the exit status is 0, 2 for bad input, or that of the training."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.local",
        description="Train on several ranks of this machine. All options of sfw_dist.train may follow.",
        epilog=f"examples:\n{_EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--nproc", type=int, default=1, help="ranks (default: 1)")
    options, arguments = parser.parse_known_args(argv)
    if options.nproc < 1:
        raise UserError(f"--nproc must be at least 1, got {options.nproc}: write 2 for two ranks")
    config, _ = parse_run(arguments, description="", examples="", add_options=add_options)
    if config.data.batch_size % options.nproc:
        raise UserError(
            f"data.batch_size {config.data.batch_size} cannot be split evenly over --nproc {options.nproc}: "
            "choose a batch that is a multiple of it"
        )
    if options.nproc == 1:
        return subprocess.run([sys.executable, "-m", "sfw_dist.train", *arguments]).returncode
    return subprocess.run(command(options.nproc, arguments)).returncode


if __name__ == "__main__":
    sys.exit(main())
