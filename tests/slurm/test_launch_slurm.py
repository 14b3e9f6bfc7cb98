"""launch on a real Slurm: whole chains, failures, preemption. Two nodes with two ranks each, gloo."""

from __future__ import annotations

import csv
import os
import signal
from pathlib import Path

from tests.support.on_slurm import CLUSTER, Site

MANY = "0:0.999:0.001"  # a pruning task long enough to be found and signalled on a loaded machine


def test_a_chain_ends_with_a_report(cluster: Site) -> None:
    """A link of train → array → collect does not fit the next; or the array runs more tasks at once than allowed."""
    answer = cluster.train("chain", "--chain", "--per-task", "5", "--cluster.parallelism", "1")
    assert len(answer["prune"]) == 4
    at_once = 0

    def ended() -> bool:
        nonlocal at_once
        at_once = max(at_once, len(set(cluster.running()) & set(answer["prune"])))
        return not set(cluster.queue()) & {*answer["train"], *answer["prune"], *answer["collect"]}

    cluster.wait("the chain has ended", ended)
    run = cluster.run("chain")
    assert (run / "report" / "index.html").is_file(), cluster.logs("chain")
    assert at_once <= 1
    rows = list(csv.DictReader((run / "prune" / "all.csv").read_text().splitlines()))
    assert [float(row["sparsity"]) for row in rows][:3] == [0.0, 0.1, 0.2] and len(rows) == 19
    assert {row["state"] for row in cluster.status("chain")} == {"COMPLETED"}
    assert '"world_size": 4' in (run / "metrics.jsonl").read_text()


def test_a_killed_task_is_listed_and_only_that_is_tried_again(cluster: Site) -> None:
    """A lost task goes unnoticed, the collection waits for it for ever, or everything is computed again."""
    cluster.train("killed")
    cluster.wait("the training has ended", lambda: (cluster.run("killed") / "model.safetensors").is_file())
    run = str(cluster.run("killed"))
    jobs = cluster.submit("prune_array", run, "--sparsities", MANY, "--per-task", "350")["jobs"]
    cluster.wait("the last task runs", lambda: jobs[-1] in cluster.running())
    (array,) = {job.partition("_")[0] for job in jobs}
    victims: list[int] = []
    cluster.wait("its process is there", lambda: victims.extend(_task(cluster, array, 2)) or victims)
    os.kill(victims[0], signal.SIGKILL)
    cluster.wait("the array has ended", lambda: not set(cluster.queue()) & set(jobs))

    collected = cluster.launch("collect", run, succeeds=False)
    assert collected.returncode == 1 and collected.stderr.count("missing:") == 1, collected.stderr
    assert f"{array}_2 failed" in collected.stderr
    written = {path: path.stat().st_mtime_ns for path in Path(run).glob("prune/s*.json")}
    (again,) = cluster.submit("retry", run)
    assert len(again["tasks"]) == 1 and len(again["jobs"]) == 1
    cluster.wait("it has ended", lambda: not set(cluster.queue()) & set(again["jobs"]))
    assert cluster.launch("collect", run).stderr == ""
    assert all(path.stat().st_mtime_ns == before for path, before in written.items())
    assert cluster.submit("retry", run) == []


def _task(site: Site, array: str, task: int) -> list[int]:
    """Processes of a task; the last element's job id is the array's."""
    found = [site.processes(job, SLURM_ARRAY_TASK_ID=str(task)) for job in _job_ids(site, array)]
    return [pid for pids in found for pid in pids]


def _job_ids(site: Site, array: str) -> list[str]:
    """Slurm's own ids of an array's elements."""
    return site.call("squeue", "--noheader", "--array", "--format=%A", "--jobs", array).stdout.split()


def test_the_last_element_requeues_itself_alone(cluster: Site) -> None:
    """Its job id is the array's, and a requeue by that restarts all that has been done."""
    cluster.train("requeued")
    cluster.wait("the training has ended", lambda: (cluster.run("requeued") / "model.safetensors").is_file())
    run = str(cluster.run("requeued"))
    jobs = cluster.submit("prune_array", run, "--sparsities", MANY, "--per-task", "500")["jobs"]
    (array,) = {job.partition("_")[0] for job in jobs}
    cluster.wait("the last task runs", lambda: jobs[-1] in cluster.running())
    cluster.wait("it has begun", lambda: _stopped(_task(cluster, array, 1)))
    stopped = [pid for pid in _task(cluster, array, 1) if _usr2_in(pid, "SigCgt")]
    cluster.call("scancel", "--signal=USR2", jobs[-1])
    cluster.wait("the signal is there", lambda: all(_usr2_in(pid, "ShdPnd") for pid in stopped))
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)

    def ended() -> bool:
        return not cluster.call("squeue", "--noheader", "--array", "--jobs", array, succeeds=False).stdout

    cluster.wait("the array has ended", ended)
    assert cluster.launch("collect", run).stderr == "", cluster.logs("requeued")
    counts = cluster.call("sacct", "-X", "-n", "-P", "-D", "-o", "JobID", "--jobs", array).stdout.split()
    assert counts.count(jobs[0]) == 1 and counts.count(jobs[1]) == 2, cluster.logs("requeued")


def _stopped(pids: list[int]) -> bool:
    """Stop the processes that have a handler for SIGUSR2, lest they end before the signal; whether there is any."""
    ready = [pid for pid in pids if _usr2_in(pid, "SigCgt")]
    for pid in ready:
        os.kill(pid, signal.SIGSTOP)
    return bool(ready)


def _usr2_in(pid: int, field: str) -> bool:
    """Whether a process handles SIGUSR2 (``SigCgt``), or has one waiting (``ShdPnd``)."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    (signals,) = [int(line.split()[1], 16) for line in lines if line.startswith(field)]
    return bool(signals >> (signal.SIGUSR2 - 1) & 1)


def test_preempted_trainings_end_with_the_weights_of_one_that_was_not(cluster: Site) -> None:
    """A signal or a preemption by a better partition loses steps, takes some twice, or ends the run."""
    whole = cluster.train("whole", epochs=12)["train"]
    signalled = cluster.train("signalled", epochs=12)["train"]
    cluster.wait("it trains", lambda: cluster.step("signalled") >= 20)
    cluster.call("scancel", "--signal=USR2", signalled[0])
    cluster.wait("both have ended", lambda: not set(cluster.queue()) & {*whole, *signalled})
    weights = [cluster.run(name) / "model.safetensors" for name in ("whole", "signalled")]
    assert weights[1].is_file(), cluster.logs("signalled")
    events = (cluster.run("signalled") / "metrics.jsonl").read_text()
    assert '"event": "interrupted"' in events and '"event": "resume"' in events
    assert weights[0].read_bytes() == weights[1].read_bytes()

    preempted = cluster.train("preempted", epochs=12)["train"]
    cluster.wait("it trains", lambda: cluster.step("preempted") >= 20)
    cluster.call("sbatch", "--partition=high", "--exclusive", "--nodes=2", "--output=/dev/null", "--wrap", "sleep 1")
    cluster.wait("it has ended", lambda: not set(cluster.queue()) & set(preempted))
    events = (cluster.run("preempted") / "metrics.jsonl").read_text()
    assert '"event": "resume"' in events, cluster.logs("preempted")
    assert weights[0].read_bytes() == (cluster.run("preempted") / "model.safetensors").read_bytes()


def test_a_dead_rank_ends_the_job_and_cancel_leaves_nothing(cluster: Site) -> None:
    """The others wait in a collective for hours; or processes of a cancelled job go on computing."""
    (job,) = cluster.train("dead", epochs=100)["train"]
    cluster.wait("it trains", lambda: cluster.step("dead") > 0)
    (victim,) = cluster.processes(job, SLURM_PROCID="3")
    os.kill(victim, signal.SIGKILL)
    cluster.wait("the job has ended", lambda: job not in cluster.queue())
    assert cluster.status("dead")[0]["state"] in {"FAILED", "NODE_FAIL"}
    assert not cluster.processes(job)

    (again,) = cluster.submit("retry", str(cluster.run("dead")))
    (job,) = again["jobs"]
    at = cluster.step("dead")
    cluster.wait("it goes on", lambda: cluster.step("dead") > at)
    assert "still wait or run" in cluster.launch("retry", str(cluster.run("dead")), succeeds=False).stderr
    assert job in cluster.launch("cancel", str(cluster.run("dead"))).stdout
    assert job not in cluster.queue()
    cluster.wait("no process is left", lambda: not cluster.processes(job))


def test_without_accounting_and_with_small_arrays(bare_cluster: Site) -> None:
    """States are unknown for ever without sacct; or an array larger than the site allows is refused."""
    answer = bare_cluster.train("bare", "--chain", "--per-task", "4")
    assert len(answer["prune"]) == 5 and len({job.partition("_")[0] for job in answer["prune"]}) == 3
    bare_cluster.wait("the chain has ended", lambda: not bare_cluster.queue())
    rows = bare_cluster.status("bare")
    assert {row["state"] for row in rows} == {"COMPLETED"}, bare_cluster.logs("bare")
    assert (bare_cluster.run("bare") / "report" / "index.html").is_file()


def test_what_dry_run_prints_is_accepted(cluster: Site) -> None:
    """The script that is shown is not one that Slurm takes."""
    config = str(cluster.configuration("dry"))
    for arguments in (["--nodes", "1"], ["--nodes", "2", "--cluster.mem_gb", "1"]):
        text = cluster.launch("train", "--config", config, "--cluster", str(CLUSTER), *arguments, "--dry-run").stdout
        script = cluster.folder / "dry.sbatch"
        script.write_text(text)
        assert "to start at" in cluster.call("sbatch", "--test-only", str(script)).stderr
    assert not cluster.run("dry").exists()
