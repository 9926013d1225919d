"""A study's file: a JSON of cases and seeds, validated strictly, with the plan of every run."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from recipe.config import (
    ABSENT,
    ConfigError,
    Section,
    apply_override,
    parse_config,
    parse_json,
    read_config,
    read_text,
    validate,
)
from recipe.data import look
from recipe.plan import Plan, make_plan

SEED = "recipe.seed"
CSV, REPORT = "results.csv", "results.md"

Text = Annotated[str, Field(min_length=1)]
Overrides = dict[str, Any]
Draw = Literal["error_by_batch_size", "beside_baseline", "curves"]


class Case(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,254}$")]
    """the name of the case and of its folder, of at most 255 letters, digits, dots, dashes and underscores, a letter or
    a digit first"""

    label: Text | None = None
    """what tables and pictures call the case, a string, or null: its name"""

    paper: Text | None = None
    """the paper's figure for it, a string such as "23.74 ± 0.09", or null"""

    baseline: str | None = None
    """the name of the case whose error the table subtracts from this one's, seed by seed, a string, or null"""

    set: Overrides = Field(default_factory=dict)
    """what differs from the config, an object with dotted keys as in --set"""

    def __str__(self) -> str:
        return self.label or self.name


class Figure(Section):
    draw: Draw
    """ "error_by_batch_size" (the paper's Figure 1), "beside_baseline" (Figure 2: a panel per case, each with the
    baseline) or "curves" (Figure 4: all cases over the epochs)"""

    title: Text
    """the title of the picture, a string"""

    cases: Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
    """the cases to draw, a list of names"""

    baseline: str | None = None
    """the name of the case that "beside_baseline" draws into each panel"""


class StudyFile(Section):
    title: Text
    """the title of the report, a string"""

    paper: Text | None = None
    """what the paper did and found, a string, or null"""

    config: Text
    """the config that all cases start from, a path from the folder of the study's file"""

    set: Overrides = Field(default_factory=dict)
    """what differs from the config in all cases, an object with dotted keys as in --set"""

    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], Field(strict=False, min_length=1)]
    """the seeds with which each case is trained, a list of whole numbers >= 0"""

    cases: Annotated[tuple[Case, ...], Field(strict=False, min_length=1)]
    """the trainings to compare, a list of objects with name, label, paper and set"""

    figures: Annotated[tuple[Figure, ...], Field(strict=False)] = ()
    """the pictures, a list of objects with draw, title, cases and, for "beside_baseline", baseline"""


@dataclass(frozen=True, eq=False)  # each is its own; plans are too large to compare
class Training:
    """A run of the study: its plan, and the ``--set`` overrides that lead to it."""

    case: Case
    seed: int
    plan: Plan
    overrides: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Its output folder, relative to the study's."""
        return Path(self.case.name, f"seed-{self.seed}")

    @property
    def images(self) -> int:
        """Images that it trains on in all: what it costs, whatever the batch size."""
        return self.plan.timeline.images(self.plan.total_steps)

    def __str__(self) -> str:
        return f"{self.case}, seed {self.seed}"


@dataclass(frozen=True)
class Study:
    """A study's file and its runs in the order in which they start."""

    path: Path
    config: Path
    file: StudyFile
    trainings: tuple[Training, ...]


def read_study(path: Path, world_size: int, data: str | None = None, cores_per_rank: int | None = None) -> Study:
    """Read a study and plan its runs on ``world_size`` ranks; ``data`` replaces the folder of the data.

    All cases of the first seed come first, so that a study that is stopped half-way has something to compare.

    Raises:
        ConfigError: what is wrong with the study, with its config or with what a case makes of it.
    """
    raw = parse_json(read_text(path, "*.json"), str(path))
    file = validate(StudyFile, raw, str(path), "write a study with config, seeds and cases")
    for contradiction in _contradictions(file):
        raise ConfigError(str(path), *contradiction)
    config = Path(os.path.normpath(path.parent / file.config))
    read_config(config)  # by itself first: no case is to blame for what is wrong with it
    common = dict(file.set) if data is None else {**file.set, "recipe.data.path": data}
    text, trainings = read_text(config, "*.json"), []
    for seed in file.seeds:
        for case in file.cases:
            name, raw = f'{path}, case "{case.name}"', parse_json(text, str(config))
            overrides = [f"{key}={_value_text(value)}" for key, value in {**common, **case.set, SEED: seed}.items()]
            for override in overrides:
                apply_override(raw, override, name)
            parsed = parse_config(raw, name)
            looks = look if parsed.recipe.data.needs_counting else None
            plan = make_plan(parsed, world_size, cores_per_rank, looks)
            trainings.append(Training(case, seed, plan, tuple(overrides)))
    return Study(path, config, file, tuple(trainings))


def _value_text(value: Any) -> str:
    """JSON without blanks; a string bare where ``--set`` takes it for one: a remote shell would eat its quotes."""
    if isinstance(value, str):
        try:
            json.loads(value)
        except ValueError:
            return value
    return json.dumps(value, separators=(",", ":"))


Contradiction = tuple[str, Any, str, str]
"""Key, value, problem and remedy of what is wrong only together with other keys."""


def _contradictions(file: StudyFile) -> Iterator[Contradiction]:
    names = [case.name for case in file.cases]
    for number, name in _repeated(names):
        yield f"cases[{number}].name", name, "another case has this name", "give each its own"
    for number, seed in _repeated(file.seeds):
        yield f"seeds[{number}]", seed, "it is listed twice", "list each seed once"
    for number, drawn in _repeated([figure.draw for figure in file.figures]):
        yield f"figures[{number}].draw", drawn, "another figure draws the same", "draw each kind once"
    for key, changes in (("", file.set), *((f"cases[{i}].", case.set) for i, case in enumerate(file.cases))):
        if SEED in changes:
            yield f"{key}set.{SEED}", changes[SEED], "the seeds are the study's", 'list it under "seeds"'
    for number, case in enumerate(file.cases):
        if case.baseline is not None and case.baseline not in names:
            key, others = f"cases[{number}].baseline", f"the cases are {', '.join(names)}"
            yield key, case.baseline, "there is no such case", others
    for number, figure in enumerate(file.figures):
        for name in figure.cases:
            if name not in names:
                yield f"figures[{number}].cases", name, "there is no such case", f"the cases are {', '.join(names)}"
        key, baseline = f"figures[{number}].baseline", ABSENT if figure.baseline is None else figure.baseline
        if figure.draw != "beside_baseline" and figure.baseline is not None:
            yield key, baseline, f"{figure.draw} draws none", "remove it"
        if figure.draw == "beside_baseline" and figure.baseline not in names:
            yield key, baseline, "no case", f"name one of {', '.join(names)}"


def _repeated(values: Sequence[Any]) -> list[tuple[int, Any]]:
    """The values that occur more than once, each with its place."""
    return [(place, value) for place, value in enumerate(values) if values.count(value) > 1]
