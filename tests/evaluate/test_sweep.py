"""Pruning and measuring a finished run."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sfw_dist.config import Config, load_config
from sfw_dist.data.loading import Normalize, dataset_info, open_loader
from sfw_dist.evaluate.__main__ import main
from sfw_dist.evaluate.pruned_models import AS_TRAINED, TrainedRun
from sfw_dist.evaluate.sweep import evaluate
from sfw_dist.models import build_model
from sfw_dist.pruning.one_shot import prune
from sfw_dist.pruning.recalibration import recalibrate
from sfw_dist.report.write import write_report
from sfw_dist.train.metrics import Metrics, measure
from sfw_dist.train.run_folder import RunFolder
from sfw_dist.train.trainer import train
from tests.support.training import ONE_PROCESS, small_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> RunFolder:
    config = small_config(tmp_path_factory.mktemp("runs"), digits, epochs=4)
    config.schedule.dynamic = False
    config.schedule.milestones = [0.9]
    assert train(config, ONE_PROCESS) == 0
    return RunFolder(config.run_dir)


@pytest.fixture
def run(trained: RunFolder) -> RunFolder:
    shutil.rmtree(trained.prune, ignore_errors=True)  # as one does to measure anew: evaluate makes it again
    return trained


def _model(run: RunFolder, config: Config) -> torch.nn.Module:
    model = build_model("cnn", num_classes=10, in_channels=1, width=config.model.width)
    model.load_state_dict(run.load_weights())
    return model.eval()


def _test_accuracy(model: torch.nn.Module, run: RunFolder) -> float:
    config = load_config(run.config)
    info = dataset_info(config.data)
    normalize = Normalize(info.mean, info.std)
    with torch.no_grad():
        loader = open_loader(config.data, "test", seed=0)
        return measure(lambda images: model.eval()(normalize(images).contiguous()), loader, ONE_PROCESS).top1


def test_one_pass_measures_what_pruning_in_place_does(run: RunFolder) -> None:
    """Masked weights are made anew for each batch; a mask or statistics that leaked would show at another sparsity."""
    config = load_config(run.config)
    info = dataset_info(config.data)
    normalize = Normalize(info.mean, info.std)
    trained = TrainedRun(run, ONE_PROCESS)
    before = copy.deepcopy(trained.model.state_dict())
    sparsities = [0.9, 0.0, 0.5]
    masks = [trained.masks(sparsity) for sparsity in sparsities]
    statistics = trained.recalibrated(masks)
    together = trained.measure("test", masks, [[AS_TRAINED, found] for found in statistics])
    trained.close()
    assert all(torch.equal(before[name], tensor) for name, tensor in trained.model.state_dict().items())

    loader = open_loader(config.data, "test", seed=0)
    plain = replace(config.data, crop_padding=0)
    training = [normalize(images).contiguous() for images, _ in open_loader(plain, "train", seed=0)]
    for sparsity, measured in zip(sparsities, together, strict=True):
        alone = _model(run, config)
        prune(alone, sparsity)
        for metrics in measured:
            with torch.no_grad():
                expected = measure(lambda x, alone=alone: alone(normalize(x).contiguous()), loader, ONE_PROCESS)  # type: ignore[misc]
            assert (metrics.top1, metrics.top5, metrics.samples) == (expected.top1, expected.top5, expected.samples)
            assert metrics.loss == pytest.approx(expected.loss, rel=1e-5)
            recalibrate(alone, training)  # for the second of the two


def test_files_tell_the_exact_counts(run: RunFolder) -> None:
    results = evaluate(run, ONE_PROCESS, sparsities=[0.0, 0.5, 0.9])
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
    dense = evaluate(run, ONE_PROCESS, sparsities=[0.0])[0]
    last = json.loads((run.path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["event"] == "eval" and last["top1"] == dense["top1"]
    assert last["loss"] == pytest.approx(dense["loss"], rel=1e-6)


def test_layerwise_and_all(run: RunFolder) -> None:
    layerwise = evaluate(run, ONE_PROCESS, sparsities=[0.5], kind="layerwise")[0]
    assert all(
        layer["kept"] == layer["parameters"] - int(layer["parameters"] / 2 + 0.5) for layer in layerwise["layers"]
    )
    for file in run.prune.iterdir():
        file.unlink()
    everything = evaluate(run, ONE_PROCESS, sparsities=[0.5], scope="all")[0]
    assert len(everything["layers"]) > len(layerwise["layers"])
    assert everything["achieved_sparsity_all"] == pytest.approx(0.5, abs=1e-3)


def test_exported_weights_are_the_pruned_ones(run: RunFolder) -> None:
    """What is exported is not what was measured."""
    evaluate(run, ONE_PROCESS, sparsities=[0.8], export=True, recalibrate=0)
    exported = load_file(run.prune / "s0.8000.safetensors")
    model = _model(run, load_config(run.config))
    prune(model, 0.8)
    assert all(torch.equal(exported[name], tensor) for name, tensor in model.state_dict().items())

    (result,) = evaluate(run, ONE_PROCESS, sparsities=[0.8], export=True)
    exported = load_file(run.prune / "s0.8000.safetensors")
    assert all(torch.equal(exported[name], parameter) for name, parameter in model.named_parameters())
    model.load_state_dict(exported)
    assert _test_accuracy(model, run) == result["top1_recalibrated"] != result["top1"]


def test_the_report_reads_the_run(run: RunFolder, tmp_path: Path) -> None:
    evaluate(run, ONE_PROCESS, sparsities=[0.0, 0.5, 0.9])
    index = write_report([run.path], tmp_path / "report")
    assert index.is_file() and (index.parent / "curve.csv").read_text().count("\n") == 4


def test_command_prints_json(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run.path), "--sparsities", "0.5,0.9:0.92:0.01", "--json"]) == 0
    assert [r["sparsity"] for r in json.loads(capsys.readouterr().out)] == [0.5, 0.9, 0.91, 0.92]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["{missing}"], "not a run's folder"),
        (["{run}", "--sparsities", "90"], "90"),
        (["{run}", "--sparsities", "0.9", "--kind", "2:4"], "0.5"),
        (["{run}", "--recalibrate", "-1"], "prune.recalibrate must be at least 0, got -1"),
        (["{run}", "--max-drop", "100"], "[0, 100) points"),
        (["{run}", "--max-drop", "nan"], "write 1.0 for one point"),
        (["{run}", "--max-drop", "1", "--sparsities", "0.9"], "leave --sparsities out"),
        (["{run}", "--max-drop", "1", "--kind", "2:4"], "write --kind global"),
        (["{run}", "--sparsities", "0.99991,0.99992"], "four decimals"),
        (["{run}", "--data-root", "{missing}"], "not prepared"),
    ],
)
def test_bad_input_is_one_line(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], part: str
) -> None:
    filled = [a.format(run=run.path, missing=tmp_path / "missing") for a in arguments]
    assert main(filled) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and part in error
    assert not list(run.prune.glob("*"))


def test_weights_of_another_model(run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_bytes(run.config.read_bytes())
    save_file({"conv.weight": torch.zeros(3)}, other / "model.safetensors")
    assert main([str(other)]) == 2
    error = capsys.readouterr().err
    assert "not of the run's model" in error and error.count("\n") == 1


def test_a_network_pruned_too_far_may_have_no_finite_loss(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON has no infinity: the file says null, and other readers do not stumble."""

    def infinite(*args: Any) -> list[list[Metrics]]:
        return [[replace(metrics, loss=float("inf")) for metrics in variants] for variants in original(*args)]

    original = TrainedRun.measure
    monkeypatch.setattr(TrainedRun, "measure", infinite)
    evaluate(run, ONE_PROCESS, sparsities=[0.5])
    written = json.loads((run.prune / "s0.5000.json").read_text())
    assert written["loss"] is None and written["loss_recalibrated"] is None


def test_another_kind_does_not_overwrite_what_was_measured(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """A curve of which one point was pruned otherwise would look like a result."""
    evaluate(run, ONE_PROCESS, sparsities=[0.5])
    before = (run.prune / "s0.5000.json").read_bytes()
    assert main([str(run.path), "--kind", "2:4"]) == 2
    assert "--kind global" in capsys.readouterr().err
    assert (run.prune / "s0.5000.json").read_bytes() == before


def test_a_file_says_so_where_nothing_was_recalibrated(run: RunFolder) -> None:
    """The accuracy as trained is taken for the other, or a reader of the file meets a key that is not there."""
    (off,) = evaluate(run, ONE_PROCESS, sparsities=[0.9], recalibrate=0)
    (on,) = evaluate(run, ONE_PROCESS, sparsities=[0.9], recalibrate=3)
    assert off.keys() == on.keys()
    assert not off["bn_recalibrated"] and off["recalibration_batches"] == 0 and off["top1_recalibrated"] is None
    assert on["bn_recalibrated"] and on["recalibration_batches"] == 3 and on["top1_recalibrated"] is not None
    assert (off["top1"], off["loss"]) == (on["top1"], on["loss"])


def test_a_network_without_batchnorm_is_measured_once_and_told(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It fails, or a second curve that repeats the first looks as if recalibration were worth nothing."""

    def without(*_: Any, **__: Any) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))

    monkeypatch.setattr("sfw_dist.evaluate.pruned_models.build_model", without)
    monkeypatch.setattr(RunFolder, "load_weights", lambda _: without().state_dict())
    assert main([str(run.path), "--sparsities", "0.5", "--json"]) == 0
    printed = capsys.readouterr()
    (result,) = json.loads(printed.out)
    assert result["bn_layers"] == 0 and not result["bn_recalibrated"] and result["top1_recalibrated"] is None
    assert printed.err == "note: the network has no BatchNorm, so nothing was recalibrated\n"


def test_two_of_four_needs_no_list(run: RunFolder) -> None:
    assert [r["sparsity"] for r in evaluate(run, ONE_PROCESS, kind="2:4")] == [0.5]


@pytest.mark.parametrize("kind", ["filters", "low_rank"])
def test_structured_kinds_measure_what_prune_leaves(run: RunFolder, kind: Any, tmp_path: Path) -> None:
    """One pass over many sparsities must measure the very networks that ``prune`` makes and ``--export`` writes."""
    results = evaluate(run, ONE_PROCESS, sparsities=[0.0, 0.3, 0.6], kind=kind, export=True)
    config = load_config(run.config)
    info = dataset_info(config.data)
    normalize = Normalize(info.mean, info.std)
    loader = open_loader(config.data, "test", seed=0)
    for result in results:
        model = _model(run, config)
        pruned = prune(model, result["sparsity"], kind=kind)
        exported = load_file(run.prune / f"s{result['sparsity']:.4f}.safetensors")
        assert all(torch.equal(exported[name], p) for name, p in model.named_parameters())
        with torch.no_grad():
            expected = measure(lambda x, model=model: model(normalize(x).contiguous()), loader, ONE_PROCESS)  # type: ignore[misc]
        assert result["top1"] == expected.top1 and result["loss"] == pytest.approx(expected.loss, rel=1e-4)
        assert result["parameters_total"] - result["parameters_kept"] == pruned.total - pruned.kept
        assert result["dead_layers"] == [] and result["kind"] == kind
        assert ("rank" in result["layers"][0]) == (kind == "low_rank")
    assert results[0]["flops"] == results[0]["flops_dense"] > results[1]["flops"] > results[2]["flops"]
    index = write_report([run.path], tmp_path / "report")
    assert f"{kind}, weights" in index.read_text()


def test_structured_kinds_are_commands(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """``--kind`` takes them, and two kinds do not mix in one folder."""
    assert main([str(run.path), "--sparsities", "0.5", "--kind", "low_rank", "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert result["achieved_sparsity_prunable"] >= 0.5
    assert main([str(run.path), "--sparsities", "0.5", "--kind", "filters-layerwise"]) == 2
    assert "--kind low_rank" in capsys.readouterr().err
