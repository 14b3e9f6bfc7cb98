"""Numbers computed once with the authors' published implementation (float32, CPU); see tests/golden/README.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sfw_dist import SFW, KSparsePolytope, LpBall, sfw_init
from sfw_dist.constraints import Constraint

GOLDEN = Path(__file__).parents[1] / "golden"
LMO = np.load(GOLDEN / "lmo.npz")
TRAJECTORY = np.load(GOLDEN / "trajectory.npz")
RUNS: list[dict[str, Any]] = json.loads((GOLDEN / "trajectory.json").read_text())["runs"]
SHAPES: list[list[int]] = json.loads((GOLDEN / "trajectory.json").read_text())["shapes"]


def _close(actual: torch.Tensor, expected: np.ndarray) -> None:
    torch.testing.assert_close(actual, torch.from_numpy(expected), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", sorted(key[:-2] for key in LMO.files if key.startswith("ksparse") and key[-1] == "x"))
def test_ksparse_lmo_is_the_published_one(case: str) -> None:
    constraint = KSparsePolytope(k=int(LMO[f"{case}_k"]), radius=float(LMO[f"{case}_r"]))
    _close(constraint.lmo(torch.from_numpy(LMO[f"{case}_x"])), LMO[f"{case}_v"])


@pytest.mark.parametrize("p", [1, 2, 3, "inf"])
def test_lp_ball_is_the_published_one(p: float | str) -> None:
    """LMO, diameter and the radius rule, which for 1 < p < 2 is not the half diameter."""
    ball = LpBall(float(p), radius=4.0)
    x = torch.from_numpy(LMO[f"lp_{p}_x"])
    _close(ball.lmo(x), LMO[f"lp_{p}_v"])
    assert ball.diameter(x.numel()) == pytest.approx(float(LMO[f"lp_{p}_diameter"]), rel=1e-5)
    sized = LpBall(float(p), diameter=9.0)
    assert sized.radius(x.numel()) == pytest.approx(float(LMO[f"lp_{p}_radius_for_diameter_9"]), rel=1e-5)


@pytest.mark.parametrize("p", [1, 2, "inf"])
def test_lp_projection_is_the_published_one(p: float | str) -> None:
    projected = LpBall(float(p), radius=4.0).project(torch.from_numpy(LMO[f"lp_{p}_project_in"]))
    _close(projected, LMO[f"lp_{p}_project_out"])


@pytest.mark.parametrize(("n", "k", "radius"), [(100, 10, 0.5), (4096, 204, 1.5)])
def test_ksparse_diameter_and_radius(n: int, k: int, radius: float) -> None:
    assert KSparsePolytope(k=k, radius=radius).diameter(n) == pytest.approx(float(LMO[f"kdiam_{n}_{k}"]), rel=1e-6)
    assert KSparsePolytope(k=k, diameter=30.0).radius(n) == pytest.approx(float(LMO[f"kradius_{n}_{k}"]), rel=1e-6)


def _constraint(run: dict[str, Any], j: int) -> Constraint:
    if run["constraint"] == "l2":
        return LpBall(2, radius=run["radius"][j])
    return KSparsePolytope(k=run["k"][j], radius=run["radius"][j])


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run["key"])
def test_trajectory_is_the_published_one(run: dict[str, Any]) -> None:
    """Twelve steps; a momentum convention or a step size that is off by a factor shows at the second."""
    parameters = [torch.nn.Parameter(torch.from_numpy(TRAJECTORY[f"p0_{j}"]).clone()) for j in range(len(SHAPES))]
    groups = [{"params": [p], "constraint": _constraint(run, j)} for j, p in enumerate(parameters)]
    optimizer = SFW(groups, lr=run["lr"], momentum=run["momentum"], rescale=run["rescale"] or "none")
    for step in range(12):
        for j, parameter in enumerate(parameters):
            parameter.grad = torch.from_numpy(TRAJECTORY[f"grads_{j}"][step])
        optimizer.step()
        for j, parameter in enumerate(parameters):
            expected = TRAJECTORY[f"{run['key']}_p{j}"][step]
            scale = float(np.abs(expected).max()) or 1.0
            torch.testing.assert_close(parameter.data, torch.from_numpy(expected), rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize(("iterations", "rtol"), [(1, 1e-5), (20, 1e-5), (390, 1e-3)])
def test_sfw_init_is_the_published_one(iterations: int, rtol: float) -> None:
    """Adam without bias correction, or batches fetched in another order, show after one and after 20 iterations.

    The convolution's bias stands before a BatchNorm, which takes it away again: its derivative is 0, and the published
    scale of it what Adam makes of rounding.
    """
    stored = np.load(GOLDEN / f"sfw_init_{iterations}.npz")
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    )
    assert [name for name, _ in net.named_parameters()] == list(stored["names"])
    net.load_state_dict({n: torch.from_numpy(stored[f"w0.{n}"]) for n in stored["names"]}, strict=False)
    groups = [
        {"params": [(name, parameter)], "constraint": KSparsePolytope(k=int(k), radius=float(radius))}
        for (name, parameter), k, radius in zip(net.named_parameters(), stored["k"], stored["radius"], strict=True)
    ]
    batches = list(zip(torch.from_numpy(stored["x"]), torch.from_numpy(stored["y"]), strict=True))
    scales = sfw_init(net, F.cross_entropy, batches, groups, lr=1.0, steps=iterations)
    for name, parameter in net.named_parameters():
        expected = torch.from_numpy(stored[f"w1.{name}"])
        if name == "0.bias":
            assert abs(scales[name] - 1) < 1e-3 * iterations
        else:
            torch.testing.assert_close(parameter.detach(), expected, rtol=rtol, atol=1e-7)
    assert scales["1.bias"] == scales["4.bias"] == 1  # zeros
