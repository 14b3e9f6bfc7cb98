"""The scripts for people without submitit, from a training to its report."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.on_slurm import ROOT, Site


@pytest.fixture
def site(cluster: Site) -> Site:
    """As in a checkout, where the scripts find slurm/env.sh."""
    if not (cluster.folder / "slurm").exists():
        (cluster.folder / "slurm").symlink_to(ROOT / "slurm")
    return cluster


def submitted(site: Site, script: str, *arguments: str, options: tuple[str, ...] = (), **environment: str) -> str:
    command = ["sbatch", "--parsable", *options, f"slurm/{script}", *arguments]
    return site.call(*command, **environment).stdout.strip()


def test_a_training_that_is_preempted_goes_on_to_its_report(site: Site) -> None:
    """torchrun dies of the signal, the batch script ends before the ranks have saved, or nobody requeues."""
    config = str(site.configuration("script", epochs=12))
    options = ("--nodes=2", "--cpus-per-task=2", "--signal=B:USR2@30", "--time=10")
    job = submitted(site, "train.sbatch", config, options=options, RANKS="2", GLOO_SOCKET_IFNAME="lo")
    site.wait("it trains", lambda: site.step("script") >= 20)
    site.call("scancel", "--batch", "--signal=USR2", job)
    site.wait("it has ended", lambda: job not in site.queue())
    log = Path(site.folder / f"sfw-train-{job}.out").read_text()
    run = site.run("script")
    events = (run / "metrics.jsonl").read_text()
    assert (run / "model.safetensors").is_file() and events.count('"event": "resume"') == 1, log[-3000:]

    array = submitted(site, "prune_array.sbatch", str(run), options=("--array=0-1%1",), SPARSITIES="0.5 0.9")
    after = (f"--dependency=afterany:{array}",)
    collect = submitted(site, "collect.sbatch", str(run), options=after)
    site.wait("they have ended", lambda: not {collect, f"{array}_0", f"{array}_1"} & set(site.queue()))
    assert (run / "report" / "index.html").is_file()
    assert sorted(path.name for path in run.glob("prune/s*")) == ["s0.5000.json", "s0.9000.json"]
