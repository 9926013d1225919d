"""``python -m recipe export``: the best weights of a run as a file that plain timm loads, and a card that says what
they are.
"""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from recipe.checkpoints import CHECKPOINTS, MANIFEST, PLAN, Checkpoint, damage, find, unreadable
from recipe.commands.run_files import run_meant
from recipe.config import FOLDERS, Config, printable, read_config
from recipe.plan import json_text
from recipe.reporting import Parser, read_events, read_summary

WEIGHTS, CARD = "model.safetensors", "README.md"
SAVED = "mp_rank_00_model_states.pt"  # DeepSpeed's name of what rank 0 writes


@dataclass(frozen=True)
class Export:
    """What is exported: a checkpoint with its resolved config, and what the run measured of it.

    ``steps_done`` are those of the newest checkpoint; ``validation`` is the line of ``metrics.jsonl`` that belongs to
    the weights, None if there is none; ``best_top1`` is the best that the run had, in per cent; ``summary`` is that of
    a complete run.
    """

    checkpoint: Checkpoint
    steps_done: int
    config: Config
    validation: dict[str, Any] | None
    best_top1: float | None
    summary: dict[str, Any] | None


def main(argv: Sequence[str]) -> int:
    """Write the weights and the card; return 0, or 2 where there is nothing to export."""
    parser = Parser(
        prog="python -m recipe export", description="Write the best weights of a run for plain timm, with a model card."
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="output folder of a run")
    parser.add_argument("--output", type=Path, help="folder to write to (default: RUN_DIR/export)")
    arguments = parser.parse_args(argv)
    output = arguments.output or arguments.run / "export"
    try:
        export, messages = choose(arguments.run)
        for message in messages:
            print(f"recipe: {printable(message)}", file=sys.stderr)
        write(export, output)
    except OSError as error:
        print(f"recipe: {printable(str(error.filename))}: {error.strerror}", file=sys.stderr)
        return 2
    except ValueError as refusal:
        print(f"recipe: {printable(str(refusal))}", file=sys.stderr)
        return 2
    print(f"{output / WEIGHTS}: after {progress(export.config, export.checkpoint.step)}; {accuracy(export)}")
    print(f"{output / CARD}: what it is, and how to use it")
    print(load_line(export, str(output / WEIGHTS)))
    return 0


def choose(run: Path) -> tuple[Export, list[str]]:
    """The best validated checkpoint of ``run`` that is whole, or else the newest; and a message for each left aside.

    Raises:
        ValueError: there is none, or it is in shards.
    """
    if not run.is_dir():
        raise ValueError(f"there is no folder {run}")
    found = find(run / CHECKPOINTS)
    validated = [checkpoint for checkpoint in found if checkpoint.top1 is not None]
    validated.sort(key=lambda checkpoint: (checkpoint.top1, -checkpoint.step), reverse=True)
    messages = [
        f"checkpoint {path} is left aside: its {MANIFEST} cannot be read" for path in unreadable(run / CHECKPOINTS)
    ]
    for checkpoint in [*validated, *(checkpoint for checkpoint in found if checkpoint.top1 is None)]:
        problem = damage(checkpoint)
        if problem is None:
            break
        messages.append(f"checkpoint {checkpoint.path} is left aside: {problem}")
    else:
        raise ValueError("; ".join([*messages, f"{run / CHECKPOINTS} holds no whole checkpoint; {run_meant(run)}"]))
    if SAVED not in checkpoint.files:
        raise ValueError(
            f"{checkpoint.path} is in shards, as ZeRO stage 3 writes it; join them with "
            "DeepSpeed's zero_to_fp32, or train at a lower stage"
        )
    validations = [line for line in read_events(run) if _is_validation(line)]
    return Export(
        checkpoint,
        found[0].step,
        read_config(checkpoint.path / PLAN),
        next((line for line in validations if line["step"] == checkpoint.step - 1), None),
        max((line["top1"] for line in validations), default=None),
        read_summary(run),
    ), messages


def write(export: Export, output: Path) -> None:
    """Write weights and card into ``output``; what is there before stays whole until the new is."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    file = export.checkpoint.path / SAVED
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)["module"]
        # Half parameters become fp32 exactly, so that timm's fp32 model is the one that was validated.
        tensors = {
            name: (value.float() if value.is_floating_point() else value).contiguous() for name, value in state.items()
        }
    except (RuntimeError, UnpicklingError, LookupError, TypeError, AttributeError, EOFError) as error:
        what = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{file} is not what DeepSpeed saves: {what}") from None
    output.mkdir(parents=True, exist_ok=True)
    weights, text = output / f".{WEIGHTS}.unfinished", output / f".{CARD}.unfinished"
    has_batchnorm = any(name.endswith("running_mean") for name in tensors)
    text.write_text(card(export, has_batchnorm), encoding="utf-8")
    try:
        save_file(tensors, weights, metadata={"format": "pt"})
    except (SafetensorError, TypeError) as error:
        for unfinished in (weights, text):
            unfinished.unlink(missing_ok=True)
        raise ValueError(f"{output / WEIGHTS} could not be written: {error}") from None
    shutil.copymode(text, weights)  # safetensors lets nobody else read its file, whatever the umask says
    os.replace(weights, output / WEIGHTS)
    os.replace(text, output / CARD)


def load_line(export: Export, file: str) -> str:
    """The Python that makes the model."""
    model = export.config.recipe.model
    words = f"{model.architecture!r}, num_classes={model.num_classes}, checkpoint_path={file!r}"
    return f"timm.create_model({words}).eval()"


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
    decay = f", × {schedule.decay_factor:g} at epochs {epochs}" if epochs else ""
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
        f"- **Trained:** {progress(config, export.checkpoint.step)} on {data.train_images:,} images, by SGD (momentum "
        f"{optimizer.momentum:g}{', Nesterov' if optimizer.nesterov else ''}, weight decay {optimizer.weight_decay:g}) "
        f"at a global batch of {config.train_batch_size:,}; of the whole schedule, peak rate {optimizer.lr:g}{decay}; "
        f"{norm}; {config.precision}; seed {recipe.seed}.",
        f"- **Weights:** after step {export.checkpoint.step:,}, in fp32{trained}.",
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
        if summary.get("classes"):  # earlier versions do not name them
            lines.append(f"- **Classes,** from 0 on: {json.dumps(summary['classes'], ensure_ascii=False)}.")
    lines += [
        "",
        "```python",
        "import timm",
        "",
        f"model = {load_line(export, WEIGHTS)}",
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
