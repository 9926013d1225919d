"""Reads JSON strictly: every mistake in a file is refused in one line.

Python's json accepts repeated keys; DeepSpeed reads Hjson, with comments and trailing commas.
"""

import difflib
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

Key = tuple[str | int, ...]
ABSENT: Any = ...  # the value of a key that is not written; JSON has no such value


def printable(text: str) -> str:
    """Untrusted text on one line and without terminal escapes."""
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)


class ConfigError(ValueError):
    """A refused input. ``str()`` is one line; its parts are attributes."""

    def __init__(self, file: str, key: str, value: Any, problem: str, remedy: str) -> None:
        """``key`` is dotted, or "" for the whole file; ``value`` can be ``ABSENT``."""
        super().__init__(file, key, value, problem, remedy)
        self.file, self.key, self.value, self.problem, self.remedy = file, key, value, problem, remedy

    def __str__(self) -> str:
        where = self.file
        if self.key:
            where += f": {self.key}"
        if self.value is not ABSENT:
            shown = json.dumps(self.value, ensure_ascii=False, default=str)
            where += f" = {shown if len(shown) <= 80 else shown[:79] + '…'}"
        line = f"{where}: {self.problem}; {self.remedy}"
        return printable(line)


def read_text(path: Path, siblings: str) -> str:
    """The text of a non-empty UTF-8 file. If there is none, the error suggests files that match ``siblings``."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        problem, remedy = f"not UTF-8 at byte {error.start}", "save it as UTF-8"
    except OSError as error:
        problem, remedy = str(error.strerror).lower(), _nearby(path, siblings)
    else:
        if text.startswith("\ufeff"):
            problem, remedy = "begins with a byte-order mark", "save it as UTF-8 without one"
        elif not text.strip():
            problem, remedy = "empty", "fill it, or name another file"
        else:
            return text
    raise ConfigError(str(path), "", ABSENT, problem, remedy)


def _nearby(path: Path, siblings: str) -> str:
    folder = path if os.path.isdir(path) else path.parent  # Path.is_dir() raises if a name is too long
    if not os.path.isdir(folder):
        return f"{folder} is not a folder"
    names = sorted(file.name for file in folder.glob(siblings))
    close = difflib.get_close_matches(path.name, names, n=1)
    question = f"did you mean {folder / close[0]}? " if close else ""
    return f"{question}{folder} holds {', '.join(names[:20]) or f'no {siblings}'}"


def parse_json(text: str, file: str) -> dict[str, Any]:
    try:
        raw = json.loads(text, object_pairs_hook=partial(_object, file))
    except json.JSONDecodeError as error:
        before, after = text[: error.pos].rstrip(), text[error.pos :].lstrip()
        remedy = "write plain JSON"
        if after.startswith(("//", "/*", "#")):
            remedy = "remove the comment: JSON has none (DeepSpeed would accept it, as Hjson)"
        elif before.endswith(",") and after.startswith(("}", "]")):
            remedy = "remove the comma before it (DeepSpeed would accept it, as Hjson)"
        problem = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise ConfigError(file, "", ABSENT, problem, remedy) from None
    if not isinstance(raw, dict):
        raise ConfigError(file, "", raw, "not an object", "write keys and values between { and }")
    return raw


def _object(file: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    parsed = dict(pairs)
    if len(parsed) < len(pairs):
        for key in parsed:
            values = [value for name, value in pairs if name == key]
            if len(values) > 1:
                raise ConfigError(file, key, values, "this key occurs more than once", "write it once")
    return parsed


def apply_override(raw: dict[str, Any], override: str, file: str) -> None:
    dotted, equals, text = override.partition("=")
    *path, last = dotted.split(".")
    if not equals or not all([*path, last]):
        problem = f"--set {override} is not KEY=VALUE"
        raise ConfigError(file, "", ABSENT, problem, "write it as in --set recipe.schedule.epochs=2")
    try:
        value = json.loads(text, object_pairs_hook=partial(_object, file))
    except json.JSONDecodeError:
        value = text
    section: Any = raw
    for depth, part in enumerate(path, start=1):
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            problem = f"not an object, so it has no {'.'.join([*path[depth:], last])}"
            raise ConfigError(file, ".".join(path[:depth]), section, problem, "set the key itself")
    if value is None and last in section:
        del section[last]  # null means the default, so that another optimizer or decay can drop the file's own keys
    else:
        section[last] = value


def dotted_key(key: Key) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")
