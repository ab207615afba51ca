"""What a network costs and how good it is: weights, MACs, bytes, latency, memory, score."""

from featherweight.measure.deployed import as_call, measure, sample_inputs
from featherweight.measure.layers import LayerFigures, layers
from featherweight.measure.macs import COUNTERS, ZERO, Macs, macs
from featherweight.measure.measurement import Measurement
from featherweight.measure.memory import peak_memory
from featherweight.measure.timing import Latency, Ratio, Timed, interleave, paired, side_by_side
from featherweight.measure.weights import Weight, nonzeros, params, weights
from featherweight.steps.moved import moved
from featherweight.task import scores

__all__ = ["COUNTERS", "ZERO", "Latency", "LayerFigures", "Macs", "Measurement", "Ratio", "Timed", "Weight", "as_call",
           "interleave", "layers", "macs", "measure", "nonzeros", "paired", "params", "peak_memory", "sample_inputs",
           "scores", "side_by_side", "weights"]

__getattr__ = moved(__name__, {"Layer": "featherweight.measure.LayerFigures"})
