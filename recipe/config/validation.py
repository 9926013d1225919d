"""Typed sections of a JSON file, and what is wrong with one in words: file, key, value, and what would be right."""

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from recipe.config.deepspeed_sections import Section
from recipe.config.reader import ABSENT, ConfigError, Key, dotted_key

S = TypeVar("S", bound=Section)


def validate(root: type[S], raw: dict[str, Any], file: str, whole: str) -> S:
    """The typed view of what a file holds.

    Raises:
        ConfigError: the first thing that is wrong with it, and every other key that is unknown or missing; where
            that is all of it, ``whole`` is what to do.
    """
    try:
        return root.model_validate(raw)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        first = _refusal(root, errors, raw, file, whole)
        remedy = first.remedy + _others(errors, first.key)
        raise ConfigError(file, first.key, first.value, first.problem, remedy) from None


def _others(errors: list[ErrorDetails], first: str) -> str:
    """The keys beside the first that are unknown or missing: whoever writes a file wants to know all of them."""
    named = {"extra_forbidden": "unknown", "missing": "missing"}
    keys = [(dotted_key(error["loc"]), named[error["type"]]) for error in errors if error["type"] in named]
    others = [f"{key} ({what})" for key, what in keys if key != first]
    return f"; also {', '.join(others)}" if others else ""


def _refusal(
    root: type[Section], errors: list[ErrorDetails], raw: dict[str, Any], file: str, whole: str
) -> ConfigError:
    """The first of pydantic's errors, in words; unknown keys come first: a typo explains a missing key."""
    first = min(errors, key=lambda error: error["type"] != "extra_forbidden")
    key, value = _locate(first["loc"], raw)
    if first["type"] == "extra_forbidden":
        return ConfigError(file, dotted_key(key), value, *_unknown(root, _section(root, key[:-1]), str(key[-1])))
    if first["type"] == "missing":
        key, value = (*_locate(first["loc"][:-1], raw)[0], first["loc"][-1]), ABSENT
    branches = [error for error in errors if _locate(error["loc"], raw)[0] == key] or [first]
    problem = "missing" if value is ABSENT else _problem(branches)
    if not key:
        return ConfigError(file, "", ABSENT, problem, whole)
    *path, name = key[: max(i for i, part in enumerate(key, start=1) if isinstance(part, str))]
    field = _section(root, path).model_fields[str(name)]
    first_sentence = " ".join((field.description or problem.removeprefix("not ")).split()).partition(". ")[0]
    return ConfigError(file, dotted_key(key), value, problem, f"expected {first_sentence}")


def _locate(loc: Key, raw: Any) -> tuple[Key, Any]:
    """The key and value that pydantic means; what the file does not hold is the name of a union's branch."""
    key: Key = ()
    for part in loc:
        try:
            raw = raw[part]
        except (KeyError, IndexError, TypeError):
            continue
        key = (*key, part)
    return key, raw


def _problem(branches: list[ErrorDetails]) -> str:
    """Pydantic's words for a value that no branch of a type takes, where a tuple is JSON's list and so on."""
    prefix, messages = "Input should be ", [error["msg"].partition(" or instance of ")[0] for error in branches]
    for python, json in (
        ("Tuple", "List"),
        ("tuple", "list"),
        ("dictionary", "object"),
        ("'", '"'),
        ("False", "false"),
    ):
        messages = [message.replace(python, json) for message in messages]
    for message in messages:
        if not message.startswith(prefix):
            return message[0].lower() + message[1:]
    return f"not {' or '.join(message.removeprefix(prefix) for message in messages)}"


def _section(root: type[Section], key: Sequence[str | int]) -> type[Section]:
    section: Any = root
    for part in key:
        # An index leads from a list to the section of which it has many.
        section = get_args(section)[0] if isinstance(part, int) else section.model_fields[part].annotation
    return section


def _unknown(root: type[Section], section: type[Section], name: str) -> tuple[str, str]:
    """What is wrong with a key that a section does not know, and what may have been meant."""
    if name in section.unsupported:
        return section.unsupported[name]
    elsewhere = [key for key in _keys(root) if key.endswith(f".{name}")]
    meant = elsewhere or difflib.get_close_matches(name, section.model_fields)
    if meant:
        return "unknown key", f'did you mean "{meant[0]}"?'
    return "unknown key", f"the keys here are {', '.join(section.model_fields)}"


def _keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _keys(field.annotation, f"{prefix}{name}.")
