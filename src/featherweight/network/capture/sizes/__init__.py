"""Which sizes of the inputs stay free beside the batch, and how far they go."""
