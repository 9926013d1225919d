"""Plans against tables worked out by hand, and the shipped configs on the shipped hostfiles."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recipe.checkpoints.resume import batchnorm_images
from recipe.config.schema import Config, ConfigError, parse_config, read_config
from recipe.distributed.hostfile import read_hostfile
from recipe.plan.cost import SHIPPED, activation_bytes, cores_to_load, local_bytes
from recipe.plan.plan import Plan, fitting_micro_batches, make_plan, with_micro_batch
from recipe.plan.text import format_plan, notes, plan_fields, plan_json
from recipe.reporting.summary import format_summary, read_summary
from tests.run_folders import step, write_run

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))


def config(**changes: Any) -> Config:
    """The paper's run at 8k; keys of ``changes`` are dotted, with ``__`` for the dot."""
    raw: dict[str, Any] = {
        "train_batch_size": 8192,
        "recipe": {
            "model": {"name": "resnet50", "num_classes": 1000},
            "data": {
                "source": "imagefolder",
                "path": "imagenet",
                "image_size": 224,
                "train_images": 1281167,
                "validation_images": 50000,
            },
            "schedule": {"epochs": 90},
        },
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        section = raw
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    return parse_config(raw, "run.json")


def refusal(world_size: int = 1, **changes: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        make_plan(config(**changes), world_size)
    return caught.value


@pytest.mark.parametrize(
    ("batch", "world_size", "largest", "micro", "accumulation"),
    [
        # design.md: 256 on 32 GPUs, 32 on 256, 256 with 32 accumulation steps on one
        (8192, 32, 256, 256, 1),
        (8192, 256, 256, 32, 1),
        (8192, 1, 256, 256, 32),
        (8192, 8, 256, 256, 4),
        (8192, 8, 100, 64, 16),
        (8190, 6, 256, 195, 7),  # 1365 = 3 · 5 · 7 · 13, whose largest divisor up to 256 is 195
        (256, 1, 1, 1, 256),
        (254, 2, 126, 1, 127),  # 127 is prime
        (7, 7, 256, 1, 1),
    ],
)
def test_auto_takes_the_largest_micro_batch_that_divides(
    batch: int, world_size: int, largest: int, micro: int, accumulation: int
) -> None:
    plan = make_plan(config(train_batch_size=batch, recipe__max_micro_batch_size=largest), world_size)
    assert (plan.micro_batch, plan.accumulation) == (micro, accumulation)
    resolved = json.loads(plan_json(plan))
    assert resolved["train_micro_batch_size_per_gpu"] == micro
    assert resolved["gradient_accumulation_steps"] == accumulation


@pytest.mark.parametrize(
    ("changes", "world_size", "assumed", "micro"),
    [
        ({}, 8, True, 256),
        ({"recipe__batchnorm__statistics": 512}, 1, True, 512),  # more than is assumed, but nothing smaller fits
        ({"train_micro_batch_size_per_gpu": 1024}, 1, False, 1024),
        ({"gradient_accumulation_steps": 2}, 4, False, 1024),
    ],
)
def test_an_auto_limit_leaves_only_an_open_micro_batch_to_the_run(
    changes: dict[str, Any], world_size: int, assumed: bool, micro: int
) -> None:
    plan = make_plan(config(recipe__max_micro_batch_size="auto", **changes), world_size)
    assert (plan.assumes_micro_batch, plan.micro_batch) == (assumed, micro)
    assert ('"auto": a run finds what fits' in "\n".join(notes(plan))) == assumed
    assert json.loads(plan_json(plan))["recipe"]["max_micro_batch_size"] == micro


def test_the_micro_batch_that_a_run_found_settles_the_plan() -> None:
    open_plan = make_plan(config(recipe__max_micro_batch_size="auto"), 8)
    settled = with_micro_batch(open_plan, 512)
    assert (settled.micro_batch, settled.accumulation, settled.assumes_micro_batch) == (512, 2, False)
    assert settled.schedule == open_plan.schedule
    resolved = json.loads(plan_json(settled))
    assert (resolved["train_micro_batch_size_per_gpu"], resolved["gradient_accumulation_steps"]) == (512, 2)
    assert resolved["recipe"]["max_micro_batch_size"] == 512
    again = make_plan(parse_config(resolved, "plan.json"), 8)
    assert plan_json(again) == plan_json(settled)


def test_a_noise_scale_needs_two_sizes_of_batch() -> None:
    changes = {"recipe__noise_scale__enabled": True, "train_batch_size": 256}
    error = refusal(1, **changes)
    assert error.key == "recipe.noise_scale.enabled"
    assert error.problem.startswith("one rank takes the whole batch of 256 as one micro")
    assert error.remedy.startswith("write a train_micro_batch_size_per_gpu below that and ")
    make_plan(config(**changes, train_micro_batch_size_per_gpu=128), 1)
    make_plan(config(**changes, recipe__batchnorm__statistics=32), 2)


def test_fitting_micro_batches() -> None:
    assert fitting_micro_batches(48, 2, "global") == [24, 12, 8, 6, 4, 3, 2, 1]
    assert fitting_micro_batches(48, 2, 8) == [24, 8, 4]  # three groups, one, and half of one on each of two ranks
    assert fitting_micro_batches(48, 1, 5) == []


@pytest.mark.parametrize(
    ("micro", "accumulation", "world_size", "expected"),
    [(64, "auto", 4, (64, 32)), ("auto", 64, 4, (32, 64)), (32, 64, 4, (32, 64)), (512, "auto", 4, (512, 4))],
)
def test_written_sides_of_the_triangle_are_kept(
    micro: int | str, accumulation: int | str, world_size: int, expected: tuple[int, int]
) -> None:
    plan = make_plan(config(train_micro_batch_size_per_gpu=micro, gradient_accumulation_steps=accumulation), world_size)
    assert (plan.micro_batch, plan.accumulation) == expected


@pytest.mark.parametrize(
    ("world_size", "changes", "product", "nearest"),
    [
        (3, {}, "3 (ranks)", "8190 or 8193"),
        (1, {"train_micro_batch_size_per_gpu": 100}, "1 × 100 (ranks × images in a micro-batch)", "8100 or 8200"),
        (8, {"gradient_accumulation_steps": 6}, "8 × 6 (ranks × accumulation steps)", "8160 or 8208"),
        (
            8,
            {"gradient_accumulation_steps": 3, "train_micro_batch_size_per_gpu": 256},
            "8 × 3 × 256 (ranks × accumulation steps × images in a micro-batch)",
            "6144",
        ),
        # The batch is too large for so few accumulation steps.
        (8, {"gradient_accumulation_steps": 2}, "at most 256 images in a micro-batch", "4096"),
        # It is smaller than one image a rank.
        (16, {"train_batch_size": 8}, "16 (ranks)", "16"),
    ],
)
def test_a_triangle_without_solution_names_the_nearest_batches(
    world_size: int, changes: dict, product: str, nearest: str
) -> None:
    error = refusal(world_size, **changes)
    assert error.key == "train_batch_size"
    assert product in error.problem
    assert error.remedy.startswith(f"the nearest that can: {nearest}")
    for batch in nearest.split(" or "):
        make_plan(config(**(changes | {"train_batch_size": int(batch)})), world_size)


def test_the_papers_run() -> None:
    plan = make_plan(config(), 32)
    assert plan.timeline.phases[0].steps_per_epoch == 156  # ⌊1 281 167 / 8192⌋
    assert plan.left_over_images == 3215  # 1 281 167 − 156 · 8192
    assert plan.total_steps == 14_040
    assert plan.schedule.warmup_steps == 780
    assert plan.schedule.milestones == (4680, 9360, 12480)
    assert plan.schedule.start_rate == 0.1
    assert plan.schedule.peak_rate == pytest.approx(3.2, rel=1e-15)
    assert plan.weight_decay == 1e-4
    resolved = json.loads(plan_json(plan))
    assert resolved["optimizer"]["params"] == {
        "lr": pytest.approx(3.2),
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 1e-4,
    }
    assert resolved["scheduler"]["params"] == {
        "warmup_min_lr": 0.1,
        "warmup_max_lr": pytest.approx(3.2),
        "warmup_num_steps": 780,
        "warmup_type": "linear",
    }
    assert resolved["gradient_clipping"] == 0.0


@pytest.mark.parametrize("batch", [64, 256])
def test_no_warmup_at_and_below_the_reference_batch(batch: int) -> None:
    plan = make_plan(config(train_batch_size=batch), 1)
    assert plan.schedule.warmup == "none"
    assert plan.schedule.rate(0) == plan.schedule.peak_rate == pytest.approx(0.1 * batch / 256)
    assert json.loads(plan_json(plan))["scheduler"]["params"]["warmup_num_steps"] == 1


def test_weight_decay_inverse_divides_by_kn_over_256() -> None:
    inverse = {"recipe__schedule__weight_decay_rule": "inverse"}
    assert make_plan(config(**inverse), 1).weight_decay == 1e-4 / 32
    assert make_plan(config(**inverse, recipe__schedule__reference_weight_decay=5e-4), 1).weight_decay == 5e-4 / 32
    assert make_plan(config(optimizer__params__weight_decay=5e-5), 1).weight_decay == 5e-5  # the rule "constant"
    error = refusal(**inverse, optimizer__params__weight_decay=1e-4)
    assert (error.key, error.value) == ("optimizer.params.weight_decay", 1e-4)
    assert "3.125e-06" in error.remedy


@pytest.mark.parametrize(
    ("changes", "key", "right"),
    [
        ({"optimizer__params__lr": 0.1}, "optimizer.params.lr", "3.2"),
        ({"scheduler__params__warmup_max_lr": 3.3}, "scheduler.params.warmup_max_lr", "3.2"),
        ({"scheduler__params__warmup_min_lr": 0.0}, "scheduler.params.warmup_min_lr", "0.1"),
        ({"scheduler__params__warmup_num_steps": 781}, "scheduler.params.warmup_num_steps", "780"),
        ({"optimizer__params__lr": 3.2, "recipe__schedule__scaling_rule": "sqrt"}, "optimizer.params.lr", "0.5656854"),
        ({"train_batch_size": 256, "scheduler__params__warmup_min_lr": 0.05}, "scheduler.params.warmup_min_lr", "0.1"),
    ],
)
def test_a_number_that_contradicts_its_rule_is_refused(changes: dict, key: str, right: str) -> None:
    error = refusal(**changes)
    assert error.key == key
    assert right in error.remedy
    assert str(error).startswith(f"run.json: {key} = ")


def test_scaling_rule_none_means_what_the_file_says() -> None:
    unscaled = {"recipe__schedule__scaling_rule": "none"}
    assert make_plan(config(**unscaled), 1).schedule.peak_rate == 0.1
    assert make_plan(config(**unscaled), 1).schedule.warmup_steps == 0
    written = make_plan(config(**unscaled, optimizer__params__lr=2.0), 1).schedule
    assert (written.start_rate, written.peak_rate, written.warmup_steps) == (0.1, 2.0, 780)
    error = refusal(**unscaled, optimizer__params__lr=2.0, scheduler__params__warmup_max_lr=1.0)
    assert error.key == "scheduler.params.warmup_max_lr"


@pytest.mark.parametrize(
    ("changes", "key", "remedy"),
    [
        ({"train_batch_size": 1_300_000}, "train_batch_size", "at most 1281167"),
        ({"recipe__schedule__epochs": 4}, "recipe.schedule.warmup_epochs", "at most 4"),
        (
            {"recipe__schedule__decay": "cosine", "recipe__schedule__final_lr": 3.3},
            "recipe.schedule.final_lr",
            "less than that",
        ),
        # At once, though all of their divisors are looked at.
        ({"train_batch_size": 10**9}, "train_batch_size", "at most 1281167"),
        ({"train_batch_size": 10**10}, "train_batch_size", "from 1 to 1000000000"),
    ],
)
def test_what_cannot_be_trained_is_refused(changes: dict, key: str, remedy: str) -> None:
    error = refusal(**changes)
    assert error.key == key
    assert remedy in error.remedy


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        # 312 steps an epoch; half of 1.7 is half-way from step 624 to 4,992.
        ("resnet50_fast", {0: 0.10625, 624: 1.7, 2808: 0.85, 4992: 0}),
        # 39 steps an epoch; the half of steps 624 to 2,262 is 1,443, with (1 / 2)² of 21.2 − 0.0001.
        ("resnet50_lars_b32k", {0: 0, 312: 10.6, 624: 21.2, 1443: 0.0001 + 21.1999 / 4, 2262: 0.0001}),
        # 19 steps an epoch; the last of the 1,121 from step 589 to 1,710 has (1 / 1,121)² of 24.699 − 0.0001.
        ("resnet50_b65536_accumulated", {0: 0, 589: 24.699, 589 + 1120: 0.0001 + 24.6989 / 1121**2, 1710: 0.0001}),
    ],
)
def test_the_rates_of_configs_after_others(name: str, rates: dict[int, float]) -> None:
    plan = make_plan(read_config(ROOT / f"ds_configs/{name}.json"), 32)
    assert plan.total_steps == max(rates)
    assert {step: plan.schedule.rate(step) for step in rates} == pytest.approx(rates, rel=1e-12)


def test_sizes_by_epoch() -> None:
    """The largest decides the memory, which has (192 / 224)² of the activations; validation has its own size."""
    sizes = {"recipe__data__image_size": [[0, 160], [30, 192], [90, 224]], "recipe__data__source": "pack"}
    for own, size in ((None, 192), (256, 256)):
        plan = make_plan(config(**sizes, recipe__data__validation_image_size=own), 32)
        assert (plan.image_sizes, plan.validation_image_size) == (((0, 160), (30, 192)), size)
        fields = dict(plan_fields(plan, None))
        assert fields["image size"] == f"160 px, 192 px from epoch 30 on; {size} px in validation"
        assert fields["images"].startswith("random resized crops of 160 to 192 px, half of them mirrored;")
        again = make_plan(parse_config(json.loads(plan_json(plan)), "plan.json"), 32)
        assert plan_json(again) == plan_json(plan)
    facts, small = SHIPPED["resnet50", 1000], make_plan(config(), 32)
    images = 2 * 3 * 4  # twice, 3 channels of 4 bytes
    saved = activation_bytes(small, facts) - images * 224**2
    assert activation_bytes(plan, facts) == pytest.approx(saved * (192 / 224) ** 2 + images * 192**2)
    assert cores_to_load(plan, 2500) is None  # measured at 224 px alone
    assert "image size" not in dict(plan_fields(small, None))


def test_fractional_epochs() -> None:
    plan = make_plan(config(recipe__schedule__warmup_epochs=0.5, recipe__schedule__decay_epochs=[29.5, 60.25]), 1)
    assert plan.schedule.warmup_steps == 78
    assert plan.schedule.milestones == (4602, 9399)


@pytest.mark.parametrize(
    ("rules", "text", "half_way"),
    [
        # Half of the way from step 780 to 14,040 is 7,410: a half of 3.2, and a quarter of 3.2 − 0.0004 above that.
        ({"decay": "cosine"}, "cosine from 3.2 to 0 at the end of the run", "7,410: 1.6"),
        (
            {"decay": "polynomial", "final_lr": 0.0004},
            "polynomial of power 2 from 3.2 to 0.0004 at the end of the run",
            "7,410: 0.8003",
        ),
        ({"decay": "none"}, "none", "780: 3.2, 14,039: 3.2"),
    ],
)
def test_a_curve_in_the_plan_and_in_the_config_that_repeats_it(rules: dict, text: str, half_way: str) -> None:
    plan = make_plan(config(**{f"recipe__schedule__{key}": value for key, value in rules.items()}), 32)
    rows = dict(plan_fields(plan, None))
    assert rows["decay"] == text
    assert half_way in rows["rate at step"].replace("\N{NO-BREAK SPACE}", " ")
    again = make_plan(parse_config(json.loads(plan_json(plan)), "plan.json"), 32)
    assert again.schedule == plan.schedule
    assert not {"decay_epochs", "decay_factor"} & json.loads(plan_json(plan))["recipe"]["schedule"].keys()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("hostfile", ["localhost", "one_node_8gpu", "four_nodes_8gpu", "paper_32_nodes_8gpu"])
def test_shipped_configs_plan_on_shipped_hostfiles_and_plan_json_repeats_them(path: Path, hostfile: str) -> None:
    ranks = sum(read_hostfile(ROOT / "hostfiles" / hostfile).values())
    plan = make_plan(read_config(path), ranks, cores_per_rank=4)
    assert ranks * plan.accumulation * plan.micro_batch == plan.global_batch
    text = plan_json(plan)
    assert '"auto"' not in text
    again = make_plan(parse_config(json.loads(text), "plan.json"), ranks, cores_per_rank=64)
    assert plan_json(again) == text
    assert again.schedule == plan.schedule


def test_plan_json_on_other_ranks_is_refused_with_the_remedy() -> None:
    resolved = json.loads(plan_json(make_plan(config(), 8)))
    with pytest.raises(ConfigError, match='write "auto" for train_micro_batch_size_per_gpu'):
        make_plan(parse_config(resolved, "plan.json"), 16)


@pytest.mark.parametrize(
    ("n", "world_size", "largest", "micro"),
    [
        (32, 1, 256, 256),  # eight groups in a micro-batch
        (32, 256, 256, 32),
        (32, 1024, 256, 8),  # a group on four ranks
        (48, 8, 256, None),  # 1024 images a rank: no divisor of it is a multiple of 48, and 48 / 16 ranks are 3
        (32, 1, 16, None),  # 16 images on one rank do not make up 32
        (32, 2, 16, 16),
    ],
)
def test_micro_batches_that_hold_groups_of_n(n: int, world_size: int, largest: int, micro: int | None) -> None:
    changes = {"recipe__batchnorm__statistics": n, "recipe__max_micro_batch_size": largest}
    if micro is None:
        assert refusal(world_size, **changes).key == "recipe.batchnorm.statistics"
    else:
        assert make_plan(config(**changes), world_size).micro_batch == micro


def test_a_written_micro_batch_must_fit_n_samples() -> None:
    error = refusal(2, recipe__batchnorm__statistics=32, train_micro_batch_size_per_gpu=8)
    assert error.key == "train_micro_batch_size_per_gpu"
    assert error.remedy.startswith("micro-batches that do: 16, 32, 64, ")


def test_the_nearest_batches_that_hold_groups_are_named() -> None:
    """Groups of 48 and 64 ranks share out the multiples of 192 = lcm(48, 64): 42 × 192 = 8,064 and 43 × 192 = 8,256."""
    remedy = refusal(64, recipe__batchnorm__statistics=48).remedy
    assert remedy.startswith('the nearest train_batch_size that can: 8064 or 8256, with "auto"')
    for batch in (8064, 8256):
        make_plan(config(recipe__batchnorm__statistics=48, train_batch_size=batch), 64)
    assert not any(fitting_micro_batches(batch, 64, 48) for batch in range(8064 + 64, 8256, 64))


def test_zero_stages_get_deepspeeds_word_for_sgd() -> None:
    plan = make_plan(config(zero_optimization={"stage": 1}), 1)
    assert json.loads(plan_json(plan))["zero_allow_untested_optimizer"] is True


def test_text_of_the_papers_run() -> None:
    text = format_plan(make_plan(config(fp16={"enabled": True}), 32))
    for line in (
        "resnet50, 1000 classes, 224 px, fp16, SyncBN over all ranks",
        "8,192 = 32 ranks × 1 accumulation step × micro-batch of 256",
        "156 steps per epoch × 90 epochs = 14,040; 3,215 images dropped per epoch",
        "3.2 = 0.1 × 8,192 / 256 (linear scaling)",
        "gradual: 0.1 → 3.2 over 780 steps (5 epochs)",
        "× 0.1 at epoch 30 (step 4,680), epoch 60 (step 9,360), epoch 80 (step 12,480)",
        "0.0001 on 25,502,912 convolution and linear weights; none on 54,120 batch-norm parameters and biases",
    ):
        assert line in " ".join(text.split()), line
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "random resized crops of 224 px, half of them mirrored; 3 loader processes per rank"),
        (
            {"workers": 1, "flip": False, "decoder": "dali"},
            "random resized crops of 224 px, decoded by DALI; 1 loader process per rank",
        ),
        (
            {"crop": "padded", "on_device": True},
            "224 px, shifted by up to 28, half of them mirrored, all held on the device; 3 loader processes per rank",
        ),
        ({"crop": "none", "workers": 0, "flip": False}, "224 px, uncropped; no loader processes"),
        (
            {"augment": "rand", "random_erasing": 0.25, "workers": 0},
            "random resized crops of 224 px, half of them mirrored, RandAugment of magnitude 9, a box erased in 25 % "
            "of them; no loader processes",
        ),
        (
            {"augment": "trivial", "workers": 0},
            "random resized crops of 224 px, half of them mirrored, TrivialAugment; no loader processes",
        ),
    ],
)
def test_the_text_says_how_images_come(changes: dict[str, Any], text: str) -> None:
    plan = make_plan(config(**{f"recipe__data__{key}": value for key, value in changes.items()}), 32, 4)
    assert dict(plan_fields(plan, None))["images"] == text
    again = make_plan(parse_config(json.loads(plan_json(plan)), "plan.json"), 32, 64)
    assert plan_json(again) == plan_json(plan)


@pytest.mark.parametrize(
    ("world_size", "statistics", "fits"),
    [(1, "global", True), (2, "global", False), (2, "local", True), (2, 32, True), (32, 256, True), (32, 512, False)],
)
def test_noise_scale_and_local_sgd_are_refused_where_batch_norm_spans_ranks(
    world_size: int, statistics: Any, fits: bool
) -> None:
    """What a rank has of the gradient there is none of its own images; local steps would not be a rank's own."""
    make_plan(config(recipe__batchnorm__statistics=statistics), world_size)
    wanted: dict[str, Any]
    for wanted in {"recipe__noise_scale__enabled": True}, {"recipe__local_sgd__steps": 8}:
        changes = wanted | {"recipe__batchnorm__statistics": statistics}
        if fits:
            make_plan(config(**changes), world_size)
        else:
            error = refusal(world_size, **changes)
            assert error.key == next(iter(wanted)).replace("__", ".")
            assert error.problem.startswith("batch norm's statistics come from several ranks, and ")
            assert error.remedy.endswith('"local" or a number of images up to a micro-batch\'s, 256')


def test_a_note_says_where_a_noise_scale_has_too_few_measurements() -> None:
    local = {"recipe__noise_scale__enabled": True, "recipe__batchnorm__statistics": 32}
    few = config(**local, recipe__noise_scale__every_steps=1500)
    text = "\n".join(notes(make_plan(few, 32)))  # 14,040 steps
    assert "noise scale: 10 measurements instead of about 20: it may be far off; with" in text
    assert "every_steps = 738 there are enough" in text
    assert "may be far off" not in "\n".join(notes(make_plan(config(**local), 32)))


@pytest.mark.parametrize(
    ("kind", "params", "resolved", "text"),
    [
        ("SGD", {}, {"momentum": 0.9, "nesterov": True}, "SGD, momentum 0.9, Nesterov, no gradient clipping"),
        (
            "LARS",
            {"momentum": 0.94},
            {"momentum": 0.94, "trust_coefficient": 0.001, "eps": 1e-8},
            "LARS, momentum 0.94, trust coefficient 0.001, no gradient clipping",
        ),
        ("LAMB", {}, {"eps": 1e-6}, "LAMB, no gradient clipping"),
    ],
)
def test_an_optimizer_has_its_own_keys_and_no_others(kind: str, params: dict, resolved: dict, text: str) -> None:
    plan = make_plan(config(optimizer={"type": kind, "params": params}), 32)
    written = json.loads(plan_json(plan))["optimizer"]
    assert written == {"type": kind, "params": {"lr": 3.2, "weight_decay": 1e-4} | resolved}
    assert dict(plan_fields(plan, None))["optimizer"] == text


def test_a_weight_average_in_the_plan() -> None:
    """(1 − 2e-7)^8192 = e^−0.0016384; ln 2 / 2e-7 images are 3,465,736 of 1,281,167 an epoch."""
    ema = {"recipe__ema__decay": 1 - 2e-7}
    text = "decay 0.9999998 per image, 0.998363 per step of 8,192: an image's weights count half after 3,465,736 more"
    assert dict(plan_fields(make_plan(config(**ema), 32), None))["weight average"] == text
    assert refusal(2, **ema, recipe__batchnorm__statistics="local").key == "recipe.ema.decay"


def test_mixing_in_the_plan() -> None:
    mixing = {"recipe__data__mixup": {"probability": 0.3}, "recipe__data__cutmix": {"probability": 0.25, "alpha": 0.5}}
    text = format_plan(make_plan(config(**mixing), 32))
    assert "mirrored, mixup in 30 % of the steps (α = 0.2), CutMix in 25 % of the steps (α = 0.5); " in " ".join(
        text.split()
    )
    # 450 images are two micro-batches of 225, but three of 150.
    assert make_plan(config(**mixing, train_batch_size=450), 1).micro_batch == 150
    error = refusal(2, **mixing, train_batch_size=246, train_micro_batch_size_per_gpu=41)
    assert (error.key, error.problem) == ("recipe.data.mixup.probability", "41 images do not make whole pairs")
    assert refusal(2, **mixing, train_batch_size=246).problem == "123 images do not make whole pairs"


def test_what_was_found_of_sgd_is_not_said_of_lars() -> None:
    lars = {"optimizer": {"type": "LARS"}, "recipe__batchnorm__statistics": 32, "train_batch_size": 16384}
    rules = {"recipe__schedule__warmup": "none", "recipe__schedule__scaling_rule": "none"}
    assert plan_notes(**lars, recipe__schedule__warmup="none").startswith("the rate rules are SGD's, and LARS takes")
    assert plan_notes(**lars, **rules, optimizer__params__lr=16) == ""


def test_a_weight_decay_by_rule_that_leaves_lars_without_trust_ratio_is_refused() -> None:
    error = refusal(optimizer={"type": "LARS"}, recipe__schedule__reference_weight_decay=0)
    assert error.key == "optimizer.params.weight_decay"


def plan_notes(world_size: int = 1, **changes: Any) -> str:
    plan: Plan = make_plan(config(**changes), world_size)
    return "\n".join(notes(plan))


def test_notes() -> None:
    n32 = {"recipe__batchnorm__statistics": 32}
    assert plan_notes(**n32) == ""
    for start in ({"recipe__model__name": "resnet50.a1_in1k"}, {"recipe__model__weights": "hf-hub:own/photos"}):
        (value,) = start.values()
        assert f"mean and std are the usual ones; if {value} was trained with others" in plan_notes(**n32, **start)
        assert plan_notes(**n32, **start, recipe__data__mean=[0.5] * 3) == ""
    assert plan_notes(**n32, recipe__model__weights="local-dir:photos") == ""
    assert plan_notes(train_batch_size=256, recipe__max_micro_batch_size=32) == ""
    assert "come from only 4 images" in plan_notes(train_batch_size=256, recipe__max_micro_batch_size=4)
    assert "come from 8,192 images; the paper used 32" in plan_notes(world_size=32)
    assert "24.79 % at 16k" in plan_notes(train_batch_size=16384)
    assert "the literature took LARS, a polynomial decay and label smoothing" in plan_notes(train_batch_size=8193)
    assert '"auto" that on the GPU' in plan_notes(recipe__max_micro_batch_size="auto")
    assert "depend on the micro-batch" not in plan_notes(recipe__max_micro_batch_size="auto", **n32)
    assert "bf16" in plan_notes(bf16={"enabled": True}, recipe__max_micro_batch_size=64)
    assert "activations take less memory" in plan_notes(recipe__model__gradient_checkpointing=True)


def test_a_model_without_batch_norm_hears_nothing_of_it() -> None:
    vit = {"recipe__model__name": "vit_tiny_patch16_224"}
    n32 = {"recipe__batchnorm__statistics": 32, "train_micro_batch_size_per_gpu": 48, "train_batch_size": 6144}
    assert "neither hold groups of 32 samples" in str(refusal(8, **n32))
    assert make_plan(config(**n32, **vit), 8).accumulation == 16  # 8 ranks × 16 × 48 = 6,144
    for changes in ({}, n32, {"recipe__max_micro_batch_size": "auto"}, {"recipe__noise_scale__enabled": True}):
        plan = make_plan(config(**changes, **vit), 8)
        assert not [note for note in notes(plan) if "norm" in note or "statistics" in note]
        assert "fp32, no batch norm" in format_plan(plan)
        assert batchnorm_images(json.loads(plan_json(plan))) is None  # on other ranks it is the same training
    unknown = plan_notes(8, recipe__model__name="resnet34")
    assert "if the model has batch norm: batch norm's statistics come from 2,048 images" in unknown


@pytest.mark.parametrize(
    ("schedule", "note"),
    [
        ({"warmup": "none"}, "no warmup: in the paper, 24.84 % error at 8k instead of 23.74 % (Table 1)"),
        ({"warmup": "constant"}, "a constant warmup: in the paper, 25.88 % error"),
        ({"decay_epochs": [3, 60]}, "the rate decays at step 468, before the warmup ends: it has no peak"),
        ({"warmup_epochs": 1}, "a warmup of 1 epoch is shorter than the paper's 5 (section 2.2)"),
        ({"scaling_rule": "sqrt"}, "the rate is scaled by the square root: in the paper, 26.22 % error"),
        ({"scaling_rule": "none"}, "the rate is not scaled: in the paper, 41.67 % error at 8k instead of 23.74 %"),
    ],
)
def test_notes_on_what_the_paper_found_worse(schedule: dict, note: str) -> None:
    rules = {f"recipe__schedule__{key}": value for key, value in schedule.items()}
    assert note in plan_notes(recipe__batchnorm__statistics=32, **rules)
    assert plan_notes(train_batch_size=256, recipe__batchnorm__statistics=32, **rules) == ""


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        # 1,281,167 images are 78 steps of 16,384 an epoch, five of which are 390.
        ({}, "train_batch_size=16384 with another --output: peak rate 6.4, warmup of 390 steps"),
        ({"warmup": "none"}, "train_batch_size=16384 with another --output: peak rate 6.4, no warmup"),
        ({"scaling_rule": "none"}, "train_batch_size=16384 with another --output: peak rate 0.1, no warmup"),
        ({"scaling_rule": "sqrt"}, "train_batch_size=16384 with another --output: peak rate 0.8, warmup of 390 steps"),
        # 16,384 of them would be one step an epoch; of 4,096 there are 4.
        ({"train_images": 20_000}, "train_batch_size=4096 with another --output: peak rate 1.6, warmup of 20 steps"),
    ],
)
def test_the_summary_advises_what_the_next_plan_says(tmp_path: Path, changes: dict, advice: str) -> None:
    section = {key: "data" if key == "train_images" else "schedule" for key in changes}
    plan = make_plan(config(**{f"recipe__{section[key]}__{key}": value for key, value in changes.items()}), 32)
    summary = read_summary(write_run(tmp_path, summary={}))
    assert summary is not None
    assert format_summary(summary, tmp_path, plan).splitlines()[-1] == f"  next            --set {advice}"


def test_the_summary_advises_no_batch_where_none_goes(tmp_path: Path) -> None:
    """Of two images on two ranks four are too many, and one cannot be shared."""
    plan = make_plan(config(train_batch_size=2, recipe__data__train_images=2), 2)
    summary = read_summary(write_run(tmp_path, summary={}))
    assert summary is not None
    assert "  next" not in format_summary(summary, tmp_path, plan)


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "recipe", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "recipe: name a command; see the list above"),
        (("eval",), "recipe: there is no command 'eval'; did you mean evaluate?"),
        (("hots",), "recipe: there is no command 'hots'; did you mean hosts?"),
        (("plan", "x.json", "--worldsize=8"), "unrecognized arguments: --worldsize=8; did you mean --world-size?"),
        (("hosts", "h", "--configs", "x"), "unrecognized arguments: --configs x; did you mean --config?"),
    ],
)
def test_a_mistyped_command_or_option_is_named_with_the_nearest(words: tuple[str, ...], said: str) -> None:
    done = run_command(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].endswith(said)


def test_the_plan_command() -> None:
    done = run_command("plan", "ds_configs/resnet50_b8192.json", "--hostfile", "hostfiles/paper_32_nodes_8gpu")
    assert (done.returncode, done.stderr) == (0, "")
    assert "8,192 = 256 ranks × 1 accumulation step × micro-batch of 32" in done.stdout
    doubled = run_command("plan", "ds_configs/resnet50_b8192.json", "--set", "train_batch_size=16384")
    assert "6.4 = 0.1 × 16,384 / 256" in doubled.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "ds_configs/resnet50_b8193.json"], "did you mean ds_configs/resnet50_b8192.json?"),
        (["plan", "ds_configs/digits_b512.json", "--world-size", "3"], "the nearest that can: 510 or 513"),
        (["plan", "ds_configs/digits_b512.json", "--hostfile", "hostfiles/none"], "hostfiles/none"),
        (["plan", "ds_configs/digits_b512.json", "--set", "train_btach_size=8"], "train_batch_size"),
    ],
)
def test_the_plan_command_refuses_in_one_line(arguments: list[str], message: str) -> None:
    done = run_command(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr


@pytest.mark.parametrize("buffered", [False, True])
@pytest.mark.parametrize("command", [("plan", "CONFIG"), ("plan", "CONFIG", "--json"), ("compare", "RUN", "RUN")])
def test_an_answer_that_cannot_be_written_is_one_line_and_no_success(
    tmp_path: Path, command: tuple[str, ...], buffered: bool
) -> None:
    run = write_run(tmp_path / "run", [step(0, 2.0)])
    words = [{"CONFIG": "ds_configs/digits_b512.json", "RUN": str(run)}.get(word, word) for word in command]
    environment = os.environ | {"PYTHONUNBUFFERED": "" if buffered else "1"}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "recipe", *words],
            cwd=ROOT,
            env=environment,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line == "recipe: standard output cannot be written: No space left on device; the answer is incomplete"


def test_a_plan_imports_neither_torch_nor_deepspeed() -> None:
    program = (
        "import sys; from recipe.commands.plan import main; main(['ds_configs/resnet50_b8192.json']); "
        "print([m for m in ('torch', 'deepspeed', 'timm', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def growing(*changes: tuple[int, int], **others: Any) -> Config:
    return config(recipe__schedule__batch_size=[list(change) for change in changes], **others)


def test_a_batch_schedule_in_numbers_and_in_words() -> None:
    """⌊1,281,167 / 16,384⌋ = 78 and ⌊… / 81,920⌋ = 15 steps per epoch: 30 · (156 + 78 + 15) = 7,470 steps."""
    plan = make_plan(growing((30, 16384), (60, 81920), recipe__batchnorm__statistics=32), 32)
    assert (plan.micro_batch, plan.total_steps) == (256, 7470)
    assert [plan.accumulation_of(phase) for phase in plan.timeline.phases] == [1, 2, 10]
    assert plan.schedule.milestones == (4680, 7020, 7020 + 20 * 15)
    rates = {4679: 3.2, 4680: 0.64, 7019: 0.64, 7020: 0.32, 7320: 0.032}
    assert {step: plan.schedule.rate(step) for step in rates} == pytest.approx(rates, rel=1e-12)
    fields = dict(plan_fields(plan, None))
    assert fields["steps"].startswith(
        "156 steps per epoch × 30 epochs + 78 steps × 30 epochs + 15 steps × 30 epochs = 7,470; up to 52,367 images"
    )
    assert fields["batch schedule"] == (
        "16,384 from epoch 30 (step 4,680) on, by 2 accumulation steps: peak rate 6.4; "
        "81,920 from epoch 60 (step 7,020) on, by 10 accumulation steps: peak rate 32"
    )
    again = make_plan(parse_config(json.loads(plan_json(plan)), "plan.json"), 32)
    assert (again.schedule, plan_json(again)) == (plan.schedule, plan_json(plan))
    # A trial of two epochs has none of it.
    assert (
        make_plan(growing((30, 10**8), recipe__schedule__epochs=2, recipe__schedule__warmup_epochs=1), 1).total_steps
        == 312
    )


@pytest.mark.parametrize(
    ("world_size", "later", "others", "key", "words"),
    [
        (1, (4, 16384), {}, "recipe.schedule.batch_size", "changes within the 5 epochs of warmup"),
        (1, (30, 1_300_000), {}, "recipe.schedule.batch_size", "write at most 1281167"),
        (32, (30, 10_000), {}, "recipe.schedule.batch_size", "10000 cannot be shared out among 32 ranks"),
        (32, (30, 10_000), {"recipe__batchnorm__statistics": 64}, "recipe.schedule.batch_size", "9984 or 10048"),
        (4, (30, 10_000), {"train_micro_batch_size_per_gpu": 128}, "recipe.schedule.batch_size", "9728 or 10240"),
        (1, (30, 64), {"recipe__noise_scale__enabled": True}, "recipe.noise_scale.enabled", "batch of 64 as one"),
        (
            1,
            (30, 512),
            {"recipe__schedule__decay": "cosine", "recipe__schedule__final_lr": 0.3},
            "recipe.schedule.final_lr",
            "peak of 0.2",
        ),
    ],
)
def test_a_batch_schedule_that_cannot_be(
    world_size: int, later: tuple[int, int], others: dict, key: str, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan(growing(later, **others), world_size)
    assert caught.value.key == key
    assert words in str(caught.value)


def test_local_sgd_says_where_ranks_are_equal_and_what_it_saves() -> None:
    """156 steps per epoch: from epoch 30 on weights are averaged 8, 16, … 152 and 156 steps into each epoch."""
    local = {"recipe__local_sgd": {"steps": 8, "after_epoch": 30}, "recipe__batchnorm__statistics": 32}
    plan = make_plan(config(**local, recipe__checkpoint__every_steps=10), 32)
    assert [step for step in range(4670, 4710) if not plan.is_local(step)] == list(range(4670, 4680))
    assert [step for step in range(4676, 4705) if plan.equal_after(step)] == [*range(4676, 4681), 4688, 4696, 4704]
    assert [step for step in range(4820, 4850) if plan.equal_after(step)] == [4824, 4832, 4836, 4844]
    # Steps 4,680 and 9,360 end epochs; what asks for a checkpoint after 4,690 and 4,700 is heard at 4,696 and 4,704.
    assert [step for step in range(4660, 4712) if plan.saves_after(step)] == [4660, 4670, 4696, 4704]
    assert [plan.saves_after(step, due=True) for step in (4681, 4688)] == [False, True]
    text = " ".join(format_plan(plan).split())
    assert "from epoch 30 (step 4,680) on each rank steps alone; weights are averaged every 8 steps and at" in text
    facts = SHIPPED["resnet50", 1000]
    assert local_bytes(plan, facts) == 4 * facts.parameters / 8
    alone = make_plan(config(**local), 1)
    assert not any(map(alone.is_local, range(4670, 4700)))
    assert "no effect on a single rank" in format_plan(alone)
