"""Train a network: with SFW once for every sparsity, or with SGD for comparison.

    torchrun --nproc-per-node 2 -m sfw_dist.train --config configs/digits/sfw.yaml
    python -m sfw_dist.train --config configs/digits/sfw.yaml --optimizer.lr 0.5 --name digits_lr05
    torchrun --nproc-per-node 4 -m sfw_dist.train --config runs/digits_sfw/config.yaml --resume auto

The number of ranks is free: the global batch, the order and the augmentation do not depend on it.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from sfw_dist.errors import UserError, command_imports, reports_user_errors

with command_imports("sfw_dist.train", "train"):
    from sfw_dist.config import Config, add_resume_option, parse_run
    from sfw_dist.distributed.world import joined_world
    from sfw_dist.train.trainer import train

_EXAMPLES = "\n".join((__doc__ or "").split("\n\n")[1].splitlines())


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    config, options = parse_run(
        argv, description="Train a network with SFW, or SGD.", examples=_EXAMPLES, add_options=add_resume_option
    )
    resume = options.resume == "auto"
    if resume and options.config:
        _check_same_folder(Path(options.config), config)
    with joined_world() as world:
        return train(config, world, resume=resume)


def _check_same_folder(given: Path, config: Config) -> None:
    """Refuse to resume from the configuration of a run that was moved or renamed: another folder would be trained."""
    folder = given.resolve().parent
    if (folder / "checkpoints").is_dir() and folder != config.run_dir.resolve():
        place = f"--runs_dir {shlex.quote(str(folder.parent))} --name {shlex.quote(folder.name)}"
        raise UserError(f"{given} is not of {config.run_dir}, which would be trained: give {place}")


if __name__ == "__main__":
    sys.exit(main())
