"""Accuracy parity: the same configuration trained by this recipe, plain PyTorch and timm's ``train.py``.

For each seed, all three start from the same weights and read the same image files: the handwritten digits, written as
PNGs, or a folder with ``train/`` and ``val/`` such as CIFAR-10's. The plain PyTorch loop is in this file. timm's script
is not part of its package and comes from a clone of its repository; without ``--timm`` it is left out.

    git clone --depth 1 https://github.com/huggingface/pytorch-image-models
    python -m benchmarks.parity --timm pytorch-image-models/train.py
"""

import argparse
import csv
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_model
from timm import create_model
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks.launch import direct_command, run_ok
from benchmarks.report import context, heading, made_folder, new_parser, positive, publish, say
from recipe.commands.study.results import CONFIDENCE, interval
from recipe.data import open_datasets
from recipe.model import build_model
from recipe.plan import counted
from recipe.reporting import read_events

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4


@dataclass(frozen=True)
class Setting:
    """The shared configuration: the paper's method at a small scale. Units are epochs, images and pixels."""

    data: Path
    model: str
    classes: int
    image_size: int
    global_batch: int
    micro_batch: int
    """also the number of images in batch norm's statistics"""
    reference_lr: float
    reference_batch: int
    epochs: int
    warmup_epochs: int
    decay_epochs: tuple[int, ...]
    augmented: bool
    """random resized crops, half of them mirrored; otherwise the whole image"""

    @property
    def accumulation(self) -> int:
        return self.global_batch // self.micro_batch

    @property
    def peak_rate(self) -> float:
        return self.reference_lr * self.global_batch / self.reference_batch

    @property
    def short_side(self) -> int:
        """Pixels to which a validation image is resized before the centre crop: the paper's 256 for 224."""
        return round(self.image_size * 256 / 224) if self.augmented else self.image_size


def main(words: Sequence[str]) -> int:
    """Train; print a table and, with ``--json``, write it and the JSON."""
    arguments, before = parse_arguments(words), context("benchmarks.parity", words)
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.folder or Path(scratch)
        setting = digits(work / "digits") if arguments.data is None else photographs(arguments)
        trainers: dict[str, Callable[[Setting, int, Path, Path], list[float]]] = {"recipe": recipe, "PyTorch": plain}
        if arguments.timm is not None:
            script = arguments.timm.resolve()
            trainers["timm"] = lambda *given: timm_script(script, *given)
        top1: dict[str, dict[int, list[float]]] = {name: {} for name in trainers}
        for seed in range(1, arguments.seeds + 1):
            for name, train in trainers.items():
                top1[name][seed] = trained_once(train, setting, seed, work / name / f"seed-{seed}")
                say(f"{name}, seed {seed}: {top1[name][seed][-1]:.2f} %")
    described = {key: str(value) if isinstance(value, Path) else value for key, value in vars(setting).items()}
    described["data"] = "digits" if arguments.data is None else arguments.data.name
    report = before | {"setting": described, "top1": top1}
    publish(report, format_report(report), arguments.json)
    return 0


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line, and check that the paths in it exist."""
    parser = new_parser("benchmarks.parity", __doc__)
    parser.add_argument("--data", type=Path, help="folder with train/ and val/ or test/ (default: the digits)")
    parser.add_argument("--timm", type=Path, metavar="TRAIN.PY", help="timm's train.py, from a clone of its repository")
    parser.add_argument("--seeds", type=positive, default=5, help="runs per program (default: %(default)s)")
    parser.add_argument("--epochs", type=positive, default=10, help="with --data (default: %(default)s)")
    parser.add_argument("--model", default="test_resnet", help="with --data (default: %(default)s)")
    parser.add_argument("--image-size", type=positive, default=32, help="with --data (default: %(default)s)")
    parser.add_argument("--folder", type=made_folder, help="folder for the runs; runs already in it are not repeated")
    arguments = parser.parse_args(words)
    if arguments.seeds < 2:
        parser.error("--seeds 1: a confidence interval needs at least two")
    if arguments.timm is not None and not arguments.timm.is_file():
        parser.error(f"--timm {arguments.timm}: no such file; clone timm's repository, or omit the option")
    if arguments.data is not None and not (arguments.data / "train").is_dir():
        parser.error(f"--data {arguments.data}: the folder should contain train/ and val/")
    return arguments


def digits(folder: Path) -> Setting:
    """The digits as PNGs with one folder per class; training images that do not fill a global batch are dropped."""
    setting = Setting(folder, "test_resnet", 10, 16, 128, 32, 0.1, 32, 18, 2, (6, 12, 16), augmented=False)
    if folder.exists():
        return setting
    parts = open_datasets("digits", None, image_size=8, crop="none", flip=False, seed=0)
    for name, part in zip(("train", "val"), parts, strict=True):
        count = len(part) - len(part) % setting.global_batch if name == "train" else len(part)
        for index in range(count):
            file = folder / name / str(int(part.labels[index])) / f"{index:04}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(part.image(index).pixels.numpy()).save(file)
    return setting


def photographs(arguments: argparse.Namespace) -> Setting:
    """The paper's method on a folder, at the batch size closest to 512 that divides the number of training images."""
    folder, epochs = arguments.data, arguments.epochs
    images = ImageFolder(str(folder / "train"))
    batches = [accumulation * micro for accumulation in range(1, 65) for micro in (25, 32, 40, 50, 64)]
    fitting = [batch for batch in batches if len(images) % batch == 0]
    if not fitting:
        raise SystemExit(f"--data {folder}: no batch near 512 divides its {len(images)} training images")
    batch = min(fitting, key=lambda batch: abs(batch - 512))
    micro = next(micro for micro in (32, 25, 40, 50, 64) if batch % micro == 0)
    decays = tuple(sorted({max(1, round(epochs * share)) for share in (1 / 3, 2 / 3, 8 / 9)}))  # 30, 60 and 80 of 90
    size, model, classes = arguments.image_size, arguments.model, len(images.classes)
    return Setting(folder, model, classes, size, batch, micro, 0.1, 256, epochs, 1, decays, augmented=True)


def trained_once(
    train: Callable[[Setting, int, Path, Path], list[float]], setting: Setting, seed: int, folder: Path
) -> list[float]:
    """Top-1 after each epoch, in per cent; read from ``folder`` if this run is already complete."""
    result = folder / "top1.json"
    if not result.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        start = folder / "start.safetensors"
        save_model(build_model(setting.model, setting.classes, seed, "local"), str(start))
        top1 = train(setting, seed, start, folder)
        assert len(top1) == setting.epochs, "every epoch was validated"
        result.write_text(json.dumps(top1))
    found: list[float] = json.loads(result.read_text())
    return found


def recipe(setting: Setting, seed: int, start: Path, folder: Path) -> list[float]:
    """Train with this recipe."""
    data = {
        "source": "imagefolder",
        "path": str(setting.data.resolve()),
        "image_size": setting.image_size,
        "crop": "random_resized" if setting.augmented else "none",
        "flip": setting.augmented,
        "mean": MEAN,
        "std": STD,
        "on_device": True,
    }
    schedule = {
        "epochs": setting.epochs,
        "reference_lr": setting.reference_lr,
        "reference_batch_size": setting.reference_batch,
        "warmup_epochs": setting.warmup_epochs,
        "decay_epochs": setting.decay_epochs,
    }
    config = {
        "train_batch_size": setting.global_batch,
        "train_micro_batch_size_per_gpu": setting.micro_batch,
        "gradient_accumulation_steps": "auto",
        "optimizer": {
            "type": "SGD",
            "params": {"lr": "auto", "momentum": MOMENTUM, "nesterov": True, "weight_decay": WEIGHT_DECAY},
        },
        "recipe": {
            "model": {"name": setting.model, "num_classes": setting.classes, "weights": str(start.resolve())},
            "batchnorm": {"statistics": setting.micro_batch},
            "data": data,
            "schedule": schedule,
            "seed": seed,
        },
    }
    file = folder / "parity.json"
    file.write_text(json.dumps(config, indent=2) + "\n")
    _run(direct_command(1, "recipe/train.py", "--deepspeed_config", str(file.resolve()), "--output", str(folder)))
    return [event["top1"] for event in read_events(folder) if event["event"] == "validation"]


def plain(setting: Setting, seed: int, start: Path, folder: Path) -> list[float]:
    """Train with only torch and torchvision."""
    torch.manual_seed(seed)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    last: list[Callable[[Any], Any]] = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    size, validated = setting.image_size, transforms.Resize(setting.short_side)
    cut: list[Callable[[Any], Any]] = [transforms.Resize(size), transforms.CenterCrop(size)]
    if setting.augmented:
        cut = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    training = ImageFolder(str(setting.data / "train"), transforms.Compose([*cut, *last]))
    validation = ImageFolder(
        str(held_out(setting.data)), transforms.Compose([validated, transforms.CenterCrop(size), *last])
    )
    batches = DataLoader(training, setting.micro_batch, shuffle=True, drop_last=True)

    model = create_model(setting.model, num_classes=setting.classes)
    model.load_state_dict(load_file(start))
    model.to(device)
    decayed = [weight for weight in model.parameters() if weight.ndim > 1]
    others = [weight for weight in model.parameters() if weight.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=MOMENTUM, nesterov=True)
    steps = len(training) // setting.global_batch
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(setting, step, steps))
    top1 = []
    for _ in range(setting.epochs):
        for turn, (images, labels) in enumerate(batches, start=1):
            loss = F.cross_entropy(model(images.to(device)), labels.to(device))
            (loss / setting.accumulation).backward()
            if turn % setting.accumulation == 0:
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
        top1.append(accuracy(model, DataLoader(validation, 500), device))
    return top1


def rate(setting: Setting, step: int, steps_per_epoch: int) -> float:
    """The learning rate of update ``step``, from 0: linear warmup from the reference rate, a tenth at each decay."""
    warmup = setting.warmup_epochs * steps_per_epoch
    if step < warmup:
        return setting.reference_lr + (setting.peak_rate - setting.reference_lr) * step / warmup
    return float(setting.peak_rate * 0.1 ** sum(step >= epoch * steps_per_epoch for epoch in setting.decay_epochs))


@torch.no_grad()
def accuracy(model: nn.Module, batches: DataLoader[Any], device: torch.device) -> float:
    """Top-1 in per cent."""
    model.eval()
    right = count = 0
    for images, labels in batches:
        right += int((model(images.to(device)).argmax(1) == labels.to(device)).sum())
        count += len(labels)
    model.train()
    return 100 * right / count


def timm_script(script: Path, setting: Setting, seed: int, start: Path, folder: Path) -> list[float]:
    """Train with timm's ``train.py``."""
    options: dict[str, Any] = {
        "data-dir": setting.data.resolve(),
        "train-split": "train",
        "val-split": held_out(setting.data).name,
        "model": setting.model,
        "num-classes": setting.classes,
        "initial-checkpoint": start.resolve(),
        "img-size": setting.image_size,
        # timm rounds img-size / crop-pct down.
        "crop-pct": setting.image_size / (setting.short_side + 0.01),
        "interpolation": "bilinear",
        "train-interpolation": "bilinear",
        "color-jitter": 0,
        "smoothing": 0,
        "batch-size": setting.micro_batch,
        "grad-accum-steps": setting.accumulation,
        "opt": "sgd",
        "momentum": MOMENTUM,
        "weight-decay": WEIGHT_DECAY,
        "lr": setting.peak_rate,
        "warmup-lr": setting.reference_lr,
        "warmup-epochs": setting.warmup_epochs,
        "sched": "multistep",
        "decay-rate": 0.1,
        "epochs": setting.epochs,
        "seed": seed,
        "workers": 1,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "output": folder.resolve(),
        "experiment": "timm",
        "checkpoint-hist": 1,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    words += ["--sched-on-updates", "--no-prefetcher", *([] if setting.augmented else ["--no-aug"])]
    words += ["--decay-milestones", *map(str, setting.decay_epochs)]
    words += ["--mean", *map(str, MEAN), "--std", *map(str, STD)]
    _run([sys.executable, str(script), *words])
    with (folder / "timm" / "summary.csv").open() as table:
        return [float(row["eval_top1"]) for row in csv.DictReader(table)]


def held_out(data: Path) -> Path:
    """The folder with the validation images."""
    return data / "val" if (data / "val").is_dir() else data / "test"


def _run(command: Sequence[str]) -> None:
    run_ok(command, OMP_NUM_THREADS=str(len(os.sched_getaffinity(0))))


def format_report(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    setting, top1 = report["setting"], report["top1"]
    final = {name: [epochs[-1] for epochs in runs.values()] for name, runs in top1.items()}
    augmented = "random resized crops, half of them mirrored" if setting["augmented"] else "the whole image"
    lines = [
        *heading(f"The same configuration in {len(final)} programs: {setting['data']}, {setting['model']}", report),
        f"{setting['image_size']} px, {augmented}; batch {setting['global_batch']} in micro-batches of "
        f"{setting['micro_batch']}, {setting['epochs']} epochs; SGD with Nesterov momentum {MOMENTUM}, weight decay "
        f"{WEIGHT_DECAY:g} except on norms and biases, rate {setting['reference_lr']:g} for "
        f"{setting['reference_batch']} images, scaled linearly, {counted(setting['warmup_epochs'], 'epoch')} of "
        f"warmup, divided by ten after epochs {', '.join(map(str, setting['decay_epochs']))}. "
        "For each seed, all start from the same weights.",
        "",
        "| | final top-1, mean ± standard deviation | minus the recipe's, paired by seed | by seed |",
        "|---|---|---|---|",
    ]
    for name, values in final.items():
        apart = "–"
        if name != "recipe":
            centre, half = interval([a - b for a, b in zip(values, final["recipe"], strict=True)])
            verdict = "no significant difference" if abs(centre) <= half else "**significant**"
            apart = f"{centre:+.2f} ± {half:.2f}: {verdict}"
        each = ", ".join(f"{value:.2f}" for value in values)
        lines.append(f"| {name} | {mean(values):.2f} ± {stdev(values):.2f} % | {apart} | {each} |")
    lines += ["", f"± of a difference is the half-width of its {CONFIDENCE:.0%} confidence interval (Student's t)."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
