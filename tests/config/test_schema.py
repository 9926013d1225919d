"""Strict reading of configs: what is accepted, what is refused and how, and the mirror of DeepSpeed's keys."""

import copy
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from recipe.commands.study.file import StudyFile
from recipe.config import Config, ConfigError, PassedOn, deepspeed_sections as sections, parse_config, read_config

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
        section[last] = copy.deepcopy(value)
    return raw


def refused(raw: dict[str, Any]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse_config(raw, "run.json")
    assert "\n" not in str(caught.value)
    return caught.value


def test_config_is_frozen_and_keeps_the_json_as_written() -> None:
    raw = changed({"optimizer.params.lr": "auto"})
    config = parse_config(raw, "run.json")
    with pytest.raises(ValidationError, match="frozen"):
        config.recipe.schedule.epochs = 4
    raw["train_batch_size"] = 1
    config.source.raw["train_batch_size"] = 2
    assert config.source.file == "run.json"
    assert config.source.raw == changed({"optimizer.params.lr": "auto"})
    assert config.optimizer.params.model_fields_set == {"lr"}


def test_dump_is_a_config_without_deepspeeds_defaults() -> None:
    config = parse_config(changed({"zero_optimization.stage": 1}), "run.json")
    dump = config.model_dump(mode="json", exclude_none=True)
    assert dump["zero_optimization"] == {"stage": 1}
    assert not {"fp16", "bf16", "tensorboard", "wandb", "comms_logger", "flops_profiler"} & set(dump)
    assert dump["gradient_clipping"] == 0.0
    again = parse_config(dump, "plan.json")
    assert again.recipe == config.recipe
    assert again.model_dump(mode="json", exclude_none=True) == dump


def test_error_is_one_short_printable_line() -> None:
    error = refused(changed({"recipe.a\nb": "\x1b[31m" + "x" * 500}))
    assert "recipe.a\\u000ab = " in str(error)
    assert str(error).isprintable()
    assert "x" * 100 not in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


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
def test_missing_file_is_refused(small: Path, name: str, parts: list[str]) -> None:
    (small.parent / "other.json").touch()
    (small.parent / "empty").mkdir()
    with pytest.raises(ConfigError) as caught:
        read_config(small.parent / name)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (b" \n", ["run.json: empty; fill it"]),
        (b'{"a": "\xff"}', ["run.json: not UTF-8 at byte 7; save it as UTF-8"]),
        (b"\xef\xbb\xbf{}", ["run.json: begins with a byte-order mark; save it as UTF-8 without one"]),
        ("[1]", ["run.json = [1]: not an object; write keys and values between { and }"]),
        ('{\n  "a": 1,\n}', ["run.json: line 3, column 1:", "remove the comma before it", "Hjson"]),
        ('{\n  // why\n  "a": 1}', ["run.json: line 2, column 3:", "remove the comment", "Hjson"]),
        ('{"a": 1, # why\n "b": 2}', ["run.json: line 1, column 10:", "remove the comment"]),
        ("{a: 1}", ["run.json: line 1, column 2:", "write plain JSON"]),
        ('{"a": 1} {}', ["run.json: line 1, column 10: Extra data; write plain JSON"]),
        ('{"a": 1, "b": 2, "a": 3}', ["run.json: a = [1, 3]: this key occurs more than once; write it once"]),
        ('{"a": [{"b": {"c": 1, "c": 1}}]}', ["run.json: c = [1, 1]: this key occurs more than once"]),
        ('{"\\ud800": 1}', ["run.json: ", "write a DeepSpeed config"]),
        (
            '{"cases": [], "seeds": [1]}',
            ["run.json: this is a study, not a config; run it with python -m"],
        ),
    ],
)
def test_file_that_is_not_plain_json_is_refused(tmp_path: Path, text: str | bytes, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(written(tmp_path, text))
    for part in parts:
        assert part in str(caught.value)


# --- keys and values


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("train_btach_size", 'did you mean "train_batch_size"?'),
        ("optimizer.params.wieght_decay", 'did you mean "weight_decay"?'),
        ("zero_optimization.prefetch_bucket_size", 'did you mean "stage3_prefetch_bucket_size"?'),
        ("epochs", 'did you mean "recipe.schedule.epochs"?'),
        ("recipe.momentum", 'did you mean "optimizer.params.momentum"?'),
        ("recipe.model.zzz", "the keys here are name, num_classes, zero_init_last"),
    ],
)
def test_unknown_key_is_refused(key: str, remedy: str) -> None:
    message = str(refused(changed({key: 7})))
    assert message.startswith(f"run.json: {key} = 7: unknown key; {remedy}")


FOLDER = {"recipe.data": {"source": "pack", "path": "p", "image_size": 32}}
SYNTHETIC = {"recipe.data": {"source": "synthetic", "image_size": 32, "train_images": 512, "validation_images": 9}}
LOCAL = {"recipe.local_sgd.steps": 8}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # keys of DeepSpeed that the recipe refuses
        ({"amp": {}}, "this recipe does not support this DeepSpeed key; remove it"),
        ({"elasticity": {}}, "the plan already keeps the global batch on any number of GPUs"),
        ({"torch_autocast": {}}, "loss scale"),
        ({"bfloat16": {}}, 'use "bf16"'),
        ({"optimizer.params.max_grad_norm": {}}, 'use "gradient_clipping" at the top level'),
        ({"fp16.fp16_master_weights_and_grads": {}}, "master weights are fp32; remove it"),
        ({"zero_optimization.offload_optimizer": {}}, "its own CPU Adam or Lion, which this recipe does not support"),
        ({"comet.api_key": {}}, "a secret"),
        # missing keys
        ({"recipe.model": {}}, ".name: missing; expected the name of a timm model"),
        ({"recipe.data": {}}, '.source: missing; expected "digits"'),
        # values of another type, or out of bounds, in pydantic's words
        ({"train_batch_size": 8.0}, "= 8.0: not a valid integer; expected the global batch"),
        ({"train_batch_size": True}, "= true: not a valid integer; expected the global batch"),
        ({"train_batch_size": 0}, "= 0: not greater than or equal to 1; expected the global batch"),
        ({"train_micro_batch_size_per_gpu": "x"}, '= "x": not a valid integer or "auto"; expected images per GPU'),
        ({"gradient_clipping": float("nan")}, "= NaN: not a finite number; expected the maximum gradient norm"),
        ({"gradient_allreduce_op": "sum"}, '= "sum": not "mean"; expected "mean": the scaling rules'),
        ({"communication_data_type": "fp8"}, '= "fp8": not "fp32", "fp16" or "bf16"; expected the precision in'),
        ({"wall_clock_breakdown": None}, "= null: not a valid boolean; expected a valid boolean"),
        ({"optimizer": "SGD"}, '= "SGD": not a valid object; expected an object with type, params'),
        ({"recipe.data": 1}, "= 1: not a valid object; expected an object with source, image_size, optional keys"),
        ({"scheduler.params.warmup_type": "cosine"}, "DeepSpeed would only warn about any other value and use log"),
        ({"fp16.auto_cast": True}, "= true: not false; expected false: the training loop casts images"),
        ({"comms_logger.prof_ops": ["all_reduce", 1]}, "prof_ops[1] = 1: not a valid string; expected a valid string"),
        ({"recipe.model.name": ""}, '= "": string should have at least 1 character; expected the name of a timm'),
        ({"recipe.batchnorm.statistics": 32.0}, '= 32.0: not "global" or "local" or a valid integer; expected the'),
        ({"recipe.data.image_size": [[0, 160], [5, 7]]}, "image_size[1][1] = 7: not greater than or equal to 8; expec"),
        ({"recipe.data.image_size": [[0, 160], [5]]}, "image_size[1][1]: missing; expected height and width"),
        ({"recipe.data.mean": [0.5, 0.5]}, "= [0.5, 0.5]: list should have at least 3 items"),
        ({"recipe.data.mean": 0.5}, '= 0.5: not a valid list or "auto"; expected the mean of red, green and blue'),
        ({"recipe.schedule.reference_lr": 10**400}, ": not a valid number; expected the learning rate at the ref"),
        # DeepSpeed's own spelling, which means its FusedLamb
        ({"optimizer.type": "lamb"}, '= "lamb": not "SGD", "LARS" or "LAMB"; expected "SGD" (the paper\'s), "LARS" or'),
        # keys that contradict each other
        ({"recipe.data.image_size": [[1, 160]]}, "the epochs do not rise from 0; list each once, 0 first"),
        ({"recipe.data.image_size": [[0, 8], [2, 9], [2, 8]]}, ": the epochs do not rise from 0; list each once"),
        (
            {"recipe.data.augment_magnitude": 9, "recipe.data.augment": "trivial"},
            '= 9: the augmentation "trivial" does not use it; remove it (--set recipe.data.augment_magnitude=null), or',
        ),
        (
            {"recipe.data.augment": "rand", "recipe.data.on_device": True},
            '= "rand": with on_device true, no loader process sees the images; use "none", or on_device false',
        ),
        (
            FOLDER | {"recipe.data.decoder": "dali", "recipe.data.augment": "rand"},
            'recipe.data.augment = "rand": no loader process sees the images that the decoder "dali" decodes; ',
        ),
        (SYNTHETIC | {"recipe.data.random_erasing": 0.5}, "recipe.data.random_erasing = 0.5: synthetic data is al"),
        ({"optimizer.params.momentum": 0}, '= 0: Nesterov momentum cannot be 0; use a number > 0, or "nest'),
        ({"bf16.enabled": True, "fp16.enabled": True}, "= true: fp16 is also enabled; enable only one of them"),
        ({"recipe.precision": "fp32", "fp16.enabled": True}, '= "fp32": fp16 or bf16 is also enabled; remove one'),
        ({"recipe.precision": "fp64", "zero_optimization.stage": 1}, '= "fp64": a ZeRO stage is also enabled; remove'),
        ({"recipe.compile": True, "zero_optimization.stage": 3}, "ZeRO stage 3 gathers weights layer by layer, betw"),
        ({"zero_optimization.compute_grad_norm": False}, "= false: only ZeRO stages 1 and 2"),
        (
            {"recipe.data.source": "pack"},
            "recipe.data.path: a pack has no default path; set it to the path of the folder",
        ),
        ({"recipe.data.path": "p"}, '= "p": digits data has no folder; remove it, or use "source": "imagefolder"'),
        (SYNTHETIC | {"recipe.data.train_images": "auto"}, 'recipe.data.train_images = "auto": synthetic data has no '),
        (SYNTHETIC | {"recipe.data.on_device": True}, "recipe.data.on_device = true: synthetic data is generated the"),
        ({"recipe.data.validation_share": 0.1}, "= 0.1: digits data has its own validation images; remove it"),
        ({"recipe.data.decoder": "dali"}, '= "dali": digits data contains no JPEGs; use "cpu"'),
        (
            FOLDER | {"recipe.data.decoder": "gpu", "recipe.data.on_device": True},
            'recipe.data.decoder = "gpu": with on_device true, the CPU decodes all images once; use "cpu"',
        ),
        (
            FOLDER | {"recipe.data.decoder": "gpu", "recipe.data.pack_raw": True},
            'recipe.data.decoder = "gpu": raw pixels need no decoder; use "cpu"',
        ),
        ({"recipe.data.pack_short_side": 352}, '= 352: digits data is not a pack; remove it, or use "source": "p'),
        ({"recipe.data.pack_raw": True}, '= true: digits data is not a pack; remove it, or use "source": "pack"'),
        ({"recipe.schedule.decay_epochs": [30, 30]}, "= [30, 30]: the numbers do not rise; list each once"),
        ({"recipe.schedule.decay_epochs": [60, 30]}, "= [60, 30]: the numbers do not rise;"),
        (LOCAL | {"zero_optimization.stage": 1}, "= 8: ZeRO stage 1 leaves no rank with the whole weights; "),
        (LOCAL | {"fp16.enabled": True}, "= 8: each rank would arrive at its own loss scale; "),
        (LOCAL | {"bf16.enabled": True}, "= 8: a rank would skip a step that overflows while the others continue; "),
        (LOCAL | {"recipe.ema.decay": 0.999}, "= 8: each rank would average its own weights; "),
        (LOCAL | {"recipe.noise_scale.enabled": True}, "= 8: there is no mean gradient to take"),
        ({"recipe.schedule.batch_size": [[9, 512], [9, 1024]]}, "[[9, 512], [9, 1024]]: the epochs do not rise;"),
        (
            {"recipe.schedule.weight_decay_rule": "inverse", "recipe.schedule.batch_size": [[9, 512]]},
            '= "inverse": the weight decay would change with the batch during the run; use "constant", or',
        ),
        (
            {"recipe.model.gradient_checkpointing": True, "recipe.compile": True},
            "= true: recipe.compile decides itself what to recompute; use false for one of them",
        ),
        (
            {"recipe.ema.decay": 0.9999, "zero_optimization.stage": 1},
            "= 0.9999: ZeRO stage 1 leaves no rank with the whole master weights to average; use null, or zero",
        ),
        (
            {"recipe.data.cutmix.probability": 0.6, "recipe.data.mixup.probability": 0.5},
            "= 0.6: together with mixup's it exceeds 1, and a step uses at most one of the two; lower one of them",
        ),
        (
            {"optimizer.params.nesterov": True, "optimizer.type": "LARS"},
            '= true: the optimizer "LARS" does not use it; remove it (--set optimizer.params.nesterov=null), or choose',
        ),
        ({"optimizer.params.eps": "auto"}, 'the optimizer "SGD" does not use it; remove it (--set optimizer.params'),
        ({"optimizer.params.weight_decay": 0, "optimizer.type": "LARS"}, "= 0: LARS has no trust ratio without it;"),
        (
            {"optimizer.type": "LARS", "zero_optimization.stage": 2},
            '= "LARS": ZeRO stage 2 splits weights into parts, which do not have the norms of whole layers; ',
        ),
        (
            {
                "recipe.schedule.decay_epochs": [30],
                "recipe.schedule.decay_factor": 0.1,
                "recipe.schedule.decay": "cosine",
            },
            'the decay "step"; also recipe.schedule.decay_factor: the decay "cosine" does not use it; remove it',
        ),
        ({"recipe.schedule.final_lr": 0}, 'or choose the decay "cosine" or "polynomial" or "linear"'),
        (
            {"recipe.noise_scale.enabled": True, "zero_optimization.stage": 1},
            "= true: ZeRO stage 1 leaves no rank with the whole mean gradient to take the norm of; use false, or ",
        ),
        (
            {"recipe.model.weights": "w.pth", "recipe.model.name": "resnet50.a1_in1k"},
            '= "w.pth": resnet50.a1_in1k names weights, too; remove it, or the tag of the name',
        ),
        ({"recipe.model.freeze": "backbone"}, '= "backbone": random weights would stay random; use "none", or rec'),
    ],
)
def test_value_is_refused(changes: dict[str, Any], message: str) -> None:
    error = str(refused(changed(changes)))
    assert error.startswith("run.json: ")
    assert (message if message.startswith("recipe.") else next(iter(changes))) in error
    assert message in error


def test_missing_keys_are_all_named_and_a_typo_comes_first() -> None:
    missing = refused({})
    assert str(missing).startswith("run.json: train_batch_size: missing; expected the global batch size: images per")
    assert missing.remedy.endswith("; also recipe (missing)")
    assert refused({"train_batch_size": 8}).remedy == "expected an object with model, data, schedule, optional keys"
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
        ("recipe.data.mean", [0, 0.5, 1]),
        ("recipe.seed", 2**63 - 1),
        ("optimizer.params", {"momentum": 0, "nesterov": False}),
        ("communication_data_type", None),
        ("zero_optimization", {"stage": 2, "stage3_max_live_parameters": 0, "overlap_comm": None}),
    ],
)
def test_value_is_accepted(key: str, value: Any) -> None:
    parse_config(changed({key: value}), "run.json")


# --- --set


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("recipe.model.name=resnet50", "recipe.model.name", "resnet50"),
        ('recipe.model.name="resnet50"', "recipe.model.name", "resnet50"),
        ("recipe.model.name=a=b", "recipe.model.name", "a=b"),
        ("recipe.schedule.decay_epochs=[1, 2]", "recipe.schedule.decay_epochs", (1, 2)),
        ("recipe.schedule.reference_weight_decay=null", "recipe.schedule.reference_weight_decay", None),
        ("bf16.enabled=true", "bf16.enabled", True),
    ],
)
def test_override_sets_one_value(small: Path, override: str, key: str, value: Any) -> None:
    found: Any = read_config(small, [override])
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


def test_overrides_apply_in_order_and_are_part_of_the_source(small: Path) -> None:
    config = read_config(small, ["recipe.seed=1", "recipe.seed=2", 'fp16={"enabled": true}', "fp16.hysteresis=3"])
    assert config.source.raw["recipe"]["seed"] == config.recipe.seed == 2
    assert config.source.raw["fp16"] == {"enabled": True, "hysteresis": 3}
    assert "--set recipe.seed=1" in config.source.file


def test_null_restores_the_default(tmp_path: Path) -> None:
    path = written(tmp_path, json.dumps(changed({"recipe.schedule.decay_epochs": [1]})))
    config = read_config(path, ["recipe.schedule.decay=none", "recipe.schedule.decay_epochs=null"])
    assert "decay_epochs" not in config.recipe.schedule.model_fields_set


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("recipe.seed", ": --set recipe.seed is not KEY=VALUE; write it as in --set recipe.schedule.epochs=2"),
        ("=2", ": --set =2 is not KEY=VALUE;"),
        ("recipe..seed=2", ": --set recipe..seed=2 is not KEY=VALUE;"),
        ("recipe.schedule.epochs.x=2", ": recipe.schedule.epochs = 3: not an object, so it has no x; set the"),
        ("train_batch_size.a.b=2", ": train_batch_size = 64: not an object, so it has no a.b;"),
        ("recipe.schedule.epoch=2", ': recipe.schedule.epoch = 2: unknown key; did you mean "epochs"?'),
        ("recpie.seed=2", ': recpie = {"seed": 2}: unknown key; did you mean "recipe"?'),
        ("recipe.seed=two", ': recipe.seed = "two": not a valid integer;'),
        ('recipe.model={"name": "a", "name": "b"}', ': name = ["a", "b"]: this key occurs more than'),
    ],
)
def test_override_is_refused(small: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(small, [override])
    assert str(caught.value).startswith(f"{small} (with --set {override}){message}")


# --- the mirror of DeepSpeed's config


def sections_of(root: type[sections.Section]) -> Iterator[type[sections.Section]]:
    """A section and those inside it, but not DeepSpeed's sections that are only passed on."""
    yield root
    for field in root.model_fields.values():
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, sections.Section) and not issubclass(part, PassedOn):
                yield from sections_of(part)


def test_every_key_of_the_recipe_has_a_docstring() -> None:
    undocumented = {Config, sections.ThroughputTimer}  # they have keys that are only passed on
    for section in {*sections_of(Config), *sections_of(StudyFile)} - undocumented:
        for name, field in section.model_fields.items():
            is_section = isinstance(field.annotation, type) and issubclass(field.annotation, sections.Section)
            assert field.description or is_section, (section, name)


def deepspeeds_sections() -> list[tuple[type[sections.Section], dict[str, Any]]]:
    """The mirror of each section, and DeepSpeed's own keys with their defaults."""
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


def test_sections_have_deepspeeds_keys_and_defaults() -> None:
    for mirror, theirs in deepspeeds_sections():
        assert set(theirs) - set(mirror.unsupported) == set(mirror.model_fields), mirror
        for name, field in mirror.model_fields.items():
            if field.default is not None:  # None: DeepSpeed's, whatever it is
                default = list(field.default) if isinstance(field.default, tuple) else field.default
                assert default == theirs[name], (mirror, name)
            elif theirs[name] is not None:
                mirror.model_validate({name: theirs[name]})


class Recording(dict[str, Any]):
    """A config that records which keys are read."""

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


def test_top_level_has_deepspeeds_keys_and_defaults() -> None:
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, DeepSpeedConfig

    recording = Recording(train_batch_size=4, steps_per_print=10)
    theirs = DeepSpeedConfig(recording)
    assert recording.asked <= set(Config.model_fields) | set(Config.unsupported)
    assert set(sections.DeepSpeedConfig.model_fields) <= recording.asked
    assert set(_REMOVED_TOP_LEVEL_CONFIG_KEYS) <= set(Config.unsupported)
    ours = parse_config(SMALL, "run.json")
    # The defaults of all other keys differ for a reason that their docstrings give, or are sections.
    for name in (
        *("communication_data_type", "disable_allgather", "dump_state", "gradient_allreduce_op"),
        *("gradient_predivide_factor", "memory_breakdown", "prescale_gradients", "wall_clock_breakdown"),
        *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
