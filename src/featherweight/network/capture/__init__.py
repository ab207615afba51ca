"""From a PyTorch module to a clean graph."""
