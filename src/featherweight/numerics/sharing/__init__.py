"""Codebooks under a price of bits, and the mixture that draws weights together."""
