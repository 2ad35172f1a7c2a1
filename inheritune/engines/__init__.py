"""DeepSpeed: the check of its JSON, the engine with its optimizer and schedule, checkpoints, resuming at
another size.

All that knows DeepSpeed's classes and files is here.
"""
