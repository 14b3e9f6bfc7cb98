"""Train on several ranks of this machine.

    python -m launch.local --config configs/digits/sfw.yaml --nproc 2
    python -m launch.local --config configs/digits/sfw.yaml --nproc 2 --optimizer.lr 0.5 --name digits_lr05

The ranks get the environment variables of ``torchrun --standalone``. The difference is in how it ends: bad input is one
line with exit status 2, and after ctrl-C the last line is the command that resumes.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from sfw_dist.errors import UserError, command_imports, reports_user_errors

with command_imports("launch.local", "train"):
    from torch.distributed import TCPStore

    from sfw_dist.config import add_resume_option, parse_run
    from sfw_dist.train.inputs import check_input

_EXAMPLES = "\n".join((__doc__ or "").split("\n\n")[1].splitlines())
# Until the other ranks are killed once one has failed: they wait for it in a collective.
_GRACE_SECONDS = 10.0


def run_ranks(nproc: int, command: Sequence[str]) -> int:
    """Run a command as several ranks of this machine, and wait for them.

    The ranks handle SIGINT, which a terminal sends to them too, and SIGTERM, which is passed on to them.

    Args:
        nproc: number of ranks.
        command: what each rank runs.

    Returns:
        0, or the exit status of the first rank that failed, 128 plus the number of a signal that ended it.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    threads = max(1, len(os.sched_getaffinity(0)) // nproc)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # this process has the store, so rank 0 opens none
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }
    ranks: list[subprocess.Popen[bytes]] = []
    # Handlers, not SIG_IGN, which the ranks would inherit; set before the first rank starts.
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, lambda number, frame: None),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, frame: _send(ranks, signal.SIGTERM)),
    }
    try:
        for rank in range(nproc):
            environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(command, env=environment))
        return _wait(ranks)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(ranks: list[subprocess.Popen[bytes]]) -> int:
    failed_at, status = None, 0
    while True:
        codes = [rank.poll() for rank in ranks]
        if failed_at is None and any(codes):
            failed_at, status = time.monotonic(), next(code for code in codes if code)
        if None not in codes:
            return status if status >= 0 else 128 - status
        if failed_at is not None and time.monotonic() - failed_at > _GRACE_SECONDS:
            _send(ranks, signal.SIGKILL)
        time.sleep(0.1)


def _send(ranks: list[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(number)


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
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
    config, training = parse_run(arguments, add_options=add_resume_option)
    check_input(
        config, options.nproc - 1, options.nproc, resume=training.resume == "auto"
    )  # the last rank has the least data
    return run_ranks(options.nproc, [sys.executable, "-m", "sfw_dist.train", *arguments])


if __name__ == "__main__":
    sys.exit(main())
