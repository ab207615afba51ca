"""Strategies without a teacher beforehand: from the network itself, from peers, from earlier generations."""
