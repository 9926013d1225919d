"""Runs a trained model over validation data and counts what it gets right; the work of ``evaluate``."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from recipe.commands.trained import Trained, validation_loader
from recipe.data import ImageDataset, open_datasets, open_validation
from recipe.distributed import MeetingError, meet, own_facts
from recipe.engine import Batch, choose_device, evaluate, join_process_group, set_loudness
from recipe.model import check_image_size
from recipe.reporting import Progress

CALIBRATION_BINS = 15  # as Guo et al. 2017 take


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Attributes:
        summary: The content of ``evaluation.json``; accuracies, errors and confidences are in per cent.
        classes: The names of the model's outputs.
        confusion: ``confusion[t][p]`` counts the images of class t that were taken for class p.
    """

    summary: dict[str, Any]
    classes: tuple[str, ...]
    confusion: list[list[int]]


def per_class(classes: Sequence[str], confusion: list[list[int]]) -> list[dict[str, Any]]:
    """The classes that have images, the lowest accuracy first, each with the one it is most often taken for."""
    rows = []
    for place, (name, counts) in enumerate(zip(classes, confusion, strict=True)):
        wrong = [0 if other == place else times for other, times in enumerate(counts)]
        images, correct, times = sum(counts), counts[place], max(wrong)
        taken_for = classes[wrong.index(times)] if times else None
        if images:
            row = {"name": name, "images": images, "correct": correct, "accuracy": 100 * correct / images}
            rows.append(row | {"taken_for": taken_for, "times": times})
    return sorted(rows, key=lambda row: (row["accuracy"], -row["images"], row["name"]))


class Counts:
    """Confusion and calibration of this rank's share, added up on the device."""

    def __init__(self, classes: int, device: torch.device) -> None:
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64, device=device)
        # Of each bin of confidence: images, their confidences added up, and how many were right.
        self.bins = torch.zeros(CALIBRATION_BINS, 3, dtype=torch.float64, device=device)

    def add(self, logits: Tensor, batch: Batch) -> None:
        """Count a batch: logits (m, classes), fp32 at least. Samples of weight 0 do not count."""
        confidence, predicted = logits.double().softmax(1).max(1)
        classes, counted = len(self.confusion), batch.weights > 0
        pairs = (batch.labels * classes + predicted)[counted]
        self.confusion += torch.bincount(pairs, minlength=classes**2).view(classes, classes)
        # The bins are (0, 1/15], (1/15, 2/15] … as in the paper's equation 3.
        places = (confidence * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS) - 1
        rows = torch.stack([torch.ones_like(confidence), confidence, (predicted == batch.labels).double()], 1)
        self.bins.index_add_(0, places[counted], rows[counted])

    def calibration(self) -> tuple[float, float]:
        """Mean confidence and expected calibration error (Guo et al. 2017, equation 3) over all ranks, in per cent."""
        count = self.bins[:, 0].sum()
        gap = (self.bins[:, 2] - self.bins[:, 1]).abs().sum() / count
        return float(100 * self.bins[:, 1].sum() / count), float(100 * gap)


def measure(
    trained: Trained,
    data: str | None,
    *,
    image_size: int | None,
    micro_batch: int | None,
    workers: int,
    timeout: timedelta,
) -> Measured | None:
    """Evaluate on all ranks of the environment; the result on rank 0, None on the others.

    Raises:
        ValueError: The data cannot be read, or does not fit the model, or the ranks cannot meet.
    """
    set_loudness(verbose=False)
    device = choose_device("fp32")
    size = image_size or trained.plan.validation_image_size
    dataset, shown = open_data(trained, data, size)
    model = trained.build(device)
    check_image_size(model, f"--image-size {size}", size)
    store = None
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        try:
            store = meet(own_facts(None, device=device.type, data=f"{len(dataset):,} images"), timeout).group_store
        except MeetingError as error:
            raise ValueError(str(error)) from error
    join_process_group(device, timeout, store)
    micro_batch = micro_batch or trained.plan.micro_batch
    try:
        loader = validation_loader(
            trained,
            model,
            dataset,
            micro_batch=micro_batch,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            workers=workers,
        )
        counts = Counts(trained.num_classes, device)
        batches: Iterable[Batch] = loader.batches()
        if dist.get_rank() == 0:
            batches = _shown(batches, len(dataset), micro_batch * dist.get_world_size())
        result = evaluate(model, batches, device, counts.add)
        loader.close()
        for tensor in (counts.confusion, counts.bins):
            dist.all_reduce(tensor)
        bad_images: list[tuple[str, ...]] = [() for _ in range(dist.get_world_size())]
        dist.all_gather_object(bad_images, result.bad_images)
        if dist.get_rank() != 0:
            return None
        confidence, calibration_error = counts.calibration()
        classes, confusion = class_names(trained, dataset), counts.confusion.tolist()
        summary = {
            "model": trained.name,
            "data": shown,
            "image_size": size,
            "top1": result.top1,
            "top5": result.top5,
            "loss": result.loss,
            "count": result.count,
            "mean_confidence": confidence,
            "expected_calibration_error": calibration_error,
            "classes": per_class(classes, confusion),
            "bad_images": sorted(set().union(*bad_images)),
        }
        return Measured(summary, classes, confusion)
    finally:
        dist.destroy_process_group()


def _shown(batches: Iterable[Batch], images: int, images_at_once: int) -> Iterator[Batch]:
    """Pass the batches on, with a bar of how many of the images all ranks have done."""
    with Progress(images, "images") as progress:
        for batch in batches:
            yield batch
            progress.update(min(images, progress.done + images_at_once))


def open_data(trained: Trained, data: str | None, image_size: int) -> tuple[ImageDataset, str]:
    """The images to evaluate on, labelled by the places of the model's outputs, and what to call them.

    Raises:
        ValueError: There is none, or it has a class that the model does not know.
    """
    section, its_own = trained.plan.config.recipe.data, dict[str, Any]()
    common: dict[str, Any] = {"image_size": image_size, "crop": section.crop, "on_bad_image": "skip"}
    if data is None:
        if section.source == "digits":
            dataset: ImageDataset = open_datasets("digits", None, flip=False, seed=0, **common)[1]
            return dataset, "the digits' validation images"
        if section.path is None:
            raise ValueError(f"{trained.name} was trained on synthetic images; give --data DIR to evaluate on others")
        data, its_own = section.path, {"source": section.source, "validation_share": section.validation_share}
    dataset = open_validation(data, **common, **its_own)
    names, known = dataset.class_names, trained.classes
    if known is None:
        if len(names) != trained.num_classes:
            raise ValueError(
                f"{data} has {len(names)} classes, {trained.name} has {trained.num_classes} and does not name them; "
                "evaluate on a folder with the same classes"
            )
    elif unknown := [name for name in names if name not in known]:
        shown = ", ".join(map(repr, unknown[:5]))
        raise ValueError(
            f"{data} has classes that {trained.name} does not know: {shown}; its own are "
            f"{', '.join(map(repr, known[:5]))}{' …' if len(known) > 5 else ''}"
        )
    else:
        places = torch.tensor([known.index(name) for name in names])
        dataset.labels = places[dataset.labels]
    return dataset, data


def class_names(trained: Trained, dataset: ImageDataset) -> tuple[str, ...]:
    """The names of the model's outputs, as it knows them, or as the data does."""
    if trained.classes is not None:
        return trained.classes
    return tuple(dataset.class_names)
