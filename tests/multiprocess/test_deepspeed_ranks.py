"""SFW under DeepSpeed, on real processes, against one process without it that was given the same gradients.

The gradients are chosen: multiples of 3 of few bits, so that DeepSpeed's division by 2, 3 or 4 ranks, by two
micro-batches, and its sums are exact in float32 and in bfloat16, and nothing but the optimizer's own steps can differ.
Its optimizer for bf16 with float32 sums alone multiplies by 1/3, which rounds; so does then the process without it.
"""

from __future__ import annotations

import copy
import functools
import gc
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sfw_dist.constraints import KSparsePolytope, KSupportBall, LpBall, Unconstrained
from sfw_dist.distributed.world import World as Ranks
from sfw_dist.errors import UserError
from sfw_dist.models import build_model
from sfw_dist.optim.sfw import SFW
from sfw_dist.train.strategies import Strategy
from sfw_dist.train.strategies.ddp import DDPStrategy
from tests.support.ranks import error_of, run_on_ranks
from tests.support.training import small_config

STEPS, HALF = 50, 25

# Odd sizes; tensors smaller than the number of ranks; one that no partition holds whole; a frozen one amid the others.
SHAPES: dict[str, tuple[int, ...]] = {
    "large": (97, 31),
    "one": (1,),
    "frozen": (5, 5),
    "filters": (8, 3, 3, 3),
    "three": (3,),
    "support": (23, 9),
    "ball": (11, 7),
    "free": (17,),
    "also_free": (2,),
}
SETS = {
    "large": KSparsePolytope(k_frac=0.05, k_min=10, radius=0.3),
    "one": KSparsePolytope(k=1, radius=0.5),
    "frozen": KSparsePolytope(k=3, radius=9.0),
    "filters": KSparsePolytope(k=11, radius=0.4),
    "three": KSparsePolytope(k=2, radius=0.5),
    "support": KSupportBall(k=9, radius=2.0),
    "ball": LpBall(p=2, radius=1.5),
    "free": Unconstrained(),
    "also_free": Unconstrained(),
}

BF16 = {"bf16": {"enabled": True}}
FLOAT32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **more}, "train_micro_batch_size_per_gpu": 1}


CASES: dict[str, dict[str, Any]] = {
    "stage_0": zero(0),
    "stage_1": zero(1),
    "stage_2": zero(2),
    "stage_1_bf16": zero(1) | BF16,
    "stage_1_bf16_float32_sums": zero(1) | BF16 | FLOAT32_SUMS,
    "stage_2_bf16": zero(2) | BF16,
    "stage_2_accumulated": zero(2) | {"gradient_accumulation_steps": 2},
    "stage_1_bf16_float32_sums_accumulated": zero(1) | BF16 | FLOAT32_SUMS | {"gradient_accumulation_steps": 2},
    "stage_2_round_robin_aligned": zero(2, round_robin_gradients=True, parameter_alignment=True),
    "stage_2_overlapped_buckets": zero(2, overlap_comm=True, reduce_bucket_size=1000, allgather_bucket_size=1000),
    "stage_1_autocast": zero(1) | {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
}
# Of the runs' engine: options of the optimizer or the training, then ZeRO's stage.
ENGINES: dict[str, dict[str, Any]] = {
    "stage_0": {"precision": "bf16"},
    "stage_1": {},
    "bf16_stage_1": {"precision": "bf16"},
    "accumulated_stage_2": {"accumulate": 2, "precision": "bf16"},
    "sgd_stage_2": {"name": "sgd"},
}
# What two and four ranks do of the cases.
FEWER = ["stage_0", "stage_1", "stage_1_bf16_float32_sums", "stage_2_round_robin_aligned"]
# And of them with DeepSpeed's own checkpoints.
OWN = ["stage_1_bf16_float32_sums", "stage_2_round_robin_aligned"]
WORLD_SIZES = (2, 3, 4)


def cases_of(world_size: int) -> list[str]:
    return list(CASES) if world_size == 3 else FEWER


class Chosen(nn.Module):
    """A network whose gradients are :func:`gradient`; with a buffer."""

    def __init__(self, rank: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator) + rank))
        self.frozen.requires_grad_(False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, step: int) -> Tensor:
        """A sum over parameters, of which each has the chosen gradient."""
        self.seen += 1
        return sum((p * gradient(name, step).to(p.dtype)).sum() for name, p in self.named_parameters())  # type: ignore[return-value]


def gradient(name: str, step: int) -> Tensor:
    """The step's; many magnitudes are equal, so that ties reach over partitions."""
    generator = torch.Generator().manual_seed(1000 * step + list(SHAPES).index(name))
    return 3 * torch.randint(-42, 43, SHAPES[name], generator=generator).float() / 64


def build_optimizer(net: Chosen, momentum: float = 0.9) -> SFW:
    """A group a tensor, as ``constrain`` makes them."""
    groups = [
        {"params": [(name, p)], "constraint": SETS[name], **({"lr": 0.01} if name.endswith("free") else {})}
        for name, p in net.named_parameters()
    ]
    return SFW(groups, lr=0.05, momentum=momentum, weight_decay=0.125)


Whole = dict[str, Tensor]


def one_process(rounded: bool, steps: int, thirds: int = 0) -> Whole:
    """What ``gather_tensors`` must return, of a process that knows nothing of DeepSpeed."""
    return run_of_one_process(rounded, steps, thirds)[0]


@functools.cache
def run_of_one_process(rounded: bool, steps: int, thirds: int) -> tuple[Whole, dict[str, tuple[float, ...]]]:
    """That, and the last step's statistics.

    ``rounded``: to bf16 at the start. ``thirds``: how many steps take a third of three times the gradient.
    """
    net = Chosen()
    optimizer = build_optimizer(net)
    if rounded:  # DeepSpeed makes its float32 weights from the bf16 ones
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(p.bfloat16())
        optimizer = build_optimizer(net)
    return stepped(net, optimizer, range(steps), rounded, thirds), statistics(optimizer)


def statistics(optimizer: SFW) -> dict[str, tuple[float, ...]]:
    return {name: tuple(numbers) for name, numbers in optimizer.statistics().items()}


def stepped(net: Chosen, optimizer: SFW, steps: range, rounded: bool = False, thirds: int = 0) -> Whole:
    for step in steps:
        for name, p in net.named_parameters():
            g = gradient(name, step)
            p.grad = None if not p.requires_grad else g if step >= thirds else (3 * g).mul_(1 / 3)
        optimizer.step()
    tensors = {f"model.{name}": p.detach().clone() for name, p in net.named_parameters()}
    if rounded:
        tensors["model.frozen"] = tensors["model.frozen"].bfloat16()
    state = optimizer.state_dict()
    names = [name for group in state["param_groups"] for name in group["param_names"]]
    for index, entries in state["state"].items():
        if names[index] != "frozen":
            tensors |= {f"optimizer.{key}.{names[index]}": value for key, value in entries.items()}
    return tensors


# ------------------------------------------------------------------------------------------- run by every rank


def on_every_rank(rank: int, folder: str) -> dict[int, dict[str, Any]]:
    """All that is asked of each world size, in worlds of four processes' making: each takes 10 s to start DeepSpeed."""

    results = {}
    dist.destroy_process_group()
    for world_size in (3, 2, 4):
        if rank < world_size:
            join_world(rank, world_size, folder)
            results[world_size] = in_a_world(rank, world_size, folder)
    return results


def join_world(rank: int, world_size: int, folder: str) -> None:
    import deepspeed

    if dist.is_initialized():
        deepspeed.comm.destroy_process_group()  # torch's, and what DeepSpeed keeps of it
    rendezvous = f"file://{folder}/world_of_{world_size}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)


def in_a_world(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """What a world size is asked to do; the others resume what three ranks saved halfway."""
    cases = {case: trajectory(case, rank) for case in cases_of(world_size)}
    saved = Path(folder, "halfway.pt")
    if world_size != 3:
        halfway = torch.load(saved, weights_only=True)
        return {
            "cases": cases,
            "resumed": {case: resumed(case, halfway[case]) for case in cases},
            "across": resumed("stage_2", halfway["stage_0"]),
            "back": resumed("stage_0", halfway["stage_1"]),
            "engines": {case: engines(case, rank) for case in ENGINES} if world_size == 2 else {},
            "its_own": {case: from_its_own_checkpoint(case, folder) for case in OWN} if world_size == 2 else {},
        }
    if rank == 0:
        torch.save({case: of["halfway"] for case, of in cases.items()}, saved)
    return {
        "cases": cases,
        "by_hand": by_hand(rank),
        "start": start(rank),
        "tampered": tampered(rank),
        "refused": refused_by_adopt(),
        "refused_tensors": refused_tensors(),
        "not_finite": not_finite(rank),
        "refused_engines": refused_engines(rank),
    }


def start_engine(case: str, net: nn.Module, optimizer: SFW) -> Any:
    from sfw_dist.optim.deepspeed import initialize

    # In bf16 it collects garbage six times, which takes seconds among all that it and torch have imported.
    gc.freeze()
    return initialize(net, optimizer, CASES[case])


def gathered(engine: Any) -> Whole:
    from sfw_dist.optim.deepspeed import gather_tensors

    return gather_tensors(engine)


def train(engine: Any, steps: range) -> None:
    for step in steps:
        for _ in range(engine.gradient_accumulation_steps()):
            engine.backward(engine(step))
            engine.step()


def trajectory(case: str, rank: int) -> dict[str, Any]:
    net = Chosen(rank)
    engine = start_engine(case, net, build_optimizer(net))
    train(engine, range(HALF))
    halfway = gathered(engine)
    train(engine, range(HALF, STEPS))
    held = [state["momentum_buffer"] for state in engine.basic_optimizer.state.values() if "momentum_buffer" in state]
    return {
        "halfway": halfway,
        "end": gathered(engine),
        "model": {name: p.detach().clone() for name, p in net.named_parameters()},
        "momentum_entries": sum(m.numel() for m in held),
        "statistics": statistics(engine.basic_optimizer),
    }


def resumed(case: str, halfway: Whole) -> Whole:
    """The second half, from what another number of ranks saved; the start that it replaces is another one."""
    from sfw_dist.optim.deepspeed import load_tensors

    net = Chosen(rank=5)
    engine = start_engine(case, net, build_optimizer(net))
    load_tensors(engine, halfway)
    train(engine, range(HALF, STEPS))
    return gathered(engine)


def from_its_own_checkpoint(case: str, folder: str) -> Whole:
    """The second half, from DeepSpeed's own checkpoint of the first."""
    net = Chosen()
    engine = start_engine(case, net, build_optimizer(net))
    train(engine, range(HALF))
    engine.save_checkpoint(f"{folder}/{case}")
    net = Chosen(rank=5)
    engine = start_engine(case, net, build_optimizer(net))
    engine.load_checkpoint(f"{folder}/{case}")
    train(engine, range(HALF, STEPS))
    return gathered(engine)


def by_hand(rank: int) -> Whole:
    """DeepSpeed started by the user, with and without groups joined; then ``adopt``."""
    import deepspeed

    from sfw_dist.optim.deepspeed import adopt

    net = Chosen(rank)
    net.frozen.requires_grad_(True)  # a group of frozen parameters alone is one that DeepSpeed itself fails on
    config = zero(1) | {"zero_allow_untested_optimizer": True, "gradient_clipping": 0.0}
    engine = deepspeed.initialize(model=net, optimizer=build_optimizer(net), config=config)[0]
    adopt(engine)
    train(engine, range(3))
    return gathered(engine)


def start(rank: int) -> dict[str, Any]:
    """Before the first step: the weights in float32, and how far outside of its set each is."""
    net = Chosen(rank)
    tensors = gathered(start_engine("stage_1_bf16", net, build_optimizer(net)))
    gauges = {name: SETS[name].gauge(tensors[f"model.{name}"]).item() for name in SHAPES if name != "frozen"}
    model = {name: p.detach().clone() for name, p in net.named_parameters()}
    return {"gauges": gauges, "tensors": tensors, "model": model}


def tampered(rank: int) -> str:
    """One rank's partition no longer holds what the model does."""
    from sfw_dist.optim.deepspeed import adopt

    net = Chosen(rank)
    engine = start_engine("stage_2", net, build_optimizer(net))
    if rank == 1:
        engine.optimizer.single_partition_of_fp32_groups[0].data[4] += 1
    return error_of(RuntimeError, adopt, engine)


def refused_by_adopt() -> list[str]:
    """What the user's own ``deepspeed.initialize`` may have got wrong."""
    import deepspeed

    from sfw_dist.optim.deepspeed import adopt

    messages = []
    for build in (lambda net: torch.optim.SGD(net.parameters()), build_optimizer):
        net = Chosen()
        engine = deepspeed.initialize(model=net, optimizer=build(net), config=zero(0))[0]
        messages.append(error_of(ValueError, adopt, engine))
    net = Chosen().double()
    return [*messages, error_of(ValueError, start_engine, "stage_1", net, build_optimizer(net))]


def refused_tensors() -> list[str]:
    """Those of another model; training goes on."""
    from sfw_dist.optim.deepspeed import load_tensors

    net = Chosen()
    engine = start_engine("stage_1", net, build_optimizer(net))
    before = gathered(engine)
    messages = [
        error_of(ValueError, load_tensors, engine, before | {"model.large": torch.zeros(31, 97)}),
        error_of(ValueError, load_tensors, engine, {k: v for k, v in before.items() if k != "model.ball"}),
    ]
    after = gathered(engine)
    assert all(torch.equal(before[name], after[name]) for name in before)
    train(engine, range(1))
    return messages


def not_finite(rank: int) -> dict[str, Whole]:
    """A gradient that is not finite, on one rank: before and after its step."""
    net = Chosen()
    engine = start_engine("stage_2", net, build_optimizer(net))
    before = gathered(engine)
    loss = engine(0)
    engine.backward(loss * math.nan if rank == 1 else loss)
    engine.step()
    return {"before": before, "after": gathered(engine)}


def build_strategies(case: str, rank: int, stage: int | None = None) -> tuple[Strategy, Strategy]:
    """That of the runs, for DeepSpeed and for DDP, with the same network."""
    from sfw_dist.train.strategies.deepspeed import DeepSpeedStrategy

    config = small_config(Path("runs"), Path("data"))
    config.optimizer.unconstrained = "norm_and_bias"
    for key, value in ENGINES[case].items():
        setattr(config.optimizer if key == "name" else config.train, key, value)
    config.deepspeed.stage = int(case[-1]) if stage is None else stage  # type: ignore[assignment]
    world = Ranks(rank, dist.get_world_size(), rank, torch.device("cpu"))
    networks = []
    for _ in range(2):
        torch.manual_seed(0)
        networks.append(build_model("cnn", num_classes=10, in_channels=1, width=0.0625))
    return DeepSpeedStrategy(networks[0], config, world), DDPStrategy(networks[1], config, world)


def engines(case: str, rank: int) -> dict[str, list[Any]]:
    """Both for two steps; then each goes on from what the other left."""
    found: dict[str, list[Any]] = {"losses": [], "logits": [], "tensors": [], "options": []}
    images, labels = torch.randn(2, 8, 1, 8, 8), torch.arange(8).expand(2, 8)
    for half in range(2):
        both = build_strategies(case, rank)
        if half == 1:
            for engine, tensors, options in zip(both, found["tensors"][::-1], found["options"][::-1], strict=True):
                engine.load(copy.deepcopy(tensors), options, "the other's")  # SGD goes on in them
        for engine in both:
            engine.warm_up((1, 8, 8))
            found["losses"].append([engine.train_step(images[step], labels[step]).item() for step in range(2)])
            engine.verify_replicas()
            engine.before_evaluation()
            found["logits"].append(engine.forward(images[0]).float())
            found["tensors"].append({name: t.detach().clone() for name, t in engine.tensors().items()})
            found["options"].append(engine.options())
            assert engine.weights().keys() == engine.model.state_dict().keys()
    return found


def refused_engines(rank: int) -> list[str]:
    engine, _ = build_strategies("stage_1", rank)
    other = [group | {"constraint": {"kind": "unconstrained"}} for group in engine.options()]
    return [
        error_of(UserError, build_strategies, "stage_1", rank, 3),
        error_of(UserError, engine.load, engine.tensors(), other, "that"),
        error_of(UserError, engine.train_step, torch.full((8, 1, 8, 8), torch.inf), torch.arange(8)),
    ]


# -------------------------------------------------------------------------------------------------- the tests


World = Callable[[int], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """What :func:`in_a_world` returned on each rank of a world size."""

    @functools.cache  # a failure, too: without it every test would wait for the same one
    def outcome() -> list[dict[int, dict[str, Any]]] | Exception:
        try:
            return run_on_ranks(on_every_rank, 4, str(tmp_path_factory.mktemp("ranks")))
        except Exception as error:
            return error

    def results(world_size: int) -> list[dict[str, Any]]:
        ended = outcome()
        if isinstance(ended, Exception):
            raise ended
        return [rank[world_size] for rank in ended[:world_size]]

    return results


each_case = pytest.mark.parametrize(("world_size", "case"), [(w, case) for w in WORLD_SIZES for case in cases_of(w)])
each_resumed = pytest.mark.parametrize(("world_size", "case"), [(w, case) for w in (2, 4) for case in cases_of(w)])


def assert_bitwise(actual: Whole, expected: Whole) -> None:
    """Names, types and bit patterns, which tell −0 from 0."""
    mine, theirs = ({k: v for k, v in t.items() if k != "model.seen"} for t in (actual, expected))
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        other = theirs[name]
        assert (value.dtype, value.shape) == (other.dtype, other.shape), name
        same = torch.equal(value.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
        assert same, f"{name} differs by up to {(value - other).abs().max()}"


def expected(case: str, steps: int = STEPS, thirds: int = 0) -> Whole:
    """Of one process, of which the first ``thirds`` steps are those of three ranks."""
    return copy.copy(one_process("bf16" in case, steps, min(thirds, steps) if "float32_sums" in case else 0))


def assert_same(actual: Whole, expected: Whole) -> None:
    """Momentum to the bit, weights up to the last bits of step sizes: ZeRO's partitions begin anywhere in a tensor."""
    weights = [name for name in expected if name.startswith("model.")]
    assert_bitwise(*({name: x for name, x in whole.items() if name not in weights} for whole in (actual, expected)))
    for name in weights:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-6, atol=1e-7)


@each_case
def test_fifty_steps_are_those_of_one_process(world: World, world_size: int, case: str) -> None:
    """A tensor cut at the wrong place, or a K-th magnitude found on one rank alone, gives another network."""
    thirds = STEPS if world_size == 3 else 0
    for rank in world(world_size):
        assert_same(rank["cases"][case]["halfway"], expected(case, HALF, thirds))
        assert_same(rank["cases"][case]["end"], expected(case, STEPS, thirds))


@each_case
def test_the_model_holds_what_was_trained(world: World, world_size: int, case: str) -> None:
    """The float32 weights on their ranks are of no use until the model that is called has them."""
    end = expected(case, STEPS, STEPS if world_size == 3 else 0)
    for rank in world(world_size):
        for name, p in rank["cases"][case]["model"].items():
            assert torch.equal(p, end[f"model.{name}"].to(p.dtype)), name


@each_case
def test_statistics_are_those_of_one_process(world: World, world_size: int, case: str) -> None:
    """ZeRO steps group by group: those of the last group alone would be logged."""
    thirds = STEPS if world_size == 3 and "float32_sums" in case else 0
    _, expected_statistics = run_of_one_process("bf16" in case, STEPS, thirds)
    for rank in world(world_size):
        found = rank["cases"][case]["statistics"]
        assert found.keys() == expected_statistics.keys()
        for name, numbers in expected_statistics.items():
            assert found[name] == pytest.approx(numbers, rel=1e-6)


def test_the_trajectories_are_worth_comparing() -> None:
    """Weights that never moved, or stand on a vertex, would be equal for no reason."""
    begun, ended = one_process(False, 0), one_process(False, STEPS)
    for name in SHAPES:
        moved = not torch.equal(begun[f"model.{name}"], ended[f"model.{name}"])
        assert moved == (name != "frozen"), name
    assert ended["model.large"].unique().numel() > 1000
    assert not torch.equal(ended["model.large"], one_process(True, STEPS)["model.large"])


@each_case
def test_momentum_is_kept_once(world: World, world_size: int, case: str) -> None:
    """The memory that ZeRO saves: the whole model's momentum is left from before the division if it is not freed."""
    held = [rank["cases"][case]["momentum_entries"] for rank in world(world_size)]
    whole = sum(math.prod(shape) for name, shape in SHAPES.items() if name != "frozen")
    padding = 64 * len(SHAPES)
    assert whole <= sum(held) <= whole + padding
    assert max(held) < whole


@each_resumed
def test_another_number_of_ranks_continues(world: World, world_size: int, case: str) -> None:
    """Partitions lie elsewhere at another world size, where DeepSpeed's own checkpoints do not load."""
    for rank in world(world_size):
        assert_same(rank["resumed"][case], expected(case, STEPS, thirds=HALF))


@pytest.mark.parametrize("world_size", [2, 4])
def test_another_stage_continues(world: World, world_size: int) -> None:
    """A checkpoint that only its own stage can read ends a run when its memory no longer suffices."""
    for rank in world(world_size):
        assert_same(rank["across"], expected("stage_2"))
        assert_same(rank["back"], expected("stage_0"))


@pytest.mark.parametrize("case", OWN)
def test_its_own_checkpoints_continue_too(world: World, case: str) -> None:
    """Scripts that save with DeepSpeed go on at the same number of ranks; lost momentum would show."""
    for rank in world(2):
        assert_same(rank["its_own"][case], expected(case))


@pytest.mark.parametrize("case", ["stage_1", "stage_2_round_robin_aligned"])
def test_a_process_without_deepspeed_continues(world: World, case: str) -> None:
    """A run on a cluster ends on a laptop."""
    saved = world(3)[2]["cases"][case]["halfway"]
    net = Chosen()
    optimizer = build_optimizer(net)
    net.load_state_dict({name.removeprefix("model."): t for name, t in saved.items() if name.startswith("model.")})
    state = optimizer.state_dict()
    names = [name for group in state["param_groups"] for name in group["param_names"]]
    keys = ("step", "momentum_buffer")
    state["state"] = {
        i: {key: saved[f"optimizer.{key}.{name}"] for key in keys} for i, name in enumerate(names) if name != "frozen"
    }
    optimizer.load_state_dict(state)
    assert_same(stepped(net, optimizer, range(HALF, STEPS)), expected(case))


def test_buffers_are_in_the_checkpoint(world: World) -> None:
    """BatchNorm's statistics are no parameters, and would start anew."""
    assert world(3)[0]["cases"]["stage_2"]["end"]["model.seen"] == STEPS


def test_deepspeed_started_by_hand_is_adopted(world: World) -> None:
    """Scripts that call deepspeed.initialize themselves, with a group a tensor."""
    net = Chosen()
    net.frozen.requires_grad_(True)
    tensors = stepped(net, build_optimizer(net), range(3))
    state = world(3)[0]["by_hand"]
    for name in SHAPES:
        assert torch.equal(state[f"model.{name}"], tensors[f"model.{name}"]), name


def test_training_starts_from_rank_0_and_inside_the_sets(world: World) -> None:
    """Ranks began with other weights, all outside their sets; rounding to bf16 takes some of them out again."""
    for rank in world(3):
        assert_bitwise(rank["start"]["tensors"], one_process(True, 0))
        assert max(rank["start"]["gauges"].values()) <= 1 + 1e-6
        for name, p in rank["start"]["model"].items():
            assert torch.equal(p, rank["start"]["tensors"][f"model.{name}"].bfloat16()), name


def test_a_partition_with_other_values_stops_every_rank(world: World) -> None:
    """If DeepSpeed laid its partitions out in another way, SFW would train a scrambled network."""
    for rank in world(3):
        assert rank["tampered"].startswith("DeepSpeed ")
        assert " has other values of " in rank["tampered"]


def test_what_adopt_refuses(world: World) -> None:
    """Gradients that DeepSpeed clips without being asked make another trajectory, silently."""
    for rank in world(3):
        other, clipped, double = rank["refused"]
        assert other == "the engine's optimizer is SGD: give deepspeed.initialize an SFW"
        assert clipped == 'DeepSpeed clips gradients to norm 1.0 unless told: write "gradient_clipping": 0.0'
        assert double == "large is torch.float64, which ZeRO trains in float32: write model.float()"


def test_tensors_of_another_model_are_refused_whole(world: World) -> None:
    """Half a model loaded is worse than none."""
    for rank in world(3):
        assert rank["refused_tensors"] == [
            "large is (31, 97) among the tensors, (97, 31) here: load the same model's",
            "ball is absent among the tensors, (11, 7) here: load the same model's",
        ]


def test_a_gradient_that_is_not_finite_skips_the_step(world: World) -> None:
    """On all ranks, and momentum too; else they would go apart."""
    for rank in world(3):
        assert_bitwise(rank["not_finite"]["after"], rank["not_finite"]["before"])


@pytest.mark.parametrize("case", ENGINES)
def test_the_engine_of_runs_follows_ddp_to_the_bit_and_takes_its_checkpoints(world: World, case: str) -> None:
    """On two ranks, whose sums have one order. Fails when a loss, a statistic of BatchNorm or an option goes astray."""
    for rank in world(2):
        for values in rank["engines"][case].values():
            mine, theirs = values[::2], values[1::2]
            for a, b in zip(mine, theirs, strict=True):
                if isinstance(a, dict):
                    assert_bitwise(a, b)
                elif isinstance(a, Tensor):
                    assert torch.equal(a, b)
                else:
                    assert a == b


def test_what_the_engine_of_runs_refuses(world: World) -> None:
    """In one line that names the setting, or the checkpoint."""
    for rank in world(3):
        stage, other, infinite = rank["refused_engines"]
        assert stage == "deepspeed.stage 3: write 2, or engine: fsdp, which divides the parameters too"
        assert other.startswith("that is of another optimizer (")
        assert "\n" not in other
        assert infinite == "a gradient is not finite: lower optimizer.lr"


CLIP = {"gradient_clipping": 0.0}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (zero(3) | CLIP, "zero_optimization.stage 3: "),
        (zero(1) | CLIP | {"fp16": {"enabled": True}}, "fp16.enabled true: "),
        (zero(0) | CLIP | BF16, "bf16.enabled true at zero_optimization.stage 0, "),
        (zero(2) | CLIP | {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "bf16.bf16_master_"),
        (zero(2, offload_optimizer={"device": "cpu"}) | CLIP, "zero_optimization.offload_optimizer: "),
        (zero(2, cpu_offload=True) | CLIP, "zero_optimization.offload_optimizer: "),
        (zero(1, zenflow={"topk_ratio": 0.1}) | CLIP, "zero_optimization.zenflow: "),
        (zero(1) | CLIP | {"torch_autocast": {"enabled": True}}, "torch_autocast.dtype None: "),
        (zero(1) | CLIP | {"torch_autocast": {"enabled": True, "dtype": "float16"}}, "torch_autocast.dtype float16: "),
        (zero(1) | CLIP | {"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size: "),
        (zero(2), "DeepSpeed clips gradients to norm 1.0 unless told: "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_that_do_not_go_with_sfw_are_refused(config: dict[str, Any], message: str) -> None:
    """In one line that names the setting, not by wrong weights."""
    from sfw_dist.optim.deepspeed import refuse

    with pytest.raises(ValueError, match="^" + message.replace(".", r"\.")) as error:
        refuse(config)
    assert "\n" not in str(error.value)


def test_settings_that_go_with_sfw_are_not_refused() -> None:
    """The deprecated form of the stage, and parts that are switched off."""
    from sfw_dist.optim.deepspeed import refuse

    refuse({"zero_optimization": True, "fp16": {"enabled": False}, "torch_autocast": {"enabled": False}} | CLIP)
    refuse(zero(2, offload_optimizer={"device": "none"}) | {"gradient_clipping": 1.0})
    refuse({} | CLIP)


def test_a_deepspeed_with_other_fields_is_named() -> None:
    """A newer version that renames what is read must say so, and not fail somewhere inside."""
    from sfw_dist.optim.sharding.zero import groups_of

    class DeepSpeedZeroOptimizer:
        pass

    class Another:
        pass

    for zero_optimizer, lacking in ((DeepSpeedZeroOptimizer(), "has no"), (Another(), "has its ZeRO in a Another")):
        with pytest.raises(RuntimeError, match=rf"^DeepSpeed \d.* {lacking}.*: install deepspeed=="):
            groups_of(SimpleNamespace(optimizer=zero_optimizer))
