"""Plans compared with hand-computed values, and the shipped configs on the shipped hostfiles."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recipe.checkpoints.resume import batchnorm_images
from recipe.config.contents import Contents
from recipe.config.schema import Config, ConfigError, parse_config, read_config
from recipe.distributed.hostfile import read_hostfile
from recipe.plan.cost import SHIPPED, activation_bytes, cores_to_load, largest_micro_batch, local_bytes, memory
from recipe.plan.plan import Plan, fitting_micro_batches, make_plan, with_micro_batch
from recipe.plan.text import format_plan, notes, plan_fields, plan_json
from recipe.reporting.summary import format_summary, read_summary
from tests.run_folders import step, write_run

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))


def config(**changes: Any) -> Config:
    """The paper's run at 8k with changes, whose names are dotted keys with ``__`` for the dot."""
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


N32 = {"recipe__batchnorm__statistics": 32}


def refusal(world_size: int = 1, **changes: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        make_plan(config(**changes), world_size)
    return caught.value


def assert_repeatable(plan: Plan, cores_per_rank: int | None = None) -> None:
    """The config in ``plan.json`` gives the same plan."""
    again = make_plan(parse_config(json.loads(plan_json(plan)), "plan.json"), plan.world_size, cores_per_rank)
    assert (plan_json(again), again.schedule) == (plan_json(plan), plan.schedule)


def fields_of(plan: Plan) -> dict[str, str]:
    return dict(plan_fields(plan, None))


def plan_notes(world_size: int = 1, **changes: Any) -> str:
    return "\n".join(notes(make_plan(config(**changes), world_size)))


@pytest.mark.parametrize(
    ("batch", "world_size", "largest", "micro", "accumulation"),
    [
        # design.md: 256 on 32 GPUs, 32 on 256, 256 with 32 accumulation steps on one
        (8192, 32, 256, 256, 1),
        (8192, 256, 256, 32, 1),
        (8192, 1, 256, 256, 32),
        (8192, 8, 100, 64, 16),
        (8190, 6, 256, 195, 7),  # 1365 = 3 · 5 · 7 · 13, whose largest divisor up to 256 is 195
        (256, 1, 1, 1, 256),
        (254, 2, 126, 1, 127),  # 127 is prime
        (7, 7, 256, 1, 1),
    ],
)
def test_auto_is_the_largest_micro_batch_that_divides(
    batch: int, world_size: int, largest: int, micro: int, accumulation: int
) -> None:
    plan = make_plan(config(train_batch_size=batch, recipe__max_micro_batch_size=largest), world_size)
    assert (plan.micro_batch, plan.accumulation) == (micro, accumulation)
    assert_repeatable(plan)


@pytest.mark.parametrize(
    ("changes", "world_size", "assumed", "micro"),
    [
        ({}, 8, True, 256),
        ({"recipe__batchnorm__statistics": 512}, 1, True, 512),  # above the assumed limit, but nothing smaller fits
        ({"train_micro_batch_size_per_gpu": 1024}, 1, False, 1024),
        ({"gradient_accumulation_steps": 2}, 4, False, 1024),
    ],
)
def test_max_micro_batch_size_auto_leaves_an_auto_micro_batch_to_the_run(
    changes: dict[str, Any], world_size: int, assumed: bool, micro: int
) -> None:
    plan = make_plan(config(recipe__max_micro_batch_size="auto", **changes), world_size)
    assert (plan.assumes_micro_batch, plan.micro_batch) == (assumed, micro)
    assert ('"auto": the run finds the largest' in "\n".join(notes(plan))) == assumed
    assert json.loads(plan_json(plan))["recipe"]["max_micro_batch_size"] == micro


def test_micro_batch_that_a_run_found_replaces_the_assumed_one() -> None:
    open_plan = make_plan(config(recipe__max_micro_batch_size="auto"), 8)
    settled = with_micro_batch(open_plan, 512)
    assert (settled.micro_batch, settled.accumulation, settled.assumes_micro_batch) == (512, 2, False)
    assert settled.schedule == open_plan.schedule
    assert json.loads(plan_json(settled))["recipe"]["max_micro_batch_size"] == 512
    assert_repeatable(settled)


def test_noise_scale_needs_two_batch_sizes() -> None:
    changes = {"recipe__noise_scale__enabled": True, "train_batch_size": 256}
    error = refusal(1, **changes)
    assert error.key == "recipe.noise_scale.enabled"
    assert error.problem.startswith("one rank takes the whole batch of 256 as one micro")
    assert error.remedy.startswith("use a train_micro_batch_size_per_gpu below that and ")
    smaller = make_plan(config(**changes, train_micro_batch_size_per_gpu=128), 1)
    assert smaller.possible_micro_batches[0] == 128  # nor does a plan name the whole batch as one that fits a GPU
    make_plan(config(**changes, **N32), 2)


def test_fitting_micro_batches() -> None:
    assert fitting_micro_batches(48, 2, "global") == [24, 12, 8, 6, 4, 3, 2, 1]
    assert fitting_micro_batches(48, 2, 8) == [24, 8, 4]  # three groups, one, and half a group on each of two ranks
    assert fitting_micro_batches(48, 1, 5) == []


@pytest.mark.parametrize(
    ("micro", "accumulation", "world_size", "expected"),
    [(64, "auto", 4, (64, 32)), ("auto", 64, 4, (32, 64)), (32, 64, 4, (32, 64)), (512, "auto", 4, (512, 4))],
)
def test_written_micro_batch_and_accumulation_are_kept(
    micro: int | str, accumulation: int | str, world_size: int, expected: tuple[int, int]
) -> None:
    plan = make_plan(config(train_micro_batch_size_per_gpu=micro, gradient_accumulation_steps=accumulation), world_size)
    assert (plan.micro_batch, plan.accumulation) == expected


@pytest.mark.parametrize(
    ("world_size", "changes", "product", "nearest"),
    [
        (3, {}, "over 3 ranks", "8190 or 8193"),
        (1, {"train_micro_batch_size_per_gpu": 100}, "1 × 100 (ranks × images in a micro-batch)", "8100 or 8200"),
        (8, {"gradient_accumulation_steps": 6}, "8 × 6 (ranks × accumulation steps)", "8160 or 8208"),
        (
            8,
            {"gradient_accumulation_steps": 3, "train_micro_batch_size_per_gpu": 256},
            "8 × 3 × 256 (ranks × accumulation steps × images in a micro-batch)",
            "6144",
        ),
        # too large a batch for two accumulation steps
        (8, {"gradient_accumulation_steps": 2}, "at most 256 images in a micro-batch", "4096"),
        # less than one image per rank
        (16, {"train_batch_size": 8}, "over 16 ranks", "16"),
        # 1,026 are more than there are
        (3, {"train_batch_size": 1024, "recipe__data__train_images": 1025}, "over 3 ranks", "1023"),
        # whole groups of batch norm, and whole pairs
        (3, {"recipe__batchnorm__statistics": 32}, "over 3 ranks", "8160 or 8256"),
        (3, {"recipe__data__mixup": {"probability": 0.3}}, "over 3 ranks", "8190 or 8196"),
        # micro-batches of 120 and 132, as 123 and 126 contain no whole groups of 12
        (
            4,
            {"gradient_accumulation_steps": 2, "recipe__batchnorm__statistics": 12, "train_batch_size": 1001},
            "4 × 2 (ranks × accumulation steps)",
            "960 or 1056",
        ),
    ],
)
def test_batch_that_cannot_be_split_is_refused_with_the_nearest(
    world_size: int, changes: dict, product: str, nearest: str
) -> None:
    error = refusal(world_size, **changes)
    assert error.key == "train_batch_size"
    assert product in error.problem
    assert error.remedy.partition(";")[0] == f"the nearest that can: {nearest}"
    for batch in nearest.split(" or "):
        make_plan(config(**(changes | {"train_batch_size": int(batch)})), world_size)


def test_no_batch_is_suggested_that_the_images_are_too_few_for() -> None:
    few = {"train_batch_size": 8, "recipe__data__train_images": 15}
    assert refusal(16, **few).remedy == "the nearest that can: none of up to 15 images on 16 ranks"
    later = {"train_batch_size": 3, "recipe__schedule": {"epochs": 2, "batch_size": [[1, 4]]}}
    assert refusal(3, **later, recipe__data__train_images=5).remedy == "the nearest that can: 3"
    grouped = {"train_batch_size": 10, "recipe__data__train_images": 11, "recipe__batchnorm__statistics": 4}
    assert "train_batch_size that can: 8, with" in refusal(2, **grouped).remedy


def test_images_are_counted_before_a_batch_is_refused_only_if_the_file_leaves_their_number_open() -> None:
    def look(*_: object) -> Contents:
        looked.append(1)
        return Contents((("cat", 1),) * 1000, 8192, 50_000, {})

    for images, nearest, times in (("auto", "8190", 1), (1_281_167, "8190 or 8193", 0)):
        looked = list[int]()
        with pytest.raises(ConfigError, match=f"the nearest that can: {nearest}$"):
            make_plan(config(recipe__data__train_images=images), 3, look=look)
        assert len(looked) == times


def test_plan_of_the_papers_run() -> None:
    plan = make_plan(config(), 32)
    assert plan.timeline.phases[0].steps_per_epoch == 156  # ⌊1 281 167 / 8192⌋
    assert plan.left_over_images == 3215  # 1 281 167 − 156 · 8192
    assert plan.total_steps == 14_040
    assert plan.schedule.warmup_steps == 780
    assert plan.schedule.milestones == (4680, 9360, 12480)
    assert plan.schedule.start_rate == 0.1
    assert plan.schedule.peak_rate == pytest.approx(3.2, rel=1e-15)
    rates = {0: 0.1, 1: 0.1 + 3.1 / 780, 390: 1.65, 779: 0.1 + 3.1 * 779 / 780, 780: 3.2, 4679: 3.2, 4680: 0.32}
    rates |= {9359: 0.32, 9360: 0.032, 12479: 0.032, 12480: 0.0032, 14039: 0.0032}
    assert {step: plan.schedule.rate(step) for step in rates} == pytest.approx(rates, rel=1e-12)
    resolved = json.loads(plan_json(plan))
    assert resolved["scheduler"]["params"] == {
        "warmup_min_lr": 0.1,
        "warmup_max_lr": pytest.approx(3.2),
        "warmup_num_steps": 780,
        "warmup_type": "linear",
    }
    assert resolved["gradient_clipping"] == 0.0


@pytest.mark.parametrize("batch", [64, 256])
def test_no_warmup_at_or_below_the_reference_batch(batch: int) -> None:
    plan = make_plan(config(train_batch_size=batch), 1)
    assert plan.schedule.warmup == "none"
    assert plan.schedule.rate(0) == plan.schedule.peak_rate == pytest.approx(0.1 * batch / 256)
    assert json.loads(plan_json(plan))["scheduler"]["params"]["warmup_num_steps"] == 1
    assert fields_of(plan)["warmup"] == "none: only batches above 256 warm up"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"warmup": "none"}, ""),
        ({"warmup_epochs": 0}, ": warmup_epochs 0 is 0 steps"),
        ({"warmup_epochs": 0.003}, ": warmup_epochs 0.003 is 0 steps"),
        ({"scaling_rule": "none"}, ": the peak rate is not above the rate where warmup would start"),
    ],
)
def test_the_plan_says_why_there_is_no_warmup(changes: dict[str, Any], reason: str) -> None:
    plan = make_plan(config(**{f"recipe__schedule__{key}": value for key, value in changes.items()}), 1)
    assert fields_of(plan)["warmup"] == f"none{reason}"


def test_inverse_weight_decay_is_divided_by_kn_over_256() -> None:
    inverse = {"recipe__schedule__weight_decay_rule": "inverse"}
    assert make_plan(config(**inverse), 1).weight_decay == 1e-4 / 32
    assert make_plan(config(**inverse, recipe__schedule__reference_weight_decay=5e-4), 1).weight_decay == 5e-4 / 32
    assert make_plan(config(optimizer__params__weight_decay=5e-5), 1).weight_decay == 5e-5  # the rule "constant"
    error = refusal(**inverse, optimizer__params__weight_decay=1e-4)
    assert (error.key, error.value) == ("optimizer.params.weight_decay", 1e-4)
    assert "3.125e-06" in error.remedy


BATCH_AND_STATISTICS = {"recipe__schedule__batch_size": [[30, 10_000]], "recipe__batchnorm__statistics": 64}
BATCH_AND_MICRO_BATCH = {"recipe__schedule__batch_size": [[30, 10_000]], "train_micro_batch_size_per_gpu": 128}
BATCH_AND_NOISE_SCALE = {"recipe__schedule__batch_size": [[30, 64]], "recipe__noise_scale__enabled": True}
COSINE = {"recipe__schedule__decay": "cosine", "recipe__schedule__final_lr": 0.3}
PAIRS = {"recipe__data__mixup": {"probability": 0.3}, "recipe__data__cutmix": {"probability": 0.25, "alpha": 0.5}}


@pytest.mark.parametrize(
    ("world_size", "changes", "key", "words"),
    [
        # numbers that contradict their rule
        (1, {"optimizer__params__lr": 0.1}, "optimizer.params.lr", 'linear scaling); use "auto" or 3.2, or'),
        (1, {"scheduler__params__warmup_max_lr": 3.3}, "scheduler.params.warmup_max_lr", 'use "auto" or 3.2'),
        (1, {"scheduler__params__warmup_min_lr": 0.0}, "scheduler.params.warmup_min_lr", 'use "auto" or 0.1'),
        (1, {"scheduler__params__warmup_num_steps": 781}, "scheduler.params.warmup_num_steps", '"auto" or 780, or'),
        (1, {"optimizer__params__lr": 3, "recipe__schedule__scaling_rule": "sqrt"}, "optimizer.params.lr", "0.5656854"),
        (
            1,
            {"train_batch_size": 256, "scheduler__params__warmup_min_lr": 0.05},
            "scheduler.params.warmup_min_lr",
            'this run starts at 0.1, the peak rate, as it has no warmup; use "auto" or 0.1',
        ),
        # impossible runs
        (1, {"train_batch_size": 1_300_000}, "train_batch_size", "at most 1281167"),
        (1, {"train_batch_size": 10**9}, "train_batch_size", "at most 1281167"),  # fails fast despite trying divisors
        (1, {"recipe__schedule__epochs": 4}, "recipe.schedule.warmup_epochs", "at most 4"),
        (
            2,
            N32 | {"train_micro_batch_size_per_gpu": 8},
            "train_micro_batch_size_per_gpu",
            "micro-batches that do: 16, 32, 64, ",
        ),
        (2, {"recipe__ema__decay": 0.9, "recipe__batchnorm__statistics": "local"}, "recipe.ema.decay", "its own runn"),
        (
            1,
            {"optimizer": {"type": "LARS"}, "recipe__schedule__reference_weight_decay": 0},
            "optimizer.params.weight_decay",
            "no trust ratio",
        ),
        (2, PAIRS | {"train_batch_size": 246}, "recipe.data.mixup.probability", "123 images cannot be paired"),
        (
            2,
            PAIRS | {"train_batch_size": 246, "train_micro_batch_size_per_gpu": 41},
            "recipe.data.mixup.probability",
            "41 images cannot be paired",
        ),
        # impossible batch schedules
        (1, {"recipe__schedule__batch_size": [[4, 16384]]}, "recipe.schedule.batch_size", "the 5 epochs of warmup"),
        (1, {"recipe__schedule__batch_size": [[30, 1_300_000]]}, "recipe.schedule.batch_size", "at most 1281167"),
        (32, {"recipe__schedule__batch_size": [[30, 10_000]]}, "recipe.schedule.batch_size", "split over 32 ranks"),
        (32, BATCH_AND_STATISTICS, "recipe.schedule.batch_size", "9984 or 10048"),
        (4, BATCH_AND_MICRO_BATCH, "recipe.schedule.batch_size", "9728 or 10240"),
        (1, BATCH_AND_NOISE_SCALE, "recipe.noise_scale.enabled", "batch of 64 as one"),
        (1, COSINE | {"recipe__schedule__batch_size": [[30, 512]]}, "recipe.schedule.final_lr", "peak of 0.2"),
    ],
)
def test_impossible_plan_is_refused(world_size: int, changes: dict[str, Any], key: str, words: str) -> None:
    error = refusal(world_size, **changes)
    assert error.key == key
    assert words in str(error)


def test_scaling_rule_none_uses_the_written_rate() -> None:
    unscaled = {"recipe__schedule__scaling_rule": "none"}
    assert make_plan(config(**unscaled), 1).schedule.peak_rate == 0.1
    assert make_plan(config(**unscaled), 1).schedule.warmup_steps == 0
    written = make_plan(config(**unscaled, optimizer__params__lr=2.0), 1).schedule
    assert (written.start_rate, written.peak_rate, written.warmup_steps) == (0.1, 2.0, 780)
    error = refusal(**unscaled, optimizer__params__lr=2.0, scheduler__params__warmup_max_lr=1.0)
    assert error.key == "scheduler.params.warmup_max_lr"


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        # 312 steps per epoch; step 2,808 is half-way from 624 to 4,992 and has half of 1.7.
        ("resnet50_fast", {0: 0.10625, 624: 1.7, 2808: 0.85, 4992: 0}),
        # 39 steps per epoch; step 1,443 is half-way from 624 to 2,262 and has (1 / 2)² of 21.2 − 0.0001.
        ("resnet50_lars_b32k", {0: 0, 312: 10.6, 624: 21.2, 1443: 0.0001 + 21.1999 / 4, 2262: 0.0001}),
        # 19 steps per epoch; the last of the 1,121 from step 589 to 1,710 has (1 / 1,121)² of 24.699 − 0.0001.
        ("resnet50_b65536_accumulated", {0: 0, 589: 24.699, 589 + 1120: 0.0001 + 24.6989 / 1121**2, 1710: 0.0001}),
    ],
)
def test_rates_of_configs_from_the_literature(name: str, rates: dict[int, float]) -> None:
    plan = make_plan(read_config(ROOT / f"ds_configs/{name}.json"), 32)
    assert plan.total_steps == max(rates)
    assert {step: plan.schedule.rate(step) for step in rates} == pytest.approx(rates, rel=1e-12)


def test_progressive_resizing() -> None:
    """The largest size, with (192 / 224)² of the activations, decides the memory; validation has its own size."""
    sizes = {"recipe__data__image_size": [[0, 160], [30, 192], [90, 224]], "recipe__data__source": "pack"}
    for own, size in ((None, 192), (256, 256)):
        plan = make_plan(config(**sizes, recipe__data__validation_image_size=own), 32)
        assert (plan.image_sizes, plan.validation_image_size) == (((0, 160), (30, 192)), size)
        fields = fields_of(plan)
        assert fields["image size"] == f"160 px, 192 px from epoch 30 on; {size} px in validation"
        assert fields["images"].startswith("random resized crops of 160 to 192 px, half of them mirrored;")
        assert_repeatable(plan)
    facts, small = SHIPPED["resnet50", 1000], make_plan(config(), 32)
    images = 2 * 3 * 4  # two copies of 3 channels of 4 bytes
    saved = activation_bytes(small, facts) - images * 224**2
    assert activation_bytes(plan, facts) == pytest.approx(saved * (192 / 224) ** 2 + images * 192**2)
    assert cores_to_load(plan, 2500) is None  # measured only at 224 px
    assert "image size" not in fields_of(small)


@pytest.mark.parametrize(
    ("rules", "text", "half_way"),
    [
        # Step 7,410 is half-way from 780 to 14,040: a half of 3.2, and a quarter of 3.2 − 0.0004 above the end.
        ({"decay": "cosine"}, "cosine from 3.2 to 0 at the end of the run", "7,410: 1.6"),
        (
            {"decay": "polynomial", "final_lr": 0.0004},
            "polynomial of power 2 from 3.2 to 0.0004 at the end of the run",
            "7,410: 0.8003",
        ),
        ({"decay": "none"}, "none", "780: 3.2, 14,039: 3.2"),
    ],
)
def test_decay_curve(rules: dict, text: str, half_way: str) -> None:
    plan = make_plan(config(**{f"recipe__schedule__{key}": value for key, value in rules.items()}), 32)
    rows = fields_of(plan)
    assert rows["decay"] == text
    assert half_way in rows["rate at step"].replace("\N{NO-BREAK SPACE}", " ")
    assert_repeatable(plan)
    assert not {"decay_epochs", "decay_factor"} & json.loads(plan_json(plan))["recipe"]["schedule"].keys()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("hostfile", ["localhost", "one_node_8gpu", "four_nodes_8gpu", "paper_32_nodes_8gpu"])
def test_shipped_config_on_shipped_hostfile_is_repeated_by_plan_json(path: Path, hostfile: str) -> None:
    ranks = sum(read_hostfile(ROOT / "hostfiles" / hostfile).values())
    plan = make_plan(read_config(path), ranks, cores_per_rank=4)
    assert ranks * plan.accumulation * plan.micro_batch == plan.global_batch
    assert '"auto"' not in plan_json(plan)
    assert_repeatable(plan, cores_per_rank=64)


def test_plan_json_is_refused_on_another_number_of_ranks() -> None:
    resolved = json.loads(plan_json(make_plan(config(), 8)))
    with pytest.raises(ConfigError, match='use "auto" for train_micro_batch_size_per_gpu'):
        make_plan(parse_config(resolved, "plan.json"), 16)


@pytest.mark.parametrize(
    ("n", "world_size", "largest", "micro"),
    [
        (32, 1, 256, 256),  # eight groups in a micro-batch
        (32, 256, 256, 32),
        (32, 1024, 256, 8),  # a group over four ranks
        (48, 8, 256, None),  # of 1,024 images per rank no divisor is a multiple of 48, and 48 / 16 are 3 ranks
        (32, 1, 16, None),  # 16 images on one rank are less than a group
        (32, 2, 16, 16),
    ],
)
def test_micro_batch_fits_batch_norm_groups(n: int, world_size: int, largest: int, micro: int | None) -> None:
    changes = {"recipe__batchnorm__statistics": n, "recipe__max_micro_batch_size": largest}
    if micro is None:
        assert refusal(world_size, **changes).key == "recipe.batchnorm.statistics"
    else:
        assert make_plan(config(**changes), world_size).micro_batch == micro


def test_nearest_batches_that_fit_batch_norm_groups_are_named() -> None:
    """Groups of 48 and 64 ranks divide the multiples of lcm(48, 64) = 192: 42 × 192 = 8,064 and 43 × 192 = 8,256."""
    remedy = refusal(64, recipe__batchnorm__statistics=48).remedy
    assert remedy.startswith('the nearest train_batch_size that can: 8064 or 8256, with "auto"')
    for batch in (8064, 8256):
        make_plan(config(recipe__batchnorm__statistics=48, train_batch_size=batch), 64)
    assert not any(fitting_micro_batches(batch, 64, 48) for batch in range(8064 + 64, 8256, 64))


def test_zero_plan_allows_sgd_which_deepspeed_calls_untested() -> None:
    plan = make_plan(config(zero_optimization={"stage": 1}), 1)
    assert json.loads(plan_json(plan))["zero_allow_untested_optimizer"] is True


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
            "224 px, shifted by up to 28, half of them mirrored, all kept on the device; 3 loader processes per rank",
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
def test_text_describes_the_images(changes: dict[str, Any], text: str) -> None:
    plan = make_plan(config(**{f"recipe__data__{key}": value for key, value in changes.items()}), 32, 4)
    assert fields_of(plan)["images"] == text
    assert_repeatable(plan, 64)


@pytest.mark.parametrize(
    ("world_size", "statistics", "fits"),
    [(1, "global", True), (2, "global", False), (2, "local", True), (2, 32, True), (32, 256, True), (32, 512, False)],
)
def test_noise_scale_and_local_sgd_are_refused_if_batch_norm_spans_ranks(
    world_size: int, statistics: Any, fits: bool
) -> None:
    wanted: dict[str, Any]
    for wanted in {"recipe__noise_scale__enabled": True}, {"recipe__local_sgd__steps": 8}:
        changes = wanted | {"recipe__batchnorm__statistics": statistics}
        if fits:
            make_plan(config(**changes), world_size)
        else:
            error = refusal(world_size, **changes)
            assert error.key == next(iter(wanted)).replace("__", ".")
            assert error.problem.startswith("batch norm's statistics come from several ranks, so that ")
            assert error.remedy.endswith('"local" or a number of images up to the micro-batch, 256')


def test_note_on_too_few_measurements_of_the_noise_scale() -> None:
    local = N32 | {"recipe__noise_scale__enabled": True}
    text = plan_notes(32, **local, recipe__noise_scale__every_steps=1500)  # of 14,040
    assert "noise scale: 10 measurements instead of about 20: it may be far off; with" in text
    assert "every_steps = 738 there are enough" in text
    assert "may be far off" not in plan_notes(32, **local)


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
def test_plan_json_has_only_the_keys_of_its_optimizer(kind: str, params: dict, resolved: dict, text: str) -> None:
    plan = make_plan(config(optimizer={"type": kind, "params": params}), 32)
    written = json.loads(plan_json(plan))["optimizer"]
    assert written == {"type": kind, "params": {"lr": 3.2, "weight_decay": 1e-4} | resolved}
    assert fields_of(plan)["optimizer"] == text


def test_weight_average() -> None:
    """(1 − 2e-7)^8192 = e^−0.0016384, and ln 2 / 2e-7 = 3,465,736 images."""
    text = "decay 0.9999998 per image, 0.998363 per step of 8,192: a half-life of 3,465,736 images"
    assert fields_of(make_plan(config(recipe__ema__decay=1 - 2e-7), 32))["weight average"] == text


def test_mixup_and_cutmix() -> None:
    text = fields_of(make_plan(config(**PAIRS), 32))["images"]
    assert "mirrored, mixup in 30 % of steps (α = 0.2), CutMix in 25 % of steps (α = 0.5); " in text
    # 450 images are two micro-batches of 225, but three of 150.
    plan = make_plan(config(**PAIRS, train_batch_size=450), 1)
    assert plan.micro_batch == 150
    facts = SHIPPED["resnet50", 1000]
    room = memory(plan, facts).fixed + 230 * activation_bytes(plan, facts)
    assert largest_micro_batch(plan, facts, room) == 150


def test_lars_gets_no_notes_on_sgd() -> None:
    lars = N32 | {"optimizer": {"type": "LARS"}, "train_batch_size": 16384}
    rules = {"recipe__schedule__warmup": "none", "recipe__schedule__scaling_rule": "none"}
    assert "the scaling rules are for SGD, and LARS needs" in plan_notes(**lars)
    assert plan_notes(**lars, **rules, optimizer__params__lr=16) == ""


def test_local_sgd_that_never_begins_is_said() -> None:
    late = {"recipe__local_sgd": {"steps": 4, "after_epoch": 90}}
    assert fields_of(make_plan(config(**N32, **late), 2))["local SGD"] == (
        "no effect: it would start at epoch 90, and the run has 90"
    )


def test_weights_say_what_images_they_were_trained_with(tmp_path: Path) -> None:
    def images(described: str, **changes: Any) -> Plan:
        (tmp_path / "config.json").write_text(described)
        weights = {"recipe__model__weights": str(tmp_path), "recipe__data__image_size": "auto"}
        return make_plan(config(**weights | changes), 1)

    plan = images('{"pretrained_cfg": {"input_size": [3, 96, 96], "mean": [0.1, 0.2, 0.3], "std": null}}')
    assert (plan.image_sizes, plan.mean, plan.std) == (((0, 96),), (0.1, 0.2, 0.3), (0.229, 0.224, 0.225))
    for described in (
        "{}",
        "[]",
        '{"pretrained_cfg": null}',
        "[" * 100_000,
        '{"pretrained_cfg": {"input_size": null}}',
    ):
        assert images(described, recipe__data__image_size=64).mean == (0.485, 0.456, 0.406)
        with pytest.raises(
            ConfigError, match=r"image_size = \"auto\": no config.json next to recipe.model.weights gives"
        ):
            images(described)
    for described, message in (
        (
            '{"pretrained_cfg": {"input_size": [3, 32, 64]}}',
            "the weights were trained with images of 32 × 64 pixels; use",
        ),
        ('{"pretrained_cfg": {"input_size": []}}', r"pretrained_cfg\.input_size.* in .*config\.json cannot be read: "),
        ('{"pretrained_cfg": {"mean": 0.5}}', r"pretrained_cfg\.mean in .*config\.json cannot be read: .*; correct or"),
    ):
        with pytest.raises(ConfigError, match=message):
            images(described)


def test_notes() -> None:
    assert plan_notes(**N32) == ""
    for start in ({"recipe__model__name": "resnet50.a1_in1k"}, {"recipe__model__weights": "hf-hub:own/photos"}):
        (value,) = start.values()
        assert f"mean and std are the usual ones; if {value} was trained with others" in plan_notes(**N32, **start)
        assert plan_notes(**N32, **start, recipe__data__mean=[0.5] * 3) == ""
    assert plan_notes(**N32, recipe__model__weights="local-dir:photos") == ""
    assert plan_notes(train_batch_size=256, recipe__max_micro_batch_size=32) == ""
    assert "come from only 4 images" in plan_notes(train_batch_size=256, recipe__max_micro_batch_size=4)
    assert "come from 8,192 images; the paper used 32" in plan_notes(world_size=32)
    assert "24.79 % at 16k" in plan_notes(train_batch_size=16384)
    assert "the literature uses LARS, a polynomial decay and label smoothing" in plan_notes(train_batch_size=8193)
    assert '"auto" makes depend on the GPU' in plan_notes(recipe__max_micro_batch_size="auto")
    assert "depends on the micro-batch" not in plan_notes(recipe__max_micro_batch_size="auto", **N32)
    assert "bf16" in plan_notes(bf16={"enabled": True}, recipe__max_micro_batch_size=64)
    assert "activations take less memory" in plan_notes(recipe__model__gradient_checkpointing=True)


def test_model_without_batch_norm_gets_no_notes_on_it() -> None:
    vit = {"recipe__model__name": "vit_tiny_patch16_224"}
    n32 = {"recipe__batchnorm__statistics": 32, "train_micro_batch_size_per_gpu": 48, "train_batch_size": 6144}
    assert "neither contain whole groups of 32 samples" in str(refusal(8, **n32))
    assert make_plan(config(**n32, **vit), 8).accumulation == 16  # 8 ranks × 16 × 48 = 6,144
    for changes in ({}, n32, {"recipe__max_micro_batch_size": "auto"}, {"recipe__noise_scale__enabled": True}):
        plan = make_plan(config(**changes, **vit), 8)
        assert not [note for note in notes(plan) if "norm" in note or "statistics" in note]
        assert "fp32, no batch norm" in format_plan(plan)
        assert batchnorm_images(json.loads(plan_json(plan))) is None  # the same run on any number of ranks
    unknown = plan_notes(8, recipe__model__name="resnet34")
    assert "if the model has batch norm: batch norm's statistics come from 2,048 images" in unknown


@pytest.mark.parametrize(
    ("schedule", "note"),
    [
        ({"warmup": "none"}, "no warmup: in the paper, 24.84 % error at 8k instead of 23.74 % (Table 1)"),
        ({"warmup": "constant"}, "a constant warmup: in the paper, 25.88 % error"),
        ({"decay_epochs": [3, 60]}, "the rate decays at step 468, before warmup ends: it never peaks"),
        ({"warmup_epochs": 1}, "a warmup of 1 epoch is shorter than the paper's 5 (section 2.2)"),
        ({"scaling_rule": "sqrt"}, "the rate is scaled by the square root: in the paper, 26.22 % error"),
        ({"scaling_rule": "none"}, "the rate is not scaled: in the paper, 41.67 % error at 8k instead of 23.74 %"),
    ],
)
def test_notes_on_what_the_paper_found_worse(schedule: dict, note: str) -> None:
    rules = {f"recipe__schedule__{key}": value for key, value in schedule.items()}
    assert note in plan_notes(**N32, **rules)
    assert plan_notes(train_batch_size=256, **N32, **rules) == ""


def test_note_on_an_epoch_of_a_single_step() -> None:
    note = "an epoch is a single step; a smaller train_batch_size would give more updates"
    assert note in plan_notes(recipe__data__train_images=16_383)
    assert note not in plan_notes(recipe__data__train_images=16_384)


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        # 1,281,167 images are 78 steps of 16,384 per epoch; five epochs are 390.
        (
            {},
            "twice the batch: --set train_batch_size=16384 with another --output (peak rate 6.4, warmup of 390 steps)",
        ),
        (
            {"schedule__scaling_rule": "none"},
            "twice the batch: --set train_batch_size=16384 with another --output (peak rate 0.1, no warmup)",
        ),
        # A batch of 16,384 would leave one step per epoch; a batch of 4,096 leaves 4.
        (
            {"data__train_images": 20_000},
            "half the batch: --set train_batch_size=4096 with another --output (peak rate 1.6, warmup of 20",
        ),
        # With 32 images on 32 ranks, a batch of 64 is too large, and one of 16 cannot be split.
        ({"data__train_images": 32}, None),
    ],
)
def test_summary_suggests_the_next_batch_with_its_plan(tmp_path: Path, changes: dict, advice: str | None) -> None:
    batch = 8192 if advice else 32
    changes = {f"recipe__{key}": value for key, value in changes.items()}
    summary = read_summary(write_run(tmp_path, summary={}))
    assert summary is not None
    plan = make_plan(config(train_batch_size=batch, **changes), 32)
    text = format_summary(summary, tmp_path, plan, width=200)
    assert (f"  to try          {advice}" in text) if advice else "  to try" not in text


def run_command(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    options = {"stdout": subprocess.PIPE, "cwd": ROOT, "text": True, "check": False} | options
    return subprocess.run([sys.executable, "-m", "recipe", *arguments], stderr=subprocess.PIPE, **options)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "recipe: name a command; see the list above"),
        (("eval",), "recipe: there is no command 'eval'; did you mean evaluate?"),
        (("plan", "x.json", "--worldsize=8"), "unrecognized arguments: --worldsize=8; did you mean --world-size?"),
        (("plan", "ds_configs/digits_b512.json", "--world-size", "3"), "the nearest that can: 510 or 513"),
        (("plan", "ds_configs/digits_b512.json", "--hostfile", "hostfiles/none"), "hostfiles holds four_nodes_8gpu"),
    ],
)
def test_wrong_command_line_is_refused(words: tuple[str, ...], message: str) -> None:
    done = run_command(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(("command", "unbuffered"), [("plan", "1"), ("plan", ""), ("compare", "")])
def test_full_disk_behind_standard_output_is_an_error(tmp_path: Path, command: str, unbuffered: str) -> None:
    run = str(write_run(tmp_path / "run", [step(0, 2.0)]))
    words = ("plan", "ds_configs/digits_b512.json") if command == "plan" else ("compare", run, run)
    with Path("/dev/full").open("w") as full:
        done = run_command(*words, stdout=full, env=os.environ | {"PYTHONUNBUFFERED": unbuffered})
    assert done.returncode == 2
    assert done.stderr == (
        "recipe: standard output cannot be written: No space left on device; the answer is incomplete\n"
    )


def test_batch_schedule() -> None:
    """⌊1,281,167 / 16,384⌋ = 78 and ⌊… / 81,920⌋ = 15 steps per epoch: 30 · (156 + 78 + 15) = 7,470 steps."""
    plan = make_plan(config(recipe__schedule__batch_size=[[30, 16384], [60, 81920]], **N32), 32)
    assert (plan.micro_batch, plan.total_steps) == (256, 7470)
    assert [plan.accumulation_of(phase) for phase in plan.timeline.phases] == [1, 2, 10]
    assert plan.schedule.milestones == (4680, 7020, 7020 + 20 * 15)
    rates = {4679: 3.2, 4680: 0.64, 7019: 0.64, 7020: 0.32, 7320: 0.032}
    assert {step: plan.schedule.rate(step) for step in rates} == pytest.approx(rates, rel=1e-12)
    fields = fields_of(plan)
    assert fields["steps"].startswith(
        "156 steps per epoch × 30 epochs + 78 steps × 30 epochs + 15 steps × 30 epochs = 7,470; up to 52,367 images"
    )
    assert fields["batch schedule"] == (
        "16,384 from epoch 30 (step 4,680) on, in 2 accumulation steps: peak rate 6.4; "
        "81,920 from epoch 60 (step 7,020) on, in 10 accumulation steps: peak rate 32"
    )
    assert_repeatable(plan)
    short = {"epochs": 2, "warmup_epochs": 1, "batch_size": [[30, 10**8]]}
    plan = make_plan(config(**{f"recipe__schedule__{key}": value for key, value in short.items()}), 1)
    assert plan.total_steps == 312  # the run ends before the change, which is then not checked


def test_local_sgd() -> None:
    """156 steps per epoch: from epoch 30 on weights are averaged 8, 16, … 152 and 156 steps into each epoch."""
    local = N32 | {"recipe__local_sgd": {"steps": 8, "after_epoch": 30}}
    plan = make_plan(config(**local, recipe__checkpoint__every_steps=10), 32)
    assert [step for step in range(4670, 4710) if not plan.is_local(step)] == list(range(4670, 4680))
    assert [step for step in range(4676, 4705) if plan.equal_after(step)] == [*range(4676, 4681), 4688, 4696, 4704]
    assert [step for step in range(4820, 4850) if plan.equal_after(step)] == [4824, 4832, 4836, 4844]
    # Step 4,680 ends an epoch; checkpoints due after 4,690 and 4,700 are saved after 4,696 and 4,704.
    assert [step for step in range(4660, 4712) if plan.saves_after(step)] == [4660, 4670, 4696, 4704]
    assert [plan.saves_after(step, due=True) for step in (4681, 4688)] == [False, True]
    text = " ".join(format_plan(plan).split())
    assert "from epoch 30 (step 4,680) on, each rank steps alone; weights are averaged every 8 steps and at" in text
    facts = SHIPPED["resnet50", 1000]
    assert local_bytes(plan, facts) == 4 * facts.parameters / 8
    alone = make_plan(config(**local), 1)
    assert not any(map(alone.is_local, range(4670, 4700)))
    assert "no effect on a single rank" in format_plan(alone)
