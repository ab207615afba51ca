"""How labels pass products of tensors, written as einsum letters: matmul, bmm, baddbmm, addmm, einsum.

Attention written out by hand is two such products. A letter that every operand and the result carry is a batch letter
(an attention head); one that the result lacks is contracted; the others are free. Heads go as whole blocks: where a
view split heads and their width off one axis, the width stays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from featherweight.axes.labels import Cost, Field, Ints, Labels, Value
from featherweight.axes.rules.basics import broadcast, rule, unknown
from featherweight.axes.trace import Trace
from featherweight.network.operators import contracted
from featherweight.network.operators import schema_argument as argument

aten = torch.ops.aten
Terms = list[list[str]]


def equation_terms(equation: str, ranks: Sequence[int]) -> tuple[Terms, list[str]]:
    """The letters of each operand and of the result of an einsum; axes under an ellipsis are "#1", "#2" from the
    right."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    parts = left.split(",")
    if not arrow:
        once = sorted(c for c in set(left) if c.isalpha() and left.count(c) == 1)
        right = ("..." if "..." in left else "") + "".join(once)
    terms = []
    for part, rank in zip(parts, ranks, strict=True):
        before, dots, after = part.partition("...")
        hidden = rank - len(before) - len(after) if dots else 0
        terms.append([*before, *(f"#{hidden - i}" for i in range(hidden)), *after])
    widest = max((sum(letter[0] == "#" for letter in t) for t in terms), default=0)
    before, dots, after = right.partition("...")
    return terms, [*before, *(f"#{widest - i}" for i in range(widest if dots else 0)), *after]


def matmul_terms(a: int, b: int) -> tuple[Terms, list[str]]:
    """The letters of ``matmul`` for operands of these ranks."""
    lead = [[f"#{n - i}" for i in range(n)] for n in (max(a - 2, 0), max(b - 2, 0))]
    rows, columns = ["i"] * (a > 1), ["j"] * (b > 1)
    return [[*lead[0], *rows, "k"], [*lead[1], "k", *columns]], [*max(lead, key=len), *rows, *columns]


def shared_letters(terms: Terms) -> set[str]:
    """The letters that two or more operands carry."""
    return {c for t in terms for c in t if sum(c in other for other in terms) > 1}


def product(trace: Trace, node: Node, inputs: Sequence[Labels], terms: Terms, result: list[str]) -> Labels:
    """The labels of a sum of products over the letters that ``result`` lacks."""
    sizes: dict[str, int] = {}
    for x, term in zip(inputs, terms, strict=True):
        for letter, size in zip(term, x.shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    shared, shape = shared_letters(terms), tuple(sizes[c] for c in result)
    inputs = [_apart(trace, x, term, result, shared, node) for x, term in zip(inputs, terms, strict=True)]
    fields = _batch(trace, inputs, terms, result, shared, sizes, node)
    for x, term in zip(inputs, terms, strict=True):
        fields += [_placed(f, term, result) for f in x.fields
                   if all(term[d] in result and term[d] not in shared for d in f.dims)]
    axes = [({result[d] for d in f.dims}, f.atoms) for f in fields]
    for letter in sizes:
        if letter not in result:
            axes += [({letter}, atoms) for atoms in _contracted(trace, inputs, terms, letter, node)]
    for pair in contracted(terms, result) if not all(x.stored for x in inputs) else ():
        atoms = [own for named, own in axes if named <= pair]
        total = math.prod(sizes[c] for c in pair) / math.prod(own.size for own in atoms)
        trace.costs.append(Cost(node.name, total / trace.batch, tuple(atoms)))
    if sum(x.stored for x in inputs) == 1:
        i = next(i for i, x in enumerate(inputs) if x.stored)
        free = [d for d, c in enumerate(terms[i]) if c in result and c not in shared]
        for d in free:
            trace.role(factors(node)[i], "weight", node, out=d)
    return Labels(shape, tuple(fields), all(x.stored for x in inputs))


def _apart(trace: Trace, x: Labels, term: list[str], result: list[str], shared: set[str], node: Node) -> Labels:
    """Axes that a view split off one another and that now part ways: those that stay a batch go on, or the first."""
    for f in x.fields:
        letters = [term[d] for d in f.dims]
        batch = [c for c in letters if c in shared and c in result]
        free = [c for c in letters if c not in shared and c in result]
        if len(letters) < 2 or len(batch) == len(letters) or len(free) == len(letters):
            continue
        left = batch or free or letters[:1]
        for d in f.dims:
            if term[d] not in left:
                x = trace.part(x, d, node)
    return x


def _placed(f: Field, term: list[str], result: list[str]) -> Field:
    where = [result.index(term[d]) for d in f.dims]
    order = sorted(range(len(where)), key=where.__getitem__)
    return Field(tuple(where[i] for i in order), f.atoms.transpose(order))


def _batch(trace: Trace, inputs: Sequence[Labels], terms: Terms, result: list[str], shared: set[str],
           sizes: dict[str, int], node: Node) -> list[Field]:
    """The fields over letters that several operands and the result carry, united."""
    batch = [c for c in result if c in shared]
    views = []
    for x, term in zip(inputs, terms, strict=True):
        of = dict(zip(term, x.shape, strict=True))
        mine = tuple(_placed(f, term, result) for f in x.fields if all(term[d] in batch for d in f.dims))
        views.append(Labels(tuple(of.get(c, 1) if c in batch else 1 for c in result), mine, x.stored))
    return broadcast(trace, views, tuple(sizes[c] if c in batch else 1 for c in result), node)


def _contracted(trace: Trace, inputs: Sequence[Labels], terms: Terms, letter: str, node: Node) -> list[Ints]:
    """A letter that is summed over: cut in all operands alike, or in none."""
    found = [(x, x.field(t.index(letter))) for x, t in zip(inputs, terms, strict=True)
             if letter in t and x.shape[t.index(letter)] > 1]
    plain = [f.atoms for _, f in found if f is not None and len(f.dims) == 1]
    hidden = node.target is aten.einsum.default and not any(x.stored for x, _ in found)
    if len(plain) < len(found) or hidden:
        reason = "it is summed over in a product of two values" if hidden else "it meets an axis that is never cut"
        for _, f in found:
            trace.freeze(f, node, reason)
        return []
    for other in plain[1:]:
        trace.unite(plain[0], other)
    return plain[:1]


#: the factors of a product, where they are not its first two arguments
FACTORS = {"baddbmm": ("batch1", "batch2"), "addmm": ("mat1", "mat2")}


def factors(node: Node) -> list[Any]:
    """The nodes that a call multiplies."""
    if node.target is aten.einsum.default:
        return list(node.args[1])  # type: ignore[arg-type]
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    chosen = FACTORS.get(str(node.target).split(".")[1].rstrip("_"), names[:2])
    return [argument(node, n) for n in chosen]


def letters(node: Node, ranks: Sequence[int]) -> tuple[Terms, list[str]]:
    """The letters of a call's factors, and of its result, given the factors' numbers of axes."""
    if node.target is aten.einsum.default:
        return equation_terms(str(node.args[0]), ranks)
    if node.target is aten.outer.default:
        return [["i"], ["j"]], ["i", "j"]
    return matmul_terms(*ranks)


@rule("matmul", "bmm", "mm", "mv", "dot", "outer", "einsum")
def multiplied(trace: Trace, node: Node) -> Value:
    given = [trace.of(n) for n in factors(node)]
    known = [x for x in given if x is not None]
    terms, result = letters(node, [len(x.shape) for x in known])
    if len(known) < len(given) or any(len(set(t)) < len(t) for t in terms):  # a letter twice: a diagonal
        return unknown(trace, node)
    return product(trace, node, known, terms, result)


@rule("baddbmm", "addmm")
def added(trace: Trace, node: Node) -> Value:
    """A product, and a value added to it."""
    made, first = multiplied(trace, node), trace.of(node.args[0])
    shape = trace.shape(node)
    if not isinstance(made, Labels) or first is None:
        return made
    if first.stored:
        trace.role(node.args[0], "bias", node)
    return Labels(shape, tuple(broadcast(trace, [first, made], shape, node)), made.stored and first.stored)
