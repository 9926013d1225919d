"""Asks a probe on each host, all hosts at once: by ssh, as pdsh would call it.

No text of a hostfile reaches a shell here.
"""

import asyncio
import json
import os
import re
import secrets
import shlex
import subprocess
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from tempfile import TemporaryFile
from typing import IO, Any

from recipe.distributed import is_this_machine

MARK = "recipe-hosts: "  # begins each answer of a probe
PROBE = ("-u", "-m", "recipe.commands.hosts.probe")
CONNECT_SECONDS = 5
READY_SECONDS = 30  # for the login and for starting Python from a cold or distant disk
NO_FOLDER, NO_INTERPRETER = 97, 98
KEEPALIVE_LIMIT_SECONDS = 60
KEEPALIVE = 'export PDSH_SSH_ARGS_APPEND="-tt -o ServerAliveInterval=5 -o ServerAliveCountMax=3"'

_REACH = "open all ports between the hosts, or launch with --master_addr or GLOO_SOCKET_IFNAME"
_PORT = "end what listens there, or launch with deepspeed --master_port and check with --port"
_OUTPUT = "mend it, or name another --output"
# For each question: the seconds for an answer, and what to report with the probe's error: the trouble and its remedy.
_QUESTIONS = {
    "clock": (15, "its clock cannot be read", "mend it"),
    "checkout": (15, "its code or config cannot be read", "mend it, or copy it there"),
    "network": (15, "its address", "name one of them in .deepspeed_env"),
    "take_port": (15, "port {port}", _PORT),
    "write_token": (15, "cannot write to {output}", _OUTPUT),
    "unseen": (15, "cannot read {output}", _OUTPUT),
    "remove_token": (15, "cannot remove its .hosts-… from {output}", "remove it by hand"),
    # torch and DeepSpeed are imported, maybe from a cold or distant disk
    "devices": (60, "torch or DeepSpeed does not start", "mend the environment"),
    "data": (60, "the data", "mend the folder, or name another --data"),
    "unreached": (15, "the other hosts", _REACH),
    "exchange": (90, "the round trip", _REACH),  # 32 hosts at 100 Mbit/s need half of it
}
# What ssh says, and the remedy.
_REMEDIES = {
    "could not resolve hostname": "correct the name in the hostfile, or make it known (DNS, /etc/hosts, ~/.ssh/config)",
    "permission denied": "ssh to it must ask no password: ssh-copy-id {host}",
    "host key verification failed": "log in once by hand and compare its key: ssh {host}",
    "host identification has changed": "compare its key and mend ~/.ssh/known_hosts",
    "connection refused": "start its sshd, or correct the port",
    "no route to host": "look whether it is up and on the network",
    "timed out": "look whether it is up and on the network",
    "no module named": "run this in the project's folder, and have the same checkout and environment on every host",
}


@dataclass
class Host:
    """A host of the hostfile and what was learnt about it: ``facts`` are its answers, by question."""

    name: str
    slots: int
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    is_gone: bool = False


@dataclass(frozen=True)
class Launch:
    """The launch that is checked; ``data`` holds the arguments of the probe's question of that name."""

    config: str | None
    precision: str
    data: Mapping[str, Any]
    output: str
    port: int
    environment: Mapping[str, str]


class VisitError(RuntimeError):
    """Nothing more can be learnt from a host; the message gives the reason and the remedy."""


async def examine(hosts: Sequence[Host], launch: Launch) -> tuple[list[str], list[str]]:
    """Fill the hosts' facts and problems; return the problems and notes that belong to no single host."""
    first = hosts[0]
    is_alone = len(hosts) == 1
    if is_alone and not is_this_machine(first.name.rpartition("@")[2]):
        first.is_gone = True
        return [
            f"{first.name}, the only host, is another machine than this one, and DeepSpeed starts the ranks of a "
            "single host here; run this and deepspeed there"
        ], []
    # As DeepSpeed finds the master address: without pdsh's options, and even for this machine.
    by_ssh = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", "--", first.name, "hostname", "-I")
    asked = asyncio.create_task(asyncio.to_thread(_run, 15, *by_ssh))
    unguarded = asyncio.create_task(asyncio.to_thread(_without_keepalive, hosts))
    visits: dict[str, Visit] = {}
    try:
        notes = await _ask(hosts, visits, launch, asked)
    finally:
        await asyncio.gather(*(visit.close() for visit in visits.values()))
    problems = []
    found = await asked
    if (found.returncode != 0 or not found.stdout.split()) and not first.is_gone:
        said = found.stderr.strip() or "it prints no address"
        reason = explain(found.returncode, said, first.name)
        if is_alone:
            reason = (
                f"{said.splitlines()[-1]}; it is this machine, which needs no ssh: launch by deepspeed --num_gpus "
                f"{first.slots} instead of --hostfile"
            )
        problems.append(f"DeepSpeed finds no master address by ssh {first.name} hostname -I: {reason}")
    silent = await unguarded
    if silent and not is_alone:
        notes.append(
            f"without ssh keepalives a launch notices after minutes that {', '.join(silent[:4])} "
            f"{'are' if len(silent) > 1 else 'is'} cut off; {KEEPALIVE}"
        )
    devices = [host.facts["devices"] for host in hosts if "devices" in host.facts]
    if devices and not any(found["gpus"] for found in devices):
        notes.append("torch sees no GPU: the ranks train on the CPU")
    return problems, notes


async def _ask(
    hosts: Sequence[Host],
    visits: dict[str, "Visit"],
    launch: Launch,
    asked: "asyncio.Task[subprocess.CompletedProcess[str]]",
) -> list[str]:
    """Ask in steps that all hosts take together; return notes."""
    first, nonce = hosts[0], secrets.token_hex(8)

    async def learn(host: Host, question: str, **arguments: Any) -> None:
        seconds, trouble, remedy = _QUESTIONS[question]
        arguments |= {"question": question, "environment": launch.environment}
        answer = await visits[host.name].ask(arguments, seconds)
        if "error" in answer:
            trouble = trouble.format(port=launch.port, output=launch.output)
            host.problems.append(f"{trouble}: {answer['error']}; {remedy}")
        else:
            host.facts[question] = answer["answer"]

    async def together(step: Callable[[Host], Awaitable[None]], members: Sequence[Host]) -> None:
        async def guarded(host: Host) -> None:
            try:
                await step(host)
            except VisitError as error:
                host.problems.append(str(error))
                host.is_gone = True

        await asyncio.gather(*(guarded(host) for host in members if not host.is_gone))

    async def arrive(host: Host) -> None:
        visits[host.name] = await Visit.open(host.name, by_ssh=len(hosts) > 1)
        await visits[host.name].answer(READY_SECONDS, "no answer to ssh")
        before = time.time()
        await learn(host, "clock")
        host.facts["clock"] -= (before + time.time()) / 2
        await learn(host, "checkout", config=launch.config)
        await learn(host, "network")
        if host is first:
            await learn(host, "take_port", port=launch.port)
        await learn(host, "write_token", output=launch.output, nonce=nonce, name=host.name)

    async def work(host: Host) -> None:
        await learn(host, "remove_token")
        await learn(host, "devices", precision=launch.precision)
        if launch.data["folder"] is not None:
            await learn(host, "data", **launch.data)

    await together(arrive, hosts)
    wrote = [host for host in hosts if "write_token" in host.facts]
    await together(lambda host: learn(host, "unseen", nonce=nonce, name=wrote[0].name), wrote[1:])
    await together(work, hosts)
    address = next(iter((await asked).stdout.split()), None)
    if len(hosts) == 1:
        return []

    members = [host for host in hosts if "devices" in host.facts and not host.is_gone]
    networks = {host.name: host.facts.get("network") for host in members}
    not_tried = ["the round trip between the hosts was not tried; it comes when the problems above are solved"]
    if not all(network and not is_loopback(network["address"]) for network in networks.values()):
        return not_tried
    await together(lambda host: learn(host, "unreached", networks=networks), members)
    members = [host for host in members if not host.is_gone]
    is_open = all(host.facts.get("unreached") == [] for host in members)
    if first not in members or len(members) < 2 or address is None or "take_port" not in first.facts or not is_open:
        return not_tried
    names = [host.name for host in members]
    meeting = {"address": address, "port": launch.port, "hosts": names}
    await together(lambda host: learn(host, "exchange", rank=names.index(host.name), **meeting), members)
    missing = {name for host in members for name in host.facts.get("exchange", {}).get("missing", [])}
    for host in members:
        if host.name in missing and not host.problems:
            host.problems.append(f"it did not come to {address}:{launch.port}; open all ports between the hosts")
    return []


def is_loopback(address: str) -> bool:
    """Whether other hosts cannot reach this one at the address."""
    return ip_address(address.partition("%")[0]).is_loopback


class Visit:
    """A probe on one host, from ``open`` to ``close``."""

    def __init__(self, host: str, process: Process, stderr: IO[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._host, self._process, self._stderr = host, process, stderr
        self._stdin, self._stdout = process.stdin, process.stdout

    @classmethod
    async def open(cls, host: str, *, by_ssh: bool) -> "Visit":
        """Start the probe, by ssh or as a child of this process; its first answer says that it runs."""
        command = ssh(host, remote_command()) if by_ssh else [sys.executable, *PROBE]
        # A pipe could stay open for as long as ssh shares the connection.
        stderr = TemporaryFile()  # noqa: SIM115 (until close)
        try:
            process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, stderr=stderr)
        except OSError as error:
            raise VisitError(f"{command[0]}: {error.strerror}; install it on this machine") from None
        return cls(host, process, stderr)

    async def close(self) -> None:
        """End the probe, with time to remove its token."""
        self._stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), 2)
        except TimeoutError:
            self._kill()
            await self._process.wait()
        self._stderr.close()

    async def ask(self, question: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Return what the probe makes of a question: its ``answer``, or its ``error``."""
        with suppress(ConnectionError):
            self._stdin.write(json.dumps(question).encode() + b"\n")
            await self._stdin.drain()
        answer: dict[str, Any] = await self.answer(seconds, f'no answer to "{question["question"]}"')
        return answer

    async def answer(self, seconds: float, silence: str) -> Any:
        """Wait for the probe's next answer.

        Raises:
            VisitError: there is none, or none in time, and none will come.
        """
        try:
            async with asyncio.timeout(seconds):
                while line := await self._stdout.readline():
                    _, mark, answer = line.decode(errors="replace").partition(MARK)
                    if mark:
                        return json.loads(answer)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._process.wait(), 2)
        except TimeoutError:
            self._kill()
            raise VisitError(f"{silence} within {seconds:g} s; look whether the host or its disks hang") from None
        except ValueError:
            self._kill()
            raise VisitError("its login prints more than a line can be; make it quiet without a terminal") from None
        written = os.fstat(self._stderr.fileno()).st_size
        said = os.pread(self._stderr.fileno(), 4096, max(0, written - 4096)).decode(errors="replace").strip()
        raise VisitError(explain(self._process.returncode, said, self._host))

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            self._process.kill()


def ssh(host: str, *remote: str) -> list[str]:
    """A command line that fails where ssh would prompt; "--" keeps the host from being taken for an option."""
    # -T after pdsh's options, which may hold -tt: a terminal echoes, and cuts lines at 4 KiB.
    polite = ("-T", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}")
    return ["ssh", *_pdsh_options(), *polite, "--", host, *remote]


def _pdsh_options() -> list[str]:
    """What pdsh gives to ssh besides the host, split as pdsh splits it."""
    return ["-a", "-x", *os.environ.get("PDSH_SSH_ARGS_APPEND", "").split()]


def remote_command() -> str:
    """The host's shell command: the probe, in this folder, by this interpreter, as DeepSpeed starts its ranks."""
    folder, python = shlex.quote(os.getcwd()), shlex.quote(sys.executable)
    inherited = {name: value for name, value in os.environ.items() if name.startswith("PYTHON")}
    inherited["PYTHONPATH"] = ":".join(filter(None, (os.getcwd(), inherited.get("PYTHONPATH"))))
    exports = " ".join(shlex.quote(f"{name}={value}") for name, value in inherited.items())
    return (
        f"cd {folder} || exit {NO_FOLDER}; test -x {python} || exit {NO_INTERPRETER}; "
        f"exec env {exports} {python} {' '.join(PROBE)}"
    )


def explain(code: int | None, said: str, host: str) -> str:
    """Problem and remedy of a probe that has ended, from its exit code and the end of its stderr."""
    if code == NO_FOLDER:
        return f"no folder {os.getcwd()}; have the checkout in the same place on every host"
    if code == NO_INTERPRETER:
        return f"no interpreter {sys.executable}; have the environment in the same place on every host"
    last = said.splitlines()[-1].strip() if said else f"it ended with exit code {code}, without a word"
    remedy = next((remedy for sign, remedy in _REMEDIES.items() if sign in said.lower()), "try it by hand: ssh {host}")
    return f"{last}; {remedy.format(host=host)}"


def _without_keepalive(hosts: Sequence[Host]) -> list[str]:
    """The hosts for which ssh waits as long as TCP, or nearly, before it notices a lost connection."""
    found = []
    for host in hosts:
        settings = _run(5, "ssh", "-G", *_pdsh_options(), "--", host.name).stdout
        interval = re.search(r"^serveraliveinterval (\d+)$", settings, re.MULTILINE)
        # Debian's ssh takes 300 under BatchMode.
        if interval and not 0 < int(interval[1]) <= KEEPALIVE_LIMIT_SECONDS:
            found.append(host.name)
    return found


def _run(seconds: float, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command on this machine; exit code 255 where it cannot start or takes too long."""
    try:
        return subprocess.run(
            command, stdin=DEVNULL, capture_output=True, errors="replace", timeout=seconds, check=False
        )
    except OSError as error:
        said = f"{command[0]}: {error.strerror}"
    except subprocess.TimeoutExpired:
        said = f"{command[0]}: timed out after {seconds:g} s"
    return subprocess.CompletedProcess(command, 255, "", said)
