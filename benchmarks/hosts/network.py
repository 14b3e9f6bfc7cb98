"""A network of several hosts on one machine: Linux network namespaces, joined by a bridge, every link at a given rate.

    host 0  eth0 ── port0 ┐
    host 1  eth0 ── port1 ┤ bridge      each link is a veth pair, limited in both directions by tc's token bucket:
     ...                  │             what a host sends at its eth0, what it receives at the bridge's port
    host N  eth0 ── portN ┘

Every namespace is named for this process, and all devices lie in the namespaces, so two networks never meet. They are
removed by a guard, a process that waits for the end of this one: after ctrl-C, after SIGKILL too.

Namespaces need root (CAP_NET_ADMIN, and CAP_SYS_ADMIN) and iproute2.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import IO

from sfw_dist.errors import UserError

DEVICE = "eth0"
"""Every host's device; its counters are below ``/sys/class/net/eth0/statistics`` for processes of that host."""

_PORT = 29500  # each network has its own, so it is always free
_BURST = "256kb"  # more than the 64 KB that TCP hands to a device at once, and 2 ms at 1 Gbit/s
_QUEUE = "100ms"  # long enough that the buckets delay and never drop


class FailedRanksError(Exception):
    """A rank ended with an error, or did not end; the message has its last lines."""


@dataclass(frozen=True)
class Host:
    """One host of the network."""

    namespace: str
    address: str


@contextmanager
def hosts(count: int, gbit_per_second: float) -> Iterator[list[Host]]:
    """``count`` hosts that send and receive at ``gbit_per_second`` each; their processes end with the block.

    Raises:
        UserError: no rights to make namespaces, or no ``ip`` or ``tc``.
    """
    if os.geteuid() != 0:
        raise UserError("a network of namespaces needs root (CAP_NET_ADMIN): run it with sudo, or in a root container")
    missing = [program for program in ("ip", "tc") if shutil.which(program) is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} not found: apt-get install iproute2")

    prefix = f"sfw{os.getpid()}"
    bridge = f"{prefix}bridge"
    found = [Host(f"{prefix}host{i}", f"10.0.{i // 250}.{i % 250 + 1}") for i in range(count)]
    guard = subprocess.Popen(
        [sys.executable, __file__, bridge, *(host.namespace for host in found)],
        stdin=subprocess.PIPE,
        start_new_session=True,  # a terminal's ctrl-C is not for it
    )
    assert guard.stdin is not None
    try:
        _join(bridge, found, f"{gbit_per_second}gbit")
        yield found
    finally:
        guard.stdin.close()
        guard.wait()


def run_ranks(
    found: Sequence[Host], command: Sequence[str], timeout: float, environment: Mapping[str, str] | None = None
) -> str:
    """Run ``command`` as one rank on each host, with torchrun's environment and gloo on the hosts' network.

    Returns:
        What rank 0 wrote to stdout.

    Raises:
        FailedRanksError: a rank failed, or ran longer than ``timeout`` seconds; the others were ended.
    """
    shared = {
        "WORLD_SIZE": str(len(found)),
        "LOCAL_WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": found[0].address,
        "MASTER_PORT": str(_PORT),
        "GLOO_SOCKET_IFNAME": DEVICE,
    }
    ranks: list[subprocess.Popen[bytes]] = []
    with ExitStack() as files:
        out = [files.enter_context(tempfile.TemporaryFile()) for _ in found]
        err = [files.enter_context(tempfile.TemporaryFile()) for _ in found]
        try:
            for rank, host in enumerate(found):
                ranks.append(
                    subprocess.Popen(
                        ["ip", "netns", "exec", host.namespace, *command],
                        env={**os.environ, **shared, **(environment or {}), "RANK": str(rank)},
                        stdin=subprocess.DEVNULL,
                        stdout=out[rank],
                        stderr=err[rank],
                        start_new_session=True,  # ctrl-C is for this process, which then ends the ranks
                    )
                )
            _wait(ranks, err, timeout)
        finally:
            for process in ranks:
                process.kill()  # nothing happens to one that has ended
            for process in ranks:
                process.wait()
        return _text(out[0])


def _wait(ranks: Sequence[subprocess.Popen[bytes]], err: Sequence[IO[bytes]], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while None in (codes := [process.poll() for process in ranks]) and not any(codes):
        if time.monotonic() > deadline:
            running = [rank for rank, code in enumerate(codes) if code is None]
            tails = "".join(_tail(rank, err[rank]) for rank in running)
            raise FailedRanksError(f"ranks {running} did not end within {timeout:g} s, and were ended{tails}")
        time.sleep(0.1)
    failed = [rank for rank, code in enumerate(codes) if code]
    if failed:  # the one at fault, and perhaps others whose connection to it broke
        statuses = ", ".join(f"rank {rank} with status {codes[rank]}" for rank in failed)
        raise FailedRanksError(f"failed: {statuses}" + "".join(_tail(rank, err[rank]) for rank in failed))


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _tail(rank: int, file: IO[bytes], lines: int = 8) -> str:
    return "".join(f"\n  rank {rank}: {line}" for line in _text(file).splitlines()[-lines:])


def _join(bridge: str, found: Sequence[Host], rate: str) -> None:
    """Make the namespaces, the bridge, and a link from each host to it."""
    _run("ip", "netns", "add", bridge)
    _run("ip", "-n", bridge, "link", "add", "bridge", "type", "bridge")
    _run("ip", "-n", bridge, "link", "set", "bridge", "up")
    bucket = ("root", "tbf", "rate", rate, "burst", _BURST, "latency", _QUEUE)
    for number, host in enumerate(found):
        here, port = host.namespace, f"port{number}"
        _run("ip", "netns", "add", here)
        _run("ip", "link", "add", DEVICE, "netns", here, "type", "veth", "peer", "name", port, "netns", bridge)
        _run("ip", "-n", bridge, "link", "set", port, "master", "bridge")
        for namespace, device in ((here, DEVICE), (bridge, port)):
            _run("tc", "-n", namespace, "qdisc", "add", "dev", device, *bucket)
            # No IPv6 address: its announcements would be counted, and gloo might take it.
            _run("ip", "-n", namespace, "link", "set", device, "addrgenmode", "none", "up")
        _run("ip", "-n", here, "address", "add", f"{host.address}/16", "dev", DEVICE)
        _run("ip", "-n", here, "link", "set", "lo", "up")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        said = " ".join(done.stderr.split()) or f"status {done.returncode}"
        raise UserError(f"`{' '.join(command)}` failed ({said}): needs CAP_NET_ADMIN, CAP_SYS_ADMIN, veth, bridge, tbf")


def _guard(namespaces: Sequence[str]) -> None:
    """Wait until nobody holds the other end of stdin, then end all processes in the namespaces and remove them."""
    sys.stdin.read()
    for name in namespaces:
        inside = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
        for pid in inside.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)  # absent if it was never made


if __name__ == "__main__" and len(sys.argv) > 1:
    _guard(sys.argv[1:])
