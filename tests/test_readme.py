"""The README says what is there."""

import re
from pathlib import Path

import pytest

from recipe.commands.plan import main
from recipe.config.deepspeed_sections import PassedOn, Section
from recipe.config.schema import Config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def keys(section: type[Section], prefix: str = "") -> list[str]:
    """The dotted keys of a config; of a section that is passed on to DeepSpeed, its name alone."""
    found = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section) and not issubclass(inner, PassedOn):
            found += keys(inner, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found


@pytest.mark.parametrize("key", keys(Config))
def test_every_key_stands_in_the_table(key: str) -> None:
    rows = [line.split("|")[1] for line in README.splitlines() if line.startswith("| `")]
    section, _, name = key.rpartition(".")
    assert any(f"`{key}`" in row or (f"`{name}`" in row and f"`{section}." in row) for row in rows)


@pytest.mark.parametrize(
    "path", [path for folder in ("ds_configs", "hostfiles", "examples") for path in (ROOT / folder).iterdir()], ids=str
)
def test_every_config_hostfile_and_example_is_named(path: Path) -> None:
    folder, name = path.parent.name, path.name
    assert any(word in README for word in (f"`{name}`", f"`{folder}/{name}`", f"{folder}/{name} "))


@pytest.mark.parametrize("name", re.findall(r"`((?:tests/|examples/)[\w./-]+)`", README))
def test_the_files_that_it_names_are_there(name: str) -> None:
    assert (ROOT / name).is_file()


def test_the_plan_is_as_it_prints(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["ds_configs/resnet50_b8192.json", "--hostfile", "hostfiles/four_nodes_8gpu"]) == 0
    assert capsys.readouterr().out in README
