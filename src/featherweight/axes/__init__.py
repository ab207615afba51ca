"""Which channels live and die together: labels through the graph, groups of channels, cutting and zeroing a width."""

from featherweight.axes import mend_more  # noqa: F401  (it fills the tables of mend and zero)
