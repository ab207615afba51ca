"""``Structured``: linear layers and 1 x 1 convolutions as structured matrices, which have fewer parameters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from featherweight.errors import PlanError, did_you_mean
from featherweight.factorize.form_fit import Fitted, fitted
from featherweight.factorize.graph.builder import Builder
from featherweight.factorize.graph.structured import FORMS, LINEAR, TAKEN, FormNumbers
from featherweight.factorize.surgery import AXES, groups_of, stem
from featherweight.judge.costs import alone, growth
from featherweight.network import Network
from featherweight.network.edit import TRANSPOSED, clear_dead, read_tensors, readers_of, turned
from featherweight.network.layers import Layer, not_finite, select
from featherweight.network.operators import schema_argument
from featherweight.numerics.factors import structured as matrices
from featherweight.steps import Plan, Rewrite, Skipped, Stage
from featherweight.steps.options import COUNT, Numbers, check_known, check_numbers
from featherweight.task import Task

aten = torch.ops.aten
SHARE = Numbers(0.02, above=0, below=1)


@dataclass(frozen=True)
class Shaped:
    """One layer as a structured matrix. error: |W' - W|^2 / |W|^2, or of the outputs on calibration data where these
    were read; then ``tensors`` are the names of those in the plan, behind the layer's path."""

    weight: str
    shape: tuple[int, ...]
    form: str
    blocks: int
    terms: int
    error: float
    share: float = 0.0
    tensors: tuple[str, ...] = ()

    def numbers(self) -> FormNumbers:
        """The numbers of the form."""
        return FormNumbers(self.blocks, self.terms, self.share)


@dataclass(frozen=True)
class StructuredPlan(Plan):
    """Which layers become structured matrices. Those fitted to data lie in ``tensors``; the others are computed by
    ``apply``: they need no data.

    Example:
        >>> wide = fw.capture(nn.Linear(64, 64), torch.zeros(2, 64))
        >>> [layer.form for layer in fw.factorize.Structured("monarch", blocks=4).plan(wide, fw.Task()).layers]
        ['monarch']
    """

    kind: ClassVar[str] = "factorize.structured/1"
    layers: tuple[Shaped, ...] = ()

    def apply(self, network: Network) -> Network:
        """A copy with these layers in their forms; PlanError where a layer is not as planned."""
        changed = network.copy()
        before = read_tensors(changed)
        known = {layer.weight: layer for layer in select(changed).layers}
        for shaped in self.layers:
            if shaped.weight not in known:
                raise PlanError(f"the plan shapes {shaped.weight!r}, which no linear or convolution call here reads; "
                                f"{did_you_mean(shaped.weight, known)}")
            weight = changed.tensor(shaped.weight)
            missing = [name for name in shaped.tensors if f"{stem(shaped.weight)}{name}" not in self.tensors]
            if tuple(weight.shape) != shaped.shape or missing or refusal(changed, known[shaped.weight], shaped.form,
                                                                         shaped.blocks):
                raise PlanError(f"the plan shapes {shaped.weight!r} of shape {list(shaped.shape)}; it is "
                                f"{list(weight.shape)} here, or read in another way, and the plan lacks "
                                f"{missing or 'nothing'}: plan again on this network, and load plans with their "
                                "tensors: Plan.load(path)")
            self._put(changed, known[shaped.weight].calls[0], shaped)
        clear_dead(changed, before)
        return changed

    def _put(self, network: Network, call: Node, shaped: Shaped) -> None:
        """Puts a structured matrix in the place of a layer."""
        matrix, form = network.tensor(shaped.weight).detach().flatten(1).double(), FORMS[shaped.form]
        made = {} if shaped.tensors else form.stored(matrix, shaped.numbers())
        own = self.tensors if shaped.tensors else {f"{stem(shaped.weight)}{n}": t for n, t in made.items()}
        node = form.build(Builder(network, call, shaped.weight, shaped.shape, own), shaped.numbers())
        call.replace_all_uses_with(node)
        network.graph.erase_node(call)

    def summary(self) -> str:
        shown = ", ".join(f"{stem(s.weight).rstrip('.')} {s.form}" for s in self.layers)
        return f"structured matrices: {len(self.layers)} layers" + (f" ({shown})" if shown else "")


@dataclass(frozen=True)
class Structured(Rewrite):
    """Linear layers and 1 x 1 convolutions as the nearest structured matrices; retraining is to follow.

    form: "monarch", two block-diagonal matrices with a shuffle between, as two grouped convolutions (Dao et al. 2022).
        "kronecker", a sum of ``terms`` Kronecker products, as two small linear layers (linear layers alone).
        "circulant", circulant blocks (Ding et al. 2017), "fourier", the same ones under Fourier transforms, which
        saves MACs too (linear layers alone); "displaced", blocks of low displacement rank, the sum of
        ``terms`` products of a circulant and a skew-circulant one (Sindhwani et al. 2015); "sparse", a product of rank
        ``terms`` and a ``share`` of single weights beside it (GoDec: Zhou and Tao 2011). Of "circulant", "displaced"
        and "sparse" the whole matrix is made when the file is loaded: fewer parameters, as many MACs.
    blocks: monarch: blocks of each factor; kronecker: rows and columns of the first factor; circulant, fourier,
        displaced: size of a block. Must divide both widths of a layer; sparse takes none.
    data: the matrices are fitted to the outputs on calibration data, layer after layer, from what the network that is
        compressed so far gives to what the whole one gives; biases make up for the change of means.
    ignore: patterns of layers to leave alone (``network/layers``).

    A layer that would not become smaller is left and named. Raises RecipeError for options that make no sense.

    Example:
        >>> wide = fw.capture(nn.Linear(64, 64), torch.zeros(2, 64))
        >>> small = fw.factorize.Structured("monarch", blocks=4).plan(wide, fw.Task()).apply(wide)
        >>> fw.measure.params(small) < fw.measure.params(wide) / 6
        True
    """

    form: str = "monarch"
    blocks: int = 4
    terms: int = 1
    share: float = 0.02
    data: bool = False
    ignore: tuple[str, ...] = ()
    stage: ClassVar[Stage] = Stage.STRUCTURE

    def check(self) -> None:
        """Raises RecipeError for options that make no sense."""
        check_known("Structured", "form", self.form, FORMS)
        check_numbers(self, {"blocks": COUNT, "terms": COUNT, "share": SHARE})

    def plan(self, network: Network, task: Task) -> StructuredPlan:
        """Reads calibration data where ``data`` asks for it. Raises TaskError where that is missing."""
        self.check()
        if self.data:
            task.require("calibration")
        selected = select(network, self.ignore)
        chosen, found, skipped = [], [], list(selected.skipped)
        for layer in selected.layers:
            reason, shaped = self._judged(network, layer)
            if shaped is None:
                skipped.append(Skipped(layer.weight, reason))
            else:
                chosen.append(layer)
                found.append(shaped)
        tensors: dict[str, Tensor] = {}
        if self.data and chosen:
            fits, said = fitted(network, task, chosen, self._fit)
            skipped += said
            found = [replace(shaped, error=one.error, tensors=tuple(one.tensors))
                     for shaped, one in zip(found, fits, strict=True)]
            tensors = {f"{stem(shaped.weight)}{name}": value for shaped, one in zip(found, fits, strict=True)
                       for name, value in one.tensors.items()}
        return StructuredPlan(tuple(found), skipped=tuple(skipped), tensors=tensors)

    def _fit(self, call: Node, kernel: Tensor, gram: Tensor | None) -> Fitted:
        """The form of one kernel [o, i, *1], near to it for inputs of these second moments."""
        form, matrix = FORMS[self.form], kernel.flatten(1)
        parts = list(form.stored(matrix.double(), self._numbers(matrix)).values())
        if gram is not None:
            parts = matrices.closer(lambda given: form.join(*given), parts, matrix, gram)
        kept = [p.to(kernel.dtype) if p.is_floating_point() else p for p in parts]
        return Fitted(dict(zip(form.parts, kept, strict=True)), form.join(*kept).view(kernel.shape))

    def _numbers(self, matrix: Tensor) -> FormNumbers:
        """The numbers of the form, as far as a matrix [o, i] has room for them."""
        room = {"kronecker": min(self.blocks ** 2, matrix.numel() // self.blocks ** 2), "displaced": self.blocks,
                "sparse": min(matrix.shape)}
        return FormNumbers(self.blocks, min(self.terms, room.get(self.form, self.terms)), self.share)

    def _judged(self, network: Network, layer: Layer) -> tuple[str, Shaped | None]:
        """Why a layer stays, or ("", what it becomes)."""
        if reason := refusal(network, layer, self.form, self.blocks):
            return reason, None
        weight = network.tensor(layer.weight).detach()
        own = self._numbers(weight.flatten(1))
        away = nearest(self.form, weight.flatten(1), own.blocks, own.terms, own.share) - weight.flatten(1)
        error = float(away.double().square().sum() / weight.double().square().sum())
        shaped = Shaped(layer.weight, tuple(weight.shape), self.form, own.blocks, own.terms, error,
                        own.share if self.form == "sparse" else 0.0)
        before = alone(network, layer.weight)
        grown = growth(before, StructuredPlan((shaped,)).apply(before))
        return (f"as {self.form} its {', '.join(grown)} would grow", None) if grown else ("", shaped)


def refusal(network: Network, layer: Layer, form: str, blocks: int) -> str:
    """Why a layer takes no structured matrix; "" if it does."""
    call, weight = layer.calls[0], network.tensor(layer.weight)
    if call.target in TRANSPOSED or groups_of(call) > 1 or weight[0, 0].numel() > 1 or turned(call):
        return "neither a linear layer nor a 1 x 1 convolution"
    if len(layer.calls) > 1 or len(layer.names) > 1 or len(readers_of(network, layer.weight)) > 1:
        return "its weight is shared or tied"
    if isinstance(schema_argument(call, "padding") if call.target in AXES else 0, str):
        return "its padding is a word"
    if form in LINEAR and call.target is not aten.linear.default:
        return "a convolution takes no Kronecker product" if form == "kronecker" else f"{form} is for linear layers"
    if form != "sparse" and any(size % blocks for size in weight.shape[:2]):
        return f"blocks={blocks} does not divide its widths {list(weight.shape[:2])}"
    if reason := not_finite(weight):
        return reason
    if not weight.any():
        return "its weight is all zero"
    if layer.weight in network.patterns:
        return f"its zeros are kept ({network.patterns[layer.weight]}); factors would fill them"
    taken = [n for part in TAKEN if (n := f"{stem(layer.weight)}{part}") in network.tensors()]
    return f"the name {taken[0]} is taken" if taken else ""


def nearest(form: str, matrix: Tensor, blocks: int, terms: int, share: float = 0.02) -> Tensor:
    """The structured matrix [o, i] that is nearest, or near, to a matrix."""
    made = FORMS[form].split(matrix.double(), FormNumbers(blocks, terms, share))
    return FORMS[form].join(*made).to(matrix.dtype)


__all__ = ["Shaped", "Structured", "StructuredPlan"]
