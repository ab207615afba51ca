"""What a network is for: its batches, its loss and score; and tasks of the common kinds from files."""

from featherweight.task.arrays import arrays
from featherweight.task.batches import Batch as Batch
from featherweight.task.batches import Inputs as Inputs
from featherweight.task.batches import Predict as Predict
from featherweight.task.batches import batch_size, call, move
from featherweight.task.images import images
from featherweight.task.nests import described as described
from featherweight.task.table import table, texts
from featherweight.task.task import SPLITS as SPLITS
from featherweight.task.task import Pass as Pass
from featherweight.task.task import Split as Split
from featherweight.task.task import Task
from featherweight.task.task import told as told

__all__ = ["Task", "arrays", "batch_size", "call", "images", "move", "table", "texts"]
