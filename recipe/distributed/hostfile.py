"""Reads a DeepSpeed hostfile, ``host slots=n`` a line, more strictly than DeepSpeed does.

DeepSpeed's pattern matches the beginning of a line only, so that ``slots=1x`` is one slot, and ``slots=0`` a
host without a rank; and without the file it trains on this machine alone.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from recipe.config import ABSENT, ConfigError, read_text

# A name reaches ssh and pdsh as an argument: a leading "-" would be an option; pdsh expands "," and "[1-4]",
# and takes what stands before ":" for a way to connect ("exec:" runs the command on this machine).
_HOST = re.compile(r"([A-Za-z0-9_][A-Za-z0-9._-]*@)?(?P<name>[A-Za-z0-9_][A-Za-z0-9._-]*)")
_ENTRY = re.compile(r"(?P<host>\S+)\s+slots=(?P<slots>[0-9]{1,6})\s*(#.*)?")


def read_hostfile(path: Path | str) -> Mapping[str, int]:
    """Hosts and their slots, one rank a slot, in the file's order, which is the order of the ranks."""
    file = str(path)
    hosts: dict[str, int] = {}
    line_of: dict[str, int] = {}
    for number, line in enumerate(read_text(Path(path), "*").split("\n"), start=1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue

        def refusal(problem: str, remedy: str, number: int = number, entry: str = entry) -> ConfigError:
            return ConfigError(file, f"line {number}", entry, problem, remedy)

        match = _ENTRY.fullmatch(entry)
        if not match:
            raise refusal("not a host and its slots", 'write "host slots=4", without spaces around "="')
        host, slots = match["host"], int(match["slots"])
        name = _HOST.fullmatch(host)
        if not name:
            raise refusal("not a host name", "write letters, digits, and . _ - inside; give an IPv6 address a name")
        if slots == 0:
            raise refusal("no slots", "write slots=1 or more, or remove the line")
        first = line_of.setdefault(name["name"].lower(), number)
        if first != number:
            raise refusal(f"the host of line {first}", "write one line a host, with all of its slots")
        hosts[host] = slots
    if not hosts:
        raise ConfigError(file, "", ABSENT, "no hosts", 'write a line "host slots=4" for each')
    return hosts


def count_slots(hosts: Mapping[str, int]) -> int:
    """The number of slots, and so of ranks that the launcher starts."""
    return sum(hosts.values())
