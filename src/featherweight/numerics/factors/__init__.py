"""Kernels as chains of smaller ones: forms, decompositions, ranks."""
