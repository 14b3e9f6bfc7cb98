"""Reads and checks what a run's folder holds."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml
from safetensors import SafetensorError, safe_open

from sfw_dist.errors import UserError
from sfw_dist.pruning import PruningOptions

Record = dict[str, Any]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Layer:
    """One prunable tensor of a pruned network."""

    name: str
    density: float  # fraction of its entries that were kept


@dataclass(frozen=True)
class Scores:
    """What a network scores. Accuracies are fractions."""

    top1: float
    top5: float  # NaN where there are fewer than five classes
    loss: float


@dataclass(frozen=True)
class PruningResult:
    """One ``prune/s*.json``: a network at one sparsity, and what it scores. Accuracies are fractions."""

    sparsity: float  # as requested
    sparsity_all: float  # achieved, over all parameters
    sparsity_prunable: float  # achieved, over the parameters that the scope allows to remove
    options: PruningOptions
    split: str
    seed: int | None
    samples: int
    top1: float
    top5: float  # NaN where there are fewer than five classes
    loss: float
    parameters_total: int
    parameters_kept: int
    flops_dense: int
    flops: int
    layers: tuple[Layer, ...]
    dead_layers: tuple[str, ...]
    bn_layers: int | None  # None: the file is older than recalibration
    recalibration_batches: int
    recalibrated: Scores | None  # with BatchNorm's statistics measured again after pruning; None: they were not

    @property
    def compression_ratio(self) -> float:
        """Parameters of the dense network over parameters that are kept."""
        return self.parameters_total / self.parameters_kept if self.parameters_kept else math.inf

    @property
    def theoretical_speedup(self) -> float:
        """FLOPs of the dense network over those left when products with removed weights are skipped."""
        return self.flops_dense / self.flops if self.flops else math.inf

    @property
    def method(self) -> str:
        """How the network was pruned, in words: results that differ in it are not points of one curve."""
        options = self.options
        return f"{options.granularity} × {options.ranking} × {options.criterion}, scope {options.scope}"


@dataclass(frozen=True)
class Run:
    """A run's folder. ``label`` is the name in its configuration, made unique among the runs of one report."""

    folder: Path
    label: str
    config: Record
    config_text: str
    environment: Record
    metrics: tuple[Record, ...] | None  # None: the run has no metrics.jsonl
    results: tuple[PruningResult, ...]  # by rising sparsity, at least one
    weights: FloatArray | None  # all finite conv and linear weights, flat; None: there are none

    @property
    def optimizer(self) -> str:
        """``optimizer.name`` of the configuration, or an empty string."""
        optimizer = self.config.get("optimizer")
        return str(optimizer.get("name", "")) if isinstance(optimizer, dict) else ""

    @property
    def dense_top1(self) -> float | None:
        """Accuracy before pruning: from the result at sparsity 0, else from the evaluation after training."""
        first = self.results[0]
        if first.sparsity == 0:
            return first.top1
        evaluations = [
            number(record, "top1")
            for record in self.metrics or ()
            if record["event"] == "eval" and record.get("sparsity") == 0 and record.get("split") == first.split
        ]
        return evaluations[-1] if evaluations else None

    @property
    def recalibrated(self) -> Run | None:
        """The run with the scores after BatchNorm recalibration in place of those as trained; None: there are none."""
        results = tuple(
            replace(result, **asdict(result.recalibrated)) for result in self.results if result.recalibrated is not None
        )
        # Without the metrics: the evaluation after training is of the statistics as trained.
        return replace(self, results=results, metrics=None) if results else None

    def at(self, sparsity: float) -> PruningResult | None:
        """The result at this requested sparsity."""
        return next((result for result in self.results if math.isclose(result.sparsity, sparsity, abs_tol=1e-6)), None)

    def epochs(self) -> list[Record]:
        """The records of finished epochs."""
        return [record for record in self.metrics or () if record["event"] == "epoch"]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders, in order.

    Raises:
        UserError: none or a repeated folder is given, or one cannot be read.
    """
    if not folders:
        raise UserError("no run given: name at least one run folder")
    for folder, times in Counter(folder.resolve() for folder in folders).items():
        if times > 1:
            raise UserError(f"{folder} is given {times} times: name each run once")
    configs = [_read_config(folder) for folder in folders]
    labels = _unique_labels(folders, [config for config, _ in configs])
    return [
        Run(
            folder=folder,
            label=label,
            config=config,
            config_text=text,
            environment=_read_json(folder / "environment.json") if (folder / "environment.json").is_file() else {},
            metrics=_read_metrics(folder / "metrics.jsonl"),
            results=_read_results(folder),
            weights=_read_weights(folder / "model.safetensors"),
        )
        for folder, label, (config, text) in zip(folders, labels, configs, strict=True)
    ]


def _unique_labels(folders: Sequence[Path], configs: Sequence[Record]) -> list[str]:
    """The run's name; if several runs share it, with the folder's name, or with its path if that is shared as well."""
    names = [
        " ".join(str(config.get("name") or folder.resolve().name).split())
        for folder, config in zip(folders, configs, strict=True)
    ]
    tails = [folder.resolve().name for folder in folders]
    named, full = Counter(names), Counter(zip(names, tails, strict=True))
    labels = []
    for folder, name, tail in zip(folders, names, tails, strict=True):
        if named[name] == 1:
            labels.append(name)
        else:
            labels.append(f"{name} ({tail if full[name, tail] == 1 else folder})")
    return labels


def _read_config(folder: Path) -> tuple[Record, str]:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: name the folder of a run, such as runs/digits_sfw")
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder} is not a run's folder (it has no config.yaml): name one that sfw_dist.train wrote")
    try:
        text = path.read_text(encoding="utf-8")
        config = yaml.safe_load(text)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise UserError(f"{path} is not valid YAML{where}: restore it from the configuration of the run") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a mapping of settings: restore it from the configuration of the run")
    return config, text


def _read_metrics(path: Path) -> tuple[Record, ...] | None:
    """The records, without those that a later part of the run replaces because it resumed or started again."""
    if not path.is_file():
        return None
    lines = [(count, line) for count, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()]
    records: list[Record] = []
    for count, line in lines:
        try:
            record = json.loads(line)
        except ValueError as error:
            if count == lines[-1][0]:
                break  # the process was killed while it wrote
            raise UserError(f"{path}, line {count}, is not JSON: remove or mend that line") from error
        if not isinstance(record, dict) or "event" not in record:
            raise UserError(f'{path}, line {count}, is no object with an "event": remove or mend that line')
        if record["event"] == "start":
            records = []
        elif record["event"] == "resume":
            step = record.get("step", math.inf)
            records = [earlier for earlier in records if earlier.get("step", 0) <= step]
        records.append(record)
    return tuple(records)


def _read_results(folder: Path) -> tuple[PruningResult, ...]:
    paths = sorted((folder / "prune").glob("s*.json"))
    if not paths:
        raise UserError(f"{folder} has no prune/*.json: run python -m sfw_dist.evaluate {folder} first")
    results = []
    for path in paths:
        record = _read_json(path)
        try:
            results.append(_result(record))
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            problem = f"has no {error}" if isinstance(error, KeyError) else f"has a wrong value ({error})"
            raise UserError(f"{path} {problem}: run python -m sfw_dist.evaluate {folder} again") from error
    return tuple(sorted(results, key=lambda result: result.sparsity))


def _result(record: Record) -> PruningResult:
    return PruningResult(
        sparsity=float(record["sparsity"]),
        sparsity_all=float(record["achieved_sparsity_all"]),
        sparsity_prunable=float(record["achieved_sparsity_prunable"]),
        options=PruningOptions.of_record(record),
        split=str(record["split"]),
        seed=record.get("seed"),
        samples=int(record["samples"]),
        top1=float(record["top1"]),
        top5=number(record, "top5"),
        loss=number(record, "loss"),
        parameters_total=int(record["parameters_total"]),
        parameters_kept=int(record["parameters_kept"]),
        flops_dense=int(record["flops_dense"]),
        flops=int(record["flops"]),
        layers=tuple(Layer(str(layer["name"]), layer["kept"] / layer["parameters"]) for layer in record["layers"]),
        dead_layers=tuple(map(str, record.get("dead_layers", ()))),
        bn_layers=record.get("bn_layers"),
        recalibration_batches=int(record.get("recalibration_batches", 0)),
        recalibrated=_recalibrated(record),
    )


def _recalibrated(record: Record) -> Scores | None:
    if record.get("top1_recalibrated") is None:
        return None
    return Scores(*(number(record, f"{key}_recalibrated") for key in ("top1", "top5", "loss")))


def number(record: Mapping[str, Any], key: str) -> float:
    """The value as a float; NaN where it is absent or null."""
    value = record.get(key)
    return math.nan if value is None else float(value)


def _read_json(path: Path) -> Record:
    try:
        record = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: remove it, then write it again") from error
    if not isinstance(record, dict):
        raise UserError(f"{path} is not a JSON object: remove it, then write it again")
    return record


def _read_weights(path: Path) -> FloatArray | None:
    """All conv and linear weights as one vector: the tensors of two and more dimensions; norms and biases have one."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            names = [name for name in file.keys() if len(file.get_slice(name).get_shape()) > 1]  # noqa: SIM118
            tensors = [file.get_tensor(name).astype(np.float32).ravel() for name in names]
    except (SafetensorError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read ({reason}): export the final weights as float32 again") from error
    weights = np.concatenate([np.empty(0, np.float32), *tensors])
    finite = weights[np.isfinite(weights)]  # a diverged run has others
    return finite if finite.size else None
