"""The benchmarks run and write what they should; how fast anything is, no test can say."""

import importlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from scipy import stats
from torch import Tensor, nn

from benchmarks import (
    checkpoint_cost,
    engine_overhead,
    gpu_throughput,
    hardware_independence,
    input_pipeline,
    noise_scale_cost,
    noise_scale_digits,
    on_device,
    parity,
    scaling,
    startup,
    timed_train,
    update_magnitude,
)
from recipe.data import Batch
from tests.launch import ROOT, forked, module, train_ok


@pytest.mark.parametrize(
    ("benchmark", "words", "problem"),
    [
        (gpu_throughput, "--micro-batch -1", "argument --micro-batch: expected a whole number of at least 1"),
        (gpu_throughput, "--steps 0", "argument --steps: expected a whole number of at least 1"),
        (gpu_throughput, "--rounds 1", "argument --rounds: expected a whole number of at least 2"),
        (gpu_throughput, "--model resnet19", "--model resnet19: timm has no model of this name"),
        (gpu_throughput, "--pack {folder}/empty", "{folder}/empty is not a complete pack"),
        (
            gpu_throughput,
            "--images {folder}/two/train --loops bare",
            "--images: the recipe trains on them, and --loops",
        ),
        (input_pipeline, "--made-up 0", "argument --made-up: expected a whole number of at least 1"),
        (input_pipeline, "--workers 1 0", "argument --workers: expected a whole number of at least 1"),
        (input_pipeline, "--images {folder}/no", "--images {folder}/no: No such file or directory; a folder of images"),
        (input_pipeline, "--images {folder}/empty", "--images {folder}/empty: Couldn't find any class folder in"),
        (input_pipeline, "--images {folder}", "--images {folder}: Found no valid file for the classes empty"),
        (on_device, "--batches 0", "argument --batches: expected a whole number of at least 1"),
        (on_device, "--config {folder}/no.json", "{folder}/no.json"),
        (on_device, "--data {folder}/no", "there is no folder {folder}/no; it should contain train/ and val/"),
        (
            on_device,
            "--data {folder}/two",
            "2 training images in {folder}/two; --batches 8 of --micro-batch 64",
        ),
        (on_device, "--device cuda:0", "argument --device: torch finds no GPU; use cpu"),
        (startup, "--rounds 0", "argument --rounds: expected a whole number of at least 1"),
        (
            checkpoint_cost,
            "--folder {file}/below",
            "argument --folder: {file}/below cannot be made a folder: Not a directory",
        ),
        (startup, "--json {file}/below.json", "argument --json: {file} cannot be made a folder: File exists"),
        (startup, "--json {folder}/table.md", "argument --json: {folder}/table.md cannot be the JSON"),
        (startup, "--json {folder}", "argument --json: {folder} cannot be the JSON"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_line_before_anything_is(
    benchmark: ModuleType, words: str, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {"folder": tmp_path, "file": tmp_path / "file"}
    paths["file"].touch()
    (tmp_path / "empty").mkdir()
    for image in ("train/a/0.jpg", "train/b/1.jpg", "val/a/2.jpg", "val/b/3.jpg"):
        (tmp_path / "two" / image).parent.mkdir(parents=True)
        (tmp_path / "two" / image).touch()
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(words.format(**paths).split())
    out, err = capsys.readouterr()
    assert not out
    assert (
        f"benchmarks.{benchmark.__name__.rpartition('.')[2]}: error: {problem.format(**paths)}" in err.splitlines()[-1]
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_engine_overhead_writes_a_table_and_the_numbers(tmp_path: Path, ranks: int) -> None:
    """One rank it starts itself; of two it is both, as a launcher starts it."""
    if torch.cuda.device_count() == 1 < ranks:
        pytest.skip("NCCL takes no two ranks on one GPU")
    file = tmp_path / "results" / "overhead.json"
    words = "--model test_resnet --image-size 32 --micro-batch 2 --accumulation 1 2 --steps 2 --json"
    done = module("benchmarks.engine_overhead", *words.split(), str(file), ranks=ranks)
    assert done.returncode == 0, done.stderr

    report = json.loads(file.read_text())
    assert report["command"].startswith("python -m benchmarks.engine_overhead --model test_resnet --image-size 32")
    assert report["settings"] == {"model": "test_resnet", "image_size": 32, "micro_batch": 2, "precision": "fp32"}
    assert set(report["versions"]) == {"python", "torch", "deepspeed", "timm"}
    assert report["hardware"]["cores"] >= 1
    assert [(result["world_size"], result["accumulation"]) for result in report["results"]] == [(ranks, 1), (ranks, 2)]
    others = ["plain", "timm" if ranks == 1 else "ddp"]
    for result in report["results"]:
        assert result["rounds"] == 2
        assert list(result["step_ms"]) == ["recipe", *others]
        assert list(result["recipe_ratio"]) == others
        for quartiles in (*result["step_ms"].values(), *result["recipe_ratio"].values()):
            assert 0 < quartiles["lower_quartile"] <= quartiles["median"] <= quartiles["upper_quartile"]
        assert max(result["update_differs_from_plain_by"].values()) < 1e-3

    table = file.with_suffix(".md").read_text()
    assert done.stdout == table
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 3 * 2
    assert rows[0].startswith(f"| {ranks} | 1 | 2 | recipe | ")


def test_engine_overhead_compares_no_different_work() -> None:
    def loop(weight: float) -> engine_overhead.Loop:
        parameters = [nn.Parameter(torch.full((3,), weight))]
        return engine_overhead.Loop(lambda: None, torch.optim.SGD(parameters, lr=0.1))

    start = torch.zeros(3)
    close = engine_overhead.compare_training({"recipe": loop(1.0001), "plain": loop(1.0)}, start, "fp32")
    assert close == {"recipe": pytest.approx(1e-4, rel=1e-2)}
    with pytest.raises(RuntimeError, match=r"recipe does not train as plain does: their updates differ by 0.5"):
        engine_overhead.compare_training({"recipe": loop(1.5), "plain": loop(1.0)}, start, "fp32")
    with pytest.raises(RuntimeError, match="differ by nan"):
        engine_overhead.compare_training({"recipe": loop(float("nan")), "plain": loop(1.0)}, start, "fp32")


def _throughput(words: list[str]) -> None:
    """Loops that fail beside those that are measured, and a Ctrl-C at the second micro-batch."""

    def raises(model: nn.Module, batches: list[Batch], precision: str) -> engine_overhead.Loop:
        raise ValueError("no compiler\nfor a | b")

    def half(model: nn.Module, batches: list[Batch], precision: str) -> engine_overhead.Loop:
        if len(batches[0].labels) == 4:
            raise KeyboardInterrupt
        loop = gpu_throughput.bare_loop(model, batches, precision)
        for group in loop.optimizer.param_groups:
            group["lr"] /= 2
        return loop

    for name, make in (("bare+compile", raises), ("half", half)):
        gpu_throughput.CONTENDERS[name] = gpu_throughput.Contender(make, cudnn_benchmark=False)
    sys.exit(gpu_throughput.main(words))


def test_gpu_throughput_trains_the_same_in_every_loop_and_keeps_what_it_has(tmp_path: Path) -> None:
    file = tmp_path / "throughput.json"
    input_pipeline.make_images(tmp_path / "images", 12)
    packs = input_pipeline.make_packs(tmp_path / "images", tmp_path / "packs", [], [40])
    words = "--model test_resnet --image-size 32 --micro-batch 8 4 --steps 1 --rounds 2 --precision fp32 --workers 1"
    words += " --peak-tflops 1 --loops bare bare+compile half timm torchvision recipe"
    paths = {"--images": tmp_path / "images", "--pack": packs["raw pack 40"], "--json": file}
    done = forked(_throughput, [*words.split(), *(str(word) for pair in paths.items() for word in pair)])
    assert done.returncode == 130, done.stderr
    report, table = json.loads(file.read_text()), file.with_suffix(".md").read_text()
    assert done.stdout == table
    measured = [result for result in report["results"] if "problem" not in result]
    assert [result["loop"] for result in measured] == ["bare", "timm", "torchvision", "recipe", "jpegs", "pack"]
    for result in measured:
        assert result["micro_batch"] == 8
        speed = result["images_per_second"]["median"]
        assert result["share_of_peak"] == pytest.approx(report["flops_an_image"] * speed / 1e12)
    problems = {result["loop"]: result["problem"] for result in report["results"] if "problem" in result}
    assert problems["bare+compile"] == "ValueError: no compiler\nfor a | b"
    assert problems["half"].startswith("RuntimeError: half does not train as bare does: their updates differ by 0.5,")
    assert "| 8 | bare+compile | ValueError: no compiler for a \\| b | | |" in table.splitlines()
    for line in ("8, set up: bare+compile", "8, round 2 of 2: recipe", "4, set up: half"):
        assert f"micro-batch {line}" in done.stderr.splitlines()
    if not torch.cuda.is_available():
        assert report["goals"] == "not run on GPU"
        assert "fp32 – not run on GPU" in table.splitlines()[0]
        assert "There is no GPU" in done.stderr


def test_gpu_throughput_sets_the_recipes_best_beside_the_others_best() -> None:
    speeds = {"bare": 100, "bare+compile": 200, "timm": 80, "torchvision": None, "recipe": 150, "recipe+x": 198}
    speeds |= {"jpegs+x": 99, "jpegs_by_gpu+x": 132, "pack+x": 198}
    results = [
        {"micro_batch": 64, "loop": loop, "images_per_second": None if speed is None else {"median": speed}}
        for loop, speed in speeds.items()
    ]
    assert gpu_throughput.goals(results) == {
        "64": {"recipe ÷ bare": 0.99, "recipe ÷ timm": 198 / 80}
        | {"jpegs ÷ recipe": 0.5, "jpegs_by_gpu ÷ recipe": 132 / 198, "pack ÷ recipe": 1}
    }
    assert gpu_throughput.peak_tflops("NVIDIA H100 80GB HBM3", "bf16") == 989.4
    assert gpu_throughput.peak_tflops("another", "bf16") is None
    assert not gpu_throughput.failed([*results, {"problem": gpu_throughput.DOES_NOT_FIT}])
    assert gpu_throughput.failed([*results, {"problem": "RuntimeError: …"}])


def test_checkpoint_cost_writes_shares_of_an_epoch(tmp_path: Path) -> None:
    file = tmp_path / "cost.json"
    words = "--model test_resnet --image-size 32 --batch 2 --saves 2 --images-per-second 1000"
    done = module("benchmarks.checkpoint_cost", *words.split(), "--folder", str(tmp_path), "--json", str(file))
    assert done.returncode == 0, done.stderr
    results = json.loads(file.read_text())["results"]
    # Weights and momentum of 469,688 parameters (1000 classes) in fp32, and little else.
    assert 1 < results["checkpoint_bytes"] / (2 * 4 * 469_688) < 1.1
    save = results["seconds"]["save"]["median"]
    assert results["share_of_an_epoch"]["1000"] == pytest.approx(save / (1281.167 + save))
    assert "| 1,000, assumed | 21.4 min |" in file.with_suffix(".md").read_text()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_hardware_independence_holds_only_where_losses_and_validations_agree(tmp_path: Path) -> None:
    def run(name: str, losses: list[float], top1: float = 50.0) -> Path:
        lines = [{"event": "step", "step": step, "loss": loss} for step, loss in enumerate(losses)]
        lines.append({"event": "validation", "step": 1, "top1": top1, "top5": 90.0, "count": 355})
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        return tmp_path / name

    reference = run("reference", [2.0, 1.0])

    # A variance of 1 over three seeds, and within each pair one of d² / 2: 5 % of F's values for (3, 2) degrees of
    # freedom are above 19.16, as tables say.
    def pairs(d: float) -> list[dict[str, float]]:
        return [{"reference": top1, "other": top1 + d} for top1 in (90.0, 91.0, 92.0)]

    step_within = [{"parts_by": {"a": 1e-6, "b": 9e-6}}]
    accurate = pairs(0.0)

    def verdict(
        other: Path, one_step: list[dict[str, object]] = step_within, accuracies: list[dict[str, float]] = accurate
    ) -> bool:
        compared = hardware_independence.compare(other, reference)
        results = {"fp64": {"split": compared}, "one_step": one_step, "accuracies": accuracies}
        return hardware_independence.holds(results)

    assert verdict(run("rounded", [2.0, 1.0 + 5e-10]))
    assert not verdict(run("parted", [2.0, 1.0 + 2e-9]))
    assert not verdict(run("validated otherwise", [2.0, 1.0], top1=49.9))
    same = run("same", [2.0, 1.0])
    assert not verdict(same, one_step=[{"parts_by": {"a": 1e-6, "b": 2e-5}}])
    once = [{"parts_by": {"a": 1e-6, "b": 2e-5}}, {"parts_by": {"a": 2e-5, "b": 9e-6}}]
    assert verdict(same, one_step=once)
    assert not verdict(same, one_step=[*once[:1], {"parts_by": {"a": 1e-6, "b": 2e-5}}])

    assert verdict(same, accuracies=pairs((2 * 19.0) ** 0.5))
    assert not verdict(same, accuracies=pairs((2 * 19.4) ** 0.5))


def test_scaling_sets_the_measured_link_beside_the_measured_all_reduce() -> None:
    def rank(step: float, all_reduce: float, latency: float) -> dict[str, object]:
        seconds = {"overlapped": step - 0.1, "blocking": step, "none": step - 0.5, "data_wait": 0.01}
        link = {"latency_seconds": latency, "bytes_per_second": 100.0}
        return {"link": link, "steps": {"step": seconds, "all_reduce_alone": all_reduce, "gradient_bytes": 50}}

    row = scaling.summarise([rank(2.0, 0.9, 0.1), rank(2.1, 0.7, 0.3)], 2, "1gbit")
    assert row["step_seconds"] == pytest.approx({"overlapped": 2.0, "blocking": 2.1, "none": 1.6, "data_wait": 0.01})
    assert row["all_reduce_seconds"] == 0.9
    assert row["predicted_all_reduce_seconds"] == pytest.approx(50 / 100 + 2 * 0.2)


def test_scaling_on_paper() -> None:
    rows = {(row["network"], row["micro_batch"], row["gpus"]): row for row in scaling.on_paper()}
    row = rows["50 Gbit/s a node (the paper's network) and 20 µs", 32, 256]
    seconds = 2 * 255 / 256 * 51_114_064 / 6.25e9 + 16 * 20e-6  # a tree of eight levels, up and down
    assert row["all_reduce_seconds"] == pytest.approx(seconds)
    assert row["efficiency"] == pytest.approx(0.0128 / (0.0128 + seconds))
    assert row["efficiency_with_overlap"] == pytest.approx(0.0128 / (0.0128 + seconds - 0.0128 * 2 / 3))


def test_noise_scale_cost_compares_the_same_training(tmp_path: Path) -> None:
    file = tmp_path / "cost.json"
    words = "--model test_resnet --image-size 32 --micro-batch 2 --accumulation 1 2 --steps 2 --json"
    done = module("benchmarks.noise_scale_cost", *words.split(), str(file))
    assert done.returncode == 0, done.stderr
    results = json.loads(file.read_text())["results"]
    assert [result["accumulation"] for result in results] == [1, 2]
    for result in results:
        assert list(result["step_ms"]) == ["does not measure", "listens", "measures"]
        listens, measures = (result["ratio"][name]["median"] for name in ("listens", "measures"))
        assert result["ratio_of_a_run"] == pytest.approx(0.9 * listens + 0.1 * measures)
    assert done.stdout == file.with_suffix(".md").read_text()


def test_noise_scale_cost_compares_no_different_training() -> None:
    def loop(weight: float) -> engine_overhead.Loop:
        parameters = [nn.Parameter(torch.full((3,), weight))]
        return engine_overhead.Loop(lambda: None, torch.optim.SGD(parameters, lr=0.1))

    noise_scale_cost.check_same({"does not measure": loop(1.0), "listens": loop(1.0)})
    with pytest.raises(RuntimeError, match="the loop that measures does not train as"):
        noise_scale_cost.check_same({"does not measure": loop(1.0), "measures": loop(1.0 + 1e-6)})


def test_noise_scale_digits_takes_what_was_measured_last_within_an_epoch() -> None:
    def event(step: int) -> dict[str, object]:
        values = {"noise_scale": None if step == 29 else 10.0 * step, "gradient_variance": 2.0}
        return {"event": "noise_scale", "step": step, "gradient_norm_squared": 0.5} | values

    events = [event(step) for step in range(80) if step != 19]  # a measurement that was not finite
    found = noise_scale_digits.after_epochs([*events, {"event": "step", "step": 79}])
    scales = {epoch: values["noise_scale"] for epoch, values in found.items()}
    assert scales == {"5": 90, "10": 180, "15": None, "20": 390, "25": 490, "30": 590, "35": 690, "40": 790}


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks/results").glob("*.json")), ids=lambda file: file.stem)
def test_a_committed_table_is_what_the_program_makes_of_its_numbers(file: Path) -> None:
    report = json.loads(file.read_text())
    program = importlib.import_module(report["command"].split()[2])
    assert program.format_report(report) == file.with_suffix(".md").read_text()


def test_figures_name_their_logarithmic_ticks(tmp_path: Path) -> None:
    reports = {
        program: json.loads((ROOT / f"benchmarks/results/{program}_cpu.json").read_text())
        for program in ("hardware_independence", "update_magnitude")
    }
    hardware_independence.plot(reports["hardware_independence"], tmp_path / "differences")
    update_magnitude.draw_moves(reports["update_magnitude"]["results"]["moves"], tmp_path / "moves")
    update_magnitude.draw_convergence(reports["update_magnitude"]["results"]["convergence"], tmp_path / "convergence")
    for figure, tick in {"differences": "0.01", "moves": "16", "convergence": "10,000"}.items():
        drawn = (tmp_path / figure).with_suffix(".svg").read_text()
        assert f"<!-- {tick} -->" in drawn
        assert "mathdefault" not in drawn  # a formula that is not typeset


def test_noise_scale_digits_shows_where_nothing_was_measured() -> None:
    report = json.loads((ROOT / "benchmarks/results/noise_scale_digits_cpu.json").read_text())
    report["results"][0]["after_epoch"]["5"]["noise_scale"] = None
    assert "| 5 | – | " in noise_scale_digits.format_report(report)


def test_update_magnitude_compares_moves_as_on_a_parabola() -> None:
    """On ½a|w|² with a = 2 a step at η leaves 1 - 2η of the weights, whatever the images."""

    def gradient(weights: Tensor, indices: Tensor) -> Tensor:
        return 2.0 * weights

    weights, batches, rate = torch.tensor([3.0, -4.0], dtype=torch.float64), [torch.arange(2)] * 4, 0.05
    many = update_magnitude.many_steps(weights, batches, rate, gradient) - weights
    one = update_magnitude.one_step(weights, batches, rate, gradient) - weights
    found = update_magnitude.compare(many, one)
    assert found == {
        "length_ratio": pytest.approx((1 - 0.9**4) / 0.4, rel=1e-12),
        "cosine": pytest.approx(1, rel=1e-12),
        "apart": pytest.approx(1 - (1 - 0.9**4) / 0.4, rel=1e-12),
    }
    right_angle = update_magnitude.compare(torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0]))
    assert right_angle == {"length_ratio": 0.75, "cosine": 0, "apart": 1.25}


def test_update_magnitude_finds_the_exponent_and_how_far_the_rule_holds() -> None:
    assert update_magnitude.slope([1, 2, 8], [3 * t**-0.5 for t in (1, 2, 8)]) == pytest.approx(-0.5)
    assert update_magnitude.geometric_means([[1.0, 2.0], [100.0, 8.0]]) == pytest.approx([10, 4])
    ratios = {2: (1.02, 1.0), 4: (1.0, 1.18), 8: (1.0, 1.22), 16: (1.0, 1.0)}
    moves = [{"epoch": 1, "k": k, "draws": [{"length_ratio": r} for r in draws]} for k, draws in ratios.items()]
    assert update_magnitude.largest_close_k(moves, 1) == 4
    assert update_magnitude.largest_close_k(moves[2:], 1) == 1


def test_input_pipeline_compares_pixels_and_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "input.json"
    threads = torch.get_num_threads()
    words = ["--made-up", "8", "--image-size", "64", "--rounds", "1", "--workers", "1", "--micro-batch", "4"]
    words += ["--short-sides", "300", "--decoders", "gpu", "dali", "--json"]
    try:
        assert input_pipeline.main([*words, str(file)]) == 0
    finally:
        torch.set_num_threads(threads)
    report = json.loads(file.read_text())
    alone = report["one_thread"]
    for name in ("recipe", "pack"):
        assert alone["mean_difference"][name] <= 0.1
        assert alone["largest_difference"][name] <= 2
    assert 0.1 < alone["mean_difference"]["pack 300"] < 10
    assert alone["ratio"]["torchvision"] == 1
    assert set(alone["images_per_second"]) == {"torchvision", "timm", "recipe", "pack", "pack 300", "raw pack 256"}
    assert 0.1 < alone["mean_difference"]["raw pack 256"] < 10
    (case,) = report["loaders"]
    assert case["workers"] == 1
    assert "recipe, raw pack 256" in case["images_per_second"]
    assert min(case["images_per_second"].values()) > 0
    assert "simplejpeg" in report["versions"]
    assert set(report["decoders"]) | set(report["decoders_missing"]) == {"gpu", "dali", "stand-in for gpu"}
    assert 'Not measured: recipe.data.decoder = "gpu": there is no CUDA GPU' in file.with_suffix(".md").read_text()
    for apart in report["decoders"].values():
        assert 0 < apart["training"]["mean"] <= apart["training"]["mean_of_worst_image"] < 1
    out, err = capsys.readouterr()
    assert out == file.with_suffix(".md").read_text()
    for line in ("pack: 0 of 8 images resized", "pack 300: 8 of 8 images resized", "one thread: pass 2 of 2"):
        assert line in err.splitlines()


def test_on_device_trains_on_the_same_images_with_and_without_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "on_device.json"
    words = "--micro-batch 4 --batches 2 --rounds 1 --config ds_configs/digits_b512.json --json"
    assert on_device.main([*words.split(), str(file)]) == 0
    results = json.loads(file.read_text())["results"]
    assert results["images"] == 8
    assert results["same_images"]
    assert results["ratio"][on_device.ALONE] == 1
    assert min(results["images_per_second"].values()) > 0
    out, err = capsys.readouterr()
    assert out == file.with_suffix(".md").read_text()
    assert err.splitlines()[-3:] == ["decoding 8 images", "warming up", "round 1 of 1"]


def test_input_pipeline_predicts_what_the_narrower_side_lets_through() -> None:
    def predicted(per_core: float, main_process_seconds: float) -> float:
        loaders = [{"main_process_seconds_per_image": {"recipe, taken": main_process_seconds}}]
        return input_pipeline.predicted({"one_thread": {"images_per_second": {"recipe": per_core}}, "loaders": loaders})

    assert predicted(500, 1e-4) == 8000
    assert predicted(500, 2e-4) == 5000


def test_startup_times_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "startup.json"
    words = ["--launches", "python", "--rounds", "1"]
    assert startup.main([*words, "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    (found,) = report["seconds_to_first_step"].values()
    assert list(found["parts"]) == list(timed_train.ORDER)
    assert all(seconds >= 0 for seconds in found["parts"].values())
    for part in (timed_train.LAUNCH, timed_train.IMPORTS, timed_train.STEP, "deepspeed.initialize"):
        assert found["parts"][part] > 0.01
    assert found["whole"] == [pytest.approx(sum(found["parts"].values()))]
    assert capsys.readouterr().out == file.with_suffix(".md").read_text()


@pytest.mark.slow
def test_parity_trains_one_configuration_by_each_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "_run", lambda command: train_ok(*command[2:]))  # the same, forked
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})  # threads would wait for those of other tests
    whole = parity.digits(tmp_path / "digits")
    assert [parity.rate(whole, step, 10) for step in (0, 10, 20, 59, 60, 160)] == pytest.approx(
        [0.1, 0.25, 0.4, 0.4, 0.04, 0.0004]
    )
    setting = replace(whole, epochs=2, warmup_epochs=1, decay_epochs=(1,))
    top1 = {
        train.__name__: parity.trained_once(train, setting, 1, tmp_path / train.__name__)
        for train in (parity.recipe, parity.plain)
    }
    assert {name: len(epochs) for name, epochs in top1.items()} == {"recipe": 2, "plain": 2}
    weights = [load_file(tmp_path / name / "start.safetensors") for name in top1]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_interval_of_a_paired_difference_is_students() -> None:
    ours, theirs = [98.2, 99.0, 98.7, 98.1], [98.6, 98.9, 99.2, 98.9]
    centre, half = parity.interval([a - b for a, b in zip(ours, theirs, strict=True)])
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (centre - half, centre + half) == pytest.approx((expected.low, expected.high))
