"""Hosts inside one machine: each with its own addresses, sshd, process ids, host name and /dev/shm.

A host is a set of Linux namespaces. Their bridge lies in a namespace of its own without a way out, so that all traffic
stays on this machine. They share the file system, as hosts with NFS do.
"""

import itertools
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

NEEDED = {"ip": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client", "pdsh": "pdsh", "nsenter": "util-linux"}
START_SECONDS = 10
_NUMBERS = itertools.count()  # a process may have several groups of hosts at a time

# The first process of a host. sshd insists on its folder; a host's shared memory is its own.
INIT = """
hostname {name}
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs /run && mkdir -p /run/sshd
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
exec {sshd} -D -e -f {folder}/sshd_config
"""
SSH_CONFIG = """Host *
  IdentityFile {folder}/id
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
  StrictHostKeyChecking yes
  BatchMode yes
  ConnectTimeout 5
"""
SSHD_CONFIG = """ListenAddress {address}
HostKey {folder}/hostkey
AuthorizedKeysFile {folder}/id.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
PrintMotd no
MaxStartups 200
"""


def missing() -> str | None:
    """Why there can be no hosts on this machine, or None."""
    if os.geteuid() != 0:
        return "needs root to make network namespaces"
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    absent = [package for program, package in NEEDED.items() if shutil.which(program, path=path) is None]
    if absent:
        return f"needs {', '.join(absent)} (apt-get install)"
    probe = subprocess.run(["unshare", "--net", "--pid", "--mount", "--fork", "true"], capture_output=True, check=False)
    return f"cannot make namespaces here: {probe.stderr.decode().strip()}" if probe.returncode else None


class Hosts:
    """``count`` hosts, node-0 and so on, up while ``with`` lasts. ``folder`` is an empty one of their own."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.names = [f"node-{number}" for number in range(count)]
        self._tag = f"rcp{os.getpid()}-{next(_NUMBERS)}"
        self._bridge = f"{self._tag}-bridge"
        self._first_processes: dict[str, int] = {}
        self._unshared: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        try:
            self._up()
        except BaseException:
            self._down()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._down()

    def address(self, name: str) -> str:
        """A host's address."""
        return f"10.77.0.{10 + self.names.index(name)}"

    def hostfile(self, path: Path, hosts: Sequence[str] = (), slots: int = 1) -> Path:
        """Write a DeepSpeed hostfile of some of the hosts, or of all."""
        path.write_text("".join(f"{name} slots={slots}\n" for name in hosts or self.names))
        return path

    def inside(self, name: str, command: Sequence[str]) -> list[str]:
        """The command line that runs ``command`` on a host, in this process's folder and environment."""
        first = str(self._first_processes[name])
        return ["nsenter", "-t", first, "-n", "-m", "-u", "-i", "-p", f"--wd={os.getcwd()}", "--", *command]

    @contextmanager
    def cut_off(self, name: str) -> Iterator[None]:
        """A host's network is down while ``with`` lasts."""
        link = ("ip", "-n", self._namespace(name), "link", "set", "eth0")
        _run(*link, "down")
        try:
            yield
        finally:
            _run(*link, "up")

    @contextmanager
    def covered(self, name: str, path: Path, by: Path | str) -> Iterator[None]:
        """One host sees another file or folder at a path; "tmpfs" is an empty folder of its own."""
        mount = ["-t", "tmpfs", "tmpfs"] if by == "tmpfs" else ["--bind", str(by)]
        _run(*self.inside(name, ["mount", *mount, str(path)]))
        try:
            yield
        finally:
            _run(*self.inside(name, ["umount", "-l", str(path)]))

    def limit(self, name: str, rate: str) -> None:
        """Limit what a host sends, such as to "100mbit"."""
        shaping = f"tc qdisc replace dev eth0 root tbf rate {rate} burst 128kb latency 200ms"
        _run("ip", "netns", "exec", self._namespace(name), *shaping.split())

    def processes(self, name: str) -> list[str]:
        """The Python processes that are alive on a host, "<pid> <command line>" each."""
        listed = subprocess.run(
            self.inside(name, ["ps", "-eo", "pid,args", "--no-headers"]), capture_output=True, text=True, check=True
        )
        lines = map(str.strip, listed.stdout.splitlines())
        return [line for line in lines if "python" in line.partition(" ")[2].partition(" ")[0]]

    def kill(self, name: str, word: str, signum: signal.Signals = signal.SIGKILL) -> None:
        """Signal the oldest Python process of a host whose command line holds ``word``."""
        pids = [line.partition(" ")[0] for line in self.processes(name) if word in line]
        _run(*self.inside(name, ["kill", f"-{signum.value}", pids[0]]))

    def _namespace(self, name: str) -> str:
        return f"{self._tag}-{name}"

    def _etc(self, name: str) -> Path:
        return Path("/etc/netns", self._namespace(name))

    def _up(self) -> None:
        self.folder.chmod(0o700)
        for key in ("id", "hostkey"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", key, "-f", str(self.folder / key))
        kind, public = (self.folder / "hostkey.pub").read_text().split()[:2]
        known = (f"{name},{self.address(name)} {kind} {public}\n" for name in self.names)
        (self.folder / "known_hosts").write_text("".join(known))
        _run("ip", "netns", "add", self._bridge)
        _run("ip", "-n", self._bridge, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", self._bridge, "link", "set", "br0", "up")
        for number, name in enumerate(self.names):
            self._start(number, name)

    def _start(self, number: int, name: str) -> None:
        namespace, etc, folder = self._namespace(name), self._etc(name), self.folder / name
        folder.mkdir()
        (etc / "ssh").mkdir(parents=True)
        (etc / "ssh/ssh_config").write_text(SSH_CONFIG.format(folder=self.folder))
        names = (f"{self.address(other)} {other}\n" for other in self.names)
        (etc / "hosts").write_text("127.0.0.1 localhost\n" + "".join(names))
        _run("ip", "netns", "add", namespace)
        _run(*f"ip -n {namespace} link add eth0 type veth peer name v{number} netns {self._bridge}".split())
        _run(*f"ip -n {self._bridge} link set v{number} master br0 up".split())
        _run(*f"ip -n {namespace} addr add {self.address(name)}/24 dev eth0".split())
        for device in ("lo", "eth0"):
            _run(*f"ip -n {namespace} link set {device} up".split())
        shutil.copy(self.folder / "hostkey", folder / "hostkey")
        config = SSHD_CONFIG.format(address=self.address(name), folder=self.folder)
        (folder / "sshd_config").write_text(config)
        sshd = shutil.which("sshd", path="/usr/sbin:/sbin:" + os.environ.get("PATH", ""))
        script = INIT.format(name=name, sshd=sshd, folder=folder)
        log = (folder / "sshd.log").open("wb")
        own = "--uts --ipc --pid --fork --kill-child --mount --mount-proc".split()  # noqa: SIM905
        unshare = ["unshare", *own, "sh", "-ec"]
        process = subprocess.Popen(
            ["ip", "netns", "exec", namespace, *unshare, script], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        log.close()
        self._unshared.append(process)
        deadline = time.monotonic() + START_SECONDS
        while "listening on" not in (folder / "sshd.log").read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{name}: sshd did not start:\n{(folder / 'sshd.log').read_text()}")
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        self._first_processes[name] = int(children[0])

    def _down(self) -> None:
        # Killing the first process of a host's process ids ends all of them.
        for first in self._first_processes.values():
            os.kill(first, signal.SIGKILL)
        for process in self._unshared:
            process.kill()
            process.wait()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", self._namespace(name)], capture_output=True, check=False)
            shutil.rmtree(self._etc(name), ignore_errors=True)
        subprocess.run(["ip", "netns", "del", self._bridge], capture_output=True, check=False)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}: {done.stderr.strip()}")
