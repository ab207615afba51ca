"""Prunes every model of the zoo at half of its channels, and checks what comes out.

    python benchmarks/zoo_prune.py [NAME ...] [--again NAME ...] [--out benchmarks/results/zoo.json] [--limit SECONDS]

Needs torchvision, timm and transformers; downloads no weights. For every model (random weights, unsettled batch
statistics): capture; ``prune.Channels(ratio=0.5, allocation="uniform")``; the outputs of the cut network against those
of the network in which the same channels are zero (in double precision); one plain SGD step; export to ONNX, compared
in ONNX Runtime. Detectors in parts: every part by itself, then the detector with all of them. Each model runs in a
process of its own with a time limit; each row is written when it is done, and is not run again unless asked for.
Exits with 1 if any row fails.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import zoo_models
from rows import Rows
from tables_zoo import growth
from zoo_capture import prepared
from zoo_checks import Clock, Given, counted, difference, exported, floats, in_double, one_step, roughened

import featherweight as fw
from featherweight import measure
from featherweight.axes.groups import AxisGroups, axis_groups
from featherweight.network import Network

TOLERANCE = 1e-5  #: cut against zeroed, relative to the largest output
GOAL = 0.4  #: MACs that may be left
RESULTS = Path(__file__).parent / "results/zoo.json"
MARK = "ROW "


def holders(small: Network, left: measure.Macs, frozen: list[list[str]]) -> dict[str, float]:
    """Reason -> share of the MACs that are left in layers whose channels it holds."""
    reasons = dict(reversed(frozen))
    paths = {n.name: str(n.meta.get("module", "")) for n in small.calls()}
    found: dict[str, float] = {}
    for name, macs in left.by_node.items():
        reason = reasons.get(paths[name])
        if reason is not None:
            found[reason] = found.get(reason, 0) + macs / max(left.total, 1)
    return {k: round(v, 3) for k, v in sorted(found.items(), key=lambda i: -i[1])[:5]}


def examine(network: Network, given: Given, clock: Clock, part: bool = False) -> tuple[dict[str, Any], Network]:
    """One network's figures, and the cut network."""
    axes: AxisGroups = clock("groups", lambda: axis_groups(network))
    groups = len(axes.groups)
    del axes
    step = fw.prune.Channels(ratio=0.5, allocation="uniform")
    plan = clock("plan", lambda: step.plan(network, fw.Task()))
    small = clock("apply", lambda: plan.apply(network))
    wanted = in_double(plan.zero(network), given)
    worst = difference(wanted, in_double(small.copy(), given))
    agreement = clock("export", lambda: exported(small, given))
    trained = clock("train", lambda: one_step(small, given))
    frozen = [[s.path, s.reason] for s in plan.skipped]
    before, after = (counted(n, given if part else None) for n in (network, small))
    expected = measure.macs(small).total
    row = {"nodes": len(network.calls()), "groups": groups, "macs_before": before.total, "macs_after": after.total,
           "params_before": sum(p.numel() for p in network.parameters()),
           "params_after": sum(p.numel() for p in small.parameters()), "uncounted": len(before.uncounted),
           "difference": worst, "onnx": agreement.max_rel, "onnx_tolerance": agreement.tolerance, "trained": trained,
           "seconds": dict(clock.seconds), "processor_seconds": dict(clock.processor),
           "frozen": frozen, "held_by": holders(small, after, frozen)}
    foreseen = abs(plan.macs_after - expected) <= 0.02 * plan.macs_before
    row["ok"] = worst <= TOLERANCE and agreement.ok and trained and foreseen
    return row, small


def whole(name: str) -> dict[str, Any]:
    """The row of one model, run in this process."""
    made, clock = zoo_models.ROWS[name], Clock()
    model = roughened(prepared(made))
    args = made.inputs(2, made.size, 1)
    network = clock("capture", lambda: fw.capture(model, args))
    if isinstance(network, Network):
        del model
        row, _ = examine(network, (args, {}), clock)
        return row
    given, parts = what_parts_get(network, args), {}
    for path, part in list(network.parts.items()):
        parts[path], small = examine(part, given[path], Clock(), part=True)
        network.replace(path, small)
    with torch.no_grad():
        found = network(*made.inputs(2, made.size, 2))
    runs = all(bool(t.isfinite().all()) for t in floats(found)) and len(found) == 2
    rows = list(parts.values())
    row = {k: sum(r[k] for r in rows) for k in rows[0] if k in (
        "nodes", "groups", "macs_before", "macs_after", "params_before", "params_after", "uncounted")}
    for kind, own in (("seconds", clock.seconds), ("processor_seconds", clock.processor)):
        row[kind] = own | {s: round(sum(r[kind][s] for r in rows), 3) for s in rows[0][kind]}
    held: dict[str, float] = {}
    for r in rows:
        for why, share in r["held_by"].items():
            held[why] = held.get(why, 0) + round(share * r["macs_after"] / max(row["macs_after"], 1), 3)
    return {**row, "ok": runs and all(r["ok"] for r in rows), "runs": runs, "parts": parts, "held_by": held,
            "difference": max(r["difference"] for r in rows), "onnx": max(r["onnx"] for r in rows),
            "trained": all(r["trained"] for r in rows),
            "frozen": [[f"{path}: {p}", why] for path, r in parts.items() for p, why in r["frozen"]]}


def what_parts_get(assembly: fw.Assembly, args: tuple[Any, ...]) -> dict[str, Given]:
    """The inputs of each part while the whole runs on ``args``; examples for a part that is not called."""
    found: dict[str, Given] = {}
    hooks = [part.register_forward_pre_hook(
        lambda _, args, kwargs, path=path: found.setdefault(path, (args, kwargs)) and None, with_kwargs=True)
        for path, part in assembly.parts.items()]
    with torch.no_grad():
        assembly(*args)
    for hook in hooks:
        hook.remove()
    return {path: found.get(path) or part.example_inputs(2) for path, part in assembly.parts.items()}


def child(name: str, threads: int) -> int:
    torch.set_num_threads(threads)
    try:
        row = whole(name)
    except Exception as error:
        traceback.print_exc()
        row = {"ok": False, "error": f"{type(error).__name__}: {error}"[:600]}
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
    if not row["ok"]:
        print(done.stderr[-3000:], file=sys.stderr)
    return row


def versions() -> dict[str, str]:
    import timm
    import torchvision
    import transformers

    return {m.__name__: m.__version__ for m in (fw, torch, torchvision, timm, transformers)} | {
        "python": platform.python_version()}


def line(name: str, row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{name:44} FAILED {row['error']}"
    left = row["macs_after"] / max(row["macs_before"], 1)
    seconds = row["seconds"]
    return (f"{name:44} {row['nodes']:6} {row['groups']:6} {left:8.3f}{' ' if left <= GOAL else '*'} "
            f"{row['difference']:9.1e} {row['onnx']:9.1e} {'yes' if row['trained'] else 'NO':>5} "
            + " ".join(f"{seconds.get(s, 0):7.2f}" for s in ("capture", "groups", "plan", "apply", "export"))
            + f" {row['peak_mb']:7}{'' if row['ok'] else '  FAILED'}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models, or the first letters of their names (default: all)")
    parser.add_argument("--again", nargs="*", default=[], help="models that are run though they have a row")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=float, default=1800, help="seconds for one model")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options.child, options.threads)
    wanted = (*options.names, *options.again)
    unknown = [n for n in wanted if not any(known.startswith(n) for known in zoo_models.ROWS)]
    if unknown:
        parser.error(f"unknown models {unknown}; known: {', '.join(zoo_models.ROWS)}")
    rows = Rows(options.out.resolve())
    print(f"{'model':44} {'nodes':>6} {'groups':>6} {'left':>8}  {'cut=zero':>9} {'onnx':>9} {'train':>5} "
          + " ".join(f"{s:>7}" for s in ("capture", "groups", "plan", "apply", "export", "MB")))
    for name in zoo_models.ROWS:
        again = any(name.startswith(n) for n in options.again)
        asked = again or not wanted or any(name.startswith(n) for n in options.names)
        if asked and (again or name not in rows):
            rows.add(name, {**run(name, options.limit, options.threads), "threads": options.threads,
                            "tolerance": TOLERANCE, "versions": versions()})
        if asked:
            print(line(name, rows[name]), flush=True)
    models = rows.newest()
    failed = [n for n, row in models.items() if not row["ok"]]
    print(f"{len(models) - len(failed)} of {len(models)} hold" + (f"; failed: {', '.join(failed)}" if failed else ""),
          f"(* more than {GOAL:.0%} of the MACs left);", growth(models))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
