"""Train with SFW in Accelerate over PyTorch's FSDP2, gathering gradients over several batches, then prune.

    torchrun --nproc-per-node 2 examples/accelerate_fsdp_digits.py
    torchrun --nproc-per-node 2 examples/accelerate_fsdp_digits.py --resume runs/accelerate_fsdp_digits/epoch_9

SFW is built on the whole network, as Accelerate asks; ``prepare`` shards the network and replaces the parameters in the
optimizer's groups. SFW follows at its next step.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DataLoaderConfiguration, DistributedType, set_seed
from digits import SPARSITIES, digits
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from sfw_dist import SFW, KSparsePolytope, constrain, sweep


def network() -> nn.Sequential:
    """Two transformer layers; the rows of an image are the tokens."""
    layers = [nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, norm_first=True) for _ in range(2)]
    return nn.Sequential(
        nn.Flatten(1, 2), nn.Linear(8, 64), *layers, nn.Flatten(), nn.LayerNorm(512), nn.Linear(512, 10)
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", default="no", help="or bf16")
    parser.add_argument("--folder", default="runs/accelerate_fsdp_digits", help="where checkpoints go")
    parser.add_argument("--resume", metavar="CHECKPOINT", type=Path, help="continue from this folder")
    args = parser.parse_args(arguments)

    set_seed(args.seed)
    # The order of the data depends on seed and epoch alone, so that a resumed run equals one that was not interrupted.
    ordered = DataLoaderConfiguration(use_seedable_sampler=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["TransformerEncoderLayer"],
        state_dict_type="SHARDED_STATE_DICT",
    )
    accelerator = Accelerator(
        cpu=True,
        mixed_precision=args.precision,
        gradient_accumulation_steps=2,
        dataloader_config=ordered,
        fsdp_plugin=plugin,
    )
    if accelerator.num_processes > 1:  # what Accelerate does by itself for GPUs only; FSDP takes CPUs too
        accelerator.state.fsdp_plugin = plugin
        for state in (PartialState(), accelerator.state):
            state.distributed_type = DistributedType.FSDP
    train, test = digits()
    net = network()
    groups = constrain(net, KSparsePolytope(k_frac=0.02, k_min=10, tau=5.0), unconstrained="norm_and_bias")
    groups[-1]["lr"] = 0.02  # for normalisation layers and biases, which momentum SGD trains
    optimizer = SFW(groups, lr=0.003, rescale="none")
    loader = DataLoader(train, batch_size=32 // accelerator.num_processes, shuffle=True)
    # Accelerate advances the schedule once for each process, at steps of the optimizer alone.
    schedule = CosineAnnealingLR(optimizer, args.epochs * len(loader) // accelerator.gradient_accumulation_steps)
    model, optimizer, loader, schedule = accelerator.prepare(net, optimizer, loader, schedule)

    start = 0
    if args.resume:
        accelerator.load_state(str(args.resume))
        start = int(args.resume.name.removeprefix("epoch_")) + 1
    for epoch in range(start, args.epochs):
        model.train()
        loader.set_epoch(epoch)
        for images, labels in loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(images), labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        accelerator.print(f"epoch {epoch}: loss {loss.item():.3f}, learning rate {schedule.get_last_lr()[0]:.4f}")
        accelerator.save_state(f"{args.folder}/epoch_{epoch}")

    for point in sweep(model, [test.tensors], SPARSITIES):  # on all processes together, each with its shards
        accelerator.print(f"sparsity {point.sparsity:.2f}: accuracy {point.metrics['top1']:.3f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
    gc.collect()  # ends the threads of gloo's process groups now: at exit they could abort the interpreter
