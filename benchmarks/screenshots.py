"""Renders command output as SVG for README and docs: ``python -m benchmarks.screenshots`` (needs rich).

The run is trained only if ``runs/digits_b512`` does not contain it yet.
"""

import io
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from benchmarks.launch import ROOT

PICTURES = {
    "plan": ("python -m recipe plan ds_configs/resnet50_b8192.json --hostfile hostfiles/four_nodes_8gpu", ""),
    "summary": ("deepspeed -q recipe/train.py --deepspeed_config ds_configs/digits_b512.json", "  trained"),
}
"""the command for each picture, and the text at which the drawn part of its output starts"""


def main() -> int:
    """Run each command and write its picture; return 0, or the exit code of the first command that fails."""
    for name, (command, beginning) in PICTURES.items():
        launcher, *arguments = command.split()
        words = [str(Path(sys.executable).with_name(launcher)), *arguments]
        done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            return done.returncode
        file = ROOT / "docs" / f"{name}.svg"
        file.write_text(draw(command, done.stdout[done.stdout.index(beginning) :], name), encoding="utf-8")
        print(f"wrote {file.relative_to(ROOT)}")
    return 0


def draw(command: str, output: str, name: str) -> str:
    """An SVG of a terminal with a command and its output; ``name`` makes its identifiers unique within a page."""
    lines = [f"$ {command}", "", *output.expandtabs().strip("\n").splitlines(), ""]  # the last line would be cut off
    console = Console(record=True, width=max(map(len, lines)) + 1, file=io.StringIO(), highlight=False)
    console.print(Text("\n".join(lines), no_wrap=True))
    svg = console.export_svg(title="", unique_id=name)
    return re.sub(r"\s*@font-face \{[^}]*\}", "", svg)  # rich's fonts would be fetched from an external site


if __name__ == "__main__":
    sys.exit(main())
