"""Numbers computed once with the authors' published implementation (float32, CPU); see tests/golden/README.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sfw_dist import SFW, KSparsePolytope, LpBall
from sfw_dist.constraints import Constraint

GOLDEN = Path(__file__).parent / "golden"
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
