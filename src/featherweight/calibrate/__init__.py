"""Calibration data through networks: activations watched by taps, two networks walked side by side, moments."""
