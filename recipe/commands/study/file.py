"""The file of a study: a JSON of cases and seeds, validated strictly, and the plans of its runs."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
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
LAUNCH_LOG = "launch.log"  # of a run's last launch

Text = Annotated[str, Field(min_length=1)]
Overrides = dict[str, Any]


class Case(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,254}$")]
    """the name of the case and of its folder, at most 255 letters, digits, dots, dashes and underscores, beginning with
    a letter or a digit"""

    label: Text | None = None
    """the label of the case in tables and figures, a string, or null for its name"""

    paper: Text | None = None
    """the paper's result for the case, a string such as "23.74 ± 0.09", or null"""

    baseline: str | None = None
    """the name of the case whose error the table subtracts from this one's, seed by seed, a string, or null"""

    set: Overrides = Field(default_factory=dict)
    """what the case changes in the config, an object with dotted keys as in --set"""

    def __str__(self) -> str:
        return self.label or self.name


class Figure(Section):
    draw: Literal["error_by_batch_size", "beside_baseline", "curves"]
    """ "error_by_batch_size" (the paper's Figure 1), "beside_baseline" (Figure 2: one panel per case, each with the
    baseline) or "curves" (Figure 4: all cases over the epochs)"""

    title: Text
    """the title of the figure, a string"""

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
    """the config that all cases start from, a path relative to the folder of the study's file"""

    set: Overrides = Field(default_factory=dict)
    """what all cases change in the config, an object with dotted keys as in --set"""

    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], Field(strict=False, min_length=1)]
    """the seeds to train each case with, a list of whole numbers >= 0"""

    cases: Annotated[tuple[Case, ...], Field(strict=False, min_length=1)]
    """the cases to compare, a list of objects with name, label, paper, baseline and set"""

    figures: Annotated[tuple[Figure, ...], Field(strict=False)] = ()
    """the figures to draw, a list of objects with draw, title, cases and, for "beside_baseline", baseline"""


@dataclass(frozen=True, eq=False)  # compared by identity: plans are large
class Run:
    """A run of the study: a case with a seed, its plan, and the ``--set`` overrides that lead to it."""

    case: Case
    seed: int
    plan: Plan
    overrides: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """The output folder, relative to the study's."""
        return Path(self.case.name, f"seed-{self.seed}")

    @property
    def images(self) -> int:
        """The number of images it trains on: its cost, whatever the batch size."""
        return self.plan.timeline.images(self.plan.total_steps)

    def __str__(self) -> str:
        return f"{self.case}, seed {self.seed}"


@dataclass(frozen=True)
class Study:
    """A study's file, and its runs in the order in which they start."""

    path: Path
    config: Path
    file: StudyFile
    runs: tuple[Run, ...]


def read_study(path: Path, world_size: int, data: str | None = None, cores_per_rank: int | None = None) -> Study:
    """Read a study and plan its runs on ``world_size`` ranks; ``data`` replaces the data folder.

    All cases of the first seed come first, so that a study that is stopped halfway has something to compare. With
    ``cores_per_rank`` the data loaders take no more cores than that.

    Raises:
        ConfigError: the study, its config or the config of a case is wrong.
    """
    raw = parse_json(read_text(path, "*.json"), str(path))
    if "recipe" in raw and "cases" not in raw:
        problem, remedy = "this is a config, not a study", 'name it in a study: "config": "…"'
        raise ConfigError(str(path), "", ABSENT, problem, remedy)
    file = validate(StudyFile, raw, str(path), "write a study with config, seeds and cases")
    _check_consistency(file, str(path))
    config = Path(os.path.normpath(path.parent / file.config))
    read_config(config)  # alone first, so that its own mistakes are not blamed on a case
    common = dict(file.set) if data is None else {**file.set, "recipe.data.path": data}
    text, runs = read_text(config, "*.json"), []
    for seed in file.seeds:
        for case in file.cases:
            name, raw = f'{path}, case "{case.name}"', parse_json(text, str(config))
            overrides = [f"{key}={_value_text(value)}" for key, value in {**common, **case.set, SEED: seed}.items()]
            for override in overrides:
                apply_override(raw, override, name)
            parsed = parse_config(raw, name)
            looks = look if parsed.recipe.data.needs_counting else None
            plan = make_plan(parsed, world_size, cores_per_rank, looks)
            if cores_per_rank is not None:
                overrides.append(f"recipe.data.workers={plan.workers}")
            runs.append(Run(case, seed, plan, tuple(overrides)))
    return Study(path, config, file, tuple(runs))


def _value_text(value: Any) -> str:
    """A value as ``--set`` takes it: JSON without spaces, and strings unquoted, as a remote shell would eat quotes."""
    if isinstance(value, str):
        try:
            json.loads(value)
        except ValueError:
            return value
    return json.dumps(value, separators=(",", ":"))


def _check_consistency(file: StudyFile, path: str) -> None:
    """Refuse keys that contradict each other."""
    refusal = partial(ConfigError, path)
    names = [case.name for case in file.cases]
    for number, name in _repeated(names):
        raise refusal(f"cases[{number}].name", name, "another case has this name", "give each its own")
    for number, seed in _repeated(file.seeds):
        raise refusal(f"seeds[{number}]", seed, "it is listed twice", "list each seed once")
    for number, drawn in _repeated([figure.draw for figure in file.figures]):
        raise refusal(f"figures[{number}].draw", drawn, "another figure draws the same", "draw each kind once")
    for key, changes in (("", file.set), *((f"cases[{i}].", case.set) for i, case in enumerate(file.cases))):
        if SEED in changes:
            raise refusal(f"{key}set.{SEED}", changes[SEED], "the study sets the seed", 'list it under "seeds"')
    references = [(f"cases[{number}].baseline", case.baseline) for number, case in enumerate(file.cases)]
    for number, figure in enumerate(file.figures):
        references += [(f"figures[{number}].cases", name) for name in figure.cases]
        key = f"figures[{number}].baseline"
        references.append((key, figure.baseline))
        if figure.draw == "beside_baseline" and figure.baseline is None:
            raise refusal(key, ABSENT, "beside_baseline needs one", f"name one of {', '.join(names)}")
        if figure.draw != "beside_baseline" and figure.baseline is not None:
            raise refusal(key, figure.baseline, f"{figure.draw} draws none", "remove it")
    for key, reference in references:
        if reference is not None and reference not in names:
            raise refusal(key, reference, "there is no such case", f"the cases are {', '.join(names)}")


def _repeated(values: Sequence[Any]) -> list[tuple[int, Any]]:
    """The values that occur more than once, each with its index."""
    return [(index, value) for index, value in enumerate(values) if values.count(value) > 1]
