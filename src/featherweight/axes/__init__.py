"""Which channels live and die together: labels through the graph, groups of channels, cutting and zeroing a width."""
