"""Which activation of the student is compared with which of the teacher: by path, by node, or found automatically."""

from featherweight.distill.taps.paths import Tapped, matched, output_node

__all__ = ["Tapped", "matched", "output_node"]
