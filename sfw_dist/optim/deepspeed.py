"""SFW under DeepSpeed's ZeRO, stages 0 to 2.

    optimizer = SFW(constrain(net, KSparsePolytope(k_frac=0.05, k_min=10, tau=15.0)))
    engine = initialize(net, optimizer, {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 64})
    engine.backward(F.cross_entropy(engine(images), labels))
    engine.step()

ZeRO gives the optimizer a slice of all tensors laid end to end, in which a tensor may begin or end anywhere;
:func:`adopt` tells SFW where (:mod:`sfw_dist.optim.sharding.zero`). From equal gradients the weights are those of one
process. DeepSpeed differs from DDP: a parameter without gradient gets one of 0, which updates its
momentum; a gradient that is not finite skips the step, on all ranks; frozen parameters have no momentum. Its ``bf16``
rounds all parameters, which BatchNorm refuses because its statistics are float32: use
``torch_autocast`` for such networks.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import SGD

from sfw_dist.errors import needs_extra
from sfw_dist.optim.sfw import SFW
from sfw_dist.optim.sharding.zero import gather_tensors, groups_of, load_tensors, private, verify, whole

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed looks for its device when it is imported
with needs_extra("engine deepspeed", "deepspeed"):
    import deepspeed

__all__ = ["adopt", "gather_tensors", "initialize", "load_tensors", "refuse"]


def initialize(model: nn.Module, optimizer: SFW | SGD, config: Mapping[str, Any] | str | Path, **options: Any) -> Any:
    """``deepspeed.initialize`` for a model that SFW trains; collective.

    Sets what SFW needs: ``zero_allow_untested_optimizer``, and no gradient clipping where the configuration does not
    ask for it (DeepSpeed's own default is 1.0). Build learning-rate schedulers
    after it, because it merges param groups.

    Args:
        model: not wrapped; rank 0's parameters are what training starts from.
        optimizer: with all parameters that are to be trained. SGD, for comparison, is taken too.
        config: DeepSpeed's configuration, or the file that holds it.
        options: further arguments of ``deepspeed.initialize``.

    Returns:
        DeepSpeed's engine.

    Raises:
        ValueError: what does not go with SFW, see :func:`refuse`.
        RuntimeError: this version of DeepSpeed lays out its partitions in another way.
    """
    config = json.loads(Path(config).read_text()) if isinstance(config, str | Path) else copy.deepcopy(dict(config))
    config.setdefault("gradient_clipping", 0.0)
    config["zero_allow_untested_optimizer"] = True
    refuse(config)
    if options.get("mpu") is not None:
        raise ValueError("mpu is given: SFW needs whole tensors in every model replica, leave model parallelism out")
    if _stage(config) > 0:
        if isinstance(optimizer, SFW):
            optimizer.merge_param_groups()  # ZeRO steps group by group, each waiting for messages
        # DeepSpeed leaves frozen parameters out, and fails on a group that has no others.
        groups = [group for group in optimizer.param_groups if any(p.requires_grad for p in group["params"])]
        if not groups:
            raise ValueError("all parameters are frozen: leave requires_grad=True on what is to be trained")
        optimizer.param_groups[:] = groups
    _join_world()
    with _quiet():
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config, **options)[0]
    if isinstance(optimizer, SFW):
        adopt(engine)
    return engine


def refuse(config: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for settings of DeepSpeed with which SFW's steps would be wrong or are not tried."""
    zero, amp = _zero(config), config.get("torch_autocast", {})
    bf16, stage = config.get("bf16", config.get("bfloat16", {})), _stage(config)
    offload = zero.get("offload_optimizer") or {}
    if stage not in (0, 1, 2):
        raise ValueError(f"zero_optimization.stage {stage}: write 2, or divide parameters too with torch's fully_shard")
    if config.get("fp16", {}).get("enabled"):
        raise ValueError('fp16.enabled true: SFW is not made for loss scaling, write "bf16": {"enabled": true}')
    if stage == 0 and bf16.get("enabled"):
        raise ValueError("bf16.enabled true at zero_optimization.stage 0, which adds gradients in bf16: write stage 1")
    if bf16.get("bf16_master_weights_and_grads"):
        raise ValueError("bf16.bf16_master_weights_and_grads true: SFW steps float32 weights, leave it out")
    if amp.get("enabled") and amp.get("dtype") not in ("bfloat16", "bf16", "torch.bfloat16"):
        raise ValueError(f'torch_autocast.dtype {amp.get("dtype")}: write "dtype": "bfloat16"')
    if zero.get("cpu_offload") or offload.get("device", "none") != "none":
        raise ValueError("zero_optimization.offload_optimizer: SFW steps where the model is, leave it out")
    if zero.get("zenflow"):
        raise ValueError("zero_optimization.zenflow: SFW steps whole tensors at once, leave it out")
    if config.get("tensor_parallel", {}).get("autotp_size", 0) > 1:
        raise ValueError("tensor_parallel.autotp_size: SFW needs whole tensors in every model replica, leave it out")
    if "gradient_clipping" not in config:
        raise ValueError('DeepSpeed clips gradients to norm 1.0 unless told: write "gradient_clipping": 0.0')


@torch.no_grad()
def adopt(engine: Any) -> None:
    """Tell an engine's SFW which entries of which tensors this rank has; collective, once, before the first step.

    :func:`initialize` does it. For ``deepspeed.initialize(model=…, optimizer=optimizer, config=…)`` call
    ``optimizer.merge_param_groups()`` before it, so that tensors share their messages, and this after it.
    Tensors that rounding to bf16 took out of their set are scaled into it.

    Raises:
        ValueError: what does not go with SFW, see :func:`refuse`; an optimizer that is not SFW.
        RuntimeError: this version of DeepSpeed lays out its partitions in another way.
    """
    optimizer = private(engine, "basic_optimizer")
    if not isinstance(optimizer, SFW):
        raise ValueError(f"the engine's optimizer is {type(optimizer).__name__}: give deepspeed.initialize an SFW")
    refuse(private(private(engine, "_config"), "_param_dict"))
    if private(engine, "mp_world_size") > 1 or private(engine, "has_moe_layers"):
        raise ValueError("model parallelism or experts: SFW needs whole tensors in every model replica, leave them out")
    if engine.optimizer is optimizer:
        return  # stage 0: every rank has whole tensors, which SFW divides by itself
    groups, process_group = groups_of(engine), private(engine.optimizer, "dp_process_group")
    for parameter, segment in (
        (p, s) for group in groups for p, s in zip(group.parameters, group.segments, strict=True)
    ):
        if parameter.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"{segment.name} is {parameter.dtype}, which ZeRO trains in float32: write model.float()")
    verify(groups, process_group)
    outside = False
    for group in groups:
        for parameter, segment in zip(group.parameters, group.segments, strict=True):
            if parameter.dtype == torch.float32:
                continue  # SFW has scaled it, and nothing has rounded it since
            entries = group.entries(segment, group.master)
            gauge = segment.constraint.gauge(whole(segment, entries, process_group))
            if gauge > 1:
                entries.copy_(entries.double() / gauge)
                outside = True  # on every rank, for all have seen the whole tensor
    if outside:
        engine.optimizer.update_lp_params()
    optimizer.adopt({i: group.segments for i, group in enumerate(groups)}, process_group)


def _zero(config: Mapping[str, Any]) -> Mapping[str, Any]:
    zero = config.get("zero_optimization", {})
    return {"stage": int(zero)} if isinstance(zero, bool) else zero


def _stage(config: Mapping[str, Any]) -> int:
    return int(_zero(config).get("stage", 0))


def _join_world() -> None:
    """What DeepSpeed needs of the world: a process group, and to forget that of an earlier training in this process."""
    if deepspeed.get_accelerator().device_name() == "cpu":
        # Its shared-memory op is for tensor-parallel inference alone, and takes half a minute to compile.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It insists on this, and takes the device of that number. Launchers other than torchrun may not set it.
    os.environ.setdefault("LOCAL_RANK", str(torch.cuda.current_device() if torch.cuda.is_available() else 0))
    if dist.is_initialized():
        return
    private(deepspeed.utils.groups, "_release_process_group_references")()
    if "RANK" not in os.environ:  # else DeepSpeed joins torchrun's world
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's own name need not resolve
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that SFW is not on DeepSpeed's list, and without what it prints of its memory."""
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
