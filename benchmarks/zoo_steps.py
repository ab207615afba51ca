"""Every kind of step on small models of many families, saved, loaded, exported to both runtimes and compared.

    python benchmarks/zoo_steps.py [NAME ...] [--again NAME ...] [--out benchmarks/results/zoo_steps.json]

Needs timm and transformers, and OpenVINO for its column; downloads no weights. For every model of ``zoo_families``:
capture; half of the channels cut, against the same channels zeroed, and one SGD step; a block less; low rank; sparse
weights; int8, saved, loaded and exported to ONNX Runtime and OpenVINO. ``treated``: the share of all parameters in
matrices that a family changes. Each model runs in a process of its own with a time limit; each row is written when it
is done. Exits with 1 if any row fails.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import zoo_families
from rows import Rows
from zoo_capture import prepared
from zoo_checks import Clock, Given, difference, floats, in_double, one_step, roughened
from zoo_prune import MARK, versions

import featherweight as fw
from featherweight import deploy, measure
from featherweight.network import Network

TOLERANCE = 1e-5  #: cut against zeroed, relative to the largest output
RESULTS = Path(__file__).parent / "results/zoo_steps.json"
#: what is said of calls between layers, which no row keeps
FLOATS = ("integer kernel", "no rounded values on both sides")
STEPS: dict[str, fw.Step] = {
    "depth": fw.prune.Layers(count=1), "weights": fw.prune.Weights(sparsity=0.5),
    "low rank": fw.factorize.LowRank(energy=0.8), "int8": fw.quantize.Quantize(),
    "int8 weights": fw.quantize.Quantize(activations=None),
}


def treated(before: Network, after: Network) -> float:
    """The share of all parameters in matrices (two axes or more) that are changed, stored otherwise or gone."""
    given, left = before.tensors(), after.tensors()
    sizes, changed = 0, 0
    for name in {min(before.tied_names(n)) for n, t in given.items() if isinstance(t, torch.nn.Parameter)}:
        tensor = given[name]
        if tensor.dim() < 2:
            continue
        sizes += tensor.numel()
        other = left.get(name)
        same = other is not None and other.shape == tensor.shape and other.dtype == tensor.dtype
        changed += 0 if same and torch.equal(other, tensor) else tensor.numel()  # type: ignore[arg-type]
    return round(changed / max(sizes, 1), 4)


def channels(network: Network, given: Given, clock: Clock) -> dict[str, Any]:
    plan = clock("channels", lambda: fw.prune.Channels(ratio=0.5).plan(network, fw.Task()))
    small = plan.apply(network)
    worst = difference(in_double(plan.zero(network), given), in_double(small.copy(), given))
    left = measure.macs(small).total / max(measure.macs(network).total, 1)
    told = abs(plan.macs_after - measure.macs(small).total) <= 0.02 * max(plan.macs_before, 1)
    return {"left": round(left, 3), "cut_is_zero": worst, "told": told, "trained": one_step(small.copy(), given),
            "frozen": [[s.path, s.reason] for s in plan.skipped], "ok": worst <= TOLERANCE and told,
            "treated": treated(network, small)}


def step(network: Network, given: Given, task: fw.Task, one: fw.Step) -> tuple[dict[str, Any], Network]:
    plan = one.plan(network, task)  # type: ignore[attr-defined]
    small = plan.apply(network)
    with torch.no_grad():
        outputs = floats(small(*given[0], **given[1]))
    runs = all(bool(t.isfinite().all()) for t in outputs)
    return {"treated": treated(network, small), "ok": runs,
            "skipped": [[s.path, s.reason] for s in plan.skipped if not any(t in s.reason for t in FLOATS)][:12]}, small


def deployed(small: Network, given: Given, name: str) -> dict[str, Any]:
    target = deploy.target(name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"model{target.suffix}")
        size = target.export(small, path)
        runner = target.load(path, like=small.signature)
        found = deploy.verify(small, runner, *given)
        runner.close()
    return {"bytes": size, "apart": found.max_rel, "tolerance": found.tolerance, "ok": found.ok}


def saved(small: Network, given: Given) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        size = small.save(Path(folder, "small.fw"))
        back = fw.load(Path(folder, "small.fw"))
        same = all(torch.equal(a, b) for a, b in zip(floats(small(*given[0])), floats(back(*given[0])), strict=True))
    return {"bytes": size, "ok": same}


def whole(name: str) -> dict[str, Any]:
    """The row of one model, run in this process."""
    made, clock = zoo_families.ROWS[name], Clock()
    model = roughened(prepared(made))
    args = made.inputs(2, made.size, 1)
    network = clock("capture", lambda: fw.capture(model, args))
    given: Given = (args, {})
    if not isinstance(network, Network):
        return {"ok": False, "parts": list(network.parts), "notes": network.notes}
    batches = [(args if len(args) > 1 else args[0], torch.zeros(2, dtype=torch.int64))]
    task = fw.Task(calibration=batches, train=batches, loss=lambda output, _: sum(t.float().square().mean()
                                                                                  for t in floats(output)))
    row: dict[str, Any] = {
        "free": {i.name: {a.axis: a.name for a in i.axes} for i in network.signature.inputs},
        "limits": {i.name: i.limits for i in network.signature.inputs}, "notes": network.notes,
        "params": sum(p.numel() for p in network.parameters()), "steps": {}}
    results = row["steps"]

    def attempt(stage: str, work: Callable[[], dict[str, Any]]) -> None:
        try:
            results[stage] = clock(stage, work)
        except Exception as error:
            traceback.print_exc()
            results[stage] = {"ok": False, "error": f"{type(error).__name__}: {error}"[:600]}

    networks: dict[str, Network] = {}

    def keep(stage: str) -> dict[str, Any]:
        result, networks[stage] = step(network, given, task, STEPS[stage])
        return result

    attempt("channels", lambda: channels(network, given, clock))
    for stage in STEPS:
        attempt(stage, lambda stage=stage: keep(stage))
    small = networks.get("int8", network)
    attempt("saved", lambda: saved(small, given))
    for target in ("onnxruntime", "openvino"):
        attempt(target, lambda target=target: deployed(small, given, target))
    row["seconds"] = dict(clock.seconds)
    row["ok"] = all(r["ok"] for r in results.values())
    return row


def child(name: str, threads: int) -> int:
    torch.set_num_threads(threads)
    try:
        row = whole(name)
    except Exception as error:
        traceback.print_exc()
        row = {"ok": False, "error": f"{type(error).__name__}: {error}"[:900]}
    row["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(MARK + json.dumps(row), flush=True)
    return 0


def run(name: str, limit: float, threads: int) -> dict[str, Any]:
    """The row of one model, run in a process of its own."""
    command = [sys.executable, __file__, "--child", name, "--threads", str(threads)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"ok": False, "error": f"it took more than {limit:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if not lines:
        return {"ok": False, "error": f"it ended with {done.returncode}: {done.stderr[-400:]}"}
    row: dict[str, Any] = json.loads(lines[-1].removeprefix(MARK))
    return row


def line(name: str, row: dict[str, Any]) -> str:
    if "steps" not in row:
        return f"{name:24} FAILED {row.get('error') or row.get('parts')}"[:300]
    found = row["steps"]
    shares = " ".join(f"{found[s].get('treated', float('nan')):6.3f}" for s in ("channels", *STEPS))
    wrong = "; ".join(f"{s}: {r.get('error', r)}"[:200] for s, r in found.items() if not r["ok"])
    apart = " ".join(f"{found[t].get('apart', float('nan')):8.1e}" for t in ("onnxruntime", "openvino"))
    return (f"{name:24} {found['channels'].get('left', float('nan')):6.3f} {shares} {apart}"
            f"{'' if row['ok'] else '  FAILED ' + wrong}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models, or the first letters of their names (default: all)")
    parser.add_argument("--again", nargs="*", default=[], help="models that are run though they have a row")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=float, default=600, help="seconds for one model")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options.child, options.threads)
    rows = Rows(options.out.resolve())
    print(f"{'model':24} {'left':>6} " + " ".join(f"{s[:6]:>6}" for s in ("channels", *STEPS))
          + f" {'ort':>8} {'openvino':>8}   (share of the matrices' parameters treated)")
    for name in zoo_families.ROWS:
        again = any(name.startswith(n) for n in options.again)
        if not (again or not options.names or any(name.startswith(n) for n in options.names)):
            continue
        if again or name not in rows:
            rows.add(name, {**run(name, options.limit, options.threads), "threads": options.threads,
                            "versions": versions()})
        print(line(name, rows[name]), flush=True)
    failed = [n for n, row in rows.newest().items() if not row["ok"]]
    print(f"{len(rows.newest()) - len(failed)} of {len(rows.newest())} hold"
          + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
