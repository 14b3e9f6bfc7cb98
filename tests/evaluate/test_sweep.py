"""Pruning a run to many sparsities: the files that are written and the networks they are of."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sfw_dist.config import load_config
from sfw_dist.data.loading import Normalize, dataset_info, open_loader
from sfw_dist.evaluate.pruned_models import PrunedModels
from sfw_dist.evaluate.sweep import sweep_run
from sfw_dist.pruning import PruningOptions, prune
from sfw_dist.pruning.granularity import GranularityName
from sfw_dist.report.write import write_report
from sfw_dist.train.metrics import Metrics, measure
from sfw_dist.train.run_folder import RunFolder
from tests.evaluate.conftest import trained_model
from tests.support.training import ONE_PROCESS


def test_files_tell_the_exact_counts(run: RunFolder) -> None:
    """A count is of other entries than the file says, or the samples are of another split."""
    results = sweep_run(run, ONE_PROCESS, sparsities=[0.0, 0.5, 0.9])
    assert sorted(path.name for path in run.prune.iterdir()) == ["s0.0000.json", "s0.5000.json", "s0.9000.json"]
    written = json.loads((run.prune / "s0.9000.json").read_text())
    assert written == json.loads(json.dumps(results[2]))
    prunable = sum(layer["parameters"] for layer in written["layers"])
    removed = written["parameters_total"] - written["parameters_kept"]
    assert removed == int(0.9 * prunable + 0.5)
    assert written["achieved_sparsity_prunable"] == removed / prunable
    assert written["achieved_sparsity_all"] == removed / written["parameters_total"]
    assert sum(layer["kept"] for layer in written["layers"]) == prunable - removed
    assert written["samples"] == 451 and written["split"] == "test"
    assert written["bn_layers"] == 3 and written["bn_recalibrated"] is True
    assert (written["recalibration_batches"], written["recalibration_batch_size"]) == (10, 120)  # 10 is one pass
    assert 0 < written["flops"] < written["flops_dense"] == results[0]["flops"]


def test_sparsity_0_is_what_training_reported(run: RunFolder) -> None:
    """The evaluation normalises or loads in another way than the training."""
    dense = sweep_run(run, ONE_PROCESS, sparsities=[0.0])[0]
    last = json.loads((run.path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["event"] == "eval" and last["top1"] == dense["top1"]
    assert last["loss"] == pytest.approx(dense["loss"], rel=1e-6)


def test_layerwise_and_all(run: RunFolder) -> None:
    """Options are not handed on, and the run's own are measured instead."""
    layerwise = sweep_run(run, ONE_PROCESS, PruningOptions(ranking="layerwise"), sparsities=[0.5])[0]
    assert all(
        layer["kept"] == layer["parameters"] - int(layer["parameters"] / 2 + 0.5) for layer in layerwise["layers"]
    )
    for file in run.prune.iterdir():
        file.unlink()
    everything = sweep_run(run, ONE_PROCESS, PruningOptions(scope="all"), sparsities=[0.5])[0]
    assert len(everything["layers"]) > len(layerwise["layers"])
    assert everything["achieved_sparsity_all"] == pytest.approx(0.5, abs=1e-3)


def _test_accuracy(model: torch.nn.Module, run: RunFolder) -> float:
    config = load_config(run.config)
    info = dataset_info(config.data)
    normalize = Normalize(info.mean, info.std)
    with torch.no_grad():
        loader = open_loader(config.data, "test", seed=0)
        return measure(lambda images: model.eval()(normalize(images).contiguous()), loader, ONE_PROCESS).top1


def test_exported_weights_are_the_pruned_ones(run: RunFolder) -> None:
    """What is exported is not what was measured."""
    sweep_run(run, ONE_PROCESS, PruningOptions(recalibrate=0), sparsities=[0.8], export=True)
    exported = load_file(run.prune / "s0.8000.safetensors")
    model = trained_model(run, load_config(run.config))
    prune(model, 0.8)
    assert all(torch.equal(exported[name], tensor) for name, tensor in model.state_dict().items())

    (result,) = sweep_run(run, ONE_PROCESS, sparsities=[0.8], export=True)
    exported = load_file(run.prune / "s0.8000.safetensors")
    assert all(torch.equal(exported[name], parameter) for name, parameter in model.named_parameters())
    model.load_state_dict(exported)
    assert _test_accuracy(model, run) == result["top1_recalibrated"] != result["top1"]


def test_the_report_reads_the_run(run: RunFolder, tmp_path: Path) -> None:
    """A key of the result files changed, and the report was forgotten."""
    sweep_run(run, ONE_PROCESS, sparsities=[0.0, 0.5, 0.9])
    index = write_report([run.path], tmp_path / "report")
    assert index.is_file() and (index.parent / "curve.csv").read_text().count("\n") == 4


def test_a_network_pruned_too_far_may_have_no_finite_loss(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON has no infinity: the file says null, and other readers do not stumble."""

    def infinite(*args: Any) -> list[list[Metrics]]:
        return [[replace(metrics, loss=float("inf")) for metrics in variants] for variants in original(*args)]

    original = PrunedModels.measure
    monkeypatch.setattr(PrunedModels, "measure", infinite)
    sweep_run(run, ONE_PROCESS, sparsities=[0.5])
    written = json.loads((run.prune / "s0.5000.json").read_text())
    assert written["loss"] is None and written["loss_recalibrated"] is None


def test_a_file_says_so_where_nothing_was_recalibrated(run: RunFolder) -> None:
    """The accuracy as trained is taken for the other, or a reader of the file meets a key that is not there."""
    (off,) = sweep_run(run, ONE_PROCESS, PruningOptions(recalibrate=0), sparsities=[0.9])
    (on,) = sweep_run(run, ONE_PROCESS, PruningOptions(recalibrate=3), sparsities=[0.9])
    assert off.keys() == on.keys()
    assert not off["bn_recalibrated"] and off["recalibration_batches"] == 0 and off["top1_recalibrated"] is None
    assert on["bn_recalibrated"] and on["recalibration_batches"] == 3 and on["top1_recalibrated"] is not None
    assert (off["top1"], off["loss"]) == (on["top1"], on["loss"])


def test_two_of_four_needs_no_list(run: RunFolder) -> None:
    """The configured sparsities, which 2:4 does not take, end in an error."""
    assert [r["sparsity"] for r in sweep_run(run, ONE_PROCESS, PruningOptions(granularity="2:4"))] == [0.5]


@pytest.mark.parametrize("granularity", ["filter", "rank"])
def test_structured_granularities_measure_what_prune_leaves(
    run: RunFolder, granularity: GranularityName, tmp_path: Path
) -> None:
    """One pass over many sparsities must measure the very networks that ``prune`` makes and ``--export`` writes."""
    results = sweep_run(
        run, ONE_PROCESS, PruningOptions(granularity=granularity), sparsities=[0.0, 0.3, 0.6], export=True
    )
    config = load_config(run.config)
    info = dataset_info(config.data)
    normalize = Normalize(info.mean, info.std)
    loader = open_loader(config.data, "test", seed=0)
    for result in results:
        model = trained_model(run, config)
        pruned = prune(model, result["sparsity"], granularity=granularity)
        exported = load_file(run.prune / f"s{result['sparsity']:.4f}.safetensors")
        assert all(torch.equal(exported[name], p) for name, p in model.named_parameters())
        with torch.no_grad():
            expected = measure(lambda x, model=model: model(normalize(x).contiguous()), loader, ONE_PROCESS)  # type: ignore[misc]
        assert result["top1"] == expected.top1 and result["loss"] == pytest.approx(expected.loss, rel=1e-4)
        assert result["parameters_total"] - result["parameters_kept"] == pruned.total - pruned.kept
        assert result["dead_layers"] == [] and result["granularity"] == granularity
        assert ("rank" in result["layers"][0]) == (granularity == "rank")
    assert results[0]["flops"] == results[0]["flops_dense"] > results[1]["flops"] > results[2]["flops"]
    index = write_report([run.path], tmp_path / "report")
    assert f"{granularity} × global × magnitude, scope weights" in index.read_text()
