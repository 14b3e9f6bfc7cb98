"""Train a small GPT on characters with SFW under DistributedDataParallel, then prune without retraining.

    torchrun --nproc-per-node 2 examples/gpt_text.py
    python examples/gpt_text.py --steps 200
    torchrun --nproc-per-node 2 examples/gpt_text.py --resume runs/gpt_text/step_200.pt

The text is this repository's manual. A loop as in many GPT scripts: one learning rate is written into every group, rank
0 saves alone, and the embedding is also the output layer. So the group of norms and biases has a ``lr_factor``, and SFW
``replicate_momentum``.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from digits import SPARSITIES
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from sfw_dist import SFW, KSparsePolytope, constrain, sweep

CONTEXT, WIDTH, HEADS, LAYERS = 64, 64, 4, 2
BATCH, MICRO_BATCHES = 32, 2  # sequences of a step on all ranks, in so many parts


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    def __init__(self, characters: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(characters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, characters, bias=False)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.1)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def text() -> tuple[Tensor, Tensor, int]:
    """The manual's characters as int64 numbers, for training and for validation, and how many differ."""
    pages = sorted((Path(__file__).parents[1] / "docs").rglob("*.md"))
    characters = "".join(page.read_text(encoding="utf-8") for page in pages)
    known = {character: number for number, character in enumerate(sorted(set(characters)))}
    data = torch.tensor([known[character] for character in characters])
    return data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :], len(known)


def batch(data: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Sequences and, one character later, what is to be predicted; the same for the same ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(data) - CONTEXT, (size,), generator=generator)
    rows = data[starts[:, None] + torch.arange(CONTEXT + 1)]
    return rows[:, :-1], rows[:, 1:]


def loss_of(logits: Tensor, following: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), following.flatten())


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    model.eval()
    losses = [loss_of(model(tokens), following).item() for tokens, following in batches]
    model.train()
    return sum(losses) / len(losses)


def learning_rate(step: int, steps: int, highest: float) -> float:
    """A linear warm-up, then a cosine down to a tenth."""
    warm_up = steps // 10
    if step < warm_up:
        return highest * (step + 1) / (warm_up + 1)
    return highest * (0.55 + 0.45 * math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--interval", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=3.0)
    parser.add_argument("--folder", type=Path, default=Path("runs/gpt_text"), help="where checkpoints go")
    parser.add_argument("--resume", metavar="CHECKPOINT", type=Path, help="continue from this file")
    args = parser.parse_args(arguments)

    parallel = "RANK" in os.environ
    if parallel:
        dist.init_process_group("gloo")
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if parallel else (0, 1)
    train, validation, characters = text()
    torch.manual_seed(args.seed)
    net = GPT(characters)
    groups = constrain(net, KSparsePolytope(k_frac=0.1, k_min=10, tau=10.0), unconstrained="norm_and_bias")
    groups[-1]["lr_factor"] = 0.03  # for normalisation layers and biases, which momentum SGD trains
    optimizer = SFW(groups, lr=args.lr, replicate_momentum=True)
    start = 0
    if args.resume:
        checkpoint = torch.load(args.resume, weights_only=True)
        net.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        start = checkpoint["step"]
    model = DistributedDataParallel(net) if parallel else net

    args.folder.mkdir(parents=True, exist_ok=True)
    test = [batch(validation, 64, number) for number in range(4)]
    for step in range(start, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        for part in range(MICRO_BATCHES):
            last = part == MICRO_BATCHES - 1
            with nullcontext() if last or not parallel else model.no_sync():
                number = ((args.seed * args.steps + step) * MICRO_BATCHES + part) * ranks + rank
                tokens, following = batch(train, BATCH // MICRO_BATCHES // ranks, number)
                loss = loss_of(model(tokens), following)
                (loss / MICRO_BATCHES).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = step + 1
        if rank == 0 and (done % args.interval == 0 or done == args.steps):
            print(f"step {done}: loss {loss.item():.3f}, validation {mean_loss(net, test):.3f}")
            state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "step": done}
            torch.save(state, args.folder / f"step_{done}.pt")

    for point in sweep(net, test, SPARSITIES, metric=loss_of):  # on all ranks together
        if rank == 0:
            print(f"sparsity {point.sparsity:.2f}: loss {point.metrics['loss_of']:.3f}")
    if parallel:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
    gc.collect()  # ends the threads of gloo's process groups now: at exit they could abort the interpreter
