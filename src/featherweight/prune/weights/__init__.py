"""Single weights: patterns, scores, schedules during training, refits."""
