"""How much a channel matters: from weights, from data, from reconstruction."""
