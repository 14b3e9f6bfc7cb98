"""Shared by the examples: scikit-learn's 1,797 handwritten digits as tensors."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

SPARSITIES = (0.0, 0.5, 0.8, 0.9, 0.95)


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Load training and test digits, always with the same split.

    Returns:
        Data sets of float32 images ``(n, 1, 8, 8)`` in [-1, 1] and int64 labels ``(n,)``.
    """
    images, labels = load_digits(return_X_y=True)
    data = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    train, test = order[:1347], order[1347:]
    targets = torch.tensor(labels)
    return TensorDataset(data[train], targets[train]), TensorDataset(data[test], targets[test])
