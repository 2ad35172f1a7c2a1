"""Evaluation of finished models: the losses of any checkpoint, lm-eval's tasks, and the portable export."""
