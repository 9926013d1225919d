"""A Triton kernel that mirrors and normalises uint8 images in one pass over memory; CUDA only."""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

_BLOCK = 1024


def mirror_and_look_up(images: Tensor, mirrored: Tensor, table: Tensor) -> Tensor:
    """Map uint8 (m, 3, S, S), channels_last, through ``table`` (3, 256), one row per channel, and mirror some images.

    ``mirrored`` is bool (m,). The result is channels_last and has the table's dtype.
    """
    assert images.is_contiguous(memory_format=torch.channels_last), images.stride()
    result = torch.empty_like(images, dtype=table.dtype, memory_format=torch.channels_last)
    count, (height, width) = images.numel(), images.shape[2:]
    _mirror_and_look_up[(triton.cdiv(count, _BLOCK),)](
        images, mirrored, table, result, count, height, width, BLOCK=_BLOCK
    )
    return result


@triton.jit
def _mirror_and_look_up(  # type: ignore[no-untyped-def]
    images,
    mirrored,
    table,
    result,
    count,
    height,
    width,
    BLOCK: tl.constexpr,  # noqa: N803
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    channel, pixel = place % 3, place // 3
    row, column = pixel // width, pixel % width
    turned = tl.load(mirrored + row // height, mask=inside, other=0) != 0
    source = (row * width + tl.where(turned, width - 1 - column, column)) * 3 + channel
    value = tl.load(images + source, mask=inside, other=0).to(tl.int32)
    tl.store(result + place, tl.load(table + channel * 256 + value, mask=inside), mask=inside)
