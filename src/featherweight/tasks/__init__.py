"""Tasks of the common kinds: loss, score and splits from DataLoaders, or from images in folders, tables and arrays."""

from featherweight.tasks.arrays import arrays
from featherweight.tasks.common import classification, language, regression, segmentation
from featherweight.tasks.images import images
from featherweight.tasks.table import table, texts

__all__ = ["arrays", "classification", "images", "language", "regression", "segmentation", "table", "texts"]
