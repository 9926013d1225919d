"""README and docs/ say what is there, and every command in them is run by a test or marked as not run."""

import html
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from recipe.__main__ import COMMANDS
from recipe.commands import keys
from recipe.commands.plan import main as plan
from recipe.config.schema import read_config
from recipe.distributed.hostfile import count_slots, read_hostfile
from recipe.plan.plan import make_plan
from recipe.train import overrides, parse_arguments

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
ALL = "\n".join(PAGES.values())
MARK = "# not run here:"
BLOCKS = [
    block for page in PAGES.values() for block in re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
]
COMMAND_LINES = [
    (line, block.startswith(MARK)) for block in BLOCKS for line in block.splitlines() if line and line[0] != "#"
]
RUN_BY = {
    "python3 -m venv .venv && .venv/bin/pip install -q -e . && .venv/bin/deepspeed -q": "tests/test_train.py",
    ".venv/bin/pip install -q -e '.[test]' && .venv/bin/python -m pytest": ".ci/run",
    "python -m pytest tests/plan/test_plan.py": ".ci/run",
    "ruff check . && ruff format --check . && mypy": ".ci/run",
    "python -m recipe plan": "tests/test_readme.py",
    "python -m recipe export": "tests/commands/test_export.py",
    "python -m recipe evaluate": "tests/commands/test_evaluate.py",
    "python -m recipe predict": "tests/commands/test_evaluate.py",
    "python -m recipe plot": "tests/commands/test_plot.py",
    "python -m recipe compare": "tests/commands/test_compare.py",
    "deepspeed -q recipe/train.py --deepspeed_config ds_configs/digits_b512.json --set recipe.noise_scale": (
        "tests/engine/test_noise_scale.py"
    ),
}
"""which file runs the commands that begin so, with smaller settings where that takes long"""


@pytest.mark.parametrize(("line", "is_marked"), COMMAND_LINES)
def test_a_command_is_run_by_a_test_or_marked(
    line: str, is_marked: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a launch asks of the command line and the config is checked for those that are marked, too."""
    by = [file for beginning, file in RUN_BY.items() if line.startswith(beginning)]
    assert is_marked != bool(by)
    assert all((ROOT / file).is_file() for file in by)
    monkeypatch.chdir(ROOT)
    words = shlex.split(line)
    if line.startswith("python -m recipe plan"):
        assert plan(words[4:]) == 0, capsys.readouterr().err
    elif "recipe/train.py" in words:
        launcher, arguments = line.split("recipe/train.py")
        hostfile, ranks = (
            re.search(r"--hostfile (\S+)", launcher),
            re.search(r"(?:--num_gpus|-per-node) (\d+)", launcher),
        )
        world_size = count_slots(read_hostfile(hostfile[1])) if hostfile else int(ranks[1]) if ranks else 1
        parsed = parse_arguments(shlex.split(arguments))
        assert make_plan(read_config(parsed.deepspeed_config, overrides(parsed)), world_size).world_size == world_size


def test_the_config_for_own_images_can_be_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```json\n(.*?)```", PAGES["README.md"], re.DOTALL)
    (tmp_path / "mine.json").write_text(example)
    assert plan([str(tmp_path / "mine.json")]) == 2
    assert "name the folder with --data" in capsys.readouterr().err
    counted = [
        f"--set=recipe.data.{key}={images}" for key, images in (("train_images", 2000), ("validation_images", 200))
    ]
    assert plan([str(tmp_path / "mine.json"), *counted]) == 0
    assert "7 steps per epoch × 30 epochs = 210" in capsys.readouterr().out


def test_the_tables_of_keys_are_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert keys.main([]) == 0
    assert capsys.readouterr().out in PAGES["docs/configuration.md"]


def test_the_picture_of_the_plan_is_what_the_command_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where it is not: ``python -m benchmarks.screenshots``."""
    monkeypatch.chdir(ROOT)
    assert plan(["ds_configs/resnet50_b8192.json", "--hostfile", "hostfiles/four_nodes_8gpu"]) == 0
    svg = (ROOT / "docs/plan.svg").read_text(encoding="utf-8")
    drawn = [
        html.unescape(text).replace("\xa0", " ").split() for text in re.findall(r"<text [^>]*>([^<]*)</text>", svg)
    ]
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [words for words in drawn if words][1:] == [words for words in printed if words]


def anchors(page: str) -> set[str]:
    """GitHub's names of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", PAGES[name]):
        path, _, anchor = link.partition("#")
        if "://" not in link:
            target = ((ROOT / name).parent / path).resolve() if path else ROOT / name
            assert target.is_file(), link
            assert not anchor or anchor in anchors(PAGES[str(target.relative_to(ROOT))]), link


@pytest.mark.parametrize(
    "path", [path for folder in ("ds_configs", "hostfiles", "examples") for path in (ROOT / folder).iterdir()], ids=str
)
def test_every_config_hostfile_and_example_is_named(path: Path) -> None:
    folder, name = path.parent.name, path.name
    assert any(word in ALL for word in (f"`{name}`", f"`{folder}/{name}`", f"{folder}/{name} "))


@pytest.mark.parametrize("name", re.findall(r"`((?:tests/|examples/|benchmarks/)[\w./-]+\.\w+)`", ALL))
def test_the_files_that_are_named_are_there(name: str) -> None:
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
    assert meaning in PAGES["docs/multi-node.md"]


def test_the_readme_is_read_in_one_sitting_and_names_every_command() -> None:
    assert len(PAGES["README.md"].encode()) <= 15_000
    assert all(f"| `python -m recipe {name}" in PAGES["README.md"] for name in COMMANDS)
