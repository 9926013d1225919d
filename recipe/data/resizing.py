"""Bilinear resizing with antialiasing in uint8, as in torchvision, of one image or of boxes in a batch."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """Resize uint8 (h, w, 3) as PIL does, bilinear with antialiasing; a value occasionally differs by one."""
    if pixels.shape[:2] == (height, width):
        return pixels
    planes = pixels.unsqueeze(0).permute(0, 3, 1, 2)  # still channels_last in memory, which torch's kernel prefers
    if pixels.device.type == "cpu":
        resized = F.interpolate(planes, (height, width), mode="bilinear", antialias=True)
    else:
        resized = _resized_in_float(planes, height, width)
    return resized.permute(0, 2, 3, 1).squeeze(0)


def _resized_in_float(planes: Tensor, height: int, width: int) -> Tensor:
    """Resize in fp32, because CUDA has no such kernel for uint8."""
    resized = F.interpolate(planes.float(), (height, width), mode="bilinear", antialias=True)
    return resized.round_().to(torch.uint8)


def resized_boxes(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Cut a box out of each image and resize it to (size, size), with the values of torch's CPU kernel.

    ``images`` is uint8 (m, height, width, 3), ``boxes`` int64 (m, 4): top, left, height, width, in pixels.
    """
    # First along rows, then along columns, rounded to uint8 in between.
    first, weights, precision = _taps(boxes[:, 3], size, images.shape[2])
    images = _weighted(images.transpose(1, 2), boxes[:, 1, None] + first, weights, precision).transpose(1, 2)
    first, weights, precision = _taps(boxes[:, 2], size, images.shape[1])
    return _weighted(images, boxes[:, 0, None] + first, weights, precision)


def _weighted(lines: Tensor, first: Tensor, weights: Tensor, precision: Tensor) -> Tensor:
    """Return the weighted sums of lines, uint8 (m, n, k, 3), as uint8 (m, S, k, 3); see ``_taps``."""
    every = torch.arange(len(lines), device=lines.device)[:, None]
    sums = torch.zeros(*first.shape, *lines.shape[2:], dtype=torch.int32, device=lines.device)
    for tap in range(weights.shape[-1]):
        sums += lines[every, (first + tap).clamp_(max=lines.shape[1] - 1)] * weights[:, :, tap, None, None]
    precision = precision[:, None, None, None]
    return ((sums + (1 << (precision - 1))) >> precision).clamp_(0, 255).to(torch.uint8)


def _taps(lengths: Tensor, size: int, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pixels and weights that make up each pixel of a resized line, as in torch's ``UpSampleKernel.cpp``.

    Lines of ``lengths`` pixels, int64 (m,) and at most ``longest``, are resized to ``size``, S, pixels. Returns the
    first pixel, int64 (m, S); the weights from there on, int32 (m, S, taps), scaled by 2 to the power of the precision;
    and the precision, int32 (m,).
    """
    scale = (lengths.double() / size)[:, None]
    support = scale.clamp(min=1.0)
    centre = scale * (torch.arange(size, device=lengths.device) + 0.5)
    first = (centre - support + 0.5).long().clamp_(min=0)
    count = torch.minimum((centre + support + 0.5).long(), lengths[:, None]) - first
    inverse = torch.where(scale >= 1, 1 / scale, 1.0)
    taps = 2 * math.ceil(max(longest / size, 1.0)) + 1
    weights = torch.zeros(*first.shape, taps, dtype=torch.float64, device=lengths.device)
    total = torch.zeros_like(centre)
    for tap in range(taps):
        weight = (1 - ((first + tap - centre + 0.5) * inverse).abs()).clamp_(min=0)
        weights[:, :, tap] = torch.where(count > tap, weight, 0.0)
        total += weights[:, :, tap]  # one at a time, to round as the kernel does
    weights /= total[:, :, None]
    # The largest precision at which the largest weight still rounds to less than 2^15.
    mantissa, exponent = torch.frexp(weights.amax((1, 2)))
    precision = (15 - exponent - (mantissa * 2**15 >= 2**15 - 0.5).int()).clamp_(max=22)
    return first, (weights * (1 << precision)[:, None, None] + 0.5).int(), precision
