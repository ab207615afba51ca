"""The sections of docs/results.md about many architectures: captured, pruned, taken through every step."""

from __future__ import annotations

import numpy as np
from page import Rows, table, unique
from rows import Row

#: architectures that differ in depth alone
FAMILIES = {"ResNet": ("resnet34", "resnet50", "resnet101", "resnet152"),
            "DenseNet": ("densenet121", "densenet169", "densenet201"),
            "EfficientNet": ("efficientnet_b0", "efficientnet_b3", "efficientnet_b5", "efficientnet_b7"),
            "Swin": ("swin_t", "swin_s"), "ViT": ("vit_b_32", "vit_l_32", "vit_h_14")}
#: steps of ``zoo_steps``, and how their shares are headed
SHARES = {"channels": "channels", "depth": "a block less", "weights": "sparse", "low rank": "low rank",
          "int8": "int8", "int8 weights": "int8 weights"}


def zoo(models: Rows) -> list[str]:
    rows = [[name, "yes" if m["ok"] else "**no**", f"{m['seconds']:.1f}", str(m["nodes"]), f"{m['max_difference']:.0e}",
             "yes" if m["loaded_equal"] else "**no**", "free" if m["dynamic_batch"] else "fixed",
             ", ".join(m["parts"]) or "whole"] for name, m in models.items()]
    head = ["", "captured", "seconds", "nodes", "difference", "loaded", "batch", "parts"]
    return ["## Capture of one model of each torchvision family", "", "`make zoo`. Largest relative difference to the "
            "model's own outputs over the examples, other batch sizes and (detectors) other image sizes; loaded: "
            "saved, loaded, equal bit for bit.", *table(head, rows)]


def pruned_zoo(models: Rows) -> list[str]:
    rows, missed = [], []
    for name, m in models.items():
        if "error" in m:
            rows.append([name, "**no**", *[""] * 7, m["error"][:80]])
            continue
        left = m["macs_after"] / max(m["macs_before"], 1)
        seconds = m.get("processor_seconds") or m["seconds"]
        rows.append([name, "yes" if m["ok"] else "**no**", str(m["nodes"]), f"{100 * left:.0f} %",
                     *(f"{seconds.get(s, 0):.1f}" for s in ("capture", "groups", "plan", "apply", "export")),
                     f"{max(m['difference'], 0):.0e}", frozen_reasons(m["frozen"])])
        if left > 0.4:
            missed.append(f"- {name}, {100 * left:.0f} %: " + "; ".join(
                f"{k} ({100 * v:.0f} % of what is left)" for k, v in list(m["held_by"].items())[:3]))
    head = ["", "holds", "nodes", "MACs left", "capture (s)", "groups (s)", "plan (s)", "apply (s)", "export (s)",
            "cut against zeroed", "frozen layers"]
    line, about = growth(models), next(iter(models.values()))
    within = [f"{family} " + ", ".join(f"{n} in {s:.2f} s" for n, s in found)
              for family, found in within_families(models).items()]
    linear = [f"The processor's seconds to find the groups grow as nodes to the power {line['exponent']} "
              f"({line['networks']} networks, {line['seconds_per_1000_nodes']} s for 1,000 nodes, "
              f"r squared {line['r_squared']}). Within a family, nodes and seconds: " + "; ".join(within) + ".", ""]
    return ["## Every model pruned at half of its channels", "", "`make zoo`. Random weights; uniform, by L1 norm. A "
            "row holds if the cut network gives what the network with the same channels zero gives (double precision, "
            f"{about['tolerance']} relative), takes a training step, and its ONNX file agrees in ONNX Runtime (0.001). "
            f"{about['threads']} thread; seconds of the processor. {unique(models, 'versions')}.", "",
            *(linear if line else []),
            *table(head, rows),
            *(["More than 40 % of the MACs are left, and what holds them:", "", *missed, ""] if missed else [])]


def growth(models: Rows) -> dict[str, float]:
    """The exponent of the processor's seconds that finding groups takes over the number of nodes, fitted on a log-log
    line. (A processor that others use too makes the seconds on the wall longer, not these.)"""
    networks = [p for m in models.values() for p in (m["parts"].values() if "parts" in m else [m]) if "groups" in p]
    points = [(p["nodes"], p["processor_seconds"]["groups"]) for p in networks if p["nodes"] >= 50]
    if len(points) < 3:
        return {}
    nodes, seconds = np.log(np.array(points, dtype=float)).T
    slope, start = np.polyfit(nodes, seconds, 1)
    rest = seconds - (slope * nodes + start)
    return {"exponent": round(float(slope), 3), "networks": len(points),
            "seconds_per_1000_nodes": round(float(np.exp(start + slope * np.log(1000))), 3),
            "r_squared": round(float(1 - rest.var() / seconds.var()), 3)}


def within_families(models: Rows) -> dict[str, list[tuple[int, float]]]:
    """Family -> (nodes, processor's seconds to find the groups) of its members."""
    return {family: [(models[n]["nodes"], models[n]["processor_seconds"]["groups"]) for n in names
                     if "processor_seconds" in models.get(n, {})] for family, names in FAMILIES.items()}


def frozen_reasons(frozen: list[list[str]]) -> str:
    """How many layers are held by what, the most frequent first; a reason's own path goes."""
    counts: dict[str, int] = {}
    for _, reason in frozen:
        text = reason.rsplit(", ", 1)[-1] if ": " in reason.rsplit(", ", 1)[-1] else reason
        counts[text] = counts.get(text, 0) + 1
    ranked = sorted(counts.items(), key=lambda i: -i[1])
    return "; ".join(f"{n} x {text}" for text, n in ranked[:4]) + ("; ..." if len(ranked) > 4 else "")


#: what was found where a file is further from PyTorch than allowed
EXPLAINED = {"timm_xcit_nano_12_p16_224": ". Roundings that fall to the other side, no wrong operator (seen with one "
             "block): 0.02 % of the first convolution's values differ by one step, 1 % of the fourth's, 12 % of the "
             "last block's by up to two. Quantized, it moves by 3 % in PyTorch where its input moves by a millionth; "
             "the float files agree to 3e-07"}


def wrong(result: Row) -> str:
    """What a step that does not hold gave."""
    if "apart" in result:
        return f"{result['apart']:.2g} apart, {result['tolerance']:g} allowed"
    return str(result.get("error", "not as said"))


def every_step(models: Rows) -> list[str]:
    """Shares of all parameters in matrices that each family treats, and how far files are from PyTorch."""
    lines, failed, left = [], [], []
    for name, m in models.items():
        if "steps" not in m:
            failed.append(f"- {name}: {m.get('error') or 'captured in parts'}")
            continue
        steps = m["steps"]
        shares = [f"{100 * steps[s]['treated']:.1f}" if "treated" in steps.get(s, {}) else "" for s in SHARES]
        apart = [f"{steps[t]['apart']:.0e}" if "apart" in steps.get(t, {}) else "" for t in ("onnxruntime", "openvino")]
        lines.append([name, "yes" if m["ok"] else "**no**", f"{m['params'] / 1e3:.0f}",
                      f"{100 * steps['channels'].get('left', float('nan')):.0f} %", *shares, *apart])
        failed += [f"- {name}, {s}: {wrong(r)}{EXPLAINED.get(name, '')}" for s, r in steps.items() if not r["ok"]]
        if reasons := frozen_reasons(steps["channels"].get("frozen", [])):
            left.append(f"- {name}: {reasons}")
    head = ["", "holds", "params (k)", "MACs left", *(f"{s} (%)" for s in SHARES.values()), "ONNX Runtime", "OpenVINO"]
    held = sum(1 for m in models.values() if m["ok"])
    return ["## Every step on many architectures", "", "`python benchmarks/zoo_steps.py`. Small random models. A row "
            "holds if the model is captured; half of its channels cut equal them zeroed, and it trains; a block less, "
            "low rank, half of the weights zero and int8 give finite outputs; int8 saved and loaded is equal bit for "
            "bit, and its files agree in ONNX Runtime and OpenVINO (largest relative difference). Shares: of all "
            "parameters in matrices, those that a step changes, stores otherwise or takes away. "
            f"{held} of {len(models)} hold.",
            *table(head, lines), *(["What does not hold:", "", *failed, ""] if failed else []),
            "Layers whose channels stay, and why:", "", *left, ""]
