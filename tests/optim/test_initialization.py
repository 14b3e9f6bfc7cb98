"""SFW-Init in one process; its numbers against the published ones are in test_golden, several ranks in dist."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sfw_dist import SFW, KSparsePolytope, KSupportBall, LpBall, Unconstrained, constrain, sfw_init
from sfw_dist.constraints import Constraint
from sfw_dist.distributed.rank_group import RankGroup
from sfw_dist.errors import UserError
from sfw_dist.optim.first_step_loss import FirstStep, Start
from sfw_dist.optim.update import Rescale

SETS: dict[str, Constraint] = {
    "k_sparse": KSparsePolytope(k_frac=0.1, tau=15),
    "k_support": KSupportBall(k_frac=0.1, tau=15),
    "l2": LpBall(2, tau=15),
}


def net() -> nn.Sequential:
    """Without BatchNorm."""
    return nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 4))


def normed() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(6, 4)
    )


def half_batches(*shape: int, count: int = 6, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    """A task that can be learned: the class is a linear function's greatest output."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 16, *shape, generator=generator).to(dtype)
    teacher = torch.randn(images[0, 0].numel(), 4, generator=generator).to(dtype)
    return [(x, (x.flatten(1) @ teacher).argmax(1)) for x in images]


def run(model: nn.Module, batches: Any, spec: Constraint = SETS["k_sparse"], **options: Any) -> dict[str, float]:
    groups = constrain(model, spec, norm="initializer")
    return sfw_init(model, F.cross_entropy, batches, groups, **{"steps": 5, **options})


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def joined(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat([one[0], other[0]]), torch.cat([one[1], other[1]])


def loss_after_sfw(model: nn.Module, groups: list[dict[str, Any]], first: Any, then: Any, **options: Any) -> float:
    """Of a copy of the model, after one step of the optimizer itself."""
    model, groups = copy.deepcopy((model, groups))
    optimizer = SFW(groups, **options)
    F.cross_entropy(model(first[0]), first[1]).backward()
    optimizer.step()
    return F.cross_entropy(model(then[0]), then[1]).item()


@pytest.mark.parametrize("rescale", ["gradient", "fast_gradient", "diameter", "none"])
def test_the_loss_is_that_after_a_step_of_sfw(rescale: Rescale) -> None:
    """Fails when another step is differentiated than the optimizer takes, of constrained tensors or of free ones."""
    model = net().double()
    groups: list[dict[str, Any]] = constrain(model, SETS["k_sparse"], unconstrained="norm_and_bias")
    groups[-1] |= {"lr": 0.05, "weight_decay": 0.1}
    a, b, c = half_batches(12, count=3, dtype=torch.float64)
    expected = loss_after_sfw(model, groups, joined(a, b), joined(a, c), lr=0.2, rescale=rescale)
    losses: list[float] = []
    sfw_init(
        model, F.cross_entropy, [a, b, c], groups, lr=0.2, rescale=rescale, steps=1,
        progress=lambda step, loss: losses.append(loss),
    )  # fmt: skip
    assert losses == [pytest.approx(expected, rel=1e-12)]


@pytest.mark.parametrize("rescale", ["gradient", "fast_gradient", "diameter", "none"])
def test_the_derivatives_are_those_of_finite_differences(rescale: Rescale) -> None:
    """Fails when a way on which a scale acts is forgotten: through θ, g, ‖θ − v‖. v jumps, and is constant between."""
    model = net().double()
    sets = [
        LpBall("inf", diameter=3.0),
        KSparsePolytope(k=3, radius=2.0),
        KSparsePolytope(k=9, radius=0.7),
        Unconstrained(),
    ]
    tensors = [
        Start(name, p, p.detach().clone(), c, 0.1, rescale, 0.3)
        for (name, p), c in zip(model.named_parameters(), sets, strict=True)
    ]
    problem = FirstStep(model, F.cross_entropy, tensors, RankGroup(None, 0, 1))
    first, then = half_batches(12, count=2, dtype=torch.float64)
    scales = torch.tensor([0.9, 1.2, 1.0, 0.7], dtype=torch.float64)
    slopes = problem.loss_after(scales, first, then)[1]
    for i in range(4):
        shift = torch.zeros(4, dtype=torch.float64)
        shift[i] = 1e-6
        up, down = (problem.loss_after(scales + sign * shift, first, then)[0] for sign in (1, -1))
        assert slopes[i].item() == pytest.approx((up - down) / 2e-6, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("kind", SETS)
def test_the_loss_after_one_step_goes_down(kind: str) -> None:
    """Fails when the scales are learned away from the optimum, which the optimizer's own first step shows."""
    model, batches = net(), half_batches(12)
    groups = constrain(model, SETS[kind])
    pairs = [[joined(a, b), joined(a, c)] for a, b, c in (batches[:3], batches[3:])]
    before = sum(loss_after_sfw(model, groups, *pair) for pair in pairs)
    scales = run(model, batches, SETS[kind], steps=150, kappa=0.01)
    after = sum(loss_after_sfw(model, groups, *pair) for pair in pairs)
    assert after < 0.85 * before
    assert scales.keys() == dict(model.named_parameters()).keys() and len(set(scales.values())) == 4


@pytest.mark.parametrize("kind", SETS)
def test_what_was_outside_its_set_is_in_it_afterwards(kind: str) -> None:
    """Fails when training starts with an infeasible tensor, or the answer does not tell the whole factor."""
    model = net()
    with torch.no_grad():
        model[0].weight *= 1000
    before = weights(model)
    groups = constrain(model, SETS[kind], norm="initializer")
    scales = run(model, half_batches(12), SETS[kind])
    assert scales["0.weight"] < 0.2
    for group in groups:
        ((name, parameter),) = group["params"]
        assert group["constraint"].gauge(parameter) <= 1 + 1e-6
        torch.testing.assert_close(parameter.detach(), before[name] * scales[name])


def test_no_scale_falls_below_its_floor() -> None:
    """Fails when a scale turns negative, a weight dies, or biases have the weights' floor."""
    floors: dict[str, float] = {"floor_weight": 0.3, "floor_bias": 0.1}
    scales: dict[str, list[float]] = {"weight": [], "bias": []}
    for seed in range(3):
        torch.manual_seed(seed)
        for name, scale in run(net(), half_batches(12), kappa=0.5, steps=30, **floors).items():
            scales[name.split(".")[1]].append(scale)
    assert min(scales["weight"]) == 0.3 and min(scales["bias"]) == 0.1


def test_zeros_keep_scale_1_and_frozen_tensors_their_values() -> None:
    """Fails when a tensor without direction drifts, or the scaling reaches what is not trained."""
    model = net()
    nn.init.zeros_(model[0].bias)
    model[2].weight.requires_grad_(False)
    before = weights(model)
    scales = run(model, half_batches(12))
    assert scales["0.bias"] == 1 and "2.weight" not in scales and scales["0.weight"] != 1
    assert torch.equal(model[2].weight, before["2.weight"]) and not model[0].bias.any()


def test_statistics_modes_and_gradients_stay_as_they_were() -> None:
    """Fails when BatchNorm counts the batches, a frozen layer is in training afterwards, or gradients are left."""
    model = normed()
    model[3].eval()
    model[1].eval()
    before, modes = weights(model), [m.training for m in model.modules()]
    run(model, half_batches(1, 3, 3))
    after = weights(model)
    assert all(torch.equal(after[f"1.{k}"], before[f"1.{k}"]) for k in ("running_mean", "running_var"))
    assert after["1.num_batches_tracked"] == 0
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_the_statistics_are_the_batches() -> None:
    """Fails when BatchNorm's running statistics, those of no data, decide: their values must not matter."""
    answers = []
    for mean in (0.0, 100.0):
        torch.manual_seed(0)
        model = normed()
        model[1].running_mean.fill_(mean)
        answers.append(run(model, half_batches(1, 3, 3)))
    assert answers[0] == answers[1]


def test_dropout_is_off_and_the_random_state_stays() -> None:
    """Fails when the answer, or what is drawn after it, depends on chance."""

    class Shuffled:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            torch.rand(1)  # as a DataLoader draws a seed
            return iter(half_batches(1, 3, 3))

    answers, states = [], []
    for seed in (5, 6):
        torch.manual_seed(0)
        model = normed()
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        answers.append(run(model, Shuffled()))
        states.append(torch.equal(torch.random.get_rng_state(), before))
    assert answers[0] == answers[1] and all(states)


def test_batches_start_over_when_a_fetch_finds_them_ended() -> None:
    """Fails when a list that three does not divide is cut short, or its order lost."""
    batches = half_batches(12, count=4)
    torch.manual_seed(0)
    once = run(net(), batches, steps=4)
    torch.manual_seed(0)
    assert run(net(), batches * 3, steps=4) == once


def test_the_groups_of_an_optimizer_do_too() -> None:
    """Fails when a script must make groups twice, or a group's own learning rate, factor and rule do not count."""
    options: dict[str, Any] = {"lr": 0.3, "rescale": "fast_gradient"}
    answers = []
    for of_optimizer, factor in ((False, 1.0), (True, 1.0), (True, 0.5)):
        torch.manual_seed(0)
        model = net()
        groups: Any = constrain(model, SETS["k_sparse"], unconstrained="norm_and_bias")
        if of_optimizer:
            groups = [group | {"lr_factor": factor} for group in groups]
            groups, given = SFW(groups, **options | {"lr": 0.3 / factor}).param_groups, {"lr": 0.3}
        else:
            given = options
        answers.append(sfw_init(model, F.cross_entropy, half_batches(12), groups, steps=5, **given))
    assert answers[0] == answers[1] == answers[2]


def test_attention_tied_weights_and_bfloat16_work() -> None:
    """Fails when a model has to be changed for SFW-Init: fast attention cannot be differentiated twice."""

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
            self.second.weight = self.first.weight
            self.unused = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.second(self.first(self.layer(x))).mean(1)
            return found

    for dtype in (torch.float32, torch.bfloat16):
        model = Transformer().to(dtype)
        scales = run(model, half_batches(5, 8, dtype=dtype), steps=3)
        assert model.second.weight is model.first.weight
        assert scales["layer.self_attn.in_proj_weight"] != 1 and scales["unused.weight"] == 1


def test_ddp_is_looked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when the wrapper's hooks fire, or the names get its prefix."""
    torch.manual_seed(0)
    inner = net()
    monkeypatch.setattr(DistributedDataParallel, "__init__", lambda self, module: nn.Module.__init__(self))
    wrapper = DistributedDataParallel(inner)
    wrapper.module = inner
    scales = sfw_init(wrapper, F.cross_entropy, half_batches(12), constrain(inner, SETS["l2"]), steps=1)
    assert "0.weight" in scales


def test_whatever_raises_leaves_the_model_as_it_was() -> None:
    """Fails when ctrl-C in the middle leaves half the tensors scaled, or BatchNorm in another mode."""
    model = normed().eval()
    before = weights(model)

    def stop(step: int, loss: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, half_batches(1, 3, 3), progress=stop)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"lr": 0.0}, ["lr", "got 0.0", "1.0 in the paper"]),
        ({"rescale": "fast"}, ["rescale", "'fast'", "fast_gradient"]),
        ({"steps": 0}, ["steps", "got 0", "390"]),
        ({"kappa": -1.0}, ["kappa", "-1.0", "0.001"]),
        ({"betas": (0.9, 1.0)}, ["betas", "1.0)", "0.999"]),
        ({"floor_weight": 1.0}, ["floor_weight", "1.0", "0.01"]),
        ({"floor_bias": -0.1}, ["floor_bias", "-0.1"]),
        ({"batches": []}, ["batches has nothing", "list"]),
        ({"batches": iter(half_batches(12, count=4))}, ["nothing more", "start over"]),
        ({"groups": []}, ["no trainable parameter", "constrain"]),
        ({"groups": constrain(net(), SETS["l2"])}, ["(24, 12)", "not the model's"]),
        ({"lr": 1e39, "groups": "unconstrained"}, ["loss after one step", "iteration 1", "lower lr"]),
        ({"groups": "unbound"}, ["tau", "bind it with constrain"]),
        ({"model": nn.Sequential(nn.Linear(12, 4), nn.SyncBatchNorm(4))}, ["SyncBatchNorm", "before"]),
        ({"model": net().to("meta"), "groups": "unconstrained"}, ["0.weight", "not whole"]),
    ],
    ids=lambda value: None if isinstance(value, list) else "-".join(value),
)
def test_bad_input_is_one_line(options: dict[str, Any], parts: list[str]) -> None:
    """Fails when a mistake shows as a traceback from inside, or the message names neither value nor remedy."""
    options = dict(options)
    model = options.pop("model", None) or net()
    batches = options.pop("batches", half_batches(12))
    groups = options.pop("groups", None)
    if groups is None:
        groups = constrain(model, SETS["l2"])
    elif groups == "unconstrained":
        groups = [{"params": list(model.named_parameters()), "constraint": Unconstrained()}]
    elif groups == "unbound":
        groups = [{"params": list(model.named_parameters()), "constraint": SETS["l2"]}]
    with pytest.raises(ValueError) as raised:
        sfw_init(model, F.cross_entropy, batches, groups, **{"steps": 5, **options})
    assert isinstance(raised.value, UserError) or "bind it" in str(raised.value)
    message = str(raised.value)
    assert "\n" not in message and all(part in message for part in parts), message
