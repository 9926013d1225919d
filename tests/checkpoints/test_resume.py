"""Which checkpoints a run may go on from; that it then gives the same training stands in test_kills.py."""

import json
from pathlib import Path
from typing import Any

import pytest

from recipe.checkpoints.manifest import Data
from recipe.checkpoints.resume import (
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


def leave_checkpoint(output: Path, step: int, of: Plan, data: Data | None = None) -> Path:
    """What is looked at of a checkpoint: its manifest and its plan."""
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


def differences(*overrides: str, world_size: int = 1) -> list[str]:
    before: dict[str, Any] = json.loads(plan_json(plan()))
    return differing_keys(before, json.loads(plan_json(plan(*overrides, world_size=world_size))))


def test_a_resumed_run_may_change_where_and_how_it_runs() -> None:
    assert differences(world_size=2) == []
    assert (
        differences(
            "recipe.max_micro_batch_size=64",
            "recipe.data.workers=2",
            'recipe.data.on_bad_image="skip"',
            "recipe.checkpoint.every_steps=3",
            "recipe.model.gradient_checkpointing=true",
            "recipe.noise_scale.enabled=true",
            "tensorboard.enabled=true",
            "steps_per_print=7",
            "wall_clock_breakdown=true",
        )
        == []
    )


def test_a_resumed_run_may_not_change_what_is_trained() -> None:
    assert differences("recipe.seed=1") == ["recipe.seed was 0, is 1"]
    assert differences("recipe.schedule.decay_epochs=[20, 30]") == [
        "recipe.schedule.decay_epochs was [20.0, 30.0, 36.0], is [20.0, 30.0]"
    ]
    # The rate follows the batch, and is named too.
    assert [text.split()[0] for text in differences("train_batch_size=1024")] == [
        "train_batch_size",
        "optimizer.params.lr",
        "scheduler.params.warmup_max_lr",
        "scheduler.params.warmup_num_steps",
    ]


def test_a_pack_is_the_same_training_as_the_folder_if_its_pixels_are(tmp_path: Path) -> None:
    def of(source: str, **data: object) -> Plan:
        photos = {"source": source, "path": f"/{source}", "image_size": 32, "train_images": 999}
        photos |= {"validation_images": 9} | data
        return plan(f"recipe.data={json.dumps(photos)}")

    folder, originals, smaller = of("imagefolder"), of("pack"), of("pack", pack_short_side=352)
    leave_checkpoint(tmp_path, 4, folder)
    for same in (folder, originals):
        start = choose_start(same, tmp_path, "auto", accept_changes=False)
        assert (steps(start), start.messages) == ([4], ())
    with pytest.raises(ValueError, match=r"another training: recipe.data.pack_short_side was 0, is 352; name"):
        choose_start(smaller, tmp_path, "auto", accept_changes=False)
    texts = [json.loads(plan_json(one)) for one in (folder, originals, smaller, of("pack", pack_short_side=320))]
    assert differing_keys(texts[1], texts[0]) == []
    assert differing_keys(texts[2], texts[3]) == ["recipe.data.pack_short_side was 352, is 320"]
    other_order = differing_keys(texts[0], json.loads(plan_json(of("huggingface"))))
    assert other_order == ['recipe.data.source was "imagefolder", is "huggingface"']
    assert 'recipe.data.source was "digits", is "pack"' in differing_keys(json.loads(plan_json(plan())), texts[1])


def test_the_digest_tells_trainings_apart_as_the_keys_do() -> None:
    def digest(*overrides: str, world_size: int = 1) -> str:
        return training_sha256(json.loads(plan_json(plan(*overrides, world_size=world_size))))

    assert digest("recipe.max_micro_batch_size=64", "recipe.data.workers=2", world_size=2) == digest()
    assert digest("fp16.enabled=false", "bf16.enabled=false") == digest()
    assert digest("bf16.enabled=true") != digest()
    assert differences("fp16.enabled=false") == []
    assert digest("recipe.seed=1") != digest()
    assert digest("recipe.schedule.decay_epochs=[20, 30]") != digest()


def test_a_run_goes_on_from_the_newest(tmp_path: Path) -> None:
    for step in (2, 6, 4):
        leave_checkpoint(tmp_path, step, plan())
    start = choose_start(plan(world_size=2), tmp_path, "auto", accept_changes=False)
    assert steps(start) == [6, 4, 2]
    assert start.messages == ()


def test_another_training_is_refused_with_its_keys_unless_it_is_accepted(tmp_path: Path) -> None:
    leave_checkpoint(tmp_path, 4, plan())
    other = plan("recipe.schedule.decay_epochs=[20, 30]")
    with pytest.raises(ValueError, match=r"decay_epochs was \[20.0, 30.0, 36.0\], .*insist with --accept-changes"):
        choose_start(other, tmp_path, "auto", accept_changes=False)
    start = choose_start(other, tmp_path, "auto", accept_changes=True)
    assert steps(start) == [4]
    assert "resumes with changes: recipe.schedule.decay_epochs" in start.messages[0]


@pytest.mark.parametrize("change", ["train_batch_size=256", "recipe.schedule.epochs=50"])
def test_what_steps_are_counted_in_never_changes(tmp_path: Path, change: str) -> None:
    leave_checkpoint(tmp_path, 4, plan())
    if change.startswith("train_batch_size"):
        with pytest.raises(ValueError, match="its steps are counted in it"):
            choose_start(plan(change), tmp_path, "auto", accept_changes=True)
    else:
        assert steps(choose_start(plan(change), tmp_path, "auto", accept_changes=True)) == [4]


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (Data(classes=["cat", "fox"], digest="x"), "class 1 was dog, is fox"),
        (
            Data(classes=["bee", "cat", "dog"], digest="x"),
            "class 0 was cat, is bee, class 1 was dog, is cat, class 2 was ",
        ),
        (Data(classes=["cat", "dog"], digest="y"), "their classes or names have changed"),
    ],
)
def test_other_images_than_a_run_was_trained_on_are_refused_unless_they_are_accepted(
    tmp_path: Path, now: Data, message: str
) -> None:
    before = Data(classes=["cat", "dog"], digest="x")
    leave_checkpoint(tmp_path, 4, plan(), before)
    start = choose_start(plan(), tmp_path, "auto", accept_changes=False)
    check_data(start, before, tmp_path, accept_changes=False)
    check_data(start, now, tmp_path, accept_changes=True)
    with pytest.raises(
        ValueError, match=f"^{tmp_path} was trained on other images: {message}.*; check recipe.data.path"
    ):
        check_data(start, now, tmp_path, accept_changes=False)


def test_an_older_checkpoint_of_another_config_does_not_stand_in(tmp_path: Path) -> None:
    leave_checkpoint(tmp_path, 4, plan())
    leave_checkpoint(tmp_path, 6, plan("recipe.seed=1"))
    start = choose_start(plan("recipe.seed=1"), tmp_path, "auto", accept_changes=False)
    assert steps(start) == [6]
    assert "step-00000004 is left aside: it is of another config" in start.messages[0]
    assert steps(choose_start(plan("recipe.seed=1"), tmp_path, "auto", accept_changes=True)) == [6, 4]


def test_a_checkpoint_whose_plan_is_torn_is_still_told_apart(tmp_path: Path) -> None:
    (leave_checkpoint(tmp_path, 4, plan()) / "plan.json").write_text("{")
    assert steps(choose_start(plan(), tmp_path, "auto", accept_changes=False)) == [4]
    with pytest.raises(ValueError, match=r"holds another training: what, \S+plan.json does not tell"):
        choose_start(plan("recipe.seed=1"), tmp_path, "auto", accept_changes=False)


def test_a_checkpoint_that_does_not_tell_what_it_is_of_lets_no_other_batch_in(tmp_path: Path) -> None:
    leave_checkpoint(tmp_path, 4, plan())
    (leave_checkpoint(tmp_path, 6, plan()) / "plan.json").unlink()
    with pytest.raises(ValueError, match=r"holds another training: what, \S+000006/plan.json does not tell"):
        choose_start(plan("train_batch_size=256"), tmp_path, "auto", accept_changes=True)
    start = choose_start(plan("recipe.seed=1"), tmp_path, "auto", accept_changes=True)
    assert steps(start) == [4]
    assert "step-00000006/plan.json does not tell what it is of (No such file" in start.messages[0]
    assert start.messages[1] == "resumes with changes: recipe.seed was 0, is 1"


def test_an_older_checkpoint_of_another_batch_does_not_stand_in(tmp_path: Path) -> None:
    leave_checkpoint(tmp_path, 4, plan("train_batch_size=256"))
    leave_checkpoint(tmp_path, 6, plan())
    start = choose_start(plan("recipe.seed=1"), tmp_path, "auto", accept_changes=True)
    assert steps(start) == [6]
    assert "step-00000004 is left aside: its steps are counted in another train_batch_size" in start.messages[0]


def test_a_run_that_is_longer_than_the_config_is_refused(tmp_path: Path) -> None:
    leave_checkpoint(tmp_path, 78, plan())
    shorter = ("recipe.schedule.epochs=38", "recipe.schedule.decay_epochs=[]")
    with pytest.raises(ValueError, match=r"000078 has 78 steps done, more than the 76 of this config; raise recipe\."):
        choose_start(plan(*shorter), tmp_path, "auto", accept_changes=True)


def test_zero_goes_on_with_as_many_ranks_only(tmp_path: Path) -> None:
    sharded = "zero_optimization.stage=1"
    leave_checkpoint(tmp_path, 4, plan(sharded, world_size=4))
    assert steps(choose_start(plan(sharded, world_size=4), tmp_path, "auto", accept_changes=False)) == [4]
    with pytest.raises(ValueError, match=r"written by 4 ranks, and ZeRO stage 1 .* start 4 ranks instead of 2"):
        choose_start(plan(sharded, world_size=2), tmp_path, "auto", accept_changes=True)


def test_must_and_never(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no checkpoint"):
        choose_start(plan(), tmp_path, "must", accept_changes=False)
    leave_checkpoint(tmp_path, 4, plan())
    assert choose_start(plan(), tmp_path, "must", accept_changes=False).must_resume
    with pytest.raises(ValueError, match="--resume never"):
        choose_start(plan(), tmp_path, "never", accept_changes=False)


@pytest.mark.parametrize(
    ("statistics", "micro_batch", "world_size", "message"),
    [
        ('"global"', 128, 1, ""),
        ('"global"', 64, 2, ""),  # 128 images all the same
        ('"global"', 128, 2, "now come from 256 images, before from 128"),
        ('"local"', 64, 2, "now come from 64 images, before from 128"),
        ("32", 64, 2, ""),
    ],
)
def test_it_is_said_when_other_ranks_change_the_statistics(
    tmp_path: Path, statistics: str, micro_batch: int, world_size: int, message: str
) -> None:
    kind = f"recipe.batchnorm.statistics={statistics}"
    leave_checkpoint(tmp_path, 4, plan(kind))
    now = plan(kind, f"recipe.max_micro_batch_size={micro_batch}", world_size=world_size)
    said = " ".join(statistics_change(now, choose_start(now, tmp_path, "auto", accept_changes=False)))
    assert (message in said) if message else said == ""


def test_results_without_checkpoints_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a complete run without its checkpoints"):
        choose_start(plan(), tmp_path, "auto", accept_changes=False, has_summary=True)
