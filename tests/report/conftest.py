"""Made-up run folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sfw_dist.report import figures
from tests.support.report import (
    ACCURACY,
    LAYERS,
    MakeRun,
    epoch,
    pruning_result,
    write_lines,
)


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Writes a complete run folder; tests then take away or spoil what they are about."""

    def make(name: str = "digits_sfw", *, folder: str = "", accuracy: dict[float, float] = ACCURACY) -> Path:
        run = tmp_path / (folder or name)
        (run / "prune").mkdir(parents=True)
        settings = {"name": name, "seed": 0, "data": {"name": "digits"}, "optimizer": {"name": "sfw", "lr": 1.0}}
        (run / "config.yaml").write_text(json.dumps(settings, indent=2))
        (run / "environment.json").write_text(
            json.dumps({"command": ["train.py", "--config", "a b.yaml"], "git_dirty": False})
        )
        write_lines(run / "metrics.jsonl", [{"event": "start"}, *epoch(1, 0.5), *epoch(2, 0.75), *epoch(3, 0.97)])
        generator = np.random.default_rng(0)
        weights = {name: generator.standard_normal((size // 2, 2), np.float32) for name, size in LAYERS.items()}
        save_file({**weights, "bn.weight": np.full(7, 1e6, np.float32)}, run / "model.safetensors")
        for sparsity, top1 in accuracy.items():
            path = run / "prune" / f"s{sparsity:.4f}.json"
            path.write_text(json.dumps(pruning_result(sparsity, top1)))
        return run

    return make


@pytest.fixture
def quick_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for the drawing, which takes seconds, where a test is about what is done with the figures."""
    monkeypatch.setattr(figures, "draw_all", lambda _: {"curve.png": b"new"})
