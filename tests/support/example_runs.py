"""Starts the examples as their docstrings say, and reads what they have printed and saved."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[2] / "examples"
FIRST_AND_LAST = {
    "accelerate_digits": ("epoch_0", "epoch_1"),
    "fsdp_digits": ("epoch_0", "epoch_1"),
    "lightning_digits": ("epoch=0.ckpt", "epoch=1.ckpt"),
    "timm_digits": ("checkpoint-0.pth.tar", "checkpoint-1.pth.tar"),
    "trainer_digits": ("checkpoint-22", "checkpoint-44"),
}
"""An example's checkpoints after the first and the second epoch of one process."""

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def start_example(name: str, *options: str, folder: Path, ranks: int = 0) -> str:
    """Run an example in ``folder`` and return what it printed.

    Args:
        name: of the example.
        options: of its command line.
        folder: working directory.
        ranks: started by torchrun; 0 for plain Python. ``--standalone`` lets torchrun choose a free port.

    Raises:
        AssertionError: it failed; the message is what it wrote to stderr.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    command = [sys.executable, *launcher, str(EXAMPLES / f"{name}.py"), *options]
    environment = os.environ | OFFLINE | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def accuracies(printed: str) -> dict[str, float]:
    """By sparsity, as printed."""
    found = re.findall(r"^sparsity (\S+): accuracy (\S+)$", printed, re.MULTILINE)
    return {sparsity: float(accuracy) for sparsity, accuracy in found}


def assert_same_state(name: str, one: Path, other: Path) -> None:
    """Check that two checkpoints of an example hold bitwise the same weights, momentum and options of the groups."""
    a, b = _saved(name, one), _saved(name, other)
    assert a["model"].keys() == b["model"].keys()
    for key, tensor in a["model"].items():
        assert torch.equal(tensor, b["model"][key]), key
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    assert a["optimizer"]["state"].keys() == b["optimizer"]["state"].keys() != set()
    assert any(state["step"] > 0 and state["momentum_buffer"].any() for state in a["optimizer"]["state"].values())
    for number, state in a["optimizer"]["state"].items():
        assert state["step"] == b["optimizer"]["state"][number]["step"]
        assert torch.equal(state["momentum_buffer"], b["optimizer"]["state"][number]["momentum_buffer"]), number


def _saved(name: str, checkpoint: Path) -> dict[str, Any]:
    """``model`` and ``optimizer`` as an example's framework has saved them, loaded as tensors only."""
    if name in {"accelerate_digits", "trainer_digits"}:
        optimizer = checkpoint / ("optimizer.bin" if name == "accelerate_digits" else "optimizer.pt")
        return {"model": load_file(checkpoint / "model.safetensors"), "optimizer": _tensors(optimizer)}
    whole = _tensors(checkpoint)
    optimizer = whole["optimizer_states"][0] if name == "lightning_digits" else whole["optimizer"]
    return {"model": whole["state_dict"], "optimizer": optimizer}


def _tensors(path: Path) -> Any:
    from argparse import Namespace  # timm saves the options too

    with torch.serialization.safe_globals([Namespace]):
        return torch.load(path, weights_only=True)
