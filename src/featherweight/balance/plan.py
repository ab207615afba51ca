"""``MixedPlan``: plans of several families, one after another."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from featherweight.errors import PlanError
from featherweight.network import Network, fold_batch_norm
from featherweight.steps import Plan


@dataclass(frozen=True)
class MixedPlan(Plan):
    """Batch norm folded, then ``parts`` in order: each a plan as ``Plan.to_json`` writes it, for the network that those
    before it left. The tensors of part i lie in ``tensors`` under "i/NAME".

    Example:
        >>> folded = fw.network.fold_batch_norm(network)
        >>> channels = fw.prune.Channels(macs=0.5).plan(folded, task)
        >>> weights = fw.prune.Weights(sparsity=0.5).plan(channels.apply(folded), task)
        >>> small = fw.balance.MixedPlan.of([channels, weights]).apply(network)
    """

    kind: ClassVar[str] = "balance.mixed/1"
    parts: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, plans: Sequence[Plan], **options: Any) -> MixedPlan:
        """The plan that applies ``plans`` one after another. options: ``skipped`` and ``grows``."""
        tensors = {f"{i}/{name}": t for i, plan in enumerate(plans) for name, t in plan.tensors.items()}
        return cls(tuple(json.loads(plan.to_json()) for plan in plans), tensors=tensors, **options)

    def plans(self) -> tuple[Plan, ...]:
        """The parts as plans. Raises PlanError for a part that is none."""
        found: list[Plan] = []
        for i, part in enumerate(self.parts):
            mine = {name.removeprefix(f"{i}/"): t for name, t in self.tensors.items() if name.startswith(f"{i}/")}
            found.append(Plan.from_json(json.dumps(part), mine))
            if isinstance(found[-1], MixedPlan):
                raise PlanError(f"part {i} of this plan is a plan of several parts itself; expected single ones")
        return tuple(found)

    def apply(self, network: Network) -> Network:
        """A copy with batch norm folded and every part applied."""
        result = fold_batch_norm(network) if self.parts else network.copy()
        for plan in self.plans():
            result = plan.apply(result)
        return result

    def summary(self) -> str:
        return "; ".join(plan.summary() for plan in self.plans()) or "nothing changes"



__all__ = ["MixedPlan"]
