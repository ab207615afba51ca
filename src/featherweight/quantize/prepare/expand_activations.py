"""Activation functions that multiply what they read by a function of it, written out as that product.

ONNX Runtime has integer kernels for sigmoids and for products, but for no SiLU: left whole, it reads the value of
a convolution back, computes in float and rounds again. Seen (1.32, one thread, AVX2, benchmarks/int8_runtimes.py): the
file of an EfficientNet-B0 went from 0.71 to 1.00 times the speed of the one that ONNX Runtime's quantizer makes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from featherweight.deploy.kernels import Rules
from featherweight.errors import PlanError
from featherweight.network import Network
from featherweight.network.edit import insert_call

aten = torch.ops.aten

#: activation -> the function that its input is multiplied by
GATES = {aten.silu.default: aten.sigmoid.default, aten.hardswish.default: aten.hardsigmoid.default}


def gated(network: Network, kernels: set[str], rules: Rules) -> tuple[str, ...]:
    """The activation functions that are to be written out: those that read the rounded activation of one of
    ``kernels``."""
    if not rules.gates:
        return ()
    rounded = {node for node in network.calls() if node.name in kernels and rules.must_round(node.target)}
    return tuple(node.name for node in network.calls(*GATES) if node.args[0] in rounded)


def write_out(network: Network, names: Iterable[str]) -> None:
    """x * g(x) in the place of each activation; its name is the product's. Those written out already stay. Raises
    PlanError where the network is not the one that was planned for."""
    for name in names:
        try:
            node = network.node(name)
        except KeyError as error:
            raise PlanError(f"the plan writes {name!r} out as a product, which the network has not; plan again for "
                            "this network") from error
        if node.target in GATES:
            (value,) = node.all_input_nodes
            gate = insert_call(network, GATES[node.target], (value,), before=node, like=node, name=f"{name}_gate")
            node.target, node.args, node.kwargs = aten.mul.Tensor, (value, gate), {}
            network.changed()


__all__ = ["gated", "write_out"]
