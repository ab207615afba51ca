"""ONNX Runtime's own profile of a file, kernel by kernel, with the calls of the network that a kernel stands for.

The exporter names a value after the call of the network that makes it. ONNX Runtime names a kernel after a node or a
value of the file, with more behind it ("relu_3_nchwc", "node_Conv_78_token_1"), also where it fused several nodes.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from featherweight.deploy.nest import feed
from featherweight.deploy.profile import KernelTime, works
from featherweight.network import Signature

#: how far a fused kernel may reach back from the node that it is named after
REACH = 8
WARM = 3  #: runs that are left out
END = "_kernel_time"


def profile(path: Path, like: Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any], threads: int,
            seconds: float) -> tuple[KernelTime, ...]:
    """The kernels in the order in which they run. Raises InputError for inputs that do not fit."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    options.enable_profiling = True
    with tempfile.TemporaryDirectory(prefix="featherweight-") as folder:
        options.profile_file_prefix = str(Path(folder, "profile"))
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        arrays = feed(like, {i.name for i in session.get_inputs()}, args, dict(kwargs))
        began, runs = time.monotonic(), 0
        while runs < WARM + 3 or time.monotonic() - began < seconds:
            session.run(None, arrays)
            runs += 1
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return kernels(events, calls_of(path))


def kernels(events: list[dict[str, Any]], calls: Mapping[str, tuple[str, ...]]) -> tuple[KernelTime, ...]:
    """Of the events of a profile. calls: name of a node or value of the file -> the calls that it may stand for."""
    spent: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith(END):
            operator = str(event.get("args", {}).get("op_name", ""))
            spent[name.removesuffix(END), operator].append(float(event["dur"]) * 1e-6)
    found = []
    for (name, operator), every in spent.items():
        later = sorted(every[WARM:] or every)
        middle = later[len(later) // 4: len(later) - len(later) // 4]  # microseconds are told as integers
        known = max((n for n in calls if name == n or name.startswith(f"{n}_")), key=len, default="")
        found.append(KernelTime(name, operator, mean(middle), calls.get(known, ())))
    return tuple(found)


def calls_of(path: Path) -> dict[str, tuple[str, ...]]:
    """Name of each node and value of a file -> values made by it and, from there back to the first operator that holds
    weights or does MACs, by what is read: what may have been fused into one kernel."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    maker = {output: node for node in graph.node for output in node.output}
    found: dict[str, tuple[str, ...]] = {}
    for node in graph.node:
        chain: list[str] = []
        at: Any = node
        while at is not None and len(chain) < REACH:
            chain += [*at.output, at.name.removeprefix("node_")]  # outputs of the file have names of their own
            if works(at.op_type):
                break
            at = next((maker[i] for i in at.input if i in maker and maker[i].op_type != "DequantizeLinear"), next(
                (maker[i] for i in at.input if i in maker), None))
        for name in (node.name, *node.output):
            found[name] = tuple(chain)
    return found


__all__ = ["calls_of", "kernels", "profile"]
