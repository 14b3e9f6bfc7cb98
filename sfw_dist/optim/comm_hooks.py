"""DDP communication hooks that send each gradient to its owner alone, which is all that SFW needs.

    ddp.register_comm_hook(optimizer, reduce_to_owner)

This is half of what an all-reduce moves. After the backward pass a rank has in ``parameter.grad`` the mean gradient of
what it owns, and 0 for the rest, except for one entry a bucket, which holds the norm of all that the other ranks have.
So on every rank the norm of all gradients is the global one, and is not finite where any gradient is not:
``clip_grad_norm_`` (2-norm) and ``GradScaler`` work as after an all-reduce. Gradients under ``no_sync`` are local, and
reduced with the next.
"""

# No `from __future__ import annotations`: DDP compares a hook's annotations with the classes.
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from sfw_dist.optim.sfw import SFW


def reduce_to_owner(optimizer: "SFW", bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Send each gradient to its owner alone.

    Args:
        optimizer: with all parameters that DDP reduces; registered as the hook's state.
        bucket: from DDP.

    Returns:
        A future of the reduced bucket.

    Raises:
        UserError: a parameter that the optimizer does not have, or one built with ``replicate_momentum``.

    Example:
        >>> from sfw_dist import SFW, KSparsePolytope, constrain
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> net = torch.nn.Linear(3, 2)
        >>> optimizer = SFW(constrain(net, KSparsePolytope(k=2, tau=15.0)))
        >>> ddp = torch.nn.parallel.DistributedDataParallel(net)
        >>> ddp.register_comm_hook(optimizer, reduce_to_owner)
        >>> ddp(torch.ones(4, 3)).sum().backward()
        >>> optimizer.step()
        >>> dist.destroy_process_group()
    """
    return optimizer.on_bucket(bucket)


def reduce_to_owner_bf16(optimizer: "SFW", bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """As :func:`reduce_to_owner`, with the ranks' gradients rounded to bfloat16 before they are sent.

    With gloo they are added in float32; NCCL adds them in bfloat16.
    """
    return optimizer.on_bucket(bucket, communication_dtype=torch.bfloat16)
