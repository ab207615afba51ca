"""What the forms of layers are in the graph."""
