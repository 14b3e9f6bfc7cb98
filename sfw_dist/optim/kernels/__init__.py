"""Compiled kernels: the step of all tensors of a rank together, in few passes over memory, as ``update`` defines it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch

from sfw_dist.optim.kernels.interface import Kernel, KernelShard


def kernel_for(device: torch.device) -> Callable[[Sequence[KernelShard]], Kernel] | None:
    """The kernel class for a device, or ``None``; imported only when asked for, because Triton may be missing."""
    if device.type == "cpu":
        from sfw_dist.optim.kernels import cpu

        return cpu.CPUKernel if cpu.available() else None
    if device.type == "cuda" and find_spec("triton") is not None:
        from sfw_dist.optim.kernels import cuda

        return cuda.CUDAKernel
    return None
