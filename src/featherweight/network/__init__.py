"""The captured graph that is the model: capture, run, train, edit, save."""

from featherweight.network.assembly import Assembly
from featherweight.network.capture.capture import capture
from featherweight.network.fold import fold_batch_norm, settle_batch_norm
from featherweight.network.load import load
from featherweight.network.network import FreeAxis, Input, Network, Signature

__all__ = ["Assembly", "FreeAxis", "Input", "Network", "Signature", "capture", "fold_batch_norm", "load",
           "settle_batch_norm"]
