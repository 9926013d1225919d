"""``python -m recipe hosts`` on good hosts, and on hosts with real faults, several at a time."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from recipe.commands.hosts.visit import KEEPALIVE_LIMIT_SECONDS
from tests.data.images import write_folder
from tests.launch import DIGITS, ROOT, wait_until
from tests.multinode.cluster import Cluster

pytestmark = [pytest.mark.multinode, pytest.mark.slow]

LIMIT_SECONDS = 120  # even with a host that hangs, on a busy machine
LISTEN = "import socket, time; s = socket.create_server(('', 29500)); print('listening', flush=True); time.sleep(600)"


def ask(cluster: Cluster, *arguments: str, hosts: Sequence[str] = (), **variables: str) -> tuple[int, list[str]]:
    """Exit code and lines of the command on the first host."""
    hostfile = cluster.hostfile(cluster.home / "hostfile", hosts)
    command = [sys.executable, "-m", "recipe", "hosts", str(hostfile)]
    command += ["--output", str(cluster.home / "run"), *arguments]
    with cluster.started(command, on="node-0", **variables) as process:
        printed, _ = process.communicate(timeout=LIMIT_SECONDS)
    for name in cluster.names:
        wait_until(lambda name=name: "hosts.probe" not in "".join(cluster.processes(name)), seconds=10)
    assert "Traceback" not in printed, printed
    assert not list(cluster.home.glob(".hosts-*"))
    return process.returncode, printed.splitlines()


def problems(cluster: Cluster, *arguments: str, hosts: Sequence[str] = ()) -> list[str]:
    """The problems that the command reports; there must be some."""
    code, lines = ask(cluster, *arguments, hosts=hosts)
    assert code == 1, lines
    found = [line.removeprefix("problem: ") for line in lines if line.startswith("problem: ")]
    assert f"A launch would fail or go wrong: {len(found)} problem" in lines[-1]
    return found


@contextmanager
def routed(cluster: Cluster, host: str, *rule: str) -> Iterator[None]:
    """Add a rule to the routing of one host, given as the words of ``ip`` without "add"."""
    subprocess.run(cluster.inside(host, ["ip", rule[0], "add", *rule[1:]]), check=True)
    try:
        yield
    finally:
        subprocess.run(cluster.inside(host, ["ip", rule[0], "del", *rule[1:]]), check=True)


def test_good_hosts(four_hosts: Cluster, tmp_path: Path) -> None:
    """A process on the default port is no problem if --port names another."""
    options = ("--config", DIGITS, "--output", str(tmp_path / "not/yet/there"), "--port", "29501")
    with four_hosts.started([sys.executable, "-c", LISTEN], on="node-0") as listener:
        assert listener.stdout is not None
        assert listener.stdout.readline() == "listening\n"
        code, rows = ask(four_hosts, *options)
    assert code == 0, rows
    assert rows[0].split()[:4] == ["host", "slots", "device", "address"]
    for number in range(4):
        assert re.fullmatch(
            rf"node-{number} +1 +(CPU|1 × \S.*) +10\.77\.0\.{10 + number}( +\S+){{5}} +([0-9a-f]{{8}} +){{2,3}}"
            rf"[+-]0\.\d\d s +\d+\.\d\d ms to node-(?!{number})\d +\d+(\.\d+)? Gbit/s to node-(?!{number})\d",
            rows[number + 1],
        ), rows
    assert re.fullmatch(r"A launch would work: 4 ranks on 4 hosts \(checked in \d+ s\)\.", rows[-1])
    assert "problem" not in "".join(rows)
    assert any(row.startswith("note: without ssh keepalives") for row in rows)
    assert not list(tmp_path.iterdir())


def test_debians_127_0_1_1_and_a_slow_link_after_its_remedy(two_hosts: Cluster, tmp_path: Path) -> None:
    names = tmp_path / "hosts"
    names.write_text("127.0.0.1 localhost\n127.0.1.1 node-1\n10.77.0.10 node-0\n")
    environment = two_hosts.home / ".deepspeed_env"
    before = environment.read_text()
    with two_hosts.covered("node-1", Path("/etc/hosts"), names):
        (problem,) = problems(two_hosts)
        assert problem.startswith("node-1: its own name resolves to 127.0.1.1, which other hosts cannot reach; ")
        two_hosts.limit("node-1", "100mbit")
        environment.write_text(f"{before}GLOO_SOCKET_IFNAME=eth0\n")
        try:
            options = f"-tt -o ServerAliveInterval={KEEPALIVE_LIMIT_SECONDS}"
            code, lines = ask(two_hosts, PDSH_SSH_ARGS_APPEND=options)
        finally:
            environment.write_text(before)
    printed = "\n".join(lines)
    assert code == 0, printed
    measured = [float(rate) for rate in re.findall(r"(\S+) Gbit/s to node", printed)]
    assert len(measured) == 2, printed
    assert all(0.07 < rate < 0.14 for rate in measured), printed
    assert "keepalive" not in printed


def test_hosts_that_ssh_cannot_reach(four_hosts: Cluster, tmp_path: Path) -> None:
    """One is cut off, one refuses the key, one has an unknown key, and one has an unknown name."""
    keys, known = four_hosts.folder / "known_hosts", tmp_path / "known_hosts"
    known.write_text("".join(keys.read_text().splitlines(keepends=True)[:3]))
    with (
        four_hosts.cut_off("node-1"),
        four_hosts.covered("node-2", four_hosts.folder / "id.pub", "/dev/null"),
        four_hosts.covered("node-0", keys, known),
    ):
        cut_off, refused, strange, unknown = problems(four_hosts, hosts=[*four_hosts.names, "node-9"])
    assert re.match(
        r"node-1: ssh: connect to host node-1 port 22: (Connection timed out|No route to host); check that it is up",
        cut_off,
    )
    assert re.fullmatch(r"node-2: .*Permission denied.*; ssh must not ask for a password: ssh-copy-id node-2", refused)
    assert strange == "node-3: Host key verification failed.; log in once by hand and compare its key: ssh node-3"
    assert unknown.startswith("node-9: ssh: Could not resolve hostname node-9: ")
    assert "correct the name in the hostfile" in unknown


def test_different_code_clock_and_config_and_a_host_that_hangs(four_hosts: Cluster, tmp_path: Path) -> None:
    """The changed code has a clock ten seconds ahead; the last host reads its config from a pipe that stays empty."""
    probe, config = ROOT / "recipe/commands/hosts/probe.py", ROOT / DIGITS
    changed, pipe, other = tmp_path / "probe.py", tmp_path / "pipe", tmp_path / "changed.json"
    changed.write_text(probe.read_text().replace("return time.time()", "return time.time() + 10"))
    other.write_text(config.read_text() + "\n")
    os.mkfifo(pipe)
    with (
        four_hosts.covered("node-1", probe, changed),
        four_hosts.covered("node-2", config, other),
        four_hosts.covered("node-3", config, pipe),
    ):
        found = problems(four_hosts, "--config", DIGITS)
    digest = r"\S+( \S+)?"
    for problem, expected in zip(
        found,
        [
            rf"node-1: code {digest}, node-0 has {digest}; make the checkouts identical",
            r"node-1: its clock is (9\.\d|10\.\d) s ahead of node-0's; synchronise both by NTP",
            rf"node-2: config {digest}, node-0 has {digest}; copy the same file to all hosts",
            r'node-3: no answer to "checkout" within 15 s; check whether the host or its disks hang',
        ],
        strict=True,
    ):
        assert re.fullmatch(expected, problem), found


def test_different_data_and_output_folders_and_a_missing_interpreter(four_hosts: Cluster, tmp_path: Path) -> None:
    data, less = write_folder(tmp_path / "data"), write_folder(tmp_path / "less", images=2)
    output, python = tmp_path / "output", Path(sys.executable)
    output.mkdir()
    with (
        four_hosts.covered("node-1", data, less),
        four_hosts.covered("node-1", output, "tmpfs"),
        four_hosts.covered("node-2", data, "tmpfs"),
        four_hosts.covered("node-2", output, "/proc"),
        four_hosts.covered("node-3", python.parent, tmp_path),
    ):
        found = problems(four_hosts, "--data", str(data), "--output", str(output / "run"))
        left = subprocess.run(four_hosts.inside("node-1", ["ls", "-A", str(output)]), capture_output=True, check=True)
    unshared, different, unwritable, absent, interpreter = found
    assert different == "node-1: data 2 classes, 4 + 4 images, node-0 has 2 classes, 6 + 6 images; copy what is missing"
    assert unshared.startswith("node-1: it does not share the output folder with node-0; ")
    assert unwritable.startswith(f"node-2: cannot write to {output / 'run'}: ")
    assert absent.startswith(f"node-2: the data: recipe.data.path: {data} has no folder train/; ")
    assert interpreter == (f"node-3: no interpreter {python}; put the environment at the same path on every host")
    assert left.stdout == b""
    assert not list(output.iterdir())


def test_port_in_use_on_one_machine_under_two_names(two_hosts: Cluster) -> None:
    with two_hosts.started([sys.executable, "-c", LISTEN], on="node-0") as listener:
        assert listener.stdout is not None
        assert listener.stdout.readline() == "listening\n"
        taken, twice = problems(two_hosts, hosts=["node-0", "10.77.0.10"])
    assert taken.startswith("node-0: port 29500: Address already in use; stop what listens there")
    assert twice == "10.77.0.10: the same machine as node-0; write one line for it, with all of its slots"


def test_closed_master_port_and_hosts_that_cannot_reach_each_other(four_hosts: Cluster) -> None:
    """The first as behind a firewall that only lets ssh through."""
    hosts = four_hosts.names[:2]
    with routed(four_hosts, "node-1", "rule", "ipproto", "tcp", "dport", "29500", "prohibit"):
        (problem,) = problems(four_hosts, hosts=hosts)
    address = four_hosts.address("node-0")
    assert problem == (
        f"node-1: the round trip: cannot reach {address}:29500 on the first host; open all ports between the hosts, or "
        "launch with --master_addr or GLOO_SOCKET_IFNAME"
    )
    with routed(four_hosts, "node-2", "route", "blackhole", four_hosts.address("node-1")):
        found = problems(four_hosts)
    remedy = "open all ports between the hosts, or name their common interface: GLOO_SOCKET_IFNAME=<interface>"
    assert found == [
        f"node-1: it cannot reach node-2; {remedy} in .deepspeed_env",
        f"node-2: it cannot reach node-1; {remedy} in .deepspeed_env",
    ]
