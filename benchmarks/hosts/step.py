"""What a step costs between hosts: DDP with SGD against SFW and its exchanges of gradients, interleaved in one run.

    sudo python -m benchmarks.hosts.step
    sudo python -m benchmarks.hosts.step --hosts 4 --gbit 1 --rounds 20 --out results/hosts.json
    sudo python -m benchmarks.hosts.step --contenders sfw reduce_to_owner --bucket-mb 100

The hosts are network namespaces of this machine, one rank in each (benchmarks/hosts/network.py): that needs root and
iproute2. Measured for every contender, on the model's shapes, float32, gloo:

- *sent*, *received*: bytes of a host in a step, from the counters of its network interface. They count the headers of
  TCP once for each packet that the kernel hands to the device, up to 64 KB; the wire carries about 4 % more.
- *step*: from the start of the backward pass to the end of `optimizer.step()`, on the slowest rank; all start together.
  The loss is Σ⟨θ, g⟩ with a constant g on each rank: gradients reach DDP's buckets as in training, last layers first,
  but next to no computing hides their exchange. The ranks compete for this machine's cores, so SFW's LMOs and its
  update take longer here than on as many hosts.
- *communication* = gradients + vertices, which excludes that computing:
  *gradients*: the backward pass less the same without an exchange (under DDP's `no_sync()`), measured right after it.
  What is computed for the exchange's sake counts: copies to and from buckets, sums, conversions to bfloat16.
  *vertices*: the all-gather of SFW's step, and the all-reduces for tensors that are divided between ranks. The ranks
  start each together, so that a slower LMO does not count.
- *floor*: the bytes of the busiest host, sent or received, at the link's rate. Communication close to it shows that the
  network is the limit, and not the cores.
- *state*: bytes of momentum on the fullest rank, over a W-th of one whole copy, with W ranks.

Ratios are those of a step to the baseline's step of the same round; rounds go through the contenders in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from benchmarks.hosts.baselines import BASELINE, CONTENDERS, build
from benchmarks.hosts.network import DEVICE, FailedRanksError, hosts, run_ranks
from sfw_dist.errors import UserError, reports_user_errors
from sfw_dist.files import write_json
from sfw_dist.models import build_model

WARM_UP = 3  # DDP lays its buckets out anew after the first backward pass
COLLECTIVES = {"all_gather_into_tensor": 1, "all_reduce": 2}
"""Those of an optimizer's step, and how often each of W hosts sends (W − 1)/W of the whole tensor."""


class Measured:
    """One contender on this rank, and what was measured of it."""

    def __init__(self, replica: DistributedDataParallel, optimizer: Optimizer) -> None:
        self._replica, self._optimizer = replica, optimizer
        self._exchange_seconds = 0.0
        self._expected_bytes = 0.0
        self.samples: dict[str, list[float]] = defaultdict(list)

    def warm_up(self) -> None:
        for _ in range(WARM_UP):
            self._step()
        with self._replica.no_sync():
            sent = self._step()["sent"]
        if sent > 1.1 * self._expected_bytes + 100_000:
            raise RuntimeError(f"a step sent {sent} bytes, {self._expected_bytes:.0f} by what is timed: time the rest")

    def measure(self) -> None:
        """One step, and its backward pass without an exchange."""
        for what, value in self._step().items():
            self.samples[what].append(value)
        with self._replica.no_sync():
            self.samples["local_backward"].append(self._backward())

    def state_bytes(self) -> int:
        momenta = [state["momentum_buffer"] for state in self._optimizer.state.values() if "momentum_buffer" in state]
        return sum(m.nbytes for m in momenta)

    def _backward(self) -> float:
        """Seconds of a backward pass that all ranks start together."""
        self._optimizer.zero_grad()
        loss = self._replica()
        dist.barrier()
        began = time.perf_counter()
        loss.backward()
        return time.perf_counter() - began

    def _step(self) -> dict[str, float]:
        self._exchange_seconds, self._expected_bytes = 0.0, 0.0
        sent, received = _counters()
        backward = self._backward()
        began = time.perf_counter()
        with self._collectives_timed():
            self._optimizer.step()
        update = time.perf_counter() - began
        dist.barrier()  # every rank has what was sent to it
        now_sent, now_received = _counters()
        return {
            "step": backward + update,
            "backward": backward,
            "vertices": self._exchange_seconds,
            "sent": now_sent - sent,
            "received": now_received - received,
        }

    @contextmanager
    def _collectives_timed(self) -> Iterator[None]:
        with ExitStack() as patches:
            for name in COLLECTIVES:
                patches.enter_context(mock.patch.object(dist, name, self._timed(name, getattr(dist, name))))
            yield

    def _timed(self, name: str, collective: Callable[..., Any]) -> Callable[..., None]:
        world_size = dist.get_world_size()

        def timed(whole: Tensor, *args: Any, **kwargs: Any) -> None:
            assert not kwargs.get("async_op"), "only the start of an asynchronous collective would be timed"
            dist.barrier()
            began = time.perf_counter()
            collective(whole, *args, **kwargs)
            self._exchange_seconds += time.perf_counter() - began
            self._expected_bytes += COLLECTIVES[name] * whole.nbytes * (world_size - 1) / world_size

        return timed


def _counters() -> tuple[int, int]:
    """Bytes that this host has sent and received."""
    folder = Path("/sys/class/net") / DEVICE / "statistics"
    return int((folder / "tx_bytes").read_text()), int((folder / "rx_bytes").read_text())


def work(options: argparse.Namespace) -> None:
    """One rank; rank 0 prints the results of all, by contender and rank, as the last line."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    measured = {
        name: Measured(*build(CONTENDERS[name], options.model, options.bucket_mb)) for name in options.contenders
    }
    for contender in measured.values():
        contender.warm_up()
    for round_ in range(options.rounds):
        for turn in range(len(measured)):
            list(measured.values())[(round_ + turn) % len(measured)].measure()
    mine = {name: {**m.samples, "state_bytes": m.state_bytes()} for name, m in measured.items()}
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    if dist.get_rank() == 0:
        print(json.dumps({name: [rank[name] for rank in gathered] for name in measured}))
    dist.destroy_process_group()


def summarize(ranks: dict[str, list[dict[str, Any]]], whole_copy: int, gbit: float) -> dict[str, Any]:
    """By contender: the spread of every quantity and of its ratio to the baseline, and which limits are met."""
    samples = {name: _samples(of_ranks, whole_copy, gbit) for name, of_ranks in ranks.items()}
    summary: dict[str, Any] = {}
    for name, quantities in samples.items():
        ratios = {
            what: [a / b for a, b in zip(quantities[what], samples[BASELINE][what], strict=True)]
            for what in ("sent", "greatest", "communication", "step")
        }
        ratios["state"] = quantities["state"]  # of 1/W of a copy, not of SGD's
        summary[name] = {
            "title": CONTENDERS[name].title,
            **{what: _spread(values) for what, values in quantities.items()},
            "ratios": {what: _spread(values) for what, values in ratios.items()},
            "wanted": {
                what: {"limit": limit, "met": statistics.median(ratios[what]) <= limit}
                for what, limit in CONTENDERS[name].wanted.items()
            },
        }
    return summary


def _samples(ranks: list[dict[str, Any]], whole_copy: int, gbit: float) -> dict[str, list[float]]:
    """Of each round: seconds of the slowest rank, bytes by host."""

    def rounds(key: str) -> list[tuple[float, ...]]:
        return list(zip(*(rank[key] for rank in ranks), strict=True))

    step, backward, local, vertices = (
        [max(r) for r in rounds(key)] for key in ("step", "backward", "local_backward", "vertices")
    )
    gradients = [whole - own for whole, own in zip(backward, local, strict=True)]
    sent, received = rounds("sent"), rounds("received")
    greatest = [max(*s, *r) for s, r in zip(sent, received, strict=True)]
    return {
        "step": step,
        "gradients": gradients,
        "vertices": vertices,
        "communication": [g + v for g, v in zip(gradients, vertices, strict=True)],
        "floor": [8 * most / (1e9 * gbit) for most in greatest],
        "sent": [statistics.fmean(s) for s in sent],
        "received": [statistics.fmean(r) for r in received],
        "greatest": greatest,
        "state": [max(rank["state_bytes"] for rank in ranks) * len(ranks) / whole_copy],
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"n": len(values), "median": statistics.median(values), "min": min(values), "max": max(values)}


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def show(result: dict[str, Any]) -> None:
    print(f"{result['hosts']} hosts at {result['gbit_per_second']:g} Gbit/s on {result['cores']} cores of "
          f"{result['processor']}, {result['model']}, {result['parameters']:,} parameters, float32, gloo, "
          f"1 thread a rank, torch {result['torch']}, n = {result['rounds']}")  # fmt: skip
    in_mb = ["sent", "received", "greatest"]
    in_ms = ["floor", "gradients", "vertices", "communication", "step"]
    names = {"floor": "floor ms", "communication": "comm. ms", "step": "step ms"}
    header = "".join(f" {names.get(name, name):>9}" for name in [*in_mb, *in_ms])
    print(f"{'a step, MB and ms':32}{header} {'min':>7} {'max':>7}")
    for row in result["contenders"].values():
        megabytes = "".join(f" {row[name]['median'] / 1e6:9.2f}" for name in in_mb)
        milliseconds = "".join(f" {1e3 * row[name]['median']:9.1f}" for name in in_ms)
        spread = "".join(f" {1e3 * row['step'][which]:7.1f}" for which in ("min", "max"))
        print(f"{row['title']:32}{megabytes}{milliseconds}{spread}")
    print(f"{'ratio to ' + CONTENDERS[BASELINE].title:32} {'median':>9} {'min':>9} {'max':>9}    wanted")
    names = {"sent": "bytes sent", "greatest": "bytes of the busiest host", "step": "whole step"}
    names["state"] = f"state, to 1/{result['hosts']} of a copy"
    for row in result["contenders"].values():
        print(row["title"])
        for what, ratio in row["ratios"].items():
            wanted = row["wanted"].get(what)
            verdict = f"    ≤ {wanted['limit']:.2f} {'met' if wanted['met'] else 'NOT MET'}" if wanted else ""
            spread = "".join(f" {ratio[which]:9.3f}" for which in ("median", "min", "max"))
            print(f"  {names.get(what, what):30}{spread}{verdict}")


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="network whose shapes are used (default: resnet18)")
    parser.add_argument("--hosts", type=int, default=4, help="hosts, with one rank each (default: 4)")
    parser.add_argument("--gbit", type=float, default=1.0, help="rate of each host's link in Gbit/s (default: 1)")
    parser.add_argument("--bucket-mb", type=float, help="size of DDP's buckets (default: DDP's own)")
    parser.add_argument("--rounds", type=int, default=10, help="counted rounds (default: 10)")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME",
                        help=f"of {', '.join(CONTENDERS)} (default: all); {BASELINE} always runs")  # fmt: skip
    parser.add_argument("--timeout", type=float, default=600, help="seconds until hanging ranks end (default: 600)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.hosts < 2 or options.rounds < 1 or not options.gbit > 0:
        raise UserError("--hosts must be at least 2, --rounds at least 1 and --gbit > 0")
    if options.worker:
        work(options)
        return 0

    chosen = [name for name in CONTENDERS if name == BASELINE or name in options.contenders]
    worker = ["--worker", "--model", options.model, "--rounds", str(options.rounds), "--contenders", *chosen]
    if options.bucket_mb is not None:
        worker += ["--bucket-mb", str(options.bucket_mb)]
    with torch.device("meta"):  # a name that is wrong is found before a rank starts
        parameters = sum(p.numel() for p in build_model(options.model, num_classes=10).parameters())
    with hosts(options.hosts, options.gbit) as found:
        try:
            printed = run_ranks(
                found,
                [sys.executable, "-m", "benchmarks.hosts.step", *worker],
                options.timeout,
                {"OMP_NUM_THREADS": "1"},
            )
        except FailedRanksError as failure:
            print(f"error: {failure}", file=sys.stderr)
            return 1
    ranks = json.loads(printed.splitlines()[-1])
    result = {
        "model": options.model,
        "parameters": parameters,
        "hosts": options.hosts,
        "gbit_per_second": options.gbit,
        "bucket_mb": options.bucket_mb,
        "rounds": options.rounds,
        "cores": len(os.sched_getaffinity(0)),
        "processor": _processor(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "iproute2": subprocess.run(["ip", "-V"], capture_output=True, text=True, check=True).stdout.strip(),
        "contenders": summarize(ranks, 4 * parameters, options.gbit),
        "by_rank": ranks,
    }
    show(result)
    if options.out:
        write_json(options.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
