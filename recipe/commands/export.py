"""``python -m recipe export``: the best weights of a run, with the config and the card that timm and hubs expect."""

import importlib.util
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipe.checkpoints import CHECKPOINTS, find
from recipe.commands import refusing
from recipe.commands.run_files import TIMM_CONFIG, WEIGHTS
from recipe.config import FOLDERS, Config, printable
from recipe.plan import json_text, optimizer_words
from recipe.reporting import Parser, read_events, read_summary

if TYPE_CHECKING:
    from torch import nn

    from recipe.commands.trained import Trained

CARD, ONNX = "README.md", "model.onnx"


@dataclass(frozen=True)
class Export:
    """What is exported, and what the run measured of it.

    Attributes:
        trained: The weights and their config.
        steps_done: The steps of the newest checkpoint.
        validation: The line of ``metrics.jsonl`` that belongs to the weights, None if there is none.
        best_top1: The best of the run, in per cent.
        summary: That of a complete run.
    """

    trained: "Trained"
    config: Config
    steps_done: int
    validation: dict[str, Any] | None
    best_top1: float | None
    summary: dict[str, Any] | None


@refusing
def main(argv: Sequence[str]) -> int:
    """Write weights, config and card; return 0, or 2 where there is nothing to export."""
    parser = Parser(
        prog="python -m recipe export",
        description="Write the best weights of a run as timm and model hubs expect them, with a model card.",
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="output folder of a run")
    parser.add_argument("--output", type=Path, help="folder to write to (default: RUN_DIR/export)")
    parser.add_argument("--format", choices=("timm", "onnx"), default="timm", help=f'"onnx" writes {ONNX} as well')
    arguments = parser.parse_args(argv)
    output = arguments.output or arguments.run / "export"
    if arguments.format == "onnx":
        refuse_without_onnx()
    export = choose(arguments.run)
    write(export, output, with_onnx=arguments.format == "onnx")
    lines = [
        f"{output / WEIGHTS}: after {progress(export.config, export.trained.step)}; {accuracy(export)}",
        f"{output / TIMM_CONFIG}: architecture, classes and preprocessing, as timm reads them",
        f"{output / CARD}: what it is, and how to use it",
        load_line(output),
    ]
    if arguments.format == "onnx":
        lines.insert(
            1, f"{output / ONNX}: from images (N, 3, S, S), prepared as {TIMM_CONFIG} says, to logits (N, classes)"
        )
    print("\n".join(map(printable, lines)))
    return 0


def refuse_without_onnx() -> None:
    """Refuse early what torch's exporter would find missing late."""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"--format onnx needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def choose(run: Path) -> Export:
    """The best validated checkpoint of ``run`` that is whole, or else the newest.

    Raises:
        ValueError: There is none, it is in shards, or ``run`` is no run.
    """
    from recipe.commands.trained import read_trained  # torch takes seconds to import

    trained = read_trained(run)
    if trained.config is None:
        raise ValueError(f"{run} has been exported already; name the folder of the run")
    validations = [line for line in read_events(run) if _is_validation(line)]
    return Export(
        trained,
        trained.config,
        find(run / CHECKPOINTS)[0].step,
        next((line for line in validations if line["step"] == trained.step - 1), None),
        max((line["top1"] for line in validations), default=None),
        read_summary(run),
    )


def write(export: Export, output: Path, *, with_onnx: bool = False) -> None:
    """Write weights, config and card into ``output``; what is there before stays whole until the new is."""
    import timm
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    trained = export.trained
    # Half parameters become fp32 exactly, so that timm's fp32 model is the one that was validated.
    state = {name: value.float() if value.is_floating_point() else value for name, value in trained.state.items()}
    model = timm.create_model(trained.architecture, num_classes=trained.num_classes).eval()
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{trained.name}: the weights are not those of {trained.architecture}: {error}") from None
    has_batchnorm = any(name.endswith("running_mean") for name in state)
    described = json.dumps(timm_config(trained, model), indent=2, ensure_ascii=False)
    output.mkdir(parents=True, exist_ok=True)
    names = [CARD, TIMM_CONFIG, WEIGHTS, *([ONNX] if with_onnx else [])]
    unfinished = {name: output / f".unfinished.{name}" for name in names}
    try:
        unfinished[CARD].write_text(card(export, has_batchnorm), encoding="utf-8")
        unfinished[TIMM_CONFIG].write_text(described + "\n", encoding="utf-8")
        save_file(state, unfinished[WEIGHTS], metadata={"format": "pt"})
        shutil.copymode(unfinished[CARD], unfinished[WEIGHTS])  # safetensors lets nobody else read its file
        if with_onnx:
            save_onnx(model, trained.image_size, unfinished[ONNX])
        for name in names:
            os.replace(unfinished[name], output / name)
    except (SafetensorError, TypeError) as error:
        raise ValueError(f"{output / WEIGHTS} could not be written: {error}") from None
    finally:
        for path in unfinished.values():
            path.unlink(missing_ok=True)


def timm_config(trained: "Trained", model: "nn.Module") -> dict[str, Any]:
    """What ``config.json`` holds, as timm reads it from a folder or a hub; ``recipe`` is for our own commands."""
    from recipe.commands.trained import timm_crop

    crop_mode, crop_pct = timm_crop(trained.image_size, trained.crop)
    architecture: dict[str, Any] = dict(model.pretrained_cfg)  # type: ignore[arg-type]
    return {
        "architecture": trained.architecture,
        "num_classes": trained.num_classes,
        "num_features": model.num_features,
        **({} if trained.classes is None else {"label_names": trained.classes}),
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, trained.image_size, trained.image_size],
            "fixed_input_size": architecture.get("fixed_input_size", False),
            "interpolation": "bilinear",
            "crop_pct": crop_pct,
            "crop_mode": crop_mode,
            "mean": trained.mean,
            "std": trained.std,
            "num_classes": trained.num_classes,
            "pool_size": None,
            "first_conv": architecture.get("first_conv"),
            "classifier": architecture.get("classifier"),
        },
        "recipe": {"precision": trained.precision, "micro_batch": trained.micro_batch},
    }


def save_onnx(model: "nn.Module", image_size: int, file: Path) -> None:
    """Write ``model`` for batches of any number of images, by torch's exporter."""
    import torch

    try:
        torch.onnx.export(
            model,
            (torch.zeros(2, 3, image_size, image_size),),
            file,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("images")},),
            external_data=False,
            verbose=False,
        )
    except RuntimeError as error:  # the base of its own
        what = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"torch's exporter cannot write this network as ONNX: {what}; leave out --format onnx"
        ) from None


def load_line(folder: Path) -> str:
    """The Python that makes the model."""
    return f"timm.create_model({f'local-dir:{folder}'!r}, pretrained=True).eval()"


def progress(config: Config, steps: int) -> str:
    """How far so many steps are in the training of ``config``."""
    train_images, epochs = config.recipe.data.train_images, config.recipe.schedule.epochs
    assert isinstance(train_images, int), "a plan leaves no auto"
    steps_per_epoch = train_images // config.train_batch_size
    return f"{steps:,} of {epochs * steps_per_epoch:,} steps ({steps / steps_per_epoch:.4g} of {epochs:,} epochs)"


def accuracy(export: Export) -> str:
    """What was measured of the weights, in words."""
    if export.validation is None:
        return "not validated"
    measured = export.validation
    text = (
        f"top-1 {measured['top1']:.2f} %, top-5 {measured['top5']:.2f} % on {measured['count']:,} validation "
        f"images, after epoch {measured['epoch'] + 1}"
    )
    if export.best_top1 is not None and export.best_top1 > measured["top1"]:
        text += f"; the run had {export.best_top1:.2f} % at best, of which no whole checkpoint is kept"
    return text


def card(export: Export, has_batchnorm: bool) -> str:
    """The model card, as model hubs show it: Markdown behind a YAML head."""
    config, recipe, summary = export.config, export.config.recipe, export.summary
    data, schedule, optimizer, size = recipe.data, recipe.schedule, config.optimizer.params, recipe.data.image_size
    statistics = {"global": "the micro-batches of all GPUs", "local": "each GPU's micro-batch"}
    assert size != "auto", "a plan leaves no auto"
    over = statistics.get(str(recipe.batchnorm.statistics), f"{recipe.batchnorm.statistics} images")
    norm = f"batch norm over {over}" if has_batchnorm else "no batch norm"
    view = f"resized to {size} × {size}"
    if data.crop == "random_resized":
        view = f"resized to a short side of {round(size * 256 / 224)} (bilinear), its centre of {size} × {size} cut out"
    order = ", in the order of the folders' names" if data.source in FOLDERS else ""
    trained = {
        "fp32": "",
        "fp64": "; trained and validated in fp64, from which they are rounded",
    }.get(config.precision, f"; trained in {config.precision}, and validated with these very values")
    epochs = ", ".join(f"{epoch:g}" for epoch in schedule.decay_epochs)
    decay = {"step": f", × {schedule.decay_factor:g} at epochs {epochs}" if epochs else "", "none": ""}.get(
        schedule.decay, f", {schedule.decay} decay to {schedule.final_lr:g}"
    )
    lines = [
        "---",
        "library_name: timm",
        "pipeline_tag: image-classification",
        "tags:",
        "- image-classification",
        "- timm",
        *_model_index(export),
        "---",
        "",
        f"# {recipe.model.name}, trained on {data.source} at batch {config.train_batch_size:,}",
        "",
        f"- **Measured:** {accuracy(export)}.",
        f"- **Input:** RGB, {size} × {size}: an image is {view}; pixels from 0 to 1, of them mean "
        f"{_numbers(data.mean)} and standard deviation {_numbers(data.std)}.",
        f"- **Output:** {recipe.model.num_classes} classes{order}.",
        f"- **Trained:** {progress(config, export.trained.step)} on {data.train_images:,} images, by "
        f"{optimizer_words(config)}, weight decay {optimizer.weight_decay:g}, "
        f"at a global batch of {config.train_batch_size:,}; of the whole schedule, peak rate {optimizer.lr:g}{decay}; "
        f"{norm}; {config.precision}; seed {recipe.seed}.",
        f"- **Weights:** after step {export.trained.step:,}, in fp32{trained}.",
    ]
    if summary is None:
        lines.append(
            f"- **The run is not complete:** stopped, or still under way, after {progress(config, export.steps_done)}; "
            "these are its best weights so far."
        )
    else:
        versions = ", ".join(f"{name} {number}" for name, number in summary["versions"].items())
        ranks = f"{summary['world_size']} rank{'' if summary['world_size'] == 1 else 's'}"
        lines.append(f"- **On:** {ranks} on {summary['device']}; {versions}.")
    if export.trained.classes is not None:
        lines.append(f"- **Classes,** from 0 on: {json.dumps(export.trained.classes, ensure_ascii=False)}.")
    lines += [
        "",
        "```python",
        "import timm",
        "from PIL import Image",
        "",
        f"model = {load_line(Path('.'))}  # in this folder",
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
        'logits = model(transform(Image.open("image.png").convert("RGB"))[None])',
        "```",
        "",
        "The config, with every value that was left to its rule filled in:",
        "",
        "```json",
        json_text(config).rstrip(),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _model_index(export: Export) -> list[str]:
    """The YAML by which a hub shows the measured accuracy. JSON strings are YAML strings."""
    if export.validation is None:
        return []
    name, source = json.dumps(export.config.recipe.model.name), json.dumps(export.config.recipe.data.source)
    return [
        "model-index:",
        f"- name: {name}",
        "  results:",
        "  - task:",
        "      type: image-classification",
        "    dataset:",
        f"      name: {source}",
        f"      type: {source}",
        "      split: validation",
        "    metrics:",
        "    - type: accuracy",
        "      name: top-1, in per cent",
        f"      value: {export.validation['top1']:.2f}",
    ]


def _is_validation(line: dict[str, Any]) -> bool:
    return (
        line["event"] == "validation"
        and all(type(line.get(key)) is int for key in ("epoch", "count"))
        and all(isinstance(line.get(key), int | float) and 0 <= line[key] <= 100 for key in ("top1", "top5"))
    )


def _numbers(values: Sequence[float] | str) -> str:
    assert not isinstance(values, str), "a plan leaves no auto"
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"
