"""Which way each weight is rounded."""
