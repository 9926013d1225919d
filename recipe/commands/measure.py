"""Runs a trained model on validation data for ``evaluate``: accuracy, confusion and calibration."""

import os
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from recipe.commands.trained import Trained, validation_loader
from recipe.data import ImageDataset, open_datasets, open_validation
from recipe.distributed import MeetingError, meet, own_facts
from recipe.engine import Batch, choose_device, evaluate, join_process_group, set_log_level
from recipe.model import check_image_size
from recipe.reporting import Progress

TIMEOUT = timedelta(minutes=10)  # for the rendezvous and for each collective
CALIBRATION_BINS = 15  # as in Guo et al. 2017


class Measured(NamedTuple):
    """The result of an evaluation.

    ``summary`` is the content of ``evaluation.json``, with accuracies, errors and confidences in per cent;
    ``confusion[t][p]`` counts the images of class t that were predicted as class p.
    """

    summary: dict[str, Any]
    classes: Sequence[str]
    confusion: list[list[int]]


def per_class(classes: Sequence[str], confusion: list[list[int]]) -> list[dict[str, Any]]:
    """A row per class that has images, lowest accuracy first, with the class it is most often mistaken for."""
    rows = []
    for place, (name, counts) in enumerate(zip(classes, confusion, strict=True)):
        wrong = [0 if other == place else times for other, times in enumerate(counts)]
        images, correct, times = sum(counts), counts[place], max(wrong)
        taken_for = classes[wrong.index(times)] if times else None
        if images:
            row = {"name": name, "images": images, "correct": correct, "accuracy": 100 * correct / images}
            rows.append(row | {"taken_for": taken_for, "times": times})
    return sorted(rows, key=lambda row: (row["accuracy"], -row["images"], row["name"]))


def calibration(confidence: NDArray[np.float64], is_correct: NDArray[np.bool_]) -> tuple[float, float]:
    """Mean confidence and expected calibration error (Guo et al. 2017, equation 3) in per cent."""
    bins = np.ceil(np.nan_to_num(confidence) * CALIBRATION_BINS).astype(int)  # (0, 1/15], (1/15, 2/15] …, as there
    gaps = np.bincount(bins, weights=is_correct - confidence)
    return float(100 * confidence.mean()), float(100 * np.abs(gaps).sum() / len(confidence))


def measure(
    trained: Trained, data: str | None, image_size: int | None, micro_batch: int | None, workers: int
) -> Measured | None:
    """Evaluate on all ranks; return the result on rank 0, None on the others.

    Raises:
        ValueError: the data cannot be read or does not fit the model, or the rendezvous fails.
    """
    set_log_level(verbose=False)
    device = choose_device("fp32")
    size = image_size or trained.plan.validation_image_size
    dataset, shown = open_data(trained, data, size)
    model = trained.build(device)
    check_image_size(model, f"--image-size {size}", size)
    store = None
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        try:
            store = meet(own_facts(None, device=device.type, data=f"{len(dataset):,} images"), TIMEOUT).group_store
        except MeetingError as error:
            raise ValueError(str(error)) from error
    join_process_group(device, TIMEOUT, store)
    rank, world_size, micro_batch = dist.get_rank(), dist.get_world_size(), micro_batch or trained.plan.micro_batch
    seen: list[Tensor] = []

    def observe(logits: Tensor, batch: Batch) -> None:
        confidence, predicted = logits.double().softmax(1).max(1)
        seen.append(torch.stack([batch.labels.double(), predicted.double(), confidence])[:, batch.weights > 0])

    try:
        loader = validation_loader(
            trained, model, dataset, micro_batch=micro_batch, rank=rank, world_size=world_size, workers=workers
        )
        batches: Iterable[Batch] = loader.batches()
        if rank == 0:
            batches = _with_bar(batches, len(dataset), micro_batch * world_size)
        result = evaluate(model, batches, device, observe)
        loader.close()
        gathered: list[Any] = [None] * world_size
        dist.all_gather_object(gathered, (torch.cat(seen, 1).cpu().numpy(), result.bad_images))
        if rank != 0:
            return None
        of_ranks, bad_images = zip(*gathered, strict=True)
        labels, predicted, confidence = np.concatenate(of_ranks, 1)
        mean_confidence, calibration_error = calibration(confidence, labels == predicted)
        classes, count = trained.classes or dataset.class_names, trained.num_classes
        pairs = (labels * count + predicted).astype(int)
        confusion = np.bincount(pairs, minlength=count**2).reshape(count, count).tolist()
        summary = {
            "model": trained.name,
            "data": shown,
            "image_size": size,
            "top1": result.top1,
            "top5": result.top5,
            "loss": result.loss,
            "count": result.count,
            "mean_confidence": mean_confidence,
            "expected_calibration_error": calibration_error,
            "classes": per_class(classes, confusion),
            "bad_images": sorted(set().union(*bad_images)),
        }
        return Measured(summary, classes, confusion)
    finally:
        dist.destroy_process_group()


def _with_bar(batches: Iterable[Batch], images: int, images_at_once: int) -> Iterator[Batch]:
    """The same batches, with a progress bar over the images of all ranks."""
    with Progress(images, "images") as progress:
        for batch in batches:
            yield batch
            progress.update(min(images, progress.done + images_at_once))


def open_data(trained: Trained, data: str | None, image_size: int) -> tuple[ImageDataset, str]:
    """The dataset to evaluate on, with labels that index the model's outputs, and a name for it."""
    section = trained.plan.config.recipe.data
    options: dict[str, Any] = {"image_size": image_size, "crop": section.crop, "on_bad_image": "skip"}
    if data is None:
        if section.source == "digits":
            # They are enlarged once, to the largest size, and resized from there.
            options |= {"image_size": section.image_size, "validation_image_size": image_size}
            dataset: ImageDataset = open_datasets("digits", None, flip=False, seed=0, **options)[1]
            return dataset, "the digits' validation images"
        if section.path is None:
            raise ValueError(f"{trained.name} was trained on synthetic images; name images to evaluate on by --data")
        data, options = section.path, options | section.model_dump(include={"source", "validation_share"})
    dataset = open_validation(data, **options)
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
            f"{data} has classes that {trained.name} does not know: {shown}; it knows "
            f"{', '.join(map(repr, known[:5]))}{' …' if len(known) > 5 else ''}"
        )
    else:
        dataset.labels = torch.tensor([known.index(name) for name in names])[dataset.labels]
    return dataset, data
