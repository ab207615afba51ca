"""A layer as a matrix: its weight as [g, o, i * k], the rows of its input that the matrix is multiplied with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Node

from featherweight.network.edit import CONVOLUTIONS, TRANSPOSED, out_axis, turned
from featherweight.network.operators import schema_argument
from featherweight.numerics.patches import patches, patches_at, transposed_patches

#: numbers of rows held at once
HELD = 1 << 24


def as_matrix(node: Node, weight: Tensor) -> Tensor:
    """``weight`` of a linear or convolution call as [g, o, i * k]: groups, outputs of one, what each output reads.

    What is stored with its inputs first (transposed convolutions, [i, o, *kernel]; GPT-2's linear layers, [i, o]) is
    turned here. Embeddings and recurrent calls have one matrix a weight, [rows, i]; stacked ones [g, rows, i], rows
    being the last axis but one as they lie.
    """
    if node.target not in CONVOLUTIONS:
        return (weight.t() if turned(node) else weight)[None] if weight.dim() == 2 else weight.flatten(0, -3)
    groups = int(schema_argument(node, "groups"))
    if node.target not in TRANSPOSED:
        return weight.reshape(groups, weight.shape[0] // groups, -1)
    split = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return split.transpose(1, 2).reshape(groups, weight.shape[1], -1)


def layout(node: Node) -> tuple[int, int]:
    """How a call reads its weight: the axis of its outputs, and groups. To calls of several layouts that share a weight
    it is several matrices."""
    return out_axis(node), int(schema_argument(node, "groups")) if node.target in CONVOLUTIONS else 1


def from_matrix(node: Node, matrix: Tensor, shape: torch.Size) -> Tensor:
    """The weight of ``shape`` that ``as_matrix`` made ``matrix`` of."""
    if turned(node):
        return matrix.reshape(shape[1], shape[0]).t().contiguous()
    if node.target not in TRANSPOSED:
        return matrix.reshape(shape)
    groups = matrix.shape[0]
    split = matrix.reshape(groups, shape[1], shape[0] // groups, -1)
    return split.transpose(1, 2).reshape(shape)


def outputs_first(node: Node, weight: Tensor) -> Tensor:
    """``weight`` of a linear call or of a convolution call of one group as [o, i, *kernel]; a view."""
    return weight.transpose(0, 1) if out_axis(node) else weight


def along_outputs(node: Node, numbers: Tensor, weight: Tensor) -> Tensor:
    """``numbers`` [o], one for each output channel of the whole call, in the shape of ``weight``."""
    matrix = as_matrix(node, weight)
    return from_matrix(node, numbers.view(*matrix.shape[:2], 1).expand_as(matrix), weight.shape)


def rows(node: Node, weight: Tensor, x: Tensor) -> Tensor:
    """[g, n, i * k]: the rows of input ``x`` that ``as_matrix(node, weight)`` is multiplied with."""
    if node.target not in CONVOLUTIONS:
        return x.reshape(1, -1, x.shape[-1])
    return _patches(node, weight.shape[2:], x if x.dim() == weight.dim() else x[None],
                    int(schema_argument(node, "groups")))


def rows_at(node: Node, weight: Tensor, x: Tensor, chosen: Tensor) -> Tensor:
    """``rows(node, weight, x)[:, chosen]``, the others not made."""
    if node.target not in CONVOLUTIONS:
        return x.reshape(1, -1, x.shape[-1])[:, chosen]
    x = x if x.dim() == weight.dim() else x[None]
    return patches_at(x, windows(node, weight.shape[2:], x), chosen, int(schema_argument(node, "groups")))


def count_rows(node: Node, weight: Tensor, x: Tensor) -> int:
    """How many ``rows(node, weight, x)`` there are."""
    if node.target not in CONVOLUTIONS:
        return x.shape[:-1].numel()
    x = x if x.dim() == weight.dim() else x[None]
    return x.shape[0] * len(windows(node, weight.shape[2:], x))


def windows(node: Node, kernel: Sequence[int], x: Tensor) -> Tensor:
    """[output places, k]: which spatial position of a convolution's input ``x``, counted from 1, each number of the
    kernel meets; 0 is padding."""
    sizes = x.shape[-len(kernel):]
    numbers = torch.arange(1.0, sizes.numel() + 1, dtype=torch.float64, device=x.device)
    return _patches(node, kernel, numbers.view(1, 1, *sizes), 1)[0].long()


def _patches(node: Node, kernel: Sequence[int], x: Tensor, groups: int) -> Tensor:
    axes = len(kernel)
    stride, dilation = (_each(schema_argument(node, name), axes) for name in ("stride", "dilation"))
    padding = schema_argument(node, "padding")
    if node.target in TRANSPOSED:
        extra = _each(schema_argument(node, "output_padding"), axes)
        return transposed_patches(x, kernel, stride, _each(padding, axes), extra, dilation, groups)
    if isinstance(padding, str):
        whole = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
        sides = [(w // 2, w - w // 2) for w in whole]
    else:
        sides = [(p, p) for p in _each(padding, axes)]
    return patches(x, kernel, stride, sides, dilation, groups)


def portions(node: Node, weight: Tensor, x: Tensor) -> list[slice]:
    """Parts of the first axis of input ``x`` whose rows are made at once: about ``HELD`` numbers as rows."""
    alone = node.target in CONVOLUTIONS and x.dim() < weight.dim()  # one sample, without an axis for it
    length = x.shape[0]
    size = max(1, length if alone else HELD // max(1, x[:1].numel() * weight[:1, :1].numel()))
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _each(value: int | Sequence[int], axes: int) -> list[int]:
    found = [value] if isinstance(value, int) else list(value)
    return found * axes if len(found) == 1 else found
