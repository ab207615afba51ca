"""OpenVINO's own profile of a file, kernel by kernel, with the weights that a kernel reads.

OpenVINO renames many operators when it reads a graph (a convolution with a folded batch norm, a transposed one), but a
stored tensor keeps the network's name: what tells which layer a kernel computes.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from featherweight.deploy.nest import feed
from featherweight.deploy.openvino.target import core, imported, options
from featherweight.deploy.profile import PROFILERS, KernelTime, Profiler
from featherweight.network import Signature

WARM = 3  #: runs that are left out
#: in the names of operators: the part of a layer's call that is left when its bias became an operator of its own
PARTS = ("/WithoutBiases",)
BIASES = ("Add", "Multiply")  #: operators that a kernel with weights takes in


def profiler(precision: str) -> Profiler:
    """The profile of files whose floats are computed in ``precision``."""
    def profile(path: Path, like: Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any], threads: int,
                seconds: float) -> tuple[KernelTime, ...]:
        """The kernels in the order in which they run. Raises InputError for inputs that do not fit."""
        model = core().read_model(path, path.with_suffix(".bin"))
        read = weights_of(model)
        known = {name for port in model.inputs for name in port.get_names()} & {item.name for item in like.inputs}
        arrays = feed(like, known, args, dict(kwargs))
        model.reshape({name: imported().PartialShape(list(v.shape)) for name, v in arrays.items()})
        compiled = core().compile_model(model, "CPU", {**options(threads, precision), "PERF_COUNT": True})
        request, spent = compiled.create_infer_request(), defaultdict[tuple[str, str], list[float]](list)
        began, runs = time.monotonic(), 0
        while runs < WARM + 3 or time.monotonic() - began < seconds:
            request.infer(arrays, share_inputs=True)
            runs += 1
            for row in request.profiling_info if runs > WARM else ():
                if row.status == row.Status.EXECUTED:
                    spent[row.node_name, row.node_type].append(row.real_time.total_seconds())
        made_of = {op.get_friendly_name(): _originals(op) for op in compiled.get_runtime_model().get_ordered_ops()}
        return tuple(_kernel(name, operator, every, made_of.get(name) or (name,), read)
                     for (name, operator), every in spent.items())

    return profile


def _kernel(name: str, operator: str, every: list[float], originals: tuple[str, ...],
            read: Mapping[str, tuple[str, ...]]) -> KernelTime:
    later = sorted(every)
    middle = later[len(later) // 4: len(later) - len(later) // 4]  # microseconds are told as integers
    calls = tuple(_call(original) for original in originals)
    return KernelTime(name, operator, mean(middle), calls,
                      tuple(dict.fromkeys(weight for original in originals for weight in read.get(original, ()))))


def _call(name: str) -> str:
    """The call of the network that an operator is named after."""
    for part in PARTS:
        name = name.removesuffix(part)
    return name.removeprefix("node_")


def _originals(operator: Any) -> tuple[str, ...]:
    """The operators of the file that a kernel was made of."""
    held = operator.get_rt_info()
    names = held["originalLayersNames"].astype(str) if "originalLayersNames" in held else ""
    return tuple(name for name in names.split(",") if name)


def weights_of(model: Any) -> dict[str, tuple[str, ...]]:
    """Name of each operator that computes with activations -> names of the stored tensors that it reads, directly or
    through operators of constants alone; what adds a bias or a scale may name the kernel, so it has the weights of the
    operator before it too."""
    constants: dict[str, tuple[str, ...]] = {}  # of operators that depend on nothing but constants
    found: dict[str, tuple[str, ...]] = {}
    for operator in model.get_ordered_ops():
        name = operator.get_friendly_name()
        givers = [value.get_node().get_friendly_name() for value in operator.input_values()]
        held = tuple(dict.fromkeys(weight for giver in givers for weight in constants.get(giver, ())))
        if operator.get_type_name() == "Constant":
            constants[name] = (name,)
        elif givers and all(giver in constants for giver in givers):
            constants[name] = held
        else:
            active = [giver for giver in givers if giver not in constants]
            before = found[active[0]] if operator.get_type_name() in BIASES and len(active) == 1 else ()
            found[name] = (*before, *held)
    return found


PROFILERS |= {"openvino": profiler("f32"), "openvino-bf16": profiler("bf16")}
__all__ = ["profiler", "weights_of"]
