"""``python -m recipe export``: the best weights of a run, with config and model card as timm and model hubs expect."""

import importlib.util
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipe.commands import refusing
from recipe.commands.run_files import TIMM_CONFIG, WEIGHTS
from recipe.config import printable
from recipe.reporting import Parser

if TYPE_CHECKING:
    from torch import nn

    from recipe.commands.trained import Trained

CARD, ONNX = "README.md", "model.onnx"
LISTED_CLASSES = 20  # in the model card


@refusing
def main(argv: Sequence[str]) -> int:
    """Write weights, config and card; return 0, or 2 if there is nothing to export."""
    parser = Parser(
        prog="python -m recipe export",
        description="Write the best weights of a run as timm and model hubs expect them, with a model card.",
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="output folder of a run")
    parser.add_argument("--output", type=Path, help="folder to write to (default: RUN_DIR/export)")
    parser.add_argument("--format", choices=("timm", "onnx"), default="timm", help=f'"onnx" writes {ONNX} as well')
    arguments = parser.parse_args(argv)
    output = arguments.output or arguments.run / "export"
    with_onnx = arguments.format == "onnx"
    if with_onnx:
        missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
        if missing:
            raise ValueError(f"--format onnx needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    from recipe.commands.trained import read_trained  # torch takes seconds to import

    trained = read_trained(arguments.run)
    if not trained.step:
        raise ValueError(f"{arguments.run} is an export already; name the folder of the run")
    write(trained, output, with_onnx=with_onnx)
    files = (WEIGHTS, TIMM_CONFIG, CARD, ONNX) if with_onnx else (WEIGHTS, TIMM_CONFIG, CARD)
    results = (
        f"weights after {progress(trained)}; {accuracy(trained)}",
        f"in {output}: {', '.join(files)}",
        f"load them by {load_line(output)}",
    )
    print("\n".join(map(printable, results)))
    return 0


def write(trained: "Trained", output: Path, *, with_onnx: bool = False) -> None:
    """Write weights, config, card and, if asked for, ONNX into ``output``."""
    import timm
    from safetensors import SafetensorError

    plan = trained.plan
    model = timm.create_model(plan.config.recipe.model.architecture, num_classes=trained.num_classes).eval()
    trained.load_into(model)  # half-precision values are exact in fp32, so timm gets the model that was validated
    crop_mode, crop_pct = timm_crop(plan.validation_image_size, plan.config.recipe.data.crop)
    described: dict[str, Any] = {
        "pretrained_cfg": {"tag": None, "license": None},  # not those of timm's own weights
        "recipe": plan.config.model_dump(mode="json", exclude_none=True),
    }
    if trained.classes is not None:
        described["label_names"] = trained.classes
    prepared = {
        "input_size": (3, plan.validation_image_size, plan.validation_image_size),
        "mean": plan.mean,
        "std": plan.std,
        "interpolation": "bilinear",
        "crop_mode": crop_mode,
        "crop_pct": crop_pct,
    }
    output.mkdir(parents=True, exist_ok=True)
    try:
        timm.models.save_for_hf(model, str(output), described, safe_serialization=True, data_config=prepared)
    except SafetensorError as error:
        raise ValueError(f"{output / WEIGHTS} could not be written: {error}") from None
    shutil.copymode(output / TIMM_CONFIG, output / WEIGHTS)  # safetensors makes its file readable to its owner only
    (output / CARD).write_text(card(trained), encoding="utf-8")
    if with_onnx:
        save_onnx(model, plan.validation_image_size, output / ONNX)


def timm_crop(image_size: int, crop: Any) -> tuple[str, float]:
    """timm's ``crop_mode`` and ``crop_pct`` that reproduce the run's validation.

    timm resizes the short side to floor(size / crop_pct).
    """
    from recipe.data import evaluation_short_side

    if crop != "random_resized":
        return "squash", 1.0
    short_side = evaluation_short_side(image_size, crop)
    shares = (image_size / short_side, image_size / (short_side + 0.5))
    return "center", next(share for share in shares if math.floor(image_size / share) == short_side)


def save_onnx(model: "nn.Module", image_size: int, file: Path) -> None:
    """Write ``model`` as ONNX with a dynamic batch size."""
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
    except RuntimeError as error:  # the base class of the exporter's own errors
        cause = str(error).strip().partition("\n")[0]
        raise ValueError(f"torch cannot export this network as ONNX: {cause}; leave out --format onnx") from None


def load_line(folder: Path) -> str:
    """The Python expression that creates the model."""
    return f"timm.create_model({f'local-dir:{folder}'!r}, pretrained=True).eval()"


def progress(trained: "Trained") -> str:
    """How long the weights were trained."""
    plan, epochs = trained.plan, trained.plan.timeline.epochs_done(trained.step)
    return f"{trained.step:,} of {plan.total_steps:,} steps ({epochs:.4g} of {plan.epochs:,} epochs)"


def accuracy(trained: "Trained") -> str:
    """The validation accuracy of the weights."""
    if trained.top1 is None:
        return "not validated"
    return f"top-1 {trained.top1:.2f} % on {trained.plan.validation_images:,} validation images"


def data_name(source: str, path: str | None) -> str:
    """A name for the data that means something elsewhere: its hub name, or the name of its folder."""
    from recipe.data import is_hub_name

    if path is None:
        return source
    return printable(path if source == "huggingface" and is_hub_name(path) else Path(path).name or source)


def card(trained: "Trained") -> str:
    """The model card that hubs show: Markdown with a YAML header."""
    from huggingface_hub import EvalResult, ModelCardData

    plan, recipe = trained.plan, trained.plan.config.recipe
    data = data_name(recipe.data.source, recipe.data.path)
    head = ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm"],
        model_name=recipe.model.name,
    )
    if trained.top1 is not None:
        measured = EvalResult(
            task_type="image-classification",
            dataset_type=recipe.data.source,
            dataset_name=data,
            dataset_split="validation",
            metric_type="accuracy",
            metric_name="top-1, in per cent",
            metric_value=round(trained.top1, 2),
        )
        head.eval_results = [measured]
    sizes = ", ".join(str(size) for _, size in plan.image_sizes)
    names = [f'"{name}"' for name in trained.classes or []]
    more = f" … (all in {TIMM_CONFIG})" if len(names) > LISTED_CLASSES else ""
    classes = f": {', '.join(names[:LISTED_CLASSES])}{more}, in the order of the logits" if names else ""
    weights = "as trained" if recipe.ema.decay is None else "the moving average of those trained"
    return f"""\
---
{head.to_yaml()}
---

# {recipe.model.name}, trained on {data} at batch {plan.global_batch:,}

- **Measured:** {accuracy(trained)}.
- **Trained:** {progress(trained)} on {plan.train_images:,} images, in {plan.precision}.
- **Images:** {plan.validation_image_size} px in validation and in the code below, {sizes} px in training.
- **Classes:** {trained.num_classes:,}{classes}.
- **Weights:** {weights}, in fp32.
- **Config:** the run's whole config is "recipe" in [{TIMM_CONFIG}]({TIMM_CONFIG}).

```python
import timm
from PIL import Image

model = {load_line(Path("."))}  # in this folder
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
logits = model(transform(Image.open("image.png").convert("RGB"))[None])
print(model.pretrained_cfg.get("label_names", range({trained.num_classes}))[logits.argmax()])
```
"""
