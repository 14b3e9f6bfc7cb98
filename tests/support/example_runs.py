"""Starts the examples as their docstrings say, and reads what they have printed and saved."""

from __future__ import annotations

import importlib
import io
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

EXAMPLES = Path(__file__).parents[2] / "examples"
FIRST_AND_LAST = {
    "accelerate_digits": ("epoch_0", "epoch_1"),
    "fsdp_digits": ("epoch_0", "epoch_1"),
    "lightning_digits": ("epoch=0.ckpt", "epoch=1.ckpt"),
    "timm_digits": ("checkpoint-0.pth.tar", "checkpoint-1.pth.tar"),
    "trainer_digits": ("checkpoint-22", "checkpoint-44"),
}
"""An example's checkpoints after the first and the second epoch of one process."""

PROGRAMS = {
    "accelerate_fsdp_digits": "torchrun --nproc-per-node 2",
    "container_digits": "torchrun --nproc-per-node 2",
    "gpt_text": "torchrun --nproc-per-node 2",
    "lightning_finetuning_digits": "python",
    "lora_digits": "python",
}
"""Examples with tests of their own, and what their docstrings start them with."""

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


def run_mains(rank: int, name: str, runs: list[list[str]]) -> str:
    """Call an example's ``main`` with each list of options, on ranks that :func:`run_on_ranks` has joined already.

    Returns:
        What this rank printed.
    """
    os.environ["RANK"] = str(rank)
    sys.path.insert(0, str(EXAMPLES))
    printed = io.StringIO()
    with (
        mock.patch.object(dist, "init_process_group"),
        mock.patch.object(dist, "destroy_process_group"),
        redirect_stdout(printed),
    ):
        main = importlib.import_module(name).main
        for options in runs:
            main(options)
    return printed.getvalue()


def accuracies(printed: str) -> dict[str, float]:
    """By sparsity, as printed; of an example that predicts text the losses."""
    found = re.findall(r"^sparsity (\S+): (?:accuracy|loss) (\S+)$", printed, re.MULTILINE)
    return {sparsity: float(accuracy) for sparsity, accuracy in found}


def assert_same_files(one: Path, other: Path) -> None:
    """Check that two folders have files of the same names, whose tensors and values are bitwise the same."""
    names = sorted(str(path.relative_to(one)) for path in one.rglob("*") if path.suffix in (".pt", ".safetensors"))
    assert names
    for name in names:
        read = load_file if name.endswith("safetensors") else _tensors
        assert_same_values(read(one / name), read(other / name), name)


def assert_same_distributed(one: Path, other: Path, folder: Path) -> None:
    """The same of two distributed checkpoints; ``folder`` takes what they are gathered into."""
    for number, path in enumerate((one, other)):
        dcp_to_torch_save(path, folder / f"{number}.pt")
    assert_same_values(_tensors(folder / "0.pt"), _tensors(folder / "1.pt"), one.name)


def assert_same_values(one: Any, other: Any, name: str = "") -> None:
    """Equal to the bit, whatever is nested in what; ``name`` is what an error says."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), name
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), name
        for key, value in one.items():
            assert_same_values(value, other[key], f"{name} {key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), name
        for number, value in enumerate(one):
            assert_same_values(value, other[number], f"{name} {number}")
    else:
        assert one == other, name


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
