"""Tensors in, tensors out: the mathematics, with the papers cited. No models, no files."""
