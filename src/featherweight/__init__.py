"""featherweight: makes a trained PyTorch network small and fast enough for its device, and proves that it still works."""

from featherweight import errors
from featherweight.network import Assembly, Network, capture, load
from featherweight.task import Task

__version__ = "0.1.0"
__all__ = ["Assembly", "Network", "Task", "capture", "errors", "load"]
