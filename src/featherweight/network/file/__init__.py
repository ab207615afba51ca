"""The ``.fw`` file: its format, the operators that it may name, the digest of a network."""
