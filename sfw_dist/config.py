"""A run's configuration: typed dataclasses, YAML files that inherit, dotted overrides on the command line.

The dataclasses hold the only defaults. A YAML file overrides them, may start from another file (``base: other.yaml``,
relative to itself), and the command line overrides the file::

    python -m sfw_dist.train --config configs/digits_cnn.yaml --optimizer.lr 0.5

Unknown keys and values outside a field's domain raise :class:`~sfw_dist.errors.UserError` with the key, the value and
the remedy.
"""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace, set_parsing_settings

from sfw_dist.constraints import Constraint, KSparsePolytope, KSupportBall, LpBall, Unconstrained
from sfw_dist.errors import UserError
from sfw_dist.prune import PAPER_SPARSITIES, Kind, Scope
from sfw_dist.step import Rescale

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def _require(valid: bool, key: str, value: object, domain: str, remedy: str) -> None:
    if not valid:
        raise UserError(f"{key} must be {domain}, got {value}: {remedy}")


@dataclass
class DataConfig:
    """The data set and how its batches are made."""

    name: str = "digits"
    """Data set: digits, mnist, fashion_mnist, cifar10, cifar100, svhn, tiny_imagenet or imagefolder."""
    root: str = "data"
    """Folder that holds the prepared data sets; made if it is missing."""
    backend: Literal["auto", "ffcv", "torch"] = "auto"
    """Loader; auto takes FFCV where it can be imported, else torch with a warning."""
    batch_size: int = 128
    """Global training batch, split evenly over the ranks."""
    eval_batch_size: int = 256
    """Evaluation batch of one rank."""
    validation_fraction: float = 0.1
    """Fraction of the training set held out for validation, in [0, 1)."""
    workers: int = 0
    """Loader threads of one rank; 0 shares the available cores among the local ranks."""
    crop_padding: int = 0
    """Pixels of zero padding before a random crop; 0 does not crop."""
    flip: bool = False
    """Flip half of the training images left to right."""

    def __post_init__(self) -> None:
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


@dataclass
class ModelConfig:
    """The network."""

    name: str = "cnn"
    """cnn, cnn5, resnet18, vgg16, or torchvision/NAME for any torchvision classifier."""
    width: float = 1.0
    """Factor on the channel counts of our own networks."""

    def __post_init__(self) -> None:
        _require(self.width > 0, "model.width", self.width, "> 0", "write 1.0 for the published width")


@dataclass
class ConstraintConfig:
    """The set each constrained tensor stays in; exactly one of tau, diameter and radius gives its size."""

    set: Literal["k_sparse", "k_support", "lp", "unconstrained"] = "k_sparse"
    """K-sparse polytope (the paper's), k-support ball, L_p ball, or no constraint."""
    k_frac: float = 0.05
    """K as a fraction of a tensor's entries, in (0, 1] (k_sparse, k_support)."""
    k_min: int = 10
    """Least K of a tensor (k_sparse, k_support)."""
    p: float = 2.0
    """Order of the norm, at least 1, `.inf` for the maximum norm (lp)."""
    tau: float | None = None
    """L2 diameter = 2·tau·E‖W_init‖₂; the default, with tau = 15, when none of the three is given."""
    diameter: float | None = None
    """L2 diameter of the set, the same for every tensor."""
    radius: float | None = None
    """Radius of the set, the same for every tensor."""

    def __post_init__(self) -> None:
        try:
            self.build()
        except ValueError as error:
            raise UserError(f"optimizer.constraint: {error}") from None

    def build(self) -> Constraint:
        """The specification that :func:`sfw_dist.constrain` binds to each parameter. Raises ``ValueError``."""
        sizes = {"tau": self.tau, "diameter": self.diameter, "radius": self.radius}
        size = {key: value for key, value in sizes.items() if value is not None} or {"tau": 15.0}
        match self.set:
            case "k_sparse":
                return KSparsePolytope(k_frac=self.k_frac, k_min=self.k_min, **size)  # type: ignore[arg-type]
            case "k_support":
                return KSupportBall(k_frac=self.k_frac, k_min=self.k_min, **size)  # type: ignore[arg-type]
            case "lp":
                return LpBall(p=self.p, **size)
            case "unconstrained":
                return Unconstrained()


@dataclass
class OptimizerConfig:
    """The optimizer: SFW, or SGD as the baseline."""

    name: Literal["sfw", "sgd"] = "sfw"
    """sfw: stochastic Frank-Wolfe; sgd: torch.optim.SGD."""
    lr: float = 1.0
    """Initial learning rate η; the paper's SFW takes 1.0, SGD about 0.05."""
    momentum: float = 0.9
    """Momentum ρ in [0, 1)."""
    rescale: Rescale = "gradient"
    """How the learning rate becomes a step size γ (sfw; docs/algorithm.md)."""
    weight_decay: float = 0.0
    """L2 penalty: of all tensors for sgd, of the unconstrained ones for sfw."""
    constraint: ConstraintConfig = field(default_factory=ConstraintConfig)
    """The constraint set (sfw)."""
    unconstrained: Literal["none", "norm_and_bias"] = "none"
    """Which tensors sfw leaves unconstrained and trains by momentum SGD."""
    unconstrained_lr: float = 0.05
    """Initial learning rate of those tensors."""

    def __post_init__(self) -> None:
        remedy = "write 1.0 for sfw or 0.05 for sgd"
        _require(0 < self.lr < math.inf, "optimizer.lr", self.lr, "> 0", remedy)
        _require(self.unconstrained_lr > 0, "optimizer.unconstrained_lr", self.unconstrained_lr, "> 0", "write 0.05")
        _require(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "in [0, 1)", "write 0.9")
        _require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "at least 0", "write 0.0005 or 0")


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
    log_every: int = 20
    """Steps between two train records."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept, beside the best one."""

    def __post_init__(self) -> None:
        _require(self.epochs > 0, "train.epochs", self.epochs, "at least 1", "write 180 for the published length")
        _require(self.log_every > 0, "train.log_every", self.log_every, "at least 1", "write 20")
        _require(self.keep_checkpoints > 0, "train.keep_checkpoints", self.keep_checkpoints, "at least 1", "write 2")


@dataclass
class PruneConfig:
    """The one-shot pruning of the trained network."""

    sparsities: list[float] = field(default_factory=lambda: [0.0, *PAPER_SPARSITIES])
    """Fractions removed; 0 is the dense network. The default is the paper's 18, and dense."""
    scope: Scope = "weights"
    """weights: of convolutions and linear layers; all: every parameter, as published."""
    kind: Kind = "global"
    """Where magnitudes compete: over the network, within a tensor, or 2 of 4 along the input channels."""

    def __post_init__(self) -> None:
        for sparsity in self.sparsities:
            _require(0 <= sparsity < 1, "prune.sparsities", sparsity, "in [0, 1)", "write 0.9 to remove 90 %")


@dataclass
class Config:
    """A training run."""

    name: str
    """The run's name: its folder is runs_dir/name."""
    runs_dir: str = "runs"
    """Folder of all runs."""
    seed: int = 0
    """Seed of the initial weights, the order and the augmentation."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)

    def __post_init__(self) -> None:
        plain = Path(self.name).name == self.name and self.name not in {"", ".", ".."}
        valid = plain and self.name.isprintable() and len(self.name) <= 100
        _require(valid, "name", repr(self.name), "a plain folder name", "write letters, digits, '_', '-' and '.'")
        _require(self.seed >= 0, "seed", self.seed, "at least 0", "write 0")

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in ``path`` laid over that of its ``base:``, and so on; to inherit in a circle is an error."""
    return _read_yaml(path, seen=())


def _read_yaml(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise UserError(f"{path} inherits from itself through base: {' -> '.join(map(str, seen))}: remove one base")
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read the configuration {path} ({error.strerror}): see configs/ for examples") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML ({' '.join(str(error).split())}): correct that place") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds a {type(tree).__name__}: write 'key: value' lines")
    base = tree.pop("base", None)
    if base is None:
        return tree
    below = _read_yaml(path.parent / str(base), (*seen, path.resolve()))
    below.pop("name", None)  # two runs of one name would share a folder
    return _overlay(below, tree)


def _overlay(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _overlay(merged[key], value) if both else value
    return merged


def _check_keys(tree: dict[str, Any], schema: type, where: str, prefix: str = "") -> None:
    """Name the first key of ``tree`` that is empty, or that ``schema`` does not have, with its nearest neighbour."""
    types = get_type_hints(schema)
    known = [f.name for f in fields(schema)]
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            remedy = f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(known)}"
            raise UserError(f"{where}: unknown key {dotted}: {remedy}")
        if is_dataclass(types[key]):
            if not isinstance(value, dict):
                raise UserError(f"{where}: {dotted} is a section, got {value!r}: write 'key: value' lines below it")
            _check_keys(value, types[key], where, f"{dotted}.")
        elif value is None and type(None) not in get_args(types[key]):
            raise UserError(f"{where}: {dotted} is empty (null): write a value, or remove the line for the default")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class _Formatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with types and defaults that leaves the lines of the examples as written."""


def parse_run(
    argv: Sequence[str] | None,
    *,
    description: str,
    examples: str,
    add_options: Callable[[ArgumentParser], None] = lambda parser: None,
) -> tuple[Config, Namespace]:
    """Read ``--config FILE`` and the dotted overrides after it.

    ``add_options`` adds the options of one command. Returns the configuration and the namespace with those options.
    """
    parser = ArgumentParser(
        prog="python -m sfw_dist.train",
        exit_on_error=False,
        allow_abbrev=False,
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=_Formatter,
    )
    parser.add_argument("--config", type=str, help="YAML file of the run; see configs/.")
    add_options(parser)
    parser.add_class_arguments(Config, skip={"name"})
    parser.add_argument("--name", type=str, help="The run's name; the file's name when neither gives one.")

    # `--config` is taken first, so that what stands on the command line lies over the file whatever the order.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config")
    config_file: str | None = None
    try:
        config_file = first.parse_known_args(argv)[0].config
        below = None
        if config_file is not None:
            path = Path(config_file)
            tree = {"name": path.stem} | read_yaml(path)
            _check_keys(tree, Config, str(path))
            below = parser.parse_object(tree, defaults=True)
        options = parser.parse_args(argv, namespace=below)
        if options.name is None:
            raise UserError("a run needs a name: give --config FILE or --name NAME")
        config = instantiate(options, parser)
    except (ArgumentError, TypeError) as error:
        where = f" ({config_file})" if config_file else ""
        raise UserError(f"{_one_line(error)}{where}: see --help") from None
    return config, options


def instantiate(options: Namespace, parser: ArgumentParser) -> Config:
    """The dataclasses from parsed values; their ``__post_init__`` raises :class:`UserError`."""
    values = parser.instantiate(options)
    return Config(**{f.name: values[f.name] for f in fields(Config)})


def save_config(config: Config) -> str:
    """The resolved configuration as YAML text; :func:`load_config` reads it back to an equal object."""
    return yaml.safe_dump(asdict(config), sort_keys=False)


def load_config(path: Path) -> Config:
    """The configuration in one YAML file (with its bases), without command line."""
    return parse_run(["--config", str(path)], description="", examples="")[0]


_OPERATIONAL = {
    *("runs_dir", "data.root", "data.backend", "data.workers", "data.eval_batch_size"),
    *("train.log_every", "train.keep_checkpoints", "prune.sparsities", "prune.scope", "prune.kind"),
}
"""Fields that do not change a network's weights: a run may go on with others."""


def first_difference(mine: Config, theirs: Config) -> str | None:
    """``"optimizer.lr is 0.5, was 1.0"`` for the first field that differs and changes the training, else ``None``."""
    return _first_difference(asdict(mine), asdict(theirs), "")


def _first_difference(mine: dict[str, Any], theirs: dict[str, Any], prefix: str) -> str | None:
    for key, value in mine.items():
        if isinstance(value, dict):
            found = _first_difference(value, theirs[key], f"{prefix}{key}.")
            if found:
                return found
        elif value != theirs[key] and f"{prefix}{key}" not in _OPERATIONAL:
            return f"{prefix}{key} is {value}, was {theirs[key]}"
    return None
