import copy
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from recipe.config import (
    ABSENT,
    Config,
    ConfigError,
    PassedOn,
    deepspeed_sections as sections,
    parse_config,
    read_config,
)

SMALL: dict[str, Any] = {
    "train_batch_size": 64,
    "recipe": {
        "model": {"name": "resnet18", "num_classes": 10},
        "data": {"source": "digits", "image_size": 8},
        "schedule": {"epochs": 3},
    },
}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return written(tmp_path, json.dumps(SMALL))


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "run.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """SMALL with other values under dotted keys."""
    raw = copy.deepcopy(SMALL)
    for key, value in changes.items():
        section = raw
        *path, last = key.split(".")
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    return raw


def refused(raw: dict[str, Any]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse_config(raw, "run.json")
    assert "\n" not in str(caught.value)
    return caught.value


def test_what_is_not_written_is_the_papers() -> None:
    config = parse_config(SMALL, "run.json")
    assert config.train_micro_batch_size_per_gpu == config.gradient_accumulation_steps == "auto"
    params = config.optimizer.params
    assert (params.lr, params.momentum, params.nesterov, params.weight_decay) == ("auto", 0.9, True, "auto")
    schedule = config.recipe.schedule
    assert (schedule.reference_lr, schedule.reference_batch_size, schedule.scaling_rule) == (0.1, 256, "linear")
    assert (schedule.warmup, schedule.warmup_epochs, config.scheduler.params.warmup_type) == ("gradual", 5, "linear")
    assert (schedule.decay_epochs, schedule.decay_factor, config.gradient_clipping) == ((30, 60, 80), 0.1, 0)
    assert (config.recipe.data.crop, config.recipe.data.flip, config.recipe.seed) == ("random_resized", True, 0)
    assert not config.timers.throughput.enabled


def test_a_view_is_frozen_and_hashable() -> None:
    config = parse_config(SMALL, "run.json")
    hash(config)
    with pytest.raises(ValidationError, match="frozen"):
        config.train_batch_size = 32
    with pytest.raises(ValidationError, match="frozen"):
        config.recipe.schedule.epochs = 4


def test_the_source_holds_what_was_written() -> None:
    raw = changed({"optimizer.params.lr": "auto"})
    config = parse_config(raw, "run.json")
    raw["train_batch_size"] = 1
    config.source.raw["train_batch_size"] = 2
    assert config.source.file == "run.json"
    assert config.source.raw == changed({"optimizer.params.lr": "auto"})
    assert config.model_fields_set == {"train_batch_size", "optimizer", "recipe"}
    assert config.optimizer.params.model_fields_set == {"lr"}


def test_the_source_refuses_for_others() -> None:
    source = parse_config(SMALL, "run.json").source
    assert str(source.refusal("recipe.schedule.epochs", "too few", "write 5")) == (
        "run.json: recipe.schedule.epochs = 3: too few; write 5"
    )
    assert source.refusal("fp16.enabled", "no", "yes").value is ABSENT
    assert source.refusal("train_batch_size.x", "no", "yes").value is ABSENT


def test_a_dump_is_a_config_with_nothing_of_deepspeeds_that_was_not_written() -> None:
    config = parse_config(changed({"zero_optimization.stage": 1}), "run.json")
    dump = config.model_dump(mode="json", exclude_none=True)
    assert dump["zero_optimization"] == {"stage": 1}
    assert not {"fp16", "bf16", "tensorboard", "wandb", "comms_logger", "flops_profiler"} & set(dump)
    assert dump["gradient_clipping"] == 0.0
    again = parse_config(dump, "plan.json")
    assert again.recipe == config.recipe
    assert again.model_dump(mode="json", exclude_none=True) == dump


def test_errors_survive_pickling() -> None:
    error = ConfigError("run.json", "recipe.seed", -1, "too small", "write 0")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "run.json: recipe.seed = -1: too small; write 0"


def test_nothing_from_outside_breaks_the_line() -> None:
    error = refused(changed({"recipe.a\nb": "\x1b[31m" + "x" * 500}))
    assert "recipe.a\\u000ab = " in str(error)
    assert str(error).isprintable()
    assert "x" * 100 not in str(error)


# --- the file


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("rum.json", ["rum.json: no such file or directory; did you mean", "run.json?", "other.json"]),
        ("zzz", ["zzz: no such file or directory;", " holds other.json, run.json"]),
        ("nowhere/run.json", ["nowhere/run.json: no such file or directory;", "nowhere is not a folder"]),
        ("run.json/x", ["run.json/x: not a directory;", "run.json is not a folder"]),
        ("empty", ["empty: is a directory;", "empty holds no *.json"]),
        (".", [": is a directory;", " holds other.json, run.json"]),
    ],
)
def test_refuses_a_file_that_is_not_there(small: Path, name: str, parts: list[str]) -> None:
    (small.parent / "other.json").touch()
    (small.parent / "empty").mkdir()
    with pytest.raises(ConfigError) as caught:
        read_config(small.parent / name)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file that root cannot read either")
def test_refuses_a_file_that_cannot_be_read() -> None:
    with pytest.raises(ConfigError, match="/proc/self/mem: input/output error; /proc/self holds"):
        read_config("/proc/self/mem")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (b"", ["run.json: empty; fill it"]),
        (b" \n", ["run.json: empty; fill it"]),
        (b'{"a": "\xff"}', ["run.json: not UTF-8 at byte 7; save it as UTF-8"]),
        (b"\xef\xbb\xbf{}", ["run.json: begins with a byte-order mark; save it as UTF-8 without one"]),
        ("[1]", ["run.json = [1]: not an object; write the keys and values between { and }"]),
        ('"auto"', ['run.json = "auto": not an object;']),
        ("[" * 100_000, ["run.json: Python cannot read it: maximum recursion", "; write plain JSON"]),
        ('{"a":' * 5000 + "1" + "}" * 5000, ["run.json: ", "; write plain JSON"]),
        ('{\n  "a": 1,\n}', ["run.json: line 3, column 1:", "remove the comma before it", "Hjson"]),
        ('{"a": [1, 2,]}', ["run.json: line 1, column 13:", "remove the comma before it"]),
        ('{\n  // why\n  "a": 1}', ["run.json: line 2, column 3:", "remove the comment", "Hjson"]),
        ('{"a": 1, # why\n "b": 2}', ["run.json: line 1, column 10:", "remove the comment"]),
        ("{a: 1}", ["run.json: line 1, column 2:", "write plain JSON"]),
        ('{"a": 1', ["run.json: line 1, column 8:", "write plain JSON"]),
        ('{"a": 1} {}', ["run.json: line 1, column 10: Extra data; write plain JSON"]),
        ('{"a": 1, "b": 2, "a": 3}', ["run.json: a = [1, 3]: this key occurs more than once; write it once"]),
        ('{"a": [{"b": {"c": 1, "c": 1}}]}', ["run.json: c = [1, 1]: this key occurs more than once"]),
        ('{"\\ud800": 1}', ["run.json: ", "write a DeepSpeed config"]),
    ],
)
def test_refuses_a_file_that_is_not_plain_json(tmp_path: Path, text: str | bytes, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(written(tmp_path, text))
    for part in parts:
        assert part in str(caught.value)


def test_refuses_a_number_with_more_digits_than_python_reads(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.json: Python cannot read it: .*4300 digits.*; write plain JSON$"):
        read_config(written(tmp_path, '{"train_batch_size": ' + "1" * 5000 + "}"))


# --- keys and values


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("train_btach_size", 'did you mean "train_batch_size"?'),
        ("optimizer.params.wieght_decay", 'did you mean "weight_decay"?'),
        ("zero_optimization.prefetch_bucket_size", 'did you mean "stage3_prefetch_bucket_size"?'),
        ("recipe.sede", 'did you mean "seed"?'),
        ("epochs", 'did you mean "recipe.schedule.epochs"?'),
        ("recipe.momentum", 'did you mean "optimizer.params.momentum"?'),
        ("recipe.model.zzz", "the keys here are name, num_classes, zero_init_last"),
    ],
)
def test_refuses_an_unknown_key(key: str, remedy: str) -> None:
    message = str(refused(changed({key: 7})))
    assert message.startswith(f"run.json: {key} = 7: unknown key; {remedy}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # DeepSpeed's keys that the recipe refuses
        ({"pipeline": {}}, "this recipe does not support this key of DeepSpeed's; remove it"),
        ({"data_types": {}}, "this recipe does not support this key of DeepSpeed's; remove it"),
        ({"amp": {}}, "this recipe does not support this key of DeepSpeed's; remove it"),
        ({"elasticity": {}}, "the plan keeps the global batch on any number of GPUs"),
        ({"torch_autocast": {}}, "loss scale"),
        ({"bfloat16": {}}, 'write "bf16"'),
        ({"optimizer.params.max_grad_norm": {}}, 'write "gradient_clipping" at the top level'),
        ({"optimizer.params.dampening": {}}, "without dampening; remove it"),
        ({"fp16.fp16_master_weights_and_grads": {}}, "master weights are fp32; remove it"),
        ({"zero_optimization.offload_optimizer": {}}, "its own CPU Adam and Lion, which this recipe does not have"),
        ({"zero_optimization.offload_param": {}}, "its own CPU Adam and Lion, which this recipe does not have"),
        ({"zero_optimization.zenflow": {}}, "its own CPU Adam and Lion, which this recipe does not have"),
        ({"zero_optimization.leaf_module": {}}, "this recipe does not support this key of DeepSpeed's; remove it"),
        (
            {"zero_optimization.stage3_gather_fp16_weights_on_model_save": {}},
            'write "stage3_gather_16bit_weights_on_model_save"',
        ),
        ({"comet.api_key": {}}, "a secret"),
        # missing keys
        ({"recipe": {}}, ".model: missing; expected an object with name, num_classes and zero_init_last"),
        ({"recipe.model": {}}, ".name: missing; expected timm's name of a model"),
        ({"recipe.data": {}}, '.source: missing; expected "digits"'),
        ({"recipe.schedule": {}}, ".epochs: missing; expected passes over the training images"),
        # values of another type, or beyond the bounds, in pydantic's words
        ({"train_batch_size": 8.0}, "= 8.0: not a valid integer; expected the global batch"),
        ({"train_batch_size": True}, "= true: not a valid integer; expected the global batch"),
        ({"train_batch_size": "auto"}, '= "auto": not a valid integer; expected the global batch'),
        ({"train_batch_size": 0}, "= 0: not greater than or equal to 1; expected the global batch"),
        ({"train_micro_batch_size_per_gpu": "x"}, '= "x": not a valid integer or "auto"; expected images per GPU'),
        ({"gradient_clipping": True}, "= true: not a valid number; expected the largest gradient norm, a number >= 0"),
        ({"gradient_clipping": float("nan")}, "= NaN: not a finite number;"),
        ({"gradient_allreduce_op": "sum"}, '= "sum": not "mean"; expected "mean": the rate rules'),
        ({"communication_data_type": "fp8"}, '= "fp8": not "fp32", "fp16" or "bf16"; expected "fp32", "fp16"'),
        ({"prescale_gradients": 1}, "= 1: not a valid boolean; expected true or false"),
        ({"wall_clock_breakdown": None}, "= null: not a valid boolean; expected a valid boolean"),
        ({"optimizer": "SGD"}, '= "SGD": not a valid object; expected an object with type and params'),
        ({"scheduler.params.warmup_type": "cosine"}, "DeepSpeed would only warn about any other, and take log"),
        ({"fp16.auto_cast": True}, "= true: not false; expected false: the loop hands images over"),
        ({"fp16.initial_scale_power": 128}, "= 128: not less than or equal to 127; expected the first dynamic loss"),
        ({"comms_logger.prof_ops": ["all_reduce", 1]}, "prof_ops[1] = 1: not a valid string; expected a valid string"),
        ({"recipe.model.name": ""}, '= "": string should have at least 1 character; expected timm\'s name of a model'),
        ({"recipe.batchnorm.statistics": 32.0}, '= 32.0: not "global" or "local" or a valid integer; expected what'),
        ({"recipe.data.image_size": [[0, 160], [5, 7]]}, "image_size[1][1] = 7: not greater than or equal to 8; expec"),
        ({"recipe.data.image_size": [[0, 160], [5]]}, "image_size[1][1]: missing; expected height and width"),
        ({"recipe.data.mean": [0.5, 0.5]}, "= [0.5, 0.5]: list should have at least 3 items"),
        ({"recipe.data.mean": [0, "x", 0]}, 'recipe.data.mean[1] = "x": not a valid number; expected the mean of red'),
        ({"recipe.data.mean": 0.5}, '= 0.5: not a valid list or "auto"; expected the mean of red, green and blue'),
        ({"recipe.schedule.reference_lr": 10**400}, ": not a valid number; expected the rate at the reference batch"),
        ({"recipe.ema.decay": 1}, "= 1: not less than 1; expected by what each image multiplies the moving average"),
        # DeepSpeed's own names of optimizers, one of which means its FusedLamb.
        ({"optimizer.type": "lamb"}, '= "lamb": not "SGD", "LARS" or "LAMB"; expected "SGD" (the paper\'s), "LARS" or'),
        # values that contradict each other: the first is refused
        (
            {"recipe.data.image_size": [[1, 160]]},
            "= [[1, 160]]: the epochs do not rise from 0; write each once, 0 first",
        ),
        ({"recipe.data.image_size": [[0, 8], [2, 9], [2, 8]]}, ": the epochs do not rise from 0; write each once"),
        (
            {"recipe.data.augment": "trivial", "recipe.data.augment_magnitude": 9},
            'recipe.data.augment_magnitude = 9: the augmentation "trivial" has none; remove it',
        ),
        (
            {"recipe.data.augment": "rand", "recipe.data.on_device": True},
            'recipe.data.augment = "rand": with on_device true no loader process sees the images; write "none", or',
        ),
        (
            {
                "recipe.data": {"source": "imagefolder", "path": "p", "image_size": 32, "decoder": "dali"},
                "recipe.data.augment": "rand",
            },
            'recipe.data.augment = "rand": no loader process sees what the decoder "dali" makes; write "none", or the',
        ),
        (
            {
                "recipe.data": {"source": "synthetic", "image_size": 32, "train_images": 512, "validation_images": 9},
                "recipe.data.random_erasing": 0.5,
            },
            "recipe.data.random_erasing = 0.5: synthetic data is random as it is; remove it",
        ),
        ({"optimizer.params.momentum": 0}, '= 0: Nesterov\'s needs some; write one > 0, or "nesterov": false'),
        ({"bf16.enabled": True, "fp16.enabled": True}, "= true: fp16 is enabled, too; enable one of the two"),
        (
            {"recipe.precision": "fp32", "fp16.enabled": True},
            '= "fp32": fp16 or bf16 is enabled, too; remove it, or them',
        ),
        (
            {"recipe.precision": "fp64", "zero_optimization.stage": 1},
            '= "fp64": a ZeRO stage is enabled, too; remove it, or that',
        ),
        (
            {"recipe.compile": True, "zero_optimization.stage": 3},
            "= true: ZeRO stage 3 gathers weights layer by layer, between kernels; write false",
        ),
        ({"zero_optimization.compute_grad_norm": False}, "= false: only ZeRO stages 1 and 2"),
        (
            {"recipe.data.source": "imagefolder"},
            "recipe.data.path: an imagefolder has no default; write the path of the folder",
        ),
        ({"recipe.data.source": "pack"}, "recipe.data.path: a pack has no default; write the path of the folder"),
        (
            {"recipe.data.train_images": "auto", "recipe.data.source": "synthetic"},
            '= "auto": "auto" is not for synthetic; write the number of images',
        ),
        (
            {"recipe.data.on_device": True, "recipe.data.source": "synthetic"},
            "= true: synthetic data is made there; remove it",
        ),
        ({"recipe.data.decoder": "dali"}, '= "dali": digits data holds no JPEGs; write "cpu"'),
        (
            {
                "recipe.data.decoder": "gpu",
                "recipe.data.source": "pack",
                "recipe.data.path": "pack",
                "recipe.data.on_device": True,
            },
            '= "gpu": with on_device true all is decoded once, by the CPU; write "cpu"',
        ),
        (
            {"recipe.data.source": "synthetic", "recipe.data.train_images": 8},
            'recipe.data.validation_images: "auto" is not for synthetic; write the number of images',
        ),
        ({"recipe.data.pack_short_side": 352}, '= 352: digits data is no pack; write 0, or "source": "pack"'),
        ({"recipe.data.pack_raw": True}, '= true: digits data is no pack; write false, or "source": "pack"'),
        (
            {
                "recipe.data.decoder": "gpu",
                "recipe.data.source": "pack",
                "recipe.data.path": "pack",
                "recipe.data.pack_raw": True,
            },
            '= "gpu": raw pixels need none; write "cpu"',
        ),
        ({"recipe.schedule.decay_epochs": [30, 30]}, "= [30, 30]: the numbers do not rise; write each once"),
        ({"recipe.schedule.decay_epochs": [60, 30]}, "= [60, 30]: the numbers do not rise;"),
        (
            {"recipe.local_sgd.steps": 8, "zero_optimization.stage": 1},
            "local_sgd.steps = 8: ZeRO stage 1 leaves no rank the whole weights; write null, or zero_optimization",
        ),
        ({"recipe.local_sgd.steps": 8, "fp16.enabled": True}, "= 8: each rank would come to a loss scale of its own; "),
        ({"recipe.local_sgd.steps": 8, "bf16.enabled": True}, "= 8: a rank would skip an update that overflows while"),
        ({"recipe.local_sgd.steps": 8, "recipe.ema.decay": 0.999}, "= 8: each rank would average its own weights; "),
        ({"recipe.local_sgd.steps": 8, "recipe.noise_scale.enabled": True}, "= 8: there is no mean gradient to take"),
        ({"recipe.schedule.batch_size": [[9, 512], [9, 1024]]}, "[[9, 512], [9, 1024]]: the epochs do not rise;"),
        (
            {"recipe.schedule.batch_size": [[9, 512]], "recipe.schedule.weight_decay_rule": "inverse"},
            'weight_decay_rule = "inverse": the weight decay would change with the batch within the run; write "const',
        ),
        (
            {"recipe.model.gradient_checkpointing": True, "recipe.compile": True},
            "= true: recipe.compile decides by itself what to compute again; write false for one of them",
        ),
        (
            {"recipe.ema.decay": 0.9999, "zero_optimization.stage": 1},
            "= 0.9999: ZeRO stage 1 leaves no rank the whole master weights to average; write null, or zero",
        ),
        (
            {"recipe.data.cutmix.probability": 0.6, "recipe.data.mixup.probability": 0.5},
            "= 0.6: with that of mixup it is more than 1, and a step has one of the two; lower one of the two",
        ),
        (
            {"optimizer.params.nesterov": True, "optimizer.type": "LARS"},
            "= true: LARS has none; remove it (--set",
        ),
        ({"optimizer.params.momentum": 0.9, "optimizer.type": "LAMB"}, "= 0.9: LAMB has none; remove it (--set"),
        ({"optimizer.params.eps": "auto"}, '= "auto": SGD has none; remove it'),
        ({"optimizer.params.weight_decay": 0, "optimizer.type": "LARS"}, "= 0: LARS has no trust ratio without it;"),
        (
            {"optimizer.type": "LARS", "zero_optimization.stage": 2},
            '= "LARS": ZeRO stage 2 cuts the weights into parts, which do not have the norms of whole layers; ',
        ),
        (
            {
                "recipe.schedule.decay_epochs": [30],
                "recipe.schedule.decay_factor": 0.1,
                "recipe.schedule.decay": "cosine",
                "recipe.schedule.epochs": 90,
            },
            '"step"; also recipe.schedule.decay_factor: the decay "cosine" has none; remove it (--set recipe.sch',
        ),
        (
            {"recipe.schedule.decay_power": 2, "recipe.schedule.decay": "linear"},
            '= 2: the decay "linear" has none; remove it (--set recipe.schedule.decay_power=null), or write the decay',
        ),
        (
            {"recipe.schedule.final_lr": 0},
            '= 0: the decay "step" has none; remove it (--set recipe.schedule.final_lr=null), or write',
        ),
        (
            {"recipe.noise_scale.enabled": True, "zero_optimization.stage": 1},
            "= true: ZeRO stage 1 leaves no rank the whole mean gradient to take its norm of; write false, or ",
        ),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    error = str(refused(changed(changes)))
    assert error.startswith("run.json: ")
    assert (message if message.startswith("recipe.") else next(iter(changes))) in error
    assert message in error


def test_refuses_a_missing_key_and_names_every_other_and_explains_it_by_a_typo() -> None:
    missing = refused({})
    assert str(missing).startswith(
        "run.json: train_batch_size: missing; expected the global batch: images per optimizer"
    )
    assert missing.remedy.endswith("; also recipe (missing)")
    assert str(refused({"train_batch_size": 8})) == (
        "run.json: recipe: missing; expected an object with model, data and schedule"
    )
    raw = copy.deepcopy(SMALL)
    raw["train_btach_size"] = raw.pop("train_batch_size")
    assert refused(raw).key == "train_btach_size"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("recipe.schedule.warmup_epochs", 2.5),
        ("recipe.schedule.warmup_epochs", 0),
        ("recipe.schedule.decay_epochs", []),
        ("recipe.schedule.decay_epochs", [0.5, 2]),
        ("recipe.batchnorm.statistics", 32),
        ("recipe.data.mean", [0, 0.5, 1]),
        ("recipe.data.workers", 0),
        ("recipe.seed", 2**63 - 1),
        ("optimizer.params", {"momentum": 0, "nesterov": False}),
        ("scheduler.params.warmup_type", "log"),
        ("communication_data_type", None),
        ("comms_logger", {"enabled": True, "prof_ops": ["all_reduce"]}),
        ("zero_optimization", {"stage": 2, "stage3_max_live_parameters": 0, "overlap_comm": None}),
    ],
)
def test_takes_what_is_right(key: str, value: Any) -> None:
    parse_config(changed({key: value}), "run.json")


# --- --set


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train_batch_size=32", "train_batch_size", 32),
        ("recipe.schedule.epochs=2", "recipe.schedule.epochs", 2),
        ("recipe.model.name=resnet50", "recipe.model.name", "resnet50"),
        ('recipe.model.name="resnet50"', "recipe.model.name", "resnet50"),
        ("recipe.model.name=a=b", "recipe.model.name", "a=b"),
        ("recipe.schedule.decay_epochs=[1, 2]", "recipe.schedule.decay_epochs", (1, 2)),
        ("recipe.schedule.reference_weight_decay=null", "recipe.schedule.reference_weight_decay", None),
        ("bf16.enabled=true", "bf16.enabled", True),
        ("scheduler.params.warmup_num_steps=auto", "scheduler.params.warmup_num_steps", "auto"),
    ],
)
def test_an_override_sets_one_value(small: Path, override: str, key: str, value: Any) -> None:
    found: Any = read_config(small, [override])
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


def test_overrides_apply_in_order_and_are_part_of_what_was_written(small: Path) -> None:
    config = read_config(small, ["recipe.seed=1", "recipe.seed=2", 'fp16={"enabled": true}', "fp16.hysteresis=3"])
    assert config.recipe.seed == 2
    assert config.source.raw["fp16"] == {"enabled": True, "hysteresis": 3}
    assert config.source.raw["recipe"]["seed"] == 2
    assert "--set recipe.seed=1" in config.source.file
    assert read_config(small).recipe.seed == 0


def test_null_stands_for_the_default(tmp_path: Path) -> None:
    path = written(
        tmp_path, json.dumps(changed({"recipe.schedule.decay_epochs": [1], "optimizer.params.momentum": 0.8}))
    )
    others = read_config(path, ["recipe.schedule.decay=none", "recipe.schedule.decay_epochs=null"])
    assert others.recipe.schedule.decay == "none"
    assert read_config(path, ["optimizer.params.momentum=null"]).optimizer.params.momentum == 0.9


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("recipe.seed", ": --set recipe.seed is not KEY=VALUE; write it as in --set recipe.schedule.epochs=2"),
        ("=2", ": --set =2 is not KEY=VALUE;"),
        ("", ": --set  is not KEY=VALUE;"),
        ("recipe..seed=2", ": --set recipe..seed=2 is not KEY=VALUE;"),
        ("recipe.schedule.epochs.x=2", ": recipe.schedule.epochs = 3: not an object, so it has no x; set the"),
        ("train_batch_size.a.b=2", ": train_batch_size = 64: not an object, so it has no a.b;"),
        ("recipe.schedule.epoch=2", ': recipe.schedule.epoch = 2: unknown key; did you mean "epochs"?'),
        ("recpie.seed=2", ': recpie = {"seed": 2}: unknown key; did you mean "recipe"?'),
        ("recipe.seed=two", ': recipe.seed = "two": not a valid integer;'),
        ("recipe.seed=", ': recipe.seed = "": not a valid integer;'),
        ("recipe.seed=NaN", ": recipe.seed = NaN: not a "),
        ('recipe.model={"name": "a", "name": "b"}', ': name = ["a", "b"]: this key occurs more than'),
        ("recipe.seed=" + "1" * 5000, ': recipe.seed = "1111'),
    ],
)
def test_refuses_an_override(small: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(small, [override])
    assert str(caught.value).startswith(f"{small} (with --set {override}){message}")


# --- the mirror


def test_every_field_of_ours_says_what_belongs_there() -> None:
    passed_on = {PassedOn, sections.DeepSpeedConfig, sections.ThroughputTimer}
    for section in set(sections.Section.__subclasses__()) - passed_on:
        for name, field in section.model_fields.items():
            assert field.description, (section, name)


def deepspeeds_sections() -> list[tuple[type[sections.Section], dict[str, Any]]]:
    """Our mirror of each section, and DeepSpeed's own keys with their defaults."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.profiling import constants
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    models: list[tuple[type[sections.Section], type[BaseModel]]] = [
        (sections.ZeroOptimization, DeepSpeedZeroConfig),
        (sections.Fp16, DeepSpeedFP16Config),
        (sections.Bf16, DeepSpeedBF16Config),
        (sections.TensorBoard, TensorBoardConfig),
        (sections.Wandb, WandbConfig),
        (sections.CsvMonitor, CSVConfig),
        (sections.Comet, CometConfig),
        (sections.CommsLogger, CommsLoggerConfig),
    ]
    flops = {
        value: getattr(constants, f"{name}_DEFAULT")
        for name, value in vars(constants).items()
        if hasattr(constants, f"{name}_DEFAULT")
    }
    return [
        (sections.FlopsProfiler, flops),
        *(
            (mirror, {field.alias or name: field.default for name, field in model.model_fields.items()})
            for mirror, model in models
        ),
    ]


def test_the_sections_are_deepspeeds() -> None:
    for mirror, theirs in deepspeeds_sections():
        assert set(theirs) - set(mirror.unsupported) == set(mirror.model_fields), mirror
        for name, field in mirror.model_fields.items():
            if field.default is not None:  # None: DeepSpeed's, whatever it is
                default = list(field.default) if isinstance(field.default, tuple) else field.default
                assert default == theirs[name], (mirror, name)
            elif theirs[name] is not None:
                mirror.model_validate({name: theirs[name]})


class Recording(dict[str, Any]):
    """A config that notes which keys are asked for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __copy__(self) -> "Recording":
        return self

    def keys(self) -> Any:
        return self


def test_the_top_level_is_deepspeeds() -> None:
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, DeepSpeedConfig

    recording = Recording(train_batch_size=4, steps_per_print=10)
    theirs = DeepSpeedConfig(recording)
    assert recording.asked <= set(Config.model_fields) | set(Config.unsupported)
    assert set(sections.DeepSpeedConfig.model_fields) <= recording.asked
    assert set(_REMOVED_TOP_LEVEL_CONFIG_KEYS) <= set(Config.unsupported)
    ours = parse_config(SMALL, "run.json")
    # What is not here has its own reason to differ: the batch, the sections, and where the docstring says so.
    for name in (
        *("communication_data_type", "disable_allgather", "dump_state", "gradient_allreduce_op"),
        *("gradient_predivide_factor", "memory_breakdown", "prescale_gradients", "wall_clock_breakdown"),
        *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
