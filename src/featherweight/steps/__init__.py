"""The seam every technique hangs in: decide first (a Plan), then do; or change values only (a Fit).

A technique is a frozen dataclass whose fields are its options, and whose constructor stores and does nothing else.
"""

from featherweight.network.layers import Skipped
from featherweight.steps.companion import Context, Criterion, Driver, Objective
from featherweight.steps.plan import PLANS, Plan
from featherweight.steps.step import Fit, Rewrite, Stage, Step

__all__ = ["PLANS", "Context", "Criterion", "Driver", "Fit", "Objective", "Plan", "Rewrite", "Skipped", "Stage",
           "Step"]
