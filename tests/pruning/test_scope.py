"""Which parameters each scope prunes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

from sfw_dist.errors import UserError
from sfw_dist.pruning import (
    count_flops,
    prune,
)
from tests.support.pruning import compute_masks


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
    assert list(compute_masks(model, 0.5)) == ["bnet.weight", "up.weight", "deep.0.weight", "head.weight"]
    assert list(compute_masks(model, 0.5, scope="all")) == [name for name, _ in model.named_parameters()]


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
    masks = compute_masks(nn.Sequential(embedding, head), 0.25)
    assert list(masks) == ["0.weight"]
    assert (masks.total, masks.kept) == (24, 18)


def test_attentions_projections_are_weights() -> None:
    """Fails when a transformer's queries, keys and values stay dense at any sparsity."""
    joint = nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=4)
    linears = ["self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]
    assert list(compute_masks(joint, 0.5)) == ["self_attn.in_proj_weight", *linears]
    apart = compute_masks(nn.MultiheadAttention(8, 2, kdim=6, vdim=4), 0.5)
    assert list(apart) == ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]


class Conv1D(nn.Module):
    """As transformers has it in GPT-2: a linear layer whose weight is ``(in, out)``."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def test_the_linear_layer_of_gpt2_is_pruned_by_weights_and_ranks() -> None:
    """Fails when GPT-2 stays dense, or when its columns, which are inputs of others' rows, pass for filters."""
    model = nn.Sequential(Conv1D(8, 4), nn.Linear(8, 4), nn.Linear(4, 4))
    assert list(compute_masks(model, 0.5)) == ["0.weight", "1.weight", "2.weight"]
    assert count_flops(model, torch.rand(1, 4)) == {"0.weight": 64, "1.weight": 64, "2.weight": 32}
    assert prune(copy.deepcopy(model), 0.5, granularity="rank").ranks["0.weight"] < 4
    assert prune(copy.deepcopy(model), 0.5, granularity="filter").skipped == ("0.weight", "2.weight")
    assert prune(model, 0.5, granularity="2:4").skipped == ("0.weight",)


def test_looking_for_weights_computes_none() -> None:
    """Fails when a spectrally normalised weight is read to leave it out: in training mode that changes its buffers."""
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match="not pruned"):
        assert list(compute_masks(model, 0.5)) == ["1.weight"]
    assert list(count_flops(model.eval(), torch.zeros(1, 4))) == ["1.weight", "0"]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def _with_weight(make: Callable[[Tensor], Tensor]) -> nn.Module:
    """A good layer, then one whose weight is made from another."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(make(model[1].weight.detach()), requires_grad=False)
    return model


class _Packed(Tensor):
    """Stands for the tensor types of quantisation libraries."""

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return [], None


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (
            lambda w: w.to(torch.int8),
            "^1.weight is torch.int8, as quantised or packed weights are: prune the model before",
        ),
        (lambda w: w.byte().view(-1, 1), "^1.weight is torch.uint8, as quantised"),
        (lambda w: w.to(torch.float8_e4m3fn), "^1.weight is torch.float8_e4m3fn, as quantised"),
        (lambda w: w.to_sparse(), "^1.weight is a torch.sparse_coo, whose entries cannot be set one by one"),
        (lambda w: w.as_subclass(_Packed), "^1.weight is a _Packed, whose entries"),
        (lambda w: w.to("meta"), "^1.weight is on the meta device, without values: load the weights first"),
        (lambda w: w.flatten(), r"^1.weight has shape \(16,\): a framework keeps it flat"),
        (lambda w: w.new_empty(0), r"^1.weight has shape \(0,\): a framework keeps it flat"),
    ],
    ids=["int8", "packed 4 bit", "float8", "sparse", "subclass", "meta", "flat", "partitioned"],
)
@pytest.mark.parametrize("words", [{}, {"scope": "all"}, {"granularity": "rank"}], ids=["weights", "all", "rank"])
def test_weights_that_cannot_be_pruned_are_named(
    make: Callable[[Tensor], Tensor], told: str, words: dict[str, str]
) -> None:
    """Fails when one is a traceback, is pruned by what its bytes happen to mean, or others are pruned before it."""
    model = _with_weight(make)
    before = model[0].weight.detach().clone()
    with pytest.raises(UserError, match=told) as caught:
        prune(model, 0.5, **words)  # type: ignore[call-overload]
    assert "\n" not in str(caught.value)
    assert torch.equal(model[0].weight, before)


def test_lazy_layers_are_told() -> None:
    """Fails when a parameter without a shape is a traceback."""
    with pytest.raises(UserError, match=r"^0.weight is not initialised yet: run one batch"):
        prune(nn.Sequential(nn.LazyLinear(3)), 0.5)


def test_nothing_but_empty_parameters_is_nothing_to_prune() -> None:
    """Fails when the sparsity of nothing is a division by zero."""
    layer = nn.Linear(3, 3, bias=False)
    layer.weight = nn.Parameter(torch.empty(0, 3))
    with pytest.raises(UserError, match="Linear has nothing to prune"):
        prune(layer, 0.5)


def test_complex_weights_are_pruned_by_magnitude_and_have_no_low_rank() -> None:
    """Fails when a low-rank product keeps their real parts alone."""
    model = _with_weight(lambda w: torch.complex(w, 2 * torch.ones_like(w)))
    kept = prune(model[1], 0.5)["weight"]
    assert (
        torch.equal(model[1].weight != 0, kept)
        and int(kept.sum()) == 8
        and bool((model[1].weight.imag[kept] == 2).all())
    )
    with pytest.raises(UserError, match=r"^1.weight is torch.complex64, and low rank takes real ones"):
        prune(model, 0.5, granularity="rank")


@pytest.mark.parametrize(
    "computed",
    [
        parametrizations.weight_norm,
        torch.nn.utils.weight_norm,
        parametrizations.orthogonal,
        lambda layer: torch_prune.random_unstructured(layer, "weight", 0.5),
    ],
    ids=["weight_norm", "old weight_norm", "orthogonal", "torch's prune"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_layers_that_compute_their_weight_are_named(computed: Callable[[nn.Module], nn.Module]) -> None:
    """Fails when most of a network stays dense at 90 % without a word."""
    model = nn.Sequential(computed(nn.Linear(4, 4)), nn.Linear(4, 4))
    with pytest.warns(UserWarning, match="not pruned, because 0 compute their weight"):
        masks = prune(model, 0.5)
    assert list(masks) == ["1.weight"]
