"""Learning from a teacher: terms that a Fit adds to the task's loss."""

from featherweight.distill.logits import Logits

__all__ = ["Logits"]
