"""The fields of a run's configuration, their defaults and their domains.

A value outside its field's domain raises :class:`~sfw_dist.errors.UserError` with the key, the value and the remedy.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from sfw_dist.config.check import require as _require
from sfw_dist.config.constraint import ConstraintConfig
from sfw_dist.config.training_methods import CramConfig, GMPConfig, InitConfig, KScheduleConfig, SampledConfig
from sfw_dist.files import user_path
from sfw_dist.optim.update import Rescale
from sfw_dist.pruning import PAPER_SPARSITIES, PruningOptions


def _at_home(path: str) -> str:
    """The path with ``~`` replaced: no shell sees those of a file, nor of ``--data.root=~/data``."""
    return str(user_path(path)) if path.startswith("~") else path


@dataclass
class DataConfig:
    """The data set and how its batches are made."""

    name: str = "digits"
    """Data set: the name of a prepared one (digits, mnist, fashion_mnist, cifar10, cifar100, svhn, tiny_imagenet,
    imagefolder or your own), or package.module:function, which returns its parts."""
    root: str = "data"
    """Folder that holds the prepared data sets; made if it is missing."""
    backend: Literal["auto", "ffcv", "ram", "gpu", "folder"] = "auto"
    """What reads the samples, all alike: ffcv, ram (a shared memory map, a compiled kernel), gpu (the whole set
    on the device), folder (the image files). auto: ffcv where it passes a probe, else ram. Sets that are stored as
    JPEGs take ffcv or ram, whose decoders round differently."""
    batch_size: int = 128
    """Global training batch, split evenly over the ranks."""
    eval_batch_size: int = 256
    """Evaluation batch of one rank."""
    validation_fraction: float = 0.1
    """Fraction of the training set held out for validation, in [0, 1)."""
    workers: int = 0
    """Loader threads of one rank, at most its share of the available cores; 0 for all of that share."""
    stall_timeout: float = 300.0
    """Seconds without a batch after which the run ends with an error, to be resumed."""
    stage_dir: str | None = None
    """Folder on a disk of each node, to which the data set is copied first."""
    crop_padding: int = 0
    """Pixels of zero padding before a random crop; 0 does not crop."""
    flip: bool = False
    """Flip half of the training images left to right."""
    cutout: int = 0
    """Side in pixels of a black square at a random place of each training image; 0 for none."""
    random_resized_crop: float = 0.0
    """Least area, in (0, 1], of a random box that is scaled to the full size, instead of crop_padding; 0 for none."""
    mixup: float = 0.0
    """α of the Beta distribution that training images are mixed by, pair by pair; 0 for none."""
    cutmix: float = 0.0
    """α of the Beta distribution of the area pasted from another image; with mixup too, each in half of the steps."""
    label_smoothing: float = 0.0
    """Part of each training label, in [0, 1), that is spread over all classes."""

    def __post_init__(self) -> None:
        self.root = _at_home(self.root)
        self.stage_dir = _at_home(self.stage_dir) if self.stage_dir else self.stage_dir
        _require(self.batch_size > 0, "data.batch_size", self.batch_size, "at least 1", "write 128")
        _require(self.eval_batch_size > 0, "data.eval_batch_size", self.eval_batch_size, "at least 1", "write 256")
        _require(
            0 <= self.validation_fraction < 1,
            "data.validation_fraction",
            self.validation_fraction,
            "in [0, 1)",
            "write 0.1 for 10 %",
        )
        _require(self.workers >= 0, "data.workers", self.workers, "at least 0", "write 0 to use the available cores")
        _require(self.crop_padding >= 0, "data.crop_padding", self.crop_padding, "at least 0", "write 4 or 0")
        _require(self.stall_timeout > 0, "data.stall_timeout", self.stall_timeout, "> 0 seconds", "write 300")
        _require(self.cutout >= 0, "data.cutout", self.cutout, "at least 0", "write 8 for 32×32 images, or 0")
        least = self.random_resized_crop
        _require(0 <= least <= 1, "data.random_resized_crop", least, "in [0, 1]", "write 0.25, or 0 for none")
        _require(
            not (least and self.crop_padding),
            "data.crop_padding",
            self.crop_padding,
            "0 with data.random_resized_crop",
            "leave one of them out",
        )
        _require(0 <= self.mixup < math.inf, "data.mixup", self.mixup, "at least 0", "write 0.2, or 0 for none")
        _require(0 <= self.cutmix < math.inf, "data.cutmix", self.cutmix, "at least 0", "write 1.0, or 0 for none")
        smoothing = self.label_smoothing
        _require(0 <= smoothing < 1, "data.label_smoothing", smoothing, "in [0, 1)", "write 0.1, or 0 for none")


@dataclass
class ModelConfig:
    """The network."""

    name: str = "cnn"
    """cnn, cnn5, resnet18, vgg16; torchvision/NAME or timm/NAME for a classifier of theirs; or package.module:function,
    a function of num_classes and in_channels that returns your own."""
    width: float = 1.0
    """Factor on the channel counts of our own networks."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Other arguments of a network of torchvision or timm, or of your own function: {img_size: 32}."""
    pretrained: bool | str = False
    """Weights to start from: true for those that torchvision or timm publish, or the path of a safetensors file, such
    as another run's model.safetensors. A head for another number of classes begins anew."""

    def __post_init__(self) -> None:
        if isinstance(self.pretrained, str):
            domain, remedy = "true, false or a path", "leave it out for new weights"
            _require(bool(self.pretrained), "model.pretrained", repr(self.pretrained), domain, remedy)
            self.pretrained = _at_home(self.pretrained)
        _require(self.width > 0, "model.width", self.width, "> 0", "write 1.0 for the published width")


@dataclass
class OptimizerConfig:
    """The optimizer: SFW, or a baseline."""

    name: Literal["sfw", "sgd", "adagrad_sfw", "projected_sgd"] = "sfw"
    """sfw: stochastic Frank-Wolfe; sgd: torch.optim.SGD; adagrad_sfw: Frank-Wolfe in AdaGrad's metric; projected_sgd:
    SGD with a projection onto the set after each step. All but sgd have the constraint."""
    lr: float = 1.0
    """Initial learning rate η; the paper's SFW takes 1.0, SGD about 0.05, AdaGrad's SFW 0.01."""
    momentum: float = 0.9
    """Momentum ρ in [0, 1)."""
    rescale: Rescale = "gradient"
    """How the learning rate is turned into a step size γ (sfw; docs/explanation/algorithm.md)."""
    weight_decay: float = 0.0
    """L2 penalty: of all tensors for sgd and projected_sgd, of the unconstrained ones for sfw and adagrad_sfw."""
    constraint: ConstraintConfig = field(default_factory=ConstraintConfig)
    """The constraint set (all but sgd); one with a projection for projected_sgd."""
    k_schedule: KScheduleConfig = field(default_factory=KScheduleConfig)
    """K over the training (k_sparse, k_support)."""
    unconstrained: Literal["none", "norm_and_bias"] = "none"
    """Which tensors are left unconstrained and trained by momentum SGD (all but sgd)."""
    unconstrained_lr: float = 0.05
    """Initial learning rate of those tensors."""
    grads: Literal["all_reduce", "reduce_to_owner", "reduce_to_owner_bf16"] = "all_reduce"
    """To whom gradients go: all ranks, or for sfw only the tensor's owner, which moves half
    (docs/explanation/distributed.md)."""

    def __post_init__(self) -> None:
        remedy = "write 1.0 for sfw, 0.05 for sgd or 0.01 for adagrad_sfw"
        _require(0 < self.lr < math.inf, "optimizer.lr", self.lr, "> 0", remedy)
        _require(self.unconstrained_lr > 0, "optimizer.unconstrained_lr", self.unconstrained_lr, "> 0", "write 0.05")
        _require(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "in [0, 1)", "write 0.9")
        _require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "at least 0", "write 0.0005 or 0")
        plain = self.name == "sfw" or self.grads == "all_reduce"
        _require(plain, "optimizer.grads", self.grads, "all_reduce without sfw", "leave it out")
        if self.k_schedule.kind != "none":
            self._check_k_schedule()
        if self.name == "projected_sgd":
            given = f"{self.constraint.set} ({self.constraint.build()!r})"
            domain = "a set with a projection for projected_sgd"
            remedy = "write set: lp and p: 2"
            _require(self.constraint.has_projection, "optimizer.constraint.set", given, domain, remedy)

    def _check_k_schedule(self) -> None:
        context = f" with k_schedule.kind: {self.k_schedule.kind}"
        none = "or optimizer.k_schedule.kind: none"
        chosen, radius = self.constraint.set, self.constraint.radius
        constrained = self.name in ("sfw", "adagrad_sfw")
        _require(constrained, "optimizer.name", self.name, "sfw or adagrad_sfw" + context, f"write sfw, {none}")
        domain = "a set whose K counts entries" + context
        schedules = self.constraint.schedules_k
        _require(schedules, "optimizer.constraint.set", chosen, domain, f"write k_sparse, {none}")
        domain = "absent" + context + ", which keeps the diameter"
        _require(radius is None, "optimizer.constraint.radius", radius, domain, f"write diameter or tau, {none}")


@dataclass
class ScheduleConfig:
    """The learning rate over the epochs."""

    kind: Literal["steps", "cosine", "constant"] = "steps"
    """steps: times gamma at each milestone (the paper's); cosine: to zero at the end."""
    milestones: list[float] = field(default_factory=lambda: [1 / 3, 2 / 3])
    """Fractions of the training after which the rate is multiplied by gamma."""
    gamma: float = 0.1
    """Factor at each milestone."""
    dynamic: bool = True
    """On top: ×0.7 when the mean loss of the last 5 epochs exceeds that of the last 10, ×1.06 when it is below."""

    def __post_init__(self) -> None:
        for milestone in self.milestones:
            _require(0 < milestone < 1, "schedule.milestones", milestone, "fractions in (0, 1)", "write [0.333, 0.667]")
        _require(self.gamma > 0, "schedule.gamma", self.gamma, "> 0", "write 0.1")


@dataclass
class TrainConfig:
    """The training loop."""

    epochs: int = 180
    """Passes over the training set."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: the forward pass under torch.autocast; parameters stay fp32."""
    channels_last: bool = False
    """Keep the network in channels_last memory format."""
    compile: bool = False
    """Compile the network with torch.compile."""
    accumulate: int = 1
    """Micro-batches a step: a rank's part of the batch goes through the network in so many parts, to save memory."""
    log_every: int = 20
    """Steps between two train records."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept, in addition to the best one."""
    verify_replicas: int = 0
    """Steps between two checks that all ranks hold the same bits; 0: none."""

    def __post_init__(self) -> None:
        _require(self.epochs > 0, "train.epochs", self.epochs, "at least 1", "write 180 for the published length")
        _require(self.accumulate > 0, "train.accumulate", self.accumulate, "at least 1", "write 1 for one pass a step")
        _require(self.log_every > 0, "train.log_every", self.log_every, "at least 1", "write 20")
        _require(self.verify_replicas >= 0, "train.verify_replicas", self.verify_replicas, "at least 0", "write 100")
        _require(self.keep_checkpoints > 0, "train.keep_checkpoints", self.keep_checkpoints, "at least 1", "write 2")


@dataclass
class FSDPConfig:
    """Fully sharded data parallelism (engine: fsdp)."""

    replicas: int = 1
    """Copies of the network, each divided between world size / replicas ranks; 1: one copy between all of them."""

    def __post_init__(self) -> None:
        _require(self.replicas > 0, "fsdp.replicas", self.replicas, "at least 1", "write 1 to divide between all ranks")


@dataclass
class DeepSpeedConfig:
    """DeepSpeed's ZeRO (engine: deepspeed)."""

    stage: Literal[0, 1, 2, 3] = 1
    """What the ranks divide: 1 the optimizer's state, 2 the gradients too; 0 nothing."""

    def __post_init__(self) -> None:
        remedy = "write 2, or engine: fsdp, which divides the parameters too"
        _require(self.stage < 3, "deepspeed.stage", self.stage, "0, 1 or 2", remedy)


@dataclass(frozen=True)
class PruneConfig(PruningOptions):
    """The one-shot pruning of the trained network: how, and to which sparsities."""

    sparsities: list[float] = field(default_factory=lambda: [0.0, *PAPER_SPARSITIES])
    """Fractions removed; 0 is the dense network. The default is the paper's 18, and dense; granularity 2:4 takes 0.5
    alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for sparsity in self.sparsities:
            _require(0 <= sparsity < 1, "prune.sparsities", sparsity, "in [0, 1)", "write 0.9 to remove 90 %")

    @property
    def measured_sparsities(self) -> list[float]:
        """The sparsities that are measured where no list is given."""
        return self.default_sparsities(self.sparsities)


@dataclass
class Config:
    """A training run."""

    name: str
    """The run's name: its folder is runs_dir/name."""
    runs_dir: str = "runs"
    """Folder of all runs."""
    seed: int = 0
    """Seed of the initial weights, the order and the augmentation."""
    engine: Literal["ddp", "fsdp", "deepspeed"] = "ddp"
    """ddp: the whole network on every rank; fsdp, deepspeed: divided between them (docs/how-to/fsdp-deepspeed.md)."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    init: InitConfig = field(default_factory=InitConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    method: Literal["plain", "sampled", "gmp", "cram"] = "plain"
    """plain: the optimizer's steps only; sampled: each step trains the network pruned to a sparsity drawn for it, or
    dense; gmp: gradual magnitude pruning while SGD trains; cram: compression-aware minimization, two gradients a step
    (docs/explanation/training-methods.md)."""
    sampled: SampledConfig = field(default_factory=SampledConfig)
    gmp: GMPConfig = field(default_factory=GMPConfig)
    cram: CramConfig = field(default_factory=CramConfig)
    fsdp: FSDPConfig = field(default_factory=FSDPConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)

    def __post_init__(self) -> None:
        self.runs_dir = _at_home(self.runs_dir)
        plain = Path(self.name).name == self.name and self.name not in {"", ".", ".."}
        valid = plain and self.name.isprintable() and len(self.name) <= 100
        _require(valid, "name", repr(self.name), "a plain folder name", "write letters, digits, '_', '-' and '.'")
        _require(self.seed >= 0, "seed", self.seed, "at least 0", "write 0")
        if self.init.steps:
            name, kind = self.optimizer.name, self.optimizer.k_schedule.kind
            _require(name == "sfw", "init.steps", self.init.steps, f"0 with optimizer.name: {name}", "leave it out")
            _require(kind == "none", "optimizer.k_schedule.kind", kind, "none with init.steps", "leave one out")
            start = self.model.pretrained
            _require(
                not start, "model.pretrained", start, "false with init.steps, which scales new weights", "leave one out"
            )
        self._check_method()
        if self.engine != "ddp":
            self._check_sharded()

    def _check_method(self) -> None:
        """A sparse-training method needs every gradient on every rank, and an optimizer it was tried with."""
        if self.method == "plain":
            return
        context = f" with method: {self.method}"
        trained, gathered = self.optimizer.name, self.optimizer.grads
        tried = ("sgd",) if self.method == "gmp" else ("sgd", "sfw")
        domain = " or ".join(tried) + context
        _require(trained in tried, "optimizer.name", trained, domain, "write sgd and its lr, or method: plain")
        _require(gathered == "all_reduce", "optimizer.grads", gathered, "all_reduce" + context, "leave it out")

    def _check_sharded(self) -> None:
        """Refuse settings that need the whole network, or all of its gradients, on every rank."""
        context = f" with engine: {self.engine}"
        remedy = "leave it out, or write engine: ddp"
        optimizer = self.optimizer.name
        _require(optimizer in ("sfw", "sgd"), "optimizer.name", optimizer, "sfw or sgd" + context, "write engine: ddp")
        _require(self.method == "plain", "method", self.method, "plain" + context, remedy)
        if self.engine == "deepspeed":
            kind = self.optimizer.k_schedule.kind
            _require(kind == "none", "optimizer.k_schedule.kind", kind, "none" + context, remedy + " or fsdp")
        _require(
            self.optimizer.grads == "all_reduce",
            "optimizer.grads",
            self.optimizer.grads,
            "all_reduce" + context,
            remedy,
        )
        chosen = self.optimizer.constraint.set
        divides = optimizer != "sfw" or self.optimizer.constraint.divisible
        _require(
            divides,
            "optimizer.constraint.set",
            chosen,
            "a set whose LMO can be computed on shards" + context,
            "write engine: ddp",
        )
        _require(not self.train.channels_last, "train.channels_last", True, "false" + context, remedy)
        _require(not self.train.compile, "train.compile", True, "false" + context, remedy)

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name


_OPERATIONAL = {
    *("engine", "fsdp.replicas", "deepspeed.stage"),
    *("runs_dir", "data.root", "data.backend", "data.workers", "data.eval_batch_size", "data.stall_timeout"),
    "data.stage_dir",
    "train.verify_replicas",
    *("train.log_every", "train.keep_checkpoints"),
    *(f"prune.{field.name}" for field in fields(PruneConfig)),
}
"""Fields that do not change a network's weights: a run may be resumed with others."""


def first_difference(mine: Config, theirs: Config) -> str | None:
    """Describe the first field that differs and changes the training.

    Returns:
        Text like ``"optimizer.lr is 0.5, was 1.0"``, ``theirs`` being the earlier configuration; ``None`` if a run of
        one may be resumed with the other.
    """
    return _first_difference(asdict(mine), asdict(theirs), "")


def _first_difference(mine: dict[str, Any], theirs: dict[str, Any], prefix: str) -> str | None:
    for key in mine | theirs:
        value, other = mine.get(key), theirs.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            found = _first_difference(value, other, f"{prefix}{key}.")
            if found:
                return found
        elif value != other and f"{prefix}{key}" not in _OPERATIONAL:
            return f"{prefix}{key} is {value}, was {other}"
    return None
