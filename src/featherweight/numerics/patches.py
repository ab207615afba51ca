"""A convolution's input as the rows that its weight, as a matrix, is multiplied with."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

Sizes = Sequence[int]
Sides = Sequence[tuple[int, int]]  #: (before, after) of every spatial axis


def patches(x: Tensor, kernel: Sizes, stride: Sizes, padding: Sides, dilation: Sizes, groups: int) -> Tensor:
    """Rows [g, n * places, i * k] of an input [n, g * i, *sizes], any number of spatial axes.

    A weight [g * o, i, *kernel] seen as [g, o, i * k] times these rows is the convolution without its bias. Zeros are
    padded; negative padding crops.
    """
    x = F.pad(x, [side for pair in reversed(padding) for side in pair])
    axes = len(kernel)
    for axis in range(axes):
        x = x.unfold(2 + axis, dilation[axis] * (kernel[axis] - 1) + 1, stride[axis])[..., ::dilation[axis]]
    n, c = x.shape[:2]
    places, size = x.shape[2:2 + axes].numel(), x.shape[2 + axes:].numel()
    rows = x.reshape(n, groups, c // groups, places, size).permute(1, 0, 3, 2, 4)
    return rows.reshape(groups, n * places, c // groups * size)


def patches_at(x: Tensor, windows: Tensor, chosen: Tensor, groups: int) -> Tensor:
    """Rows [g, r, i * k] of an input [n, g * i, *sizes] at ``chosen`` ones [r] of its n * places rows alone.

    windows [places, k]: which position of ``sizes``, counted from 1, each number of the kernel meets; 0 is padding.
    """
    n, c = x.shape[:2]
    places, size = len(windows), x.shape[2:].numel()
    sample, met = chosen.div(places, rounding_mode="floor"), windows[chosen % places]
    flat = x.reshape(n, c, size).transpose(0, 1).reshape(c, n * size)
    found = flat.index_select(1, (met - 1 + sample[:, None] * size).clamp(min=0).flatten()).view(c, *met.shape)
    found = found.masked_fill_(met == 0, 0)
    rows = found.view(groups, c // groups, *met.shape).transpose(1, 2).reshape(groups, len(chosen), -1)
    return rows.contiguous()


def transposed_patches(x: Tensor, kernel: Sizes, stride: Sizes, padding: Sizes, output_padding: Sizes, dilation: Sizes,
                       groups: int) -> Tensor:
    """``patches`` for a transposed convolution, whose weight [g * i, o, *kernel] is seen as [g, o, i * k].

    The input is spread out with ``stride - 1`` zeros between and met by the kernel turned round.
    """
    spread = x.new_zeros(*x.shape[:2], *((size - 1) * s + 1 for size, s in zip(x.shape[2:], stride, strict=True)))
    spread[(slice(None), slice(None), *(slice(None, None, s) for s in stride))] = x
    sides = [(d * (k - 1) - p, d * (k - 1) - p + extra)
             for k, p, d, extra in zip(kernel, padding, dilation, output_padding, strict=True)]
    rows = patches(spread, kernel, [1] * len(kernel), sides, dilation, groups)
    turned = rows.reshape(*rows.shape[:2], -1, *kernel).flip(list(range(3, 3 + len(kernel))))
    return turned.reshape(rows.shape)
