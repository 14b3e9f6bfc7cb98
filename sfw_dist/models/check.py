"""The check that a network takes the data set's images, and returns logits of its classes and of no other head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sfw_dist.errors import UserError
from sfw_dist.pruning.outputs import logits_of


def check_network(
    model: nn.Module, name: str, *, image_shape: tuple[int, int, int], num_classes: int, device: torch.device
) -> set[nn.Module]:
    """Run two images through a network in training mode, on the device, to which it is moved; then it is as it was.

    Args:
        model: in training mode afterwards.
        name: of the network, for messages.
        image_shape: ``(channels, height, width)`` of the images.
        num_classes: how many logits each of them must have.
        device: where the network will train.

    Returns:
        The modules that were called; of others the weights are used by modules around them, if at all.

    Raises:
        UserError: the network cannot take such images, returns no logits, another number of them, others than
            floating-point numbers, or those of auxiliary heads too.
    """
    model.to(device).train()
    before = {n: buffer.clone() for n, buffer in model.named_buffers() if not is_lazy(buffer)}
    images, called = torch.zeros(2, *image_shape, device=device), set[nn.Module]()
    hooks = [module.register_forward_pre_hook(lambda module, _: called.add(module)) for module in model.modules()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        try:
            output = model(images)
        except Exception as error:  # of any type: other people's networks
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            size = "×".join(map(str, image_shape))
            raise UserError(
                f"{name} cannot take images of {size} ({reason}): give their size in model.kwargs (timm: img_size, "
                "torchvision's vit: image_size), prepare images of another size, or choose another network"
            ) from error
        for n, buffer in model.named_buffers():
            if n in before:
                buffer.copy_(before[n])
    for hook in hooks:
        hook.remove()
    try:
        logits = logits_of(output)
    except UserError as error:
        raise UserError(f"model.name {name}: {error}") from None
    shape, others = tuple(logits.shape), _other_heads(output, logits)
    if others:
        raise UserError(
            f"{name} returns a {type(output).__name__} with {', '.join(others)} beside its logits, which nothing would "
            "train: build it without auxiliary heads (torchvision: model.kwargs {aux_logits: false})"
        )
    if shape != (2, num_classes):
        raise UserError(
            f"{name} returns a tensor of shape {shape} for 2 images of {num_classes} classes: return logits of shape "
            f"(2, {num_classes})"
        )
    if not logits.is_floating_point():
        raise UserError(f"{name} returns logits of {logits.dtype}: return floating-point numbers, as torch.float32")
    return called


def _other_heads(output: Any, logits: Tensor) -> list[str]:
    """What an output has of auxiliary heads: tensors named so, and in a plain tuple those shaped as the logits are."""
    if isinstance(output, tuple | list) and not hasattr(output, "_asdict"):
        alike = (isinstance(entry, Tensor) and entry is not logits and entry.shape == logits.shape for entry in output)
        return [f"entry {number}" for number, other in enumerate(alike, start=1) if other]
    named = output if isinstance(output, Mapping) else getattr(output, "_asdict", dict)()
    return [key for key, value in named.items() if str(key).startswith("aux") and isinstance(value, Tensor)]
