"""The paper model of a step: its formulas, and its bytes against those that the library's own code makes."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmarks.scaling.model as scaling_model
from benchmarks.balance import gathered_bytes, items_of, transformer_7b
from benchmarks.scaling.alpha_beta import Cluster, Device, Group, Link, all_gather, all_reduce, reduce_scatter
from benchmarks.scaling.model import CLUSTERS, SMALL, Calibration, calibrate, check, crossovers
from benchmarks.scaling.steps import (
    ENGINES,
    WORKLOADS,
    Workload,
    by_rows,
    end_to_end,
    owners,
    resnet18,
    resnet50,
    selection_messages,
    slot_bytes,
    support,
    vgg16,
    vit_l_16,
)
from sfw_dist import KSparsePolytope
from sfw_dist.models import build_model
from sfw_dist.ops.partition import Partition
from sfw_dist.ops.sharded_sum import ShardedSums
from sfw_dist.ops.topk.sharded import select_sharded
from sfw_dist.optim.vertex_codec import VertexCodec

ROOT = Path(__file__).parents[2]
DEVICE = Device(flops=1e12, bandwidth=1e11, answer_bytes=32, divided_bytes=140)
FAST, SLOW = Link(1e-6, 1e-11), Link(1e-5, 1e-9)
NODES = Cluster("nodes of 8", 8, FAST, SLOW, DEVICE)
HOSTS = Cluster("hosts", 1, SLOW, SLOW, DEVICE, backend="gloo")
SMALL_WORK = Workload("small", ((64, 3, 3, 3), (64,), (2000, 640), (2000,)), 1e9, 8, 1, 64)
CONSTANTS = Calibration(4e-4, 7e-10, 1.5, 5e10, 8e9, 14.0, 90.0, 0.4)


def test_an_all_reduce_between_two_sends_each_byte_once() -> None:
    """2·(W−1)/W is 1 for W = 2: a model that forgets one of the ring's halves, or W − 1, sends 0.5 or 2."""
    assert all_reduce(HOSTS, HOSTS.group(2), 1000).sent == 1000
    assert all_gather(HOSTS, HOSTS.group(2), 1000).sent == 500


def test_a_ring_costs_its_hops_and_its_bytes() -> None:
    """Three hops and three quarters of the bytes on four hosts; a wrong number of hops is seen nowhere else."""
    cost = all_gather(HOSTS, HOSTS.group(4), 8e6)
    assert cost.seconds == pytest.approx(3 * 1e-5 + 6e6 * 1e-9)


def test_small_all_reduces_take_the_tree() -> None:
    """A ring's latency grows with W: histograms at 4,096 ranks would seem to take a hundred times as long."""
    few, many = (all_reduce(NODES, NODES.group(ranks), 8).seconds for ranks in (64, 4096))
    assert many < 3 * few
    assert all_gather(NODES, NODES.group(4096), 8).seconds > 30 * all_gather(NODES, NODES.group(64), 8).seconds


def test_inside_a_node_only_its_own_links_count() -> None:
    """HSDP's shard groups lie in a node; billed by the network they would never pay."""
    slower = replace(NODES, between=Link(1.0, 1.0))
    assert all_gather(slower, slower.group(8), 1e9) == all_gather(NODES, NODES.group(8), 1e9)


def test_groups_that_share_a_nodes_links_wait_for_each_other() -> None:
    """Eight groups of HSDP's copies send an eighth each: together as long as one group with all of it."""
    alone = all_reduce(NODES, Group(1, 16), 8e9)
    together = all_reduce(NODES, Group(1, 16, sharing=8), 1e9)
    assert together.seconds == pytest.approx(alone.seconds, rel=1e-3)


def test_what_gloo_sends_for_a_reduce_scatter_is_what_it_sends_for_an_all_reduce() -> None:
    """As measured; with NCCL's formula FSDP on gloo would send a quarter less than its counters say."""
    assert reduce_scatter(HOSTS, HOSTS.group(4), 1e6).sent == all_reduce(HOSTS, HOSTS.group(4), 1e6).sent
    assert reduce_scatter(NODES, NODES.group(16), 1e6).sent == all_gather(NODES, NODES.group(16), 1e6).sent


@pytest.mark.parametrize("engine", ENGINES)
def test_one_rank_sends_nothing(engine: str) -> None:
    """Messages to oneself would make every efficiency wrong, for it is measured from one rank."""
    step = ENGINES[engine](SMALL_WORK, NODES, 1)
    assert step.sent == 0
    assert step.seconds() == step.seconds("compute", "optimizer")


@pytest.mark.parametrize("n", [1, 7, 64, 100, 999, 8192, 100_001, 2_359_296])
def test_vertices_take_the_bytes_of_the_wire_format(n: int) -> None:
    """The wire's slots changed, or the model rounds where the wire does not."""
    for k in {min(k, n) for k in (1, 3, n // 100, support(n), n)}:
        assert slot_bytes(n, k) == VertexCodec(n, k, torch.float32, 1.0).nbytes


@pytest.mark.parametrize("ranks", [2, 4, 16, 64])
def test_gathered_vertices_are_those_of_the_plan(ranks: int) -> None:
    """The plan divides tensors and pads segments: n/8 + K/8 alone is half of it at 64 ranks."""
    spec = KSparsePolytope(k_frac=0.05, k_min=10, radius=1.0)
    items = items_of(resnet18(), spec, 65_536)
    plan, gathered = owners(SMALL["resnet18"].sizes, ranks)
    assert gathered == gathered_bytes(items, plan, spec, ranks)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 300])
def test_rows_are_divided_as_torch_chunks_them(ranks: int) -> None:
    """FSDP2 gives ⌈d/W⌉ rows to a rank, and none to the last: equal shares would be others."""
    shapes = ((10,), (64, 3), (7, 2, 2), (256, 5))
    division = by_rows(shapes, ranks)
    for shape, edges in zip(shapes, division.edges, strict=True):
        chunks = torch.empty(shape).chunk(ranks)
        assert [chunk.numel() for chunk in chunks] == [b - a for a, b in itertools.pairwise(edges)]
    assert division.fullest == sum(torch.empty(shape).chunk(ranks)[0].numel() for shape in shapes)


@pytest.mark.parametrize("ranks", [1, 2, 5, 16])
def test_zero_cuts_where_partitions_end(ranks: int) -> None:
    """An edge too many or too few, at a partition that ends with a tensor, say, is a tensor more in every message."""
    sizes = (5, 11, 16, 1, 30, 17)
    division = end_to_end(sizes, ranks)
    begins = [0, *itertools.accumulate(sizes)]
    partition = math.ceil(sum(sizes) / ranks)
    inner = [begin + edge for begin, edges in zip(begins, division.edges, strict=False) for edge in edges[1:-1]]
    assert inner == [cut for cut in range(partition, sum(sizes), partition) if cut not in begins]


def messages_of_the_library(edges: tuple[tuple[int, ...], ...]) -> list[int]:
    """Bytes that rank 0 sends in a selection, and for its sums."""
    parts = [tuple((a, b - a) for a, b in itertools.pairwise(e)) for e in edges]
    partitions = [Partition(e[-1], part, 0, True) for e, part in zip(edges, parts, strict=True)]
    divided = [partition for partition in partitions if len(partition.parts) > 1]
    entries = [torch.randn(partition.parts[0][1]) for partition in divided]
    task = select_sharded([support(p.numel) for p in divided], divided, entries, torch.float32, torch.device("cpu"))
    message, sent = next(task), []
    try:
        while True:
            sent.append(message.nbytes)
            message = task.send(message)
    except StopIteration:
        pass
    sums = ShardedSums(partitions, torch.device("cpu"))
    return [*sent, sums.message(4, [None] * len(partitions)).nbytes]


@pytest.mark.parametrize("ranks", [2, 4, 7])
def test_selections_send_what_the_library_sends(ranks: int) -> None:
    """The bits a message looks at, the type of counts, or which sums go with them: any of it changed."""
    for division in (by_rows(SMALL_WORK.shapes, ranks), end_to_end(SMALL_WORK.sizes, ranks)):
        assert selection_messages(division) == messages_of_the_library(division.edges)


def test_networks_have_the_shapes_of_the_models() -> None:
    """A layer forgotten shifts every byte; classes are ImageNet's for the large ones."""
    for name, shapes in (("resnet18", resnet18()), ("vgg16", vgg16())):
        with torch.device("meta"):
            model = build_model(name, num_classes=10)
        assert [tuple(p.shape) for p in model.parameters()] == shapes
    counts = [sum(math.prod(shape) for shape in shapes) for shapes in (resnet50(), vit_l_16())]
    assert counts == [25_557_032, 304_326_632]  # as torchvision documents them
    assert WORKLOADS["7B"].shapes == tuple(transformer_7b())


def test_bytes_are_those_that_interfaces_counted() -> None:
    """Four hosts, ResNet-18, counters of the interfaces: a phase that the model leaves out shows here."""
    filed = json.loads((ROOT / "results/step_2-core-cpu_2026-11-25/hosts.json").read_text())["contenders"]
    titles = {row["title"]: row["sent"]["median"] for row in filed.values()}
    for engine, counted in titles.items():
        model = ENGINES[engine](SMALL["resnet18"], CONSTANTS.cluster(1.0), 4).sent
        assert model == pytest.approx(counted, rel=0.01), engine


@pytest.mark.parametrize("engine", ENGINES)
def test_a_faster_network_is_never_slower(engine: str) -> None:
    """A rate where a latency belongs, or the reciprocal of one, turns this round."""
    for ranks in (2, 16, 256):
        slow, fast = (ENGINES[engine](SMALL_WORK, CLUSTERS[name], ranks) for name in ("h100-100", "h100-3200"))
        assert fast.seconds() <= slow.seconds()
        assert fast.sent == slow.sent


def test_owners_halve_gradients_and_bf16_halves_them_again() -> None:
    """The wire's type counted twice, or the norms of a bucket as if they were gradients."""
    work, cluster = WORKLOADS["ViT-L/16"], CLUSTERS["h100-400"]
    whole, half, quarter = (
        ENGINES[f"DDP + SFW, {grads}"](work, cluster, 64).costs["gradients"].sent
        for grads in ("all_reduce", "reduce_to_owner", "reduce_to_owner_bf16")
    )
    assert half == pytest.approx(whole / 2, rel=1e-3)
    assert quarter == pytest.approx(whole / 4, rel=2e-3)


def test_hsdp_selects_inside_a_node() -> None:
    """Its selection must not grow with the number of nodes: that is what it is for."""
    work, cluster = WORKLOADS["ResNet-50"], CLUSTERS["h100-400"]
    few, many = (ENGINES["HSDP 8 + SFW"](work, cluster, ranks) for ranks in (16, 4096))
    assert few.costs["selection"] == many.costs["selection"]
    assert few.memory == many.memory
    assert few.costs["gradients"].seconds < many.costs["gradients"].seconds


def test_shards_shrink_with_the_ranks() -> None:
    """Memory of a rank; but for what is gathered and what a selection hears, FSDP's is that of its shard."""
    work, cluster = WORKLOADS["7B"], CLUSTERS["h100-400"]
    memory = [ENGINES["FSDP2 + SGD"](work, cluster, ranks).memory for ranks in (2, 8, 64, 512)]
    assert memory == sorted(memory, reverse=True)
    assert ENGINES["FSDP2 + SFW"](work, cluster, 8).memory < ENGINES["DDP + SFW, all_reduce"](work, cluster, 8).memory


def made_up(constants: Calibration) -> list[dict[str, Any]]:
    """Points as scaling_points.py files them, of a network that is just as the model says."""
    points: list[dict[str, Any]] = []
    for hosts, gbit in itertools.product((2, 3, 4), (1.0, 2.0)):
        cluster = constants.cluster(gbit)
        group = cluster.group(hosts)
        common = {"hosts": hosts, "gbit": gbit}
        seconds = {
            name: {str(size): [collective(cluster, group, size).seconds] for size in (1024, 2**26)}
            for name, collective in scaling_model.COLLECTIVES.items()
        }
        points.append(common | {"model": "messages", "batch": 0, "seconds": seconds})
        samples = {}
        for name, engine in scaling_model.POINTS.items():
            step = ENGINES[engine](SMALL["resnet18"], cluster, hosts)
            exchanged = step.seconds("selection", "vertices")
            samples[name] = {
                "whole": [scaling_model.whole_step(step, engine, constants)],
                "local": [step.seconds("compute")],
                "step": [step.seconds("optimizer") + exchanged],
                "messages": [exchanged],
                "sent_pass": [step.sent],
                "sent_step": [0.0],
                "foreign": [0.0],
            }
        points.append(common | {"model": "resnet18", "batch": 4, "samples": samples})
    return points


def test_calibration_finds_the_constants_of_a_network_that_has_them() -> None:
    """From points that the model made, the model: a constant fitted on what another one explains would move."""
    points = made_up(CONSTANTS)
    found = calibrate(points)
    for name, value in vars(CONSTANTS).items():
        assert getattr(found, name) == pytest.approx(value, rel=0.03), name
    assert all(abs(row.error) < 0.03 for row in check(points, found))


def test_the_check_leaves_out_what_was_fitted() -> None:
    """An error of 0 where a constant was fitted says nothing."""
    points = made_up(CONSTANTS)
    checked = {(row.point, row.what) for row in check(points, CONSTANTS)}
    assert not any(point == "2 hosts, 1 Gbit/s, ResNet-18" for point, _ in checked)
    assert ("2 hosts, 1 Gbit/s", "all_gather_into_tensor of 64 MiB") not in checked
    assert ("3 hosts, 1 Gbit/s", "all_gather_into_tensor of 64 MiB") in checked
    assert ("4 hosts, 2 Gbit/s, ResNet-18", "DDP + SGD") in checked


def test_a_crossover_is_where_something_holds_for_good() -> None:
    """On slow links vertices beat gathered parameters from the first two ranks on, and for ever."""
    found = crossovers("ResNet-50", "h100-100", most=64)
    assert found["ZeRO-2's parameters and selection take longer than DDP's vertices and selection"] == 2
    assert found["reduce_to_owner takes longer than all_reduce, DDP's buckets of 25 MiB"] is None
