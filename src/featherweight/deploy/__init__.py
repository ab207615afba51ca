"""Networks in the runtime they will live in: export to a file, load it, call it, and compare it with PyTorch."""

from featherweight.deploy.onnx import onnxruntime
from featherweight.deploy.openvino import target as openvino  # registers the targets
from featherweight.deploy.processor import saturates
from featherweight.deploy.saturation import saturating
from featherweight.deploy.target import (
    FLOAT_TOLERANCE,
    QUANTIZED_TOLERANCE,
    TARGETS,
    Agreement,
    Runner,
    Target,
    register,
    target,
    verify,
)

__all__ = ["FLOAT_TOLERANCE", "QUANTIZED_TOLERANCE", "TARGETS", "Agreement", "Runner", "Target",
           "onnxruntime", "openvino", "register", "saturates", "saturating", "target", "verify"]
