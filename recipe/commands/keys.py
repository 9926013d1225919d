"""``python -m recipe keys``: every key of a config and of a study, with its default and meaning, as Markdown tables."""

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic.fields import FieldInfo

from recipe.commands.study.file import StudyFile
from recipe.config import Config, PassedOn, Section

TABLES: dict[str, type[Section]] = {"Keys of a config": Config, "Keys of a study": StudyFile}


def main(argv: Sequence[str]) -> int:
    """Print the tables, which docs/configuration.md repeats; return 0."""
    description = "Print every key of a config and of a study as Markdown tables."
    argparse.ArgumentParser(prog="python -m recipe keys", description=description).parse_args(argv)
    tables = (
        f"## {title}\n\n| key | default | meaning |\n|---|---|---|\n" + "\n".join(_rows(section))
        for title, section in TABLES.items()
    )
    print("\n\n".join(tables))
    return 0


def _rows(section: type[Section], prefix: str = "") -> Iterator[str]:
    """One row per key. A section that is passed on to DeepSpeed also has a row itself, but only documented keys."""
    for name, field in section.model_fields.items():
        inner, key = field.annotation, prefix + name
        for part in get_args(inner):  # tuple[Case, ...]: a list of sections
            if isinstance(part, type) and issubclass(part, Section):
                inner, key = part, f"{key}[]"
        nested = inner if isinstance(inner, type) and issubclass(inner, Section) else None
        has_row = nested is None or issubclass(nested, PassedOn)
        if has_row and (field.description or not issubclass(section, PassedOn)):
            meaning = " ".join((field.description or "passed on to DeepSpeed").split())
            yield f"| `{key}` | {_default(field)} | {meaning} |"
        if nested is not None:
            yield from _rows(nested, f"{key}.")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "–"
    value: Any = field.get_default(call_default_factory=True)
    return "off" if isinstance(value, Section) else f"`{json.dumps(value)}`"
