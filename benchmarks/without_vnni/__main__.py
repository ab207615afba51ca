"""Runs a Python script as on an x86 processor with AVX2 and without VNNI, at native speed.

    python benchmarks/without_vnni SCRIPT [ARGUMENTS ...]

Runtimes choose kernels by what the instruction CPUID says. The libraries of ONNX Runtime and OpenVINO are copied; in
the copies every CPUID is replaced by an instruction that traps, and a handler (``answer.c``) answers in its place,
without AVX-512, AVX-VNNI and AMX. Needs Linux, gcc and binutils. ``featherweight.deploy.saturates()`` is True in there.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
PACKAGES = ("onnxruntime", "openvino")
#: libraries that ask for the processor, and those that are not needed
ASKING = ("onnxruntime_pybind11_state*.so", "libopenvino_intel_cpu_plugin.so", "libopenvino.so.*")
LEFT_OUT = shutil.ignore_patterns("libopenvino_intel_gpu*", "libopenvino_intel_npu*", "__pycache__")
CPUID, TRAP = b"\x0f\xa2", b"\x0f\x0b"


def replace_cpuid(library: Path) -> int:
    """Replaces every CPUID of a library in place; gives how many there were."""
    code = subprocess.run(["objdump", "-d", "--no-show-raw-insn", str(library)], capture_output=True, text=True,
                          check=True).stdout
    places = [int(line.partition(":")[0], 16) for line in code.splitlines() if line.endswith("\tcpuid")]
    headers = subprocess.run(["readelf", "-lW", str(library)], capture_output=True, text=True, check=True).stdout
    loads = [[int(n, 16) for n in found] for found in re.findall(r"LOAD +(0x\w+) (0x\w+) 0x\w+ (0x\w+)", headers)]
    data = bytearray(library.read_bytes())
    for place in places:
        at = next(offset + place - start for offset, start, size in loads if start <= place < start + size)
        assert data[at:at + 2] == CPUID
        data[at:at + 2] = TRAP
    library.write_bytes(data)
    return len(places)


def prepared(folder: Path) -> Path:
    """The folder of copied packages, made where it is not there yet."""
    if not folder.exists():
        with tempfile.TemporaryDirectory() as made:
            for name in PACKAGES:
                found = importlib.util.find_spec(name)
                if found is not None and found.origin is not None:
                    shutil.copytree(Path(found.origin).parent, Path(made, name), ignore=LEFT_OUT)
            for library in (file for pattern in ASKING for file in Path(made).rglob(pattern)):
                print(f"{library.name}: {replace_cpuid(library)} places", file=sys.stderr)
            subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", f"{made}/answer.so", str(HERE / "answer.c")],
                           check=True)
            shutil.copytree(made, folder)
    return folder


def main() -> None:
    folder = prepared(Path.home() / ".cache/featherweight/without_vnni")
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]],
              {**os.environ, "LD_PRELOAD": str(folder / "answer.so"), "PYTHONPATH": os.pathsep.join(paths)})


if __name__ == "__main__":
    main()
