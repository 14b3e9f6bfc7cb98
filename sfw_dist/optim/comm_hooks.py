"""DDP communication hooks: what happens to the gradients of a bucket while the backward pass goes on.

    ddp.register_comm_hook(optimizer, reduce_to_owner)

``reduce_to_owner`` sends each gradient only to the rank that owns the tensor, which is all that SFW needs: half of what
an all-reduce moves. After the backward pass a rank has in ``parameter.grad`` the mean gradient of what it owns, and 0
for the rest; but for one entry a bucket, which holds the norm of all that the other ranks have. So on every rank the
norm of all gradients is the global one, and is not finite where any gradient is not: ``clip_grad_norm_`` (2-norm) and
``GradScaler`` do what they do after an all-reduce. Gradients under ``no_sync`` are local, and reduced with the next.
"""

# No `from __future__ import annotations`: DDP compares a hook's annotations with the classes.
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from sfw_dist.optim.sharding.grad_reducer import Reduction

if TYPE_CHECKING:
    from sfw_dist.optim.sfw import SFW


def all_reduce(optimizer: "SFW", bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """What DDP does by itself; as a hook it lets the optimizer overlap its step with the backward pass."""
    return optimizer.receive(bucket, Reduction(to_owners=False))


def reduce_to_owner(optimizer: "SFW", bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Each gradient to its owner alone."""
    return optimizer.receive(bucket, Reduction(to_owners=True))


def reduce_to_owner_bf16(optimizer: "SFW", bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """As :func:`reduce_to_owner`, with the ranks' gradients rounded to bfloat16 on the wire.

    By gloo they are added in float32; NCCL adds them in bfloat16.
    """
    return optimizer.receive(bucket, Reduction(to_owners=True, wire_type=torch.bfloat16))
