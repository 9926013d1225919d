"""The README says what is there."""

import os
import re
import subprocess
import sys
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "meaning"),
    [
        (["--hostfile", "HOSTFILE"], "was not reachable via ssh"),
        (["--include", "localhost:7"], "No slot '7' specified on host 'localhost'"),
    ],
)
def test_it_says_what_a_traceback_of_the_launcher_means(tmp_path: Path, options: list[str], meaning: str) -> None:
    (tmp_path / "hostfile").write_text("localhost slots=1\n")
    (tmp_path / "ssh").write_text("#!/bin/sh\nexit 255\n")
    (tmp_path / "ssh").chmod(0o755)
    words = [word.replace("HOSTFILE", str(tmp_path / "hostfile")) for word in options]
    launched = subprocess.run(
        [Path(sys.executable).with_name("deepspeed"), *words, "recipe/train.py"],
        cwd=ROOT,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert launched.returncode != 0
    assert meaning in launched.stderr.splitlines()[-1]
    assert meaning in README.partition("## Train ImageNet")[2].partition("\n## ")[0]


def test_the_plan_is_as_it_prints(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["ds_configs/resnet50_b8192.json", "--hostfile", "hostfiles/four_nodes_8gpu"]) == 0
    assert capsys.readouterr().out in README
