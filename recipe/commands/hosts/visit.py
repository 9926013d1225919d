"""Asks a probe on a host, by ssh as pdsh would call it. Nothing of a hostfile ever reaches a shell here."""

import asyncio
import json
import os
import shlex
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from recipe.commands.hosts.probe import MARK

CONNECT_SECONDS = 5
READY_SECONDS = 30  # for login and for starting Python from a cold or distant disk
ANSWER_LIMIT_BYTES = 2**20
NO_FOLDER, NO_INTERPRETER = 97, 98
PROBE = ("-u", "-m", "recipe.commands.hosts.probe")


class VisitError(RuntimeError):
    """Nothing more can be learnt from a host; the message says why and what helps."""


class AnswerError(RuntimeError):
    """The probe could not do what it was asked; the message is its own."""


def ssh_options() -> list[str]:
    """What pdsh gives to ssh beside the host, split as pdsh splits it."""
    return ["-a", "-x", *os.environ.get("PDSH_SSH_ARGS_APPEND", "").split()]


def ssh(host: str, *remote: str) -> list[str]:
    """A command line that ends soon where a question would be asked; "--" keeps a host from being an option."""
    # -T after pdsh's options, where -tt may stand: a terminal echoes, and cuts lines at 4 KiB.
    polite = ("-T", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}")
    return ["ssh", *ssh_options(), *polite, "--", host, *remote]


def remote_command() -> str:
    """What the host's shell gets: the probe, in this folder, by this interpreter, as DeepSpeed starts its ranks."""
    folder, python = shlex.quote(os.getcwd()), shlex.quote(sys.executable)
    inherited = {name: value for name, value in os.environ.items() if name.startswith("PYTHON")}
    inherited["PYTHONPATH"] = ":".join(filter(None, (os.getcwd(), inherited.get("PYTHONPATH"))))
    exports = " ".join(shlex.quote(f"{name}={value}") for name, value in inherited.items())
    return (
        f"cd {folder} || exit {NO_FOLDER}; test -x {python} || exit {NO_INTERPRETER}; "
        f"exec env {exports} {python} {' '.join(PROBE)}"
    )


class Visit:
    """A probe on one host from ``open`` to ``close``; ``by_ssh=False`` starts it here."""

    def __init__(self, host: str, *, by_ssh: bool, environment: Mapping[str, str]) -> None:
        self._host, self._by_ssh, self._environment = host, by_ssh, dict(environment)
        self._process: Process | None = None
        self._said: asyncio.Task[str] | None = None

    async def open(self) -> None:
        """Start the probe and wait until it answers.

        Raises:
            VisitError: it does not come to that.
        """
        command = ssh(self._host, remote_command()) if self._by_ssh else [sys.executable, *PROBE]
        try:
            self._process = await asyncio.create_subprocess_exec(
                *command, stdin=PIPE, stdout=PIPE, stderr=PIPE, limit=ANSWER_LIMIT_BYTES
            )
        except OSError as error:
            raise VisitError(f"{command[0]}: {error.strerror}; install it on this machine") from None
        self._said = asyncio.create_task(self._listen())
        await self._answer(READY_SECONDS, "no answer to ssh")

    async def close(self) -> None:
        """End the probe, with time to leave nothing behind."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        assert self._said is not None
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), 2)
        except TimeoutError:
            self._end()
            await self._process.wait()
        self._said.cancel()

    async def ask(self, question: str, seconds: float, **arguments: Any) -> Any:
        """The probe's answer.

        Raises:
            AnswerError: the probe could not do it.
            VisitError: no answer came, or none in time, and none will.
        """
        assert self._process is not None
        assert self._process.stdin is not None
        line = json.dumps({"ask": question, "environment": self._environment, **arguments})
        with suppress(ConnectionError):
            self._process.stdin.write(line.encode() + b"\n")
            await self._process.stdin.drain()
        answer = await self._answer(seconds, f'no answer to "{question}"')
        if "error" in answer:
            raise AnswerError(answer["error"])
        return answer["answer"]

    async def _answer(self, seconds: float, silence: str) -> Any:
        assert self._process is not None
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(seconds):
                while line := await self._process.stdout.readline():
                    _, mark, answer = line.decode(errors="replace").partition(MARK)
                    if mark:
                        return json.loads(answer)
        except TimeoutError:
            self._end()
            raise VisitError(f"{silence} within {seconds:g} s; look whether the host or its disks hang") from None
        except ValueError:
            self._end()
            raise VisitError("its login prints more than a line can be; make it quiet without a terminal") from None
        raise VisitError(await self._farewell())

    def _end(self) -> None:
        assert self._process is not None
        with suppress(ProcessLookupError):
            self._process.kill()

    async def _farewell(self) -> str:
        """Why the process has ended, by what it said last."""
        assert self._process is not None
        assert self._said is not None
        said = ""
        with suppress(TimeoutError):  # a connection that ssh shares may keep its stderr open
            said = await asyncio.wait_for(asyncio.shield(self._said), 2)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), 2)
        return explain(self._process.returncode, said, self._host)

    async def _listen(self) -> str:
        """The last that comes on stderr."""
        assert self._process is not None
        assert self._process.stderr is not None
        last = b""
        while part := await self._process.stderr.read(4096):
            last = (last + part)[-4096:]
        return last.decode(errors="replace").strip()


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


def explain(code: int | None, said: str, host: str) -> str:
    """Problem and remedy of a probe that has ended, by its exit code and the text of its stderr."""
    if code == NO_FOLDER:
        return f"no folder {os.getcwd()}; have the checkout in the same place on every host"
    if code == NO_INTERPRETER:
        return f"no interpreter {sys.executable}; have the environment in the same place on every host"
    last = said.splitlines()[-1].strip() if said else f"it ended with exit code {code}, without a word"
    remedy = next((remedy for sign, remedy in _REMEDIES.items() if sign in said.lower()), "try it by hand: ssh {host}")
    return f"{last}; {remedy.format(host=host)}"


async def output_of(command: Sequence[str], seconds: float) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command on this machine; 255 where it took too long."""
    try:
        process = await asyncio.create_subprocess_exec(*command, stdin=DEVNULL, stdout=PIPE, stderr=PIPE)
    except OSError as error:
        return 255, "", f"{command[0]}: {error.strerror}"
    try:
        out, err = await asyncio.wait_for(process.communicate(), seconds)
    except TimeoutError:
        process.kill()
        await process.wait()
        return 255, "", f"{command[0]}: timed out after {seconds:g} s"
    return process.returncode or 0, out.decode(errors="replace"), err.decode(errors="replace")
