"""Reads ``.deepspeed_env``, by which DeepSpeed carries variables to the hosts, more strictly than DeepSpeed does.

DeepSpeed writes ``export NAME=value;`` of each line into a command for the hosts' shells. A line without "=" ends
the launch with a traceback. After ``# A=1`` all that follows is a comment to the shell: no rank starts, and the launch
reports success.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from recipe.config import ABSENT, ConfigError

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# A shell acts on the first four within the double quotes that DeepSpeed writes and keeps the fifth; pdsh expands "%h".
_EVALUATED = re.compile(r"""["$`\\'%]""")


def deepspeed_env_files() -> list[Path]:
    """The files that DeepSpeed would read, in its order; those that are there."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    files = dict.fromkeys((Path.home() / name, Path.cwd() / name))
    return [file for file in files if file.is_file()]


def read_deepspeed_env(files: Iterable[Path]) -> tuple[dict[str, str], list[ConfigError]]:
    """The variables that reach the ranks as they are written, and what is wrong with the other lines."""
    variables: dict[str, str] = {}
    refusals = []
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n") if file.stat().st_size else []
        except (OSError, UnicodeDecodeError) as error:
            refusals.append(ConfigError(str(file), "", ABSENT, f"cannot be read ({error})", "mend or remove it"))
            continue
        for number, line in enumerate(lines, start=1):
            name, equals, value = line.partition("=")
            name, value = name.strip(), value.strip()
            if not line.strip():
                problem, remedy = "blank", "remove the line: DeepSpeed stops at it"
            elif name.startswith("#"):
                problem, remedy = "a comment", "remove the line: DeepSpeed knows none, and would start no rank"
            elif not equals or not _NAME.fullmatch(name):
                problem, remedy = "not NAME=value", "write it as in GLOO_SOCKET_IFNAME=eth0"
            elif _EVALUATED.search(value):
                problem = "the hosts' shells or pdsh would change this value"
                remedy = "write it out, without quotes and without $ ` \\ %"
            else:
                variables[name] = value
                continue
            refusals.append(ConfigError(str(file), f"line {number}", line, problem, remedy))
    return variables, refusals
