"""A real Slurm of several nodes on one machine, for rehearsals and tests; the commands up, down and status use it.

All state lies in one folder: configuration, keys, sockets, logs, the accounting database, and `daemons.json` with the
pid and start time of every daemon, so that `down` ends these and nothing else. Nothing needs root or systemd. Several
clusters may run at once: each takes its own ports. Only the standard library is used, so that no environment is needed.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PACKAGES = "slurmctld slurmd slurm-client munge slurmdbd mariadb-server slurm-wlm-mysql-plugin bc"
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
FIRST_PORT, PORT_STEP, CLUSTERS = 26800, 100, 50
"""Port bases to try: a cluster uses base, base + 1, and one a node from base + 10 on; below the ephemeral range."""
PATIENCE = 60.0
"""Seconds until a daemon that does not answer counts as failed."""


class ClusterError(Exception):
    """One line for the user."""


def default_folder() -> Path:
    return Path(tempfile.gettempdir()) / f"local_cluster_{getpass.getuser()}"


class Cluster:
    """The cluster in ``folder``, running or not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.conf = self.folder / "slurm.conf"
        self._daemons = self.folder / "daemons.json"
        self.environment = {**_scrubbed(os.environ), "SLURM_CONF": str(self.conf), "PATH": PATH}

    # --- up -----------------------------------------------------------------------------------------------------------

    def up(self, *, nodes: int, cpus: int, accounting: bool, max_array_size: int) -> None:
        """Start it and wait until every node is idle; does nothing when it runs. Raises :class:`ClusterError`."""
        if self.running() and not self.problems():
            return
        _require_programs(accounting)
        self.down()
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in ("run", "log", "state", "spool"):
            (self.folder / name).mkdir(parents=True, mode=0o755)
        try:
            with _one_at_a_time():  # until the daemons hold their ports
                port = _free_port(nodes)
                self._configure(port, nodes, cpus, accounting, max_array_size)
                self._start(nodes, accounting)
            self._wait("every node is idle", lambda: self._idle_nodes() == nodes)
        except BaseException:
            self.down()
            raise

    def _configure(self, port: int, nodes: int, cpus: int, accounting: bool, max_array_size: int) -> None:
        folder, user = self.folder, getpass.getuser()
        key = folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
        names = [f"127.0.0.{10 + i}" for i in range(nodes)]  # they resolve anywhere, which MASTER_ADDR needs
        lines = [
            f"ClusterName=local_{port}",
            "SlurmctldHost=localhost(127.0.0.1)",
            f"SlurmctldPort={port}",
            f"SlurmUser={user}",
            f"SlurmdUser={user}",
            "AuthType=auth/munge",
            "CredType=cred/munge",
            f"AuthInfo=socket={folder}/run/munge.sock,cred_expire=5",  # a requeued job waits for that
            f"StateSaveLocation={folder}/state",
            f"SlurmdSpoolDir={folder}/spool/%n",
            f"SlurmctldPidFile={folder}/run/slurmctld.pid",
            f"SlurmdPidFile={folder}/run/slurmd.%n.pid",
            f"SlurmctldLogFile={folder}/log/slurmctld.log",
            f"SlurmdLogFile={folder}/log/slurmd.%n.log",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "MpiDefault=none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_CPU",
            "SlurmdParameters=config_overrides",
            "SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0,sched_min_interval=0",
            "PreemptType=preempt/partition_prio",
            "PreemptMode=REQUEUE",
            "SlurmctldParameters=preempt_send_user_signal",
            "JobRequeue=1",
            "ReturnToService=2",
            "KillWait=5",
            "MinJobAge=86400",
            f"FirstJobId={int(time.time()) % 60_000_000 + 1}",  # ids of an earlier cluster name other jobs' files
            "EnforcePartLimits=ALL",
            f"MaxArraySize={max_array_size}",
        ]
        if accounting:
            lines += [
                "AccountingStorageType=accounting_storage/slurmdbd",
                "AccountingStorageHost=localhost",
                f"AccountingStoragePort={port + 1}",
                f"AccountingStoragePass={folder}/run/munge.sock",
            ]
        lines += [
            f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port + 10 + i} CPUs={cpus} "
            f"RealMemory={memory}"
            for i, name in enumerate(names)
        ]
        lines += [
            f"PartitionName=main Nodes={','.join(names)} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=20",
            f"PartitionName=high Nodes={','.join(names)} PriorityTier=10 PreemptMode=OFF",
        ]
        self.conf.write_text("\n".join(lines) + "\n")
        # 22.05 reads it whether or not anything uses cgroups, and "disabled" kills slurmd.
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        database = folder / "slurmdbd.conf"
        database.touch(0o600)  # slurmdbd refuses it otherwise
        database.write_text(
            f"AuthType=auth/munge\nAuthInfo=socket={folder}/run/munge.sock\nDbdHost=localhost\nDbdPort={port + 1}\n"
            f"SlurmUser={user}\nStorageType=accounting_storage/mysql\nStorageUser={user}\nStorageLoc=slurm_acct\n"
            f"LogFile={folder}/log/slurmdbd.log\nPidFile={folder}/run/slurmdbd.pid\n"
        )

    def _start(self, nodes: int, accounting: bool) -> None:
        run, log = self.folder / "run", self.folder / "log"
        self._spawn(
            "munged",
            [
                "munged",
                "--foreground",
                "--force",
                f"--key-file={self.folder}/munge.key",
                f"--socket={run}/munge.sock",
                f"--pid-file={run}/munged.pid",
                f"--log-file={log}/munged.log",
                f"--seed-file={run}/munged.seed",
            ],
        )
        self._wait("munged answers", lambda: self._succeeds(["munge", "-n", "-S", f"{run}/munge.sock"]))
        if accounting:
            self._start_accounting(run, log)
        self._spawn("slurmctld", ["slurmctld", "-D", "-i", "-f", str(self.conf)])
        self._wait("slurmctld answers", lambda: self._succeeds(["scontrol", "ping"]))
        for i in range(nodes):
            self._spawn(f"slurmd {i}", ["slurmd", "-D", "-N", f"127.0.0.{10 + i}", "-f", str(self.conf)])

    def _start_accounting(self, run: Path, log: Path) -> None:
        data, sock = self.folder / "database", run / "mysql.sock"
        user = getpass.getuser()
        install = ["mariadb-install-db", "--no-defaults", f"--datadir={data}", "--skip-test-db", f"--user={user}"]
        install.append("--auth-root-authentication-method=normal")
        self._check(install)
        server = ["mariadbd", "--no-defaults", f"--datadir={data}", f"--socket={sock}", "--skip-networking"]
        self._spawn("mariadbd", [*server, f"--pid-file={run}/mariadbd.pid", f"--user={user}"])
        client = ["mariadb", "--no-defaults", f"--socket={sock}", "--user=root"]
        self._wait("the database answers", lambda: self._succeeds([*client, "-e", "select 1"]))
        account = f"'{user}'@'localhost'"
        self._check([*client, "-e", f"create user if not exists {account}; grant all on *.* to {account}"])
        self._spawn("slurmdbd", ["slurmdbd", "-D"], MYSQL_UNIX_PORT=str(sock))
        name = self.conf.read_text().splitlines()[0].removeprefix("ClusterName=")
        self._wait("slurmdbd answers", lambda: self._succeeds(["sacctmgr", "-i", "list", "cluster"]))
        self._check(["sacctmgr", "-i", "add", "cluster", name])

    def _spawn(self, name: str, command: list[str], **environment: str) -> None:
        with (self.folder / "log" / f"{name.replace(' ', '_')}.out").open("wb") as out:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env={**self.environment, **environment},
                cwd=self.folder,
                start_new_session=True,
            )
        daemons = self._recorded() | {name: [process.pid, _start_time(process.pid)]}
        new = self._daemons.with_suffix(".new")
        new.write_text(json.dumps(daemons, indent=1) + "\n")
        new.replace(self._daemons)

    # --- down ---------------------------------------------------------------------------------------------------------

    def down(self) -> None:
        """End its jobs and its daemons, whatever is left of them. The folder stays, with the logs."""
        if self.running().get("slurmctld"):
            self._succeeds(["scancel", "--user", getpass.getuser()])
            with contextlib.suppress(ClusterError):
                self._wait("no job is left", lambda: not self._output(["squeue", "--noheader"]).strip(), 15.0)
        recorded = self._recorded()
        for name in reversed(recorded):
            _end(*recorded[name])
        for pid in self._members():  # steps and jobs whose slurmd was gone
            _end(pid, _start_time(pid), patience=2.0)
        self._daemons.unlink(missing_ok=True)

    def _members(self) -> list[int]:
        """Processes that run in this cluster, by their environment."""
        mark = f"SLURM_CONF={self.conf}".encode()
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit() and int(folder.name) != os.getpid():
                with contextlib.suppress(OSError):
                    inside = mark in (folder / "environ").read_bytes().split(b"\0")
                    if inside and (b"SLURM_JOB_ID=" in (folder / "environ").read_bytes() or _is_daemon(folder)):
                        found.append(int(folder.name))
        return found

    # --- status -------------------------------------------------------------------------------------------------------

    def running(self) -> dict[str, bool]:
        """Of each daemon that was started, whether it lives; empty when the cluster is down."""
        return {name: _lives(pid, started) for name, (pid, started) in self._recorded().items()}

    def nodes(self) -> dict[str, str]:
        """From name to Slurm's state."""
        rows = self._output(["sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T"]).splitlines()
        return dict(tuple(row.split(maxsplit=1)) for row in rows if " " in row)  # type: ignore[misc]

    def problems(self) -> list[str]:
        """What is not as it should be, a line each."""
        running = self.running()
        if not running:
            return [f"no cluster runs in {self.folder}: start one with up"]
        dead = [
            f"{name} has ended: see {self.folder}/log, then down and up" for name, lives in running.items() if not lives
        ]
        if dead:
            return dead
        lost = [f"node {name} is {state}" for name, state in self.nodes().items() if state.startswith(("down", "unk"))]
        return lost if self.nodes() else ["slurmctld does not answer: see its log, then down and up"]

    def _idle_nodes(self) -> int:
        for name, lives in self.running().items():
            if not lives:
                raise ClusterError(f"{name} ended while starting ({self._last_words(name)}): see {self.folder}/log")
        return sum(state == "idle" for state in self.nodes().values())

    def _last_words(self, name: str) -> str:
        out = self.folder / "log" / f"{name.replace(' ', '_')}.out"
        return (out.read_text(errors="replace").strip().splitlines() or ["no message"])[-1]

    # --- processes ----------------------------------------------------------------------------------------------------

    def _recorded(self) -> dict[str, tuple[int, int]]:
        try:
            return {
                name: (int(pid), int(start)) for name, (pid, start) in json.loads(self._daemons.read_text()).items()
            }
        except FileNotFoundError:
            return {}

    def _wait(self, what: str, true: Callable[[], bool], patience: float = PATIENCE) -> None:
        until = time.monotonic() + patience
        while not true():
            if time.monotonic() > until:
                raise ClusterError(f"waited {patience:g} s until {what}: see {self.folder}/log")
            time.sleep(0.1)

    def _succeeds(self, command: list[str]) -> bool:
        return subprocess.run(command, capture_output=True, env=self.environment, timeout=PATIENCE).returncode == 0

    def _output(self, command: list[str]) -> str:
        return subprocess.run(command, capture_output=True, text=True, env=self.environment, timeout=PATIENCE).stdout

    def _check(self, command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment, timeout=PATIENCE)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise ClusterError(f"{command[0]} failed ({reason}): see {self.folder}/log")


def _scrubbed(environment: os._Environ[str]) -> dict[str, str]:
    """Without what an enclosing job says, which Slurm's commands would obey."""
    return {key: value for key, value in environment.items() if not key.startswith(("SLURM", "SBATCH", "MUNGE"))}


def _require_programs(accounting: bool) -> None:
    wanted = ["munged", "slurmctld", "slurmd", "sbatch"]
    wanted += ["slurmdbd", "mariadbd", "mariadb-install-db"] if accounting else []
    missing = [name for name in wanted if shutil.which(name, path=PATH) is None]
    if missing:
        raise ClusterError(f"{', '.join(missing)} not found: apt-get install --no-install-recommends {PACKAGES}")


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Only one cluster of this user looks for ports at a time."""
    with (Path(tempfile.gettempdir()) / f".local_cluster_{os.getuid()}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _free_port(nodes: int) -> int:
    for base in range(FIRST_PORT, FIRST_PORT + CLUSTERS * PORT_STEP, PORT_STEP):
        if all(_is_free(port) for port in (base, base + 1, *range(base + 10, base + 10 + nodes))):
            return base
    raise ClusterError(f"no free ports from {FIRST_PORT} on: end another cluster with down")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True


def _start_time(pid: int) -> int:
    """Of a process, in clock ticks since boot: a pid that was used again is not taken for the old one. 0 for none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return 0


def _lives(pid: int, started: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return _start_time(pid) == started and state != "Z"


def _is_daemon(folder: Path) -> bool:
    return (folder / "comm").read_text().strip() in {"slurmstepd", "slurmd"}


def _end(pid: int, started: int, patience: float = 15.0) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        until = time.monotonic() + patience
        if _lives(pid, started):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        while _lives(pid, started) and time.monotonic() < until:
            time.sleep(0.05)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def parser(description: str, example: str) -> argparse.ArgumentParser:
    """With ``--dir``, which all three commands take."""
    made = argparse.ArgumentParser(
        description=description, epilog=f"example:\n{example}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--dir", type=Path, default=default_folder(), help="folder of all state (default: %(default)s)")
    return made


def run(command: Callable[[], int]) -> int:
    """The exit status of ``command``; what the user can mend is one line."""
    try:
        return command()
    except (ClusterError, subprocess.TimeoutExpired) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
