"""Scaling on paper: a step of each engine at up to 4,096 ranks, from α, β and passes over memory.

    python -m benchmarks.scaling.model
    python -m benchmarks.scaling.model --networks h100-3200 --ranks 8 256 4096 --out results/scaling
    sudo python -m benchmarks.scaling.model --measure --out results/scaling

Prints three things: constants, fitted on some of the measured points; the check, the model's prediction of
the other points against the measurements; and tables for networks and clusters that were not measured. The formulas are
in alpha_beta.py (messages) and steps.py (engines); measure.py measures, and --measure runs it on all points (root and
iproute2, ten minutes). With --out the tables, the figure and all numbers are written there.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.scaling.alpha_beta import FRAMES, Cluster, Device, Link, all_gather, all_reduce, reduce_scatter
from benchmarks.scaling.steps import ENGINES, WORKLOADS, Engine, Step, Workload, ddp, owners, resnet18, vgg16
from sfw_dist.errors import UserError, reports_user_errors
from sfw_dist.files import write_json

_RESULTS = Path(__file__).parents[2] / "results"
MEASURED = _RESULTS / "scaling_2-core-cpu_2026-11-25" / "measured.json"
HOSTS = [_RESULTS / "step_2-core-cpu_2026-11-25" / "hosts.json", *sorted(MEASURED.parent.glob("hosts_*.json"))]
"""What benchmarks/hosts/step.py measured: communication alone, with next to no computing."""
RANKS = [1, 8, 64, 512, 4096]
PARTS = ("compute", "gradients", "parameters", "optimizer", "selection", "vertices")

# Assumptions, not measured: nominal NVLink and network rates, of which collectives reach four fifths and nine tenths;
# latencies of a hop as NCCL's own tuning tables have them, to the nearest round figure; bf16 products at the device's
# peak, times a workload's efficiency. The step of owners moves the bytes that fused/cuda_kernels.py counts. That of
# divided tensors is torch's operations, one after the other, counted by their operands: momentum 28, magnitudes 8,
# three countings 174, who is chosen 60, sums 60, update 20.
H100 = Device(flops=989e12, bandwidth=0.8 * 3.35e12, answer_bytes=32, divided_bytes=350)
_NVLINK = Link(alpha=1e-6, beta=1 / (0.8 * 450e9))


def _h100(gbit: float) -> Cluster:
    between = Link.of_gbit(5e-6, 0.9 * gbit)
    return Cluster(f"nodes of 8 H100, {gbit:g} Gbit/s a node", 8, _NVLINK, between, H100, launch=10e-6)


CLUSTERS = {f"h100-{gbit}": _h100(gbit) for gbit in (100, 400, 3200)}

# The measured networks' forward passes: multiplications and additions of convolutions and linear layers at 32×32.
SMALL = {
    "resnet18": Workload("ResNet-18", tuple(resnet18()), 2 * 555.4e6, 4, 8, 6_986),
    "vgg16": Workload("VGG-16", tuple(vgg16()), 2 * 313.2e6, 4, 11, 52_298),
}
POINTS = {
    "ddp_sgd": "DDP + SGD",
    "ddp_sfw": "DDP + SFW, all_reduce",
    "ddp_owner": "DDP + SFW, reduce_to_owner",
    "ddp_ownerbf16": "DDP + SFW, reduce_to_owner_bf16",
    "fsdp_sgd": "FSDP2 + SGD",
    "fsdp_sfw": "FSDP2 + SFW",
    "zero2_sfw": "ZeRO-2 + SFW",
}
_MEASURED_AT = [
    ("2:1:messages:0", 12),
    ("3:1:messages:0", 12),
    ("4:1:messages:0", 12),
    ("4:0.5:messages:0", 8),
    ("2:1:resnet18:4", 12),
    ("3:1:resnet18:4", 9),
    ("4:1:resnet18:4", 9),
    ("4:2:resnet18:4", 9),
    ("4:0.5:resnet18:4", 8),
    ("2:1:vgg16:4", 9),
]
COLLECTIVES = {
    "all_gather_into_tensor": all_gather,
    "all_reduce": all_reduce,
    "reduce_scatter_tensor": reduce_scatter,
}


# Calibration and check ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """Constants of the measured network. β is not among them: it is the rate that was set, and TCP's headers."""

    alpha: float
    """Seconds a message: an all-reduce of at most 16 KB between four hosts, over its six hops."""
    copy: float
    """Seconds a byte: all-gather and reduce-scatter of 64 MB between four hosts, less their transfer."""
    two_way: float
    """An all-gather of 64 MB between two hosts, over its transfer."""
    flops: float
    """Operations a second and core: forward and backward of ResNet-18, two hosts on two cores."""
    bandwidth: float
    """Bytes a second: the step of SFW on two hosts, without its messages."""
    sgd_bytes: float
    """Of an entry, at that bandwidth: SGD's step on two hosts."""
    divided_bytes: float
    """The same of FSDP2 + SFW."""
    overlap: float
    """Share of DDP's forward and backward behind which gradients travelled: DDP + SGD on two hosts."""

    def cluster(self, gbit: float) -> Cluster:
        """Namespaces at this rate. Their token buckets let 256 KiB pass at once."""
        link = Link.of_gbit(self.alpha, gbit, burst=262_144, overhead=FRAMES)
        device = Device(self.flops, self.bandwidth, _CPU_ANSWER, self.divided_bytes, sgd_bytes=self.sgd_bytes)
        return Cluster(
            f"namespaces at {gbit:g} Gbit/s", 1, link, link, device, "gloo", 0.0, self.copy, self.two_way, cores=2
        )


# One pass over g and m (12 bytes), a second over m, one over m and θ for the sums; see fused/step.cpp.
_CPU_ANSWER = 24.0
_START = Calibration(0.0, 0.0, 1.0, 1e10, 1e10, 20.0, 64.0, 0.0)


def calibrate(points: Sequence[dict[str, Any]]) -> Calibration:
    """Each constant from the one measurement that shows it best; all others are left for the check."""
    two, four = _point(points, "2:1:messages"), _point(points, "4:1:messages")
    free = _START.cluster(1.0)
    small = [t for size, ts in four["seconds"]["all_reduce"].items() if int(size) <= 16_384 for t in ts]
    found = replace(_START, alpha=statistics.median(small) / 6 / free.contention(4))

    copies = []
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        size, seconds = max((int(size), ts) for size, ts in four["seconds"][name].items())
        cost = COLLECTIVES[name](found.cluster(1.0), free.group(4), size)
        copies.append((statistics.median(seconds) - cost.seconds) / cost.sent)
    found = replace(found, copy=statistics.fmean(copies))

    size, seconds = max((int(size), ts) for size, ts in two["seconds"]["all_gather_into_tensor"].items())
    once = all_gather(found.cluster(1.0), free.group(2), size)
    link = found.cluster(1.0).between
    transfer = (once.sent - link.burst) * link.beta
    found = replace(found, two_way=1 + (statistics.median(seconds) - once.seconds) / transfer)

    steps, work = _point(points, "2:1:resnet18")["samples"], SMALL["resnet18"]
    local = statistics.median(t for columns in steps.values() for t in columns["local"])
    computing = {name: _median(c["step"]) - _median(c["messages"]) for name, c in steps.items()}
    owned = owners(work.sizes, 2)[0].imbalance / 2
    bandwidth = work.entries * (_CPU_ANSWER * owned + H100.move_bytes) / computing["ddp_sfw"]
    found = replace(
        found,
        flops=3 * work.forward * work.batch / local,
        bandwidth=bandwidth,
        sgd_bytes=bandwidth * computing["ddp_sgd"] / work.entries,
    )
    if "fsdp_sfw" in computing:
        found = replace(found, divided_bytes=bandwidth * computing["fsdp_sfw"] / (work.entries / 2))
    step = ENGINES["DDP + SGD"](work, found.cluster(1.0), 2)
    behind = step.seconds() - _median(steps["ddp_sgd"]["whole"])
    return replace(found, overlap=behind / min(step.seconds("compute"), step.seconds("gradients")))


def whole_step(step: Step, engine: str, constants: Calibration) -> float:
    """Seconds on the measured network. gloo's ranks wait for FSDP's messages, so that nothing overlaps there."""
    return step.with_overlap(constants.overlap) if engine.startswith("DDP") else step.seconds()


def quiet(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each engine's rounds that half in which other processes took least, and one entry for each point."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for point in points:
        key = point["hosts"], point["gbit"], point["model"], point["batch"]
        if "samples" not in point:
            found[key] = point
            continue
        kept = found.setdefault(key, point | {"samples": {}})
        for engine, columns in point["samples"].items():
            rounds = sorted(range(len(columns["foreign"])), key=columns["foreign"].__getitem__)
            least = rounds[: -(-len(rounds) // 2)]
            kept["samples"][engine] = {what: [values[i] for i in least] for what, values in columns.items()}
    return list(found.values())


def _point(points: Sequence[dict[str, Any]], what: str) -> dict[str, Any]:
    for point in points:
        if f"{point['hosts']}:{point['gbit']:g}:{point['model']}" == what:
            return point
    raise UserError(f"no point {what} among those measured: measure it with --measure")


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)


@dataclass(frozen=True)
class Checked:
    """What was measured, and what the model says of it."""

    point: str
    what: str
    kind: str
    """``step``, ``bytes``, ``messages`` (of an optimizer's step), ``communication`` or ``collective``."""
    n: int
    measured: float
    least: float
    greatest: float
    model: float

    @property
    def unit(self) -> str:
        return "MB" if self.kind == "bytes" else "ms"

    @property
    def error(self) -> float:
        return self.model / self.measured - 1


_FITTED = {(2, "all_gather_into_tensor"), (4, "all_gather_into_tensor"), (4, "reduce_scatter_tensor")}


def check(points: Sequence[dict[str, Any]], constants: Calibration) -> list[Checked]:
    """Every point that no constant was fitted on."""
    rows = []
    for point in points:
        cluster, hosts = constants.cluster(point["gbit"]), point["hosts"]
        where = f"{hosts} hosts, {point['gbit']:g} Gbit/s"
        if point["model"] == "messages":
            for name, by_size in point["seconds"].items():
                if point["gbit"] == 1.0 and (hosts, name) in _FITTED:
                    continue
                size, seconds = max((int(size), ts) for size, ts in by_size.items())
                cost = COLLECTIVES[name](cluster, cluster.group(hosts), size)
                title = f"{name} of {size / 2**20:.0f} MiB"
                rows.append(_checked(where, title, "collective", seconds, cost.seconds))
            continue
        if hosts == 2 and point["model"] == "resnet18":
            continue
        where += f", {SMALL[point['model']].name}"
        for engine, columns in point["samples"].items():
            step = ENGINES[POINTS[engine]](SMALL[point["model"]], cluster, hosts)
            whole = whole_step(step, POINTS[engine], constants)
            rows.append(_checked(where, POINTS[engine], "step", columns["whole"], whole))
            sent = [a + b for a, b in zip(columns["sent_pass"], columns["sent_step"], strict=True)]
            rows.append(_checked(where, POINTS[engine], "bytes", sent, step.sent))
            own = step.seconds("selection", "vertices")
            if own:
                title = f"{POINTS[engine]}: selection, vertices"
                rows.append(_checked(where, title, "messages", columns["messages"], own))
    return rows


def check_hosts(filed: Sequence[dict[str, Any]], constants: Calibration) -> list[Checked]:
    """Gradients and vertices of steps that compute next to nothing, from what benchmarks/hosts/step.py wrote."""
    rows = []
    for result in filed:
        where = f"{result['hosts']} hosts, {result['gbit_per_second']:g} Gbit/s, {SMALL[result['model']].name}"
        cluster = constants.cluster(result["gbit_per_second"])
        for row in result["contenders"].values():
            step = ENGINES[row["title"]](SMALL[result["model"]], cluster, result["hosts"])
            model = step.seconds("gradients", "selection", "vertices")
            median, least, greatest = (1e3 * row["communication"][which] for which in ("median", "min", "max"))
            n = row["communication"]["n"]
            rows.append(Checked(where, row["title"], "communication", n, median, least, greatest, 1e3 * model))
    return rows


def _checked(point: str, what: str, kind: str, values: Sequence[float], model: float) -> Checked:
    scale = 1e-6 if kind == "bytes" else 1e3
    median, least, greatest = (scale * x for x in (statistics.median(values), min(values), max(values)))
    return Checked(point, what, kind, len(values), median, least, greatest, scale * model)


# Tables ---------------------------------------------------------------------------------------------------------------


def steps(
    networks: Sequence[str], clusters: Sequence[str], ranks: Sequence[int], wire: int = 4
) -> list[dict[str, Any]]:
    """One row for every network, cluster, number of ranks and engine; ``wire``: bytes of a gathered parameter."""
    rows = []
    for network in networks:
        for cluster in clusters:
            work = replace(WORKLOADS[network], wire=wire)
            best = ENGINES["DDP + SGD"](work, CLUSTERS[cluster], 1)
            for size in ranks:
                for engine, step_of in ENGINES.items():
                    step = step_of(work, CLUSTERS[cluster], size)
                    rows.append(
                        {
                            "network": network,
                            "cluster": cluster,
                            "ranks": size,
                            "engine": engine,
                            "seconds": step.seconds(),
                            "hidden_seconds": step.hidden,
                            "efficiency": best.seconds() / step.seconds(),
                            "hidden_efficiency": best.seconds() / step.hidden,
                            **{part: step.seconds(part) for part in PARTS},
                            "sent_bytes": step.sent,
                            "memory_bytes": step.memory,
                        }
                    )
    return rows


def crossovers(network: str, cluster: str, most: int = 4096, wire: int = 4) -> dict[str, int | None]:
    """From how many ranks on (powers of two, all greater ones up to ``most``) something holds; ``None``: from none."""
    sizes = [2**e for e in range(1, most.bit_length()) if 2**e <= most]
    work = replace(WORKLOADS[network], wire=wire)
    large: dict[str, Engine] = {
        f"{grads}, 1 GiB": lambda w, c, r, grads=grads: ddp(w, c, r, grads=grads, bucket=2**30)  # type: ignore[misc]
        for grads in ("all_reduce", "reduce_to_owner")
    }
    engines = ENGINES | large
    made = {engine: [step_of(work, CLUSTERS[cluster], size) for size in sizes] for engine, step_of in engines.items()}

    def since(holds: Callable[..., bool], *engines: str) -> int | None:
        held = [holds(*these) for these in zip(*(made[engine] for engine in engines), strict=True)]
        lasting = len(held)
        while lasting and held[lasting - 1]:
            lasting -= 1
        return sizes[lasting] if lasting < len(held) else None

    def slower(a: Step, b: Step) -> bool:
        return a.seconds() > b.seconds()

    reduced, owner, full, grid = (
        "DDP + SFW, all_reduce",
        "DDP + SFW, reduce_to_owner",
        "FSDP2 + SFW",
        "HSDP 8 + SFW",
    )
    exchanged = ("selection", "vertices")
    return {
        "FSDP2 + SFW takes longer than DDP + SFW": since(slower, full, reduced),
        "FSDP2 + SFW takes longer than HSDP 8 + SFW": since(slower, full, grid),
        "FSDP2's selection is a tenth of its bytes": since(lambda a: a.costs["selection"].sent > 0.1 * a.sent, full),
        "FSDP2's selection is a tenth of its step": since(lambda a: a.seconds("selection") > 0.1 * a.seconds(), full),
        "FSDP2 + SFW needs more memory than HSDP 8 + SFW": since(lambda a, b: a.memory > b.memory, full, grid),
        "ZeRO-2's parameters and selection take longer than DDP's vertices and selection": since(
            lambda a, b: a.seconds("parameters", "selection") > b.seconds(*exchanged), "ZeRO-2 + SFW", reduced
        ),
        "reduce_to_owner takes longer than all_reduce, DDP's buckets of 25 MiB": since(slower, owner, reduced),
        "reduce_to_owner takes longer than all_reduce, buckets of 1 GiB": since(
            slower, "reduce_to_owner, 1 GiB", "all_reduce, 1 GiB"
        ),
        "DDP + SFW takes longer than DDP + SGD": since(slower, reduced, "DDP + SGD"),
        "DDP's vertices and selection are a tenth of its step": since(
            lambda a: a.seconds(*exchanged) > 0.1 * a.seconds(), reduced
        ),
    }


def show_calibration(constants: Calibration) -> list[str]:
    return [
        "constants, fitted:",
        f"  α {1e3 * constants.alpha:.2f} ms a hop and rank on a core",
        f"  copies of gathered and scattered bytes {1e9 * constants.copy:.2f} ns a byte",
        f"  two hosts that send to each other take {constants.two_way:.2f} times as long",
        f"  forward and backward {constants.flops / 1e9:.1f} GFLOP/s a core, "
        f"passes over memory {constants.bandwidth / 1e9:.2f} GB/s a core",
        f"  DDP hides {constants.overlap:.0%} of the shorter of forward and backward and gradients",
        f"  SGD {constants.sgd_bytes:.0f} bytes an entry, SFW of divided tensors {constants.divided_bytes:.0f}",
    ]


def show_check(rows: Sequence[Checked]) -> list[str]:
    lines = [
        f"{'point':36} {'what':52} {'n':>3} {'measured':>9} {'least':>8} {'greatest':>9} {'model':>8} {'error':>7}"
    ]
    for r in rows:
        lines.append(f"{r.point:36} {r.what + ', ' + r.unit:60} {r.n:3} {r.measured:9.2f} {r.least:8.2f} "
                     f"{r.greatest:9.2f} {r.model:8.2f} {r.error:+7.1%}")  # fmt: skip
    for kind in dict.fromkeys(r.kind for r in rows):
        errors = [abs(r.error) for r in rows if r.kind == kind]
        lines.append(f"{kind}: {len(errors)} checks, median error {statistics.median(errors):.1%}, "
                     f"greatest {max(errors):.1%}")  # fmt: skip
    return lines


def show_steps(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Whole steps, every part of them."""
    lines = []
    for network, cluster in dict.fromkeys((r["network"], r["cluster"]) for r in rows):
        lines += ["", f"{WORKLOADS[network].name} a rank, {CLUSTERS[cluster].name}"]
        lines.append(f"{'ranks':>5} {'engine':32} {'step ms':>9} {'hidden':>9} {'eff.':>6} "
                     + "".join(f"{part:>11}" for part in PARTS) + f" {'sent MB':>9} {'memory GB':>10}")  # fmt: skip
        for r in rows:
            if (r["network"], r["cluster"]) == (network, cluster):
                parts = "".join(f"{1e3 * r[part]:11.2f}" for part in PARTS)
                lines.append(f"{r['ranks']:5} {r['engine']:32} {1e3 * r['seconds']:9.1f} "
                             f"{1e3 * r['hidden_seconds']:9.1f} {r['efficiency']:6.1%} {parts} "
                             f"{r['sent_bytes'] / 1e6:9.1f} {r['memory_bytes'] / 1e9:10.2f}")  # fmt: skip
    return lines


def show_crossovers(found: dict[str, dict[str, int | None]]) -> list[str]:
    lines = ["", f"{'from how many ranks on':84}" + "".join(f"{where:>22}" for where in found)]
    for what in next(iter(found.values())):
        lines.append(f"{what:84}" + "".join(f"{_ranks(of[what]):>22}" for of in found.values()))
    return lines


def _ranks(number: int | None) -> str:
    return "never" if number is None else f"{number:,}"


def markdown(rows: Sequence[dict[str, Any]]) -> list[str]:
    """By network and cluster: milliseconds of a step, and in brackets with perfect overlap, by engine and ranks."""
    lines = []
    for network, cluster in dict.fromkeys((r["network"], r["cluster"]) for r in rows):
        own = [r for r in rows if (r["network"], r["cluster"]) == (network, cluster)]
        sizes = list(dict.fromkeys(r["ranks"] for r in own))
        last = max(sizes)
        lines += ["", f"{WORKLOADS[network].name} a rank, {CLUSTERS[cluster].name}:", ""]
        lines.append(f"| ms | {' | '.join(f'{size:,}' for size in sizes)} | MB sent, {last:,} | GB a rank, {last:,} |")
        lines.append("|---|" + "---:|" * (len(sizes) + 2))
        for engine in dict.fromkeys(r["engine"] for r in own):
            by_size = {r["ranks"]: r for r in own if r["engine"] == engine}
            cells = [f"{_ms(by_size[s]['seconds'])} ({_ms(by_size[s]['hidden_seconds'])})" for s in sizes]
            cells += [f"{by_size[last]['sent_bytes'] / 1e6:,.0f}", f"{by_size[last]['memory_bytes'] / 1e9:,.2f}"]
            lines.append(f"| {engine} | {' | '.join(cells)} |")
    return lines


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds > 0.1 else f"{1e3 * seconds:.1f}"


def check_markdown(rows: Sequence[Checked], kind: str, what: str) -> list[str]:
    """Measured milliseconds and the model's relative error, by engine and point."""
    own = [r for r in rows if r.kind == kind]
    points = list(dict.fromkeys(r.point for r in own))
    lines = [f"| {what}, ms (error) | {' | '.join(points)} |", "|---|" + "---:|" * len(points)]
    for engine in dict.fromkeys(r.what for r in own):
        by_point = {r.point: f"{r.measured:,.0f} ({100 * r.error:+.0f} %)" for r in own if r.what == engine}
        lines.append(f"| {engine} | {' | '.join(by_point.get(point, '') for point in points)} |")
    return lines


def draw(path: Path, networks: Sequence[str], cluster: str) -> None:
    """Efficiency against ranks, a panel a network, and the same numbers as CSV next to it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = [2**e for e in range(13)]
    rows = steps(networks, [cluster], sizes)
    shown = [e for e in ENGINES if e not in ("ZeRO-1 + SFW", "DDP + SFW, reduce_to_owner_bf16")]
    figure, axes = plt.subplots(1, len(networks), figsize=(4.2 * len(networks), 3.6), sharey=True, squeeze=False)
    for axis, network in zip(axes[0], networks, strict=True):
        for engine in shown:
            own = [r for r in rows if r["network"] == network and r["engine"] == engine]
            style = "--" if engine.endswith("SGD") else "-"
            axis.plot([r["ranks"] for r in own], [100 * r["efficiency"] for r in own], style, label=engine)
        axis.set_xscale("log", base=2)
        axis.set_xticks([1, 8, 64, 512, 4096], ["1", "8", "64", "512", "4096"])
        axis.set_title(WORKLOADS[network].name, fontsize=9)
        axis.set_xlabel("ranks")
        axis.set_ylim(0, 105)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("efficiency, %, nothing overlapped")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=4, fontsize=8, frameon=False)
    figure.suptitle(f"On paper: {CLUSTERS[cluster].name}", fontsize=10)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def measure_all() -> list[dict[str, Any]]:
    """Measure all points again."""
    from benchmarks.hosts.network import FailedRanksError
    from benchmarks.scaling.measure import measure_point, show

    points = []
    for point, rounds in _MEASURED_AT:
        try:
            points.append(measure_point(point, rounds, list(POINTS)))
        except FailedRanksError as error:
            raise UserError(str(error)) from None
        show(points[-1])
    return points


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure the points again (root, iproute2)")
    parser.add_argument("--measured", type=Path, default=MEASURED, help="file of measured points")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="NAME",
                        help=f"of {', '.join(WORKLOADS)} (default: all)")  # fmt: skip
    parser.add_argument("--networks", nargs="+", choices=CLUSTERS, default=["h100-400", "h100-3200"], metavar="NAME",
                        help=f"of {', '.join(CLUSTERS)} (default: h100-400 h100-3200)")  # fmt: skip
    parser.add_argument("--ranks", nargs="+", type=int, default=RANKS, help="multiples of 8, or fewer (default: "
                        f"{' '.join(map(str, RANKS))})")  # fmt: skip
    parser.add_argument("--parameter-bytes", type=int, choices=(2, 4), default=4,
                        help="of a parameter that FSDP and ZeRO gather, 2: bf16 (default: 4)")  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder to write to")
    arguments = parser.parse_args(argv)
    if any(ranks < 1 or (ranks > 8 and ranks % 8) for ranks in arguments.ranks):
        raise UserError(f"--ranks {arguments.ranks}: nodes hold 8, so take 1 to 8 or a multiple of 8")

    points = measure_all() if arguments.measure else json.loads(arguments.measured.read_text())
    constants = calibrate(quiet(points))
    filed = [json.loads(path.read_text()) for path in HOSTS]
    checked = [*check(quiet(points), constants), *check_hosts(filed, constants)]
    wire = arguments.parameter_bytes
    rows = steps(arguments.workloads, arguments.networks, arguments.ranks, wire)
    crossing = {f"{w}, {n}": crossovers(w, n, wire=wire) for w in arguments.workloads for n in arguments.networks}
    report = [*show_calibration(constants), "", *show_check(checked), *show_steps(rows), *show_crossovers(crossing)]
    print("\n".join(report))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        if arguments.measure:
            write_json(arguments.out / "measured.json", points)
        shown = check_markdown(checked, "step", "whole steps")
        shown += ["", *check_markdown(checked, "communication", "communication alone")]
        (arguments.out / "model.txt").write_text("\n".join(report) + "\n")
        (arguments.out / "tables.md").write_text("\n".join([*shown, *markdown(rows)]) + "\n")
        write_json(
            arguments.out / "model.json",
            {
                "constants": asdict(constants),
                "check": [{**asdict(row), "error": row.error} for row in checked],
                "steps": rows,
                "crossovers": crossing,
            },
        )
        draw(arguments.out / "efficiency.png", arguments.workloads, arguments.networks[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
