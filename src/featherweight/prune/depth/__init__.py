"""Whole layers and blocks."""
