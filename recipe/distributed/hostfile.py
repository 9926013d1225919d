"""Reads DeepSpeed's hostfile and ``.deepspeed_env`` more strictly than DeepSpeed does.

DeepSpeed matches ``host slots=n`` at the start of a line only: ``slots=1x`` is one slot, and ``slots=0`` a host without
a rank. If the hostfile is missing, it trains on this machine alone. Each line of ``.deepspeed_env`` becomes
``export NAME=value;`` in a command for the hosts' shells. A line without "=" ends the launch with a traceback; a line
``# A=1`` turns the rest of the command into a comment, so that no rank starts and the launch reports success.
"""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from recipe.config import ABSENT, ConfigError, read_text

# ssh and pdsh get the name as an argument: a leading "-" would be an option; pdsh expands "," and "[1-4]", and takes
# a prefix before ":" as a connection type ("exec:" runs the command on this machine).
_HOST = re.compile(r"([A-Za-z0-9_][A-Za-z0-9._-]*@)?(?P<name>[A-Za-z0-9_][A-Za-z0-9._-]*)")
_ENTRY = re.compile(r"(?P<host>\S+)\s+slots=(?P<slots>[0-9]{1,6})\s*(#.*)?")
# DeepSpeed writes the value in double quotes, within which a shell expands " $ ` \ and keeps '; pdsh expands "%h".
_VARIABLE = re.compile(r"""\s*(?P<name>[A-Za-z_][A-Za-z0-9_]*)\s*=\s*(?P<value>[^"$`\\'%]*)""")


def read_hostfile(path: Path | str) -> Mapping[str, int]:
    """Hosts and their slots, one rank per slot; the file's order is the order of the ranks."""
    hosts: dict[str, int] = {}
    line_of: dict[str, int] = {}
    for number, line in enumerate(read_text(Path(path), "*").split("\n"), start=1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        match = _ENTRY.fullmatch(entry)
        name = match and _HOST.fullmatch(match["host"])
        if not match:
            problem, remedy = "not a host and its slots", 'use "host slots=4", without spaces around "="'
        elif not name:
            problem = "not a host name"
            remedy = "write letters, digits, and . _ - inside; give an IPv6 address a name"
        elif int(match["slots"]) == 0:
            problem, remedy = "no slots", "write slots=1 or more, or remove the line"
        elif (first := line_of.setdefault(name["name"].lower(), number)) != number:
            problem, remedy = f"the host of line {first}", "write one line per host, with all of its slots"
        else:
            hosts[match["host"]] = int(match["slots"])
            continue
        raise ConfigError(str(path), f"line {number}", entry, problem, remedy)
    if not hosts:
        raise ConfigError(str(path), "", ABSENT, "no hosts", 'write a line "host slots=4" for each')
    return hosts


def count_slots(hosts: Mapping[str, int]) -> int:
    """The number of slots, which is the number of ranks that the launcher starts."""
    return sum(hosts.values())


def deepspeed_env_files() -> list[Path]:
    """The existing ``.deepspeed_env`` files that DeepSpeed reads, in its order."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    files = dict.fromkeys((Path.home() / name, Path.cwd() / name))
    return [file for file in files if file.is_file()]


def read_deepspeed_env(files: Iterable[Path]) -> tuple[dict[str, str], list[ConfigError]]:
    """The variables that reach the ranks unchanged, and a refusal for each other line."""
    variables: dict[str, str] = {}
    refusals = []
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n") if file.stat().st_size else []
        except (OSError, UnicodeDecodeError) as error:
            refusals.append(ConfigError(str(file), "", ABSENT, f"cannot be read ({error})", "fix or remove it"))
            continue
        for number, line in enumerate(lines, start=1):
            if match := _VARIABLE.fullmatch(line):
                variables[match["name"]] = match["value"].strip()
                continue
            problem = "not NAME=value as it reaches the ranks through DeepSpeed, a shell and pdsh"
            remedy = "write it as in GLOO_SOCKET_IFNAME=eth0, without quotes and without $ ` \\ %, or remove the line"
            refusals.append(ConfigError(str(file), f"line {number}", line, problem, remedy))
    return variables, refusals
