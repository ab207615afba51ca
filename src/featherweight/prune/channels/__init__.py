"""Whole channels: scores, allocations, cuts, refits, schedules during training."""
