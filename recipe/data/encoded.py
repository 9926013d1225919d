"""JPEGs that the device decodes: workers read them and draw their views, the main process has the views made there."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from recipe.data.augment import View
from recipe.data.batch import HostBatch
from recipe.data.datasets import ImageDataset, Sample, Samples, collate
from recipe.data.decoding import plain_jpeg_size
from recipe.data.sampler import PADDING, Keys

Decoder = Callable[[Sequence[Tensor], Sequence[View], int], Sequence[Tensor]]
"""From JPEGs, uint8 (bytes,) each, what is seen of each, and S to uint8 (S, S, 3) each, on the device.

It raises a RuntimeError where it does not take one of them."""


class Encoded(NamedTuple):
    """The images of a batch of m."""

    content: Tensor
    """uint8: of each, one behind the other, a JPEG or the pixels (S, S, 3) that a worker made"""
    sizes: Tensor
    """int64 (m,): bytes of the contents"""
    views: Tensor
    """int64 (m, 9): each a ``View``, or zeros for what a worker has made"""
    epoch: int | None
    """as in ``Keys``"""
    indices: Tensor
    """int64 (m,): likewise"""


class EncodedImages(Samples):
    """The images of a data set, decoded by ``decoder``: the same samples, but for what decoders differ in.

    Workers themselves decode what is no plain JPEG, as the data set does; so does the main process what the decoder
    refuses. Both are counted as ``by_pil``, and it is the data set that judges what is a bad image.
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
        made = self._dataset.samples(epoch, indices[~plain].tolist())
        samples = []
        for index, file, view in zip(indices.tolist(), files, views.tolist(), strict=True):
            if any(view):
                content = torch.frombuffer(bytearray(file), dtype=torch.uint8)
                samples.append(Sample(content, int(self._dataset.labels[index]), mirrored=bool(View(*view).mirrored)))
            else:
                sample = next(made)
                samples.append(sample._replace(image=sample.image.flatten(), by_pil=sample.weight > 0))
        contents = [sample.image for sample in samples]
        lengths = torch.tensor([len(content) for content in contents])
        return collate(samples, Encoded(torch.cat(contents), lengths, views, epoch, indices))

    def _file(self, index: int) -> bytes:
        try:
            return b"" if index == PADDING else self._dataset.file(index)
        except OSError:
            return b""

    def on_device(self, batch: HostBatch) -> HostBatch:
        encoded: Encoded = batch.images
        contents = encoded.content.split(encoded.sizes.tolist())
        views = [View(*view) for view in encoded.views.tolist()]
        left = [place for place, view in enumerate(views) if any(view)]
        size = self._dataset.sizes.at(encoded.epoch)
        made = self._decoded([contents[i] for i in left], [views[i] for i in left], size)
        decoded = dict(zip(left, made, strict=True))
        images = []
        for place, content in enumerate(contents):
            image = decoded.get(place, content)
            if image is None:
                index = int(encoded.indices[place])
                (sample,) = self._dataset.samples(encoded.epoch, [index])
                image = sample.image
                batch.labels[place], batch.weights[place] = sample.label, sample.weight
                batch.mirrored[place] = sample.mirrored
                bad_images = [*batch.bad_images, sample.bad_image] if sample.bad_image else batch.bad_images
                batch = batch._replace(bad_images=bad_images, decoded_by_pil=batch.decoded_by_pil + 1)
            images.append(image.view(size, size, 3).to(self._device, non_blocking=True))
        return batch._replace(images=torch.stack(images))

    def _decoded(self, files: list[Tensor], views: list[View], size: int) -> list[Tensor | None]:
        """The views, None for each that the decoder refuses."""
        if not files:
            return []
        try:
            return list(self._decoder(files, views, size))
        except RuntimeError:
            # It names none and gives none.
            if len(files) == 1:
                return [None]
            half = len(files) // 2
            return self._decoded(files[:half], views[:half], size) + self._decoded(files[half:], views[half:], size)
