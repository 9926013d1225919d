"""Estimates of memory, traffic and time compared with hand-computed values, the models and real allocations."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from recipe.commands.inspect_model import DTYPES, inspect_model
from recipe.commands.plan import main
from recipe.config import read_config
from recipe.model import build_model
from recipe.plan import (
    CONTEXT_BYTES,
    SHIPPED,
    Link,
    Plan,
    batchnorm_traffic,
    gradient_bytes,
    hidden_bandwidth,
    largest_micro_batch,
    make_plan,
    memory,
    reduced_bytes,
    speed,
)
from recipe.plan.cost import LOADED_PER_CORE
from tests.launch import ROOT

CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
HEADLINE, N32 = "ds_configs/resnet50_b8192.json", "ds_configs/resnet50_b8192_n32.json"
RESNET50 = SHIPPED["resnet50", 1000]
PARAMETERS = 25_557_032


def plan_of(file: str, world_size: int, *overrides: str) -> Plan:
    return make_plan(read_config(ROOT / file, overrides), world_size)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_facts_match_the_models(path: Path) -> None:
    model = read_config(path).recipe.model
    facts = SHIPPED[model.name, model.num_classes]
    assert facts == inspect_model(model.name, model.num_classes, facts.image_size)


@pytest.mark.parametrize(
    ("name", "classes", "micro_batch", "precision"),
    [
        ("resnet50", 1000, 4, "fp32"),
        ("resnet50", 1000, 4, "bf16"),
        ("resnet18", 10, 32, "bf16"),
        ("test_resnet", 10, 128, "fp32"),
    ],
)
def test_forward_pass_keeps_the_predicted_bytes(name: str, classes: int, micro_batch: int, precision: str) -> None:
    """Measured with torch's profiler: the allocations on a CPU that are not freed by the end of a forward pass.

    The peak of the backward pass would depend on the convolution workspaces of this CPU.
    """
    facts, dtype = SHIPPED[name, classes], DTYPES[precision]
    model = build_model(name, classes, seed=0, statistics="local")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    images = torch.zeros(micro_batch, 3, facts.image_size, facts.image_size, dtype=dtype)
    labels = torch.zeros(micro_batch, dtype=torch.long)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        loss = F.cross_entropy(model(images).float(), labels)
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    kept = images.nbytes + sum(event.nbytes() for event in events)
    assert loss.requires_grad
    assert micro_batch * facts.saved_bytes[precision] == pytest.approx(kept, rel=0.005)


def test_memory_by_part() -> None:
    parts = memory(plan_of(HEADLINE, 256), RESNET50)
    assert parts.weights == parts.gradients == parts.reduction == 2 * PARAMETERS
    assert parts.master_weights == parts.momentum == 4 * PARAMETERS
    # 32 images: what autograd saves, and two copies of the pixels
    assert parts.activations == 32 * (43_761_576 + 2 * 3 * 224 * 224 * 2)
    assert parts.workspace == 2 * 2 * 2_359_296 + CONTEXT_BYTES
    assert parts.total == 14 * PARAMETERS + parts.activations + parts.workspace

    lamb = memory(plan_of(HEADLINE, 256, 'optimizer={"type": "LAMB"}'), RESNET50)
    assert lamb.momentum == 2 * parts.momentum  # two moments
    averaging = memory(plan_of(HEADLINE, 256, "recipe.ema.decay=0.9999998"), RESNET50)
    assert averaging.total == parts.total + 4 * PARAMETERS
    held, crops = (
        memory(plan_of("ds_configs/cifar10_b1024.json", 1, f'recipe.data.crop="{crop}"'), SHIPPED["resnet18", 10])
        for crop in ("padded", "random_resized")
    )
    assert held.data_set == 3 * 96 * 96 * 60_000
    assert crops.data_set == 3 * 96 * 96 * 10_000  # training images keep a size that the plan does not know

    fp32 = memory(plan_of(HEADLINE, 1, "fp16.enabled=false"), RESNET50)
    assert (fp32.weights, fp32.master_weights, fp32.momentum) == (4 * PARAMETERS, 0, 4 * PARAMETERS)
    assert fp32.reduction == 0  # on a single rank


@pytest.mark.parametrize(("stage", "shared"), [(1, (1, 1, 4, 4)), (2, (1, 4, 4, 4)), (3, (4, 4, 4, 4))])
def test_zero_partitions_memory(stage: int, shared: tuple[int, ...]) -> None:
    parts = memory(plan_of(HEADLINE, 4, f"zero_optimization.stage={stage}"), RESNET50)
    found = (parts.weights, parts.gradients, parts.master_weights, parts.momentum)
    assert found == tuple(size * PARAMETERS / ranks for size, ranks in zip((2, 2, 4, 4), shared, strict=True))


def test_largest_micro_batch_that_fits() -> None:
    plan = plan_of(N32, 8)
    per_image = 43_761_576 + 602_112
    fixed = 14 * PARAMETERS + 2 * 2 * 2_359_296 + CONTEXT_BYTES
    assert largest_micro_batch(plan, RESNET50, fixed + 128 * per_image) == 128
    assert largest_micro_batch(plan, RESNET50, fixed + 128 * per_image - 1) == 64
    assert largest_micro_batch(plan, RESNET50, fixed + 8 * per_image) == 8  # groups of 32 over 4 ranks
    assert largest_micro_batch(plan, RESNET50, fixed) is None


def test_batch_norm_traffic() -> None:
    # 53 layers with 26,560 channels in total; forward, a rank gets mean and variance of 255 others, backward two
    # sums.
    traffic = batchnorm_traffic(plan_of(HEADLINE, 256), RESNET50)
    assert (traffic.images, traffic.ranks, traffic.collectives) == (8192, 256, 106)
    assert traffic.bytes == 255 * 4 * 2 * 26_560 + 2 * 255 / 256 * 4 * 2 * 26_560
    alone = batchnorm_traffic(plan_of(N32, 1), RESNET50)
    assert (alone.collectives, alone.bytes) == (0, 0)
    # the running averages, once per step over all ranks
    averages = 2 * 7 / 8 * 4 * 2 * 26_560
    split = batchnorm_traffic(plan_of(N32, 8), RESNET50)
    assert (split.images, split.ranks, split.collectives, split.messages, split.bytes) == (32, 1, 1, 3, averages)
    joined = batchnorm_traffic(plan_of(N32, 8, "recipe.max_micro_batch_size=16"), RESNET50)
    assert (joined.images, joined.ranks, joined.collectives) == (32, 2, 106 * 64 + 1)
    assert joined.messages == 106 * 64 + 3
    assert joined.bytes == 64 * (4 * 2 * 26_560 + 4 * 2 * 26_560) + averages
    doubles = batchnorm_traffic(plan_of(HEADLINE, 256, "fp16.enabled=false", 'recipe.precision="fp64"'), RESNET50)
    assert doubles.bytes == 2 * traffic.bytes


def test_estimated_time() -> None:
    plan = plan_of(N32, 8)  # 4 micro-batches of 256 images
    assert gradient_bytes(plan, RESNET50) == 2 * PARAMETERS
    quick = speed(plan, RESNET50, 1000.0, Link(1e9, 1e-3))
    reduction = 2 * 7 / 8 * 2 * PARAMETERS / 1e9 + 2 * 3 * 1e-3  # a tree of three levels, up and down
    assert quick.compute_seconds == pytest.approx(1.024)
    assert quick.all_reduce_seconds == pytest.approx(reduction)
    averages = 2 * 7 / 8 * 4 * 2 * 26_560 / 1e9 + 3 * 1e-3
    assert quick.exposed_seconds == 0
    assert quick.batchnorm_seconds == pytest.approx(averages)
    assert quick.efficiency == pytest.approx(1.024 / (1.024 + averages))
    assert quick.images_per_second == pytest.approx(8192 / (1.024 + averages))
    assert quick.training_seconds == pytest.approx(156 * 90 * (1.024 + averages))
    assert quick.validation_seconds == pytest.approx(90 * 50_000 / 24_000)

    slow = speed(plan, RESNET50, 1000.0, Link(1e8, 1e-3))
    exposed = 17.5 * PARAMETERS / 5e8 + 6e-3 - 2 / 3 * 0.256  # less the backward pass of the last micro-batch
    assert slow.exposed_seconds == pytest.approx(exposed)
    assert slow.efficiency == pytest.approx(1.024 / (1.024 + exposed + slow.batchnorm_seconds))
    for without_overlap in ("zero_optimization.overlap_comm=false", "recipe.compile=true"):
        blocking = speed(plan_of(N32, 8, without_overlap), RESNET50, 1000.0, Link(1e8, 1e-3))
        assert blocking.exposed_seconds == pytest.approx(exposed + 2 / 3 * 0.256)
    assert hidden_bandwidth(plan, RESNET50, 1000.0) == pytest.approx(3.5 * PARAMETERS / (2 / 3 * 0.256))

    whole = speed(plan_of(HEADLINE, 256), RESNET50, 2500.0, Link(12.5e9, 20e-6))
    assert whole.batchnorm_seconds == pytest.approx(54_605_700 / 12.5e9 + 106 * 8 * 20e-6)


def screen(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert main(arguments) == code
    captured = capsys.readouterr()
    return " ".join((captured.out if code == 0 else captured.err).split())


def test_text_of_the_headline_fits_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    hostfile = str(ROOT / "hostfiles/paper_32_nodes_8gpu")
    assert main([str(ROOT / HEADLINE), "--hostfile", hostfile, "--bandwidth", "50"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) <= 40
    assert max(map(len, out.splitlines())) <= 110
    words = " ".join(out.split())
    for line in (
        "resnet50, 1000 classes, 224 px, fp16, SyncBN over all ranks",
        "8,192 = 256 ranks × 1 accumulation step × micro-batch of 32",
        "156 steps per epoch × 90 epochs = 14,040; 3,215 images dropped per epoch",
        "gradual: 0.1 → 3.2 over 780 steps (5 epochs)",
        "× 0.1 at epoch 30 (step 4,680), epoch 60 (step 9,360), epoch 80 (step 12,480)",
        "0.0001 on 25,502,912 convolution and linear weights; none on 54,120 batch-norm parameters and biases",
        "53 layers over 8,192 images of all 256 ranks: 106 collectives and 52.1 MiB sent per rank and step",
        "48.7 MiB weights + 97.5 MiB master weights + 48.7 MiB gradients + 97.5 MiB momentum",
        "1.32 GiB activations",
        "activations: 32 × 42.3 MiB",
        "a rank's whole share of the batch, 32 images, would fit 80 GiB",
        "48.7 MiB of fp16 gradients, 97.1 MiB sent per rank and step",
        "assuming 5,653 images/s per GPU (measured on one H200 in fp16) and 50 Gbit/s per GPU (given)",
    ):
        assert line in words, line


def test_hint_to_give_the_number_of_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert "this is for one rank; for more, use --hostfile" in screen(capsys, str(ROOT / HEADLINE))
    assert "this is for one rank" not in screen(capsys, str(ROOT / HEADLINE), "--world-size", "1")


def test_gpu_that_is_too_small(capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--world-size", "8", "--gpu-memory")
    too_much = "more than 8 GiB, in which micro-batches of up to 128 would fit"
    assert too_much in screen(capsys, str(ROOT / HEADLINE), *small, "8")
    assert "no micro-batch would fit 1 GiB" in screen(capsys, str(ROOT / HEADLINE), *small, "1")


OTHER = ("--set=recipe.model.name=resnet34", "--set=recipe.model.num_classes=7")
HEAD = ("--set=recipe.model.weights=hf-hub:some/one", "--set=recipe.model.freeze=backbone")
INSPECT = ("--inspect", "--world-size=8")


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (OTHER, ["not known for this model; --inspect checks its name", "over all ranks, if the model has batch norm"]),
        (HEAD, ["not known for this model; --inspect checks its name"]),
        (
            ["--set=recipe.compile=true"],
            ["6,490 images/s per GPU (measured on one H200 in fp16, with recipe.cudnn_benchmark)"],
        ),
        (["--set=fp16.enabled=false"], ["speed not known for this model, size and precision: give one GPU's"]),
        (["--set=recipe.data.image_size=160"], ["speed not known for this"]),
        ([*OTHER, *INSPECT], ["36 layers over 2,048 images"]),  # 33 convolutions and 3 downsamples
        (
            [*HEAD, *INSPECT],
            [
                "on 2,048,000 convolution and linear weights; none on 1,000 other parameters",
                "batch norm, if any, in evaluation mode",
                "batch norm none is trained",
                "48.7 MiB weights + 7.82 MiB master weights + 3.91 MiB gradients",
            ],
        ),
        (["--set=recipe.model.name=vit_tiny_patch16_224", *INSPECT], ["fp16, no batch norm", "none in this model"]),
    ],
)
def test_unknown_and_inspected_models(capsys: pytest.CaptureFixture[str], options: list[str], texts: list[str]) -> None:
    out = screen(capsys, str(ROOT / HEADLINE), *options)
    assert [text for text in texts if text not in out] == []


def test_inspected_model_that_timm_does_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    refusal = screen(capsys, str(ROOT / HEADLINE), "--set=recipe.model.name=resnet5", "--inspect", code=2)
    assert f"{HEADLINE} (with --set recipe.model.name=resnet5): recipe.model.name" in refusal
    assert "resnet50" in refusal


def test_cores_for_loading(capsys: pytest.CaptureFixture[str]) -> None:
    measured = json.loads((ROOT / "benchmarks/results/input_pipeline_raw_cpu.json").read_text())["one_thread"]
    for (short_side, raw), per_core in LOADED_PER_CORE.items():
        name = f"{'raw ' if raw else ''}pack {short_side}" if short_side else "recipe"
        assert per_core == round(measured["images_per_second"][name])

    def loading(*overrides: str) -> str:
        words = [f"--set={override}" for override in overrides]
        out = screen(capsys, str(ROOT / HEADLINE), "--images-per-second", "5000", *words)
        return " ".join(out.partition("loading")[2].partition("note")[0].split())

    of_pack = ["recipe.data.source=pack", "recipe.data.pack_raw=true"]
    folder = f"{5000 / 371:.1f} cores per GPU for 5,000 images/s (measured on a busy Xeon)"
    remedy = f"; {5000 / 2034:.1f} from a pack of raw pixels, python -m recipe pack SRC DST --short-side 256 --raw"
    assert loading() == folder + remedy
    assert loading("recipe.data.workers=13") == f"{folder}: 13 loader processes per rank may be too few{remedy}"
    assert loading("recipe.data.workers=14") == folder + remedy
    raw = loading(*of_pack, "recipe.data.pack_short_side=352")
    assert raw == f"{5000 / 1721:.1f} cores per GPU for 5,000 images/s (measured on a busy Xeon)"
    for unknown in ("crop=none", "image_size=192", "decoder=dali", "on_device=true"):
        assert loading(f"recipe.data.{unknown}") == ""
    assert loading(*of_pack, "recipe.data.pack_short_side=300") == ""


def test_zero_reduction_traffic() -> None:
    def reduced(stage: int) -> float:
        return reduced_bytes(plan_of(HEADLINE, 8, f"zero_optimization.stage={stage}"), RESNET50)  # 4 micro-batches

    assert [reduced(stage) / (2 * PARAMETERS) for stage in range(4)] == [1, 1, 4, 6]
    zero3 = plan_of(HEADLINE, 32, "zero_optimization.stage=3")
    just_enough = Link(hidden_bandwidth(zero3, RESNET50, 2500.0), 0.0)
    assert speed(zero3, RESNET50, 2500.0, just_enough).exposed_seconds == pytest.approx(0, abs=1e-12)
    fp64 = plan_of(HEADLINE, 8, "fp16.enabled=false", 'recipe.precision="fp64"', 'communication_data_type="fp16"')
    assert gradient_bytes(fp64, RESNET50) == 8 * PARAMETERS


def test_two_configs_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(ROOT / "ds_configs/resnet50_b256.json"), str(ROOT / N32), "--world-size", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line[2:18].strip(): line for line in lines if line[2:18].strip()}
    assert rows["peak rate"].startswith("≠")
    assert "0.1 × 256 / 256" in rows["peak rate"]
    assert "3.2 = 0.1 × 8,192 / 256" in rows["peak rate"]
    assert rows["optimizer"].startswith(" ")
    assert max(map(len, lines)) <= 150


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(ROOT / N32), "--world-size", "8", "--json", "--images-per-second", "1000"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["rates"][0] == [0, 0.1]
    assert [780, 3.2] in answer["rates"]
    assert answer["rates"][-1] == [14_039, pytest.approx(0.0032)]
    assert answer["memory_bytes"]["momentum"] == 4 * PARAMETERS
    assert answer["all_reduce_bytes_sent"] == 3.5 * PARAMETERS
    assert answer["speed"]["step_seconds"] == pytest.approx(1.024, rel=1e-3)
    assert answer["config"]["train_micro_batch_size_per_gpu"] == 256
    assert main([str(ROOT / N32), str(ROOT / HEADLINE), "--json"]) == 0
    assert [one["global_batch"] for one in json.loads(capsys.readouterr().out)] == [8192, 8192]


def test_picture_of_the_rate(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    configs = [str(ROOT / "ds_configs/resnet50_b256.json"), str(ROOT / HEADLINE)]
    assert main([*configs, "--plot", str(tmp_path / "plan.png")]) == 0
    assert capsys.readouterr().err == f"recipe: wrote {tmp_path}/plan.png\nrecipe: wrote {tmp_path}/plan.svg\n"
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "plan.svg").read_text()
    assert main([configs[0], "--plot", str(tmp_path / "no/plan.png")]) == 2
    assert "no/plan.png: No such file or directory" in capsys.readouterr().err
