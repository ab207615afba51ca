"""What a network costs and how good it is: weights, MACs, bytes, latency, memory, score."""

from featherweight.measure import scores
from featherweight.measure.layers import LayerFigures, layers
from featherweight.measure.macs import COUNTERS, ZERO, Macs, macs
from featherweight.measure.measurement import Measurement, as_call, measure, sample_inputs
from featherweight.measure.memory import peak_memory
from featherweight.measure.timing import Latency, interleave
from featherweight.measure.weights import Weight, nonzeros, params, weights
from featherweight.steps.moved import moved

__all__ = ["COUNTERS", "ZERO", "Latency", "LayerFigures", "Macs", "Measurement", "Weight", "as_call", "interleave",
           "layers", "macs", "measure", "nonzeros", "params", "peak_memory", "sample_inputs", "scores", "weights"]

__getattr__ = moved(__name__, {"Layer": "featherweight.measure.LayerFigures"})
