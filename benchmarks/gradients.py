"""Gradients of a real training run, for benchmarks of the optimizer alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from sfw_dist import SFW, KSparsePolytope, constrain
from sfw_dist.models import build_model

K_FRAC, K_MIN, TAU = 0.05, 10, 15.0
"""The paper's K-sparse polytope."""


def training_run(name: str, batch_size: int, skip: int) -> Iterator[tuple[nn.Module, list[Tensor]]]:
    """A network of 10 classes and the gradients of each of its steps, after the first ``skip``; without end.

    Digits, enlarged to 16×16 and three channels; the published SFW: lr 1, all tensors K-sparse at 5 %. Under bf16
    autocast; the gradients are float32.
    """
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    model = build_model(name, num_classes=10)
    optimizer = SFW(constrain(model, KSparsePolytope(k_frac=K_FRAC, k_min=K_MIN, tau=TAU)), lr=1.0)
    step = 0
    while True:
        chosen = torch.randint(len(images), (batch_size,))
        inputs = F.interpolate(images[chosen], size=(16, 16), mode="bilinear").expand(-1, 3, -1, -1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(inputs.contiguous()), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        if step >= skip:
            yield model, [p.grad for p in model.parameters() if p.grad is not None]
        optimizer.step()
        step += 1
