"""Measuring finished models: losses of any checkpoint, lm-eval's tasks, and the export that others open."""
