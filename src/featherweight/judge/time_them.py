"""Times the files of this folder in their runtime and leaves times.json beside them.

    python time_them.py

It needs Python 3.9, numpy and the runtime, nothing else. What times.json has already is left out, so that a run that
was stopped goes on. Nothing else should run meanwhile.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

Call = Callable[[], Any]
#: (the file that the others are timed beside, "" for none; the files)
Part = tuple[str, list[str]]
MANIFEST, SCRIPT, RESULT = "manifest.json", "time_them.py", "times.json"
#: files that are loaded at a time, least rounds, untimed calls before the first round
TOGETHER, ROUNDS, WARM = 8, 11, 3
#: name of a file that computes next to nothing: what it takes, a runtime takes to be called, and a layer alone as well
NOTHING = "nothing"
#: of the seconds of a layer alone, what is its own at least
OWN = 0.05
#: a call this long (seconds) needs no untimed call before it to warm the caches
LONG = 0.02


def device(package: str, threads: int) -> str:
    """What a latency depends on beside the file, as featherweight writes it."""
    info, models = Path("/proc/cpuinfo"), []
    if info.exists():
        models = [line.partition(":")[2].strip() for line in info.read_text().splitlines()
                  if line.startswith("model name")]
    processor = f"{platform.machine()} {models[0] if models else platform.processor()}".strip()
    return f"{processor} {package} {version(package)} threads={threads} "


def in_onnxruntime(path: Path, threads: int, precision: str) -> tuple[Callable[[Any], Any], set[str]]:
    """A function of arrays by name, and the names that it reads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda arrays: session.run(None, arrays), {i.name for i in session.get_inputs()}


def in_openvino(path: Path, threads: int, precision: str) -> tuple[Callable[[Any], Any], set[str]]:
    """The same in OpenVINO."""
    import openvino

    model = openvino.Core().compile_model(str(path), "CPU", {
        "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision, "ENABLE_CPU_PINNING": False})
    request = model.create_infer_request()
    return request.infer, {name for port in model.inputs for name in port.get_names()}


RUNTIMES = {"onnxruntime": in_onnxruntime, "openvino": in_openvino}


def call_of(folder: Path, entry: Mapping[str, Any], manifest: Mapping[str, Any]) -> Call:
    """A function without arguments that runs a file once."""
    run, read = RUNTIMES[manifest["package"]](folder / entry["file"], manifest["threads"], manifest["precision"])
    if "values" in entry:
        with np.load(str(folder / entry["values"])) as held:
            arrays = {name: held[name] for name in held.files if name in read}
    else:
        numbers = np.random.default_rng(0)
        arrays = {name: numbers.standard_normal(shape).astype(kind) for name, (kind, shape) in entry["inputs"].items()}
    return lambda: run(arrays)


def rounds(calls: Mapping[str, Call], seconds: float) -> dict[str, list[float]]:
    """Name -> the seconds of every round; in each round all are called, in a new order."""
    long: dict[str, bool] = {}
    for name, call in calls.items():
        for _ in range(WARM):
            began = time.perf_counter()
            call()
            long[name] = time.perf_counter() - began > LONG
    taken: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0)
    gc.disable()
    until, done = time.perf_counter() + seconds * len(calls), 0
    while done < ROUNDS or time.perf_counter() < until:
        shuffle.shuffle(order)
        for name in order:
            if not long[name]:
                calls[name]()
            began = time.perf_counter()
            calls[name]()
            taken[name].append(time.perf_counter() - began)
        done += 1
    gc.enable()
    return taken


def parts_of(files: Mapping[str, Any], known: set[str]) -> list[Part]:
    """The work that is left, a few files at a time."""
    layers = [name for name, entry in files.items() if "beside" not in entry and name not in {*known, NOTHING}]
    found: list[Part] = [("", [NOTHING, *layers[i:i + TOGETHER]]) for i in range(0, len(layers), TOGETHER)]
    for first in dict.fromkeys(entry["beside"] for entry in files.values() if "beside" in entry):
        others = [name for name, entry in files.items()
                  if entry.get("beside") == first != name and first + " " + name not in known]
        if others or first not in known:
            found += [(first, [first, *others[i:i + TOGETHER - 1]])
                      for i in range(0, max(1, len(others)), TOGETHER - 1)]
    return found


def figures(first: str, taken: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Name -> the least seconds of a layer, less those of nothing; the median seconds of the file that others are timed
    beside, and "its name the other's" -> the median share of its seconds that the other takes in the same round."""
    if not first:
        least = {name: min(seconds) for name, seconds in taken.items()}
        return {name: own(seconds, least[NOTHING]) for name, seconds in least.items() if name != NOTHING}
    beside = np.array(taken[first])
    found = {first + " " + name: float(np.median(np.array(seconds) / beside))
             for name, seconds in taken.items() if name != first}
    found[first] = float(np.median(beside))
    return found


def own(seconds: float, nothing: float) -> float:
    """What a layer alone takes in a network: less than by itself, as a runtime is called once for all layers."""
    return max(seconds - nothing, OWN * seconds)


def main(folder: Path) -> None:
    """Times what is not timed yet, part by part; what is done is kept at once."""
    manifest = json.loads((folder / MANIFEST).read_text())
    place, path = device(manifest["package"], manifest["threads"]), folder / RESULT
    times = json.loads(path.read_text()) if path.exists() else {}
    parts = parts_of(manifest["files"], {name[len(place):] for name in times if name.startswith(place)})
    for done, (first, names) in enumerate(parts):
        print(f"part {done + 1} of {len(parts)}: {len(names)} files", file=sys.stderr, flush=True)
        calls = {name: call_of(folder, manifest["files"][name], manifest) for name in names}
        taken = rounds(calls, manifest["network_s" if first else "layer_s"])
        for name, seconds in figures(first, taken).items():
            times.setdefault(place + name, seconds)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(times, indent=0))
        os.replace(str(part), str(path))
    print(f"{path}: {len(times)} figures of {place.strip()}")


if __name__ == "__main__":
    main(Path(__file__).resolve().parent)
