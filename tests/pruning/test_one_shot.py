"""Magnitude pruning: exact counts, the published masks, the patterns, and what is reported of them."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sfw_dist.errors import UserError
from sfw_dist.pruning.masks import MaskKind, Masks, magnitude_masks
from sfw_dist.pruning.one_shot import prune
from sfw_dist.pruning.sparsities import PAPER_SPARSITIES, parse_sparsities
from sfw_dist.pruning.summary import count_flops, dead_layers, kept_flops, layer_table

GOLDEN = Path(__file__).parents[1] / "golden" / "global_prune.npz"


def removed_count(sparsity: float, n: int) -> int:
    return int((Decimal(str(sparsity)) * n).quantize(Decimal(1), ROUND_HALF_UP))


def small_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(16, 10))


def linears(tensors: list[Tensor]) -> nn.Module:
    """A model of linear layers with these matrices, no biases."""
    layers = [nn.Linear(t.shape[1], t.shape[0], bias=False) for t in tensors]
    for layer, tensor in zip(layers, tensors, strict=True):
        layer.weight = nn.Parameter(tensor.clone())
    return nn.ModuleList(layers)


@st.composite
def tied_matrices(draw: st.DrawFn) -> list[Tensor]:
    """One to three matrices over seven values of four magnitudes: mostly ties, many zeros."""
    shapes = draw(st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=3))
    seed = draw(st.integers(0, 2**32 - 1))
    generator = torch.Generator().manual_seed(seed)
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    return [torch.randint(-3, 4, shape, generator=generator).clamp(-3, 3).to(dtype) / 2 for shape in shapes]


sparsities = st.one_of(st.floats(0, 0.999), st.sampled_from(PAPER_SPARSITIES))


def flat(masks: Masks) -> Tensor:
    return torch.cat([mask.flatten() for mask in masks.values()])


@given(tied_matrices(), sparsities)
@settings(max_examples=100, deadline=None)
def test_global_masks_equal_a_brute_force_sort(tensors: list[Tensor], sparsity: float) -> None:
    """A threshold removes all ties or none; a sort that is not stable keeps others of them on other devices."""
    values = [abs(v) for t in tensors for v in t.double().flatten().tolist()]
    kept = len(values) - removed_count(sparsity, len(values))
    expected = set(sorted(range(len(values)), key=lambda i: (-values[i], i))[:kept])

    masks = magnitude_masks(linears(tensors), sparsity)

    assert set(flat(masks).nonzero().flatten().tolist()) == expected
    assert (masks.kept, masks.total) == (kept, len(values))
    assert masks.sparsity == pytest.approx(1 - kept / len(values))


@given(tied_matrices(), sparsities)
@settings(max_examples=100, deadline=None)
def test_layerwise_counts_are_exact_in_every_layer(tensors: list[Tensor], sparsity: float) -> None:
    """Counts rounded down in each layer add up to a network far denser than asked for."""
    masks = magnitude_masks(linears(tensors), sparsity, kind="layerwise")
    for tensor, mask in zip(tensors, masks.values(), strict=True):
        assert mask.shape == tensor.shape
        assert int((~mask).sum()) == removed_count(sparsity, tensor.numel())
        if mask.any() and not mask.all():
            assert tensor[mask].abs().min() >= tensor[~mask].abs().max()


@given(tied_matrices(), sparsities, sparsities, st.sampled_from(["global", "layerwise"]))
@settings(max_examples=100, deadline=None)
def test_masks_of_higher_sparsity_are_subsets(tensors: list[Tensor], a: float, b: float, kind: MaskKind) -> None:
    """Ties broken anew at each sparsity: pruning a pruned network further would bring removed weights back."""
    low, high = sorted((a, b))
    model = linears(tensors)
    dense, sparse = (flat(magnitude_masks(model, s, kind=kind)) for s in (low, high))
    assert not (sparse & ~dense).any()


@given(tied_matrices(), sparsities)
@settings(max_examples=50, deadline=None)
def test_pruning_again_changes_nothing(tensors: list[Tensor], sparsity: float) -> None:
    """Zeros left out of the count: each call would remove the fraction anew."""
    model = linears(tensors)
    once = flat(prune(model, sparsity))
    before = [p.clone() for p in model.parameters()]
    again = flat(prune(model, sparsity))
    assert int(once.sum()) == int(again.sum())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(("sparsity", "n", "removed"), [(0.5, 5, 3), (0.29, 50, 15), (0.35, 10, 4), (0.1, 4, 0)])
def test_counts_round_half_up_of_the_decimal_product(sparsity: float, n: int, removed: int) -> None:
    """0.29 * 50 is 14.499999999999998 in floating point and would lose an entry; round() takes half to even."""
    masks = magnitude_masks(linears([torch.arange(1.0, n + 1).view(1, n)]), sparsity)
    assert masks.total - masks.kept == removed


def golden_net() -> tuple[nn.Module, dict[str, np.ndarray]]:
    """The network whose parameters the published code pruned, and what it stored; ``w{j}`` is parameter j."""
    with np.load(GOLDEN, allow_pickle=False) as archive:
        stored = dict(archive)
    model = small_net()
    assert [name for name, _ in model.named_parameters()] == stored["names"].tolist()
    with torch.no_grad():
        for j, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.from_numpy(stored[f"w{j}"]))
    return model, stored


def published_values(stored: dict[str, np.ndarray], fraction: float) -> list[np.ndarray]:
    return [stored[f"keep{fraction}_w{j}"] for j in range(len(stored["names"]))]


@pytest.mark.parametrize("fraction", [0.9, 0.5, 0.2, 0.1, 0.05, 0.01])
def test_masks_are_the_published_ones(fraction: float) -> None:
    """Another order of tensors, or BatchNorm left out of scope "all": masks unlike those behind the paper's curves.

    With a the ascending magnitudes of all N entries (none zero, none tied here), the published rule keeps
    |w| >= ([0] + a)[i], i = int((1 - f) * N). The extra leading 0 shifts the list by one: the threshold is a[i - 1],
    so N - i + 1 entries stay, 1 more than asked, and rounding (1 - f) * N down adds another 1 where its fraction is
    1/2 or more: at f = 0.9, 157.8, they keep 1,422 and we 1,420. At the same number of entries the masks are equal.
    """
    model, stored = golden_net()
    published = torch.from_numpy(np.concatenate([w.ravel() != 0 for w in published_values(stored, fraction)]))
    n, theirs = published.numel(), int(published.sum())
    asked = (1 - Decimal(str(fraction))) * n
    assert theirs == n - int(asked) + 1

    same_count = flat(magnitude_masks(model, (n - theirs) / n, scope="all"))
    assert torch.equal(same_count, published)

    ours = flat(magnitude_masks(model, float(1 - Decimal(str(fraction))), scope="all"))
    assert not (ours & ~published).any()
    assert theirs - int(ours.sum()) == (1 if asked % 1 < Decimal("0.5") else 2)


def test_pruned_values_are_the_published_ones() -> None:
    """Kept entries must keep their value and the others must be zero, in BatchNorm and biases too."""
    model, stored = golden_net()
    expected = published_values(stored, 0.1)
    removed = sum(int((w == 0).sum()) for w in expected)
    prune(model, removed / sum(w.size for w in expected), scope="all")
    for parameter, values in zip(model.parameters(), expected, strict=True):
        assert np.array_equal(parameter.detach().numpy(), values)


def test_weights_are_found_by_module_type() -> None:
    """Filters by name drop a convolution called "bnet" or prune a BatchNorm called "conv"."""
    model = nn.ModuleDict(
        {
            "bnet": nn.Conv1d(2, 2, 3),
            "conv": nn.BatchNorm1d(2),
            "up": nn.ConvTranspose2d(2, 2, 3),
            "deep": nn.Sequential(nn.Conv3d(1, 1, 2), nn.LayerNorm(4)),
            "embedding": nn.Embedding(5, 4),
            "head": nn.Linear(4, 4),
        }
    )
    assert list(magnitude_masks(model, 0.5)) == ["bnet.weight", "up.weight", "deep.0.weight", "head.weight"]
    assert list(magnitude_masks(model, 0.5, scope="all")) == [name for name, _ in model.named_parameters()]


def test_a_single_layer_is_a_model() -> None:
    """The root module has the empty name: "" + ".weight" is no parameter."""
    layer = nn.Linear(4, 2)
    assert prune(layer, 0.5).kept == 4
    assert int(layer.weight.count_nonzero()) == 4
    assert count_flops(layer, torch.rand(3, 4)) == {"weight": 2 * 4 * 2}


def test_a_shared_weight_counts_once() -> None:
    """Counted twice, a tied embedding takes twice its share, and its two masks could differ."""
    embedding, head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
    head.weight = embedding.weight
    masks = magnitude_masks(nn.Sequential(embedding, head), 0.25)
    assert list(masks) == ["0.weight"]
    assert (masks.total, masks.kept) == (24, 18)


def test_mixed_precision_compares_across_types() -> None:
    """float64 magnitudes rounded to the float32 of another layer would tie, and the wrong entry would go."""
    fine = torch.tensor([[1.0 + 1e-12, 1.0 - 1e-12]], dtype=torch.float64)
    model = linears([torch.tensor([[1.0, 1.0]]), fine, torch.tensor([[3.0, 1.0]], dtype=torch.bfloat16)])
    assert flat(magnitude_masks(model, 1 / 6)).tolist() == [True, True, True, False, True, True]
    assert flat(magnitude_masks(model, 4 / 6)).tolist() == [False, False, True, False, True, False]


def test_channels_last_weights_tie_in_the_order_of_their_shape() -> None:
    """Flat positions taken from memory instead of shape: the masks would depend on the memory format."""
    layer = nn.Conv2d(4, 4, 3, bias=False)
    nn.init.ones_(layer.weight)
    expected = flat(magnitude_masks(layer, 0.4))
    assert torch.equal(flat(magnitude_masks(layer.to(memory_format=torch.channels_last), 0.4)), expected)
    assert expected.tolist() == sorted(expected.tolist(), reverse=True)


@pytest.mark.parametrize("kind", ["global", "layerwise", "2:4", "filters", "filters-layerwise"])
def test_masks_leave_the_model_alone_and_prune_applies_exactly_them(kind: MaskKind) -> None:
    """A mask computed on an already changed model, or weights rounded by multiplying them."""
    model = small_net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = magnitude_masks(model, 0.5, kind=kind)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())

    applied = prune(model, 0.5, kind=kind)

    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        if name in masks:
            assert torch.equal(masks[name], applied[name])
            assert torch.equal(parameter, torch.where(masks[name], before[name], 0.0))
            assert not parameter.signbit()[~masks[name]].any()
        else:
            assert torch.equal(parameter, before[name])


def test_each_mask_owns_its_memory() -> None:
    """Views into one flat mask: each saved mask would carry those of the whole network."""
    for mask in magnitude_masks(small_net(), 0.5).values():
        assert mask.untyped_storage().nbytes() == mask.numel()


def test_two_of_four_runs_along_the_input_channels() -> None:
    """Groups along the kernel's width: a mask that sparse tensor cores cannot use, where channels are innermost."""
    model = small_net()
    masks = magnitude_masks(model, 0.5, kind="2:4")
    assert masks.skipped == ("0.weight",)  # 3 input channels
    assert masks["0.weight"].all()
    for name in ("2.weight", "4.weight"):
        weight, mask = model.get_parameter(name).detach(), masks[name]
        fours = mask.movedim(1, -1).reshape(-1, 4)
        magnitudes = weight.abs().movedim(1, -1).reshape(-1, 4)
        assert (fours.sum(1) == 2).all()
        assert (magnitudes.where(fours, torch.inf).amin(1) >= magnitudes.where(~fours, 0).amax(1)).all()
    eligible = masks.total - masks["0.weight"].numel()
    assert masks.total - masks.kept == eligible // 2


def test_two_of_four_breaks_ties_by_the_lowest_channel() -> None:
    """An unstable sort: masks that differ between devices."""
    masks = magnitude_masks(
        linears([torch.tensor([[1.0, -1, 1, 1, 0, 0, 0, 0], [0, 2, 0, 0, 1, 1, -2, 1]])]), 0.5, kind="2:4"
    )
    assert masks["0.weight"].int().tolist() == [[1, 1, 0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0, 1, 0]]


def test_two_of_four_leaves_dense_what_has_no_such_layout() -> None:
    """Dimension 1 of a transposed convolution counts outputs, that of a BatchNorm weight does not exist."""
    model = nn.Sequential(nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    assert magnitude_masks(model, 0.5, kind="2:4").skipped == ("0.weight",)
    masks = magnitude_masks(model, 0.5, kind="2:4", scope="all")
    assert set(masks) - set(masks.skipped) == {"2.weight"}


@pytest.mark.parametrize(
    ("sparsity", "told"),
    [
        (90, "write 0.9 for 90 %"),
        (97.5, "write 0.975 for 97.5 %"),
        (1.0, "1 would leave nothing"),
        (-0.1, "got -0.1"),
        (float("nan"), "got nan"),
        (float("inf"), "got inf"),
    ],
)
def test_a_sparsity_out_of_range_names_value_and_remedy(sparsity: float, told: str) -> None:
    """90 read as "keep nothing" would write a network of zeros over the user's model."""
    model = small_net()
    with pytest.raises(UserError, match="sparsity") as caught:
        prune(model, sparsity)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(parameter.count_nonzero() for parameter in (model.get_parameter(f"{i}.weight") for i in (0, 2, 4)))


def test_bad_arguments_are_user_errors() -> None:
    """A misspelt scope must not fall through to another one, nor "2:4" quietly remove half when 0.9 was asked."""
    with pytest.raises(UserError, match=r"unknown scope 'weight': choose one of weights, all"):
        magnitude_masks(small_net(), 0.5, scope="weight")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"unknown kind '2:8': choose one of global, layerwise, 2:4"):
        magnitude_masks(small_net(), 0.5, kind="2:8")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"2:4 removes exactly half, got sparsity 0.9"):
        magnitude_masks(small_net(), 0.9, kind="2:4")
    with pytest.raises(UserError, match="BatchNorm2d has nothing to prune"):
        magnitude_masks(nn.BatchNorm2d(3), 0.5)


def test_nan_weights_name_the_parameter_and_nothing_is_pruned() -> None:
    """NaN compares with nothing: the selection would be arbitrary, and a diverged network look merely inaccurate."""
    model = small_net()
    with torch.no_grad():
        model.get_parameter("2.weight")[3, 1, 0, 0] = torch.nan
    before = model.get_parameter("0.weight").detach().clone()
    with pytest.raises(UserError, match=r"^2\.weight holds NaN"):
        prune(model, 0.5)
    assert torch.equal(model.get_parameter("0.weight"), before)


def test_layer_table_and_dead_layers() -> None:
    """A layer without weights cuts the network in two; the report must say which."""
    model = linears([torch.full((2, 4), 0.1), torch.full((4, 2), 5.0)])
    masks = magnitude_masks(model, 0.5)
    assert dead_layers(masks) == ["0.weight"]
    assert layer_table(model, masks) == [
        {"name": "0.weight", "shape": [2, 4], "parameters": 8, "kept": 0, "sparsity": 1.0},
        {"name": "1.weight", "shape": [4, 2], "parameters": 8, "kept": 8, "sparsity": 0.0},
    ]


def test_parse_sparsities_is_exact_in_decimal() -> None:
    """(0.99 - 0.9) / 0.01 is 8.999999999999996 in floating point: the last point would be missing."""
    assert parse_sparsities("0.9:0.99:0.01") == [0.9, 0.91, 0.92, 0.93, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99]
    assert parse_sparsities("0.95, 0.5,0.9:0.95:0.05,0") == [0.0, 0.5, 0.9, 0.95]
    assert parse_sparsities("0.1:0.6:0.2") == [0.1, 0.3, 0.5]
    assert list(PAPER_SPARSITIES) == [i / 10 for i in range(1, 10)] + [i / 100 for i in range(91, 100)]


@pytest.mark.parametrize(
    "piece",
    [
        "",
        "x",
        "nan",
        "0.1:0.2",
        "0.1:0.2:0.1:0.1",
        "90",
        "-0.1",
        "1",
        "0.9:0.5:0.1",
        "0.1:0.5:0",
        "0:0.5:inf",
        "0:0.5:nan",
    ],
)
def test_bad_sparsities_are_told_piece_by_piece(piece: str) -> None:
    """An empty range silently evaluates nothing; a step of 0 never ends."""
    with pytest.raises(UserError) as caught:
        parse_sparsities(f"0.5,{piece},0.9")
    assert repr(piece) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_flops_of_one_sample_by_hand() -> None:
    """A batch counted as one sample, multiply-adds counted once, or names that do not match those of the masks."""
    flops = count_flops(small_net(), torch.rand(5, 3, 5, 5))
    assert flops == {
        "0.weight": 2 * (8 * 3 * 3) * 3 * (3 * 3),  # (out * in * kh) * kw * output positions
        "2.weight": 2 * (16 * 8 * 3) * 3 * (1 * 1),
        "4.weight": 2 * 16 * 10,
    }


class CallsTwice(nn.Module):
    """One layer under two names, called twice."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(4, 4)
        self.first, self.second = nn.Sequential(shared), nn.Sequential(shared)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x))
        return y


def test_flops_of_a_shared_module_count_each_call() -> None:
    """By module path, a shared layer's work appears under the name that no mask has."""
    model = CallsTwice()
    flops = count_flops(model, torch.rand(1, 4))
    assert flops == {"first.0.weight": 2 * (2 * 4 * 4)}
    assert set(flops) == set(magnitude_masks(model, 0.5))


def test_counting_flops_leaves_no_trace() -> None:
    """Running statistics moved by a random example, a frozen BatchNorm set to training, hooks that stay."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Dropout())
    model[1].eval()
    before = {name: b.clone() for name, b in model.named_buffers()}

    count_flops(model, torch.rand(2, 3, 8, 8))
    with pytest.raises(RuntimeError):
        count_flops(model, torch.rand(2, 1, 8, 8))

    assert [m.training for m in model.modules()] == [True, True, False, True, True]
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_kept_flops_weigh_each_layer_by_its_own_density() -> None:
    """The network's overall density instead: wrong wherever layers differ in work per weight."""
    masks = Masks({"a": torch.tensor([True, False, False, False]), "b": torch.tensor([True, True])})
    assert kept_flops({"a": 1000, "b": 10, "unmasked": 1}, masks) == 250 + 10 + 1
