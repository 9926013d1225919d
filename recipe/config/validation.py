"""Validates a JSON file as typed sections; errors name file, key, value, problem and remedy."""

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from recipe.config.deepspeed_sections import Section
from recipe.config.reader import ABSENT, ConfigError, Key, dotted_key

S = TypeVar("S", bound=Section)


def validate(root: type[S], raw: dict[str, Any], file: str, whole: str) -> S:
    """The typed view of a file's JSON.

    Raises:
        ConfigError: the first problem, and every other key that is unknown or missing. ``whole`` is the remedy if the
            problem is the file as a whole.
    """
    try:
        return root.model_validate(raw)
    except ValidationError as error:
        raise _refusal(root, error.errors(include_url=False), raw, file, whole) from None


def _refusal(
    root: type[Section], errors: list[ErrorDetails], raw: dict[str, Any], file: str, whole: str
) -> ConfigError:
    """The first of pydantic's errors in words. Unknown keys come first, because a typo explains a missing key."""
    kinds = {"extra_forbidden": "unknown", "missing": "missing"}
    first = min(errors, key=lambda error: error["type"] != "extra_forbidden")
    key, value = _locate(first["loc"], raw)
    if first["type"] == "missing":
        key, value = (*_locate(first["loc"][:-1], raw)[0], first["loc"][-1]), ABSENT
    if first["type"] == "extra_forbidden":
        problem, remedy = _unknown(root, _section(root, key[:-1]), str(key[-1]))
    elif not key:
        value, problem, remedy = ABSENT, _problem(errors), whole
    else:
        branches = [error for error in errors if _locate(error["loc"], raw)[0] == key] or [first]
        problem = "missing" if value is ABSENT else _problem(branches)
        *path, name = key[: max(i for i, part in enumerate(key, start=1) if isinstance(part, str))]
        field = _section(root, path).model_fields[str(name)]
        expected = field.description or _expected_keys(field.annotation) or problem.removeprefix("not ")
        remedy = f"expected {' '.join(expected.split()).partition('. ')[0]}"
    # A user can then fix all unknown and missing keys at once.
    named = [(dotted_key(error["loc"]), kinds[error["type"]]) for error in errors if error["type"] in kinds]
    others = ", ".join(f"{other} ({kind})" for other, kind in named if other != dotted_key(key))
    return ConfigError(file, dotted_key(key), value, problem, f"{remedy}; also {others}" if others else remedy)


def _expected_keys(section: Any) -> str:
    """The required keys of a section, or all of its keys if none is required; "" for anything but a section."""
    if not (isinstance(section, type) and issubclass(section, Section)):
        return ""
    required = [name for name, field in section.model_fields.items() if field.is_required()]
    return f"an object with {', '.join([*required, 'optional keys'] if required else section.model_fields)}"


def _locate(loc: Key, raw: Any) -> tuple[Key, Any]:
    """The key and value at pydantic's location, without the names of union branches, which the file does not hold."""
    key: Key = ()
    for part in loc:
        try:
            raw = raw[part]
        except (KeyError, IndexError, TypeError):
            continue
        key = (*key, part)
    return key, raw


def _problem(branches: list[ErrorDetails]) -> str:
    """Pydantic's words for a value that no branch of a union accepts, with JSON's names of types."""
    prefix, messages = "Input should be ", [error["msg"].partition(" or instance of ")[0] for error in branches]
    names = {"Tuple": "List", "tuple": "list", "dictionary": "object", "'": '"', "False": "false"}
    for python, json in names.items():
        messages = [message.replace(python, json) for message in messages]
    for message in messages:
        if not message.startswith(prefix):
            return message[0].lower() + message[1:]
    return f"not {' or '.join(message.removeprefix(prefix) for message in messages)}"


def _section(root: type[Section], key: Sequence[str | int]) -> type[Section]:
    section: Any = root
    for part in key:
        # An index leads from a list to the section that its elements have.
        section = get_args(section)[0] if isinstance(part, int) else section.model_fields[part].annotation
    return section


def _unknown(root: type[Section], section: type[Section], name: str) -> tuple[str, str]:
    """Problem and remedy for an unknown key: the refusal of a DeepSpeed key, or the key that was probably meant."""
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
