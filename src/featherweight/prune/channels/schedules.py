"""Channels that go while the network trains: what makes them small, and when they are cut.

Every schedule ends alike. At progress ``end`` the channels are decided and held at zero, and the rest of the training
mends what that broke; at the end of the Fit the plan cuts them, which changes nothing any more.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from featherweight.axes.cut import kept_atoms
from featherweight.axes.groups import AxisGroup, axis_groups
from featherweight.network import Network
from featherweight.prune.channels.choose import ChannelGoal, candidates, choose
from featherweight.prune.channels.held import Coupled, HeldChannels, channels_gone
from featherweight.prune.channels.plan import ChannelPlan
from featherweight.prune.channels.scores.table import Scores
from featherweight.prune.weights.schedules import cubic
from featherweight.seeds import generators_kept
from featherweight.steps import Companion, Plan
from featherweight.task import Task


@dataclass(frozen=True)
class Pace:
    """The options of ``Channels`` that say when channels go in training, under the same names."""

    schedule: str
    strength: float | None
    begin: float
    end: float
    frequency: float


class ChannelDriver(Companion):
    """What all schedules share: progress in ticks of ``frequency``, the decision, its holding, and its plan."""

    #: ``strength`` where the step gives none
    STRENGTH = 0.0

    def __init__(self, wanted: ChannelGoal, pace: Pace, network: Network, task: Task) -> None:
        self.wanted, self.pace, self.network, self.task = wanted, pace, network, task
        self.strength = self.STRENGTH if pace.strength is None else pace.strength
        self.axes = axis_groups(network, wanted.heads)
        self.groups = [g for g in candidates(wanted, network, self.axes)[0] if not self.refuse(g)]
        self.held = HeldChannels(network, self.axes, self.groups)
        self.tick = -1
        self.active = self.fixed = False
        self.plan: ChannelPlan | None = None

    # ---- what a schedule is
    @abstractmethod
    def work(self, progress: float) -> None:
        """Called at every tick between ``begin`` and ``end``."""

    def refuse(self, group: AxisGroup) -> str:
        """Why this schedule can do nothing for a group; "" if it can."""
        return ""

    def scores(self, network: Network) -> Callable[[Sequence[AxisGroup]], Scores] | None:
        """Scores that belong to the schedule; None takes the step's."""
        return None

    # ---- what all do
    def update(self, progress: float) -> None:
        pace = self.pace
        if self.fixed or progress < pace.begin:
            return
        if progress >= pace.end:
            self.fix()
            return
        self.active = True
        due = int((progress - pace.begin) / pace.frequency + 1e-9)
        if due > self.tick:
            self.tick = due
            self.work(progress)

    def fix(self) -> None:
        """The last decision; from here on the channels are held at zero."""
        if self.plan is None:
            self.decide()
        self.hold()
        self.active, self.fixed = False, True

    def decide(self, share: float = 1.0) -> None:
        """Chooses the channels to keep when this share of what is to go in the end is gone."""
        wanted = replace(self.wanted, share=1 - (1 - self.wanted.share) * share)
        network = self.held.free()
        with generators_kept():
            found = choose(wanted, network, self.task, axes=self.axes, scores=self.scores(network), refuse=self.refuse)
        self.plan = ChannelPlan(found.keep, found.shapes(network), found.macs_before, found.macs_after,
                                heads=self.wanted.heads, skipped=found.skipped)

    def hold(self) -> None:
        assert self.plan is not None
        self.held.hold(kept_atoms(self.axes, self.plan.keep))

    @property
    def settled(self) -> bool:
        return self.fixed

    def now(self) -> ChannelPlan | None:
        return self.plan

    def finish(self) -> ChannelPlan:
        """Takes the taps off; the plan cuts what is held, as much as was asked for, however far the training went."""
        self.update(1.0)
        self.close()
        assert self.plan is not None
        return self.plan

    def close(self) -> None:
        self.held.close()

    def state(self) -> dict[str, Tensor]:
        text = self.plan.to_json() if self.plan is not None else ""
        return {"flags": torch.tensor([self.tick, self.active, self.fixed]),
                "plan": torch.tensor(list(text.encode()), dtype=torch.uint8),
                "kept": torch.from_numpy(self.held.kept.copy()),
                **{f"aside.{n}": t for n, t in self.held.aside.items()}}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.tick, active, fixed = state["flags"].tolist()
        self.active, self.fixed = bool(active), bool(fixed)
        text = bytes(state["plan"].tolist()).decode()
        plan = Plan.from_json(text) if text else None
        assert plan is None or isinstance(plan, ChannelPlan)
        self.plan = plan
        for name, aside in self.held.aside.items():
            aside.copy_(state[f"aside.{name}"])
        self.held.take(state["kept"].cpu().numpy().astype(bool))


class Gradual(ChannelDriver):
    """Held channels grow from none to all on the cubic schedule of Zhu & Gupta 2017, eq. 1, in what the target counts.

    At each tick all channels are scored anew, held ones as they were when they were taken, so one that was taken too
    early comes back (as in SFP, He et al. 2018); from ``end`` on they are fixed.
    """

    def work(self, progress: float) -> None:
        self.decide(cubic(progress, self.pace.begin, self.pace.end, 1.0))
        self.hold()

    def fix(self) -> None:
        self.plan = None
        super().fix()


class GrowingPenalty(ChannelDriver):
    """GReg-1 (Wang et al. 2021, section 3.2): the channels are chosen at ``begin``, and the L2 penalty on all that is
    coupled to them grows by equal steps, to ``strength`` at ``end``: they fade, and the network gets used to it."""

    STRENGTH = 1.0

    def __init__(self, wanted: ChannelGoal, pace: Pace, network: Network, task: Task) -> None:
        super().__init__(wanted, pace, network, task)
        self.coupled = [Coupled(network, g) for g in self.groups]

    def work(self, progress: float) -> None:
        if self.plan is None:
            self.decide()

    def after_backward(self) -> None:
        if not self.active or self.plan is None:
            return
        ticks = (self.pace.end - self.pace.begin) / self.pace.frequency
        penalty = self.strength * min((self.tick + 1) / ticks, 1.0)
        for group, coupled in zip(self.groups, self.coupled, strict=True):
            if group.name in self.plan.keep:
                coupled.pull(penalty * channels_gone(group, self.plan.keep))


class GroupLasso(ChannelDriver):
    """Group sparsity on axis groups (Fang et al. 2023, "DepGraph", section 3.4): strength times the sum over channels
    of gamma_k ||w[k]||, w[k] all weights coupled to channel k.

    gamma_k = 2^(4 (I_max - I_k) / (I_max - I_min)) with I_k = ||w[k]||^2 in each group: the small are drawn to zero up
    to 16 times as hard as the large. They go by the step's score at ``end``.
    """

    STRENGTH = 5e-4
    ALPHA = 4.0

    def __init__(self, wanted: ChannelGoal, pace: Pace, network: Network, task: Task) -> None:
        super().__init__(wanted, pace, network, task)
        self.coupled = [Coupled(network, g) for g in self.groups]

    def work(self, progress: float) -> None:
        pass

    def after_backward(self) -> None:
        if not self.active:
            return
        for coupled in self.coupled:
            squares = coupled.total(torch.square)
            low, high = squares.min(), squares.max()
            gamma = torch.exp2(self.ALPHA * (high - squares) / (high - low).clamp_min(1e-12))
            coupled.pull(self.strength * gamma / squares.sqrt().clamp_min(1e-12))


class Slimming(ChannelDriver):
    """Network Slimming (Liu et al. 2017, eq. 1): strength times the sum of |gamma| over the scales of normalizations
    that channels pass; at ``end`` the channels with the smallest scales go, whatever ``score`` says."""

    STRENGTH = 1e-4

    def __init__(self, wanted: ChannelGoal, pace: Pace, network: Network, task: Task) -> None:
        super().__init__(wanted, pace, network, task)
        self.coupled = [Coupled(network, g, ("norm",)) for g in self.groups]

    def work(self, progress: float) -> None:
        pass

    def refuse(self, group: AxisGroup) -> str:
        scaled = any(m.role == "norm" for m in group.members)
        return "" if scaled else "no normalization scales its channels, and schedule=\"slimming\" needs one"

    def scores(self, network: Network) -> Callable[[Sequence[AxisGroup]], Scores]:
        def sizes(groups: Sequence[AxisGroup]) -> Scores:
            return [Coupled(network, g, ("norm",)).total(torch.abs).double().cpu().numpy() for g in groups]

        return sizes

    def after_backward(self) -> None:
        if self.active:
            for coupled in self.coupled:
                coupled.pull(torch.full((coupled.size,), self.strength), torch.sign)


#: name -> schedule of channels during training; add one of your own under a new name
SCHEDULES: dict[str, type[ChannelDriver]] = {"gradual": Gradual, "slimming": Slimming, "group_lasso": GroupLasso,
                                             "growing": GrowingPenalty}


def start(wanted: ChannelGoal, pace: Pace, network: Network, task: Task) -> ChannelDriver:
    """The driver of ``pace.schedule`` on a network that is about to train."""
    return SCHEDULES[pace.schedule](wanted, pace, network, task)
