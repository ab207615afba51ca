"""Fine-tuning (with objectives and in-training rewrites) and batch-norm re-estimation."""

from featherweight.recover import integrations as integrations
from featherweight.recover.attach import Attached, attach
from featherweight.recover.batchnorm import BatchNorm
from featherweight.recover.train import Train

__all__ = ["Attached", "BatchNorm", "Train", "attach"]
