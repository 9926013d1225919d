"""``python -m recipe hosts`` on hosts that are well, and with each trap made for real."""

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
from tests.launch import DIGITS, ROOT
from tests.multinode.cluster import Cluster, wait_until

pytestmark = [pytest.mark.multinode, pytest.mark.slow]

LIMIT_SECONDS = 90  # in which even a host that hangs is named, on a busy machine
LISTEN = "import socket, time; s = socket.create_server(('', 29500)); print('listening', flush=True); time.sleep(600)"


def ask(cluster: Cluster, *arguments: str, hosts: Sequence[str] = (), **variables: str) -> tuple[int, str]:
    """Exit code and output of the command on the first host."""
    hostfile = cluster.hostfile(cluster.home / "hostfile", hosts)
    command = [sys.executable, "-m", "recipe", "hosts", str(hostfile), *arguments]
    with cluster.started(command, on="node-0", **variables) as process:
        printed, _ = process.communicate(timeout=LIMIT_SECONDS)
    for name in cluster.names:
        wait_until(lambda name=name: "hosts.probe" not in "".join(cluster.processes(name)), seconds=10)
    assert "Traceback" not in printed, printed
    return process.returncode, printed


def problems(cluster: Cluster, *arguments: str, hosts: Sequence[str] = ()) -> list[str]:
    """The problems that the command finds, of which there must be some."""
    code, printed = ask(cluster, *arguments, hosts=hosts)
    assert code == 1, printed
    found = [line.removeprefix("problem: ") for line in printed.splitlines() if line.startswith("problem: ")]
    assert f"A launch would fail or go wrong: {len(found)} problem" in printed.splitlines()[-1]
    return found


@contextmanager
def covered(cluster: Cluster, host: str, path: Path, by: Path | str) -> Iterator[None]:
    """One host sees another file or folder at a path; "tmpfs" is an empty folder of its own."""
    mount = ["-t", "tmpfs", "tmpfs"] if by == "tmpfs" else ["--bind", str(by)]
    subprocess.run(cluster.inside(host, ["mount", *mount, str(path)]), check=True)
    try:
        yield
    finally:
        subprocess.run(cluster.inside(host, ["umount", "-l", str(path)]), check=True)


def test_hosts_that_are_well(four_hosts: Cluster, tmp_path: Path) -> None:
    code, printed = ask(four_hosts, "--config", DIGITS, "--output", str(tmp_path / "not/yet/there"))
    assert code == 0, printed
    rows = printed.splitlines()
    assert rows[0].split()[:4] == ["host", "slots", "device", "address"]
    for number in range(4):
        assert re.fullmatch(
            rf"node-{number} +1 +(CPU|1 × \S.*) +10\.77\.0\.{10 + number} +\S+ +\S+ +\S+ +\S+ +[0-9a-f]{{8}}\+? "
            rf" [+-]0\.\d\d s +\d+\.\d\d ms to node-(?!{number})\d +\d+(\.\d)? [MG]bit/s to node-(?!{number})\d",
            rows[number + 1],
        ), printed
    assert re.fullmatch(r"A launch would work: 4 ranks on 4 hosts \(checked in \d+ s\)\.", rows[-1])
    assert "problem" not in printed
    assert not list(tmp_path.iterdir())


def test_the_measured_bandwidth_is_that_of_the_link(two_hosts: Cluster) -> None:
    two_hosts.limit("node-1", "100mbit")
    try:
        code, printed = ask(two_hosts)
    finally:
        two_hosts.unlimit("node-1")
    assert code == 0, printed
    measured = [float(rate) for rate in re.findall(r"(\d+) Mbit/s to node", printed)]
    assert len(measured) == 2, printed
    assert all(70 < rate < 140 for rate in measured), printed


def test_keepalives(two_hosts: Cluster) -> None:
    assert "note: without ssh keepalives" in ask(two_hosts)[1]
    options = f"-tt -o ServerAliveInterval={KEEPALIVE_LIMIT_SECONDS}"
    code, printed = ask(two_hosts, PDSH_SSH_ARGS_APPEND=options)
    assert code == 0
    assert "keepalive" not in printed


def test_a_host_that_is_cut_off(two_hosts: Cluster) -> None:
    two_hosts.link("node-1", "down")
    try:
        (problem,) = problems(two_hosts)
    finally:
        two_hosts.link("node-1", "up")
    assert re.match(
        r"node-1: ssh: connect to host node-1 port 22: (Connection timed out|No route to host); look whether", problem
    )


def test_a_host_that_nobody_knows(two_hosts: Cluster) -> None:
    (problem,) = problems(two_hosts, hosts=["node-0", "node-9"])
    assert problem.startswith("node-9: ssh: Could not resolve hostname node-9: ")
    assert "correct the name in the hostfile" in problem


def test_a_key_that_is_refused(two_hosts: Cluster) -> None:
    with covered(two_hosts, "node-1", two_hosts.folder / "id.pub", "/dev/null"):
        (problem,) = problems(two_hosts)
    assert "Permission denied" in problem
    assert problem.endswith("; ssh to it must ask no password: ssh-copy-id node-1")


def test_a_host_whose_key_is_not_known(two_hosts: Cluster, tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    lines = (two_hosts.folder / "known_hosts").read_text().splitlines(keepends=True)
    known.write_text(lines[0])
    with covered(two_hosts, "node-0", two_hosts.folder / "known_hosts", known):
        (problem,) = problems(two_hosts)
    assert problem == "node-1: Host key verification failed.; log in once by hand and compare its key: ssh node-1"


def test_another_interpreter_path(two_hosts: Cluster, tmp_path: Path) -> None:
    with covered(two_hosts, "node-1", Path(sys.executable).parent, tmp_path):
        (problem,) = problems(two_hosts)
    assert problem == (f"node-1: no interpreter {sys.executable}; have the environment in the same place on every host")


def test_other_code_and_another_clock(two_hosts: Cluster, tmp_path: Path) -> None:
    """The other code's clock is ahead by ten seconds."""
    probe = ROOT / "recipe/commands/hosts/probe.py"
    changed = tmp_path / "probe.py"
    changed.write_text(probe.read_text().replace("return time.time()", "return time.time() + 10"))
    with covered(two_hosts, "node-1", probe, changed):
        code, clock = problems(two_hosts)
    assert code == "node-1: other code in recipe/ than on node-0; bring the checkouts to one state"
    assert re.fullmatch(r"node-1: its clock is (9\.\d|10\.\d) s ahead of node-0's; set both by NTP", clock)


def test_another_config(two_hosts: Cluster, tmp_path: Path) -> None:
    changed = tmp_path / "changed.json"
    changed.write_text((ROOT / DIGITS).read_text() + "\n")
    with covered(two_hosts, "node-1", ROOT / DIGITS, changed):
        assert problems(two_hosts, "--config", DIGITS) == [
            "node-1: another config than on node-0; copy one file to all hosts"
        ]


def test_data_that_differs(two_hosts: Cluster, tmp_path: Path) -> None:
    data, less = write_folder(tmp_path / "data"), write_folder(tmp_path / "less", images=2)
    code, printed = ask(two_hosts, "--data", str(data))
    assert code == 0, printed
    assert printed.count("2 classes, 6 + 6 images") == 2
    with covered(two_hosts, "node-1", data, less):
        assert problems(two_hosts, "--data", str(data)) == [
            "node-1: the data has 2 classes, 4 + 4 images, on node-0 2 classes, 6 + 6 images; copy what is missing"
        ]
    with covered(two_hosts, "node-1", data, "tmpfs"):
        (problem,) = problems(two_hosts, "--data", str(data))
    assert problem.startswith(f"node-1: the data: recipe.data.path: {data} has no folder train/; ")


def test_an_output_folder_that_is_not_shared(two_hosts: Cluster, tmp_path: Path) -> None:
    with covered(two_hosts, "node-1", tmp_path, "tmpfs"):
        (problem,) = problems(two_hosts, "--output", str(tmp_path / "run"))
        left = subprocess.run(two_hosts.inside("node-1", ["ls", "-A", str(tmp_path)]), capture_output=True, check=True)
    assert problem.startswith("node-1: it does not share the output folder with node-0; ")
    assert left.stdout == b""
    assert not list(tmp_path.iterdir())


def test_an_output_folder_that_cannot_be_written(two_hosts: Cluster, tmp_path: Path) -> None:
    with covered(two_hosts, "node-1", tmp_path, "/proc"):
        (problem,) = problems(two_hosts, "--output", str(tmp_path))
    assert problem.startswith(f"node-1: cannot write to {tmp_path}: ")
    assert not list(tmp_path.iterdir())


def test_a_port_that_is_taken(two_hosts: Cluster) -> None:
    with two_hosts.started([sys.executable, "-c", LISTEN], on="node-0") as listener:
        assert listener.stdout is not None
        assert listener.stdout.readline() == "listening\n"
        (problem,) = problems(two_hosts)
        assert problem.startswith("node-0: port 29500: Address already in use; end what listens there")
        assert problem.endswith("or launch with deepspeed --master_port and check with --port")
        assert ask(two_hosts, "--port", "29501")[0] == 0


def test_a_port_that_others_do_not_reach(two_hosts: Cluster) -> None:
    """As behind a firewall that lets ssh through alone."""
    rule = ["ip", "rule", "add", "ipproto", "tcp", "dport", "29500", "prohibit"]
    subprocess.run(two_hosts.inside("node-1", rule), check=True)
    try:
        (problem,) = problems(two_hosts)
    finally:
        rule[2] = "del"
        subprocess.run(two_hosts.inside("node-1", rule), check=True)
    assert problem == (
        "node-1: the round trip: does not reach 10.77.0.10:29500 on the first host; open all ports between the hosts, "
        "or launch with --master_addr or GLOO_SOCKET_IFNAME"
    )


def test_two_hosts_that_do_not_reach_each_other(four_hosts: Cluster) -> None:
    route = ["ip", "route", "add", "blackhole", four_hosts.address("node-1")]
    subprocess.run(four_hosts.inside("node-2", route), check=True)
    try:
        found = problems(four_hosts)
    finally:
        route[2] = "del"
        subprocess.run(four_hosts.inside("node-2", route), check=True)
    remedy = "open all ports between the hosts, or name the interface that they share: GLOO_SOCKET_IFNAME=<interface>"
    assert found == [
        f"node-1: it does not reach node-2; {remedy} in .deepspeed_env",
        f"node-2: it does not reach node-1; {remedy} in .deepspeed_env",
    ]


def test_debians_127_0_1_1_and_its_remedy(two_hosts: Cluster, tmp_path: Path) -> None:
    names = tmp_path / "hosts"
    names.write_text("127.0.0.1 localhost\n127.0.1.1 node-1\n10.77.0.10 node-0\n")
    environment = two_hosts.home / ".deepspeed_env"
    before = environment.read_text()
    with covered(two_hosts, "node-1", Path("/etc/hosts"), names):
        (problem,) = problems(two_hosts)
        assert problem.startswith("node-1: its own name leads to 127.0.1.1, where no other host reaches it; ")
        try:
            environment.write_text(f"{before}GLOO_SOCKET_IFNAME=eth1\n")
            (problem,) = problems(two_hosts)
            assert "GLOO_SOCKET_IFNAME names eth1, which has no IPv4 address; the interfaces are eth0, lo" in problem
            environment.write_text(f"{before}GLOO_SOCKET_IFNAME=eth0\n")
            code, printed = ask(two_hosts)
        finally:
            environment.write_text(before)
    assert code == 0, printed


def test_one_machine_under_two_names(two_hosts: Cluster) -> None:
    (problem,) = problems(two_hosts, hosts=["node-0", "10.77.0.10"])
    assert problem == "10.77.0.10: the same machine as node-0; write one line for it, with all of its slots"


def test_a_host_that_hangs_does_not_hang_the_command(two_hosts: Cluster, tmp_path: Path) -> None:
    """It reads a pipe that nobody writes to in the place of the config, as from a server that does not answer."""
    config, pipe = ROOT / DIGITS, tmp_path / "pipe"
    os.mkfifo(pipe)
    with covered(two_hosts, "node-1", config, pipe):
        (problem,) = problems(two_hosts, "--config", DIGITS)
    assert problem == 'node-1: no answer to "checkout" within 15 s; look whether the host or its disks hang'
