"""The seam every technique hangs in: decide first (a Plan), then do; or change values only (a Fit).

A technique is a frozen dataclass whose fields are its options, and whose constructor stores and does nothing else.
"""

from featherweight.network.layers import Skipped
from featherweight.steps.companion import ALONE, Beside, Companion, Context
from featherweight.steps.moved import moved
from featherweight.steps.plan import PLANS, Plan
from featherweight.steps.step import Fit, Rewrite, Stage, Step

__all__ = ["ALONE", "PLANS", "Beside", "Companion", "Context", "Fit", "Plan", "Rewrite", "Skipped", "Stage", "Step"]

__getattr__ = moved(__name__, {"Driver": "featherweight.steps.Companion", "Criterion": "featherweight.steps.Companion",
                               "Objective": "featherweight.steps.Beside"})
