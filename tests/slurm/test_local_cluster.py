"""slurm/local_cluster: it starts, tells how it is, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.on_slurm import Site, local_cluster, started


def daemons(folder: Path) -> dict[str, int]:
    return {name: pid for name, (pid, _) in json.loads((folder / "daemons.json").read_text()).items()}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_two_clusters_live_side_by_side_and_end_without_a_trace(tmp_path: Path) -> None:
    """Ports or pid files collide, a second up starts everything anew, or a job outlives its cluster."""
    folders = [tmp_path / "one", tmp_path / "two"]
    try:
        confs = [started(folder, "--no-accounting", "--nodes", "1", "--cpus", "2") for folder in folders]
        before = daemons(folders[0])
        assert started(folders[0], "--no-accounting") == confs[0] and daemons(folders[0]) == before
        ports = [line for conf in confs for line in conf.read_text().splitlines() if line.startswith("SlurmctldPort")]
        assert len(set(ports)) == 2
        environment = {**os.environ, "SLURM_CONF": str(confs[0])}
        job = ["sbatch", "--output=/dev/null", "--wrap", f"exec sleep 1000.{os.getpid()}"]
        subprocess.run(job, check=True, env=environment, capture_output=True, cwd=tmp_path)
        assert all(local_cluster("status", folder).returncode == 0 for folder in folders)
    finally:
        for folder in folders:
            local_cluster("down", folder)
    assert not any(alive(pid) for pid in before.values())
    sleepers = subprocess.run(["pgrep", "-f", f"sleep 1000.{os.getpid()}"], capture_output=True, text=True).stdout
    assert not [pid for pid in sleepers.split() if alive(int(pid))]
    status = local_cluster("status", folders[0])
    assert status.returncode == 1 and "no cluster runs" in status.stderr
    assert local_cluster("down", folders[0]).returncode == 0  # again


def test_a_dead_daemon_is_reported_and_up_mends_it(tmp_path: Path) -> None:
    """status says that all is well, or up leaves half a cluster as it is."""
    folder = tmp_path / "cluster"
    try:
        started(folder, "--no-accounting", "--nodes", "1")
        os.kill(daemons(folder)["slurmctld"], signal.SIGKILL)
        while alive(daemons(folder)["slurmctld"]):
            pass
        status = local_cluster("status", folder, "--json")
        assert status.returncode == 1
        assert json.loads(status.stdout)["problems"][0].startswith("slurmctld has ended")
        started(folder, "--no-accounting", "--nodes", "1")
        assert local_cluster("status", folder).returncode == 0
    finally:
        local_cluster("down", folder)


@pytest.mark.parametrize("script", ["train.sbatch", "prune_array.sbatch", "collect.sbatch"])
def test_the_scripts_are_accepted(cluster: Site, script: str) -> None:
    """An option that this Slurm does not know."""
    path = Path(__file__).parents[2] / "slurm" / script
    assert "to start at" in cluster.call("sbatch", "--test-only", str(path), "configs/digits/sfw.yaml").stderr
