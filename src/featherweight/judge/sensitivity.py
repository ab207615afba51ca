"""``sensitivity``: how much each layer bears of what a family can do to it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from featherweight.errors import RecipeError, did_you_mean
from featherweight.judge.candidates import Family, Option, family_of, judged
from featherweight.judge.damage import Judge
from featherweight.network import Network
from featherweight.seeds import generators_kept
from featherweight.steps.given import check_network, check_task
from featherweight.task import Task


@dataclass(frozen=True)
class Sensitivity:
    """What it does to a network that ``layer`` alone takes the form that ``option`` of ``family`` names, all others as
    they are. layer: the name of a weight; of the group for "prune.channels", of the block for "prune.depth".

    Example:
        >>> found = fw.sensitivity(network, task, "quantize", options=("int8",))
        >>> [(one.layer, one.option) for one in found if one.damage < 0.1]
        [('0.weight', 'int8'), ('3.weight', 'int8'), ('7.weight', 'int8')]
    """

    layer: str
    family: str
    option: Option
    damage: float


def sensitivity(network: Network, task: Task, family: str | Family = "quantize", measure: str = "output",
                options: Collection[Option] | None = None, layer: str | None = None, *, split: str = "calibration",
                batches: int | None = 2, probes: int = 32, seed: int = 0) -> tuple[Sensitivity, ...]:
    """The damage of every option of a family in every layer: one pass over the batches for each of them.

    family: "quantize" (options are number formats: "int4", with activations "int4/uint4"), "share" (bits of a
        codebook's index), "factorize" (the energy that is kept), "prune.channels" (the share of a group that goes),
        "prune.weights" (sparsity), "prune.depth" (the block goes), a name that was registered, or an instance, as
        ``fw.quantize.Kinds(step=fw.quantize.Quantize(activations=None))``.
    measure: "output": |y' - y|^2 / |y|^2 over all floating-point outputs. "loss": by how much the task's loss rises.
        "score": by how many points the task's score falls. "hessian": the mean trace of the loss's Hessian times
        |W' - W|^2 (Dong et al. 2020, "HAWQ-V2", eq. 10), of weights alone; a negative trace counts as none. It takes
        ``probes`` double backward passes a batch, for all layers and options together, with vectors drawn by ``seed``.
        It forecasts small changes at a minimum of the loss: where the loss is near zero (on images that were trained
        on) or two bits are left, trust "output" rather.
    options: those of the family to be measured; None: all that it offers by itself. layer: one alone; None: all.
    split, batches: what is read. Raises RecipeError for unknown options, TaskError for what the task lacks.

    Example:
        >>> found = fw.sensitivity(network, task, "prune.channels", measure="loss", options=(0.5,))
        >>> [one.layer for one in found]
        ['0', '3']
    """
    check_network("sensitivity", network)
    check_task("sensitivity", task)
    source = family_of(family, options)
    judge = Judge(measure, split, batches, probes, seed)
    judge.check("sensitivity")
    task.require(split)
    with generators_kept():
        ready = source.prepared(network.copy().eval())
        found = source.candidates(ready, task, layer)
    if layer is not None and not found:
        names = {c.layer for c in source.candidates(ready, task)}
        raise RecipeError(f"sensitivity was given layer={layer!r}, for which {source.name} offers nothing; "
                          f"{did_you_mean(layer, names)}")
    return tuple(Sensitivity(c.layer, c.family, c.option, float(c.damage or 0.0))
                 for c in judged(ready, task, found, judge))


__all__ = ["Sensitivity", "sensitivity"]
