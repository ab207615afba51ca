"""Networks in the runtime they will live in: export to a file, load it, call it, and compare it with PyTorch."""

from featherweight.deploy import onnxruntime  # registers the target
from featherweight.deploy.target import TARGETS, Agreement, Runner, Target, register, target, verify

__all__ = ["TARGETS", "Agreement", "Runner", "Target", "onnxruntime", "register", "target", "verify"]
