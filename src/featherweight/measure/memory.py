"""Peak memory of a deployed file: a fresh process loads and runs it and reports how far its resident set grew."""

from __future__ import annotations

import gc
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

#: seconds until a child process is given up
PATIENCE = 300.0


def peak_memory(target: str, file: str | Path, network_file: str | Path, threads: int = 1) -> int | None:
    """Bytes by which the peak resident set of a fresh process grows while it loads ``file`` and runs it three times at
    batch one, above what Python, torch and the runtime's package held before. None where it could not be measured.

    network_file: the ``.fw`` file of the same network, which says how it is called.

    Example:
        >>> saved = network.save("network.fw")
        >>> size = fw.deploy.target("onnxruntime").export(network, "model.onnx")
        >>> peak = fw.measure.peak_memory("onnxruntime", "model.onnx", "network.fw")  # None: not measured
    """
    source = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "featherweight.measure.memory", target, str(file), str(network_file), str(threads)]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True,
                               env={**os.environ, "PYTHONPATH": path})
        grown = json.loads(child.stdout.strip().splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
    return int(grown) if isinstance(grown, int) else None


def _status(key: str) -> int | None:
    """A size from Linux's ``/proc/self/status`` in bytes; None elsewhere."""
    try:
        found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found.group(1)) * 1024 if found else None


def _peak() -> int | None:
    peak = _status("VmHWM")
    if peak is None:
        try:
            import resource
        except ImportError:
            return None
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak


def _main(target: str, file: str, network_file: str, threads: str) -> None:
    from featherweight import deploy
    from featherweight.network import Network, load

    network = load(network_file)
    assert isinstance(network, Network)
    signature, (args, kwargs) = network.signature, network.example_inputs(batch=1)
    runtime = deploy.target(target)
    del network
    importlib.import_module(runtime.package)
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
        before = _status("VmRSS")
    except OSError:
        before = _peak()
    runner = runtime.load(file, int(threads), like=signature)
    for _ in range(3):
        runner(*args, **kwargs)
    after = _peak()
    print(json.dumps(None if before is None or after is None else max(after - before, 0)))


if __name__ == "__main__":
    _main(*sys.argv[1:])
