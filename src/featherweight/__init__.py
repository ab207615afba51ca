"""Makes a trained PyTorch network small and fast enough for its device, and proves that it still works."""

from featherweight import balance, distill, errors, factorize, prune, quantize, recover, share
from featherweight.judge.sensitivity import Sensitivity, sensitivity
from featherweight.measure import scores
from featherweight.network import Assembly, Network, capture, load
from featherweight.recipe import Job, Recipe, Result, compress
from featherweight.task import Task

__version__ = "0.1.0"
__all__ = ["Assembly", "Job", "Network", "Recipe", "Result", "Sensitivity", "Task", "balance", "capture",
           "compress", "distill", "errors", "factorize", "load", "prune", "quantize", "recover", "scores",
           "sensitivity", "share"]
