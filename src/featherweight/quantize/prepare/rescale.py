"""Rescaling: channels too different for one grid are evened out where it is laid over them.

One grid serves a whole value. Where some of its channels are hundreds of times as large as others, the small ones round
to zero. Cross-layer equalization moves such scales from one layer's weights into the next one's, through what lets them
pass (ReLU); through a SiLU or a sum it cannot. Here a value is divided by a scale per channel, x / s, before it is
rounded. The call that gives it absorbs 1 / s in its output channels, and the calls that multiply the rounded activation
absorb s in their input channels; where there is no such call, and for all other readers, a product with a stored vector
is put into the graph: y = (x / s) * s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from featherweight.axes.scales import by_channel, channel_axis, input_ranges, scaled, unfit
from featherweight.errors import PlanError
from featherweight.network import Network
from featherweight.network.edit import WEIGHTED, bias_name, insert_call, node_name, weight_name
from featherweight.numerics.balance import smoothing
from featherweight.quantize.placement import Placement
from featherweight.quantize.ranges import watched
from featherweight.task import Task

aten = torch.ops.aten

#: the largest channel must be so many times as large as the median one, which then has 5 of 8 bits left
UNEVEN = 8.0
#: what of a dense weight's ranges is exchanged with those of the activations (Xiao et al. 2023, eq. 4)
ALPHA = 0.5
#: the smallest range that is taken for a channel's, as a share of the largest
SMALLEST = 2.0**-20


@dataclass(frozen=True)
class Product:
    """A product with a stored vector: ``readers`` (calls, or the output) read it in the place of ``node``."""

    node: str
    factor: str
    readers: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.factor}_product"


@dataclass(frozen=True)
class UnevenValue:
    """An activation that is rounded, and who absorbs its scales. maker: the call that gives it, if one can absorb
    them."""

    node: Node
    maker: Node | None
    multipliers: tuple[Node, ...]
    others: tuple[Node, ...]
    axis: int


def rescaled(network: Network, task: Task, placed: Placement,
             batches: int | None) -> tuple[dict[str, Tensor], dict[str, Tensor], tuple[Product, ...]]:
    """Evens out the channels of the activations that ``placed`` rounds, in place; gives the changed tensors by name,
    the vectors of the products by theirs, and the products. The network's function stays.

    s = max|x| per channel, which costs nothing where every channel of the weights that absorb it has a scale of its own
    (output channels, depthwise convolutions); for other readers s = (max|x| / max|W|)^1/2, as in SmoothQuant. Values
    whose channels are not UNEVEN stay as they are. Raises TaskError where calibration data is missing or empty.
    """
    sites = [site for name in placed.points if (site := _site(network, placed, network.node(name))) is not None]
    largest = _largest(network, task, sites, batches)
    values: dict[str, Tensor] = {}
    vectors: dict[str, Tensor] = {}
    products: list[Product] = []

    def change(name: str, to: Callable[[Tensor], Tensor]) -> None:
        old = network.tensor(name).detach()
        values[name] = to(old.double()).to(old.dtype)
        network.set_tensor(name, values[name])

    def put(site: UnevenValue, readers: tuple[Node, ...], factor: Tensor, ending: str) -> None:
        product = Product(site.node.name, f"{site.node.name}_{ending}", tuple(r.name for r in readers))
        vectors[product.factor] = factor.view([-1] + [1] * (-site.axis - 1)).float()
        multiply(network, product, vectors[product.factor])
        products.append(product)

    for site in sites:
        sizes = largest[site.node.name]
        if not sizes.max() > UNEVEN * sizes[sizes > 0].median():
            continue
        scale = _scale(network, site, sizes.clamp(min=float(sizes.max()) * SMALLEST))
        if site.maker is not None:
            change(str(weight_name(site.maker)), partial(scaled, site.maker, outputs=1 / scale))
            if (bias := bias_name(site.maker)) is not None:
                change(bias, partial(torch.mul, 1 / scale))
        for node in site.multipliers:
            change(str(weight_name(node)), partial(scaled, node, inputs=scale))
        if site.maker is None:
            put(site, site.multipliers, 1 / scale, "shrunk")
        elif site.others:
            put(site, site.others, scale, "grown")
    return values, vectors, tuple(products)


def multiply(network: Network, product: Product, factor: Tensor) -> None:
    """Puts a product into the graph. Raises PlanError where the network is not the one that it was planned for."""
    try:
        node = network.node(product.node)
    except KeyError as error:
        raise PlanError(f"the plan multiplies {product.node!r}, which the network has not; plan again for this "
                        "network") from error
    readers = [u for u in node.users if u.name in product.readers]
    if {r.name for r in readers} != set(product.readers):
        raise PlanError(f"the plan says that {', '.join(product.readers)} read {product.node!r}, which they do not; "
                        "plan again for this network")
    network.add_tensor(product.factor, factor, buffer=True)
    with network.graph.inserting_after(node):
        vector = network.graph.create_node("get_attr", product.factor, name=node_name(product.factor))
    made = insert_call(network, aten.mul.Tensor, (node, vector), after=vector, like=node, name=product.name)
    for reader in readers:
        reader.replace_input_with(node, made)
    network.changed()


def _site(network: Network, placed: Placement, node: Node) -> UnevenValue | None:
    """The activation of a point; None where a call multiplies it that cannot absorb scales, or none can at all."""
    kernels = set(placed.kernels)
    multipliers = tuple(u for u in node.users if u.name in kernels and u.name in placed.readers[node.name])
    others = tuple(u for u in node.users if u not in multipliers)
    maker = node
    if node.target is aten.relu.default and len(node.all_input_nodes[0].users) == 1:
        maker = node.all_input_nodes[0]
    given = maker if maker.target in WEIGHTED and not unfit(network, maker) else None
    if given is None and not multipliers:
        return None
    if any(unfit(network, m) or m.all_input_nodes.count(node) != 1 for m in multipliers):
        return None
    axes = {channel_axis(network, m) for m in (*multipliers, *([] if given is None else [given]))}
    return UnevenValue(node, given, multipliers, others, axes.pop()) if len(axes) == 1 else None


def _scale(network: Network, site: UnevenValue, sizes: Tensor) -> Tensor:
    """[c] float64: what the channels are divided by, 1 for the median one."""
    dense = [n for n in site.multipliers if not _depthwise(network, n)]
    scale = sizes
    if dense:
        ranges = torch.stack([input_ranges(n, network.tensor(str(weight_name(n))).detach().double()) for n in dense])
        scale = smoothing(sizes, ranges.amax(0), ALPHA)
    return scale / scale.median()


def _depthwise(network: Network, node: Node) -> bool:
    """Whether each of the call's output channels reads a single input channel."""
    return node.target is not aten.linear.default and \
        by_channel(node, network.tensor(str(weight_name(node))).detach()).shape[2] == 1


def _largest(network: Network, task: Task, sites: list[UnevenValue], batches: int | None) -> dict[str, Tensor]:
    """Node's name -> [c] float64, the largest magnitude in each channel."""
    found: dict[str, Tensor] = {}

    def watch(site: UnevenValue) -> Callable[[Any], None]:
        def tap(value: Tensor) -> None:
            new = value.detach().abs().movedim(site.axis, 0).flatten(1).amax(1).double()
            found[site.node.name] = torch.maximum(found.get(site.node.name, new), new)

        return tap

    if sites:
        watched(network, task, {s.node.name: watch(s) for s in sites}, batches, "rescaling needs")
    return found


__all__ = ["Product", "multiply", "rescaled"]
