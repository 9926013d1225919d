"""Resizing as torchvision does it, whole or in part: bilinear with antialiasing, in uint8."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """Resize uint8 (h, w, 3) as PIL does, bilinear with antialiasing; now and then a value differs by one."""
    if pixels.shape[:2] == (height, width):
        return pixels
    planes = pixels.unsqueeze(0).permute(0, 3, 1, 2)  # in memory as it was: channels_last, which torch's kernel likes
    if pixels.device.type == "cpu":
        resized = F.interpolate(planes, (height, width), mode="bilinear", antialias=True)
    else:
        resized = _resized_in_float(planes, height, width)
    return resized.permute(0, 2, 3, 1).squeeze(0)


def _resized_in_float(planes: Tensor, height: int, width: int) -> Tensor:
    """As CUDA must, which has no such kernel for uint8."""
    resized = F.interpolate(planes.float(), (height, width), mode="bilinear", antialias=True)
    return resized.round_().to(torch.uint8)


def resized_boxes(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Cut a box out of each image and resize it; the same values as torch's kernel for uint8 gives on a CPU.

    Args:
        images: uint8 (m, height, width, 3).
        boxes: int64 (m, 4): top, left, height, width, in pixels.
        size: S, pixels a side of what comes out.

    Returns:
        uint8 (m, S, S, 3).
    """
    m, height, width, _ = images.shape
    every = torch.arange(m, device=images.device)[:, None, None]
    rows = torch.arange(height, device=images.device)[None, :, None]
    columns = torch.arange(size, device=images.device)[None, None, :]
    # First along the rows, then along the columns, rounded to uint8 between.
    first, weights, precision = _taps(boxes[:, 3], size, width)
    sums = torch.zeros(m, height, size, 3, dtype=torch.int32, device=images.device)
    for tap in range(weights.shape[-1]):
        column = (boxes[:, 1, None] + first + tap).clamp_(max=width - 1)
        sums += images[every, rows, column[:, None, :]] * weights[:, None, :, tap, None]
    images = _rounded(sums, precision)
    first, weights, precision = _taps(boxes[:, 2], size, height)
    sums = torch.zeros(m, size, size, 3, dtype=torch.int32, device=images.device)
    for tap in range(weights.shape[-1]):
        row = (boxes[:, 0, None] + first + tap).clamp_(max=height - 1)
        sums += images[every, row[:, :, None], columns] * weights[:, :, None, tap, None]
    return _rounded(sums, precision)


def resized_window(pixels: Tensor, height: int, width: int, rows: range, columns: range) -> Tensor:
    """Return ``rows`` and ``columns`` of what ``resize`` makes of an image on a CPU, and make no other.

    Args:
        pixels: uint8 (h, w, 3).
        height, width: What the whole image would be resized to, in pixels.

    Returns:
        uint8 (rows, columns, 3).
    """
    across = _axis(pixels.shape[1], width, columns)
    down = _axis(pixels.shape[0], height, rows)
    top, bottom = int(down[0].min()), int((down[0] + down[1].shape[-1]).max())
    pixels = pixels[top:bottom]
    made = _weighted(pixels.transpose(0, 1), *across).transpose(0, 1)
    return _weighted(made, down[0] - top, *down[1:])


def _axis(length: int, size: int, wanted: range) -> tuple[Tensor, Tensor, Tensor]:
    """``_taps`` of one line, for the ``wanted`` pixels alone, with the precision that all of them have in common."""
    lengths, every = torch.tensor([length]), range(0, size, 2**18)
    largest = torch.stack([_weights(lengths, size, length, range(at, min(at + 2**18, size)))[1].amax() for at in every])
    first, weights = _weights(lengths, size, length, wanted)
    integers, precision = _as_integers(weights, largest.amax()[None])
    return first[0], integers[0], precision[0]


def _weighted(lines: Tensor, first: Tensor, weights: Tensor, precision: Tensor) -> Tensor:
    """Sum up lines, uint8 (n, k, 3), as ``_taps`` says, into uint8 (S, k, 3)."""
    sums = torch.zeros(len(first), *lines.shape[1:], dtype=torch.int32)
    for tap in range(weights.shape[-1]):
        sums += lines[(first + tap).clamp_(max=len(lines) - 1)] * weights[:, tap, None, None]
    return ((sums + (1 << (precision - 1))) >> precision).clamp_(0, 255).to(torch.uint8)


def _taps(lengths: Tensor, size: int, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """What each pixel of a resized line is the weighted sum of, as torch's ``UpSampleKernel.cpp`` computes it.

    Args:
        lengths: int64 (m,), pixels of each line.
        size: S, pixels that it is to have.
        longest: No line is longer.

    Returns:
        The first pixel, int64 (m, S); the weights from there on, int32 (m, S, taps), times 2 to the power of the
        precision, int32 (m,).
    """
    first, weights = _weights(lengths, size, longest, range(size))
    return first, *_as_integers(weights, weights.amax((1, 2)))


def _weights(lengths: Tensor, size: int, longest: int, wanted: range) -> tuple[Tensor, Tensor]:
    """The first pixel and the float64 weights of each of the ``wanted`` pixels; see ``_taps``."""
    scale = (lengths.double() / size)[:, None]
    support = scale.clamp(min=1.0)
    centre = scale * (torch.arange(wanted.start, wanted.stop, device=lengths.device) + 0.5)
    first = (centre - support + 0.5).long().clamp_(min=0)
    count = torch.minimum((centre + support + 0.5).long(), lengths[:, None]) - first
    inverse = torch.where(scale >= 1, 1 / scale, 1.0)
    taps = 2 * math.ceil(max(longest / size, 1.0)) + 1
    weights = torch.zeros(*first.shape, taps, dtype=torch.float64, device=lengths.device)
    total = torch.zeros_like(centre)
    for tap in range(taps):
        weight = (1 - ((first + tap - centre + 0.5) * inverse).abs()).clamp_(min=0)
        weights[:, :, tap] = torch.where(count > tap, weight, 0.0)
        total += weights[:, :, tap]  # one after the other, to round as the kernel does
    weights /= total[:, :, None]
    return first, weights


def _as_integers(weights: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """The weights times 2 to the power of the precision, as integers, and that; ``largest`` (m,) is each line's."""
    # The largest precision at which the largest weight is below 2^15 when rounded.
    mantissa, exponent = torch.frexp(largest)
    precision = (15 - exponent - (mantissa * 2**15 >= 2**15 - 0.5).int()).clamp_(max=22)
    return (weights * (1 << precision)[:, None, None] + 0.5).int(), precision


def _rounded(sums: Tensor, precision: Tensor) -> Tensor:
    precision = precision[:, None, None, None]
    return ((sums + (1 << (precision - 1))) >> precision).clamp_(0, 255).to(torch.uint8)
