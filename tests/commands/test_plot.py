"""``python -m recipe plot`` draws what the files say, and says what is wrong with them."""

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
from recipe.commands.figure import DASH
from recipe.commands.plot import MOST_POINTS, draw, smooth, thin_out
from recipe.commands.run_files import distinct_names, read_run
from tests.launch import ROOT
from tests.run_folders import plan, step, validation, write_run

NOISE = {"event": "noise_scale", "gradient_variance": 1.0, "gradient_norm_squared": 0.1}
PANELS = ["training loss", "validation loss", "learning rate", "top-1 validation error [%]", "images per second"]
PANELS += ["time spent waiting for data [%]"]


def panels(*folders: Path) -> dict[str, Any]:
    figure = draw([read_run(folder) for folder in folders])
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def curve(axes: Any, number: int = 0) -> list[tuple[float, float]]:
    return list(zip(*axes.lines[number].get_data(), strict=True))


def test_runs_of_other_batches_meet_at_their_epochs(tmp_path: Path) -> None:
    # 35 images: 4 steps of 8 an epoch, 2 of 16.
    small = write_run(tmp_path / "small", [*(step(t, 2.0) for t in range(8)), validation(3, 40.0), validation(7, 70.0)])
    large = write_run(
        tmp_path / "large",
        [
            *(step(t, 3.0, lr=0.2, data_wait=0.25) for t in range(4)),
            validation(1, 30.0, 2.5),
            validation(3, 60.5, None),
        ],
        plan(train_batch_size=16),
    )
    drawn = panels(small, large)
    assert list(drawn) == PANELS
    assert curve(drawn["training loss"], 0) == [((t + 1) / 4, 2.0) for t in range(8)]
    assert curve(drawn["training loss"], 1) == [(0.5, 3.0), (1.0, 3.0), (1.5, 3.0), (2.0, 3.0)]
    assert curve(drawn["validation loss"], 0) == [(1.0, 1.0), (2.0, 1.0)]
    np.testing.assert_array_equal(curve(drawn["validation loss"], 1), [(1.0, 2.5), (2.0, np.nan)])
    assert curve(drawn["top-1 validation error [%]"], 0) == [(1.0, 60.0), (2.0, 30.0)]
    assert curve(drawn["top-1 validation error [%]"], 1) == [(1.0, 70.0), (2.0, 39.5)]
    assert curve(drawn["time spent waiting for data [%]"], 1)[0] == (0.5, 25.0)
    assert curve(drawn["learning rate"], 1) == [(0.0, 0.2), (0.5, 0.2), (1.0, 0.2), (1.5, 0.2), (2.0, 0.2)]
    assert {axes.get_xlim() for axes in drawn.values()} == {(0.0, 2.02)}


def test_means_over_neighbours() -> None:
    points, means = smooth(np.array([1.0, 2.0, 6.0, 4.0, 5.0]), 1)
    assert points.tolist() == [0, 1, 2, 3, 4]
    assert means.tolist() == [1.5, 3.0, 4.0, 5.0, 4.5]
    _, means = smooth(np.array([1.0, np.nan, 3.0, np.nan, np.nan, np.nan]), 1)
    np.testing.assert_array_equal(means, [1.0, 2.0, 3.0, 3.0, np.nan, np.nan])


def test_the_legend_says_how_the_loss_is_smoothed(tmp_path: Path) -> None:
    # 1 % of 100 epochs on each side: 4 of 4 steps an epoch.
    of_plan = plan()
    of_plan["recipe"]["schedule"]["epochs"] = 100
    losses = [float(t % 9) for t in range(400)]
    folder = write_run(tmp_path / "run", (step(t, loss) for t, loss in enumerate(losses)), of_plan)
    figure = draw([read_run(folder)])
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert figure.legends[0].get_title().get_text() == "Training on digits"
    assert labels == ["run: test_resnet, batch 8 (100 of 100 epochs)", "mean over ± 1 epochs (faint: each step)"]
    raw, smoothed = figure.axes[0].lines
    assert raw.get_ydata().tolist() == losses
    assert smoothed.get_ydata()[10] == sum(losses[6:15]) / 9 == 4.0


def test_few_points_draw_the_curve_of_many() -> None:
    values = np.sin(np.arange(450_360) / 1000)
    values[123_456], values[234_567], values[300_000:300_010] = 50.0, -50.0, np.nan
    kept = thin_out(values)
    assert len(kept) <= 2 * MOST_POINTS + 2
    assert {0, 123_456, 234_567, 450_359} <= set(kept.tolist())
    assert np.all(np.diff(kept) > 0)


def test_skipped_updates_and_losses_without_a_number_are_marked(tmp_path: Path) -> None:
    lines = [step(0, None, skipped=True), step(1, 2.5, skipped=True), step(2, 2.0), step(3, None), step(4, 1.0)]
    axes = panels(write_run(tmp_path, lines))["training loss"]
    loss, skipped, not_finite = axes.lines
    np.testing.assert_array_equal(loss.get_ydata(), [np.nan, 2.5, 2.0, np.nan, 1.0])
    assert skipped.get_xdata().tolist() == [0.25, 0.5]
    assert not_finite.get_xdata().tolist() == [0.25, 1.0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["update skipped", "loss not finite"]


def test_other_events_are_passed_over_and_a_noise_scale_has_its_panel(tmp_path: Path) -> None:
    lines = [{"event": "weather", "step": "x"}, step(0, 2.0), NOISE | {"step": 0, "epoch": 0, "noise_scale": None}]
    with_noise = write_run(tmp_path / "a", [*lines, step(1, 1.0), NOISE | {"step": 1, "epoch": 0, "noise_scale": 900}])
    drawn = panels(write_run(tmp_path / "b", [step(0, 2.0)]), with_noise)
    assert list(drawn) == [*PANELS, "gradient noise scale [images]"]
    np.testing.assert_array_equal(drawn["gradient noise scale [images]"].lines[1].get_ydata(), [np.nan, 900.0])


def test_a_run_in_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(
        tmp_path / "run", [step(0, 2.0), step(1, 1.5)], unfinished_line='{"event": "step", "step": 2, "lo'
    )
    begun = write_run(tmp_path / "begun")
    (begun / "metrics.jsonl").unlink()
    figure = draw([read_run(folder)])
    for panel in ("validation loss", "top-1 validation error [%]"):
        assert [text.get_text() for text in figure.axes[PANELS.index(panel)].texts] == ["no validation yet"]
    assert figure.legends[0].get_texts()[0].get_text() == "run: test_resnet, batch 8 (0.5 of 10 epochs)"

    assert plot.main([str(folder), str(begun), "--output", str(tmp_path)]) == 0
    seen = capsys.readouterr()
    assert seen.err == f"recipe: {begun} has no step written down yet\n"
    assert seen.out.splitlines() == [f"{tmp_path}/plot.png", f"{tmp_path}/plot.svg"]
    assert plot.main([str(begun)]) == 2
    assert "nothing to draw yet" in capsys.readouterr().err


def test_what_spans_more_than_a_factor_of_ten_has_a_logarithmic_scale(tmp_path: Path) -> None:
    for losses, scale in (([2.0, 0.3], "linear"), ([2.0, 0.1], "log"), ([2.0, 0.0], "linear"), ([None], "linear")):
        drawn = panels(write_run(tmp_path, (step(t, loss) for t, loss in enumerate(losses))))
        assert drawn["training loss"].get_yscale() == scale


def test_curves_that_lie_on_each_other_take_turns(tmp_path: Path) -> None:
    """Of three equal ones each shows a third of the way: dashes a dash apart, and the longest one in their gaps."""
    lines = [step(t, 2.0 - t / 9) for t in range(9)]
    runs = [write_run(tmp_path / "no further yet", lines[:5])]
    runs += [write_run(tmp_path / name, lines) for name in "ab"]
    runs.append(write_run(tmp_path / "other", [step(t, 1.0, lr=0.05) for t in range(9)]))
    # The same rate, though in other steps: 16 of 35 images.
    runs.append(write_run(tmp_path / "larger", [step(t, 1.5) for t in range(4)], plan(train_batch_size=16)))
    drawn = panels(*runs)

    def dashes(panel: str) -> list[tuple[float, Any]]:
        return [line._unscaled_dash_pattern for line in drawn[panel].lines]

    on, off = DASH, 2 * DASH
    solid = (0, None)
    assert dashes("training loss") == [(2 * DASH, (on, off)), solid, (DASH, (on, off)), solid, solid]
    assert [line.get_zorder() < 2 for line in drawn["training loss"].lines] == [False, True, False, False, False]
    # The rate of four runs is the same; 9 steps of 4 an epoch go further than 4 steps of 2.
    one, two, three = [(turn * DASH, (DASH, 3 * DASH)) for turn in (1, 2, 3)]
    assert dashes("learning rate") == [three, solid, one, solid, two]
    assert {line.get_linewidth() for line in drawn["learning rate"].lines} == {1.5}


def test_ticks_are_plain_numbers(tmp_path: Path) -> None:
    drawn = panels(write_run(tmp_path, [step(t, 2.0 / 20**t, images_per_second=2e6) for t in range(3)]))

    def ticks(panel: str, *values: float) -> list[str]:
        return [drawn[panel].yaxis.get_major_formatter()(value) for value in values]

    assert ticks("training loss", 0.1, 0.005) == ["0.1", "0.005"]
    assert ticks("images per second", 1_500_000.0, 0.1 + 0.2) == ["1,500,000", "0.3"]


def test_more_runs_than_colours(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"run{number}", [step(0, 2.0)]) for number in range(40)]
    figure = draw([read_run(run) for run in runs])
    assert len(figure.axes[0].lines) == len(figure.legends[0].get_texts()) == 40


def test_names_tell_runs_apart() -> None:
    folders = [Path(path) for path in ("/x/a/run", "/x/b/run", "/y/b/run", "/y/other", "/run")]
    assert distinct_names(folders) == ["a/run", "x/b/run", "y/b/run", "other", "/run"]


def test_names_are_drawn_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["_hidden", "$x$ and $\\frac{1", "red\x1b[31m", "日本", "long" * 50]
    folders = [write_run(tmp_path / name, [step(0, 2.0)], summary={}) for name in names]
    assert plot.main([*map(str, folders), "--output", str(tmp_path / "new/esc\x1bape.svg")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/new/esc\\u001bape.png\n{tmp_path}/new/esc\\u001bape.svg\n"
    texts = draw([read_run(folder) for folder in folders]).legends[0].get_texts()
    assert ["".join(text.get_text().split()) for text in texts] == [
        f"{name}:test_resnet,batch8"
        for name in ("_hidden", "$x$and$\\frac{1", "red\\u001b[31m", "\\u65e5\\u672c", "long" * 50)
    ]
    assert not any(text.get_parse_math() for text in texts)


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ('{"event": "st\n{"event": "validation"}\n', "line 1 is not what a run writes: it is not a JSON object"),
        (f"{json.dumps(step(0, 1.0))}\n[1]\n", "line 2 is not what a run writes: it is not a JSON object"),
        (f"{json.dumps(step(0, 1.0))} {{}}\n", "line 1 is not what a run writes: it is not a JSON object"),
        ('{"step": 0}\n', "line 1 is not what a run writes: it names no event"),
        (json.dumps(step(0, 1.0)).replace("1.0", "NaN") + "\n", "it is not a JSON object"),
        (json.dumps(step(0, 1.0)).replace("0.1", "1e999"), "its lr is too large a number"),
        (json.dumps(step(0, 1.0)).replace("0.1", "1" + "0" * 400), "its lr is not a number"),
        (json.dumps(step(0, 1.0, lr=None)), "its lr is not a number"),
        ('{"event": "validation", "step": 0, "top1": 1, "top5": 2}\n', "its loss is not a number"),
        (json.dumps(step(0, 1.0) | {"step": -1}), "its step is not a whole number but -1"),
        ((json.dumps(step(3, 1.0)) + "\n") * 2, "line 2 is not what a run writes: step 3 comes after step 3"),
        ("[" * 100_000 + "\n", "it is not a JSON object"),
    ],
)
def test_a_line_that_no_run_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: str, problem: str
) -> None:
    folder = write_run(tmp_path)
    (folder / "metrics.jsonl").write_text(lines)
    assert plot.main([str(folder)]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"recipe: {folder}/metrics.jsonl: line ")
    assert problem in error
    assert error.endswith("; remove the line, or mend it")
    assert not (folder / "plot.png").exists()


def test_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", [step(0, 1.0)])
    config = json.loads((ROOT / "ds_configs/digits_b512.json").read_text())
    nameless = {"recipe": plan()["recipe"] | {"model": {}}}
    study = tmp_path / "s"
    second = write_run(study / "case-b/seed-0", [step(0, 1.0)])
    first = write_run(study / "case-a/seed-1", [step(0, 1.0)])
    write_run(study / "case-a/checkpoints/step-00000001")
    for arguments, message in (
        ([str(study)], f"{study} holds no plan.json, so that it is not the folder of a run; did you mean {first}, "),
        ([str(study / "case-a")], f"; did you mean {first}?"),
        ([str(study / "case-b")], f"; did you mean {second}?"),
        ([str(run), "--output", "x.PDF"], "x.PDF: pictures are written as PNG and SVG; name x.png"),
        ([str(tmp_path / "nowhere")], f"there is no folder {tmp_path}/nowhere; name the --output folder of a run"),
        ([str(run / "plan.json")], f"{run}/plan.json is a file; name the --output folder of a run"),
        ([str(tmp_path)], f"{tmp_path} holds no plan.json, so that it is not the folder of a run; did you mean {run}"),
        ([str(write_run(tmp_path / "x", of_plan=config))], "train_micro_batch_size_per_gpu is not a whole number >= 1"),
        ([str(write_run(tmp_path / "y", of_plan=plan(train_batch_size=99)))], "larger than its train_images"),
        ([str(write_run(tmp_path / "z", of_plan=plan() | nameless))], "recipe.model.name is no string"),
        (["x" * 300], f"{'x' * 300} cannot be read: File name too long; mend that, or name another folder"),
        ([str(run), "--output", str(run / "plan.json/below")], f"{run}/plan.json: File exists; name another --output"),
    ):
        assert plot.main(arguments) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert error.startswith("recipe: ")
        assert message in error


def test_from_a_shell_without_a_display(tmp_path: Path) -> None:
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


def test_a_long_run_is_drawn_by_few_points(tmp_path: Path) -> None:
    of_plan = plan()
    of_plan["recipe"]["data"]["train_images"] = 8 * 5004
    line = json.dumps(step(123_456, 2.0))
    folder = write_run(tmp_path, of_plan=of_plan)
    (folder / "metrics.jsonl").write_text("".join(f"{line.replace('123456', str(t))}\n" for t in range(100_000)))
    assert plot.main([str(folder)]) == 0
    assert (folder / "plot.svg").stat().st_size < 1_000_000
