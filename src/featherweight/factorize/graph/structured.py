"""What structured matrices are in the graph, and which tensors each is stored in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from featherweight.factorize.graph.builder import Builder, options
from featherweight.factorize.surgery import AXES, PLAIN
from featherweight.numerics.factors import structured as matrices

aten = torch.ops.aten
#: by their names behind the layer's path
Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class FormNumbers:
    """The numbers of a form, as ``Structured`` has them."""

    blocks: int
    terms: int
    share: float = 0.0


@dataclass(frozen=True)
class StructuredForm:
    """A form: names of its tensors, those that are stored; how a matrix [o, i] is taken apart into them; the matrix of
    them; what they are in the graph."""

    parts: tuple[str, ...]
    split: Callable[[Tensor, FormNumbers], tuple[Tensor, ...]]
    join: Callable[..., Tensor]
    build: Callable[[Builder, FormNumbers], Node]

    def stored(self, matrix: Tensor, own: FormNumbers) -> dict[str, Tensor]:
        """The tensors of the matrix of this form that is near to ``matrix`` [o, i]."""
        return dict(zip(self.parts, self.split(matrix, own), strict=True))


def put_monarch(at: Builder, own: FormNumbers) -> Node:
    """Two grouped 1 x 1 convolutions with a shuffle of channels between; of a linear layer on [samples, i, 1]."""
    call, blocks, axes = at.call, own.blocks, AXES.get(at.call.target, 0)
    ones = [1] * max(axes, 1)
    first, second = (at.stored(n, at.value(n).reshape(*at.value(n).shape, *ones))
                     for n in ("reduce.weight", "expand.weight"))
    x, convolution, bias = call.args[0], PLAIN[max(axes, 1)], at.bias(name="made.")
    if axes:
        found = options(call)
        x = at.make(convolution, x, first, None, found["stride"], found["padding"], found["dilation"], blocks)
        x = at.make(aten.channel_shuffle.default, x, blocks)
        return at.make(convolution, x, second, bias, ones, [0] * axes, ones, blocks)
    whole = at.make(aten.unsqueeze.default, at.make(aten.reshape.default, x, [-1, at.shape[1]]), -1)
    x = at.make(convolution, whole, first, None, [1], [0], [1], blocks)
    x = at.make(aten.transpose.int, at.make(aten.reshape.default, x, [-1, blocks, blocks]), 1, 2)
    x = at.make(aten.reshape.default, x, [-1, blocks * blocks, 1])
    x = at.make(convolution, x, second, bias, [1], [0], [1], blocks)
    return _shaped_as(at, x)


def _shaped_as(at: Builder, x: Node) -> Node:
    """[samples, o, 1] in the axes of what a linear call gave."""
    value = at.network.values(1)[at.call.name]
    inner = list(value.shape[1:-1])  # all but the samples are fixed
    return at.make(aten.reshape.default, x, [-1, *inner, at.shape[0]] if value.dim() > 1 else [at.shape[0]])


def put_kronecker(at: Builder, own: FormNumbers) -> Node:
    """y = sum over t of A_t X B_t^T with X the input as [blocks, i / blocks]: two small linear layers."""
    a, b = at.value("expand.weight"), at.value("reduce.weight")
    terms, rows, columns = a.shape
    outputs = b.shape[1]
    first = at.stored("reduce.weight", b.reshape(terms * outputs, -1))
    second = at.stored("expand.weight", a.permute(1, 2, 0).reshape(rows, columns * terms))
    x = at.make(aten.reshape.default, at.call.args[0], [-1, columns, at.shape[1] // columns])
    x = at.make(aten.linear.default, x, first)
    x = at.make(aten.reshape.default, x, [-1, columns * terms, outputs])
    x = at.make(aten.linear.default, at.make(aten.transpose.int, x, 1, 2), second)
    x = _shaped_as(at, at.make(aten.transpose.int, x, 1, 2))
    bias = at.bias(name="made.")
    return x if bias is None else at.make(aten.add.Tensor, x, bias)


def put_circulant(at: Builder, own: FormNumbers) -> Node:
    """The same call, its weight made of the first columns."""
    columns = at.stored("columns.weight")
    place = at.stored("columns.place", matrices.wrapped(own.blocks).flatten())
    made = at.make(aten.index_select.default, columns, 2, place)
    return _with(at, _tiled(at, made, own.blocks))


def put_fourier(at: Builder, own: FormNumbers) -> Node:
    """Circulant blocks under Fourier transforms, which make them diagonal: a small linear layer that transforms every
    block of the input, for each frequency a matrix between blocks (a grouped convolution, real and imaginary parts side
    by side), and the way back."""
    size, outputs, inputs = own.blocks, at.shape[0] // own.blocks, at.shape[1] // own.blocks
    turn, back = matrices.fourier(size)
    count = len(turn)  # real and imaginary part of each frequency
    there, again = at.buffer("fourier.turn", turn), at.buffer("fourier.back", back)
    spectrum = at.make(aten.linear.default, at.stored("columns.weight"), there)
    split = at.make(aten.reshape.default, spectrum, [outputs, inputs, count // 2, 2])
    real, imaginary = (at.make(aten.permute.default, at.make(aten.select.int, split, 3, k), [2, 0, 1]) for k in (0, 1))
    rows = (at.make(aten.cat.default, [real, at.make(aten.neg.default, imaginary)], 2),
            at.make(aten.cat.default, [imaginary, real], 2))
    mixing = at.make(aten.reshape.default, at.make(aten.cat.default, list(rows), 1), [count * outputs, 2 * inputs, 1])
    x = at.make(aten.reshape.default, at.call.args[0], [-1, inputs, size])
    x = at.make(aten.transpose.int, at.make(aten.linear.default, x, there), 1, 2)
    x = at.make(aten.reshape.default, x, [-1, count * inputs, 1])
    x = at.make(PLAIN[1], x, mixing, None, [1], [0], [1], count // 2)
    x = at.make(aten.transpose.int, at.make(aten.reshape.default, x, [-1, count, outputs]), 1, 2)
    x = _shaped_as(at, at.make(aten.linear.default, x, again))
    bias = at.bias(name="made.")
    return x if bias is None else at.make(aten.add.Tensor, x, bias)


def put_displaced(at: Builder, own: FormNumbers) -> Node:
    """The same call, its weight a sum of circulant times skew-circulant blocks."""
    size, terms = own.blocks, at.value("left.weight").shape[2]
    grid = [at.shape[0] // size, at.shape[1] // size]
    place = at.stored("left.place", matrices.wrapped(size).flatten())
    sign = torch.where(torch.ones(size, size).triu(1) > 0, -1.0, 1.0).to(at.value("left.weight"))
    first, second = (at.make(aten.index_select.default, at.stored(n), 3, place) for n in ("left.weight",
                                                                                          "right.weight"))
    square = [*grid, terms, size, size]
    turned = at.make(aten.mul.Tensor, at.make(aten.reshape.default, second, square), at.buffer("right.sign", sign))
    made = at.make(aten.matmul.default, at.make(aten.reshape.default, first, square), turned)
    return _with(at, _tiled(at, at.make(aten.sum.dim_IntList, made, [2]), size))


def _tiled(at: Builder, blocks: Node, size: int) -> Node:
    """Blocks [o / size, i / size, size, size], whatever their axes, as the weight."""
    grid = [at.shape[0] // size, at.shape[1] // size, size, size]
    turned = at.make(aten.permute.default, at.make(aten.reshape.default, blocks, grid), [0, 2, 1, 3])
    return at.make(aten.reshape.default, turned, list(at.shape))


def put_sparse(at: Builder, own: FormNumbers) -> Node:
    """The same call, its weight a product of two thin matrices, to which single weights are added."""
    first, second, rest = (at.stored(n) for n in ("reduce.weight", "expand.weight", "rest.weight"))
    count = math.prod(at.shape)
    flat = at.make(aten.reshape.default, at.make(aten.matmul.default, second, first), [count])
    one = at.make(aten.slice.Tensor, rest, 0, 0, 1)
    zeros = at.make(aten.expand.default, at.make(aten.sub.Tensor, one, one), [count])  # of the type of what is added
    place = at.make(aten.to.dtype, at.stored("rest.place"), torch.int64)
    whole = at.make(aten.add.Tensor, flat, at.make(aten.scatter_add.default, zeros, 0, place, rest))
    return _with(at, at.make(aten.reshape.default, whole, list(at.shape)))


def _with(at: Builder, weight: Node) -> Node:
    """The call with another weight, and with the bias of the plan, if that has one."""
    rest: tuple[Any, ...] = at.call.args[2:]
    bias = at.bias(name="made.")
    return at.make(at.call.target, at.call.args[0], weight, *((bias, *rest[1:]) if rest or bias is not None else ()))


def _kronecker(matrix: Tensor, own: FormNumbers) -> tuple[Tensor, ...]:
    a, b = matrices.kronecker(matrix, own.blocks, own.blocks, own.terms)
    return b, a


#: name -> the form
FORMS: dict[str, StructuredForm] = {
    "monarch": StructuredForm(("reduce.weight", "expand.weight"), lambda m, s: matrices.monarch(m, s.blocks),
                              matrices.of_monarch, put_monarch),
    "kronecker": StructuredForm(("reduce.weight", "expand.weight"), _kronecker,
                                lambda b, a: matrices.of_kronecker(a, b), put_kronecker),
    "circulant": StructuredForm(("columns.weight",), lambda m, s: (matrices.circulant(m, s.blocks),),
                                matrices.of_circulant, put_circulant),
    "fourier": StructuredForm(("columns.weight",), lambda m, s: (matrices.circulant(m, s.blocks),),
                              matrices.of_circulant, put_fourier),
    "displaced": StructuredForm(("left.weight", "right.weight"), lambda m, s: matrices.displaced(m, s.blocks, s.terms),
                                matrices.of_displaced, put_displaced),
    "sparse": StructuredForm(("reduce.weight", "expand.weight", "rest.place", "rest.weight"),
                             lambda m, s: matrices.sparse(m, s.terms, s.share), matrices.of_sparse, put_sparse),
}
#: names that the graph of a form may take
TAKEN = (*dict.fromkeys(name for form in FORMS.values() for name in form.parts), "columns.place", "left.place",
         "right.sign", "fourier.turn", "fourier.back", "made.bias")
#: forms that take no convolution
LINEAR = ("kronecker", "fourier")

__all__ = ["FORMS", "LINEAR", "TAKEN", "FormNumbers", "StructuredForm"]
