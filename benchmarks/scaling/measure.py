"""The measured points that scaling_model.py is calibrated on and checked against: messages, training steps.

    sudo python -m benchmarks.scaling.measure --points 4:1:resnet18:4 --out point.json

A point is HOSTS:GBIT:MODEL:BATCH: so many network namespaces (benchmarks/hosts/network.py: root and iproute2), one
rank with one thread in each. `scaling_model.py --measure` runs all of them.

*Messages* (MODEL is `messages`): seconds of each collective by size, started together, the slowest rank's.

*Steps*: training steps of every engine on a batch of noise, float32, in turn in every round:

- *pass*: forward and backward with the exchange that belongs to it, the slowest rank's; *local*: the same of an
  undivided model without any exchange, all ranks at the same time, for they compete for this machine's cores.
- *step*: `optimizer.step()`; *messages*: its collectives, which the ranks start together; *whole*: pass + step,
  measured on its own, without barriers in between.
- *sent*: bytes of a host, from the counters of its interface: *sent_pass*, *sent_step*.
- *foreign*: cores that processes which are not ours kept busy meanwhile. Where a machine has other users, take the
  rounds in which it was least. Ranks go before such processes (as with `nice -n -10`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

from benchmarks.hosts.baselines import K_FRAC, K_MIN, TAU
from benchmarks.hosts.network import FailedRanksError, hosts, run_ranks
from benchmarks.hosts.step import _counters
from sfw_dist import SFW, KSparsePolytope, constrain
from sfw_dist.errors import UserError, reports_user_errors
from sfw_dist.files import write_json
from sfw_dist.models import build_model
from sfw_dist.optim.comm_hooks import reduce_to_owner, reduce_to_owner_bf16

WARM_UP = 3
HOOKS = {"owner": reduce_to_owner, "ownerbf16": reduce_to_owner_bf16}
ENGINES = ("ddp_sgd", "ddp_sfw", "ddp_owner", "ddp_ownerbf16", "fsdp_sgd", "fsdp_sfw", "zero2_sfw")
LARGE = 65_536
"""Layers of more entries than this are gathered by themselves where a network has no blocks."""
COLLECTIVES = ("all_gather_into_tensor", "all_reduce", "reduce_scatter_tensor")
SIZES = [2**e for e in range(6, 27, 4)] + [2**20]
"""Bytes of a whole tensor in a message: 64 B to 64 MB."""


def measure_messages(rounds: int) -> dict[str, Any]:
    """Seconds by collective and size of the whole tensor, the slowest rank's."""
    world_size = dist.get_world_size()
    found: dict[str, dict[str, list[float]]] = {name: {} for name in COLLECTIVES}
    for size in sorted(SIZES):
        entries = -(-size // 4 // world_size) * world_size
        whole, part = torch.zeros(entries), torch.zeros(entries // world_size)
        calls: dict[str, Callable[[], Any]] = {
            "all_gather_into_tensor": lambda w=whole, p=part: dist.all_gather_into_tensor(w, p),  # type: ignore[misc]
            "all_reduce": lambda w=whole: dist.all_reduce(w),  # type: ignore[misc]
            "reduce_scatter_tensor": lambda w=whole, p=part: dist.reduce_scatter_tensor(p, w),  # type: ignore[misc]
        }
        for round_ in range(rounds + WARM_UP):
            for name, call in calls.items():
                if name == "reduce_scatter_tensor" and round_ % 3:
                    continue
                time.sleep(0.004)  # the links' token buckets are full again, as they are after computing
                dist.barrier()
                taken = slowest(timed(call))
                if round_ >= WARM_UP:
                    found[name].setdefault(str(4 * entries), []).append(taken)
    return {"seconds": found}


class Engine:
    """One way to train on this rank."""

    def __init__(self, name: str, model_name: str, batch: int) -> None:
        torch.manual_seed(0)
        model = build_model(model_name, num_classes=10)
        self.model: nn.Module = model
        kind, _, what = name.partition("_")
        if kind == "fsdp":
            for block in blocks(model):
                fully_shard(block)
            fully_shard(model)
        self.optimizer: Optimizer
        if what == "sgd":
            self.optimizer = SGD(model.parameters(), lr=1e-3, momentum=0.9)
        else:
            groups = constrain(model, KSparsePolytope(k_frac=K_FRAC, k_min=K_MIN, tau=TAU))
            self.optimizer = SFW(groups, lr=1e-3)
        if kind == "ddp":
            self.model = replica = DistributedDataParallel(model)
            if what in HOOKS:
                replica.register_comm_hook(self.optimizer, HOOKS[what])
        self._zero: Any = None
        if kind == "zero2":
            from sfw_dist.optim.deepspeed import initialize

            assert isinstance(self.optimizer, SFW)
            config = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": batch}
            self.model = self._zero = initialize(model, self.optimizer, config)

    def forward_backward(self, images: Tensor, labels: Tensor) -> None:
        loss = F.cross_entropy(self.model(images), labels)
        if self._zero:
            self._zero.backward(loss)
        else:
            loss.backward()

    def step(self) -> None:
        if self._zero:
            self._zero.step()
            return
        self.optimizer.step()
        self.optimizer.zero_grad()


def blocks(model: nn.Module) -> list[nn.Module]:
    """What FSDP gathers and frees at a time: residual blocks, else large layers; the rest is the root's."""
    residual = [b for name, stage in model.named_children() if name.startswith("layer") for b in stage.children()]
    leaves = [m for m in model.modules() if not list(m.children()) and sum(p.numel() for p in m.parameters()) > LARGE]
    return residual or leaves


def measure_steps(model_name: str, batch: int, rounds: int, engines: list[str]) -> dict[str, Any]:
    """Samples of every quantity by engine, one a round, the slowest rank's; bytes are the mean over hosts."""
    made = {name: Engine(name, model_name, batch) for name in engines}
    torch.manual_seed(0)
    local = build_model(model_name, num_classes=10)
    generator = torch.Generator().manual_seed(dist.get_rank())
    samples: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in engines}
    for round_ in range(rounds + WARM_UP):
        images = torch.randn(batch, 3, 32, 32, generator=generator)
        labels = torch.randint(10, (batch,), generator=generator)

        def local_pass(images: Tensor = images, labels: Tensor = labels) -> None:
            F.cross_entropy(local(images), labels).backward()

        for turn in range(len(engines)):
            name = engines[(round_ + turn) % len(engines)]
            found = measure_one(made[name], images, labels)
            found["local"] = slowest(timed(local_pass))
            if round_ >= WARM_UP:
                for what, value in found.items():
                    samples[name][what].append(value)
    return {"samples": samples}


def measure_one(engine: Engine, images: Tensor, labels: Tensor) -> dict[str, float]:
    def whole_step() -> None:
        engine.forward_backward(images, labels)
        engine.step()

    dist.barrier()
    busy, began = busy_seconds(), time.perf_counter()
    whole = slowest(timed(whole_step))
    dist.barrier()
    before = _counters()[0]
    pass_ = timed(lambda: engine.forward_backward(images, labels))
    dist.barrier()
    between = _counters()[0]
    messages: list[float] = []
    with collectives_timed(messages):
        step = timed(engine.step)
    dist.barrier()
    sent = torch.tensor([between - before, _counters()[0] - between], dtype=torch.float64)
    dist.all_reduce(sent)
    sent /= dist.get_world_size()
    waited = sum(messages)
    elapsed = time.perf_counter() - began
    ours = torch.tensor(busy_seconds()[1] - busy[1], dtype=torch.float64)
    dist.all_reduce(ours)
    return {
        "whole": whole,
        "pass": slowest(pass_),
        "step": slowest(step),
        "messages": slowest(waited),
        "number": float(len(messages)),
        "foreign": max(0.0, busy_seconds()[0] - busy[0] - float(ours)) / elapsed,
        "sent_pass": float(sent[0]),
        "sent_step": float(sent[1]),
    }


def busy_seconds() -> tuple[float, float]:
    """Of all processes of this machine, and of this one. The kernel's work for the network belongs to nobody."""
    user, nice, system = (int(x) for x in Path("/proc/stat").read_text().split()[1:4])
    mine = os.times()
    return (user + nice + system) / os.sysconf("SC_CLK_TCK"), mine.user + mine.system


@contextmanager
def collectives_timed(seconds: list[float]) -> Iterator[None]:
    """Appends what each collective of the block takes, when all ranks have come to it."""

    def timing(collective: Callable[..., Any]) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            assert not kwargs.get("async_op"), "only the start of an asynchronous collective would be timed"
            dist.barrier()
            seconds.append(timed(lambda: collective(*args, **kwargs)))

        return call

    with ExitStack() as patches:
        for name in COLLECTIVES:
            patches.enter_context(mock.patch.object(dist, name, timing(getattr(dist, name))))
        yield


def timed(function: Callable[[], Any]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def slowest(seconds: float) -> float:
    value = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return float(value)


def measure_point(point: str, rounds: int, engines: list[str], timeout: float = 900) -> dict[str, Any]:
    """Start a point's hosts and ranks, and return rank 0's samples with their medians."""
    count, gbit, model, batch = point.split(":")
    options = ["--worker", "--points", point, "--rounds", str(rounds), "--engines", *engines]
    load = os.getloadavg()[0]
    with hosts(int(count), float(gbit)) as found:
        command = [sys.executable, "-m", "benchmarks.scaling.measure", *options]
        printed = run_ranks(found, command, timeout, {"OMP_NUM_THREADS": "1"})
    result = json.loads(printed.splitlines()[-1])
    return {
        "hosts": int(count),
        "gbit": float(gbit),
        "model": model,
        "batch": int(batch),
        "rounds": rounds,
        "load_before": load,
        "torch": torch.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        **result,
    }


def go_first() -> None:
    """Before other users of this machine. Where the kernel groups processes by session, nice levels are the groups'."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -10)
        Path("/proc/self/autogroup").write_text("-10")


def work(point: str, rounds: int, engines: list[str]) -> None:
    go_first()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    _, _, model, batch = point.split(":")
    result = measure_messages(rounds) if model == "messages" else measure_steps(model, int(batch), rounds, engines)
    if dist.get_rank() == 0:
        print(json.dumps(result), flush=True)
    dist.barrier()  # a rank that leaves early ends connections that others still use
    dist.destroy_process_group()


def show(result: dict[str, Any]) -> None:
    print(f"{result['hosts']} hosts at {result['gbit']:g} Gbit/s, {result['model']}, batch {result['batch']}, n = "
          f"{result['rounds']}, medians in ms and MB")  # fmt: skip
    for name, columns in (result.get("seconds") or result["samples"]).items():
        scale = {
            what: 1e-6 if what.startswith("sent") else 1.0 if what in ("number", "foreign") else 1e3 for what in columns
        }
        row = (f"{what} {scale[what] * statistics.median(values):.3g} ({scale[what] * min(values):.3g} to "
               f"{scale[what] * max(values):.3g})" for what, values in columns.items())  # fmt: skip
        print(f"  {name:24}", ", ".join(row))


@reports_user_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", nargs="+", default=["4:1:messages:0", "4:1:resnet18:4"], metavar="POINT")
    parser.add_argument("--rounds", type=int, default=12, help="counted rounds (default: 12)")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), metavar="ENGINE",
                        help=f"of {', '.join(ENGINES)} (default: all)")  # fmt: skip
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.points[0], arguments.rounds, arguments.engines)
        return
    results = []
    for point in arguments.points:
        try:
            results.append(measure_point(point, arguments.rounds, arguments.engines))
        except FailedRanksError as error:
            raise UserError(str(error)) from None
        show(results[-1])
    if arguments.out:
        write_json(arguments.out, results)


if __name__ == "__main__":
    main()
