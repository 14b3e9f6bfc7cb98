"""Train CLIP's vision transformer, a small one, with SFW in Hugging Face's Trainer, then prune to several sparsities.

    python examples/trainer_digits.py
    torchrun --nproc-per-node 2 examples/trainer_digits.py
    python examples/trainer_digits.py --resume runs/trainer_digits/checkpoint-220

SFW is the first of Trainer's ``optimizers``; Trainer's own schedule sets the learning rate. With several processes
Trainer reads the optimizer's state on one of them only: with ``replicate_momentum`` each process holds all of it.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence

from digits import SPARSITIES, digits
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from sfw_dist import SFW, KSparsePolytope, constrain, sweep


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument("--folder", default="runs/trainer_digits", help="where checkpoints go")
    parser.add_argument("--resume", metavar="CHECKPOINT", help="continue from this folder")
    args = parser.parse_args(arguments)

    set_seed(args.seed)
    options = TrainingArguments(
        args.folder,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=64,
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        save_strategy="epoch",
        logging_strategy="epoch",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=args.bf16,
        seed=args.seed,
    )
    train, test = digits()
    vision = {
        "image_size": 8,
        "patch_size": 4,
        "num_channels": 1,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    net = CLIPForImageClassification(CLIPConfig(vision_config=vision, num_labels=10))
    sparse = KSparsePolytope(k_frac=0.02, k_min=10, tau=5.0)
    # CLIP begins some tensors smaller than its layers' initializers would; sets of that size stand less pruning here.
    groups = constrain(net, sparse, unconstrained="norm_and_bias", norm="initializer")
    groups[-1]["lr"] = 0.02  # for normalisation layers and biases, which momentum SGD trains
    optimizer = SFW(groups, lr=0.01, rescale="none", replicate_momentum=True)
    trainer = Trainer(
        net,
        options,
        train_dataset=[{"pixel_values": image, "labels": label} for image, label in train],
        optimizers=(optimizer, None),
    )
    trainer.train(resume_from_checkpoint=args.resume)
    for point in sweep(net, [test.tensors], SPARSITIES):  # on all processes together
        if trainer.is_world_process_zero():
            print(f"sparsity {point.sparsity:.2f}: accuracy {point.metrics['top1']:.3f}")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
    gc.collect()  # ends the threads of gloo's process groups now: at exit they could abort the interpreter
