"""Whole training steps: the loop as published against ours, interleaved in one run.

    python -m benchmarks.training
    python -m benchmarks.training --steps 20 --rounds 3 --compile --out results/training.json

As published: float32, NCHW, ImageFolder with a DataLoader of two workers, one torch.topk a tensor. Ours: bfloat16
autocast, channels_last, the loader of `data.backend: auto`, SFW. ResNet-18 on made-up JPEGs; the share of time spent
waiting for data and in the optimizer is that of the whole step.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gradients import K_FRAC, K_MIN, TAU
from benchmarks.images import MEAN, STD, image_folder_loader, make_images
from benchmarks.step import topk_per_tensor
from sfw_dist import KSparsePolytope, constrain
from sfw_dist.config import Config, DataConfig, ModelConfig, TrainConfig
from sfw_dist.data.loading import Normalize, open_loader
from sfw_dist.distributed.world import World
from sfw_dist.files import write_json
from sfw_dist.models import build_model
from sfw_dist.train.strategies.ddp import DDPStrategy

CLASSES = 10


@dataclass
class Times:
    """Seconds by step."""

    step: list[float] = field(default_factory=list)
    data: list[float] = field(default_factory=list)
    optimizer: list[float] = field(default_factory=list)


def published(raw: Path, side: int, batch: int) -> tuple[Callable[[Times], None], str]:
    model = build_model("resnet18", num_classes=CLASSES)
    groups = constrain(model, KSparsePolytope(k_frac=K_FRAC, k_min=K_MIN, tau=TAU))
    radii = [group["constraint"].radius(group["params"][0][1].numel()) for group in groups]
    parameters = list(model.parameters())
    batches = endless(lambda: image_folder_loader(raw / "train", side, batch))

    update = None

    def step(times: Times) -> None:
        nonlocal update
        began = time.perf_counter()
        images, labels = next(batches)
        fetched = time.perf_counter()
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        update = update or topk_per_tensor(parameters, radii, lr=1.0)
        computed = time.perf_counter()
        update([p.grad for p in parameters if p.grad is not None])
        ended = time.perf_counter()
        add(times, ended - began, fetched - began, ended - computed)

    return step, "as published: fp32, NCHW, ImageFolder, torch.topk"


def ours(data: DataConfig, precision: str, compiled: bool) -> tuple[Callable[[Times], None], str]:
    config = Config(
        name="benchmark",
        data=data,
        model=ModelConfig("resnet18"),
        train=TrainConfig(precision=precision, channels_last=True, compile=compiled),  # type: ignore[arg-type]
    )
    strategy = DDPStrategy(build_model("resnet18", num_classes=CLASSES), config, World(0, 1, 0, torch.device("cpu")))
    loader = open_loader(data, "train", seed=0)
    normalize = Normalize(MEAN, STD)
    batches = endless(lambda: loader)
    in_optimizer: list[float] = []
    strategy.optimizer.register_step_pre_hook(lambda *_: in_optimizer.append(-time.perf_counter()))
    strategy.optimizer.register_step_post_hook(lambda *_: in_optimizer.append(time.perf_counter()))

    def step(times: Times) -> None:
        in_optimizer.clear()
        began = time.perf_counter()
        images, labels = next(batches)
        fetched = time.perf_counter()
        strategy.train_step(normalize(images), labels)
        add(times, time.perf_counter() - began, fetched - began, sum(in_optimizer))

    what = f"ours: {precision}, channels_last, {loader.description.partition(',')[0]}, SFW"
    return step, what + (", compiled" if compiled else "")


def endless(open_epochs: Callable[[], object]) -> Iterator[tuple[Tensor, Tensor]]:
    loader = open_epochs()
    for number in itertools.count():
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(number)
        yield from loader  # type: ignore[misc]


def add(times: Times, step: float, data: float, optimizer: float) -> None:
    times.step.append(step)
    times.data.append(data)
    times.optimizer.append(optimizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4_000, help="training images (default: 4000)")
    parser.add_argument("--side", type=int, default=64, help="their side in pixels (default: 64)")
    parser.add_argument("--batch", type=int, default=128, help="batch size (default: 128)")
    parser.add_argument("--steps", type=int, default=5, help="steps of each loop a round (default: 5)")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds (default: 3)")
    parser.add_argument("--compile", action="store_true", help="add ours with torch.compile")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        raw = make_images(Path(folder), options.images, options.side, CLASSES)
        data = DataConfig(
            "imagefolder", folder, batch_size=options.batch, crop_padding=4, flip=True, validation_fraction=0
        )
        loops = [published(raw, options.side, options.batch), ours(data, "fp32", False), ours(data, "bf16", False)]
        if options.compile:
            loops.append(ours(data, "bf16", True))
        times = {what: Times() for _, what in loops}
        for round_ in range(options.rounds + 1):
            for step, what in loops:
                for _ in range(options.steps if round_ else 2):  # the first round warms up
                    step(times[what] if round_ else Times())

    rates = {what: options.batch * len(t.step) / sum(t.step) for what, t in times.items()}
    base = next(iter(rates.values()))
    cores = len(os.sched_getaffinity(0))
    print(f"ResNet-18, {options.side}×{options.side}, batch {options.batch}, {cores} cores, torch {torch.__version__}, "
          f"n = {options.rounds} × {options.steps} steps")  # fmt: skip
    print(f"{'loop':52} {'images/s':>9} {'ratio':>6} {'step ms':>8} {'data %':>7} {'optimizer %':>12}")
    for what, t in times.items():
        total = sum(t.step)
        shares = 100 * sum(t.data) / total, 100 * sum(t.optimizer) / total
        print(f"{what:52} {rates[what]:9.1f} {rates[what] / base:6.2f} {1e3 * statistics.median(t.step):8.0f} "
              f"{shares[0]:7.2f} {shares[1]:12.2f}")  # fmt: skip
    if options.out:
        write_json(
            options.out,
            {
                "model": "resnet18",
                "side": options.side,
                "batch": options.batch,
                "cores": cores,
                "machine": platform.machine(),
                "torch": torch.__version__,
                "images_per_second": rates,
                "seconds": {what: asdict(t) for what, t in times.items()},
            },
        )


if __name__ == "__main__":
    main()
