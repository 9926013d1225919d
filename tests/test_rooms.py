"""The layers of ``recipe``: which room may import which."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "config": set(),
    "plan": {"config"},
    "model": set(),
    "data": {"config"},
    "engine": {"plan", "model"},
    "distributed": {"config"},
    "checkpoints": {"config", "plan", "model", "engine"},
    "reporting": {"config", "plan", "engine", "checkpoints"},
}


def imports(file: Path) -> Iterator[tuple[str, list[str]]]:
    """Each module that a file imports from ``recipe``, with the names that it takes."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "recipe":
            yield node.module or "", [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names if alias.name.split(".")[0] == "recipe")


def test_there_are_these_rooms_and_only_what_a_run_passes_through_stands_beside_them() -> None:
    beside = {path.name for path in (ROOT / "recipe").iterdir() if path.name != "__pycache__"}
    assert beside == {*MAY_IMPORT, "commands", "__init__.py", "__main__.py", "run.py", "train.py"}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_from_the_rooms_below_it(room: str) -> None:
    for file in (ROOT / "recipe" / room).rglob("*.py"):
        for module, names in imports(file):
            other = module.split(".")[1]
            assert other in {room, *MAY_IMPORT[room]}, f"{file} imports {module}"
            if room in ("model", "data", "engine", "distributed"):
                assert not {"Config", "read_config"} & set(names), f"{file} takes the config, not plain values"


def test_other_rooms_are_imported_whole_and_commands_by_nobody() -> None:
    for file in (ROOT / "recipe").rglob("*.py"):
        own = file.relative_to(ROOT / "recipe").parts[0]
        for module, _ in imports(file):
            room, _, inner = module.removeprefix("recipe").removeprefix(".").partition(".")
            if room != own and room in MAY_IMPORT:
                assert not inner, f"{file} imports {module}, not recipe.{room}"
            assert room != "commands" or own == "commands", f"{file} imports {module}"


def test_config_hostfile_and_plan_import_nothing_that_takes_long() -> None:
    code = (
        "import sys\n"
        "from recipe.config import read_config\n"
        "from recipe.distributed import count_slots, read_hostfile\n"
        "from recipe.plan import format_plan, make_plan\n"
        "ranks = count_slots(read_hostfile('hostfiles/four_nodes_8gpu'))\n"
        "format_plan(make_plan(read_config('ds_configs/resnet50_b8192.json'), ranks))\n"
        "print({'torch', 'deepspeed', 'torchvision', 'timm', 'matplotlib', 'sklearn', 'scipy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
