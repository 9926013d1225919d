"""JPEGs that the device decodes: workers read them and draw their views, the main process has the views made there."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from recipe.data.augment import View
from recipe.data.batch import HostBatch
from recipe.data.datasets import ImageDataset, Key, Sample, Samples
from recipe.data.decoding import plain_jpeg_size
from recipe.data.sampler import PADDING

Decoder = Callable[[Sequence[Tensor], Sequence[View]], Sequence[Tensor]]
"""From JPEGs, uint8 (bytes,) each, and what is seen of each to uint8 (S, S, 3) each, on the device.

It raises a RuntimeError where it does not take one of them."""

_READY = View(0, 0, 0, 0, 0, 0)
"""Of what a worker has decoded and cut."""


class Encoded(NamedTuple):
    """``Sample.image``; of a batch, all of them one behind the other."""

    content: Tensor
    """uint8 (bytes,): a JPEG, or the pixels (S, S, 3) that a worker made."""
    sizes: Tensor
    """int64 (1,), or (m,): bytes of the content."""
    keys: Tensor
    """int64 (1, 2): epoch, or -1 for validation, and index."""
    views: Tensor
    """int64 (1, 9): the ``View``."""


class EncodedImages(Samples):
    """The images of a data set, decoded by ``decoder``: the same samples, but for what decoders differ in.

    Workers themselves decode what is no plain JPEG, as the data set does; so does the main process what the decoder
    refuses. Both are counted as ``by_pil``, and it is the data set that judges what is a bad image.
    """

    def __init__(self, dataset: ImageDataset, decoder: Decoder, device: torch.device) -> None:
        self._dataset = dataset
        self.class_names = dataset.class_names
        self._decoder = decoder
        self._device = device

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, key: Key) -> Sample:
        epoch, index = (-1, key) if isinstance(key, int) else key
        try:
            file = b"" if key == PADDING else self._dataset.file(index)
        except OSError:
            file = b""
        if size := plain_jpeg_size(file):
            view = self._dataset.view(key, *size)
            content = torch.frombuffer(bytearray(file), dtype=torch.uint8)
            sample = Sample(None, int(self._dataset.labels[index]), 1.0, view.mirrored)
        else:
            view, sample = _READY, self._dataset[key]
            content = sample.image.flatten()
            sample = sample._replace(by_pil=sample.weight > 0)
        place = torch.tensor([len(content)]), torch.tensor([[epoch, index]]), torch.tensor([view], dtype=torch.int64)
        return sample._replace(image=Encoded(content, *place))

    def together(self, images: list[Encoded]) -> Encoded:
        return Encoded(*(torch.cat(parts) for parts in zip(*images, strict=True)))

    def on_device(self, batch: HostBatch) -> HostBatch:
        encoded: Encoded = batch.images
        contents = encoded.content.split(encoded.sizes.tolist())
        views = [View(*view) for view in encoded.views.tolist()]
        left = [place for place, view in enumerate(views) if view != _READY]
        decoded = dict(zip(left, self._decoded([contents[i] for i in left], [views[i] for i in left]), strict=True))
        images = []
        for place, content in enumerate(contents):
            image = decoded.get(place, content)
            if image is None:
                epoch, index = encoded.keys[place].tolist()
                sample = self._dataset[index if epoch < 0 else (epoch, index)]
                image = sample.image
                batch.labels[place], batch.weights[place] = sample.label, sample.weight
                batch.mirrored[place] = sample.mirrored
                bad_images = [*batch.bad_images, sample.bad_image] if sample.bad_image else batch.bad_images
                batch = batch._replace(bad_images=bad_images, decoded_by_pil=batch.decoded_by_pil + 1)
            square = image.view(self._dataset.image_size, self._dataset.image_size, 3)
            images.append(square.to(self._device, non_blocking=True))
        return batch._replace(images=torch.stack(images))

    def _decoded(self, files: list[Tensor], views: list[View]) -> list[Tensor | None]:
        """The views, None for each that the decoder refuses."""
        if not files:
            return []
        try:
            return list(self._decoder(files, views))
        except RuntimeError:
            # It names none and gives none.
            if len(files) == 1:
                return [None]
            half = len(files) // 2
            return self._decoded(files[:half], views[:half]) + self._decoded(files[half:], views[half:])
