"""Train a network: with SFW once for every sparsity, or with SGD for comparison.

    torchrun --nproc-per-node 2 -m sfw_dist.train --config configs/digits_cnn.yaml
    python -m sfw_dist.train --config configs/digits_cnn.yaml --optimizer.lr 0.5 --name digits_lr05
    torchrun --nproc-per-node 4 -m sfw_dist.train --config runs/digits_cnn/config.yaml --resume auto

The number of ranks is free: the global batch, the order and the augmentation do not depend on it.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from sfw_dist.errors import UserError, command_imports, reports_user_errors

with command_imports("sfw_dist.train", "train"):
    from jsonargparse import ArgumentParser

    from sfw_dist.config import parse_run
    from sfw_dist.distributed.world import joined_world
    from sfw_dist.train.trainer import train

_EXAMPLES = "\n".join((__doc__ or "").split("\n\n")[1].splitlines())


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    config, options = parse_run(
        argv, description="Train a network with SFW, or SGD.", examples=_EXAMPLES, add_options=add_options
    )
    given = Path(options.config).resolve().parent if options.config else None
    if options.resume == "auto" and given and (given / "checkpoints").is_dir() and given != config.run_dir.resolve():
        place = f"--runs_dir {shlex.quote(str(given.parent))} --name {shlex.quote(given.name)}"
        raise UserError(f"{options.config} is not of {config.run_dir}, which would be trained: give {place}")
    with joined_world() as world:
        return train(config, world, resume=options.resume == "auto")


def add_options(parser: ArgumentParser) -> None:
    """The options of the command beside the configuration."""
    resume_help = "auto: go on from the run's newest checkpoint, if it has one; never: the run must be new."
    parser.add_argument("--resume", choices=["auto", "never"], default="never", help=resume_help)


if __name__ == "__main__":
    sys.exit(main())
