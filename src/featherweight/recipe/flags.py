"""What got worse without the step saying so."""

from __future__ import annotations

from featherweight import measure
from featherweight.errors import PlanError
from featherweight.measure import Latency, Measurement
from featherweight.network import Network
from featherweight.recipe.recipe import rewrites
from featherweight.recipe.result import Decision
from featherweight.report import units
from featherweight.steps import Plan, Rewrite, Step
from featherweight.steps.kinds import kind_of

#: without paired ratios, a median and a lower quartile this much larger are called slower (disturbances move the upper
#: quartile)
SLOWER = 1.05


def flags_of(index: int, step: Step, decided: list[Decision], before: Measurement, after: Measurement,
             same: bool) -> list[str]:
    """One sentence for everything that is worse in ``after`` than in ``before`` and is not in a plan's ``grows``.

    Latencies are compared as timed in the same rounds, where the measurement has that; a Fit that rewrites nothing
    leaves the graph as it was and is not judged by them.
    """
    name = f"step {index} ({kind_of(step)})"
    said = {what for decision in decided for what in decision.grows}
    found: list[str] = []
    if same:
        return [f"{name} changed nothing"]
    if rewrites(step) and "latency" not in said:
        found += slower(name, "before" if "before" in after.beside else "original", before.latency, after)
    if "bytes" not in said and after.file_bytes > before.file_bytes:
        found.append(f"{name} made the deployed file larger: {before.file_bytes} -> {after.file_bytes} bytes")
    if "macs" not in said and after.macs > before.macs:
        found.append(f"{name} made it compute more: {before.macs} -> {after.macs} MACs a sample")
    if after.agreement is not None and not after.agreement.ok:
        found.append(f"{name}: {after.agreement.complaint()}")
    return found


def unbounded(index: int, step: Step, before: int, after: int) -> list[str]:
    """A sentence if more of the outputs on a batch are infinite or NaN after a step than before it."""
    return [f"step {index} ({kind_of(step)}) gives {after} numbers that are not finite in the outputs of one batch, "
            f"where there were {before}; look for weights or scales that a number type cannot hold (fp16 ends at "
            "65504)"] if after > before else []


def slower(name: str, other: str, old: Latency | None, after: Measurement) -> list[str]:
    """A sentence if ``after`` is slower than ``other`` beside it, beyond doubt; than ``old`` where none is beside."""
    new, ratio = after.latency, after.ratios.get(other)
    old = after.beside.get(other, old)
    if old is None or new is None:
        return []
    doubtless = ratio.verdict == "slower" if ratio is not None else (
        new.median_s > SLOWER * old.median_s and new.q1_s > SLOWER * old.q1_s)
    scale, unit = units.unit("seconds", [old.median_s])
    return [f"{name} made it slower: {units.number(old.median_s, scale)} {unit} -> {units.number(new.median_s, scale)} "
            f"{unit} (medians in {new.runtime}, {new.threads} thread(s), batch {new.batch})"] if doubtless else []


def check_growth(index: int, step: Rewrite, plan: Plan, before: Network, after: Network) -> None:
    """Raises PlanError if ``after`` has more parameters than ``before`` and the plan did not say so."""
    old, new = measure.params(before), measure.params(after)
    if new > old and "params" not in plan.grows:
        raise PlanError(f"step {index} ({kind_of(step)}) grew the network from {old} to {new} parameters without "
                        "saying so in its plan's grows; this is a fault of the step")
