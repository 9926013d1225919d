"""JPEGs decoded on the device, by nvJPEG through torchvision or by NVIDIA's DALI.

Workers read the files and draw their views; the main process has the views decoded.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import simplejpeg
import torch
from torch import Tensor

from recipe.data.augment import View, cut
from recipe.data.batch import HostBatch
from recipe.data.datasets import ImageDataset, Sample, Samples, collate
from recipe.data.decoding import UNREADABLE, jpeg_size
from recipe.data.sampler import PADDING, Keys

Decoder = Callable[[Sequence[Tensor], Sequence[View], int], Sequence[Tensor]]
"""Turns JPEGs, uint8 (bytes,) each, a view of each, and S into images on the device, uint8 (S, S, 3) each.

It raises a RuntimeError if it cannot decode one of them."""


class Encoded(NamedTuple):
    """The images of a batch of m samples."""

    content: Tensor
    """uint8, concatenated: a JPEG, or the pixels (S, S, 3) that a worker has decoded, for each sample"""
    sizes: Tensor
    """int64 (m,): the number of bytes of each"""
    views: Tensor
    """int64 (m, 9): a ``View`` for each, or zeros if a worker has decoded it"""
    epoch: int | None
    indices: Tensor
    """int64 (m,)"""


class EncodedImages(Samples):
    """The images of a data set, decoded by ``decoder``; the samples are the same apart from the decoders' differences.

    Workers decode everything that is not a plain JPEG, and the main process whatever the decoder rejects, both like the
    data set, which also decides what is a bad image. Both count as ``by_pil``.
    """

    waits_for_device = True

    def __init__(self, dataset: ImageDataset, decoder: Decoder, device: torch.device) -> None:
        self._dataset = dataset
        self.class_names, self.digest = dataset.class_names, dataset.digest
        self._decoder = decoder
        self._device = device

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, keys: Keys) -> HostBatch:
        epoch, indices = keys.epoch, torch.from_numpy(keys.indices)
        files = [self._file(index) for index in indices.tolist()]
        sizes = [plain_jpeg_size(file) or (0, 0) for file in files]
        plain = torch.tensor(sizes)[:, 0] > 0
        views = torch.zeros(len(indices), len(View._fields), dtype=torch.int64)
        views[plain] = self._dataset.views(epoch, indices[plain], torch.tensor(sizes)[plain])
        decoded = self._dataset.samples(epoch, indices[~plain].tolist())
        samples = []
        for index, file, view in zip(indices.tolist(), files, views.tolist(), strict=True):
            if any(view):
                content = torch.frombuffer(bytearray(file), dtype=torch.uint8)
                samples.append(Sample(content, int(self._dataset.labels[index]), mirrored=bool(View(*view).mirrored)))
            else:
                sample = next(decoded)
                samples.append(sample._replace(image=sample.image.flatten(), by_pil=sample.weight > 0))
        contents = [sample.image for sample in samples]
        lengths = torch.tensor([len(content) for content in contents])
        return collate(samples, Encoded(torch.cat(contents), lengths, views, epoch, indices))

    def _file(self, index: int) -> bytes:
        try:
            return b"" if index == PADDING else self._dataset.file(index)
        except UNREADABLE:
            return b""

    def on_device(self, batch: HostBatch) -> HostBatch:
        encoded: Encoded = batch.images
        contents = encoded.content.split(encoded.sizes.tolist())
        views = [View(*view) for view in encoded.views.tolist()]
        to_decode = [position for position, view in enumerate(views) if any(view)]
        size = self._dataset.sizes.at(encoded.epoch)
        decoded_images = self._decoded([contents[i] for i in to_decode], [views[i] for i in to_decode], size)
        decoded = dict(zip(to_decode, decoded_images, strict=True))
        images = []
        for position, content in enumerate(contents):
            image = decoded.get(position, content)
            if image is None:
                index = int(encoded.indices[position])
                (sample,) = self._dataset.samples(encoded.epoch, [index])
                image = sample.image
                batch.labels[position], batch.weights[position] = sample.label, sample.weight
                batch.mirrored[position] = sample.mirrored
                bad_images = [*batch.bad_images, sample.bad_image] if sample.bad_image else batch.bad_images
                batch = batch._replace(bad_images=bad_images, decoded_by_pil=batch.decoded_by_pil + 1)
            images.append(image.view(size, size, 3).to(self._device, non_blocking=True))
        return batch._replace(images=torch.stack(images))

    def _decoded(self, files: list[Tensor], views: list[View], size: int) -> list[Tensor | None]:
        """Return the views, with None for each file that the decoder rejects."""
        if not files:
            return []
        try:
            return list(self._decoder(files, views, size))
        except RuntimeError:
            # It does not say which file failed, and returns none of them.
            if len(files) == 1:
                return [None]
            half = len(files) // 2
            return self._decoded(files[:half], views[:half], size) + self._decoded(files[half:], views[half:], size)


def plain_jpeg_size(file: bytes) -> tuple[int, int] | None:
    """Return (height, width) of a YCbCr or grey JPEG that ends with its end marker, None for other files."""
    return jpeg_size(file, ("YCbCr", "Gray")) if file.endswith(b"\xff\xd9") else None


def open_decoder(name: Literal["gpu", "dali"], device: torch.device, *, threads: int) -> Decoder:
    """Return a decoder that has successfully decoded an image; ``threads`` is the number of CPU threads for DALI."""
    if name == "gpu" and device.type != "cuda":
        raise ValueError('recipe.data.decoder = "gpu": there is no CUDA GPU; use "cpu", or "dali"')
    file = simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8))
    decoder: Decoder
    try:
        if name == "gpu":
            # Deprecated since torchvision 0.29 in favour of torchcodec, which is not a dependency here.
            from torchvision.io import decode_jpeg

            decoder = NvJpeg(device, decode_jpeg)
        else:
            decoder = Dali(device, threads)
        decoder([torch.frombuffer(bytearray(file), dtype=torch.uint8)], [View(0, 0, 16, 16, 16, 16)], 16)
    except ImportError as error:
        remedy = "a different torchvision" if name == "gpu" else "nvidia-dali-cuda130"
        raise ValueError(f'recipe.data.decoder = "{name}": {error}; pip install {remedy}, or use "cpu"') from error
    except RuntimeError as error:
        problem = " ".join(str(error).split())
        raise ValueError(f'recipe.data.decoder = "{name}": it does not run here: {problem}; use "cpu"') from error
    return decoder


class NvJpeg:
    """Decodes with torchvision's nvJPEG, and crops and resizes with torch.

    nvJPEG repeats the chroma values of a subsampled JPEG, which libjpeg-turbo interpolates.
    """

    def __init__(self, device: torch.device, decode: Callable[..., list[Tensor]]) -> None:
        self._device, self._decode = device, decode

    def __call__(self, files: Sequence[Tensor], views: Sequence[View], image_size: int) -> list[Tensor]:
        # torchvision decodes on a stream of its own into memory of the current stream. It does not wait for work there
        # that still uses the memory or, after an error, for its own writes.
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        try:
            decoded = self._decode(list(files), mode="RGB", device=self._device)
        except RuntimeError:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            raise
        return [cut(planes.movedim(0, -1), view, image_size) for planes, view in zip(decoded, views, strict=True)]


class Dali:
    """Decodes only the box of a view with DALI, which interpolates chroma like libjpeg-turbo, and resizes it.

    Unlike PIL, it does not round between rows and columns, and it repeats the last pixel at the edge of a box where PIL
    ignores what is beyond it.
    """

    def __init__(self, device: torch.device, threads: int) -> None:
        self._device, self._threads = device, threads
        self._pipeline: Any = None
        self._largest_batch, self._image_size = 0, 0

    def __call__(self, files: Sequence[Tensor], views: Sequence[View], image_size: int) -> Sequence[Tensor]:
        from nvidia.dali.plugin.pytorch.torch_utils import to_torch_tensor

        if self._pipeline is None or len(files) > self._largest_batch or image_size != self._image_size:
            self._largest_batch, self._image_size = max(len(files), self._largest_batch), image_size
            self._pipeline = self._new_pipeline()
        inputs = {
            "files": [file.numpy() for file in files],
            "starts": [np.array(view[:2], np.int32) for view in views],
            "shapes": [np.array(view[2:4], np.int32) for view in views],
            "sizes": [np.array(view[4:6], np.float32) for view in views],
            "windows": [np.array(view[6:8], np.int32) for view in views],
        }
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        try:
            (output,) = self._pipeline.run(stream, **inputs)
        except RuntimeError:
            self._pipeline = None  # "Current pipeline object is no longer valid."
            raise
        images: Tensor = to_torch_tensor(output.as_tensor(), copy=True)
        return images.unbind()

    def _new_pipeline(self) -> Any:
        from nvidia.dali import Pipeline, fn, types

        on_gpu = self._device.type == "cuda"
        pipeline = Pipeline(
            self._largest_batch,
            num_threads=self._threads,
            device_id=torch.empty(0, device=self._device).device.index,  # None for a CPU
            prefetch_queue_depth=1,
        )
        with pipeline:
            files, starts, shapes, sizes, windows = (
                fn.external_source(name=name) for name in ("files", "starts", "shapes", "sizes", "windows")
            )
            boxes = fn.decoders.image_slice(
                files,
                start=starts,
                shape=shapes,
                axes=(0, 1),
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB,
                adjust_orientation=False,
                jpeg_fancy_upsampling=True,
            )
            resized = fn.resize(boxes, size=sizes, interp_type=types.INTERP_TRIANGULAR)
            square = (self._image_size, self._image_size)
            pipeline.set_outputs(
                fn.slice(resized, start=windows, shape=square, axes=(0, 1), out_of_bounds_policy="pad", fill_values=0)
            )
        return pipeline
