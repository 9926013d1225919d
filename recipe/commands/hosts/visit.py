"""Runs a probe on every host at once, over ssh with the options that pdsh would pass, and collects the answers.

Nothing from a hostfile reaches a shell.
"""

import json
import os
import re
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from subprocess import DEVNULL, PIPE
from tempfile import TemporaryFile
from threading import Timer
from typing import Any

from recipe.commands.hosts import probe
from recipe.distributed import is_this_machine

PROBE = ("-u", "-c", "from recipe.commands.hosts.probe import main; main()")
UNATTENDED = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=5")
NO_FOLDER, NO_INTERPRETER = 97, 98
KEEPALIVE_LIMIT_SECONDS = 60

# Fragments of ssh's messages, and the remedy for each.
_REMEDIES = {
    "could not resolve hostname": "correct the name in the hostfile, or make it known (DNS, /etc/hosts, ~/.ssh/config)",
    "permission denied": "ssh must not ask for a password: ssh-copy-id {host}",
    "host key verification failed": "log in once by hand and compare its key: ssh {host}",
    "host identification has changed": "compare its key and correct ~/.ssh/known_hosts",
    "connection refused": "start its sshd, or correct the port",
    "no route to host": "check that it is up and on the network",
    "timed out": "check that it is up and on the network",
    "no module named": "run this in the project's folder, with the same checkout and environment on every host",
}


@dataclass
class Host:
    """A host of the hostfile, with its answers by question in ``facts``."""

    name: str
    slots: int
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    is_gone: bool = False
    lacks_keepalive: bool = False


@dataclass(frozen=True)
class Launch:
    """The launch to check; ``data`` has the arguments of the probe's question of that name."""

    config: str | None
    precision: str
    data: Mapping[str, Any]
    output: str
    port: int
    environment: Mapping[str, str]


class VisitError(RuntimeError):
    """A host answers no more questions; the message gives the reason and the remedy."""


def examine(hosts: Sequence[Host], launch: Launch) -> tuple[list[str], list[str]]:
    """Fill in the facts and problems of each host; return the problems and notes that concern the launch as a whole."""
    first, *others = hosts
    if not others and not is_this_machine(first.name.rpartition("@")[2]):
        return [
            f"{first.name}, the only host, is not this machine, but DeepSpeed starts the ranks of a single host "
            "locally; run this command and deepspeed there"
        ], []
    visits: dict[str, Visit] = {}
    with ThreadPoolExecutor(len(hosts) + 1) as pool:
        try:
            # How DeepSpeed finds the master address: without pdsh's options, and even for this machine.
            master = pool.submit(_run, 15, "ssh", *UNATTENDED, "--", first.name, "hostname", "-I")
            _ask(hosts, visits, launch, master, pool)
        finally:
            for visit in list(visits.values()):
                visit.close()
    problems, notes = [], []
    found = master.result()
    if (found.returncode != 0 or not found.stdout.split()) and not first.is_gone:
        said = found.stderr.strip() or "it prints no address"
        reason = explain(found.returncode, said, first.name)
        if not others:
            reason = (
                f"{said.splitlines()[-1]}; it is this machine, which needs no ssh: launch with deepspeed --num_gpus "
                f"{first.slots} instead of --hostfile"
            )
        problems.append(f"DeepSpeed finds no master address by ssh {first.name} hostname -I: {reason}")
    silent = [host.name for host in hosts if host.lacks_keepalive]
    if silent:
        notes.append(
            f"without ssh keepalives it takes a launch minutes to notice that {', '.join(silent[:4])} "
            f"{'are' if len(silent) > 1 else 'is'} cut off; export "
            'PDSH_SSH_ARGS_APPEND="-tt -o ServerAliveInterval=5 -o ServerAliveCountMax=3"'
        )
    devices = [host.facts["devices"] for host in hosts if "devices" in host.facts]
    if devices and not any(found["gpus"] for found in devices):
        notes.append("torch sees no GPU: the ranks train on the CPU")
    return problems, notes


def _ask(
    hosts: Sequence[Host],
    visits: dict[str, "Visit"],
    launch: Launch,
    master: "Future[subprocess.CompletedProcess[str]]",
    pool: ThreadPoolExecutor,
) -> None:
    """Ask the questions in rounds of all hosts; a host that failed one is not asked what depends on it."""
    first, nonce = hosts[0], secrets.token_hex(8)

    def learn(host: Host, question: Callable[..., Any], **arguments: Any) -> None:
        seconds, trouble, remedy = probe.QUESTIONS[question]
        answer = visits[host.name].ask(question.__name__, seconds, **arguments)
        if "error" in answer:
            trouble = trouble.format(port=launch.port, output=launch.output)
            host.problems.append(f"{trouble}: {answer['error']}; {remedy}")
        else:
            host.facts[question.__name__] = answer["answer"]

    def together(step: Callable[[Host], None], members: Sequence[Host]) -> None:
        def guarded(host: Host) -> None:
            try:
                step(host)
            except VisitError as error:
                host.problems.append(str(error))
                host.is_gone = True

        list(pool.map(guarded, [host for host in members if not host.is_gone]))

    def arrive(host: Host) -> None:
        visits[host.name] = Visit(host.name, by_ssh=len(hosts) > 1)
        host.lacks_keepalive = len(hosts) > 1 and _lacks_keepalive(host.name)
        learn(host, probe.ready, environment=launch.environment)
        before = time.time()
        learn(host, probe.clock)
        host.facts["clock"] -= (before + time.time()) / 2
        learn(host, probe.checkout, config=launch.config)
        learn(host, probe.network)
        if host is first:
            learn(host, probe.take_port, port=launch.port)
        learn(host, probe.write_token, output=launch.output, nonce=nonce, name=host.name)

    def work(host: Host) -> None:
        learn(host, probe.devices, precision=launch.precision)
        if launch.data["folder"] is not None:
            learn(host, probe.data, **launch.data)

    together(arrive, hosts)
    wrote = [host for host in hosts if "write_token" in host.facts]
    together(lambda host: learn(host, probe.unseen, nonce=nonce, name=wrote[0].name), wrote[1:])
    together(work, hosts)
    members = [host for host in hosts if "devices" in host.facts and not host.is_gone]
    networks = {host.name: host.facts.get("network") for host in members}
    if len(members) < 2 or not all(network and not is_loopback(network["address"]) for network in networks.values()):
        return
    together(lambda host: learn(host, probe.unreached, networks=networks), members)
    members = [host for host in members if not host.is_gone]
    address = next(iter(master.result().stdout.split()), None)
    is_open = all(host.facts.get("unreached") == [] for host in members)
    if first not in members or len(members) < 2 or address is None or "take_port" not in first.facts or not is_open:
        return
    names = [host.name for host in members]
    meeting = {"address": address, "port": launch.port, "hosts": names}
    together(lambda host: learn(host, probe.exchange, rank=names.index(host.name), **meeting), members)
    missing = {name for host in members for name in host.facts.get("exchange", {}).get("missing", [])}
    for host in members:
        if host.name in missing and not host.problems:
            host.problems.append(f"it did not arrive at {address}:{launch.port}; open all ports between the hosts")


def is_loopback(address: str) -> bool:
    """Whether only the host itself can use the address."""
    return ip_address(address.partition("%")[0]).is_loopback


class Visit:
    """A running probe, started over ssh or as a child of this process."""

    def __init__(self, host: str, *, by_ssh: bool) -> None:
        command = ssh(host, remote_command()) if by_ssh else [sys.executable, *PROBE]
        # Not a pipe, which stays open as long as ssh shares the connection.
        self._host, self._stderr = host, TemporaryFile()  # noqa: SIM115 (until close)
        try:
            self._process = subprocess.Popen(
                command, stdin=PIPE, stdout=PIPE, stderr=self._stderr, text=True, errors="replace"
            )
        except OSError as error:
            raise VisitError(f"{command[0]}: {error.strerror}; install it on this machine") from None

    def ask(self, question: str, seconds: float, **arguments: Any) -> dict[str, Any]:
        """Return the probe's reply to a question: an ``answer`` or an ``error``.

        Raises:
            VisitError: no reply arrived in time.
        """
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        limit = Timer(seconds, process.kill)
        limit.start()
        try:
            with suppress(BrokenPipeError):
                print(json.dumps({"question": question} | arguments), file=process.stdin, flush=True)
            for line in process.stdout:
                _, mark, answer = line.partition(probe.MARK)
                if mark:
                    found: dict[str, Any] = json.loads(answer)
                    return found
            code = process.wait()
        finally:
            limit.cancel()
        if code < 0:
            raise VisitError(f'no answer to "{question}" within {seconds} s; check whether the host or its disks hang')
        written = os.fstat(self._stderr.fileno()).st_size
        said = os.pread(self._stderr.fileno(), 4096, max(0, written - 4096)).decode(errors="replace").strip()
        raise VisitError(explain(code, said, self._host))

    def close(self) -> None:
        """End the probe, after giving it time to remove its token."""
        try:
            self._process.communicate(timeout=2)  # closes its stdin
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        self._stderr.close()


def ssh(host: str, *remote: str) -> list[str]:
    """An ssh command line that fails instead of prompting; "--" keeps the host from being parsed as an option."""
    # -T overrides a -tt among pdsh's options: a terminal echoes, and cuts lines at 4 KiB.
    return ["ssh", *_pdsh_options(), "-T", *UNATTENDED, "--", host, *remote]


def _pdsh_options() -> list[str]:
    """The options that pdsh passes to ssh, split as pdsh splits them."""
    return ["-a", "-x", *os.environ.get("PDSH_SSH_ARGS_APPEND", "").split()]


def remote_command() -> str:
    """The shell command that starts the probe in this folder with this interpreter, as DeepSpeed starts its ranks."""
    folder, python = shlex.quote(os.getcwd()), shlex.quote(sys.executable)
    inherited = {name: value for name, value in os.environ.items() if name.startswith("PYTHON")}
    inherited["PYTHONPATH"] = ":".join(filter(None, (os.getcwd(), inherited.get("PYTHONPATH"))))
    exports = " ".join(shlex.quote(f"{name}={value}") for name, value in inherited.items())
    return (
        f"cd {folder} || exit {NO_FOLDER}; test -x {python} || exit {NO_INTERPRETER}; "
        f"exec env {exports} {python} {shlex.join(PROBE)}"
    )


def explain(code: int, said: str, host: str) -> str:
    """Why a probe has ended, and the remedy, from its exit code and the end of its stderr."""
    if code == NO_FOLDER:
        return f"no folder {os.getcwd()}; put the checkout at the same path on every host"
    if code == NO_INTERPRETER:
        return f"no interpreter {sys.executable}; put the environment at the same path on every host"
    last = said.splitlines()[-1].strip() if said else f"it exited with code {code} and no message"
    remedy = next((remedy for sign, remedy in _REMEDIES.items() if sign in said.lower()), "try it by hand: ssh {host}")
    return f"{last}; {remedy.format(host=host)}"


def _lacks_keepalive(host: str) -> bool:
    """Whether ssh to a host has no keepalive, or a very slow one, by which to notice a lost connection."""
    settings = _run(5, "ssh", "-G", *_pdsh_options(), "--", host).stdout
    interval = re.search(r"^serveraliveinterval (\d+)$", settings, re.MULTILINE)
    # Debian's ssh sets 300 under BatchMode.
    return interval is not None and not 0 < int(interval[1]) <= KEEPALIVE_LIMIT_SECONDS


def _run(seconds: float, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command on this machine; the exit code is 255 if it cannot start or takes too long."""
    try:
        return subprocess.run(
            command, stdin=DEVNULL, capture_output=True, errors="replace", timeout=seconds, check=False
        )
    except OSError as error:
        said = f"{command[0]}: {error.strerror}"
    except subprocess.TimeoutExpired:
        said = f"{command[0]}: timed out after {seconds:g} s"
    return subprocess.CompletedProcess(command, 255, "", said)
