"""``tune``: options of a whole pipeline that nothing but running it can judge."""

from featherweight.balance.tuning.tune import Tuned, tune

__all__ = ["Tuned", "tune"]
