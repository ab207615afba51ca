"""Distillation losses as pure functions: tensors of the student and of the teacher in, a scalar out."""
