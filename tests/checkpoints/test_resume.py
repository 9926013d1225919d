"""Which checkpoints a run may resume from. That it then trains the same is tested in test_kills.py."""

import json
from pathlib import Path
from typing import Any

import pytest

from recipe.checkpoints.manifest import Data
from recipe.checkpoints.resume import (
    Resume,
    Start,
    check_data,
    choose_start,
    differing_keys,
    statistics_change,
    training_sha256,
)
from recipe.config.schema import read_config
from recipe.plan.plan import Plan, make_plan
from recipe.plan.text import plan_json

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "ds_configs/digits_b512.json"


def plan(*overrides: str, world_size: int = 1) -> Plan:
    return make_plan(read_config(DIGITS, overrides), world_size)


def resolved(*overrides: str, world_size: int = 1) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(plan_json(plan(*overrides, world_size=world_size)))
    return found


def photos(source: str, **data: object) -> str:
    section = {"source": source, "path": f"/{source}", "image_size": 32, "train_images": 999, "validation_images": 9}
    return f"recipe.data={json.dumps(section | data)}"


def leave_checkpoint(output: Path, step: int, of: Plan, data: Data | None = None) -> Path:
    """Write the parts of a checkpoint that are compared: its manifest and its plan."""
    path = output / f"checkpoints/step-{step:08}"
    path.mkdir(parents=True)
    text = plan_json(of)
    (path / "plan.json").write_text(text)
    head = {"step": step, "top1": None, "training_sha256": training_sha256(json.loads(text))}
    head |= {"data": None if data is None else data.model_dump()}
    files = {"plan.json": {"bytes": len(text), "sha256": ""}}
    (path / "manifest.json").write_text(json.dumps(head | {"world_size": of.world_size, "files": files}))
    return path


def steps(start: Start) -> list[int]:
    return [checkpoint.step for checkpoint in start.checkpoints]


FREE = (
    "recipe.max_micro_batch_size=64",
    "recipe.data.workers=2",
    'recipe.data.on_bad_image="skip"',
    "recipe.checkpoint.every_steps=3",
    "recipe.model.gradient_checkpointing=true",
    "recipe.noise_scale.enabled=true",
    "tensorboard.enabled=true",
    "steps_per_print=7",
    "wall_clock_breakdown=true",
    "fp16.enabled=false",
)
DECAY = "recipe.schedule.decay_epochs"


@pytest.mark.parametrize(
    ("overrides", "world_size", "differences"),
    [
        ((), 2, []),
        (FREE, 1, []),
        (("zero_optimization.stage=0",), 1, []),
        (("recipe.seed=1",), 1, ["recipe.seed was 0, is 1"]),
        ((f"{DECAY}=[20, 30]",), 1, [f"{DECAY} was [20.0, 30.0, 36.0], is [20.0, 30.0]"]),
    ],
)
def test_keys_that_change_what_is_trained(overrides: tuple[str, ...], world_size: int, differences: list[str]) -> None:
    before, now = resolved(), resolved(*overrides, world_size=world_size)
    assert differing_keys(before, now) == differences
    assert (training_sha256(before) == training_sha256(now)) == (differences == [])


def test_changed_batch_is_named_with_the_keys_that_follow_it() -> None:
    assert [text.split()[0] for text in differing_keys(resolved(), resolved("train_batch_size=1024"))] == [
        "train_batch_size",
        "optimizer.params.lr",
        "scheduler.params.warmup_max_lr",
        "scheduler.params.warmup_num_steps",
    ]


def test_a_pack_of_the_original_images_trains_the_same_as_the_folder(tmp_path: Path) -> None:
    folder, pack, smaller = photos("imagefolder"), photos("pack"), photos("pack", pack_short_side=352)
    leave_checkpoint(tmp_path, 4, plan(folder))
    for same in (folder, pack):
        start = choose_start(plan(same), tmp_path, "auto", accept_changes=False)
        assert (steps(start), start.messages) == ([4], ())
    with pytest.raises(ValueError, match=r"different run: recipe.data.pack_short_side was 0, is 352; name"):
        choose_start(plan(smaller), tmp_path, "auto", accept_changes=False)
    assert differing_keys(resolved(pack), resolved(folder)) == []
    other_order = differing_keys(resolved(folder), resolved(photos("huggingface")))
    assert other_order == ['recipe.data.source was "imagefolder", is "huggingface"']
    assert 'recipe.data.source was "digits", is "pack"' in differing_keys(resolved(), resolved(pack))


@pytest.mark.parametrize(
    ("checkpoints", "now", "accept_changes", "usable", "messages"),
    [
        ({2: "recipe.seed=0", 6: "recipe.seed=0", 4: "recipe.seed=0"}, "recipe.seed=0", False, [6, 4, 2], []),
        ({4: "recipe.seed=0"}, "recipe.seed=1", True, [4], ["resumes with changes: recipe.seed was 0, is 1"]),
        ({4: "recipe.seed=0"}, "recipe.schedule.epochs=50", True, [4], ["resumes with changes: recipe.schedule.epo"]),
        # An older checkpoint of a different config, or of a different batch, is no substitute.
        ({4: "recipe.seed=0", 6: "recipe.seed=1"}, "recipe.seed=1", False, [6], ["4 is skipped: its config differs"]),
        ({4: "recipe.seed=0", 6: "recipe.seed=1"}, "recipe.seed=1", True, [6, 4], []),
        (
            {4: "train_batch_size=256", 6: "recipe.seed=0"},
            "recipe.seed=1",
            True,
            [6],
            [
                "4 is skipped: it has another train_batch_size",
                "resumes with changes: recipe.seed",
            ],
        ),
    ],
)
def test_checkpoints_to_resume_from(
    tmp_path: Path, checkpoints: dict[int, str], now: str, accept_changes: bool, usable: list[int], messages: list[str]
) -> None:
    for step, override in checkpoints.items():
        leave_checkpoint(tmp_path, step, plan(override))
    start = choose_start(plan(now, world_size=2), tmp_path, "auto", accept_changes)
    assert steps(start) == usable
    assert len(start.messages) == len(messages)
    for message, expected in zip(start.messages, messages, strict=True):
        assert expected in message


SHARDED = "zero_optimization.stage=1"
LARS = 'optimizer={"type": "LARS"}'


@pytest.mark.parametrize(
    ("before", "now", "resume", "accept_changes", "message"),
    [
        ("recipe.seed=0", f"{DECAY}=[20, 30]", "auto", False, r"decay_epochs was .*, or add --accept-changes$"),
        (
            "recipe.seed=0",
            "train_batch_size=256",
            "auto",
            True,
            r"a run cannot resume with another train_batch_size; name another --o",
        ),
        ("recipe.seed=0", LARS, "auto", True, r"with another optimizer\.type; name another --output$"),
        ("recipe.seed=0", "recipe.model.name=resnet18", "auto", True, r"another recipe\.model\.name; name another --o"),
        ("recipe.seed=0", SHARDED, "auto", False, r"another zero_optimization\.stage; name another --output$"),
        ("recipe.seed=0", "recipe.seed=0", "never", False, "--resume never: .* holds checkpoints"),
        (None, "recipe.seed=0", "must", False, "--resume must: .* holds no checkpoint"),
        ("recipe.seed=0", "recipe.schedule.epochs=37", "auto", True, "has 78 steps done, more than the 74 of this"),
        (SHARDED, SHARDED, "auto", True, "written by 1 ranks, and ZeRO stage 1 .* start 1 ranks instead of 2"),
    ],
)
def test_refusals(
    tmp_path: Path, before: str | None, now: str, resume: Resume, accept_changes: bool, message: str
) -> None:
    if before is not None:
        leave_checkpoint(tmp_path, 78, plan(before))
    with pytest.raises(ValueError, match=message):
        choose_start(plan(now, world_size=2), tmp_path, resume, accept_changes)


def test_results_without_checkpoints_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a complete run without its checkpoints"):
        choose_start(plan(), tmp_path, "auto", accept_changes=False, has_summary=True)


def test_checkpoint_with_an_unreadable_plan(tmp_path: Path) -> None:
    """Its digest still shows whether it belongs to the same run, but not what differs."""
    torn, seed = leave_checkpoint(tmp_path, 6, plan()) / "plan.json", plan("recipe.seed=1")
    torn.write_text("{")
    assert steps(choose_start(plan(), tmp_path, "auto", accept_changes=False)) == [6]
    unknown = rf"belongs to a different run: the differences are unknown, because {torn} cannot be read"
    with pytest.raises(ValueError, match=unknown):
        choose_start(seed, tmp_path, "auto", accept_changes=True)
    leave_checkpoint(tmp_path, 4, plan())
    with pytest.raises(ValueError, match=unknown):
        choose_start(plan("train_batch_size=256"), tmp_path, "auto", accept_changes=True)
    torn.unlink()
    start = choose_start(seed, tmp_path, "auto", accept_changes=True)
    assert steps(start) == [4]
    assert f"000006 is skipped: {torn} cannot be read (no such file or directory)" in start.messages[0]


@pytest.mark.parametrize(
    ("classes", "digest", "message"),
    [
        (["cat", "fox"], "x", "class 1 was dog, is fox"),
        (["bee", "cat", "dog"], "x", "class 0 was cat, is bee, class 1 was dog, is cat, class 2 was missing, is dog"),
        (["cat", "dog"], "y", "their classes or names have changed"),
    ],
)
def test_different_images_are_refused_unless_accepted(
    tmp_path: Path, classes: list[str], digest: str, message: str
) -> None:
    before, now = Data(classes=["cat", "dog"], digest="x"), Data(classes=classes, digest=digest)
    leave_checkpoint(tmp_path, 4, plan(), before)
    start = choose_start(plan(), tmp_path, "auto", accept_changes=False)
    check_data(start, before, tmp_path, accept_changes=False)
    check_data(start, now, tmp_path, accept_changes=True)
    with pytest.raises(ValueError, match=f"^{tmp_path} was trained on other images: {message}; check recipe.data.path"):
        check_data(start, now, tmp_path, accept_changes=False)


@pytest.mark.parametrize(
    ("statistics", "micro_batch", "world_size", "message"),
    [
        ('"global"', 64, 2, ""),  # still 128 images
        ('"global"', 128, 2, "now come from 256 images, before from 128"),
        ('"local"', 64, 2, "now come from 64 images, before from 128"),
        ("32", 64, 2, ""),
    ],
)
def test_warning_if_other_ranks_change_the_statistics(
    tmp_path: Path, statistics: str, micro_batch: int, world_size: int, message: str
) -> None:
    kind = f"recipe.batchnorm.statistics={statistics}"
    leave_checkpoint(tmp_path, 4, plan(kind))
    now = plan(kind, f"recipe.max_micro_batch_size={micro_batch}", world_size=world_size)
    said = " ".join(statistics_change(now, choose_start(now, tmp_path, "auto", accept_changes=False)))
    assert (message in said) if message else said == ""
