"""Mixed: every layer gets the form that it bears, of what quantization and other families offer, within budgets."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from featherweight.balance.choose import COUNTED, FLOAT, Asked, as_step, chosen, joined
from featherweight.balance.ladder import check_step
from featherweight.errors import RecipeError
from featherweight.judge.candidates import FAMILIES, family_of
from featherweight.judge.damage import Judge
from featherweight.network import Network
from featherweight.numerics.formats import check_kinds
from featherweight.quantize.candidates import Kinds
from featherweight.quantize.request import split
from featherweight.quantize.step import Quantize
from featherweight.quantize.training.driver import Training
from featherweight.steps import ALONE, Context, Plan, Rewrite, Stage
from featherweight.steps.options import REMAINS, Numbers, check_numbers
from featherweight.task import Task

#: what a ``Mixed`` may have budgets of
BUDGETS = ("bytes", "bits", "latency", *(name for name in COUNTED if name != "bytes"))
NUMBERS = {**dict.fromkeys(BUDGETS, REMAINS), "bits": Numbers(4, above=0, most=32, unit=" bits", none="another budget"),
           "damage": Numbers(0.01, above=0, none="another budget")}


def _step() -> Quantize:
    return Quantize(ends=None)


@dataclass(frozen=True)
class Mixed(Rewrite):
    """A form for every layer: one of ``kinds``, or of what ``families`` offer, the damages summing to the least that
    the budgets allow.

    step: the ``Quantize`` that stores the layers; its ``mixed`` and ``ends`` settle layers beforehand, whose costs
        count.

    Give one budget or several, which hold together:
    bytes: of the stored tensors, as a fraction 0..1 of what is there; numbers of few bits count as they are packed in
        our own file. archive: of the entropy-coded archive, as a fraction; macs: of the multiply-accumulates. bits: of
        one weight, on average over all that are on a grid or could be. latency: of the whole network's in the step's
        ``target`` (None: the one that is compressed for), as a fraction; every layer in every other form is timed
        inside the network, all others being of the first. Kinds that the runtime has no kernels for (those below 8
        bits, mostly) are no faster there than float: use kinds=("int8", "float").
    damage: what the damages may sum to. With it the fewest bytes are chosen that keep within it, and within the others.

    kinds: what a layer may be, as in ``Quantize(mixed=...)``: "int4", with activations "int4/uint4", or "float".
    families: names of other families whose forms a layer may take in the place of a kind: "share" (codebooks),
        "factorize" (low rank), "prune.weights" (zeros), or one that was registered. Such a layer is not quantized too.
    how: what damage is: "output", "loss", "score" or "hessian" (see ``fw.sensitivity``); damages are measured one layer
        at a time on ``batches`` of ``split``, weights rounded to nearest, and taken to add up; what comes out is held
        against the same kind for all, measured as a whole ("hessian": by the outputs). probes, seed: for "hessian".

    A budget that cannot be met is approached as far as the forms go, which ``skipped`` then says. Also works during
    training, without ``families``: the kinds are chosen at its start.

    Example:
        >>> mixed = fw.balance.Mixed(fw.quantize.Quantize(activations=None), bytes=0.3, kinds=("int8", "int4"))
        >>> stored = mixed.plan(network, task).apply(network)
    """

    stage: ClassVar[Stage] = Stage.PRECISION
    step: Quantize = field(default_factory=_step)
    bytes: float | None = None
    bits: float | None = None
    latency: float | None = None
    kinds: tuple[str, ...] = ("int8", "int6", "int4", "int3", "ternary")
    how: str = "output"
    split: str = "calibration"
    batches: int | None = 2
    probes: int = 32
    seed: int = 0
    archive: float | None = None
    macs: float | None = None
    damage: float | None = None
    families: tuple[str, ...] = ()

    def plan(self, network: Network, task: Task) -> Plan:
        """Chooses, and plans what was chosen. Raises RecipeError for options that make no sense and TaskError for what
        the task lacks."""
        self.check()
        asked = self._asked()
        found = chosen(asked, network, task)
        made = joined(asked, network, task, found.picks, found.settled)
        return replace(made, skipped=(*made.skipped, *found.skipped))

    def start(self, network: Network, task: Task, context: Context = ALONE) -> Training:
        """Used during training: chooses, and trains on the grids that were chosen."""
        self.check()
        self.check_training()
        asked = self._asked()
        found = chosen(asked, network, task)
        driver = as_step(asked, found.picks, found.settled).start(network, task, context)
        driver.skipped += found.skipped
        return driver

    def check_training(self) -> None:
        """Raises RecipeError for options that have no meaning during training, whichever kinds are chosen."""
        if self.families:
            raise RecipeError(f"Mixed was given families={self.families}, which are not trained beside integers; leave "
                              "them out in Train(during=...), or put Mixed into the recipe as a step of its own")
        kinds = {kind: kind for kind in self.kinds if kind != FLOAT}
        replace(self.step, mixed={**self.step.mixed, **kinds}).check_training()

    def _asked(self) -> Asked:
        budgets = {name: getattr(self, name) for name in BUDGETS if getattr(self, name) is not None}
        return Asked(self.step, self.kinds, self.families, budgets, self.damage, self._judge())

    def _judge(self) -> Judge:
        return Judge(self.how, self.split, self.batches, self.probes, self.seed)

    def check(self) -> None:
        """Raises RecipeError for options that make no sense."""
        check_step("Mixed", self.step)
        self._check_budgets()
        if self.step.weights != "int8":
            raise RecipeError(f"Mixed was given weights={self.step.weights!r}, but chooses them; write "
                              f'kinds=("{self.step.weights}", ...)')
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise RecipeError(f"Mixed was given kinds={self.kinds}; expected different ones, as in "
                              'kinds=("int8", "int4")')
        for kind in self.kinds:
            if kind != FLOAT:
                check_kinds("kinds", *split(kind, self.step.activations))
        for name in self.families:
            self._check_family(name)
        self._judge().check("Mixed", "how")

    def _check_budgets(self) -> None:
        goals = (*BUDGETS, "damage")
        if all(getattr(self, name) is None for name in goals):
            raise RecipeError(f"Mixed was given none of {', '.join(goals)}; expected one of them, or several: write "
                              "Mixed(bytes=0.15) to keep that share of the bytes, or Mixed(bits=4)")
        check_numbers(self, NUMBERS)

    def _check_family(self, name: str) -> None:
        if name == Kinds.name:
            raise RecipeError('Mixed was given families=("quantize", ...), whose forms are its kinds; write '
                              'kinds=("int8", "int4")')
        if not family_of(name).single:
            raise RecipeError(f"Mixed was given families={self.families}; {name!r} changes several tensors at once, "
                              "and a layer's form would depend on others: put its step into the recipe before Mixed; "
                              f"families can be {', '.join(n for n, f in FAMILIES.items() if f.single)}")
        if self.bits is not None:
            raise RecipeError(f"Mixed was given bits={self.bits} and families={self.families}; bits are counted of "
                              "numbers on a grid alone: write Mixed(bytes=0.15) with families")


__all__ = ["BUDGETS", "Mixed"]
