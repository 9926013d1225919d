"""What decodes JPEGs other than the workers' simplejpeg: nvJPEG by way of torchvision, and NVIDIA's DALI."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import simplejpeg
import torch
from torch import Tensor

from recipe.data.augment import View, cut
from recipe.data.encoded import Decoder


def open_decoder(name: Literal["gpu", "dali"], device: torch.device, *, threads: int) -> Decoder:
    """Return a decoder that has decoded a first image; ``threads`` of this process are for DALI."""
    if name == "gpu" and device.type != "cuda":
        raise ValueError('recipe.data.decoder = "gpu": there is no CUDA GPU; write "cpu", or "dali"')
    file = simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8))
    decoder: Decoder
    try:
        if name == "gpu":
            # Deprecated since torchvision 0.29, in favour of torchcodec, which is no dependency here.
            from torchvision.io import decode_jpeg

            decoder = NvJpeg(device, decode_jpeg)
        else:
            decoder = Dali(device, threads)
        decoder([torch.frombuffer(bytearray(file), dtype=torch.uint8)], [View(0, 0, 16, 16, 16, 16)], 16)
    except ImportError as error:
        remedy = "another torchvision" if name == "gpu" else "nvidia-dali-cuda130"
        raise ValueError(f'recipe.data.decoder = "{name}": {error}; pip install {remedy}, or write "cpu"') from error
    except RuntimeError as error:
        problem = " ".join(str(error).split())
        raise ValueError(f'recipe.data.decoder = "{name}": it does not run here: {problem}; write "cpu"') from error
    return decoder


class NvJpeg:
    """torchvision's nvJPEG decodes, torch cuts and resizes.

    Where a JPEG has fewer pixels of colour than of brightness, each is repeated; libjpeg-turbo interpolates.
    """

    def __init__(self, device: torch.device, decode: Callable[..., list[Tensor]]) -> None:
        self._device, self._decode = device, decode

    def __call__(self, files: Sequence[Tensor], views: Sequence[View], image_size: int) -> list[Tensor]:
        # torchvision decodes on a stream of its own, into memory of the current one: it waits neither for what that
        # still does with it, nor after an error for what is still written into it.
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
    """DALI decodes the box alone, with colours as libjpeg-turbo interpolates them, and resizes it.

    It does not round between rows and columns, and at the rim repeats the last pixel where PIL leaves out what is
    beyond it.
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
            (views_made,) = self._pipeline.run(stream, **inputs)
        except RuntimeError:
            self._pipeline = None  # "Current pipeline object is no longer valid."
            raise
        made: Tensor = to_torch_tensor(views_made.as_tensor(), copy=True)
        return made.unbind()

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
