"""Throughput from JPEGs to training batches: the recipe versus torchvision's reference and timm, in one run.

The first part uses one thread. The pipelines take turns over the same files, one micro-batch at a time: read, decode,
the paper's augmentation (a random resized crop of ``--image-size``), and uint8 pixels ready to collate. torchvision and
timm also mirror half of the images; the recipe leaves mirroring and normalisation to the device. CPU time is measured,
so that other programs on the machine matter little. torchvision's reference (``references/classification`` with its PIL
backend) gets the recipe's crops, and the pixels are compared. timm draws its own crops, without the colour jitter that
it applies by default and the paper does not. Packs of the same files, made in a temporary folder by ``recipe pack``,
are measured too: one of the originals, one of JPEGs for each of ``--short-sides``, and one of raw pixels for each of
``--raw-short-sides``.

The second part runs whole loaders with worker processes, the recipe's and a DataLoader of torchvision's reference, in
turn, on the images repeated: a pass of a few batches would measure its start and end, when workers are idle. Besides
images per second, it reports the main process's own cost per image, which workers cannot take over and
which limits any number of them: taking a batch that a worker collated (and pinning it for a GPU), and getting it onto
the device, mirrored and normalised, which a CPU does itself and a GPU does asynchronously. ``--decoders`` adds loaders
that decode JPEGs on the device, and the difference of their pixels from the workers', in training and validation.
Without a GPU, libjpeg-turbo stands in for nvJPEG: it is set to repeat the subsampled chroma.

    python -m benchmarks.input_pipeline --images DIR --json benchmarks/results/input_pipeline_cpu.json

DIR has one folder per class; without it, JPEGs are generated, and the ratios apply to those. With ``--device cuda`` the
defaults suit a GPU: more images, one worker per core but one, and both decoders.
"""

import argparse
import contextlib
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import pil_loader
from torchvision.transforms import functional

from benchmarks.loading import Repeated, one_rank_loader
from benchmarks.report import add_device, context, heading, new_parser, parse_device, positive, publish, say
from recipe.commands.pack.command import pack
from recipe.data import (
    Decoder,
    EncodedImages,
    ImageDataset,
    ImageFiles,
    Keys,
    NvJpeg,
    PackedImages,
    Samples,
    View,
    draw_views,
    index_folder,
    open_decoder,
    open_pack,
    read_header,
)

SEED = 0
ONE_BY_ONE = 256  # images that are measured on one thread, and that decoders are compared on
BATCHES_PER_WORKER = 8  # of a loader's pass, whose start and end, with idle workers, must not matter
PREDICTED_WORKERS = 16
# ImageNet's usual size and density: 500 × 375 pixels in about 100 kB.
MADE_UP = {"width": 500, "height": 375, "quality": 92, "classes": 2}


def main(words: Sequence[str]) -> int:
    """Measure; print a table and, with ``--json``, write it and the JSON."""
    before = context("benchmarks.input_pipeline", words, ("torch", "torchvision", "timm", "pillow", "simplejpeg"))
    arguments = parse_arguments(words)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.images
        if folder is None:
            folder = Path(temporary) / "made_up"
            say(f"generating {arguments.made_up:,} images")
            make_images(folder, arguments.made_up)
        listing = ImageFolder(str(folder))
        decoders, missing = open_decoders(arguments)
        if "dali" in decoders:
            before["versions"]["nvidia-dali-cuda130"] = version("nvidia-dali-cuda130")
        packs = make_packs(folder, Path(temporary) / "packs", arguments.short_sides, arguments.raw_short_sides)
        report = before | {
            "settings": {
                "images": len(listing),
                "made_up": arguments.images is None,
                "image_size": arguments.image_size,
                "rounds": arguments.rounds,
                "micro_batch": arguments.micro_batch,
                "device": str(arguments.device),
            },
            "one_thread": one_thread(listing, packs, arguments.image_size, arguments.micro_batch, arguments.rounds),
            "decoders_missing": missing,
            "decoders": {
                name: differences(data_set(listing, arguments.image_size), decoder, arguments.device)
                for name, decoder in (decoders | stand_ins(missing)).items()
            },
            "loaders": [
                loaders(
                    listing,
                    {name: path for name, path in packs.items() if name.startswith("raw")},
                    decoders,
                    arguments.image_size,
                    arguments.micro_batch,
                    workers,
                    arguments.rounds,
                    arguments.device,
                )
                for workers in arguments.workers
            ],
        }
    publish(report, format_report(report), arguments.json)
    return 0


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; the defaults depend on the device."""
    parser = new_parser("benchmarks.input_pipeline", __doc__)
    on_gpu, cores = parse_device(parser.prog, words).type == "cuda", len(os.sched_getaffinity(0))

    def several(option: str, on_cpu: list[int], on_a_gpu: list[int], meaning: str, metavar: str | None = None) -> None:
        default = on_a_gpu if on_gpu else on_cpu
        shown = f"{meaning} (default: {' '.join(map(str, default))})"
        parser.add_argument(option, type=positive, nargs="+", default=default, metavar=metavar, help=shown)

    parser.add_argument("--images", type=Path, help="folder with one folder of images per class (default: generate)")
    parser.add_argument(
        "--made-up",
        type=positive,
        default=256 if on_gpu else 100,
        metavar="N",
        help="number of images to generate (default: %(default)s)",
    )
    parser.add_argument("--image-size", type=positive, default=224, help="pixels per side (default: %(default)s)")
    several("--short-sides", [400, 352, 320], [352], "one pack each", "PIXELS")
    several("--raw-short-sides", [256], [256], "one pack of raw pixels each", "PIXELS")
    several("--workers", [1, 2], [max(1, cores - 1)], "one measurement each")
    parser.add_argument(
        "--rounds", type=positive, default=2 if on_gpu else 5, help="passes over the images (default: %(default)s)"
    )
    parser.add_argument(
        "--micro-batch", type=positive, default=64 if on_gpu else 32, help="images per batch (default: %(default)s)"
    )
    parser.add_argument(
        "--decoders",
        nargs="+",
        choices=["gpu", "dali"],
        default=["gpu", "dali"] if on_gpu else [],
        help=f"decoders whose loaders are measured as well (default: {'gpu dali' if on_gpu else 'none'})",
    )
    add_device(parser, "where the loaders' batches go")
    arguments = parser.parse_args(words)
    try:
        if arguments.images is not None:
            ImageFolder(arguments.images)
    except OSError as error:
        parser.error(f"--images {arguments.images}: {error.strerror or error}; a folder of images per class expected")
    return arguments


def make_images(folder: Path, count: int) -> None:
    """Write JPEGs of smooth shapes with a little noise, about as large as photographs."""
    rng = np.random.default_rng(SEED)
    size = (MADE_UP["width"], MADE_UP["height"])
    for number in range(count):
        coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
        pixels = np.clip(smooth + rng.normal(0, 10, smooth.shape), 0, 255).astype(np.uint8)
        path = folder / f"class{number % MADE_UP['classes']}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=MADE_UP["quality"])


def make_packs(
    folder: Path, destination: Path, short_sides: Sequence[int], raw_short_sides: Sequence[int]
) -> dict[str, Path]:
    """Pack the originals and each short side, with the same images as training and validation data."""
    both = destination / "images"
    both.mkdir(parents=True)
    for part in ("train", "val"):
        (both / part).symlink_to(folder.resolve(), target_is_directory=True)
    kinds = {"pack": (0, False)} | {f"pack {side}": (side, False) for side in short_sides}
    kinds |= {f"raw pack {side}": (side, True) for side in raw_short_sides}
    for name, (short_side, raw) in kinds.items():
        with contextlib.redirect_stdout(io.StringIO()):  # hides how to train from a pack that is only temporary
            pack(both, destination / name, short_side, raw=raw)
        training = read_header(destination / name).train  # validation is the same
        say(f"{name}: {training.resized:,} of {training.images:,} images resized")
    return {name: destination / name for name in kinds}


def packed(path: Path, image_size: int) -> PackedImages:
    """The recipe's data set on a pack."""
    settings: dict[str, Any] = {"image_size": image_size, "crop": "random_resized", "flip": True, "seed": SEED}
    return open_pack(path, **settings, on_bad_image="stop")[0]


def data_set(listing: ImageFolder, image_size: int) -> ImageFiles:
    """The recipe's data set on the folder."""
    folder = index_folder(str(listing.root))
    return ImageFiles(folder, image_size=image_size, crop="random_resized", flip=True, seed=SEED, on_bad_image="stop")


class Reference(Dataset[Tensor]):
    """torchvision's reference with the recipe's crops, drawn in advance; PIL throughout, uint8 (3, S, S)."""

    def __init__(self, listing: ImageFolder, image_size: int) -> None:
        self.paths = [path for path, _ in listing.samples]
        self.size = [image_size, image_size]
        sizes = []
        for path in self.paths:
            with Image.open(path) as image:
                sizes.append((image.height, image.width))
        self.sizes = torch.tensor(sizes)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the crops of an epoch."""
        indices = torch.arange(len(self))
        settings: dict[str, Any] = {"image_size": self.size[0], "crop": "random_resized", "flip": True}
        self.views = [View(*view) for view in draw_views(SEED, epoch, indices, self.sizes, **settings).tolist()]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        view = self.views[index]
        image = functional.resized_crop(pil_loader(self.paths[index]), *view[:4], self.size)
        if view.mirrored:
            image = functional.hflip(image)
        pixels: Tensor = functional.pil_to_tensor(image)
        return pixels


def one_thread(
    listing: ImageFolder, packs: dict[str, Path], image_size: int, micro_batch: int, rounds: int
) -> dict[str, Any]:
    """Images per CPU second of each pipeline, interleaved by micro-batch, and their pixel differences.

    ``packs`` maps names to paths.
    """
    count, reference = min(len(listing), ONE_BY_ONE), Reference(listing, image_size)
    ours: dict[str, ImageDataset] = {"recipe": data_set(listing, image_size)}
    ours |= {name: packed(path, image_size) for name, path in packs.items()}
    transform = create_transform(image_size, is_training=True, color_jitter=0.0, use_prefetcher=True)

    pipelines: dict[str, Callable[[int, Sequence[int]], list[Any]]] = {
        "torchvision": lambda epoch, indices: [reference[index] for index in indices],
        "timm": lambda epoch, indices: [transform(pil_loader(reference.paths[index])) for index in indices],
    }
    for name, images in ours.items():
        pipelines[name] = lambda epoch, indices, images=images: list(images.samples(epoch, indices))  # type: ignore[misc]
    seconds: dict[str, list[float]] = {name: [0.0] * rounds for name in pipelines}
    mean_difference, largest_difference = dict.fromkeys(ours, 0.0), dict.fromkeys(ours, 0)
    for epoch in range(-1, rounds):  # the first pass warms up the page cache and lookup tables
        say(f"one thread: pass {epoch + 2} of {rounds + 1}")
        reference.set_epoch(epoch + 1)
        for first in range(0, count, micro_batch):
            indices, views = range(first, min(first + micro_batch, count)), {}
            for name, view in pipelines.items():
                started = time.thread_time()
                views[name] = view(epoch + 1, indices)
                if epoch >= 0:
                    seconds[name][epoch] += time.thread_time() - started
            for name in ours:
                for sample, theirs in zip(views[name], views["torchvision"], strict=True):
                    ours_now = sample.image.flip(1) if sample.mirrored else sample.image
                    difference = (ours_now.movedim(-1, 0).int() - theirs.int()).abs()
                    mean_difference[name] += float(difference.float().mean()) / (count * (rounds + 1))
                    largest_difference[name] = max(largest_difference[name], int(difference.max()))
    return {
        "images_per_second": {name: count / median(of_rounds) for name, of_rounds in seconds.items()},
        "ratio": {
            name: median(a / b for a, b in zip(seconds["torchvision"], of_rounds, strict=True))
            for name, of_rounds in seconds.items()
        },
        "mean_difference": mean_difference,
        "largest_difference": largest_difference,
    }


def open_decoders(arguments: argparse.Namespace) -> tuple[dict[str, Decoder], dict[str, str]]:
    """The decoders that run here, and the reasons why the others do not."""
    decoders, missing = {}, {}
    for name in arguments.decoders:
        try:
            decoders[name] = open_decoder(name, arguments.device, threads=max(arguments.workers))
        except ValueError as error:
            missing[name] = str(error)
    return decoders, missing


def stand_ins(missing: dict[str, str]) -> dict[str, Decoder]:
    """Without a GPU, a stand-in that applies nvJPEG's chroma upsampling with libjpeg-turbo."""

    def repeat_colours(files: list[Tensor], mode: str, device: torch.device) -> list[Tensor]:
        decoded = (simplejpeg.decode_jpeg(file.numpy().tobytes(), fastupsample=True) for file in files)
        return [torch.from_numpy(pixels).movedim(-1, 0) for pixels in decoded]

    return {"stand-in for gpu": NvJpeg(torch.device("cpu"), repeat_colours)} if "gpu" in missing else {}


def differences(images: ImageFiles, decoder: Decoder, device: torch.device) -> dict[str, dict[str, float]]:
    """Differences in grey levels between the pixels of ``decoder`` and the workers', in training and validation."""
    decoded = EncodedImages(images, decoder, device)
    apart = {}
    for part, epoch in {"training": 0, "validation": None}.items():
        means, most = [], 0
        for index in range(min(len(images), ONE_BY_ONE)):
            keys = Keys(epoch, np.array([index]))
            ours = decoded.on_device(decoded[keys]).images.cpu()
            levels = (ours.int() - images[keys].images.int()).abs()
            means.append(float(levels.float().mean()))
            most = max(most, int(levels.max()))
        apart[part] = {"mean": sum(means) / len(means), "mean_of_worst_image": max(means), "most": most}
    return apart


def loaders(
    listing: ImageFolder,
    packs: dict[str, Path],
    decoders: dict[str, Decoder],
    image_size: int,
    micro_batch: int,
    workers: int,
    rounds: int,
    device: torch.device,
) -> dict[str, Any]:
    """Images per second of whole loaders, in turn, and the main process's CPU time per image."""
    images = data_set(listing, image_size)
    ours: dict[str, Samples] = {"recipe": images}
    ours |= {f"recipe, {name}": packed(path, image_size) for name, path in packs.items()}
    ours |= {f"recipe, {name}": EncodedImages(images, d, device) for name, d in decoders.items()}
    at_least = BATCHES_PER_WORKER * workers * micro_batch
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    recipes = {
        name: one_rank_loader(Repeated(samples, at_least), micro_batch, device=device, dtype=dtype, workers=workers)
        for name, samples in ours.items()
    }
    repeated: ConcatDataset[Tensor] = ConcatDataset([Reference(listing, image_size)] * -(-at_least // len(listing)))
    theirs: DataLoader[Tensor] = DataLoader(
        repeated, micro_batch, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=True
    )
    passes: dict[str, Callable[[int], Iterator[Any]]] = {"torchvision": lambda epoch: iter(theirs)}
    for name, loader in recipes.items():
        passes[name] = loader.epoch
        passes[f"{name}, taken"] = lambda epoch, loader=loader: loader.host_batches()  # type: ignore[misc]
    images_per_second: dict[str, list[float]] = {name: [] for name in passes}
    main_process: dict[str, list[float]] = {name: [] for name in passes}
    count = len(repeated) // micro_batch * micro_batch
    for epoch in range(rounds + 1):
        say(f"loaders with {workers} workers: pass {epoch + 1} of {rounds + 1}")
        for name, one_pass in passes.items():
            started, cpu = time.perf_counter(), time.process_time()
            for _ in one_pass(epoch):
                pass
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if epoch:  # the first one starts the workers
                images_per_second[name].append(count / (time.perf_counter() - started))
                main_process[name].append((time.process_time() - cpu) / count)
    for loader in recipes.values():
        loader.close()
    return {
        "workers": workers,
        "images_per_second": {name: median(values) for name, values in images_per_second.items()},
        "main_process_seconds_per_image": {name: median(values) for name, values in main_process.items()},
    }


def predicted(report: dict[str, Any]) -> float:
    """Images per second with one core per worker and one for the main process: the lower of their two limits."""
    per_core: float = report["one_thread"]["images_per_second"]["recipe"]
    main_process = max(case["main_process_seconds_per_image"]["recipe, taken"] for case in report["loaders"])
    return min(PREDICTED_WORKERS * per_core, 1 / main_process)


def format_report(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    settings, alone = report["settings"], report["one_thread"]
    origin = "generated, 500 × 375" if settings["made_up"] else "real"
    lines = [
        *heading("From JPEGs to training batches", report),
        f"{settings['images']} JPEGs ({origin}), {settings['image_size']} px, {settings['rounds']} passes, all files "
        "in the page cache. Read, decode, random resized crop, uint8; torchvision and timm also mirror half "
        "of them, which the recipe leaves to the device.",
        "",
        "| on one thread | images per CPU second | ÷ torchvision | grey levels from torchvision: mean | max |",
        "|---|---|---|---|---|",
    ]
    names = {
        "torchvision": "torchvision's reference (PIL)",
        "timm": "timm, without jitter (PIL)",
        "recipe": "recipe",
        "pack": "recipe, from a pack of the originals",
    }
    for name, speed in alone["images_per_second"].items():
        kind, _, short_side = name.rpartition("pack ")
        label = names.get(name) or f"recipe, from a {kind}pack of short side {short_side}"
        apart = ["different crops" if name == "timm" else "0"] * 2
        if name in alone["mean_difference"]:
            apart = [f"{alone['mean_difference'][name]:.3f}", str(alone["largest_difference"][name])]
        lines.append(f"| {label} | {speed:,.0f} | {alone['ratio'][name]:.2f} | {' | '.join(apart)} |")
    lines += [
        "",
        f"| loader, micro-batch {settings['micro_batch']} | workers | images/s | main process, CPU µs per image: "
        "taking it | getting it onto the device |",
        "|---|---|---|---|---|",
    ]
    where = "fp32 on the CPU" if settings["device"] == "cpu" else "fp16 on the GPU"
    for case in report["loaders"]:
        speed, cost = case["images_per_second"], case["main_process_seconds_per_image"]
        lines.append(
            f"| DataLoader of torchvision's reference, uint8 | {case['workers']} | {speed['torchvision']:,.0f} | "
            f"{1e6 * cost['torchvision']:.0f} | not done |"
        )
        for name in speed:
            if f"{name}, taken" in cost:
                take = 1e6 * cost[f"{name}, taken"]
                lines.append(
                    f"| {name}, {where} | {case['workers']} | {speed[name]:,.0f} | {take:.0f} | "
                    f"{max(0.0, 1e6 * cost[name] - take):.0f} |"
                )
    if report["decoders"]:
        lines += [
            "",
            "| decoder | views | grey levels from the workers: mean | mean of the worst image | max |",
            "|---|---|---|---|---|",
        ]
    for name, parts in report["decoders"].items():
        for part, apart in parts.items():
            lines.append(
                f"| {name} | {part} | {apart['mean']:.3f} | {apart['mean_of_worst_image']:.3f} | {apart['most']} |"
            )
    for problem in report["decoders_missing"].values():
        lines += ["", f"Not measured: {problem}."]
    return "\n".join(
        [
            *lines,
            "",
            f"Predicted for {PREDICTED_WORKERS} workers with one core each: {predicted(report):,.0f} images per second "
            f"into a GPU, the lower of {PREDICTED_WORKERS} times one thread's speed and the main process's limit. "
            "**Not measured.**",
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
