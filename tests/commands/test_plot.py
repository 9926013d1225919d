"""``python -m recipe plot`` draws what the files contain and refuses invalid ones."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recipe.commands import plot
from recipe.commands.figure import PLAIN_NUMBERS
from recipe.commands.plot import MOST_POINTS, condense, draw
from recipe.commands.run_files import read_run
from tests.launch import ROOT
from tests.run_folders import plan, step, validation, write_run

NOISE = {"event": "noise_scale", "epoch": 0, "gradient_variance": 1.0, "gradient_norm_squared": 0.1}
PANELS = ["training loss", "validation loss", "learning rate", "top-1 validation error [%]", "images per second"]
PANELS += ["time spent waiting for data [%]"]


def panels(*folders: Path) -> dict[str, Any]:
    figure = draw([read_run(folder) for folder in folders])
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def curve(axes: Any, number: int = 0) -> list[tuple[float, float]]:
    return list(zip(*axes.lines[number].get_data(), strict=True))


def test_runs_with_different_batches_share_the_epoch_axis(tmp_path: Path) -> None:
    # 35 images: 4 steps of 8 per epoch, 2 of 16.
    small = write_run(tmp_path / "small", [*(step(t, 2.0) for t in range(8)), validation(3, 40.0), validation(7, 70.0)])
    events = [*(step(t, 3.0, lr=0.2, data_wait=0.25) for t in range(4)), validation(1, 30.0, 2.5)]
    large = write_run(tmp_path / "large", [*events, validation(3, 60.5, None)], plan(train_batch_size=16))
    drawn = panels(small, large)
    assert list(drawn) == PANELS
    assert curve(drawn["training loss"], 0) == [((t + 1) / 4, 2.0) for t in range(8)]
    assert curve(drawn["training loss"], 1) == [(0.5, 3.0), (1.0, 3.0), (1.5, 3.0), (2.0, 3.0)]
    assert curve(drawn["validation loss"], 0) == [(1.0, 1.0), (2.0, 1.0)]
    np.testing.assert_array_equal(curve(drawn["validation loss"], 1), [(1.0, 2.5), (2.0, np.nan)])
    assert curve(drawn["top-1 validation error [%]"], 0) == [(1.0, 60.0), (2.0, 30.0)]
    assert curve(drawn["top-1 validation error [%]"], 1) == [(1.0, 70.0), (2.0, 39.5)]
    assert curve(drawn["time spent waiting for data [%]"], 1)[0] == (0.5, 25.0)
    assert curve(drawn["learning rate"], 1) == [(0.5, 0.2), (1.0, 0.2), (1.5, 0.2), (2.0, 0.2)]
    assert {axes.get_xlim() for axes in drawn.values()} == {(0.0, 2.02)}


def test_a_long_curve_is_condensed_to_means_with_a_band(tmp_path: Path) -> None:
    epochs, values = np.arange(4.0 * MOST_POINTS), np.tile([1.0, np.nan, 2.0, 6.0], MOST_POINTS)
    values[4:8] = np.nan
    at, means, lowest, highest = condense(epochs, values)
    assert at.tolist() == [1.5 + 4 * number for number in range(MOST_POINTS)]
    np.testing.assert_array_equal(means[:3], [3.0, np.nan, 3.0])
    np.testing.assert_array_equal(lowest[:3], [1.0, np.nan, 1.0])
    np.testing.assert_array_equal(highest[:3], [6.0, np.nan, 6.0])

    long_plan = plan()
    long_plan["recipe"]["data"]["train_images"] = 8 * MOST_POINTS
    long_run = write_run(tmp_path, (step(t, 2.0) for t in range(4 * MOST_POINTS)), long_plan)
    axes = panels(long_run)["training loss"]
    assert len(curve(axes)) == MOST_POINTS
    assert len(axes.collections) == 1  # the band


def test_skipped_updates_and_losses_that_are_not_finite_are_marked(tmp_path: Path) -> None:
    lines = [step(0, None, skipped=True), step(1, 2.5, skipped=True), step(2, 2.0), step(3, None), step(4, 1.0)]
    axes = panels(write_run(tmp_path, lines))["training loss"]
    loss, lost = axes.lines
    np.testing.assert_array_equal(loss.get_ydata(), [np.nan, 2.5, 2.0, np.nan, 1.0])
    assert lost.get_xdata().tolist() == [0.25, 0.5, 1.0]
    assert axes.get_title(loc="right") == "×: update skipped, or loss not finite"


def test_unknown_events_are_ignored_and_the_noise_scale_has_a_panel(tmp_path: Path) -> None:
    lines = [{"event": "weather", "step": 0}, step(0, 2.0), NOISE | {"step": 0, "noise_scale": None}]
    with_noise = write_run(tmp_path / "a", [*lines, step(1, 1.0), NOISE | {"step": 1, "noise_scale": 900}])
    drawn = panels(write_run(tmp_path / "b", [step(0, 2.0)]), with_noise)
    assert list(drawn) == [*PANELS, "gradient noise scale [images]"]
    np.testing.assert_array_equal(drawn["gradient noise scale [images]"].lines[1].get_ydata(), [np.nan, 900.0])


def test_a_run_in_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half_a_line = '{"event": "step", "step": 2, "lo'
    folder = write_run(tmp_path / "run", [step(0, 2.0), step(1, 1.5)], unfinished_line=half_a_line)
    begun = write_run(tmp_path / "begun")
    (begun / "metrics.jsonl").unlink()
    figure = draw([read_run(folder)])
    for panel in ("validation loss", "top-1 validation error [%]"):
        assert [text.get_text() for text in figure.axes[PANELS.index(panel)].texts] == ["no validation yet"]
    assert figure.legends[0].get_texts()[0].get_text() == "run: test_resnet, batch 8 (0.5 of 10 epochs)"

    assert plot.main([str(folder), str(begun), "--output", str(tmp_path)]) == 0
    seen = capsys.readouterr()
    assert seen.err == f"recipe: {begun} has no steps yet\n"
    assert seen.out.splitlines() == [f"{tmp_path}/plot.png", f"{tmp_path}/plot.svg"]
    assert plot.main([str(begun)]) == 2
    assert "nothing to draw yet" in capsys.readouterr().err


def test_a_range_of_more_than_a_factor_of_ten_has_a_logarithmic_scale(tmp_path: Path) -> None:
    for losses, scale in (([2.0, 0.3], "linear"), ([2.0, 0.1], "log"), ([2.0, 0.0], "linear"), ([None], "linear")):
        axes = panels(write_run(tmp_path, (step(t, loss) for t, loss in enumerate(losses))))["training loss"]
        assert axes.get_yscale() == scale
        assert axes.yaxis.get_major_formatter().fmt == PLAIN_NUMBERS
    assert [PLAIN_NUMBERS.format(x=value) for value in (0.005, 1_500_000.0, 0.1 + 0.2)] == ["0.005", "1,500,000", "0.3"]


def test_more_runs_than_colours_have_different_names_and_widths(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a/run", "b/run", *(f"c/{number}" for number in range(10)))]
    figure = draw([read_run(write_run(folder, [step(0, 2.0)])) for folder in folders])
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [label.partition(":")[0] for label in labels[:3]] == ["a/run", "b/run", "c/0"]
    widths = [line.get_linewidth() for line in figure.axes[0].lines]
    assert len(widths) == len(labels) == 12
    assert widths == sorted(set(widths), reverse=True)  # so that each shows below the next one


def test_names_are_drawn_literally(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["_hidden", "$x$ and $\\frac{1", "red\x1b[31m", "long" * 50]
    folders = [write_run(tmp_path / name, [step(0, 2.0)], summary={}) for name in names]
    assert plot.main([*map(str, folders), "--output", str(tmp_path / "new/esc\x1bape.svg")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/new/esc\\u001bape.png\n{tmp_path}/new/esc\\u001bape.svg\n"
    texts = draw([read_run(folder) for folder in folders]).legends[0].get_texts()
    assert ["".join(text.get_text().split()) for text in texts] == [
        f"{name}:test_resnet,batch8" for name in ("_hidden", "$x$and$\\frac{1", "red\\u001b[31m", "long" * 50)
    ]
    assert not any(text.get_parse_math() for text in texts)


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ('{"event": "st\n{"event": "validation"}\n', "line 1 is not"),
        (f"{json.dumps(step(0, 1.0))}\n[1]\n", "line 2 is not"),
        (json.dumps(step(0, 1.0)).replace("1.0", "NaN") + "\n", "line 1 is not"),
        (json.dumps(step(0, 1.0)).replace("1.0", '"x"') + "\n", "line 1 is not"),
        ('{"event": "validation", "step": 0, "top1": 1, "top5": 2}\n', "line 1 is not"),
        (json.dumps(step(0, 1.0)).replace("0.1", "1" + "0" * 400) + "\n", "line 1 is not"),
        (json.dumps(step(0, 1.0)).replace("0.1", "1e999"), 'the steps of "step" do not increase, or a number is too'),
        ((json.dumps(step(3, 1.0)) + "\n") * 2, 'the steps of "step" do not increase'),
    ],
)
def test_an_invalid_line_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: str, problem: str
) -> None:
    folder = write_run(tmp_path)
    (folder / "metrics.jsonl").write_text(lines)
    assert plot.main([str(folder)]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"recipe: {folder}/metrics.jsonl: {problem}")
    assert not (folder / "plot.png").exists()


def test_folders_that_are_not_runs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", [step(0, 1.0)])
    torn = write_run(tmp_path / "torn")
    (torn / "plan.json").write_text(json.dumps(plan())[:-1])
    config = json.loads((ROOT / "ds_configs/digits_b512.json").read_text())
    study = tmp_path / "s"
    second = write_run(study / "case-b/seed-0", [step(0, 1.0)])
    first = write_run(study / "case-a/seed-1", [step(0, 1.0)])
    write_run(study / "case-a/checkpoints/step-00000001")
    for arguments, message in (
        ([str(study)], f"{study} has no plan.json, so it is not the folder of a run; did you mean {first}, "),
        ([str(study / "case-a")], f"; did you mean {first}?"),
        ([str(study / "case-b")], f"; did you mean {second}?"),
        ([str(run), "--output", "x.PDF"], "x.PDF: pictures are written as PNG and SVG; name x.png"),
        ([str(torn)], f"{torn}/plan.json: line 1, column "),
        ([str(tmp_path / "nowhere\x1b[2J")], f"there is no folder {tmp_path}/nowhere\\u001b[2J; name the --output"),
        ([str(tmp_path)], f"{tmp_path} has no plan.json, so it is not the folder of a run; did you mean {run}"),
        ([str(write_run(tmp_path / "x", of_plan=config))], "plan.json: train_micro_batch_size_per_gpu = "),
        ([str(write_run(tmp_path / "y", of_plan=plan(train_batch_size=99)))], "per_gpu = 99: micro-batches of 99"),
        ([str(run), "--output", str(run / "plan.json/below")], f"{run}/plan.json: File exists"),
    ):
        assert plot.main(arguments) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert error.startswith("recipe: ")
        assert message in error


def test_plot_needs_no_display_torch_or_pyplot(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [step(0, 2.0), step(1, 1.5)])
    program = (
        "import sys; from recipe.commands import plot, compare; "
        f"assert compare.main([{str(folder)!r}] * 2) == 0; "
        "assert 'matplotlib' not in sys.modules; "
        f"assert plot.main([{str(folder)!r}]) == 0; "
        "assert not {'torch', 'deepspeed', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY")}
    subprocess.run([sys.executable, "-W", "error", "-c", program], cwd=ROOT, env=environment, check=True)
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert re.search("<svg ", (folder / "plot.svg").read_text())
